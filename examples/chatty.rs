//! An application that writes to standard output and standard error, to show how its output appears in the log.
//!
//! `cargo run --release --example chatty -- --access-log -`, then `curl http://127.0.0.1:8080/line/30`

use std::io::Write as _;
use std::process::ExitCode;

use axum::Router;
use axum::extract::Path;
use axum::routing::get;

fn main() -> ExitCode {
    forkyard::run(|_cx| {
        Router::new()
            .route("/ok", get(async || "ok\n"))
            .route("/line/{bytes}", get(async |Path(bytes): Path<usize>| say(&"x".repeat(bytes), 1)))
            .route("/again/{times}", get(async |Path(times): Path<u32>| say("the same", times)))
            .route("/flood/{lines}", get(flood))
            .route("/half", get(half))
            .route("/child", get(child))
            .route("/kill", get(kill))
    })
}

/// Writes the line `times` times to standard error.
fn say(line: &str, times: u32) -> String {
    let mut stderr = std::io::stderr().lock();
    let outcome = (0..times).try_for_each(|_| writeln!(stderr, "{line}"));
    format!("{outcome:?}\n")
}

/// Writes numbered lines to standard output.
async fn flood(Path(lines): Path<u32>) -> String {
    let mut stdout = std::io::stdout().lock();
    let outcome = (0..lines).try_for_each(|line| writeln!(stdout, "number {line}"));
    format!("{outcome:?}\n")
}

/// Runs a child process that prints a line.
async fn child() -> String {
    format!("{:?}\n", std::process::Command::new("echo").arg("from a child").status().map(|status| status.code()))
}

/// Aborts after writing half a line.
async fn half() -> &'static str {
    let _ = std::io::stderr().write_all(b"these are my last");
    std::process::abort()
}

/// Kills the worker with SIGKILL, as an operator might do.
async fn kill() -> &'static str {
    let _ = nix::sys::signal::raise(nix::sys::signal::Signal::SIGKILL);
    "it did not work\n"
}
