//! Finds workers that have reached the end of their lifetime: those that have grown too large or too old.
//!
//! The maximum age of a worker is drawn at random when it starts. Memory is checked one worker at a time, each worker about once per
//! interval. A worker is replaced only if its memory has been too large several times in a row, because a single large request is
//! not a leak. [`Recycling`] decides and makes no system call; [`own_memory`] reads the kernel's data.

use std::collections::BTreeMap;
use std::time::Duration;

use nix::unistd::Pid;

use super::supervisor::Uptime;
use crate::config::{Jittered, Scaling};

/// Number of consecutive checks at which a worker must be too large.
const STRIKES: u32 = 3;

/// Schedules the checks.
#[derive(Debug)]
pub(crate) struct Recycling {
    max_memory: Option<u64>,
    interval: Duration,
    max_age: Option<Jittered<Duration>>,
    lives: BTreeMap<Pid, Life>,
    next_look: Uptime,
    last_looked_at: Option<Pid>,
}

#[derive(Debug)]
struct Life {
    ends: Option<Uptime>,
    strikes: u32,
}

impl Recycling {
    pub(crate) fn new(scaling: &Scaling) -> Self {
        let Scaling { max_memory, memory_interval, max_age, .. } = *scaling;
        let interval = memory_interval.max(Duration::from_millis(1));
        Self { max_memory, interval, max_age, lives: BTreeMap::new(), next_look: Uptime::ZERO, last_looked_at: None }
    }

    /// Changes the limits. Running workers keep their maximum age.
    pub(crate) fn set_limits(&mut self, scaling: &Scaling) {
        let Self { max_memory, interval, max_age, .. } = Self::new(scaling);
        (self.max_memory, self.interval, self.max_age) = (max_memory, interval, max_age);
    }

    pub(crate) fn log_settings(&self) {
        let Self { max_memory, interval, max_age, .. } = self;
        log::debug!(part = "recycling", max_memory, interval:? = interval, max_age:? = max_age; "settings");
    }

    /// Records that a process exists, and its age.
    pub(crate) fn spawned(&mut self, pid: Pid, age: Duration, now: Uptime) {
        let ends = self.max_age.map(|max| (now + max.draw()).saturating_sub(age));
        self.lives.insert(pid, Life { ends, strikes: 0 });
    }

    pub(crate) fn died(&mut self, pid: Pid) {
        self.lives.remove(&pid);
    }

    /// Returns the time of the next check, or `None` if no limit is set.
    pub(crate) fn next_deadline(&self) -> Option<Uptime> {
        let look = self.max_memory.filter(|_| !self.lives.is_empty()).map(|_| self.next_look);
        self.lives.values().filter_map(|life| life.ends).chain(look).min()
    }

    /// Returns the workers that have become too old, each of them once. A worker that is not ready is checked again
    /// later.
    pub(crate) fn too_old(&mut self, is_ready: impl Fn(Pid) -> bool, now: Uptime) -> Vec<Pid> {
        let mut old = Vec::new();
        for (&pid, life) in &mut self.lives {
            if life.ends.is_some_and(|ends| ends <= now) {
                if is_ready(pid) {
                    life.ends = None;
                    old.push(pid);
                } else {
                    life.ends = Some(now + Duration::from_secs(1));
                }
            }
        }
        old
    }

    /// Returns the worker whose memory is to be checked now.
    pub(crate) fn turn(&mut self, now: Uptime) -> Option<Pid> {
        if self.max_memory.is_none() || now < self.next_look {
            return None;
        }
        let count = u32::try_from(self.lives.len()).unwrap_or(u32::MAX).max(1);
        self.next_look = now + (self.interval / count).max(Duration::from_millis(1));
        let after = |last: Pid| self.lives.keys().copied().find(|&pid| pid > last);
        let next = self.last_looked_at.and_then(after).or_else(|| self.lives.keys().next().copied());
        self.last_looked_at = next;
        next
    }

    /// Records the size of a worker. Returns true once, when the worker has been too large several times in a row.
    pub(crate) fn is_too_large(&mut self, pid: Pid, bytes: u64) -> bool {
        let Some(life) = self.lives.get_mut(&pid) else { return false };
        let is_large = self.max_memory.is_some_and(|max| bytes > max);
        life.strikes = if is_large { life.strikes.saturating_add(1) } else { 0 };
        life.strikes == STRIKES
    }
}

/// Returns the memory of a process in bytes: the memory that is its own, and its share of the memory that it shares
/// with other forks of the master. The shared memory segment is excluded, because the size of the page cache does not
/// depend on the worker.
pub(crate) fn own_memory(pid: Pid) -> Option<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
    own_memory_in(&text)
}

fn own_memory_in(rollup: &str) -> Option<u64> {
    let kib = |name: &str| {
        let line = rollup.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()
    };
    Some(kib("Pss")?.saturating_sub(kib("Pss_Shmem").unwrap_or(0)).saturating_mul(1024))
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: Duration = Duration::from_secs(1);

    fn recycling(max_memory: Option<u64>, max_age: Option<Jittered<Duration>>) -> Recycling {
        let max_unavailable = crate::config::Share::Number(1);
        let (memory_interval, scale_down_after) = (6 * S, S);
        let scaling = Scaling {
            give_up_after: Duration::ZERO,
            max_unavailable,
            scale_down_after,
            max_requests: None,
            max_memory,
            memory_interval,
            max_age,
            health_path: None,
            max_queue_time: Duration::ZERO,
        };
        Recycling::new(&scaling)
    }

    #[test]
    fn each_worker_is_checked_in_turn_and_one_that_stays_large_is_returned_once() {
        let mut recycling = recycling(Some(100), None);
        assert_eq!(recycling.next_deadline(), None, "there is no worker");
        let pids = [7, 8, 9].map(Pid::from_raw);
        pids.iter().for_each(|&pid| recycling.spawned(pid, Duration::ZERO, Uptime::ZERO));
        let mut named = Vec::new();
        let mut looked_at = Vec::new();
        for second in (0..48).step_by(2) {
            let now = S * second;
            assert!(recycling.next_deadline().is_some_and(|at| at <= now));
            let pid = recycling.turn(now).unwrap();
            assert_eq!(recycling.turn(now), None, "one at a time");
            looked_at.push(pid.as_raw());
            let round = looked_at.len() / 3;
            // Worker 7 is always too large, worker 8 every other time, worker 9 never.
            let bytes = [101, 100 + u64::try_from(round % 2).unwrap(), 100][usize::try_from(pid.as_raw() - 7).unwrap()];
            if recycling.is_too_large(pid, bytes) {
                named.push((second, pid.as_raw()));
            }
        }
        assert_eq!(looked_at[..6], [7, 8, 9, 7, 8, 9]);
        assert_eq!(named, [(12, 7)]);
        pids.iter().for_each(|&pid| recycling.died(pid));
        assert_eq!((recycling.turn(S * 100), recycling.next_deadline()), (None, None));
    }

    #[test]
    fn each_worker_has_its_own_maximum_age_and_is_returned_once() {
        let mut recycling = recycling(None, Some(Jittered { limit: 100 * S, jitter: 50 * S }));
        (1..=40).for_each(|pid| recycling.spawned(Pid::from_raw(pid), Duration::ZERO, S));
        let mut now = Uptime::ZERO;
        let mut moments = std::collections::BTreeSet::new();
        let mut named = Vec::new();
        while let Some(deadline) = recycling.next_deadline() {
            assert!(deadline > now, "the deadline has passed");
            now = deadline;
            assert_eq!(recycling.turn(now), None);
            // One worker is not ready until late.
            let old = recycling.too_old(|pid| pid.as_raw() != 1 || now > 200 * S, now);
            if !old.is_empty() {
                moments.insert(now);
            }
            named.extend(old.into_iter().map(Pid::as_raw));
        }
        named.sort_unstable();
        assert_eq!(named, (1..=40).collect::<Vec<_>>());
        assert!(*moments.first().unwrap() >= 101 * S && moments.len() > 10, "{moments:?}");
    }

    #[test]
    fn the_age_of_a_worker_of_a_former_master_is_kept() {
        let mut recycling = recycling(None, Some(Jittered { limit: 100 * S, jitter: Duration::ZERO }));
        let [younger, older] = [1, 2].map(Pid::from_raw);
        recycling.spawned(younger, 30 * S, S);
        recycling.spawned(older, 200 * S, S);
        assert_eq!(recycling.too_old(|_| true, S), [older]);
        assert_eq!(recycling.too_old(|_| true, 70 * S), []);
        assert_eq!(recycling.too_old(|_| true, 71 * S), [younger]);
    }

    #[test]
    fn memory_is_read_without_the_shared_page_cache() {
        let text = "55d0-7ffc ---p 00000000 00:00 0    [rollup]\nRss: 9000 kB\nPss:         3000 kB\nPss_Anon: 900 kB\n\
                    Pss_Shmem:    2000 kB\n";
        assert_eq!(own_memory_in(text), Some(1000 * 1024));
        assert_eq!(own_memory_in("Pss: 12 kB\n"), Some(12 * 1024), "an older kernel reports no parts");
        assert_eq!(own_memory_in("Rss: 12 kB\n"), None);
        assert!(own_memory(nix::unistd::getpid()).is_some_and(|bytes| bytes > 100_000));
    }
}
