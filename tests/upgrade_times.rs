//! While a new master runs its `preload` before it takes over the processes, the processes' timers keep running.

#![allow(clippy::unwrap_used, reason = "test code outside of test functions")]

mod common;

use std::fs::File;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use common::{Server, http, program, wait_until};
use nix::sys::signal::Signal;
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use tempfile::TempDir;

/// A server that can be held at each stage of its startup (see `examples/staged.rs`).
struct Staged {
    server: Server,
    stages: TempDir,
}

impl Staged {
    fn start(arguments: &[&str]) -> Self {
        let stages = tempfile::tempdir().unwrap();
        let mut command = Command::new(program("staged"));
        command.env("STAGED", stages.path()).args(["--bind", "http:127.0.0.1:0", "--workers", "1"]).args(arguments);
        Self { server: Server::start_command(&mut command), stages }
    }

    fn stage(&self, name: &str) -> PathBuf {
        self.stages.path().join(name)
    }

    fn hold(&self, stage: &str) {
        mkfifo(&self.stage(stage), Mode::S_IRWXU).unwrap();
    }

    /// Returns when a process is held at the stage. The process continues when the result is dropped.
    fn held(&self, stage: &str) -> File {
        let mut options = File::options();
        options.write(true).custom_flags(libc::O_NONBLOCK);
        wait_until(stage, || options.open(self.stage(stage)).ok())
    }

    /// Lets the process that is held at the stage continue, and lets later processes pass the stage.
    fn release(&self, stage: &str, held: File) {
        std::fs::remove_file(self.stage(stage)).unwrap();
        drop(held);
    }

    /// Starts an upgrade. Returns when the check of the new build is in its `preload`.
    fn begin_upgrade(&self) -> File {
        self.hold("preload");
        self.server.signal(Signal::SIGUSR2);
        self.held("preload")
    }

    /// Completes the check. Returns when the new master is in its `preload`.
    fn enter_new_master(&self, check: File) -> File {
        drop(check);
        self.server.logged("upgrade: executing");
        self.held("preload")
    }

    fn line_of(&self, what: &str, pid: &str) -> String {
        let pid = format!("pid={pid} ");
        let find =
            || self.server.log().lines().find(|line| line.contains(what) && line.contains(&pid)).map(ToOwned::to_owned);
        wait_until(&format!("{what} {pid}"), find)
    }
}

fn number<'a>(line: &'a str, name: &str) -> &'a str {
    let (_, rest) = line.split_once(name).unwrap_or_else(|| panic!("no {name:?} in {line:?}"));
    rest.split(|letter: char| !letter.is_ascii_digit()).next().unwrap()
}

fn wait_for(time: Duration, since: Instant) {
    wait_until("this much time has passed", || (since.elapsed() >= time).then_some(()));
}

#[test]
fn an_upgrade_preserves_the_schedule_of_a_job_and_the_age_of_a_worker() {
    let mut staged = Staged::start(&["--cron", "j=* * * * * *=sleep 600", "--cron-timeout", "2s"]);
    let check = staged.begin_upgrade();
    let worker = staged.server.workers().first().unwrap().to_string();
    // A job that has just started, and that is still running during the exec.
    let runs = || staged.server.log().matches("job started name=j").count();
    let before = runs();
    wait_until("the job starts again", || (runs() > before).then_some(()));
    let since = Instant::now();
    let log = staged.server.log();
    let line = log.lines().rfind(|line| line.contains("job started name=j")).unwrap();
    let job = number(line, "pid=").to_owned();
    let preload = staged.enter_new_master(check);
    let held = Duration::from_secs(3);
    wait_for(held, since);
    staged.release("preload", preload);
    for line in [staged.line_of("job exited", &job), staged.line_of("worker exited", &worker)] {
        let lived: u128 = number(&line, "lived=").parse().unwrap();
        assert!(lived >= held.as_millis(), "{line}");
    }
    staged.server.stop();
}

#[test]
fn a_worker_that_ends_its_own_drain_by_alarm_is_not_counted_as_dead() {
    let mut staged = Staged::start(&["--drain-timeout", "2s", "--quarantine", "1"]);
    let address = staged.server.http();
    let worker = staged.server.workers().first().unwrap().to_string();
    let client = std::thread::spawn(move || http::get(&address, "/until").unwrap().status);
    staged.server.logged("| waits");
    let check = staged.begin_upgrade();
    staged.server.signal(Signal::SIGHUP);
    staged.server.logged("reload done");
    let preload = staged.enter_new_master(check);
    assert_eq!(client.join().unwrap(), 502, "the heir answers with 502");
    staged.release("preload", preload);
    let line = staged.line_of("worker", &format!("{worker} gen=1"));
    assert!(line.contains("worker terminated itself") && line.contains("(--drain-timeout)"), "{line}");
    wait_until("the reload after the upgrade has begun", || {
        (staged.server.log().matches("reload done").count() == 2).then_some(())
    });
    staged.server.stop();
    let log = staged.server.log();
    assert!(!log.contains("worker died") && !log.contains("quarantined"), "{log}");
}

#[test]
fn a_worker_that_was_ready_in_time_is_not_killed_for_the_duration_of_preload() {
    let start_timeout = Duration::from_secs(3);
    let mut staged = Staged::start(&["--start-timeout", "3s"]);
    let check = staged.begin_upgrade();
    staged.hold("factory");
    staged.server.signal(Signal::SIGTTIN);
    let factory = staged.held("factory");
    let since = Instant::now();
    let preload = staged.enter_new_master(check);
    staged.release("factory", factory);
    wait_until("the second worker is ready", || {
        let row = staged.server.segment().scoreboard().read(1)?;
        (row.state == forkyard_shm::State::Ready).then_some(())
    });
    wait_for(start_timeout, since);
    let old = staged.server.workers();
    staged.release("preload", preload);
    staged.server.logged("reload done");
    staged.server.renewed(2, &old);
    staged.server.stop();
    let log = staged.server.log();
    assert!(!log.contains("--start-timeout"), "{log}");
}
