//! Lists everything that a worker inherits from the master, by name.
//!
//! A freshly forked worker closes every descriptor that is not listed here, and uses nothing else from the master.
//! Neither the master's nor the worker's modules import the others; this module is their only link.

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

/// Everything that one worker inherits.
#[derive(Debug)]
pub(crate) struct Heritage {
    /// Number of the worker's slot, unique among the running workers; also the index of its row in the scoreboard.
    pub(crate) slot: u32,
    /// Number of reloads, counted from 1, when this worker was created.
    pub(crate) generation: u64,
    pub(crate) master: Pid,
    pub(crate) config: Arc<Config>,
    pub(crate) listeners: Arc<[Listener]>,
    pub(crate) segment: Segment,
    /// The worker writes its [`Report`]s here.
    pub(crate) report: OwnedFd,
    /// Passes connections from one worker to another.
    pub(crate) handover: Arc<Channel>,
    /// Never readable; end of file means that the master is dead.
    pub(crate) lifeline: OwnedFd,
    /// Descriptors that the application opened before the fork, in `main` or in `preload`.
    pub(crate) application: Arc<[RawFd]>,
    /// Privileges that the worker drops before the application runs.
    pub(crate) privileges: Arc<Privileges>,
    pub(crate) log_files: Arc<LogFiles>,
    /// The worker receives the reopened log files here after a rotation.
    pub(crate) files: Option<OwnedFd>,
    pub(crate) hooks: Arc<WorkerHooks>,
}

/// A worker's report to the master, sent as one line. The master must not trust the report.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Report {
    /// The worker accepts connections.
    Ready,
    /// The worker has reached the end of its lifetime, for this reason. The worker continues to serve until another
    /// worker replaces it.
    Recycle(String),
    /// Like [`Report::Recycle`]; the reason is a blocking function that hangs, called for this request.
    HungThread(String),
    /// An app process has not answered this request of a gateway in time. `connection` is the inode of the process's end of
    /// the connection, or 0 if it is unknown.
    AppHung { slot: u32, pid: i32, connection: u32, request: String },
    /// The gateway in this slot, with this pid, does not react and occupies app processes.
    GatewayStuck { slot: u32, pid: u32 },
    /// An app process died while it served this request of a gateway.
    AppDied { slot: u32, pid: i32, request: String },
    /// Children of an app process died one after another, each while it served this request of a gateway.
    ChildrenDied { slot: u32, pid: i32, request: String },
    /// Another process, with this pid, sent the signal that terminates the worker.
    SentBy(i32),
    /// Why the worker cannot continue.
    LastWords(String),
    /// Where the worker crashed: addresses as `code_address.rs` writes them, the innermost function first.
    Trace(String),
}

impl Report {
    /// Returns the report as one line, including the line feed.
    pub(crate) fn line(&self) -> String {
        match self {
            Self::Ready => "ready\n".to_owned(),
            Self::Recycle(reason) => format!("recycle {}\n", reason.replace('\n', " ")),
            Self::HungThread(request) => format!("hung {}\n", request.replace('\n', " ")),
            Self::AppHung { slot, pid, connection, request } => {
                format!("app-hung {slot} {pid} {connection} {}\n", request.replace('\n', " "))
            }
            Self::GatewayStuck { slot, pid } => format!("gateway-stuck {slot} {pid} -\n"),
            Self::AppDied { slot, pid, request } => format!("app-died {slot} {pid} {}\n", request.replace('\n', " ")),
            Self::ChildrenDied { slot, pid, request } => {
                format!("children-died {slot} {pid} {}\n", request.replace('\n', " "))
            }
            Self::SentBy(pid) => format!("sent {pid}\n"),
            Self::LastWords(words) => format!("said {}\n", words.replace('\n', " ")),
            Self::Trace(addresses) => format!("trace {addresses}\n"),
        }
    }

    /// Parses a line without its line feed. A line that has none of the other forms is treated as last words.
    pub(crate) fn parse(line: &str) -> Self {
        match line.split_once(' ') {
            None if line == "ready" => Self::Ready,
            Some(("recycle", reason)) => Self::Recycle(reason.to_owned()),
            Some(("hung", request)) => Self::HungThread(request.to_owned()),
            Some(("app-hung", rest)) if app_hang(rest).is_some() => {
                let (slot, pid, connection, request) = app_hang(rest).unwrap_or_default();
                Self::AppHung { slot, pid, connection, request }
            }
            Some(("gateway-stuck", rest)) if app_request(rest).is_some() => {
                let (slot, pid, _) = app_request(rest).unwrap_or_default();
                Self::GatewayStuck { slot, pid: pid.cast_unsigned() }
            }
            Some(("app-died", rest)) if app_request(rest).is_some() => {
                let (slot, pid, request) = app_request(rest).unwrap_or_default();
                Self::AppDied { slot, pid, request }
            }
            Some(("children-died", rest)) if app_request(rest).is_some() => {
                let (slot, pid, request) = app_request(rest).unwrap_or_default();
                Self::ChildrenDied { slot, pid, request }
            }
            Some(("sent", pid)) if pid.parse::<i32>().is_ok() => Self::SentBy(pid.parse().unwrap_or_default()),
            Some(("said", words)) => Self::LastWords(words.to_owned()),
            Some(("trace", addresses)) => Self::Trace(addresses.to_owned()),
            None | Some(_) => Self::LastWords(line.to_owned()),
        }
    }
}

/// Parses the slot and pid of an app process, and its request.
fn app_request(text: &str) -> Option<(u32, i32, String)> {
    let mut words = text.splitn(3, ' ');
    Some((words.next()?.parse().ok()?, words.next()?.parse().ok()?, words.next()?.to_owned()))
}

/// Like [`app_request`], with the inode of a connection before the request.
fn app_hang(text: &str) -> Option<(u32, i32, u32, String)> {
    let (slot, pid, rest) = app_request(text)?;
    let (connection, request) = rest.split_once(' ')?;
    Some((slot, pid, connection.parse().ok()?, request.to_owned()))
}

/// The main function of a worker: serves until the worker must exit, and returns the exit status.
pub(crate) type WorkerMain = Box<dyn Fn(Heritage) -> u8>;

impl Heritage {
    /// Drops the privileges that the process in this slot must not have. Must be called once, after the fork and before
    /// any application code. The process and all its children keep the reduced privileges, so a process that needs more
    /// privileges must be forked before this call.
    ///
    /// # Errors
    /// Returns a message for the operator, with the flag, if a privilege cannot be dropped.
    pub(crate) fn apply_privileges(&self) -> io::Result<()> {
        if self.privileges.change_access() {
            // The process must register as a user of the cache while it can still reopen the file.
            self.segment.enter();
        }
        self.privileges.apply(self.slot)
    }

    /// Reports to the master why this worker cannot continue. Returns the worker's exit status.
    pub(crate) fn fail(&self, why: &impl std::fmt::Display) -> u8 {
        let line = Report::LastWords(why.to_string()).line();
        let _ = nix::unistd::write(&self.report, line.as_bytes()); // fails if the master has exited
        1
    }

    /// Returns the descriptors that stay open in the worker, in addition to the standard ones.
    pub(crate) fn descriptors(&self) -> Vec<RawFd> {
        let listeners = self.listeners.iter().map(|listener| listener.as_fd().as_raw_fd());
        let [send, receive] = [self.handover.sender(), self.handover.receiver()].map(|fd| fd.as_raw_fd());
        let others = [self.segment.fd().as_raw_fd(), self.report.as_raw_fd(), self.lifeline.as_raw_fd(), send, receive];
        let logs = self.log_files.descriptors().chain(self.files.as_ref().map(|files| files.as_raw_fd()));
        listeners.chain(others).chain(logs).chain(self.application.iter().copied()).collect()
    }
}
