//! The heritage: everything that a worker gets from the master, by name.
//!
//! A freshly forked worker closes every descriptor that is not one of these, and uses nothing else of the
//! master's. Master and worker do not import each other; this is what passes between them.

use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd, RawFd};
use std::sync::Arc;

use forkyard_shm::Segment;
use nix::unistd::Pid;

use crate::app::hooks::WorkerHooks;
use crate::config::Config;
use crate::logging::files::LogFiles;
use crate::net::handover::Channel;
use crate::net::listen::Listener;
use crate::privileges::Privileges;

/// What one worker inherits.
#[derive(Debug)]
pub(crate) struct Heritage {
    /// Its number, unique among the living processes, and its row in the scoreboard.
    pub(crate) slot: u32,
    /// How often the master had been told to reload when this worker was made, from 1.
    pub(crate) generation: u64,
    pub(crate) master: Pid,
    pub(crate) config: Arc<Config>,
    pub(crate) listeners: Arc<[Listener]>,
    pub(crate) segment: Segment,
    /// The worker writes its [`Report`]s here.
    pub(crate) report: OwnedFd,
    /// Where connections pass from one worker to another.
    pub(crate) handover: Arc<Channel>,
    /// Never readable; at its end the master is dead.
    pub(crate) lifeline: OwnedFd,
    /// What the application itself opened before the fork, in `main` or in `preload`.
    pub(crate) application: Arc<[RawFd]>,
    /// What it gives up before the application runs.
    pub(crate) privileges: Arc<Privileges>,
    /// The log and the access log.
    pub(crate) log_files: Arc<LogFiles>,
    /// Here they come again after a rotation.
    pub(crate) files: Option<OwnedFd>,
    /// What the application wants called.
    pub(crate) hooks: Arc<WorkerHooks>,
}

/// What a worker tells the master: a line each. To the master it is gossip.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Report {
    /// It is accepting connections.
    Ready,
    /// It has served its time, for this reason, and goes on until somebody takes its place.
    Recycle(String),
    /// The same, because a function hangs that was called for this request.
    HungThread(String),
    /// The signal of which it dies was sent by this process, which is not the worker.
    SentBy(i32),
    /// Why it cannot go on.
    LastWords(String),
    /// Where it crashed: addresses, as `code_address.rs` writes them, the innermost function first.
    Trace(String),
}

impl Report {
    /// As it is written, with the end of the line. A text is one line.
    pub(crate) fn line(&self) -> String {
        match self {
            Self::Ready => "ready\n".to_owned(),
            Self::Recycle(reason) => format!("recycle {}\n", reason.replace('\n', " ")),
            Self::HungThread(request) => format!("hung {}\n", request.replace('\n', " ")),
            Self::SentBy(pid) => format!("sent {pid}\n"),
            Self::LastWords(words) => format!("said {}\n", words.replace('\n', " ")),
            Self::Trace(addresses) => format!("trace {addresses}\n"),
        }
    }

    /// Reads a line without its end; what makes no sense are last words.
    pub(crate) fn parse(line: &str) -> Self {
        match line.split_once(' ') {
            None if line == "ready" => Self::Ready,
            Some(("recycle", reason)) => Self::Recycle(reason.to_owned()),
            Some(("hung", request)) => Self::HungThread(request.to_owned()),
            Some(("sent", pid)) if pid.parse::<i32>().is_ok() => Self::SentBy(pid.parse().unwrap_or_default()),
            Some(("said", words)) => Self::LastWords(words.to_owned()),
            Some(("trace", addresses)) => Self::Trace(addresses.to_owned()),
            None | Some(_) => Self::LastWords(line.to_owned()),
        }
    }
}

/// What a worker does with its heritage: it serves until it is told to stop, and returns an exit status.
pub(crate) type WorkerMain = Box<dyn Fn(Heritage) -> u8>;

impl Heritage {
    /// Makes this process what its slot may be: once, after the fork, before anything of the application. What it does from then
    /// on, and what it forks, is done with that. (So what must be able to do more has to be forked before.)
    ///
    /// # Errors
    /// What could not be done, with its flag.
    pub(crate) fn apply_privileges(&self) -> io::Result<()> {
        if self.privileges.change_access() {
            // It becomes a user of the cache while it can still open it again.
            self.segment.enter();
        }
        self.privileges.apply(self.slot)
    }

    /// Tells the master why this worker cannot go on. Returns its exit status.
    pub(crate) fn fail(&self, why: &impl std::fmt::Display) -> u8 {
        let line = Report::LastWords(why.to_string()).line();
        let _ = nix::unistd::write(&self.report, line.as_bytes()); // if the master is gone, nobody wants to know
        1
    }

    /// The descriptors that stay open in the worker, beside the standard ones.
    pub(crate) fn descriptors(&self) -> Vec<RawFd> {
        let listeners = self.listeners.iter().map(|listener| listener.as_fd().as_raw_fd());
        let [send, receive] = [self.handover.sender(), self.handover.receiver()].map(|fd| fd.as_raw_fd());
        let others = [self.segment.fd().as_raw_fd(), self.report.as_raw_fd(), self.lifeline.as_raw_fd(), send, receive];
        let logs = self.log_files.descriptors().chain(self.files.as_ref().map(|files| files.as_raw_fd()));
        listeners.chain(others).chain(logs).chain(self.application.iter().copied()).collect()
    }
}
