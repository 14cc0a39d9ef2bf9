//! Programs that finish their requests on a different signal than SIGTERM (`--stop-signal`).

#![allow(clippy::unwrap_used, reason = "a failing test reports its location")]

mod common;

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use common::gateway::{self, scaled};
use common::limit::InTime as _;
use common::{Server, StopOnDrop, program, run, wait_until};
use nix::sys::signal::Signal;

/// It serves each connection in a thread, finishes its requests on SIGUSR1, and dies at once on SIGTERM.
const PROGRAM: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/programs/ready.py");
const CLIENTS: usize = 4;

/// Runs clients while `operator` does its work. Each call of `ask` must succeed.
fn under_load(ask: impl Fn() -> Result<(), String> + Sync, operator: impl FnOnce(&dyn Fn(u64))) {
    let (stop, answered, failures) = (AtomicBool::new(false), AtomicU64::new(0), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..CLIENTS {
            scope.spawn(|| {
                while !stop.load(Ordering::SeqCst) {
                    match ask() {
                        Ok(()) => _ = answered.fetch_add(1, Ordering::SeqCst),
                        Err(failure) => failures.lock().unwrap().push(failure),
                    }
                }
            });
        }
        let _clients_end = StopOnDrop(&stop);
        operator(&|count| {
            let enough = answered.load(Ordering::SeqCst) + count;
            wait_until("requests are answered", || {
                (answered.load(Ordering::SeqCst) >= enough || !failures.lock().unwrap().is_empty()).then_some(())
            });
        });
    });
    let failures = failures.into_inner().unwrap();
    assert!(failures.is_empty(), "{} failed: {:?}", failures.len(), failures.first());
}

fn reload_repeatedly(control: &str, await_answers: &dyn Fn(u64)) {
    for _ in 0..scaled(5).min(5) {
        let mut command = std::process::Command::new(program("forkyard"));
        let output = command.args(["reload", "--control", control]).output_in_time().unwrap();
        assert!(output.status.success(), "{output:?}");
        await_answers(20);
    }
}

fn expect_stop_signal(server: &Server) {
    let log = server.log();
    assert!(log.contains("received USR1") && !log.contains("died") && !log.contains("killed"), "{log}");
}

#[test]
fn no_request_is_lost_while_programs_are_reloaded_without_gateways() {
    let place = run::Place::new();
    let (control, directory) = (place.path("control"), place.path(""));
    let (control, directory) = (control.to_string_lossy(), directory.to_string_lossy());
    let options = ["--control", &control, "--stop-signal", "USR1", "--ready-by", "descriptor", "--settle", "50ms"];
    let command = ["python3", PROGRAM, "fastcgi", &directory];
    let mut server = Server::start_command(&mut place.run(&options, &command));
    let ask = || place.ask("/slow", b"").map(drop).map_err(|error| error.to_string());
    under_load(ask, |await_answers| reload_repeatedly(&control, await_answers));
    server.stop();
    expect_stop_signal(&server);
}

#[test]
fn no_request_is_lost_while_app_processes_are_reloaded_scaled_and_recycled() {
    let place = gateway::Place::new();
    let (control, directory) = (place.text("control"), place.text(""));
    let options = ["--backend", "http", "--app-concurrency", "4", "--stop-signal", "SIGUSR1", "--settle", "50ms"];
    let options = [&options[..], &["--max-requests", "50"]].concat();
    let mut command = place.run(&options, &["python3", PROGRAM, "http", &directory]);
    let mut site = place.start(&mut command);
    let ask = || {
        let response = common::http::get(&site.server.http(), "/slow").map_err(|error| error.to_string())?;
        if response.status == 200 { Ok(()) } else { Err(format!("{response:?}")) }
    };
    under_load(ask, |await_answers| {
        reload_repeatedly(&control, await_answers);
        for count in ["3", "1"] {
            let output = site.control(&["scale", count]);
            assert!(output.status.success(), "{output:?}");
            await_answers(100);
        }
    });
    site.server.stop();
    expect_stop_signal(&site.server);
    assert!(site.server.log().contains("reason=max-requests"), "{}", site.server.log());
}

/// WINCH is ignored by default, and INT terminates the process: that is a normal end after the master has sent it.
#[test]
fn the_end_by_the_stop_signal_is_normal_and_a_process_that_ignores_it_is_killed() {
    for (signal, is_killed) in [("INT", false), ("WINCH", true)] {
        for mode in [&["--direct"][..], &[]] {
            let directory = tempfile::tempdir().unwrap();
            let bind = format!("fastcgi:unix:{}", directory.path().join("app.sock").display());
            let control = directory.path().join("control").to_string_lossy().into_owned();
            let mut command = std::process::Command::new(program("forkyard"));
            command.args(["run", "--bind", &bind, "--workers", "1", "--control", &control, "--settle", "0"]);
            command.args(["--stop-signal", signal, "--drain-timeout", "1s"]).args(mode);
            let mut server = Server::start_command(command.arg("--").arg(program("faulty")));
            server.signal(Signal::SIGHUP);
            server.wait_for("reload done");
            let what = if mode.is_empty() { "] app process exited" } else { "] worker exited" };
            let end = server.wait_for(what);
            assert!(end.contains(if is_killed { "signal=KILL" } else { "signal=INT" }), "{signal} {mode:?}: {end}");
            server.signal(Signal::SIGINT);
            assert_eq!(server.wait_end(), Some(0));
        }
    }
}
