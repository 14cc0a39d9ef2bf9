//! No request fails while workers are replaced. When a worker is killed, only the requests that it was serving fail.
//!
//! Each test sends about 100,000 requests. `scripts/soak` sets a different number (`FORKYARD_SOAK`), and `scripts/repeat` sets a percentage
//! of the number (`FORKYARD_SCALE`).

#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a failing test reports its location")]

mod common;

use std::sync::atomic::Ordering;

use common::load::Load;
use common::{Server, is_gone, wait_until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Returns the minimum number of requests in each test.
fn requests() -> u64 {
    let number = |name: &str| {
        std::env::var(name).ok().map(|text| text.parse::<u64>().unwrap_or_else(|_| panic!("{name} is not a number")))
    };
    number("FORKYARD_SOAK").unwrap_or_else(|| 1000 * number("FORKYARD_SCALE").unwrap_or(100))
}

/// Starts a server for the load, and creates the directory of its sockets.
fn server(arguments: &[&str]) -> (Server, tempfile::TempDir) {
    let directory = tempfile::tempdir().unwrap();
    let binds = Load::binds(directory.path());
    let binds: Vec<&str> = binds.iter().map(String::as_str).collect();
    (Server::start("crashy", &[&binds, arguments].concat()), directory)
}

/// Repeats `act`, at least three times, until enough requests have been sent. Returns the number of calls.
fn again(load: &Load, mut act: impl FnMut()) -> u64 {
    let mut times = 0;
    while (load.total() < requests() || times < 3) && !load.has_failed() {
        act();
        times += 1;
    }
    times
}

/// Replaces all workers repeatedly with `signal`. The master logs `lines` for each replacement; the last one marks its completion.
fn replaced_by(signal: Signal, lines: &[&str]) {
    let (mut server, _directory) = server(&["--workers", "2"]);
    let load = Load::default();
    let mut times = 0;
    load.run(&mut server, |server| {
        let mut generation = 1;
        times = again(&load, || {
            generation += 1;
            server.signal(signal);
            for line in lines {
                server.wait_for(line);
            }
            server.wait_for(&format!("reload done gen={generation}"));
        });
    });
    eprintln!("{times} times");
    server.stop();
}

#[test]
fn reloads() {
    replaced_by(Signal::SIGHUP, &[]);
}

#[test]
fn upgrades() {
    replaced_by(Signal::SIGUSR2, &["upgraded version="]);
}

#[test]
fn recycling() {
    let (mut server, _directory) = server(&["--workers", "4", "--max-requests", "500~100", "--respawn-rate", "1000"]);
    let load = Load::default();
    let first = server.workers();
    load.run(&mut server, |server| {
        again(&load, || {
            let some = load.total() + 100;
            wait_until("requests are answered", || (load.total() >= some || load.has_failed()).then_some(()));
        });
        wait_until("all workers are recycled", || {
            (server.workers().is_disjoint(&first) || load.has_failed()).then_some(())
        });
    });
    let recycled = server.log().matches("worker exited").count();
    eprintln!("{recycled} workers were recycled");
    assert!(recycled as u64 >= requests() / 2000, "{recycled}");
    server.stop();
}

#[test]
fn scaling() {
    let (mut server, _directory) = server(&["--workers", "1"]);
    let load = Load::default();
    load.run(&mut server, |server| {
        again(&load, || {
            for signal in [[Signal::SIGTTIN; 7], [Signal::SIGTTOU; 7]].concat() {
                server.signal(signal);
                server.wait_for("workers=");
            }
        });
    });
    server.stop();
}

#[test]
fn kills() {
    let (mut server, _directory) = server(&["--workers", "2", "--respawn-rate", "1000"]);
    let kills = (requests() / 1000).max(100);
    let load = Load::default();
    load.run(&mut server, |server| {
        let mut random = fastrand::Rng::with_seed(7);
        for _ in 0..kills {
            let before = load.good.load(Ordering::SeqCst);
            let enough = before + random.u64(1..2000);
            wait_until("requests are answered", || {
                (load.good.load(Ordering::SeqCst) > enough || load.has_failed()).then_some(())
            });
            load.kills();
            // The worker may have exited since it was listed. A worker that has exited is not killed.
            let victim = wait_until("there is a worker to kill", || {
                let victim = *server.workers().iter().nth(random.usize(..2))?;
                kill(Pid::from_raw(victim), Signal::SIGKILL).ok().map(|()| victim)
            });
            wait_until("the worker is replaced", || (is_gone(victim) && server.workers().len() == 2).then_some(()));
            if load.has_failed() {
                break;
            }
        }
    });
    let mut late = load.answers_after_kill.lock().unwrap().clone();
    late.sort_unstable();
    assert!(late.len() as u64 >= kills / 10, "some kills interrupt requests: {}", late.len());
    eprintln!(
        "{kills} kills, {} requests in flight: 502 after {:?} (median), {:?} (slowest)",
        late.len(),
        late[late.len() / 2],
        late[late.len() - 1]
    );
    server.stop();
}
