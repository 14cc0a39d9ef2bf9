//! Reloads wait until workers are ready and healthy, replace a limited number of workers at a time, and report the reason for a failure.

#![allow(clippy::unwrap_used, reason = "a failing test reports its location")]

mod common;

use std::collections::BTreeSet;
use std::process::Command;

use common::http;
use common::{Server, program, wait_until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const HTTP: [&str; 2] = ["--bind", "http:127.0.0.1:0"];

#[test]
fn a_failed_reload_reports_the_reason_and_the_old_generation_stays_complete() {
    let directory = tempfile::tempdir().unwrap();
    let broken = directory.path().join("broken");
    let mut server = Server::start_command(
        Command::new(program("crashy")).args(HTTP).args(["--workers", "2"]).env("CRASHY_BROKEN", &broken),
    );
    let old = server.workers();
    std::fs::write(&broken, "").unwrap();
    server.signal(Signal::SIGHUP);
    let line = server.wait_for("reload failed: ");
    for words in [" gen=2 ", "slot=", "pid=", "said=", "broken on purpose"] {
        assert!(line.contains(words), "no {words:?} in {line:?}");
    }
    server.has_only(&old);

    // The application is repaired without a reload. If a worker dies in this state, it is replaced by a worker of the old generation.
    std::fs::remove_file(&broken).unwrap();
    let victim = *old.first().unwrap();
    kill(Pid::from_raw(victim), Signal::SIGKILL).unwrap();
    let line = server.wait_for("worker died");
    assert!(line.contains(&format!("pid={victim} gen=1")), "{line}");
    wait_until("the worker is replaced", || {
        let children = server.workers();
        (children.len() == 2 && !children.contains(&victim)).then_some(())
    });
    wait_until("the server answers", || http::get(&server.http(), "/ok").ok());
    server.signal(Signal::SIGHUP);
    server.wait_for("reload done gen=3");
    wait_until("all workers are new", || server.workers().is_disjoint(&old).then_some(()));
    let generations =
        server.log().lines().filter(|line| line.contains("worker exited")).map(str::to_owned).collect::<Vec<_>>();
    assert!(generations.iter().all(|line| line.contains("gen=1")), "{generations:?}");
    server.stop();
}

#[test]
fn a_worker_whose_application_is_unhealthy_never_becomes_ready() {
    let directory = tempfile::tempdir().unwrap();
    for (path, limit, said) in [
        ("/status/503", "30s", "status 503"),
        ("/panic", "30s", "status 500"),
        ("/break", "30s", "incomplete response"),
        ("/slow/600000", "3s", "no response within"),
    ] {
        let bind = format!("http:unix:{}", directory.path().join("a.sock").display());
        let mut server = Server::launch(Command::new(program("crashy")).args([
            "--bind",
            &bind,
            "--workers",
            "1",
            "--start-timeout",
            limit,
            "--health-path",
            path,
        ]));
        let line = server.wait_for("worker died");
        assert!(line.contains(&format!("GET {path} (--health-path)")) && line.contains(said), "{path}: {line}");
        // With the short limit, a busy machine may reach the limit before the first health check fails.
        let failures = if limit == "3s" { "" } else { "1 " };
        server.wait_for(&format!("workers die before they are ready (see the lines above) failures={failures}"));
        server.stop();
    }
    let mut server = Server::start("crashy", &[&HTTP[..], &["--workers", "2", "--health-path", "/ok"]].concat());
    assert_eq!(http::get(&server.http(), "/ok").unwrap().status, 200);
    server.stop();
}

#[test]
fn a_limited_number_of_workers_is_replaced_at_a_time_and_the_new_workers_start_first() {
    let mut server = Server::start("crashy", &[&HTTP[..], &["--workers", "4", "--max-unavailable", "50%"]].concat());
    let mut old = server.workers();
    for generation in 2..5 {
        server.signal(Signal::SIGHUP);
        let mut most = BTreeSet::new();
        wait_until("all workers are replaced", || {
            let children = server.workers();
            // Listing takes a while, and may miss a worker that starts while another worker exits. A count is therefore used only if two
            // lists agree.
            if children == server.workers() {
                most.insert(children.len());
            }
            (children.len() == 4 && children.is_disjoint(&old)).then_some(())
        });
        server.wait_for(&format!("reload done gen={generation}"));
        assert!(most.iter().all(|count| (4..=6).contains(count)), "4 workers, and at most 2 more: {most:?}");
        old = server.workers();
    }
    server.stop();
}
