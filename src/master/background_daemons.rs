//! Finds the processes that daemons and jobs have left behind. If a daemon puts itself into the background, its first
//! process exits immediately with 0 while its background process serves. Restarting such a daemon would start a second
//! instance.
//!
//! The environment of a process contains the name of the sidecar that started it (`FORKYARD_NAME`), unless the process
//! has overwritten its environment, as programs do that change their title in `ps`. A process with an overwritten
//! environment is attributed to the daemon that exited last, if the process has its own session and is younger than the
//! daemon. A process that is in the middle of exec shows no environment, and is examined again later, at the latest
//! when the daemon would be restarted. A process whose environment equals the master's was started by a worker and is
//! about to call exec.

use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, getpid};

use super::procfs::{self, Environment, Process};

/// How long a background process must run to count as the daemon itself: a little less than the delay before the daemon
/// is restarted.
const LASTING: Duration = Duration::from_millis(90);
/// How long after a daemon's exit to look for its background process.
const SUSPECT: Duration = Duration::from_secs(2);

#[derive(Debug, Default)]
pub(super) struct Inherited {
    suspects: Vec<EndedSidecar>,
    found: Vec<Found>,
}

/// A sidecar that has exited with 0 without being asked to.
#[derive(Debug)]
struct EndedSidecar {
    sidecar: usize,
    ended: Instant,
    /// Lifetime of the sidecar.
    lived: Duration,
}

#[derive(Debug)]
struct Found {
    process: Process,
    /// `None` until the sidecar is known.
    sidecar: Option<usize>,
    since: Instant,
    /// Whether the process is a daemon running in the background.
    detached: bool,
}

impl Inherited {
    /// Records that this sidecar, which had run for `lived`, has exited with 0 without being asked to.
    pub(super) fn suspect(&mut self, sidecar: usize, lived: Duration) {
        self.suspects.retain(|suspect| suspect.sidecar != sidecar);
        self.suspects.push(EndedSidecar { sidecar, ended: Instant::now(), lived });
    }

    pub(super) fn has_suspects(&self) -> bool {
        self.suspects.iter().any(|suspect| suspect.ended.elapsed() < SUSPECT)
    }

    /// Examines `orphans`, the children that this process did not start. `names` contains the sidecars' names, in
    /// order. Returns the sidecars that run in the background, each with its process.
    pub(super) fn take(&mut self, orphans: &[Pid], names: &[&str]) -> Vec<(usize, Pid)> {
        self.suspects.retain(|suspect| suspect.ended.elapsed() < SUSPECT);
        self.found.retain(|found| found.process.lives());
        let mut detached = Vec::new();
        let own = procfs::environment_of(getpid());
        for process in orphans.iter().filter_map(|pid| Process::of(*pid)) {
            let known = self.found.iter().position(|found| found.process == process);
            if known.is_some_and(|at| self.found[at].sidecar.is_some()) {
                continue;
            }
            let seen_for = known.map_or(Duration::ZERO, |at| self.found[at].since.elapsed());
            let environment = procfs::environment_of(process.pid()).seen_for(seen_for);
            let sidecar = self.sidecar_of(process, &environment, &own, names);
            match known {
                Some(at) if sidecar.is_some() => self.found[at].sidecar = sidecar,
                Some(_) if environment == Environment::InExec => {}
                Some(at) => drop(self.found.remove(at)),
                None if sidecar.is_some() || environment == Environment::InExec => {
                    self.found.push(Found { process, sidecar, since: Instant::now(), detached: false });
                }
                None => {}
            }
        }
        for found in self.found.iter_mut().filter(|found| !found.detached && found.since.elapsed() >= LASTING) {
            let Some(sidecar) = found.sidecar else { continue };
            found.detached = self.suspects.iter().any(|suspect| suspect.sidecar == sidecar);
            if found.detached && detached.iter().all(|(other, _)| *other != sidecar) {
                detached.push((sidecar, found.process.pid()));
            }
        }
        detached
    }

    /// Returns the sidecar that left this process behind, if it can be determined.
    fn sidecar_of(
        &self,
        process: Process,
        environment: &Environment,
        own: &Environment,
        names: &[&str],
    ) -> Option<usize> {
        if environment == own || *environment == Environment::InExec {
            return None;
        }
        if let Some(name) = environment.variable("FORKYARD_NAME") {
            return names.iter().position(|other| *other == name);
        }
        let session = |pid| procfs::stat(pid).map(|stat| stat.session);
        if environment.variable("FORKYARD_SLOT").is_some() || session(process.pid()) == session(getpid()) {
            return None;
        }
        self.suspects.last().filter(|suspect| suspect.may_have_made(process)).map(|suspect| suspect.sidecar)
    }

    /// Whether this process, or one of its ancestors, was left behind by a sidecar.
    pub(super) fn has(&self, pid: Pid) -> bool {
        let is_found = |found: &Found| found.process.pid() == pid && found.sidecar.is_some() && found.process.lives();
        self.found.iter().any(is_found) || procfs::environment_of(pid).variable("FORKYARD_NAME").is_some()
    }

    /// Asks daemons in the background to exit, because they are being restarted.
    pub(super) fn end_detached(&mut self) {
        for found in self.found.iter().filter(|found| found.detached && found.process.lives()) {
            let _ = kill(found.process.pid(), Signal::SIGTERM); // the process may just have exited
        }
    }
}

impl EndedSidecar {
    /// Whether the process is young enough that this sidecar may have started it.
    fn may_have_made(&self, process: Process) -> bool {
        let Ok(Some(ticks)) = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK) else { return false };
        let Some(now) = uptime() else { return false };
        let (Ok(ticks), Ok(second)) = (u64::try_from(ticks), u32::try_from(ticks)) else { return false };
        let spawned =
            Duration::from_secs(process.started / ticks) + Duration::from_secs(process.started % ticks) / second.max(1);
        let age = now.saturating_sub(spawned);
        // The resolution of process start times is usually a hundredth of a second.
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
        command
            .args(["--wait", "sleep", "600"])
            .env_remove("FORKYARD_SLOT")
            .env_remove("FORKYARD_NAME")
            .env("OTHER", "than ours");
        if let Some(name) = name {
            command.env("FORKYARD_NAME", name);
        }
        // setsid(1) forks if it is the leader of a process group; otherwise it becomes the command.
        command.spawn().unwrap()
    }

    #[test]
    fn a_daemons_process_is_recognized_by_its_name_or_its_age() {
        let before = sleeping(None);
        let pid_of = |child: &Child| Pid::from_raw(child.id().cast_signed());
        let is_up = |child: &Child| {
            let deadline = Instant::now() + Duration::from_secs(60);
            while procfs::stat(pid_of(child))
                .is_none_or(|stat| stat.name != "sleep" || stat.session != pid_of(child).as_raw())
                || procfs::environment_of(pid_of(child)) == Environment::InExec
            {
                assert!(Instant::now() < deadline, "sleep is running");
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
            assert_eq!(inherited.take(orphans, &names), [], "it may exit soon");
            for found in &mut inherited.found {
                found.since = found.since.checked_sub(LASTING).unwrap();
            }
            inherited.take(orphans, &names)
        };
        assert_eq!(lasting(&mut inherited, &orphans[1..]), [], "b has not exited, so its process is only recorded");
        assert!(inherited.has(orphans[1]) && !inherited.has(orphans[0]));
        inherited.suspect(1, Duration::ZERO);
        assert_eq!(inherited.take(&orphans[1..], &names), [(1, orphans[1])]);
        assert_eq!(inherited.take(&orphans[1..], &names), [], "once");
        let young = sleeping(None);
        is_up(&young);
        let mut inherited = Inherited::default();
        inherited.suspect(0, Duration::from_secs(60)); // ended before the young process started
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

    #[test]
    fn a_process_in_the_middle_of_exec_is_not_attributed_to_a_different_daemon() {
        let directory = tempfile::tempdir().unwrap();
        let script = directory.path().join("again");
        std::fs::write(&script, "exec sh \"$0\"\n").unwrap();
        let mut command = Command::new("setsid");
        command.arg("sh").arg(&script).env_remove("FORKYARD_SLOT").env("FORKYARD_NAME", "b");
        let mut child = command.spawn().unwrap();
        let pid = Pid::from_raw(child.id().cast_signed());
        let deadline = Instant::now() + Duration::from_secs(60);
        while procfs::stat(pid).is_none_or(|stat| stat.session != pid.as_raw()) {
            assert!(Instant::now() < deadline, "it has its own session");
            std::thread::park_timeout(Duration::from_millis(1));
        }
        let mut seen_in_exec = 0;
        while seen_in_exec < 5 {
            assert!(Instant::now() < deadline, "it is seen in the middle of exec: {seen_in_exec}");
            let mut inherited = Inherited::default();
            inherited.suspect(0, Duration::from_secs(3600));
            assert_eq!(inherited.take(&[pid], &["a", "b"]), []);
            assert_eq!(inherited.found.len(), 1);
            let Some(sidecar) = inherited.found[0].sidecar else {
                seen_in_exec += 1;
                inherited.found[0].since = inherited.found[0].since.checked_sub(LASTING).unwrap();
                // The next examination takes place later, but the time of the process is measured from the first
                // examination.
                inherited.suspect(1, Duration::ZERO);
                while inherited.found[0].sidecar.is_none() {
                    let detached = inherited.take(&[pid], &["a", "b"]);
                    assert_eq!(detached.is_empty(), inherited.found[0].sidecar.is_none());
                }
                assert_eq!(inherited.found[0].sidecar, Some(1));
                continue;
            };
            assert_eq!(sidecar, 1);
        }
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn an_empty_environment_is_accepted_only_after_a_while_because_exec_shows_one_too() {
        let mut command = Command::new("env");
        let mut child = command.args(["-i", "/usr/bin/setsid", "/bin/sleep", "600"]).spawn().unwrap();
        let pid = Pid::from_raw(child.id().cast_signed());
        let deadline = Instant::now() + Duration::from_secs(60);
        while procfs::stat(pid).is_none_or(|stat| stat.name != "sleep" || stat.session != pid.as_raw())
            || procfs::environment_of(pid) != Environment::Shown(Vec::new())
        {
            assert!(Instant::now() < deadline, "sleep is running");
            std::thread::park_timeout(Duration::from_millis(1));
        }
        let mut inherited = Inherited::default();
        inherited.suspect(0, Duration::from_secs(3600));
        assert_eq!(inherited.take(&[pid], &["a"]), []);
        assert_eq!(inherited.found[0].sidecar, None);
        inherited.found[0].since = inherited.found[0].since.checked_sub(LASTING).unwrap();
        assert_eq!(inherited.take(&[pid], &["a"]), [(0, pid)]);
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn a_process_with_the_masters_environment_is_a_workers_child_before_exec() {
        let inherited = Inherited {
            suspects: vec![EndedSidecar { sidecar: 0, ended: Instant::now(), lived: Duration::ZERO }],
            found: vec![],
        };
        let own = Environment::Shown(b"FORKYARD_NAME=a\0A=b\0".to_vec());
        let process = Process { pid: 1, started: u64::MAX };
        assert_eq!(inherited.sidecar_of(process, &own, &own, &["a"]), None);
        assert_eq!(inherited.sidecar_of(process, &own, &Environment::Shown(b"A=b\0".to_vec()), &["a"]), Some(0));
    }
}
