//! The number of workers follows demand between two limits, and drops to zero while there are no requests.

#![allow(clippy::unwrap_used, reason = "a failing test reports its location")]

mod common;

use std::collections::BTreeSet;
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

use common::{Server, StopOnDrop, program, wait_until};
use common::{fastcgi, http, scgi};
use nix::sys::signal::Signal;

const HTTP: [&str; 2] = ["--bind", "http:127.0.0.1:0"];

fn crashy(arguments: &[&str]) -> Server {
    Server::start("crashy", &[&HTTP, arguments].concat())
}

fn has(server: &Server, count: usize) -> BTreeSet<i32> {
    wait_until("the number of workers is reached", || Some(server.workers()).filter(|children| children.len() == count))
}

#[test]
fn slow_requests_start_workers_and_idle_time_stops_them() {
    let mut server = crashy(&["--workers", "1..4", "--scale-down-after", "1s"]);
    has(&server, 1);
    let (address, stop) = (server.http(), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let _clients_end = StopOnDrop(&stop);
        for _ in 0..6 {
            let (address, stop) = (&address, &stop);
            scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    assert_eq!(http::get(address, "/slow/200").unwrap().status, 200);
                }
            });
        }
        server.wait_for("scaled workers=2 from=1");
        server.wait_for("scaled workers=4");
        has(&server, 4);
    });
    for workers in [3, 2, 1] {
        server.wait_for(&format!("scaled workers={workers}"));
    }
    has(&server, 1);
    assert_eq!(http::get(&address, "/ok").unwrap().status, 200);
    server.stop();
}

#[test]
fn no_worker_runs_until_the_first_request() {
    let mut server = crashy(&["--workers", "0..2", "--scale-down-after", "500ms"]);
    server.has_only(&BTreeSet::new());
    for _ in 0..3 {
        assert_eq!(http::get(&server.http(), "/ok").unwrap().text(), "ok\n");
        has(&server, 0);
    }
    server.signal(Signal::SIGTTIN);
    server.wait_for("workers=1");
    has(&server, 1);
    assert!(!server.log().contains("worker died"));
    server.stop();
}

#[test]
fn the_last_worker_stays_while_it_has_connections() {
    let binds = ["--bind", "fastcgi:127.0.0.1:0", "--bind", "scgi:127.0.0.1:0"];
    let scale = ["--workers", "0..2", "--scale-down-after", "100ms"];
    let (mut server, mut other) = (crashy(&[&binds[..], &scale].concat()), crashy(&scale));
    let mut http = http::Client::connect(&server.http()).unwrap();
    let mut fastcgi = fastcgi::Client::connect(&server.binds[1]).unwrap();
    let fresh = scgi::Client::connect(&server.binds[2]).unwrap();
    assert_eq!(http.request("GET", "/ok", b"").unwrap().status, 200);
    assert_eq!(fastcgi.request("GET", "/ok", b"").unwrap().status(), 200);
    // If no client were connected, the last worker would exit during this loop.
    for _ in 0..4 {
        assert_eq!(http::get(&other.http(), "/ok").unwrap().status, 200);
        other.wait_for("scaled workers=0");
        has(&other, 0);
    }
    assert!(!server.log().contains("scaled workers=0"), "{}", server.log());
    assert_eq!(http.request("GET", "/ok", b"").unwrap().status, 200);
    assert_eq!(fastcgi.request("GET", "/ok", b"").unwrap().status(), 200);
    assert_eq!(fresh.request("GET", "/ok", b"").unwrap().status(), 200);
    drop((http, fastcgi));
    has(&server, 0);
    other.stop();
    server.stop();
}

#[test]
fn programs_are_scaled_by_the_demand_for_connections() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("a.sock");
    let bind = format!("fastcgi:unix:{}", socket.display());
    // The program accepts nothing and has no connection, so the demand appears in the kernel's accept queue.
    let mut server = Server::start_command(Command::new(program("forkyard")).args([
        "run",
        "--direct",
        "--bind",
        &bind,
        "--workers",
        "1..3",
        "--settle",
        "10ms",
        "--scale-down-after",
        "500ms",
        "--",
        "sleep",
        "600",
    ]));
    has(&server, 1);
    let waiting: Vec<UnixStream> = (0..2).map(|_| common::connect_unix(&socket).unwrap()).collect();
    assert!(server.wait_for("scaled workers=2 from=1").contains("in_flight=0 waiting="));
    has(&server, 3);
    drop(waiting);
    server.stop();
}
