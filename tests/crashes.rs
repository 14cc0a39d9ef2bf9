//! A crash report gives the location of the crash, and the process then terminates as it would without the report.

#![allow(clippy::unwrap_used, reason = "a failing test reports its location")]

mod common;

use common::http;
use common::{Server, wait_until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

fn crashy(arguments: &[&str]) -> Server {
    Server::start("crashy", &[&["--bind", "http:127.0.0.1:0", "--quarantine", "0"], arguments].concat())
}

/// Returns the value of `key="..."` in a line of the log.
fn quoted<'a>(line: &'a str, key: &str) -> &'a str {
    let start = format!(" {key}=\"");
    let rest = line.split_once(&start).unwrap_or_else(|| panic!("no {key} in {line:?}")).1;
    rest.split_once('"').unwrap().0
}

#[test]
fn the_death_record_locates_the_crash_and_a_line_lists_the_functions() {
    let mut server = crashy(&["--workers", "2"]);
    let address = server.http();
    for (path, signal, words, function) in [
        ("/segv", "SEGV", "SEGV in thread worker at address 0x8, instruction crashy+0x", "crashy.rs:"),
        ("/abort", "ABRT", "ABRT in thread worker, instruction ", "crashy::abort"),
        ("/thread/segv", "SEGV", "SEGV in thread blocking-0 at address 0x10, instruction crashy+0x", "in_a_thread"),
    ] {
        assert_eq!(http::get(&address, path).unwrap().status, 502, "{path} kills its worker");
        let line = server.wait_for("worker died");
        assert!(line.contains(&format!(" signal={signal} ")), "the worker dies of the original signal: {line}");
        assert_eq!(quoted(&line, "crashed_in"), format!("GET {path}"));
        assert!(quoted(&line, "said").contains(words), "{line}");
        let trace = quoted(&line, "trace");
        assert!(trace.split(' ').count() > 2 && trace.contains("crashy+0x"), "{line}");
        let names = server.wait_for("backtrace slot=");
        assert!(quoted(&names, "at").contains(function), "no {function} in {names}");
        wait_until("the server answers", || http::get(&address, "/ok").ok());
    }
    server.stop();
}

#[test]
fn a_stack_overflow_is_reported_by_forkyard_and_by_the_standard_library() {
    let mut server = crashy(&["--workers", "1"]);
    assert_eq!(http::get(&server.http(), "/overflow").unwrap().status, 502);
    server.wait_for("thread 'worker'");
    let line = server.wait_for("worker died");
    assert!(line.contains(" signal=ABRT "), "as the standard library has it: {line}");
    assert_eq!(quoted(&line, "crashed_in"), "GET /overflow");
    let said = quoted(&line, "said");
    assert!(said.starts_with("SEGV in thread worker at address 0x") && said.ends_with("(stack overflow)"), "{line}");
    assert!(server.log().contains("has overflowed its stack"));
    // The name may include a path, depending on how the compiler has divided the code.
    let names = server.wait_for("backtrace slot=");
    let first = quoted(&names, "at").split(' ').next().unwrap();
    assert!(first == "recurse" || first.ends_with("::recurse"), "{names}");
    server.stop();
}

#[test]
fn a_signal_from_another_process_is_reported_and_implicates_no_request() {
    let mut server = crashy(&["--workers", "1"]);
    for signal in [Signal::SIGBUS, Signal::SIGFPE, Signal::SIGILL, Signal::SIGSYS] {
        // Wait until the process that symbolizes backtraces has exited.
        let alone = || Some(server.workers()).filter(|children| children.len() == 1);
        let worker = wait_until("there is a worker", || alone()?.first().copied());
        wait_until("the server answers", || http::get(&server.http(), "/ok").ok());
        kill(Pid::from_raw(worker), signal).unwrap();
        let line = server.wait_for("worker died");
        let name = signal.as_str().trim_start_matches("SIG");
        assert!(line.contains(&format!(" signal={name} ")), "{line}");
        assert!(quoted(&line, "said").starts_with(&format!("{name} in thread ")), "{line}");
        assert!(!line.contains("crashed_in"), "{line}");
        server.wait_for("backtrace slot=");
    }
    server.stop();
}
