//! `forkyard run`: external FastCGI programs that accept from the public socket themselves. The programs are php-cgi with a script, a C
//! program that uses libfcgi, and several that misbehave.

#![allow(clippy::unwrap_used, reason = "test code outside of test functions")]

mod common;

use std::collections::BTreeSet;
use std::io::{self, Write as _};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};

use common::limit::InTime as _;
use common::run::{Place, value};
use common::{Helper, Server, StopOnDrop, children_of, descriptors_of, is_gone, process, program, wait_until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, getsid};

// ---- php-cgi ----

#[test]
fn php_cgi_answers() {
    let place = Place::new();
    let mut server = place.start_php(&[], &[]);
    let response = place.ask("/pages.php?do=add&a=19&b=23", b"").unwrap();
    assert_eq!(response.body(), b"42\n");
    assert!(response.head().contains("Content-type: text/plain"), "{}", response.head());
    assert_eq!(response.application_status, 0);
    assert_eq!(place.ask("/pages.php", b"").unwrap().status(), 404);
    for (body, md5) in [(1, "9dd4e461268c8034f5c8564e155c67a6"), (1 << 20, "b561f87202d04959e37588ee05cf5b10")] {
        let response = place.ask("/pages.php?do=length", &vec![b'x'; body]).unwrap();
        assert_eq!(String::from_utf8_lossy(response.body()), format!("{body} {md5}\n"));
    }
    server.stop();
    assert!(!place.socket().exists());
}

/// php-cgi must not fork its own children, whatever its environment requests.
#[test]
fn php_knows_its_slot_and_forks_no_children() {
    let place = Place::new();
    let server = place.start_php(&[], &[("PHP_FCGI_CHILDREN", "3"), ("FORKYARD_SLOT", "77")]);
    let children = server.workers();
    assert_eq!(children.len(), 2);
    let mut slots = BTreeSet::new();
    // The kernel chooses the process that answers, so the test stops one process to make the other process answer.
    for (&pid, other) in children.iter().zip(children.iter().rev()) {
        common::stop(Pid::from_raw(*other));
        let environment = place.text("/pages.php?do=environment");
        kill(Pid::from_raw(*other), Signal::SIGCONT).unwrap();
        assert_eq!(value(&environment, "pid"), Some(pid.to_string().as_str()), "{environment}");
        assert_eq!(value(&environment, "FORKYARD_GENERATION"), Some("1"));
        assert_eq!(value(&environment, "PHP_FCGI_CHILDREN"), Some("0"));
        slots.extend(value(&environment, "FORKYARD_SLOT").map(str::to_owned));
        assert_eq!(children_of(Pid::from_raw(pid)), BTreeSet::new());
    }
    assert_eq!(slots, BTreeSet::from(["0".to_owned(), "1".to_owned()]));
    assert_eq!(server.workers(), children);
}

#[test]
fn php_cgi_may_exit_after_some_requests() {
    let place = Place::new();
    let mut server = place.start_php(&[], &[("PHP_FCGI_MAX_REQUESTS", "20")]);
    let before = server.workers();
    let mut seen = BTreeSet::new();
    for index in 0..200 {
        let environment = place.ask("/pages.php?do=environment", b"");
        let environment = environment.unwrap_or_else(|error| panic!("request {index}: {error}"));
        let environment = String::from_utf8_lossy(environment.body()).into_owned();
        let pid: i32 = value(&environment, "pid").and_then(|pid| pid.parse().ok()).expect("the page contains the pid");
        seen.insert(pid);
    }
    // 200 requests at 20 per process, except that two processes have not yet reached the limit.
    assert!(seen.len() >= 10, "{seen:?}");
    for _ in 0..8 {
        let line = server.wait_for("worker exited on its own");
        assert!(line.contains("slot=") && line.contains("status=0"), "{line}");
    }
    wait_until("there are two processes again", || {
        Some(server.workers()).filter(|all| all.len() == 2 && all.iter().all(|pid| children_are_none(*pid)))
    });
    assert_ne!(server.workers(), before);
    server.stop();
    assert!(!server.log().contains("worker died"), "{}", server.log());
}

/// Requests are always in flight, so the master never observes an idle process.
#[test]
fn php_cgi_may_exit_even_under_load() {
    let place = Place::new();
    let mut server = place.start_php(&[], &[("PHP_FCGI_MAX_REQUESTS", "20")]);
    let (failing, over) = (AtomicBool::new(false), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let client = || {
            (0..200).filter(|_| !over.load(Ordering::Relaxed)).try_for_each(|_| {
                let sum = place.ask("/pages.php?do=add&a=1&b=2", b"")?;
                if sum.body() == b"3\n" { Ok(()) } else { Err(io::Error::other(format!("{sum:?}"))) }
            })
        };
        let clients: Vec<_> = (0..4).map(|_| scope.spawn(client)).collect();
        let clients_end = StopOnDrop(&over);
        wait_until("the clients have finished, or a request has failed", || {
            failing.store(server.log().contains("workers die before they are ready"), Ordering::Relaxed);
            (failing.load(Ordering::Relaxed) || clients.iter().all(|client| client.is_finished())).then_some(())
        });
        if failing.load(Ordering::Relaxed) {
            drop(clients_end);
        }
        for client in clients {
            client.join().unwrap().unwrap();
        }
    });
    assert!(!failing.into_inner(), "{}", server.log());
    server.stop();
    let log = server.log();
    // 800 requests at 20 per process, except that two processes have not yet reached the limit.
    assert!(log.matches("worker exited on its own").count() >= 38, "{log}");
}

fn children_are_none(pid: i32) -> bool {
    children_of(Pid::from_raw(pid)).is_empty()
}

#[test]
fn php_errors_are_in_the_log() {
    let place = Place::new();
    let mut server = place.start_php(&[], &[]);
    let pids = server.workers();
    assert_eq!(place.text("/pages.php?do=complain&text=no%20such%20table"), "complained\n");
    let line = server.wait_for("| no such table");
    let named = pids.iter().any(|pid| line.contains(&format!(" pid={pid} ")));
    assert!(named && (line.contains(" slot=0 ") || line.contains(" slot=1 ")), "{line}");
}

// ---- a program on libfcgi ----

#[test]
fn a_c_program_answers() {
    let place = Place::new();
    let mut server = place.start_hello(&[]);
    let response = place.ask("/hello", b"").unwrap();
    assert_eq!((response.status(), response.body()), (200, &b"Hello, world\n"[..]));
    assert_eq!(place.ask("/nowhere", b"").unwrap().status(), 404);
    for length in [0, 1, 1 << 20] {
        let body: Vec<u8> = (0..length).map(|index: u32| u8::try_from(index % 251).unwrap()).collect();
        let echo = place.ask("/echo", &body).unwrap();
        assert!(echo.body() == body, "{} of {length} bytes were returned", echo.body().len());
    }
    assert_eq!(value(&place.text("/params?a=1"), "QUERY_STRING"), Some("a=1"));
    server.stop();
    let left = server.log().lines().filter(|line| line.contains("worker exited ") && line.contains("status=0")).count();
    assert_eq!(left, 2, "{}", server.log());
}

/// A program inherits the operator's environment, Forkyard's three variables, and exactly four descriptors.
#[test]
fn a_program_inherits_only_the_documented_environment_and_descriptors() {
    let place = Place::new();
    let hello = place.compile_hello();
    let mut command = place.run(&[], &[&hello.to_string_lossy()]);
    let server = Server::start_command(command.env("OF_THE_OPERATOR", "yes"));
    let environment = place.text("/env");
    assert_eq!(value(&environment, "OF_THE_OPERATOR"), Some("yes"));
    assert!(matches!(value(&environment, "FORKYARD_SLOT"), Some("0" | "1")), "{environment}");
    assert_eq!(value(&environment, "FORKYARD_GENERATION"), Some("1"));
    for pid in server.workers() {
        // The program keeps the signal mask that it has inherited. This mask must be empty.
        wait_until("the program blocks no signal", || (blocked_signals(pid)? == 0).then_some(()));
        // The descriptors are the socket, standard output and standard error, and the segment. A connection may still be closing.
        wait_until("the program has four descriptors", || (descriptors_of(pid) == 4).then_some(()));
        let environment = std::fs::read_to_string(format!("/proc/{pid}/environ")).unwrap().replace('\0', "\n");
        let segment = value(&environment, "FORKYARD_SHM").expect("the descriptor of the segment");
        let segment = std::fs::read_link(format!("/proc/{pid}/fd/{segment}")).unwrap();
        assert!(segment.to_string_lossy().starts_with("/memfd:"), "{}", segment.display());
        let socket = std::fs::read_link(format!("/proc/{pid}/fd/0")).unwrap();
        assert!(socket.to_string_lossy().starts_with("socket:"), "{}", socket.display());
    }
}

/// A process that has left its program's process group survives, and keeps its inherited descriptors.
#[test]
fn a_process_that_outlives_its_program_does_not_keep_the_cache_file_in_use() {
    let place = Place::new();
    let (file, left) = (place.path("pages.cache"), place.path("left"));
    let script = format!("#!/bin/sh\nsetsid sleep 1000 &\necho $! >>'{}'\nexec \"$@\"\n", left.display());
    let script = place.script("leave", &script);
    let _killed = Killed(&left);
    let daemon = format!("beside={script} sleep 1000");
    let options = ["--cache", "1M", "--cache-file", &file.to_string_lossy(), "--daemon", &daemon];
    let hello = place.compile_hello();
    let command = || place.run(&options, &[&script, &hello.to_string_lossy()]);
    let has_left = |&pid: &i32| getsid(Some(Pid::from_raw(pid))) == Ok(Pid::from_raw(pid));
    let survivors = |count| {
        wait_until("each program has left a process behind", || {
            let pids = std::fs::read_to_string(&left).ok()?;
            let pids: Option<Vec<i32>> = pids.lines().map(|pid| pid.parse().ok()).collect();
            pids.filter(|pids| pids.len() == count)
                .map(|pids| pids[count - 3..].to_vec())
                .filter(|pids| pids.iter().all(has_left))
        })
    };

    let mut server = Server::start_command(&mut command());
    let pid: i32 = place.text("/pid").trim().parse().unwrap();
    let environment = std::fs::read_to_string(format!("/proc/{pid}/environ")).unwrap().replace('\0', "\n");
    let segment = value(&environment, "FORKYARD_SHM").unwrap();
    assert_eq!(std::fs::read_link(format!("/proc/{pid}/fd/{segment}")).unwrap(), file);
    let of_the_first = survivors(3);
    server.stop();
    // A shutdown kills the processes that a daemon has left behind.
    assert_eq!(of_the_first.iter().filter(|&&pid| !is_gone(pid)).count(), 2, "{}", server.log());

    let mut server = Server::start_command(&mut command());
    assert!(server.log().contains("cache is warm"), "{}", server.log());
    let (of_the_second, programs) = (survivors(6), server.workers());
    server.signal(Signal::SIGKILL);
    assert_eq!(server.wait_end(), None);
    wait_until("the programs die with the master", || programs.iter().all(|&pid| is_gone(pid)).then_some(()));
    assert!(of_the_second.iter().all(|&pid| !is_gone(pid)), "{of_the_second:?}");

    let mut server = Server::start_command(&mut command());
    assert!(server.log().contains("cache is warm"), "{}", server.log());
    survivors(9);
    server.stop();
}

/// The client is stopped, like a client whose output is piped to a pager.
#[test]
fn a_hung_client_does_not_keep_the_cache_file_in_use() {
    let place = Place::new();
    let (file, control) = (place.path("pages.cache"), place.path("control"));
    let (file, control) = (file.to_string_lossy(), control.to_string_lossy());
    let options = ["--cache", "1M", "--events", "1M", "--cache-file", &file, "--control", &control];
    let mut server = place.start_hello(&options);
    let mut client = Command::new(program("forkyard"));
    client.args(["events", "tail"]).env("FORKYARD_CONTROL", &*control).stdout(Stdio::null());
    let client = Helper::start(&mut client);
    let pid = Pid::from_raw(client.0.id().try_into().unwrap());
    let maps = format!("/proc/{pid}/maps");
    wait_until("the client has mapped the file", || {
        std::fs::read_to_string(&maps).ok()?.contains(&*file).then_some(())
    });
    common::stop(pid);
    server.stop();

    let mut server = place.start_hello(&options);
    assert!(server.log().contains("cache is warm"), "{}", server.log());
    kill(pid, Signal::SIGCONT).unwrap();
    drop(client);
    server.stop();
}

/// Kills the processes whose pids are in a file.
struct Killed<'a>(&'a Path);

impl Drop for Killed<'_> {
    fn drop(&mut self) {
        let pids = std::fs::read_to_string(self.0).unwrap_or_default();
        for pid in pids.lines().filter_map(|pid| pid.parse().ok()) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL); // the process may have exited
        }
    }
}

/// Returns the signals that a process blocks, as a bit mask.
fn blocked_signals(pid: i32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let blocked = status.lines().find_map(|line| line.strip_prefix("SigBlk:"))?;
    u64::from_str_radix(blocked.trim(), 16).ok()
}

#[test]
fn a_killed_program_is_replaced() {
    let place = Place::new();
    let mut server = place.start_hello(&[]);
    let before = server.workers();
    let victim: i32 = place.text("/pid").trim().parse().unwrap();
    assert!(before.contains(&victim));
    kill(Pid::from_raw(victim), Signal::SIGKILL).unwrap();
    for _ in 0..20 {
        let pid: i32 = place.text("/pid").trim().parse().unwrap();
        assert_ne!(pid, victim);
    }
    let line = server.wait_for("worker died");
    assert!(line.contains(&format!("pid={victim}")) && line.contains("signal=KILL"), "{line}");
    let after = wait_until("there are two programs again", || {
        Some(server.workers()).filter(|all| all.len() == 2 && !all.contains(&victim))
    });
    assert_eq!(before.intersection(&after).count(), 1, "the other program of {before:?} is still running: {after:?}");
    server.stop();
}

#[test]
fn the_log_reports_how_a_program_died() {
    let place = Place::new();
    let mut server = place.start_hello(&[]);
    for _ in 0..3 {
        let died = place.ask("/abort", b"");
        assert!(died.is_err(), "{died:?}");
        let line = server.wait_for("worker died");
        assert!(line.contains("signal=ABRT") && line.contains("WARN"), "{line}");
        assert_eq!(place.text("/hello"), "Hello, world\n");
    }
    wait_until("there are two programs again", || (server.workers().len() == 2).then_some(()));
    server.stop();
}

/// Reloads while two clients send requests continuously. Returns the number of responses.
fn reload_under_load(place: &Place, server: &mut Server, target: &str) -> usize {
    let before = server.workers();
    let (done, answered) = (AtomicBool::new(false), std::sync::atomic::AtomicUsize::new(0));
    let failed = std::thread::scope(|scope| {
        let client = || {
            while !done.load(Ordering::Relaxed) {
                let response = place.ask(target, b"")?;
                if response.body().is_empty() {
                    return Err(io::Error::other(format!("{response:?}")));
                }
                answered.fetch_add(1, Ordering::Relaxed);
            }
            Ok(())
        };
        let clients_end = StopOnDrop(&done);
        let clients = [scope.spawn(client), scope.spawn(client)];
        wait_until("requests are answered", || {
            (answered.load(Ordering::Relaxed) >= 20 || clients.iter().any(|client| client.is_finished())).then_some(())
        });
        server.signal(Signal::SIGHUP);
        server.wait_for("reload done gen=2");
        server.renewed(2, &before);
        let until = answered.load(Ordering::Relaxed) + 20;
        let more = || answered.load(Ordering::Relaxed) >= until || clients.iter().any(|client| client.is_finished());
        wait_until("requests are still answered", || more().then_some(()));
        drop(clients_end);
        clients.into_iter().filter_map(|client| client.join().unwrap().err()).collect::<Vec<_>>()
    });
    assert!(failed.is_empty(), "{failed:?}");
    answered.into_inner()
}

#[test]
fn a_reload_replaces_all_programs_and_loses_no_request() {
    let place = Place::new();
    let mut server = place.start_hello(&[]);
    assert!(reload_under_load(&place, &mut server, "/hello") >= 40);
    assert_eq!(value(&place.text("/env"), "FORKYARD_GENERATION"), Some("2"));
    server.stop();
    assert!(!server.log().contains("signal="), "nobody was killed: {}", server.log());
}

#[test]
fn a_reload_of_php_cgi_loses_no_request() {
    let place = Place::new();
    // Without this variable php-cgi exits after 500 requests, even without a reload.
    let mut server = place.start_php(&[], &[("PHP_FCGI_MAX_REQUESTS", "0")]);
    assert!(reload_under_load(&place, &mut server, "/pages.php?do=add&a=1&b=2") >= 40);
    assert_eq!(value(&place.text("/pages.php?do=environment"), "FORKYARD_GENERATION"), Some("2"));
    server.stop();
    assert!(!server.log().contains("signal="), "nobody was killed: {}", server.log());
}

#[test]
fn a_stop_leaves_no_process_or_socket_behind() {
    let place = Place::new();
    let mut server = place.start_hello(&[]);
    let pids = server.workers();
    assert_eq!(pids.len(), 2);
    assert!(place.socket().exists());
    server.stop();
    assert!(!place.socket().exists());
    // The master has reaped the processes, so not even zombies are left.
    assert!(pids.iter().all(|pid| process(*pid).is_none()));
}

#[test]
fn no_program_outlives_its_master() {
    let place = Place::new();
    let mut server = place.start_hello(&[]);
    let pids = server.workers();
    assert_eq!(pids.len(), 2);
    server.signal(Signal::SIGKILL);
    assert_eq!(server.wait_end(), None, "the master was killed by a signal");
    for pid in pids {
        wait_until("the program is gone", || is_gone(pid).then_some(()));
    }
    assert!(place.socket().exists(), "no process was left to remove the socket");
    let mut next = place.start_hello(&[]);
    assert_eq!(place.text("/hello"), "Hello, world\n");
    next.stop();
}

// ---- programs that misbehave ----

/// Runs a command that must fail. Returns its status and output.
fn failure(command: &mut Command) -> (Option<i32>, String) {
    let Output { status, stdout, stderr } = command.output_in_time().unwrap();
    assert_eq!(stdout, b"");
    (status.code(), String::from_utf8_lossy(&stderr).into_owned())
}

#[test]
fn a_program_that_cannot_be_executed_is_reported() {
    let place = Place::new();
    let file = place.path("not-executable");
    std::fs::write(&file, "#!/bin/sh\n").unwrap();
    let file = file.to_string_lossy();
    for (command, said) in [
        ("no-such-program-anywhere", "cannot run no-such-program-anywhere: no program of that name in PATH"),
        ("/no/such/program", "cannot run /no/such/program: no such file"),
        (&*file, "it is not an executable file"),
    ] {
        let (status, error) = failure(&mut place.run(&[], &[command]));
        assert_eq!(status, Some(1), "{error}");
        assert!(error.contains(said) && error.starts_with("forkyard: "), "{error}");
        assert!(!place.socket().exists(), "{command} leaves no socket behind");
    }
}

#[test]
fn an_invalid_bind_is_a_usage_error() {
    let forkyard =
        |arguments: &[&str]| failure(Command::new(program("forkyard")).args(["run", "--direct"]).args(arguments));
    let (status, error) = forkyard(&["--bind", "http:127.0.0.1:0", "--", "true"]);
    assert_eq!(status, Some(2), "{error}");
    assert!(error.contains("cannot listen on http:127.0.0.1:0") && error.contains("fastcgi"), "{error}");
    let (status, error) = forkyard(&["--bind", "fastcgi:127.0.0.1:0,fastcgi:127.0.0.1:0", "--", "true"]);
    assert_eq!(status, Some(2), "{error}");
    assert!(error.contains("run takes one --bind and got 2"), "{error}");
    let (status, error) = forkyard(&["--bind", "fastcgi:127.0.0.1:0"]);
    assert_eq!(status, Some(2), "{error}");
    assert!(error.contains("COMMAND"), "{error}");
}

#[test]
fn a_program_that_dies_immediately_is_retried_with_increasing_delays() {
    let place = Place::new();
    let mut server = Server::launch(&mut place.run(&[], &["false"]));
    for (failures, delay_ms) in [(1, 100), (2, 200), (3, 400), (4, 800)] {
        let line = server.wait_for("workers die before they are ready");
        assert!(line.contains("ERROR"), "{line}");
        assert!(line.contains(&format!(" failures={failures} next_try={delay_ms}ms")), "{line}");
    }
    server.stop();
    assert!(!place.socket().exists());
    let log = server.log();
    // Two processes at startup, then one at a time. Deaths after the last awaited line are not counted.
    let until_then = log.split(" failures=4 ").next().unwrap();
    let died = until_then.lines().filter(|line| line.contains("worker died") && line.contains("status=1")).count();
    assert!((4..=6).contains(&died), "{log}");
    assert!(!log.contains("ready in "), "{log}");
}

/// Each process leaves two orphans: one that exits immediately, and one that exits when the test requests it.
#[test]
fn an_orphan_of_a_program_is_reaped() {
    let place = Place::new();
    let hello = place.compile_hello();
    let (gate, list) = (place.path("gate"), place.path("list"));
    nix::unistd::mkfifo(&gate, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let script = format!(
        "(true &); (sh -c 'read line; echo $$ >>{}' <{} &); exec {}",
        list.display(),
        gate.display(),
        hello.display()
    );
    let mut server = Server::start_command(&mut place.run(&[], &["sh", "-c", &script]));
    let all = wait_until("the master has its two processes and their two orphans", || {
        Some(server.children()).filter(|all| all.len() == 4)
    });
    let mut gate = std::fs::File::options().write(true).open(gate).unwrap();
    gate.write_all(b"go\ngo\n").unwrap();
    let two = wait_until("the orphans are reaped", || Some(server.children()).filter(|all| all.len() == 2));
    let reaped: BTreeSet<i32> = all.difference(&two).copied().collect();
    let orphans = std::fs::read_to_string(list).unwrap();
    assert_eq!(reaped, orphans.lines().map(|pid| pid.parse().unwrap()).collect());
    assert!(two.iter().all(|pid| process(*pid).is_some_and(|process| process.state != 'Z')));
    assert_eq!(place.text("/hello"), "Hello, world\n");
    server.stop();
    assert!(!server.log().contains("worker died"), "{}", server.log());
}

#[test]
fn a_program_that_does_not_exit_is_killed() {
    let place = Place::new();
    let options = ["--drain-timeout", "1s", "--settle", "50ms"];
    let script = "trap '' TERM; echo deaf; exec sleep 1000";
    let mut server = Server::launch(&mut place.run(&options, &["sh", "-c", script]));
    server.wait_for("| deaf");
    server.wait_for("| deaf");
    let pids = server.workers();
    assert_eq!(pids.len(), 2);
    server.stop();
    let log = server.log();
    for pid in pids {
        assert!(process(pid).is_none(), "{log}");
        let (late, of) = ("worker killed: it did not finish in time (--drain-timeout)", format!(" pid={pid}"));
        let is_late = |line: &str| line.contains("WARN") && line.contains(late) && line.ends_with(&of);
        assert!(log.lines().any(is_late), "{log}");
        let left = format!("pid={pid} gen=1 signal=KILL");
        assert!(log.lines().any(|line| line.contains("worker exited ") && line.contains(&left)), "{log}");
    }
    assert!(!place.socket().exists());
}

/// The children of a wrapper script also hold the listening socket, so they would keep accepting connections alongside the replacement.
#[test]
fn children_of_a_wrapper_are_killed_with_it() {
    let place = Place::new();
    let bind = format!("fastcgi:unix:{}", place.path("wrapper.sock").display());
    let run = [
        "run",
        "--direct",
        "--bind",
        &bind,
        "--workers",
        "1",
        "--settle",
        "10ms",
        "--",
        "sh",
        "-c",
        "sleep 600 & wait",
    ];
    let mut server = Server::start("forkyard", &run);
    let family = |wrapper: i32| {
        wait_until("the wrapper has started a child", || children_of(Pid::from_raw(wrapper)).first().copied())
    };
    let gone = |pid: i32| {
        wait_until("the process is gone", || is_gone(pid).then_some(()));
    };
    let wrapper = *server.workers().first().unwrap();
    let started = family(wrapper);
    kill(Pid::from_raw(wrapper), Signal::SIGKILL).unwrap();
    server.wait_for("worker died");
    gone(started);
    let next = wait_until("the wrapper is replaced", || {
        server.workers().into_iter().find(|&pid| pid != wrapper && pid != started)
    });
    let started = family(next);
    server.stop();
    gone(started);
}
