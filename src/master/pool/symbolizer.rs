//! Logs the function names for the addresses of a crash. A child process looks the names up, because the master must
//! not read debug information.
//!
//! At most one such child runs at a time. A few crashes wait for the next child; for further crashes only the addresses are logged.

use std::collections::VecDeque;

use nix::sys::signal::Signal;
use nix::unistd::Pid;

use crate::diagnostics::code_address::{self, Modules};
use crate::master::signals::SignalInbox;
use crate::{logging, sys};

/// Maximum number of functions that are named.
const NAMED: usize = 24;
/// Time limit for the child. Reading files with much debug information takes a while, but less than this.
const TIMEOUT_SECONDS: u32 = 30;
/// Maximum number of crashes that wait.
const WAITING: usize = 4;

#[derive(Debug, Default)]
pub(crate) struct Symbolizer {
    child: Option<Pid>,
    waiting: VecDeque<Crash>,
}

#[derive(Debug)]
struct Crash {
    slot: u32,
    pid: Pid,
    trace: String,
}

impl Symbolizer {
    /// Logs the function names for a dead worker's last instructions. The worker's trace is untrusted: it is only
    /// parsed as addresses to look up.
    pub(crate) fn log(&mut self, slot: u32, pid: Pid, trace: String, signals: &SignalInbox) {
        if self.waiting.len() < WAITING {
            self.waiting.push_back(Crash { slot, pid, trace });
        }
        self.start(signals);
    }

    fn start(&mut self, signals: &SignalInbox) {
        if self.child.is_some() {
            return;
        }
        let Some(Crash { slot, pid, trace }) = self.waiting.pop_front() else { return };
        let child = sys::fork(|| {
            signals.leave();
            sys::close_all_except(&[0, 1, 2, logging::descriptor()]);
            if nix::sys::prctl::set_pdeathsig(Signal::SIGKILL).is_err() {
                return 1;
            }
            nix::unistd::alarm::set(TIMEOUT_SECONDS);
            sys::unblock_signals();
            let own = Modules::own();
            let addresses = trace.split(' ').filter_map(|text| own.read(text));
            let mut names = code_address::names_of(addresses);
            names.truncate(NAMED);
            log::warn!(slot, pid = pid.as_raw(), at = names.join(" < "); "backtrace");
            0
        });
        match child {
            Ok(child) => self.child = Some(child),
            Err(error) => log::error!("cannot symbolize a backtrace: {error}"),
        }
    }

    pub(in crate::master) fn has(&self, pid: Pid) -> bool {
        self.child == Some(pid)
    }

    /// Handles the exit of the child: a new child is started for the next crash.
    pub(in crate::master) fn ended(&mut self, signals: &SignalInbox) {
        self.child = None;
        self.start(signals);
    }
}
