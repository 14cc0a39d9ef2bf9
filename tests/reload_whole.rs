//! A reload with changed settings: the changes reach all affected processes, in the right order. If the settings are invalid or the reload
//! fails, nothing changes.

#![allow(clippy::unwrap_used, reason = "a failing test reports its location")]

mod common;

use std::os::unix::fs::{MetadataExt as _, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use common::http;
use common::limit::InTime as _;
use common::{Server, is_gone, program, wait_until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// A master with a configuration file, in which `DIR` stands for its directory.
struct Served {
    server: Server,
    directory: tempfile::TempDir,
    name: &'static str,
}

impl Served {
    fn start(name: &'static str, run: &[&str], settings: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        std::fs::set_permissions(directory.path(), PermissionsExt::from_mode(0o755)).unwrap();
        let file = write_file(directory.path(), settings);
        let mut command = Command::new(program(name));
        command.args(run).arg("--config").arg(file);
        Self { server: Server::start_command(&mut command), directory, name }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn reload(&self, settings: &str) -> Output {
        write_file(self.directory.path(), settings);
        let mut command = Command::new(program(self.name));
        command.args(["reload", "--control"]).arg(self.path("control")).output_in_time().unwrap()
    }

    #[track_caller]
    fn reloaded(&self, settings: &str) -> String {
        let output = self.reload(settings);
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert_eq!(output.status.code(), Some(0), "{said}{}", String::from_utf8_lossy(&output.stderr));
        said
    }

    #[track_caller]
    fn refused(&self, settings: &str, words: &[&str]) {
        let output = self.reload(settings);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{said}{}", String::from_utf8_lossy(&output.stdout));
        for word in words {
            assert!(said.contains(word), "no {word:?} in {said:?}");
        }
    }

    /// Returns the pid of the daemon with this name, from its next start line.
    fn daemon(&mut self, name: &str) -> i32 {
        let line = self.server.wait_for(&format!("daemon started name={name} "));
        number_behind(&line, "pid=")
    }
}

fn write_file(directory: &Path, settings: &str) -> PathBuf {
    let path = directory.join("forkyard.toml");
    let at = directory.display().to_string();
    std::fs::write(&path, format!("control = 'DIR/control'\n{settings}").replace("DIR", &at)).unwrap();
    path
}

fn number_behind(line: &str, key: &str) -> i32 {
    let digits: String = line.split(key).nth(1).unwrap().chars().take_while(char::is_ascii_digit).collect();
    digits.parse().unwrap()
}

/// Returns the user of a process, or `None` if the process is gone.
fn user_of(pid: i32) -> Option<u64> {
    common::status_number(pid, "Uid")
}

fn command_line(pid: i32) -> String {
    std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default().replace('\0', " ").trim().to_owned()
}

const HTTP: &str = "bind = 'http:127.0.0.1:0'\nworkers = 1\n";

#[test]
fn a_reload_with_another_user_reaches_workers_daemons_jobs_and_the_files_of_sockets() {
    let bind = "bind = 'http:unix:DIR/a.sock'\nworkers = 1\nevents = '1M'\nevents-socket = 'DIR/events'\n";
    let beside = "daemon = ['d=sleep 1000']\ncron = [\"c=* * * * * *=sh -c 'id -u'\"]\n";
    let with = |user: u32| format!("{bind}{beside}user = {user}\ngroup = {user}\nsocket-mode = 0o660\n");
    let mut served = Served::start("crashy", &[], &with(4711));
    let daemon = served.daemon("d");
    assert_eq!(user_of(daemon), Some(4711));
    assert!(served.server.wait_for("cron=c").ends_with("| 4711"));
    let publish = |served: &Served| {
        // The relay runs as the workers' user, so it must be replaced.
        let path = served.path("events");
        let sent = std::os::unix::net::UnixDatagram::unbound().unwrap().send_to(b"topic\n\nwords", path);
        assert!(sent.is_ok(), "{sent:?}");
    };
    publish(&served);
    let relay = number_behind(&served.server.wait_for("relay started"), "pid=");
    wait_until("the relay has dropped its privileges", || (user_of(relay) == Some(4711)).then_some(()));

    let said = served.reloaded(&with(4712));
    assert!(!said.contains("only after a restart"), "{said}");
    wait_until("all workers run as the new user", || {
        served.server.workers().into_iter().all(|worker| user_of(worker) == Some(4712)).then_some(())
    });
    let daemon = served.daemon("d");
    assert_eq!(user_of(daemon), Some(4712));
    // A job that started before the reload keeps its user.
    wait_until("jobs run as the new user", || served.server.wait_for("cron=c").ends_with("| 4712").then_some(()));
    for name in ["a.sock", "events"] {
        let metadata = std::fs::metadata(served.path(name)).unwrap();
        assert_eq!((metadata.uid(), metadata.gid()), (4712, 4712), "{name}");
    }
    wait_until("the old relay is gone", || is_gone(relay).then_some(()));
    publish(&served);
    let relay = number_behind(&served.server.wait_for("relay started"), "pid=");
    wait_until("the relay has dropped its privileges", || (user_of(relay) == Some(4712)).then_some(()));
    served.server.stop();
}

#[test]
fn a_reload_starts_new_daemons_and_jobs_and_stops_removed_ones() {
    let mut served = Served::start("crashy", &[], &format!("{HTTP}daemon = ['kept=sleep 1001', 'gone=sleep 1002']\n"));
    let (kept, gone) = (served.daemon("kept"), served.daemon("gone"));
    let job = "cron = ['tick=* * * * * *=echo ticks']\n";
    served.reloaded(&format!("{HTTP}daemon = ['new=sleep 1003', 'kept=sleep 1004']\n{job}"));
    let new = served.daemon("new");
    assert_eq!(command_line(new), "sleep 1003");
    let changed = served.daemon("kept");
    assert_eq!(command_line(changed), "sleep 1004");
    wait_until("the old daemons are gone", || (is_gone(kept) && is_gone(gone)).then_some(()));
    assert!(served.server.wait_for("cron=tick").ends_with("| ticks"));
    let count = served.server.log().matches("daemon started name=gone").count();
    assert_eq!(count, 1, "the daemon is not started again");

    // The server can still be stopped after all daemons and jobs have been removed.
    served.reloaded(HTTP);
    wait_until("all daemons are gone", || (is_gone(new) && is_gone(changed)).then_some(()));
    served.server.stop();
}

#[test]
fn a_reload_changes_the_paths_and_the_format_of_the_logs() {
    let access = "access-log = 'DIR/access'\n";
    let mut served = Served::start("crashy", &[], &format!("{HTTP}{access}"));
    let address = served.server.http();
    let read = |served: &Served, name: &str| std::fs::read_to_string(served.path(name)).unwrap_or_default();
    assert_eq!(http::get(&address, "/ok").unwrap().status, 200);
    wait_until("the access log has a line", || read(&served, "access").contains("GET /ok").then_some(()));

    let moved = "log-file = 'DIR/log'\nlog-format = 'json'\naccess-log = 'DIR/other'\naccess-log-format = 'json'\n";
    served.reloaded(&format!("{HTTP}{moved}"));
    wait_until("the log is in the file", || read(&served, "log").contains("\"reload done\"").then_some(()));
    assert!(read(&served, "log").lines().all(|line| line.starts_with("{\"time\"")), "{}", read(&served, "log"));
    assert!(!served.server.log().contains("reload done"));
    // An old worker may answer the first requests. Its lines are not in the new file.
    wait_until("the access log has a line", || {
        assert_eq!(http::get(&address, "/ok").unwrap().status, 200);
        read(&served, "other").contains("\"target\":\"/ok\"").then_some(())
    });
    // The worker's own log lines are also written to the file.
    assert_eq!(http::get(&address, "/panic").unwrap().status, 500);
    wait_until("the panic is logged to the file", || read(&served, "log").contains("/panic").then_some(()));

    // After a rotation, both logs are again written to the configured files.
    for name in ["log", "other"] {
        std::fs::rename(served.path(name), served.path(&format!("{name}.1"))).unwrap();
    }
    served.server.signal(Signal::SIGUSR1);
    wait_until("the log is reopened", || read(&served, "log").contains("log files reopened").then_some(()));
    wait_until("the access log is reopened", || {
        assert_eq!(http::get(&address, "/ok").unwrap().status, 200);
        read(&served, "other").contains("/ok").then_some(())
    });

    // The log returns to standard error, at a different level, and there is no access log.
    served.reloaded(&format!("{HTTP}log-level = 'debug'\n"));
    served.server.wait_for("reload done gen=3");
    served.server.wait_for("worker exited");
    assert!(served.server.log().contains("worker spawned"), "that is logged at the level debug");
    let before = read(&served, "other").len() + read(&served, "access").len();
    assert_eq!(http::get(&address, "/ok").unwrap().status, 200);
    served
        .refused(&format!("{HTTP}log-level = 'warning'\n"), &["'warning' is not a log level", "did you mean 'warn'?"]);
    served.refused(&format!("{HTTP}log-file = 'DIR/no/log'\n"), &["--log-file: cannot open", "create"]);
    served.refused(&format!("{HTTP}access-log = 'DIR/no/log'\n"), &["--access-log: cannot open", "create"]);
    served.server.stop();
    assert_eq!(before, read(&served, "other").len() + read(&served, "access").len());
}

const FASTCGI: &str = "bind = 'fastcgi:unix:DIR/a.sock'\nworkers = 2\nsettle = '20ms'\ndirect = true\n";

#[test]
fn a_reload_runs_another_command_and_rejects_one_that_does_not_exist() {
    let mut served = Served::start("forkyard", &["run"], &format!("{FASTCGI}command = ['sleep', '1001']\n"));
    let old = served.server.children();
    served.refused(
        &format!("{FASTCGI}command = ['no-such-program']\n"),
        &["no program of that name", "stay as they are"],
    );
    served.refused(&format!("{FASTCGI}command = ['/etc/passwd']\n"), &["not an executable file"]);
    let daemon = "daemon = ['d=no-such-program']\ncommand = ['sleep', '1002']\n";
    served.refused(&format!("{FASTCGI}{daemon}"), &["--daemon d", "no program of that name"]);
    assert_eq!(served.server.children(), old, "no process has changed");

    let said = served.reloaded(&format!("{FASTCGI}command = ['sleep', '1002']\n"));
    assert!(!said.contains("only after a restart"), "{said}");
    for pid in served.server.renewed(2, &old) {
        wait_until("the process runs the new command", || (command_line(pid) == "sleep 1002").then_some(()));
    }
    served.server.stop();
}

#[test]
fn after_a_failed_reload_dead_processes_are_replaced_by_the_old_configuration() {
    let mut served = Served::start("forkyard", &["run"], &format!("{FASTCGI}command = ['sleep', '1001']\n"));
    let old = served.server.children();
    let broken =
        "command = ['sh', '-c', 'exit 3']\nsettle = '1m'\nuser = 4711\ngroup = 4711\ndaemon = ['d=sleep 1003']\n";
    served.refused(
        &format!("{}{broken}", FASTCGI.replace("settle = '20ms'\n", "")),
        &["reload failed; the old workers stay: worker died ", " gen=2 "],
    );
    assert_eq!(
        std::fs::metadata(served.path("a.sock")).unwrap().uid(),
        0,
        "the socket file was given back to its owner"
    );
    let victim = *old.first().unwrap();
    kill(Pid::from_raw(victim), Signal::SIGKILL).unwrap();
    served.server.wait_for(&format!("pid={victim}"));
    let replaced = wait_until("the process is replaced", || {
        let children = served.server.children();
        (children.len() == 2 && !children.contains(&victim)).then_some(children)
    });
    for pid in replaced {
        wait_until("the replacement has the old command and user", || {
            (command_line(pid) == "sleep 1001" && user_of(pid) == Some(0)).then_some(())
        });
    }
    assert!(!served.server.log().contains("daemon started"), "nor does anything else begin");

    served.reloaded(&format!("{FASTCGI}command = ['sleep', '1004']\n"));
    for pid in served.server.renewed(2, &old) {
        wait_until("the process runs the new command", || (command_line(pid) == "sleep 1004").then_some(()));
    }
    served.server.stop();
}
