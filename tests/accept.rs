//! Accepting connections: a new connection wakes a single worker, and this worker can serve the connection immediately.

#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    reason = "a failing test reports its location, and measurements are printed"
)]

mod common;

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::TcpListener;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use common::raw::{self, Protocol};
use common::{Server, wait_until};

const KEPT: [Protocol; 2] = [Protocol::Http, Protocol::FastCgi];
const QUIET: Duration = Duration::from_secs(3);
/// Limit for responses that do not depend on the blocked request.
const SOON: Duration = Duration::from_secs(5);

/// Checks that requests for `next` on new connections are answered while one of four workers is blocked by a request for `hold`. `kept` is
/// the number of connections that are opened beforehand.
fn check_that_new_connections_do_not_wait(protocol: Protocol, hold: &str, next: &str, kept: usize) {
    let mut server = protocol.start("holds", &["--workers", "4", "--threads", "1"]);
    let bind = server.binds[0].clone();
    let ask = |stream: &mut UnixStream| assert_eq!(raw::ask(stream, &protocol.head("GET", next, 0)).0, 200);
    let kept: Vec<UnixStream> = (0..kept)
        .map(|_| {
            let mut stream = raw::connect(&bind);
            ask(&mut stream);
            stream
        })
        .collect();

    let gate = TcpListener::bind("127.0.0.1:0").unwrap();
    let target = format!("{hold}/{}", gate.local_addr().unwrap().port());
    let mut held = raw::connect(&bind);
    let request = protocol.head("GET", &target, 0);
    let held_up = std::thread::spawn(move || raw::ask(&mut held, &request).0);
    let gate = common::accepted(&gate, "the held request has begun");
    // The blocked worker leaves new connections to the other workers for a while, and then accepts those that are still waiting. On a busy
    // machine, it may accept a few connections. If it did not leave connections to the other workers, it would accept one in four.
    let (mut fresh, mut waiting) = (Vec::new(), Vec::new());
    for round in 0..80 {
        let mut stream = raw::connect(&bind);
        stream.write_all(&protocol.head("GET", next, 0)).unwrap();
        stream.set_read_timeout(Some(SOON)).unwrap();
        match stream.read(&mut [0]) {
            Ok(count) => assert!(count > 0, "the connection was closed without a response"),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                waiting.push(stream);
                assert!(waiting.len() <= 4, "{} of {} requests wait for the blocked worker", waiting.len(), round + 1);
                continue;
            }
            Err(error) => panic!("{error}"),
        }
        // The first 40 connections are closed; later connections stay open.
        if round >= 40 {
            fresh.push(stream);
        }
    }
    assert!(!held_up.is_finished(), "the worker was no longer blocked");
    drop((gate, fresh, kept));
    for mut stream in waiting {
        stream.set_read_timeout(Some(common::PATIENCE)).unwrap();
        assert_eq!(raw::ask(&mut stream, b"").0, 200);
    }
    assert_eq!(held_up.join().unwrap(), 200);
    server.stop();
}

#[test]
fn new_connections_do_not_wait_for_a_worker_with_a_blocked_thread() {
    for (protocol, kept) in KEPT.into_iter().flat_map(|protocol| [(protocol, 0), (protocol, 32)]) {
        check_that_new_connections_do_not_wait(protocol, "/hold", "/", kept);
    }
}

#[test]
fn new_connections_do_not_wait_for_a_worker_whose_event_loop_hangs() {
    for (protocol, kept) in KEPT.into_iter().flat_map(|protocol| [(protocol, 0), (protocol, 32)]) {
        for next in ["/", "/loop/"] {
            check_that_new_connections_do_not_wait(protocol, "/loop/hold", next, kept);
        }
    }
}

/// Returns the CPU time, in ticks, and the number of voluntary context switches of all threads of the workers.
fn usage(server: &Server) -> (u64, u64) {
    let tasks = server.workers().into_iter().flat_map(|worker| {
        let tasks = std::fs::read_dir(format!("/proc/{worker}/task")).unwrap();
        tasks.map(|task| task.unwrap().path())
    });
    // A thread may exit after it has been listed and before its files are read.
    let of_task = |task: std::path::PathBuf| {
        let status = std::fs::read_to_string(task.join("status")).ok()?;
        let waits = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:")).unwrap();
        let ticks: u64 =
            [14, 15].map(|number| common::field_of::<u64>(&task, number)).into_iter().sum::<Option<_>>()?;
        Some((ticks, waits.trim().parse::<u64>().unwrap()))
    };
    tasks.filter_map(of_task).fold((0, 0), |sum, task| (sum.0 + task.0, sum.1 + task.1))
}

fn get_ok(server: &Server) {
    let mut stream = raw::connect(&server.binds[0]);
    assert_eq!(raw::ask(&mut stream, &Protocol::FastCgi.head("GET", "/ok", 0)).0, 200);
}

/// Returns when the workers have been idle for three seconds.
fn wait_until_quiet(server: &Server) {
    wait_until("the workers are idle", || {
        let before = usage(server);
        std::thread::sleep(QUIET); // the test measures a period without events
        (usage(server) == before).then_some(())
    });
}

#[test]
fn idle_workers_sleep_and_a_connection_wakes_one_of_them() {
    let mut server = Protocol::FastCgi.start("crashy", &["--workers", "8"]);
    wait_until_quiet(&server);
    let kept: Vec<UnixStream> = (0..16).map(|_| raw::connect(&server.binds[0])).collect();
    get_ok(&server);
    drop(kept);
    wait_until_quiet(&server); // the workers sleep again after serving their requests

    let (_, before) = usage(&server);
    for _ in 0..400 {
        get_ok(&server);
    }
    let (_, after) = usage(&server);
    eprintln!("400 connections woke 8 workers {} times", after - before);
    // On a busy machine, a worker may sleep before it receives a request, its body, and the end of the connection. If each connection woke
    // all workers, the count would be at least eight times as high.
    assert!(after - before < 6 * 400, "400 connections woke 8 workers {} times", after - before);
    server.stop();
}

#[test]
fn connections_beyond_the_limit_wait_in_the_queue_and_are_served() {
    for protocol in raw::ALL {
        let mut server = protocol.start("crashy", &["--workers", "1", "--max-connections", "2"]);
        let bind = server.binds[0].clone();
        // Connections are accepted in order of arrival. None of these connections is idle, because part of a request has arrived on each.
        let first = [(); 2].map(|()| {
            let mut stream = raw::connect(&bind);
            stream.write_all(&protocol.head("GET", "/ok", 0)[..10]).unwrap();
            stream
        });
        let mut third = raw::connect(&bind);
        third.write_all(&protocol.head("GET", "/ok", 0)).unwrap();
        third.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
        server.wait_for("cannot accept waiting clients: no connection is idle (--max-connections) connections=2");
        let waits = third.read(&mut [0]).expect_err("there is no room for it");
        assert_eq!(waits.kind(), ErrorKind::WouldBlock, "{protocol:?}");
        drop(first);
        third.set_read_timeout(Some(common::PATIENCE)).unwrap();
        assert_eq!(raw::ask(&mut third, b"").0, 200, "{protocol:?}");
        drop(third);
        server.stop();
    }
}
