//! The master's signals, made readable: a flag for each and one socket that the loop's `poll` watches.
//!
//! It is opened at the very beginning of a start, and what comes before the loop runs is remembered, each signal once. TERM, INT and QUIT end the start, during `preload` at once: see `abort.rs`.
//!
//! A forked child inherits the handlers and the socket. It must call [`SignalInbox::leave`] before it lets
//! signals through, or else a signal meant for it would wake the master and not end it.

use std::io::{self, Read as _};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use signal_hook::consts::signal::{SIGCHLD, SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGTTIN, SIGTTOU, SIGUSR1, SIGUSR2};
use signal_hook::{SigId, flag, low_level};

use super::supervisor::Command;
use crate::sys;

/// What a signal means to the master.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Meaning {
    /// A child has ended: reap.
    Child,
    Command(Command),
    /// The log files were moved away, and are to be opened again.
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

/// Where signals arrive.
#[derive(Debug)]
pub(crate) struct SignalInbox {
    socket: UnixStream,
    flags: [Arc<AtomicBool>; MEANINGS.len()],
    registered: Vec<SigId>,
}

impl SignalInbox {
    /// Takes over the signals that the master knows.
    ///
    /// # Errors
    /// If no socket pair is available.
    pub(crate) fn open() -> io::Result<Self> {
        let (socket, wake) = UnixStream::pair()?;
        socket.set_nonblocking(true)?;
        let mut inbox = Self { socket, flags: Default::default(), registered: Vec::new() };
        // A signal that came between two registrations would run only a part of its actions, and be lost.
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
            // The flag first: when the socket wakes the loop, it must stand.
            self.registered.push(flag::register(*signal, Arc::clone(flag))?);
            self.registered.push(low_level::pipe::register(*signal, wake.try_clone()?)?);
        }
        Ok(())
    }

    /// Whether a signal that asks for the end has come and was not looked at. To be called with signals blocked: those that wait
    /// are let in.
    pub(crate) fn asks_for_end(&self) -> bool {
        sys::unblock_signals();
        sys::block_signals();
        let ends = |meaning| matches!(meaning, Meaning::Command(Command::Drain | Command::Halt));
        let mut flags = MEANINGS.iter().zip(&self.flags).filter(|((_, meaning), _)| ends(*meaning));
        flags.any(|(_, flag)| flag.load(Ordering::SeqCst))
    }

    /// The signals that came since the last call, each once.
    pub(crate) fn take(&mut self) -> Vec<Meaning> {
        let mut wakes = [0; 64];
        while matches!(self.socket.read(&mut wakes), Ok(read) if read == wakes.len()) {}
        let came = MEANINGS.iter().zip(&self.flags).filter(|(_, flag)| flag.swap(false, Ordering::SeqCst));
        came.map(|((_, meaning), _)| *meaning).collect()
    }

    /// Before this process becomes another program, with all signals blocked: what came and was not looked at is sent again,
    /// and so waits for whoever looks next: the other program, or this one if it cannot be executed.
    pub(crate) fn hand_on(&mut self) {
        for meaning in self.take() {
            let signal = MEANINGS.iter().find(|(_, other)| *other == meaning);
            let signal = signal.and_then(|(signal, _)| Signal::try_from(*signal).ok());
            if let Some(Err(errno)) = signal.map(|signal| kill(Pid::this(), signal)) {
                log::error!("a signal was lost: {errno}");
            }
        }
    }

    /// For a child: undoes every registration, so that no signal of the child's reaches the master.
    ///
    /// The handlers themselves stay installed, with nothing to do. That is deliberate: signal-hook (and so
    /// tokio's signals, which the application may use) takes a signal over only once in a process's life and
    /// would not notice that a default disposition was put back.
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
