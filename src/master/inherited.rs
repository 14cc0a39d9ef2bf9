//! What daemons and jobs have left behind. A daemon that puts itself into the background ends well at once, and what it has left
//! serves: a second one would be one too many.
//!
//! A process shows whose it is in its environment (`FORKYARD_NAME`), unless it has written over that, as those do that change what
//! `ps` shows of them. Then it is taken for the daemon's that has just ended, if it has a session of its own and is younger.

use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, getpid};

use super::sight::{self, Process};

/// How long what a daemon has left must live to be the daemon itself: a little less than the time after which it is started again.
const LASTING: Duration = Duration::from_millis(90);
/// How long after its end a daemon may be found in the background.
const SUSPECT: Duration = Duration::from_secs(2);

#[derive(Debug, Default)]
pub(super) struct Inherited {
    suspects: Vec<Suspect>,
    found: Vec<Found>,
}

/// A helper that has ended with 0, unasked.
#[derive(Debug)]
struct Suspect {
    helper: usize,
    ended: Instant,
    /// How long it had lived.
    lived: Duration,
}

#[derive(Debug)]
struct Found {
    process: Process,
    helper: usize,
    since: Instant,
    /// It is a daemon in the background.
    detached: bool,
}

impl Inherited {
    /// This helper has ended with 0 and was not asked to; it had lived so long.
    pub(super) fn suspect(&mut self, helper: usize, lived: Duration) {
        self.suspects.retain(|suspect| suspect.helper != helper);
        self.suspects.push(Suspect { helper, ended: Instant::now(), lived });
    }

    pub(super) fn has_suspects(&self) -> bool {
        self.suspects.iter().any(|suspect| suspect.ended.elapsed() < SUSPECT)
    }

    /// Looks at the children of this process that it did not make; `names` are those of the helpers, in order. Returns the helpers that
    /// run in the background, each with the process that does.
    pub(super) fn take(&mut self, orphans: &[Pid], names: &[&str]) -> Vec<(usize, Pid)> {
        self.suspects.retain(|suspect| suspect.ended.elapsed() < SUSPECT);
        self.found.retain(|found| found.process.lives());
        let mut detached = Vec::new();
        let own = sight::stat(getpid());
        for process in orphans.iter().filter_map(|pid| Process::of(*pid)) {
            if self.found.iter().any(|found| found.process == process) {
                continue;
            }
            let pid = process.pid();
            let helper = match sight::variable_of(pid, "FORKYARD_NAME") {
                Some(name) => names.iter().position(|other| *other == name),
                None if sight::variable_of(pid, "FORKYARD_SLOT").is_some() => None,
                None => {
                    let apart = sight::stat(pid).zip(own.as_ref()).is_some_and(|(its, own)| its.session != own.session);
                    let latest = self.suspects.last().filter(|suspect| apart && suspect.may_have_made(process));
                    latest.map(|suspect| suspect.helper)
                }
            };
            let Some(helper) = helper else { continue };
            self.found.push(Found { process, helper, since: Instant::now(), detached: false });
        }
        for found in self.found.iter_mut().filter(|found| !found.detached && found.since.elapsed() >= LASTING) {
            found.detached = self.suspects.iter().any(|suspect| suspect.helper == found.helper);
            if found.detached && detached.iter().all(|(other, _)| *other != found.helper) {
                detached.push((found.helper, found.process.pid()));
            }
        }
        detached
    }

    /// Whether a helper has left this process, or one that it comes from.
    pub(super) fn has(&self, pid: Pid) -> bool {
        self.found.iter().any(|found| found.process.pid() == pid && found.process.lives())
            || sight::variable_of(pid, "FORKYARD_NAME").is_some()
    }

    /// Asks daemons in the background to leave: they are started anew.
    pub(super) fn end_detached(&mut self) {
        for found in self.found.iter().filter(|found| found.detached && found.process.lives()) {
            let _ = kill(found.process.pid(), Signal::SIGTERM); // it may just have ended
        }
    }
}

impl Suspect {
    /// Whether the process is young enough to come from this helper.
    fn may_have_made(&self, process: Process) -> bool {
        let Ok(Some(ticks)) = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK) else { return false };
        let Some(now) = uptime() else { return false };
        let (Ok(ticks), Ok(second)) = (u64::try_from(ticks), u32::try_from(ticks)) else { return false };
        let born =
            Duration::from_secs(process.started / ticks) + Duration::from_secs(process.started % ticks) / second.max(1);
        let age = now.saturating_sub(born);
        // The kernel's ticks are hundredths of a second, as a rule.
        age <= self.ended.elapsed() + self.lived + Duration::from_millis(50)
    }
}

fn uptime() -> Option<Duration> {
    let text = std::fs::read_to_string("/proc/uptime").ok()?;
    let seconds: f64 = text.split_ascii_whitespace().next()?.parse().ok()?;
    Duration::try_from_secs_f64(seconds).ok()
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command};

    use super::*;

    fn sleeping(name: Option<&str>) -> Child {
        let mut command = Command::new("setsid");
        command.args(["--wait", "sleep", "600"]).env_remove("FORKYARD_SLOT").env_remove("FORKYARD_NAME");
        if let Some(name) = name {
            command.env("FORKYARD_NAME", name);
        }
        // A group leader has setsid fork; any other process becomes it.
        command.spawn().unwrap()
    }

    #[test]
    fn what_a_daemon_has_left_is_known_by_its_name_or_by_its_age_and_nobody_elses_is() {
        let before = sleeping(None);
        let pid_of = |child: &Child| Pid::from_raw(child.id().cast_signed());
        let is_up = |child: &Child| {
            let deadline = Instant::now() + Duration::from_secs(60);
            // In the middle of exec a process has its new name already, and no environment yet.
            let has_environment = || {
                std::fs::read(format!("/proc/{}/environ", child.id())).is_ok_and(|environment| !environment.is_empty())
            };
            while sight::stat(pid_of(child))
                .is_none_or(|stat| stat.name != "sleep" || stat.session != pid_of(child).as_raw())
                || !has_environment()
            {
                assert!(Instant::now() < deadline, "it sleeps");
                std::thread::park_timeout(Duration::from_millis(1));
            }
        };
        is_up(&before);
        let mut inherited = Inherited::default();
        inherited.suspect(0, Duration::ZERO);
        inherited.suspects[0].ended = Instant::now().checked_sub(Duration::from_secs(1)).unwrap();
        assert!(inherited.has_suspects());
        let names = ["a", "b"];
        let (named, other) = (sleeping(Some("b")), sleeping(Some("elsewhere")));
        is_up(&named);
        is_up(&other);
        let orphans = [&before, &named, &other].map(pid_of);
        let lasting = |inherited: &mut Inherited, orphans: &[Pid]| {
            assert_eq!(inherited.take(orphans, &names), [], "it may end soon");
            for found in &mut inherited.found {
                found.since = found.since.checked_sub(LASTING).unwrap();
            }
            inherited.take(orphans, &names)
        };
        assert_eq!(lasting(&mut inherited, &orphans[1..]), [], "b has not ended, and is only remembered");
        assert!(inherited.has(orphans[1]) && !inherited.has(orphans[0]));
        inherited.suspect(1, Duration::ZERO);
        assert_eq!(inherited.take(&orphans[1..], &names), [(1, orphans[1])]);
        assert_eq!(inherited.take(&orphans[1..], &names), [], "once");
        let young = sleeping(None);
        is_up(&young);
        let mut inherited = Inherited::default();
        inherited.suspect(0, Duration::ZERO);
        assert_eq!(lasting(&mut inherited, &[pid_of(&young)]), [(0, pid_of(&young))]);
        inherited.suspects[0].lived = Duration::ZERO;
        let process = Process::of(orphans[0]).unwrap();
        assert!(
            !inherited.suspects[0].may_have_made(Process { started: process.started - 2000, ..process }),
            "too old"
        );
        for mut child in [before, named, other, young] {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }
}
