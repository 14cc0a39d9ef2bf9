//! Asks a process that serves one connection at a time to exit, at a moment when the process serves no request.
//!
//! In the middle of a request, the stop signal (SIGTERM, or `--stop-signal`) terminates a process that does not handle it.
//! A program that uses libfcgi 2.4 handles SIGTERM, but drops a connection that it has accepted and not yet read from. A
//! process that `/proc` shows to be idle may accept a connection before the signal arrives. Therefore the process is stopped first, and examined a second
//! time while it is stopped:
//!
//! ```text
//! found idle ─▶ SIGSTOP ─▶ all threads have stopped ─┬─▶ no new connection: stop signal
//!                 ▲                                  └─▶ has accepted one: SIGCONT ─┐
//!                 └──────────────── found idle again ◀──────────────────────────────┘
//! ```
//!
//! The master does not wait for the process to stop, which usually takes less than a millisecond. Connections that
//! arrive in this time stay in the queue of the listening socket, where another process can accept them.

use std::time::Duration;

use nix::sys::signal::{Signal, kill};

use super::supervisor::Uptime;
use crate::master::procfs::{self, Idle, Process};
use crate::net::listen::Listener;

/// Time between two checks whether a process has stopped.
const POLL_INTERVAL: Duration = Duration::from_millis(1);
/// How long a process may take to stop. A thread that waits for a disk does not stop until the disk has answered.
const STOP_TIMEOUT: Duration = Duration::from_millis(200);

/// A process that was found idle and was sent SIGSTOP.
#[derive(Debug)]
struct Stopping {
    process: Process,
    idle: Idle,
    give_up_at: Uptime,
    signal: Signal,
}

/// The processes that were found idle and were sent SIGSTOP.
#[derive(Debug, Default)]
pub(in crate::master) struct IdleStop(Vec<Stopping>);

impl IdleStop {
    /// Begins to terminate the process if it serves no request now. Otherwise, or if the process accepts a connection
    /// before it has stopped, nothing happens, and the caller tries again later.
    pub(in crate::master) fn attempt(&mut self, process: Process, signal: Signal, listener: &Listener, now: Uptime) {
        if self.0.iter().any(|stopping| stopping.process == process) {
            return;
        }
        let Some(idle) = Idle::of(process.pid(), listener) else { return };
        if process.lives() && kill(process.pid(), Signal::SIGSTOP).is_ok() {
            self.0.push(Stopping { process, idle, give_up_at: now + STOP_TIMEOUT, signal });
        }
    }

    /// Examines the processes that have stopped by now. Returns those that were asked to exit.
    pub(in crate::master) fn advance(&mut self, listener: &Listener, now: Uptime) -> Vec<Process> {
        let mut terminated = Vec::new();
        self.0.retain(|Stopping { process, idle, give_up_at, signal }| {
            let pid = process.pid();
            if !process.lives() {
                return false;
            }
            let has_stopped = procfs::has_stopped(pid);
            if !has_stopped && now < *give_up_at {
                return true;
            }
            if has_stopped && idle.has_lasted(pid, listener) && kill(pid, *signal).is_ok() {
                terminated.push(*process);
            }
            let _ = kill(pid, Signal::SIGCONT); // it may just have exited
            false
        });
        terminated
    }

    /// Lets all processes continue, because another master takes over.
    pub(in crate::master) fn resume_all(&self) {
        for Stopping { process, .. } in self.0.iter().filter(|stopping| stopping.process.lives()) {
            let _ = kill(process.pid(), Signal::SIGCONT); // it may just have exited
        }
    }

    pub(in crate::master) fn next_deadline(&self, now: Uptime) -> Option<Uptime> {
        (!self.0.is_empty()).then_some(now + POLL_INTERVAL)
    }
}
