//! Workers that reach a recycling limit are replaced without affecting clients.

#![allow(clippy::unwrap_used, reason = "a failing test reports its location")]

mod common;

use std::process::Command;

use common::http;
use common::limit::InTime as _;
use common::{Server, is_gone, program, wait_until};

const HTTP: [&str; 2] = ["--bind", "http:127.0.0.1:0"];

fn crashy(arguments: &[&str]) -> Server {
    Server::start("crashy", &[&HTTP, arguments].concat())
}

#[test]
fn a_worker_is_replaced_after_its_number_of_requests() {
    let mut server = crashy(&["--workers", "2", "--max-requests", "20~10"]);
    let old = server.workers();
    let mut asked = 0;
    wait_until("all workers are replaced", || {
        assert_eq!(http::get(&server.http(), "/ok").unwrap().status, 200);
        asked += 1;
        old.iter().all(|&pid| is_gone(pid)).then_some(())
    });
    assert!(asked >= 40, "each worker has served its 20 requests: {asked}");
    let line = server.wait_for("worker will be replaced");
    assert!(line.contains("reason=max-requests") && line.contains("slot="), "{line}");
    assert!(!server.log().contains("worker died"), "{}", server.log());
    server.stop();
}

#[test]
fn a_worker_that_grows_is_replaced() {
    let mut server = crashy(&["--workers", "2", "--max-memory", "100M", "--memory-interval", "100ms"]);
    let old = server.workers();
    assert_eq!(http::get(&server.http(), "/leak/200").unwrap().status, 200);
    let line = server.wait_for("worker will be replaced");
    assert!(line.contains("reason=max-memory memory="), "{line}");
    wait_until("one worker is replaced", || {
        let children = server.workers();
        (children.len() == 2 && children != old).then_some(())
    });
    assert_eq!(server.workers().intersection(&old).count(), 1, "the other worker has not grown");
    server.stop();
}

#[test]
fn a_worker_and_a_program_are_replaced_at_the_maximum_age() {
    let mut server = crashy(&["--workers", "2", "--max-age", "500ms~200ms"]);
    let old = server.workers();
    assert!(server.wait_for("worker will be replaced").contains("reason=max-age"));
    server.renewed(old.len(), &old);
    server.stop();

    let directory = tempfile::tempdir().unwrap();
    let bind = format!("fastcgi:unix:{}", directory.path().join("a.sock").display());
    let mut server = Server::start_command(Command::new(program("forkyard")).args([
        "run",
        "--direct",
        "--bind",
        &bind,
        "--workers",
        "2",
        "--settle",
        "10ms",
        "--max-age",
        "500ms",
        "--",
        "sleep",
        "600",
    ]));
    let old = server.workers();
    assert!(server.wait_for("worker will be replaced").contains("reason=max-age"));
    server.renewed(old.len(), &old);
    server.stop();
}

#[test]
fn settings_that_cannot_work_for_a_program_are_rejected_with_the_reason() {
    for (flag, value, reason) in [
        ("--max-requests", "100", "only the program itself can count"),
        ("--health-path", "/health", "a request cannot be sent to a particular one"),
    ] {
        let command = ["run", "--direct", "--bind", "fastcgi:unix:/nowhere/a.sock", flag, value, "--", "sleep", "600"];
        let output = Command::new(program("forkyard")).args(command).output_in_time().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(said.contains(reason), "{said}");
    }
}
