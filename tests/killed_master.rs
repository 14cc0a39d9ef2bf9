//! When the master is killed, its programs, daemons and jobs are also killed, together with the processes that they have started. A guard
//! process outlives the master and kills them.

#![allow(clippy::unwrap_used, reason = "a failing test reports its location")]

mod common;

use std::collections::BTreeSet;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::process::Command;

use common::run::Place;
use common::{Server, http, is_gone, process, processes, program, wait_until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Returns the command of a shell that keeps running with php-cgi as its child. The arguments of php-cgi contain the path of the directory.
fn wrapped_php(place: &Place) -> String {
    format!("php-cgi -n -d include_path='{}'; true", place.path("").display())
}

fn run_wrapped(place: &Place, options: &[&str]) -> Command {
    place.run(options, &["sh", "-c", &wrapped_php(place)])
}

/// Returns all processes with this path in their arguments: the server and its descendants.
fn ours(path: &Path) -> BTreeSet<i32> {
    let mentions = |pid: i32| {
        let arguments = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        arguments.windows(path.as_os_str().len()).any(|window| window == path.as_os_str().as_bytes())
    };
    processes().into_iter().map(|process| process.pid).filter(|&pid| mentions(pid) && !is_gone(pid)).collect()
}

fn named(path: &Path, name: &str) -> BTreeSet<i32> {
    ours(path).into_iter().filter(|&pid| process(pid).is_some_and(|process| process.name == name)).collect()
}

fn guard_of(server: &Server) -> i32 {
    wait_until("there is one guard", || {
        let all = processes().into_iter();
        let guards = all.filter(|process| process.parent == server.pid().as_raw() && process.name == "guard");
        let guards: Vec<i32> = guards.filter(|process| process.state != 'Z').map(|process| process.pid).collect();
        (guards.len() == 1).then(|| guards[0])
    })
}

/// Kills the processes that a failed test has left behind.
struct Left<'a>(&'a Path);

impl Drop for Left<'_> {
    fn drop(&mut self) {
        for pid in ours(self.0) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
}

fn kill_master(server: &mut Server, path: &Path) {
    let _left = Left(path);
    server.signal(Signal::SIGKILL);
    server.wait_end();
    wait_until("no process of the server is left", || ours(path).is_empty().then_some(()));
}

#[test]
fn programs_below_a_wrapper_die_with_a_killed_master_and_the_address_is_free() {
    let place = Place::with_port();
    std::fs::write(place.path("a.php"), "<?php echo 'served';").unwrap();
    for _ in 0..2 {
        let mut server = Server::start_command(&mut run_wrapped(&place, &[]));
        assert_eq!(place.text("/a.php"), "served");
        assert_eq!(named(&place.path(""), "php-cgi").len(), 2);
        kill_master(&mut server, &place.path(""));
        let line = server.logged("the master has died");
        assert!(line.contains("(php-cgi)"), "{line}");
    }
}

#[test]
fn a_program_whose_wrapper_died_earlier_dies_with_the_master() {
    let place = Place::new();
    // Each worker leaves a process behind in its process group, and is replaced.
    let text = "sh -c 'echo left $$; exec sleep 600' & sleep 1";
    let mut server = Server::start_command(&mut place.run(&["--settle", "1ms"], &["sh", "-c", text]));
    let pid_in = |line: &str| -> i32 { line.rsplit_once(' ').unwrap().1.parse().unwrap() };
    let left = pid_in(&server.logged("| left "));
    wait_until("the left-behind process is a child of the master", || {
        process(left).filter(|process| process.parent == server.pid().as_raw()).map(drop)
    });
    // A guard that is started later must also find the process that was left behind.
    let first = guard_of(&server);
    kill(Pid::from_raw(first), Signal::SIGKILL).unwrap();
    wait_until("the guard is replaced", || is_gone(first).then_some(()));
    guard_of(&server);
    assert!(!is_gone(left));
    server.signal(Signal::SIGKILL);
    server.wait_end();
    for line in server.log().lines().filter(|line| line.contains("| left ")) {
        wait_until("the left-behind process is killed", || is_gone(pid_in(line)).then_some(()));
    }
}

#[test]
fn daemons_and_jobs_below_wrappers_die_with_a_killed_master_and_workers_finish() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().display();
    let sleep = format!("sh -c 'echo begun $$; sleep 600; true {path}'");
    let daemon = format!("a={sleep}");
    let job = format!("b=* * * * * *={sleep}");
    let mut server = Server::start(
        "crashy",
        &[
            "--bind",
            "http:127.0.0.1:0",
            "--workers",
            "1",
            "--daemon",
            &daemon,
            "--cron",
            &job,
            "--daemon",
            "c=setsid sleep 600",
        ],
    );
    let pid_in = |what: &str| -> i32 { server.logged(what).rsplit_once(' ').unwrap().1.parse().unwrap() };
    let [daemon, job] = ["daemon=a", "cron=b"].map(|name| {
        let wrapper = pid_in(name);
        wait_until("the child has started", || {
            processes().into_iter().find(|process| process.parent == wrapper).map(|process| process.pid)
        })
    });
    let line = server.logged("has put itself into the background");
    let detached: i32 = line.rsplit_once("pid=").unwrap().1.parse().unwrap();
    std::thread::scope(|scope| {
        let address = server.http();
        let slow = scope.spawn(move || http::get(&address, "/slow/1500").unwrap().status);
        wait_until("the request is in flight", || {
            let board = server.segment().scoreboard();
            (board.read(0)?.in_flight == 1).then_some(())
        });
        server.signal(Signal::SIGKILL);
        assert_eq!(slow.join().unwrap(), 200);
    });
    server.wait_end();
    for (what, pid) in [("the daemon", daemon), ("the job", job), ("the daemon in the background", detached)] {
        wait_until(&format!("{what} is killed"), || is_gone(pid).then_some(()));
    }
}

#[test]
fn a_master_killed_during_a_reload_leaves_no_process_behind() {
    for moment in ["signal to reload", "worker exited", "reload done"] {
        let place = Place::new();
        let mut server = Server::start_command(&mut run_wrapped(&place, &[]));
        server.signal(Signal::SIGHUP);
        server.wait_for(moment);
        kill_master(&mut server, &place.path(""));
    }
}

#[test]
fn an_upgrade_kills_no_process_and_a_master_killed_after_it_leaves_none_behind() {
    let place = Place::new();
    let mut server = Server::start_command(&mut run_wrapped(&place, &[]));
    let old = guard_of(&server);
    server.signal(Signal::SIGUSR2);
    server.wait_for("upgraded version=");
    server.wait_for("reload done");
    wait_until("the old guard is replaced", || is_gone(old).then_some(()));
    guard_of(&server);
    assert!(!server.log().contains("the master has died"), "{}", server.log());
    assert!(!server.log().contains("signal=KILL"), "{}", server.log());
    wait_until("the old programs have exited", || (named(&place.path(""), "php-cgi").len() == 2).then_some(()));
    kill_master(&mut server, &place.path(""));
}

#[test]
fn processes_taken_over_by_an_upgraded_master_die_with_it() {
    let place = Place::new();
    // New workers never become ready, so the old workers keep running.
    let broken = place.path("broken");
    let text = format!("test -e '{}' && exit 3; {}", broken.display(), wrapped_php(&place));
    let mut server = Server::start_command(&mut place.run(&[], &["sh", "-c", &text]));
    let old = named(&place.path(""), "php-cgi");
    std::fs::write(broken, "").unwrap();
    server.signal(Signal::SIGUSR2);
    server.wait_for("upgraded version=");
    server.wait_for("reload failed");
    guard_of(&server);
    assert_eq!(named(&place.path(""), "php-cgi"), old);
    kill_master(&mut server, &place.path(""));
}

#[test]
fn a_killed_guard_is_replaced_and_a_stopped_guard_is_resumed() {
    let place = Place::new();
    let mut server = Server::start_command(&mut run_wrapped(&place, &[]));
    let first = guard_of(&server);
    kill(Pid::from_raw(first), Signal::SIGKILL).unwrap();
    let line = server.logged("guard exited");
    assert!(line.contains("signal=KILL"), "{line}");
    wait_until("the guard is replaced", || is_gone(first).then_some(()));
    let second = guard_of(&server);
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGUSR1, Signal::SIGSTOP] {
        kill(Pid::from_raw(second), signal).unwrap();
    }
    server.logged("continued the guard, which another process had stopped");
    wait_until("the guard continues", || (process(second)?.state != 'T').then_some(()));
    kill_master(&mut server, &place.path(""));
}

#[test]
fn a_guard_closes_a_log_file_that_was_moved_and_exits_with_a_stopping_master() {
    let place = Place::new();
    let log = place.path("log");
    let mut server = Server::start_command(&mut run_wrapped(&place, &["--log-file", log.to_str().unwrap()]));
    let first = guard_of(&server);
    std::fs::rename(&log, place.path("log.1")).unwrap();
    server.signal(Signal::SIGUSR1);
    wait_until("the guard is replaced", || is_gone(first).then_some(()));
    let second = guard_of(&server);
    let held = std::fs::read_dir(format!("/proc/{second}/fd")).unwrap();
    let held: Vec<_> = held.filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok()).collect();
    assert!(held.contains(&log) && !held.contains(&place.path("log.1")), "{held:?}");
    server.stop();
    wait_until("the guard has exited too", || is_gone(second).then_some(()));
    let text = std::fs::read_to_string(&log).unwrap();
    assert!(!text.contains("guard exited") && !text.contains("the master has died"), "{text}");
}

#[test]
fn a_server_without_programs_has_no_guard() {
    let mut server = Server::launch(Command::new(program("hello")).args(["--bind", "http:127.0.0.1:0"]));
    server.wait_for("ready in ");
    let children = processes().into_iter().filter(|process| process.parent == server.pid().as_raw());
    assert!(children.into_iter().all(|process| process.name != "guard"));
    server.stop();
}
