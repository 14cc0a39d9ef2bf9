//! Logs each slow request once, with a backtrace of its thread.
//!
//! This code runs on the worker's first thread, which is otherwise idle, and only with `--slow-request`. It must not
//! use the event loop, which may itself be slow.

use std::collections::HashSet;
use std::thread::ScopedJoinHandle;
use std::time::Duration;

use forkyard_shm::Scoreboard;
use log::kv::Value;

use crate::config::in_ms;
use crate::diagnostics::{code_address, current_request, stack_sampler};

/// Minimum and maximum interval between two checks.
const PERIOD: (Duration, Duration) = (Duration::from_millis(10), Duration::from_secs(1));
/// Maximum number of functions in a logged backtrace.
const NAMED: usize = 24;

/// Checks for requests older than `age` until the worker's thread ends.
pub(crate) fn watch(worker: &ScopedJoinHandle<'_, u8>, scoreboard: &Scoreboard, slot: u32, age: Duration) {
    if let Err(error) = stack_sampler::install() {
        log::error!("cannot add backtraces to the log lines of slow requests: {error} (--slow-request)");
    }
    let period = (age / 4).clamp(PERIOD.0, PERIOD.1);
    // The requests that have been logged, by cell and begin time.
    let mut logged: HashSet<(usize, u64)> = HashSet::new();
    while !worker.is_finished() {
        std::thread::park_timeout(period);
        let row = scoreboard.read(slot).filter(|row| row.pid == std::process::id());
        let slow = row.map(|row| row.serving).unwrap_or_default();
        let slow: Vec<_> = slow.into_iter().filter(|request| request.since >= age).collect();
        logged.retain(|&(cell, begun)| slow.iter().any(|request| (request.cell, request.begun_ms) == (cell, begun)));
        for request in slow {
            if logged.insert((request.cell, request.begun_ms)) {
                // If no thread is running the request, it is waiting for a free thread, or in its future.
                let thread = current_request::thread_of(request.cell);
                log::warn!(
                    request = request.what, since = in_ms(request.since), slot,
                    thread = thread.map_or(Value::from("none"), Value::from),
                    at = thread.map(backtrace_of);
                    "slow request (--slow-request)"
                );
            }
        }
    }
}

fn backtrace_of(thread: i32) -> String {
    let mut names = code_address::names_of(stack_sampler::of(thread).into_iter());
    names.truncate(NAMED);
    names.join(" < ")
}
