//! A child of the master: a worker, or a program in its place, with its reports and its output.

use std::fs::File;
use std::io::Read as _;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use nix::sys::signal::Signal;
use nix::unistd::Pid;

use super::apps::AppState;
use super::programs::ProgramState;
use super::ready_descriptor::Declaration;
use super::supervisor::Uptime;
use crate::inherited_by_workers::Report;
use crate::logging::files::LogFiles;
use crate::master::output::{LastLines, Output};

/// Maximum number of bytes of a worker's last words, and of a line of its reports.
const LAST_WORDS: usize = 4096;

/// A running worker or program.
pub(crate) struct Child {
    pub(crate) slot: u32,
    pub(crate) generation: u64,
    pub(crate) since: Instant,
    /// Whether the child has been asked to exit, in which case its exit is expected.
    pub(crate) asked_to_leave: bool,
    /// Whether the child hangs and was sent SIGABRT.
    pub(crate) hung: bool,
    /// Whether the child has requested its replacement because a function hangs in it.
    pub(crate) has_hung_thread: bool,
    /// The process that sent the signal that killed this child, if another process sent the signal.
    pub(crate) sent_by: Option<i32>,
    pub(crate) link: Link,
    /// The output of the child, until end of file.
    pub(crate) output: Option<Output>,
    /// The socket over which the process receives the reopened log files.
    pub(crate) files: Option<OwnedFd>,
    /// The log files of the child. `None` if a former master started the child, which is then assumed to have the
    /// current files.
    pub(crate) log_files: Option<Arc<LogFiles>>,
    /// The last lines of the child's output, once the output has ended.
    pub(crate) last_lines: LastLines,
    /// The signal that asks the child to exit.
    pub(crate) stop_signal: Signal,
    /// Where the child declares that it is ready (`--ready-by descriptor`).
    pub(crate) declaration: Option<Declaration>,
}

/// How a process is made to exit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::master) enum EndBy {
    /// It is asked to finish its work: by SIGTERM, or by `--stop-signal`.
    StopSignal,
    /// It is killed, with its process group.
    Kill,
}

/// The channel from a child to the master.
pub(crate) enum Link {
    Worker { report: File, open: bool, unread: Vec<u8>, last_words: String, trace: String },
    Program(ProgramState),
    App(AppState),
}

impl Child {
    /// Creates a child without output, log files or reports.
    pub(crate) fn new(slot: u32, generation: u64, link: Link) -> Self {
        Self {
            slot,
            generation,
            since: Instant::now(),
            asked_to_leave: false,
            hung: false,
            has_hung_thread: false,
            sent_by: None,
            link,
            output: None,
            files: None,
            log_files: None,
            last_lines: LastLines::default(),
            stop_signal: Signal::SIGTERM,
            declaration: None,
        }
    }

    pub(in crate::master) fn signal_for(&self, by: EndBy) -> Signal {
        match by {
            EndBy::StopSignal => self.stop_signal,
            EndBy::Kill => Signal::SIGKILL,
        }
    }

    pub(crate) fn is_worker(&self) -> bool {
        matches!(self.link, Link::Worker { .. })
    }

    /// Returns the state of the external program, if the child runs one that accepts clients' connections.
    pub(crate) fn program(&self) -> Option<ProgramState> {
        match &self.link {
            Link::Program(program) => Some(program.clone()),
            Link::Worker { .. } | Link::App(_) => None,
        }
    }

    /// Whether the child counts as ready. `None` for a worker, whose scoreboard row contains its state.
    pub(crate) fn has_started(&self) -> Option<bool> {
        match &self.link {
            Link::Worker { .. } => None,
            Link::Program(program) => Some(program.started),
            Link::App(app) => Some(app.is_ready()),
        }
    }

    /// Returns the descriptors to watch for the child: its reports, and its output if `with_output`.
    pub(crate) fn watched(&self, with_output: bool) -> impl Iterator<Item = BorrowedFd<'_>> {
        let report = match &self.link {
            Link::Worker { report, open, .. } => open.then(|| report.as_fd()),
            Link::App(app) => app.probe(),
            Link::Program(_) => None,
        };
        report.into_iter().chain(self.output.as_ref().filter(|_| with_output).map(AsFd::as_fd))
    }

    /// Logs up to `most` bytes of the child's output.
    pub(crate) fn log_output(&mut self, pid: Pid, most: usize, now: Uptime) {
        if let Some(output) = self.output.take_if(|output| !output.read(pid, most, now)) {
            self.last_lines = output.last_lines(); // all of it is in the log
        } else if let Some(output) = &mut self.output {
            output.tick(now);
        }
    }

    /// Reads the child's reports. Returns those that require an action.
    pub(crate) fn listen(&mut self) -> Vec<Report> {
        let Link::Worker { report, open, unread, last_words, trace } = &mut self.link else { return Vec::new() };
        if !*open {
            return Vec::new();
        }
        let mut said = [0; LAST_WORDS];
        let mut reports = Vec::new();
        // At most as much as a pipe holds is read, so that a child that never stops reporting does not block the
        // master.
        for _ in 0..16 {
            let Ok(count) = report.read(&mut said) else { break };
            *open = count > 0;
            if count == 0 && !unread.is_empty() {
                unread.push(b'\n'); // the child died in the middle of a line
            }
            unread.extend_from_slice(&said[..count]);
            while let Some(end) = unread.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = unread.drain(..=end).collect();
                match Report::parse(&String::from_utf8_lossy(&line[..end])) {
                    Report::LastWords(words) => keep(last_words, &words),
                    Report::Trace(addresses) => *trace = addresses,
                    Report::SentBy(pid) => self.sent_by = Some(pid),
                    report @ (Report::Ready
                    | Report::Recycle(_)
                    | Report::HungThread(_)
                    | Report::AppHung { .. }
                    | Report::GatewayStuck { .. }
                    | Report::AppDied { .. }
                    | Report::ChildrenDied { .. }) => reports.push(report),
                }
            }
            unread.truncate(LAST_WORDS);
            if count == 0 {
                break;
            }
        }
        reports
    }

    /// Returns the last words of a child that has ended, and its trace.
    pub(crate) fn mark_dead(mut self) -> (String, String) {
        self.listen();
        match self.link {
            Link::Worker { last_words, trace, .. } => (last_words, trace),
            Link::Program(program) if !program.trouble.is_empty() => (program.trouble.to_owned(), String::new()),
            Link::Program(_) | Link::App(_) => (self.last_lines.last(), String::new()),
        }
    }
}

/// Appends a line to a worker's last words, as far as there is space.
fn keep(last_words: &mut String, line: &str) {
    let separator = if last_words.is_empty() { "" } else { "; " };
    let room = LAST_WORDS.saturating_sub(last_words.len() + separator.len());
    let line: String = line.chars().take(room / 4).collect();
    if !line.is_empty() {
        *last_words += separator;
        *last_words += &line;
    }
}

/// Returns a stop signal that a former master has saved.
pub(in crate::master) fn restored_signal(number: Option<i32>) -> Signal {
    number.and_then(|number| Signal::try_from(number).ok()).unwrap_or(Signal::SIGTERM)
}
