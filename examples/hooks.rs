//! An application that logs a line in each hook.
//!
//! `cargo run --example hooks -- --bind http:127.0.0.1:8080 --workers 1`, then `/crash` kills a worker, and `/hang`
//! blocks a thread. While the file named by the variable `HOOKS_REFUSE` exists, no worker is forked. While the file
//! named by `HOOKS_SPOIL` exists, no worker becomes ready.

use std::path::Path;
use std::process::ExitCode;

use forkyard::Body;
use forkyard::http::{Request, Response};

fn main() -> ExitCode {
    forkyard::Builder::app(|cx| {
        log::info!("hook: factory slot={} gen={}", cx.slot(), cx.generation());
        forkyard::blocking(|request: Request<Body>| {
            if request.uri().path() == "/crash" {
                std::process::abort();
            }
            while request.uri().path() == "/hang" {
                std::thread::park();
            }
            Response::new("Hello, world\n")
        })
    })
    .version("7.8.9")
    .about("Shows when each hook runs")
    .before_fork(|worker| {
        log::info!("hook: before_fork slot={} gen={} in={}", worker.slot, worker.generation, std::process::id());
        match std::env::var("HOOKS_REFUSE").map(std::fs::read_to_string) {
            Ok(Ok(why)) if why == "panic" => panic!("not now"),
            Ok(Ok(why)) => Err(why.into()),
            Ok(Err(_)) | Err(_) => Ok(()),
        }
    })
    .after_fork(|worker| {
        log::info!("hook: after_fork slot={} gen={} in={}", worker.slot, worker.generation, std::process::id());
        Ok(())
    })
    .on_ready(|worker| {
        log::info!("hook: on_ready slot={} gen={} in={}", worker.slot, worker.generation, std::process::id());
        let is_spoilt = std::env::var("HOOKS_SPOIL").is_ok_and(|file| Path::new(&file).exists());
        if is_spoilt { Err("it is spoilt".into()) } else { Ok(()) }
    })
    .on_drain(|worker, within| {
        log::info!("hook: on_drain slot={} gen={} within={within:?}", worker.slot, worker.generation);
    })
    .on_exit(|worker| {
        log::info!("hook: on_exit slot={} gen={} in={}", worker.slot, worker.generation, std::process::id());
        panic!("a hook that panics does not change how the worker ends");
    })
    .on_worker_exit(|exit| {
        let (worker, pid) = (exit.worker, exit.pid);
        let (asked, served, status, by) = (exit.asked, exit.served, exit.status, std::process::id());
        log::info!(
            "hook: on_worker_exit slot={} gen={} pid={pid} asked={asked} served={served} {status} in={by}",
            worker.slot,
            worker.generation
        );
    })
    .run()
}
