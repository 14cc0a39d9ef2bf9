//! Tests the test harness: a test that hangs is killed, and its state is printed.

#![allow(clippy::unwrap_used, reason = "a failing test reports its location")]

mod common;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

use common::limit::InTime as _;
use common::{Server, StopOnDrop, is_gone, wait_until};

/// Executed only by the test below. That test sets a time limit.
#[test]
#[ignore = "it hangs"]
fn this_one_hangs() {
    let server = Server::start("hello", &["--bind", "http:127.0.0.1:0", "--workers", "2"]);
    println!("captured, and never shown: {}", server.pid());
    loop {
        std::thread::park();
    }
}

#[test]
fn a_binary_at_its_limit_fails_prints_its_servers_and_kills_them() {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "this_one_hangs"])
        .env("FORKYARD_TEST_LIMIT", "5")
        .output_in_time()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("has reached its limit of 5 s"), "{said}");
    let threads = said.split("--- its processes:").next().unwrap();
    assert!(threads.contains(" this_one_hangs "), "the hung test: {said}");
    let server = said.split("--- the server pid=").nth(1).unwrap_or_else(|| panic!("no server: {said}"));
    assert!(server.contains(" of the test this_one_hangs: ") && server.contains("/hello"), "{said}");
    assert!(server.contains("slot 1: ") && server.contains("ready in "), "the server's workers and log: {said}");
    let master: i32 = server.split(' ').next().unwrap().parse().unwrap();
    let processes = said.split("--- its processes:").nth(1).unwrap().split("---").next().unwrap();
    let pids: Vec<i32> = processes.lines().filter_map(|line| line.trim().split(' ').next()?.parse().ok()).collect();
    assert!(pids.contains(&master) && pids.len() >= 3, "{said}");
    wait_until("all processes that the binary started are gone", || pids.iter().all(|pid| is_gone(*pid)).then_some(()));
}

#[test]
fn a_panic_stops_the_threads_of_its_scope() {
    let stop = AtomicBool::new(false);
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        std::thread::scope(|scope| {
            scope.spawn(|| wait_until("the thread is asked to stop", || stop.load(Ordering::SeqCst).then_some(())));
            let _stops = StopOnDrop(&stop);
            panic!("on purpose");
        });
    }));
    assert_eq!(outcome.unwrap_err().downcast_ref::<&str>(), Some(&"on purpose"));
}
