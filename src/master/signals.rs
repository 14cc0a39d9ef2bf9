//! Makes the master's signals readable: a flag for each signal, and one socket that the loop's `poll` watches.
//!
//! The inbox is opened at the very beginning of startup. Signals that arrive before the loop runs are kept, each signal
//! once. SIGTERM, SIGINT and SIGQUIT abort startup; during `preload` they abort it immediately (see `abort.rs`).
//!
//! A forked child inherits the handlers and the socket. It must call [`SignalInbox::leave`] before it unblocks signals:
//! otherwise a signal to the child would wake the master instead of terminating the child.

use std::io::{self, Read as _};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use signal_hook::consts::signal::{SIGCHLD, SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGTTIN, SIGTTOU, SIGUSR1, SIGUSR2};
use signal_hook::{SigId, flag, low_level};

use super::pool::supervisor::Command;
use crate::sys;

/// The meaning of a signal for the master.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Meaning {
    /// A child has exited and must be reaped.
    Child,
    Command(Command),
    /// The log files were moved away and must be reopened.
    ReopenLogs,
}

const MEANINGS: [(i32, Meaning); 9] = [
    (SIGCHLD, Meaning::Child),
    (SIGTERM, Meaning::Command(Command::Drain)),
    (SIGINT, Meaning::Command(Command::Halt)),
    (SIGQUIT, Meaning::Command(Command::Halt)),
    (SIGHUP, Meaning::Command(Command::Reload)),
    (SIGTTIN, Meaning::Command(Command::Add)),
    (SIGTTOU, Meaning::Command(Command::Remove)),
    (SIGUSR1, Meaning::ReopenLogs),
    (SIGUSR2, Meaning::Command(Command::Upgrade)),
];

/// Collects signals.
#[derive(Debug)]
pub(crate) struct SignalInbox {
    socket: UnixStream,
    flags: [Arc<AtomicBool>; MEANINGS.len()],
    registered: Vec<SigId>,
}

impl SignalInbox {
    /// Installs handlers for all signals that the master uses.
    ///
    /// # Errors
    /// Fails if no socket pair is available.
    pub(crate) fn open() -> io::Result<Self> {
        let (socket, wake) = UnixStream::pair()?;
        socket.set_nonblocking(true)?;
        let mut inbox = Self { socket, flags: Default::default(), registered: Vec::new() };
        // If signals were not blocked, a signal between two registrations would run only some of its actions, and would
        // be lost.
        let mask = sys::block_signals();
        let registered = inbox.register(&wake);
        sys::restore_signals(&mask);
        registered.map(|()| inbox)
    }

    fn register(&mut self, wake: &UnixStream) -> io::Result<()> {
        for signal in [SIGTERM, SIGINT, SIGQUIT] {
            self.registered.push(crate::startup::abort_signal::abort_start_on(signal)?);
        }
        for ((signal, _), flag) in MEANINGS.iter().zip(&self.flags) {
            // The flag is registered before the socket, because the flag must be set when the socket wakes the loop.
            self.registered.push(flag::register(*signal, Arc::clone(flag))?);
            self.registered.push(low_level::pipe::register(*signal, wake.try_clone()?)?);
        }
        Ok(())
    }

    /// Whether a signal that stops the server has arrived and was not taken. Must be called with signals blocked. Pending signals are
    /// delivered during the call.
    pub(crate) fn asks_for_end(&self) -> bool {
        sys::unblock_signals();
        sys::block_signals();
        let ends = |meaning| matches!(meaning, Meaning::Command(Command::Drain | Command::Halt));
        let mut flags = MEANINGS.iter().zip(&self.flags).filter(|((_, meaning), _)| ends(*meaning));
        flags.any(|(_, flag)| flag.load(Ordering::SeqCst))
    }

    /// Returns the signals that have arrived since the last call, each once.
    pub(crate) fn take(&mut self) -> Vec<Meaning> {
        let mut wakes = [0; 64];
        while matches!(self.socket.read(&mut wakes), Ok(read) if read == wakes.len()) {}
        let came = MEANINGS.iter().zip(&self.flags).filter(|(_, flag)| flag.swap(false, Ordering::SeqCst));
        came.map(|((_, meaning), _)| *meaning).collect()
    }

    /// Raises again each signal that was not taken. Must be called with all signals blocked, before exec: the signals
    /// then stay pending for the new program, or for this program if exec fails.
    pub(crate) fn hand_on(&mut self) {
        for meaning in self.take() {
            let signal = MEANINGS.iter().find(|(_, other)| *other == meaning);
            let signal = signal.and_then(|(signal, _)| Signal::try_from(*signal).ok());
            if let Some(Err(errno)) = signal.map(|signal| kill(Pid::this(), signal)) {
                log::error!("cannot raise a pending signal again, so it is lost: {errno}");
            }
        }
    }

    /// Undoes every registration in a child, so that no signal to the child reaches the master.
    ///
    /// The handlers stay installed and do nothing. That is deliberate: signal-hook, and so tokio's signals that the application may use,
    /// installs a handler only once in the lifetime of a process, and would not detect that the default disposition was restored.
    pub(crate) fn leave(&self) {
        for &id in &self.registered {
            low_level::unregister(id);
        }
    }
}

impl AsFd for SignalInbox {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
