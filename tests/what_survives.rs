//! Tests each line of "Crash tolerance" in `docs/architecture.md`: the effects of a process's death on the rest of the system. Other files
//! test the details: `no_request_lost.rs` for reloads, upgrades, scaling and recycling under load; `slow_clients.rs` for slow clients;
//! `events_publish.rs` for the relay; `killed_master.rs` for the programs of a killed master and for the guard.

#![allow(clippy::unwrap_used, reason = "a failing test reports its location")]

mod common;

use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

use common::http::{self, Client};
use common::limit::InTime as _;
use common::{Server, StopOnDrop, is_gone, processes, program, wait_until};
use forkyard_shm::State;
use nix::sys::signal::{Signal, kill};
use nix::sys::time::TimeValLike as _;
use nix::time::ClockId;
use nix::unistd::Pid;

const HTTP: [&str; 2] = ["--bind", "http:127.0.0.1:0"];

fn crashy(arguments: &[&str]) -> Server {
    Server::start("crashy", &[&HTTP, arguments].concat())
}

/// Returns the CPU time of a single-threaded process: the first number in its `schedstat`.
fn cpu_time_ns(pid: Pid) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/schedstat")).unwrap();
    text.split(' ').next().unwrap().parse().unwrap()
}

fn in_flight(server: &Server) -> u32 {
    let board = server.segment().scoreboard();
    (0..board.rows()).filter_map(|slot| board.read(slot)).map(|row| row.in_flight).sum()
}

#[test]
fn a_worker_panics_in_one_request() {
    let mut server = crashy(&["--workers", "1"]);
    let (address, workers) = (server.http(), server.workers());
    let mut other = Client::connect(&address).unwrap();
    std::thread::scope(|scope| {
        let beside = scope.spawn(|| other.request("GET", "/slow/3000", b"").unwrap().status);
        wait_until("the request is in flight", || (in_flight(&server) == 1).then_some(()));
        assert_eq!(http::get(&address, "/panic").unwrap().status, 500);
        assert_eq!(beside.join().unwrap(), 200, "the concurrent request is not affected");
    });
    server.has_only(&workers); // the worker is still alive
    server.stop();
}

#[test]
fn a_worker_is_killed_or_segfaults() {
    let mut server = crashy(&["--workers", "1"]);
    let address = server.http();
    for path in ["/segv", "/slow/60000"] {
        let mut kept = Client::connect(&address).unwrap();
        assert_eq!(kept.request("GET", "/ok", b"").unwrap().status, 200);
        let board = server.segment().scoreboard();
        let worker = || i32::try_from(board.read(0).unwrap().pid).unwrap();
        let old = worker();
        std::thread::scope(|scope| {
            let asked = scope.spawn(|| http::get(&address, path).unwrap().status);
            if path != "/segv" {
                wait_until("the request is in flight", || (in_flight(&server) == 1).then_some(()));
                kill(Pid::from_raw(old), Signal::SIGKILL).unwrap();
            }
            assert_eq!(asked.join().unwrap(), 502, "{path}");
        });
        assert_eq!(kept.request("GET", "/ok", b"").unwrap().status, 200, "the worker's idle connection continues");
        let line = server.wait_for("worker died");
        assert!(line.contains(&format!("GET {path} ")), "{line}");
        wait_until("the worker is replaced", || (worker() != old).then_some(()));
    }
    server.stop();
}

#[test]
fn a_worker_dies_holding_a_lock_in_shared_memory() {
    // Quarantine is off. If only the machine-wide count of OOM kills is available, an OOM kill in another test would make these deaths
    // count against the request.
    let arguments = ["--workers", "2", "--cache", "2M", "--respawn-rate", "1000", "--quarantine", "0"];
    let mut server = Server::start("pages", &[&HTTP[..], &arguments].concat());
    let (address, segment) = (server.http(), server.segment());
    std::thread::scope(|scope| {
        let asking = scope.spawn(|| {
            for number in 0..2000 {
                let status = http::get(&address, &format!("/page/{}", number % 300)).unwrap().status;
                assert!(status == 200 || status == 502, "{status}");
            }
        });
        let board = segment.scoreboard();
        while !asking.is_finished() {
            // Only a ready worker is killed, because deaths before readiness trigger the circuit breaker and its delays.
            let ready = (0..2).filter_map(|slot| board.read(slot)).find(|row| row.state == State::Ready);
            if let Some(worker) = ready.map(|row| i32::try_from(row.pid).unwrap()) {
                let _ = kill(Pid::from_raw(worker), Signal::SIGKILL); // the worker may already be dead
                wait_until("the worker is dead", || is_gone(worker).then_some(()));
            }
        }
    });
    segment.cache().audit().expect("the cache is consistent");
    let stats = segment.cache().stats();
    assert_eq!((stats.lock_timeouts, stats.lost), (0, 0), "no process waited for a dead lock holder: {stats:?}");
    server.stop();
}

#[test]
fn the_same_request_kills_workers_again_and_again() {
    let mut server = crashy(&["--workers", "2"]);
    let address = server.http();
    wait_until("the request is refused", || (http::get(&address, "/poison/1").ok()?.status == 503).then_some(()));
    server.wait_for("quarantined");
    assert_eq!(http::get(&address, "/ok").unwrap().status, 200, "other requests are answered");
    server.stop();
}

#[test]
fn a_worker_hangs() {
    let mut server = crashy(&["--workers", "2", "--hang-timeout", "400ms"]);
    let address = server.http();
    std::thread::scope(|scope| {
        let hanging = scope.spawn(|| http::get(&address, "/hang").unwrap().status);
        let line = server.wait_for("worker hangs");
        assert!(line.contains("GET /hang "), "the request is named: {line}");
        assert_eq!(hanging.join().unwrap(), 502);
    });
    wait_until("the worker is replaced", || (server.workers().len() == 2).then_some(()));
    server.stop();
}

#[test]
fn all_workers_crash_at_startup() {
    let directory = tempfile::tempdir().unwrap();
    let broken = directory.path().join("broken");
    std::fs::write(&broken, "").unwrap();
    let command = [&HTTP[..], &["--workers", "4"]].concat();
    let mut server = Server::launch(Command::new(program("crashy")).args(command).env("CRASHY_BROKEN", &broken));
    for failures in 1..=5 {
        server.wait_for(&format!(" failures={failures} "));
    }
    // The master now waits for 1600 ms. The CPU time of a master that did not sleep would depend on the load on the machine, so the test
    // compares the master's CPU time with the CPU time of a thread that does not sleep.
    let (before, over) = (cpu_time_ns(server.pid()), AtomicBool::new(false));
    let spun = std::thread::scope(|scope| {
        let spinning = scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                std::hint::spin_loop();
            }
            ClockId::CLOCK_THREAD_CPUTIME_ID.now().unwrap().num_nanoseconds().cast_unsigned()
        });
        let spins = StopOnDrop(&over);
        server.wait_for(" failures=6 ");
        drop(spins);
        spinning.join().unwrap()
    });
    let used = cpu_time_ns(server.pid()) - before;
    assert!(used < spun / 4, "the master used {used} ns while a thread that never sleeps got {spun} ns");
    // The delays so far were 100, 200, 400, 800 and 1600 ms. After the first four deaths, the master started only one worker at a time.
    let log = server.log();
    let forks = log.split(" failures=6 ").next().unwrap().matches("worker died").count();
    assert!(forks <= 4 + 5, "{forks} forks");
    std::fs::remove_file(&broken).unwrap();
    server.signal(Signal::SIGHUP);
    server.wait_for("ready in ");
    assert_eq!(http::get(&server.http(), "/ok").unwrap().status, 200, "a reload with a working build succeeds");
    server.stop();
}

#[test]
fn sighup_with_a_build_that_does_not_start() {
    let directory = tempfile::tempdir().unwrap();
    let (broken, control) = (directory.path().join("broken"), directory.path().join("control"));
    let mut command = Command::new(program("crashy"));
    command.args(HTTP).args(["--workers", "2", "--control"]).arg(&control).env("CRASHY_BROKEN", &broken);
    let mut server = Server::start_command(&mut command);
    let workers = server.workers();
    std::fs::write(&broken, "").unwrap();
    let reload =
        || Command::new(program("crashy")).args(["reload", "--control"]).arg(&control).output_in_time().unwrap();
    let refused = reload();
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(refused.status.code() == Some(1) && said.contains("broken on purpose"), "{said}");
    server.has_only(&workers); // the old workers keep running
    std::fs::remove_file(&broken).unwrap();
    assert_eq!(reload().status.code(), Some(0));
    server.stop();
}

#[test]
fn the_master_is_killed() {
    let directory = tempfile::tempdir().unwrap();
    let socket = format!("http:unix:{}", directory.path().join("a.sock").display());
    let mut server = crashy(&["--workers", "2", "--bind", &socket]);
    let address = server.http();
    let workers = server.workers();
    let ours = wait_until("there are two workers and their heirs", || {
        let all = processes().into_iter();
        let ours = all.filter(|process| workers.contains(&process.pid) || workers.contains(&process.parent));
        let ours: Vec<i32> = ours.map(|process| process.pid).collect();
        (ours.len() == 4).then_some(ours)
    });
    std::thread::scope(|scope| {
        let slow = scope.spawn(|| http::get(&address, "/slow/3000").unwrap().status);
        wait_until("the request is in flight", || (in_flight(&server) == 1).then_some(()));
        server.signal(Signal::SIGKILL);
        assert_eq!(slow.join().unwrap(), 200, "the request in flight is finished");
    });
    server.wait_end();
    wait_until("no orphan remains", || ours.iter().all(|&pid| is_gone(pid)).then_some(()));
    let mut next = Server::start("crashy", &["--bind", &socket, "--workers", "1"]);
    next.stop();
}

#[test]
fn descriptors_run_out() {
    let mut server = crashy(&["--workers", "1", "--rlimit", "nofile=64"]);
    let address = server.http();
    let mut clients: Vec<Client> = (0..80).map(|_| Client::connect(&address).unwrap()).collect();
    for client in &mut clients {
        use std::io::Write as _;
        client.stream.get_mut().write_all(b"GET /ok HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
    }
    server.wait_for("cannot accept connections for now");
    // Each worker that exits frees descriptors for a waiting client, and no request is lost.
    for mut client in clients {
        assert_eq!(client.response(false).unwrap().status, 200);
    }
    assert_eq!(http::get(&address, "/ok").unwrap().status, 200);
    assert_eq!(server.log().matches("cannot accept connections for now").count(), 1, "the pause is logged once");
    server.stop();
}

#[test]
fn a_power_cut() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("cache").display().to_string();
    let arguments = [&HTTP[..], &["--workers", "2", "--cache-file", &file]].concat();
    let mut server = Server::start("pages", &arguments);
    assert_eq!(http::get(&server.http(), "/page/1").unwrap().status, 200);
    let ours: Vec<i32> = server.children().into_iter().collect();
    // All processes are killed together, without a chance to log anything.
    for pid in [server.pid()].into_iter().chain(ours.iter().map(|&pid| Pid::from_raw(pid))) {
        let _ = kill(pid, Signal::SIGKILL);
    }
    server.wait_end();
    wait_until("all processes are gone", || ours.iter().all(|&pid| is_gone(pid)).then_some(()));
    let mut next = Server::start("pages", &arguments);
    let said = next.log();
    assert!(said.contains("was dropped") || said.contains("cache is warm"), "used whole, or dropped: {said}");
    assert_eq!(http::get(&next.http(), "/page/1").unwrap().status, 200);
    next.stop();
}
