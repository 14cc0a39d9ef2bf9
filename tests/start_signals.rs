//! Sends each documented signal at many moments between the start of the program and its exit, both as process 1 and as an ordinary
//! process. The signal has its documented effect, and no file is left behind.

#![allow(clippy::unwrap_used, reason = "test code outside of test functions")]

mod common;

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use common::{PATIENCE, Server, children_of, program, wait_until};
use nix::sys::signal::Signal::{self, SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGTTIN, SIGTTOU, SIGUSR1, SIGUSR2};
use nix::sys::signal::kill;
use nix::sys::stat::Mode;
use nix::unistd::{Pid, mkfifo};
use tempfile::TempDir;

const ENDS: [Signal; 3] = [SIGTERM, SIGINT, SIGQUIT];
/// The log line that shows the effect of each signal that does not stop the server.
const MEANINGS: [(Signal, &str); 5] = [
    (SIGHUP, "reload done"),
    (SIGUSR1, "log files reopened"),
    (SIGUSR2, "reload done"),
    (SIGTTIN, "workers=2"),
    (SIGTTOU, "it is at its limit"),
];

/// The files of a server, and the FIFOs that make the server wait.
struct Place {
    directory: TempDir,
    as_pid_1: bool,
}

impl Place {
    fn new(as_pid_1: bool) -> Self {
        let directory = tempfile::tempdir().unwrap();
        for name in ["made", "made/tmp", "stages"] {
            std::fs::create_dir(directory.path().join(name)).unwrap();
        }
        Self { directory, as_pid_1 }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn command(&self) -> Command {
        let mut command = if self.as_pid_1 {
            let mut command = Command::new("unshare");
            if !nix::unistd::geteuid().is_root() {
                command.args(["--user", "--map-root-user"]);
            }
            command.args(["--pid", "--fork", "--kill-child", "--mount-proc"]).arg(program("staged"));
            command
        } else {
            Command::new(program("staged"))
        };
        command.env("STAGED", self.path("stages")).env("TMPDIR", self.path("made/tmp"));
        command.arg("--bind").arg(format!("http:unix:{}", self.path("made/app.sock").display()));
        command.arg("--pid-file").arg(self.path("made/pid")).arg("--control").arg(self.path("made/control"));
        command.args([
            "--workers",
            "1",
            "--drain-timeout",
            "10m",
            "--start-timeout",
            "10m",
            "--upgrade-timeout",
            "10m",
        ]);
        command
    }

    /// Makes processes wait when they reach this stage.
    fn hold(&self, stage: &str) {
        mkfifo(&self.path("stages").join(stage), Mode::S_IRWXU).unwrap();
    }

    /// Waits until a process is held at this stage. The process continues when the returned file is dropped.
    fn await_stage(&self, stage: &str) -> File {
        let mut options = File::options();
        options.write(true).custom_flags(libc::O_NONBLOCK);
        wait_until(stage, || options.open(self.path("stages").join(stage)).ok())
    }

    /// Releases the process that is held at this stage, and lets later processes pass.
    fn release(&self, stage: &str, held: File) {
        std::fs::remove_file(self.path("stages").join(stage)).unwrap();
        drop(held);
    }

    fn server(&self) -> Running {
        let server = Server::launch(&mut self.command());
        let launched = server.pid();
        let master = if self.as_pid_1 {
            let child = wait_until("unshare has forked", || children_of(launched).first().copied());
            // The process that unshare forks executes the program slightly later.
            let exe = program("staged");
            wait_until("the process executes the program", || {
                (std::fs::read_link(format!("/proc/{child}/exe")).ok()? == exe).then_some(())
            });
            Pid::from_raw(child)
        } else {
            launched
        };
        Running { server, master }
    }

    fn send(&self, target: &str) -> UnixStream {
        let mut stream = UnixStream::connect(self.path("made/app.sock")).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        write!(stream, "GET {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").unwrap();
        stream
    }

    /// Checks that all files created by the server are gone.
    fn is_clean(&self, of: &str) {
        let names = |directory: &str| -> Vec<String> {
            let entries = std::fs::read_dir(self.path(directory)).unwrap();
            entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect()
        };
        assert_eq!((names("made"), names("made/tmp")), (vec!["tmp".to_owned()], vec![]), "{of}");
    }
}

struct Running {
    server: Server,
    master: Pid,
}

impl Running {
    fn signal(&self, signal: Signal) {
        kill(self.master, signal).unwrap();
    }

    /// Checks that the server exits with status 0 and leaves no file behind.
    fn ends(&mut self, place: &Place, of: &str) {
        let status = self.server.wait_end();
        assert_eq!(status, Some(0), "{of}: the log:\n{}", self.server.log());
        place.is_clean(of);
    }
}

fn text_of(mut stream: UnixStream) -> String {
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    text
}

fn named(moment: &str, signal: Signal, as_pid_1: bool) -> String {
    format!("{signal} {moment}{}", if as_pid_1 { " as process 1" } else { "" })
}

#[test]
fn a_stop_signal_ends_startup_at_every_stage() {
    for as_pid_1 in [false, true] {
        for stage in ["preload", "factory", "ready"] {
            for signal in ENDS {
                let of = named(stage, signal, as_pid_1);
                let place = Place::new(as_pid_1);
                place.hold(stage);
                let mut running = place.server();
                let held = place.await_stage(stage);
                assert!(place.path("made/pid").exists() && place.path("made/app.sock").exists(), "{of}");
                running.signal(signal);
                running.ends(&place, &of);
                let log = running.server.log();
                assert!(["asked to stop", "a signal to"].iter().any(|words| log.contains(words)), "{of}: {log}");
                drop(held);
            }
        }
    }
}

#[test]
fn every_other_signal_is_deferred_until_the_server_can_handle_it() {
    for as_pid_1 in [false, true] {
        for stage in ["preload", "factory", "ready"] {
            for (signal, meaning) in MEANINGS {
                let of = named(stage, signal, as_pid_1);
                let place = Place::new(as_pid_1);
                place.hold(stage);
                let mut running = place.server();
                let held = place.await_stage(stage);
                running.signal(signal);
                place.release(stage, held);
                if !running.server.log().contains(meaning) {
                    running.server.wait_for(meaning);
                }
                let answered = text_of(place.send("/"));
                assert!(answered.contains("200 OK"), "{of}: {answered}");
                running.signal(SIGTERM);
                running.ends(&place, &of);
            }
        }
    }
}

#[test]
fn signals_sent_as_soon_as_the_pid_file_exists_are_not_lost() {
    for as_pid_1 in [false, true] {
        for (signal, meaning) in MEANINGS.into_iter().chain(ENDS.map(|signal| (signal, "a signal to"))) {
            for _ in 0..3 {
                let of = named("at the pid file", signal, as_pid_1);
                let place = Place::new(as_pid_1);
                let mut running = place.server();
                let deadline = std::time::Instant::now() + PATIENCE;
                while !place.path("made/pid").exists() {
                    assert!(std::time::Instant::now() < deadline, "{of}");
                    std::hint::spin_loop();
                }
                running.signal(signal);
                if !ENDS.contains(&signal) {
                    running.server.wait_for(meaning);
                    running.signal(SIGTERM);
                }
                running.ends(&place, &of);
            }
        }
    }
}

/// Before the program's own code runs, SIGTERM has its default action. It kills the process, which has not created any file yet.
#[test]
fn a_stop_signal_at_any_millisecond_of_startup_ends_it_and_leaves_no_file_behind() {
    for signal in ENDS {
        for millisecond in 0..25 {
            let place = Place::new(false);
            let mut running = place.server();
            std::thread::park_timeout(Duration::from_millis(millisecond)); // the test tries different moments
            running.signal(signal);
            let status = running.server.wait_end();
            let of = format!("{signal} after {millisecond} ms");
            assert!(matches!(status, Some(0) | None), "{of}: {status:?} {}", running.server.log());
            place.is_clean(&of);
        }
    }
}

#[test]
fn signals_during_a_reload_or_an_upgrade_have_their_documented_effect() {
    for as_pid_1 in [false, true] {
        for signal in ENDS.into_iter().chain(MEANINGS.map(|(signal, _)| signal)) {
            let ends = ENDS.contains(&signal);
            let meaning = MEANINGS.iter().find(|(other, _)| *other == signal).map_or("", |(_, meaning)| meaning);

            // During a reload, while a new worker is starting.
            let of = named("in a reload", signal, as_pid_1);
            let place = Place::new(as_pid_1);
            let mut running = place.server();
            running.server.wait_for("ready in");
            place.hold("factory");
            running.signal(SIGHUP);
            let held = place.await_stage("factory");
            running.signal(signal);
            if !ends {
                if signal == SIGUSR2 {
                    running.server.wait_for("checking");
                }
                place.release("factory", held);
                running.server.wait_for(meaning);
                running.signal(SIGTERM);
            }
            running.ends(&place, &of);

            // During the check of an upgrade, while the new build runs its preload.
            let of = named("in the check of an upgrade", signal, as_pid_1);
            let place = Place::new(as_pid_1);
            let mut running = place.server();
            running.server.wait_for("ready in");
            place.hold("preload");
            running.signal(SIGUSR2);
            let held = place.await_stage("preload");
            running.signal(signal);
            if !ends {
                running.server.wait_for(if signal == SIGUSR1 { "log files reopened" } else { "a signal to" });
                place.release("preload", held);
                running.server.wait_for("upgraded");
                running.signal(SIGTERM);
            }
            running.ends(&place, &of);

            // In the new build itself, before it takes over.
            let of = named("in the start of a new build", signal, as_pid_1);
            let place = Place::new(as_pid_1);
            let mut running = place.server();
            running.server.wait_for("ready in");
            place.hold("preload");
            running.signal(SIGUSR2);
            drop(place.await_stage("preload"));
            running.server.wait_for("upgrade: executing");
            let held = place.await_stage("preload");
            let served = place.send("/until");
            running.signal(signal);
            std::fs::write(place.path("stages/go"), "").unwrap();
            place.release("preload", held);
            if !ends {
                let what = if meaning == "reload done" { "upgraded" } else { meaning };
                running.server.wait_for(what);
                assert!(text_of(served).contains("200 OK"), "{of}");
                running.signal(SIGTERM);
            }
            running.ends(&place, &of);
        }
    }
}

#[test]
fn signals_during_a_drain_have_their_documented_effect() {
    for as_pid_1 in [false, true] {
        for signal in ENDS.into_iter().chain(MEANINGS.map(|(signal, _)| signal)) {
            let of = named("in a drain", signal, as_pid_1);
            let place = Place::new(as_pid_1);
            let mut running = place.server();
            running.server.wait_for("ready in");
            let served = place.send("/until");
            running.server.wait_for("waits");
            running.signal(SIGTERM);
            running.server.wait_for("new connections are refused");
            running.signal(signal);
            if !matches!(signal, SIGINT | SIGQUIT) {
                if signal == SIGUSR1 {
                    running.server.wait_for("log files reopened");
                } else {
                    running.server.wait_for("a signal to");
                }
                std::fs::write(place.path("stages/go"), "").unwrap();
                assert!(text_of(served).contains("200 OK"), "{of}");
            }
            running.ends(&place, &of);
        }
    }
}

#[test]
fn a_terminated_check_leaves_no_file_behind() {
    let place = Place::new(false);
    let settings = place.path("settings.toml");
    std::fs::write(&settings, "").unwrap();
    let mut command = place.command();
    command.arg("--config").arg(&settings);
    let mut server = Server::start_command(&mut command);
    // The new build would create one more socket.
    let more = place.path("made/more.sock");
    std::fs::write(&settings, format!("events-socket = {:?}\n", more.display().to_string())).unwrap();
    place.hold("preload");
    server.signal(SIGUSR2);
    let held = place.await_stage("preload");
    assert!(more.exists());
    server.signal(SIGTERM);
    assert_eq!(server.wait_end(), Some(0));
    drop(held);
    place.is_clean("the check");
}
