//! The application's hooks run in the documented order and in the documented process, however a worker terminates.

#![allow(clippy::unwrap_used, reason = "a failing test reports its location")]

mod common;

use std::collections::BTreeSet;
use std::process::Command;

use common::{Server, http, program, wait_until};
use nix::sys::signal::Signal;

const FLAGS: [&str; 6] = ["--bind", "http:127.0.0.1:0", "--workers", "1", "--drain-timeout", "20s"];

/// Returns the names of the hooks that were called, in order, with their generations.
fn called(server: &Server) -> Vec<String> {
    let log = server.log();
    let hooks = log.lines().filter_map(|line| line.split_once("hook: "));
    let named = hooks.map(|(_, hook)| {
        let mut words = hook.split(' ');
        let name = words.next().unwrap();
        format!("{name} {}", words.find(|word| word.starts_with("gen=")).unwrap())
    });
    named.collect()
}

/// Returns the number after `key=` in a line.
fn number(line: &str, key: &str) -> i32 {
    let value = line.split([' ', '"']).find_map(|word| word.strip_prefix(key)?.strip_prefix('='));
    value.unwrap_or_else(|| panic!("no {key} in {line}")).parse().unwrap()
}

const BIRTH: [&str; 4] = ["before_fork", "after_fork", "factory", "on_ready"];

fn of_generation(hooks: &[&str], generation: u32) -> Vec<String> {
    hooks.iter().map(|hook| format!("{hook} gen={generation}")).collect()
}

#[test]
fn hooks_are_called_in_order_over_a_crash_a_reload_and_a_stop() {
    let mut server = Server::start("hooks", &FLAGS);
    let mut expected = of_generation(&BIRTH, 1);
    assert_eq!(called(&server), expected);
    let master = server.pid().as_raw();
    let worker = *server.workers().first().unwrap();
    let by = |hook: &str| {
        let line = server.log().lines().find(|line| line.contains(&format!("hook: {hook}"))).unwrap().to_owned();
        number(&line, "in")
    };
    assert_eq!([by("before_fork"), by("after_fork"), by("on_ready")], [master, worker, worker]);

    assert_eq!(http::get(&server.http(), "/").unwrap().status, 200);
    assert_eq!(http::get(&server.http(), "/crash").unwrap().status, 502);
    let end = server.wait_for("hook: on_worker_exit");
    assert!(end.contains("signal: 6") && end.contains("asked=false"), "{end}");
    assert_eq!([number(&end, "pid"), number(&end, "in"), number(&end, "served")], [worker, master, 1]);
    server.wait_for("hook: on_ready");
    expected.extend(of_generation(&["on_worker_exit"], 1));
    expected.extend(of_generation(&BIRTH, 1));
    assert_eq!(called(&server), expected, "a worker that crashes neither drains nor exits gracefully");

    server.signal(Signal::SIGHUP);
    let end = server.wait_for("hook: on_worker_exit");
    assert!(end.contains("asked=true") && end.contains("exit status: 0"), "{end}");
    expected.extend(of_generation(&BIRTH, 2));
    expected.extend(of_generation(&["on_drain", "on_exit", "on_worker_exit"], 1));
    assert_eq!(called(&server), expected);
    assert!(server.log().contains("the application's on_exit failed: a panic: a hook that panics"));

    server.stop();
    expected.extend(of_generation(&["on_drain", "on_exit", "on_worker_exit"], 2));
    assert_eq!(called(&server), expected);
    assert!(server.log().contains("gen=2 within=20s"), "the value of --drain-timeout");
}

#[test]
fn a_hook_that_fails_or_panics_before_the_fork_delays_the_worker() {
    let directory = tempfile::tempdir().unwrap();
    let refuse = directory.path().join("refuse");
    std::fs::write(&refuse, "not yet").unwrap();
    let mut server = Server::launch(Command::new(program("hooks")).args(FLAGS).env("HOOKS_REFUSE", &refuse));
    let line = server.wait_for("cannot start a worker");
    assert!(line.contains("the application's before_fork failed: not yet"), "{line}");
    server.wait_for("next_try=100ms");
    std::fs::write(&refuse, "panic").unwrap();
    wait_until("the hook panics", || server.log().contains("before_fork failed: a panic: not now").then_some(()));
    server.has_only(&BTreeSet::new());
    std::fs::remove_file(&refuse).unwrap();
    server.wait_for("ready in ");
    assert_eq!(http::get(&server.http(), "/").unwrap().status, 200);
    server.stop();
}

#[test]
fn a_worker_whose_hook_fails_never_becomes_ready_and_a_reload_keeps_the_old_workers() {
    let directory = tempfile::tempdir().unwrap();
    let spoil = directory.path().join("spoil");
    let mut server = Server::start_command(Command::new(program("hooks")).args(FLAGS).env("HOOKS_SPOIL", &spoil));
    let old = server.workers();
    std::fs::write(&spoil, "").unwrap();
    server.signal(Signal::SIGHUP);
    let line = server.wait_for("reload failed: ");
    assert!(line.contains(" gen=2 ") && line.contains("the application's on_ready failed: it is spoilt"), "{line}");
    wait_until("the new worker is gone", || (server.children() == old).then_some(()));
    assert_eq!(http::get(&server.http(), "/").unwrap().status, 200);
    server.stop();
}
