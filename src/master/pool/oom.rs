//! Detects whether the kernel killed a worker because memory ran out. The kernel sends SIGKILL, as an operator might, but counts its kills.
//!
//! The counter of the process's cgroup covers the processes in that cgroup. Without such a counter, the counter of the
//! whole system is used. The death of another process may have raised that counter at the same moment, so the cause is
//! then a guess, and code that depends on the cause must also be correct if the guess is wrong.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use super::supervisor::Uptime;

/// A death within this time after an increase of the counter is attributed to lack of memory.
const SAME_MOMENT: Duration = Duration::from_secs(1);

pub(crate) struct OomKills {
    source: PathBuf,
    /// Whether the counter covers only the processes of the server's cgroup.
    is_own: bool,
    count: u64,
    rose_at: Option<Uptime>,
}

impl OomKills {
    /// Reads the counter's initial value.
    pub(crate) fn new() -> Self {
        let own = fs::read_to_string("/proc/self/cgroup").ok().and_then(|text| Some(events_of(&text)?.into()));
        let own = own.filter(|path: &PathBuf| path.exists());
        let (is_own, source) = (own.is_some(), own.unwrap_or_else(|| "/proc/vmstat".into()));
        let count = fs::read_to_string(&source).ok().and_then(|text| count_in(&text)).unwrap_or(0);
        Self { source, is_own, count, rose_at: None }
    }

    /// Returns the cause, for the log, if the kernel killed a worker for lack of memory. Must be called when a worker
    /// is found to have died of a SIGKILL that the master did not send.
    pub(crate) fn explain(&mut self, now: Uptime) -> Option<&'static str> {
        let count = fs::read_to_string(&self.source).ok().and_then(|text| count_in(&text));
        self.counted(count.unwrap_or(self.count), now).then(|| self.cause())
    }

    fn cause(&self) -> &'static str {
        if self.is_own { "oom-kill" } else { "perhaps-oom-kill" }
    }

    fn counted(&mut self, count: u64, now: Uptime) -> bool {
        if count > self.count {
            self.rose_at = Some(now);
        }
        self.count = count;
        self.rose_at.is_some_and(|at| now.saturating_sub(at) < SAME_MOMENT)
    }
}

/// Returns the counter file of a cgroup, given the text of `/proc/PID/cgroup`. If memory is accounted for by cgroup v1,
/// the cgroup v2 directory has no counter.
fn events_of(text: &str) -> Option<String> {
    let of_version_1 = text.lines().find_map(|line| {
        let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
        let has_memory = controllers.split(',').any(|controller| controller == "memory");
        has_memory.then(|| format!("/sys/fs/cgroup/memory{}/memory.oom_control", path.trim_end_matches('/')))
    });
    of_version_1.or_else(|| {
        let path = text.lines().find_map(|line| line.strip_prefix("0::"))?;
        Some(format!("/sys/fs/cgroup{}/memory.events", path.trim_end_matches('/')))
    })
}

/// Returns the value of the counter, which has the same name in all of these files.
fn count_in(text: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix("oom_kill "))?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kill_is_explained_when_the_kernel_has_counted_one_at_that_moment() {
        assert_eq!(events_of("1:cpu:/x\n0::/a/b\n").as_deref(), Some("/sys/fs/cgroup/a/b/memory.events"));
        assert_eq!(events_of("0::/\n").as_deref(), Some("/sys/fs/cgroup/memory.events"));
        let of_version_1 = Some("/sys/fs/cgroup/memory/x/memory.oom_control");
        assert_eq!(events_of("2:cpu:/y\n1:hugetlb,memory:/x\n0::/\n").as_deref(), of_version_1);
        assert_eq!(events_of("1:cpu:/x\n"), None);
        assert_eq!(count_in("oom_kill_disable 0\nunder_oom 0\noom_kill 4\n"), Some(4));
        assert_eq!(count_in("low 0\noom 5\noom_kill 3\noom_group_kill 0\n"), Some(3));
        assert_eq!(count_in("low 0\n"), None);

        let second = Duration::from_secs(1);
        let mut kills = OomKills { source: PathBuf::new(), is_own: true, count: 7, rose_at: None };
        assert_eq!(kills.explain(second), None, "nothing can be read");
        assert!(!kills.counted(7, second) && kills.counted(9, second * 2));
        assert!(kills.counted(9, second * 2 + second / 2), "two were killed");
        assert!(!kills.counted(9, second * 4) && kills.counted(10, second * 5));
        assert_eq!(kills.cause(), "oom-kill");
        let of_the_machine = OomKills { source: "/proc/vmstat".into(), is_own: false, count: 0, rose_at: None };
        assert_eq!(
            of_the_machine.cause(),
            "perhaps-oom-kill",
            "the kernel may have killed a process of another program"
        );
        assert!(fs::read_to_string("/proc/vmstat").is_ok_and(|text| count_in(&text).is_some()));
    }
}
