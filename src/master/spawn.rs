//! Birth: how a worker is forked with its heritage, and how an external program is started.

use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd, RawFd};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Instant;

use forkyard_shm::Segment;
use nix::fcntl::OFlag;
use nix::unistd::{Pid, pipe2, setpgid};

use super::program_log::LineReader;
use super::signals::SignalInbox;
use crate::config::{Config, Program};
use crate::handover::Channel;
use crate::heritage::{Heritage, Report, WorkerMain};
use crate::hooks::{Hooks, WorkerHooks, WorkerId};
use crate::listen::Listener;
use crate::privileges::Privileges;
use crate::sys;

/// Bytes of a worker's last words that are kept, and of a line of its reports.
const LAST_WORDS: usize = 4096;

/// What the processes run.
pub(crate) enum Launch {
    /// The application linked into this binary, in a fork of the master, and what it wants called.
    Worker(WorkerMain, Hooks),
    /// An external program, which accepts from its standard input.
    Program(Program),
}

/// All that is needed to make a process.
pub(crate) struct Nursery {
    pub(crate) config: Arc<Config>,
    pub(crate) listeners: Arc<[Listener]>,
    pub(crate) segment: Segment,
    pub(crate) launch: Launch,
    handover: Arc<Channel>,
    /// Both ends of the pipe that tells workers by its end that the master is dead.
    lifeline: (OwnedFd, OwnedFd),
    application: Arc<[RawFd]>,
    privileges: Arc<Privileges>,
    worker_hooks: Arc<WorkerHooks>,
}

/// A process that lives, as the master sees it.
pub(crate) struct Child {
    pub(crate) slot: u32,
    pub(crate) generation: u64,
    pub(crate) since: Instant,
    /// It was told to leave, so its end is no accident.
    pub(crate) asked_to_leave: bool,
    /// It hangs, and was told to die.
    pub(crate) hung: bool,
    pub(crate) link: Link,
}

/// What the master hears of a child.
pub(crate) enum Link {
    Worker { report: File, open: bool, unread: Vec<u8>, last_words: String, trace: String },
    Program { output: LineReader, open: bool, started: bool },
}

impl Nursery {
    /// # Errors
    /// If no pipe can be had, or processes cannot be what the configuration asks for.
    pub(crate) fn new(
        config: Arc<Config>,
        listeners: Arc<[Listener]>,
        segment: Segment,
        mut launch: Launch,
        application: Arc<[RawFd]>,
    ) -> io::Result<Self> {
        let lifeline = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
        let handover = Arc::new(Channel::open()?);
        let executes = matches!(launch, Launch::Program(_));
        let privileges = Privileges::resolve(&config.privileges, executes).map_err(io::Error::other)?;
        let privileges = Arc::new(privileges);
        let worker_hooks = match &mut launch {
            Launch::Worker(_, hooks) => Arc::new(std::mem::take(&mut hooks.of_worker)),
            Launch::Program(_) => Arc::default(),
        };
        Ok(Self { config, listeners, segment, launch, handover, lifeline, application, privileges, worker_hooks })
    }

    /// Makes a process for `slot`.
    ///
    /// # Errors
    /// What fork or exec says, or that no pipe can be had.
    pub(crate) fn spawn(&self, slot: u32, generation: u64, signals: &SignalInbox) -> io::Result<(Pid, Child)> {
        let (pid, link) = match &self.launch {
            Launch::Worker(main, hooks) => {
                hooks.of_master.before_fork(WorkerId { slot, generation })?;
                self.fork_worker(main, slot, generation, signals)?
            }
            Launch::Program(program) => self.start_program(program, slot, generation)?,
        };
        Ok((pid, Child { slot, generation, since: Instant::now(), asked_to_leave: false, hung: false, link }))
    }

    fn fork_worker(
        &self,
        main: &WorkerMain,
        slot: u32,
        generation: u64,
        signals: &SignalInbox,
    ) -> io::Result<(Pid, Link)> {
        let (read, report) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
        let heritage = Heritage {
            slot,
            generation,
            master: nix::unistd::getpid(),
            config: Arc::clone(&self.config),
            listeners: Arc::clone(&self.listeners),
            segment: self.segment.clone(),
            report,
            handover: Arc::clone(&self.handover),
            lifeline: self.lifeline.0.try_clone()?,
            application: Arc::clone(&self.application),
            privileges: Arc::clone(&self.privileges),
            hooks: Arc::clone(&self.worker_hooks),
        };
        let pid = sys::fork(|| {
            signals.leave();
            let keep = [&[0, 1, 2], heritage.descriptors().as_slice()].concat();
            sys::close_all_except(&keep);
            // A group of its own: Ctrl-C at a terminal is the master's to handle.
            let grouped = setpgid(Pid::from_raw(0), Pid::from_raw(0));
            if let Err(error) = heritage.apply_privileges() {
                return heritage.fail(&error);
            }
            // After that: the kernel forgets it when the user changes.
            if grouped.is_err() || sys::die_with_parent(heritage.master).is_err() {
                return 1;
            }
            main(heritage)
        })?;
        let (report, last_words, trace) = (File::from(read), String::new(), String::new());
        Ok((pid, Link::Worker { report, open: true, unread: Vec::new(), last_words, trace }))
    }

    fn start_program(&self, program: &Program, slot: u32, generation: u64) -> io::Result<(Pid, Link)> {
        let (read, write) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
        // Non-blocking is a property of each end; the program's must block.
        let write = blocking(write)?;
        let segment = self.segment.fd();
        let mut command = Command::new(&program.path);
        self.privileges.set_environment(&mut command);
        command
            .args(&program.arguments)
            .env("FORKYARD_SLOT", slot.to_string())
            .env("FORKYARD_GENERATION", generation.to_string())
            .env("FORKYARD_SHM", segment.as_raw_fd().to_string())
            // php-cgi would otherwise fork children of its own, which nobody supervises.
            .env("PHP_FCGI_CHILDREN", "0")
            .stdin(Stdio::from(self.listeners[0].duplicate()?))
            .stdout(Stdio::from(write.try_clone()?))
            .stderr(Stdio::from(write));
        std::os::unix::process::CommandExt::arg0(&mut command, &program.name);
        let steps = self.privileges.steps(slot).map_err(io::Error::other)?;
        let child =
            sys::spawn(&mut command, &[segment.as_raw_fd()], steps).map_err(|error| explain(&error, read.as_fd()))?;
        let pid = Pid::from_raw(i32::try_from(child.id()).map_err(io::Error::other)?);
        Ok((pid, Link::Program { output: LineReader::new(read), open: true, started: false }))
    }
}

/// Why a program did not start: the step that failed has left its flag in the output.
pub(super) fn explain(error: &io::Error, output: BorrowedFd<'_>) -> io::Error {
    let mut flag = [0; 64];
    let read = nix::unistd::read(output, &mut flag).unwrap_or(0);
    let flag = String::from_utf8_lossy(&flag[..read]);
    io::Error::other(if flag.is_empty() { error.to_string() } else { format!("{flag}: {error}") })
}

pub(super) fn blocking(pipe: OwnedFd) -> io::Result<OwnedFd> {
    use nix::fcntl::{FcntlArg, fcntl};
    fcntl(&pipe, FcntlArg::F_SETFL(OFlag::empty()))?;
    Ok(pipe)
}

impl Child {
    pub(crate) fn is_worker(&self) -> bool {
        matches!(self.link, Link::Worker { .. })
    }

    /// The descriptor by which the child may have something to say.
    pub(crate) fn watched(&self) -> Option<std::os::fd::BorrowedFd<'_>> {
        match &self.link {
            Link::Worker { report, open, .. } => open.then(|| report.as_fd()),
            Link::Program { output, open, .. } => open.then(|| output.as_fd()),
        }
    }

    /// Takes in what the child said, and returns what of it is to be acted upon.
    pub(crate) fn listen(&mut self, pid: Pid) -> Vec<Report> {
        match &mut self.link {
            Link::Worker { report, open, unread, last_words, trace } => {
                let mut said = [0; LAST_WORDS];
                let mut reports = Vec::new();
                // What fits a pipe, and no more: one that talks and talks does not hold up the master.
                for _ in 0..16 {
                    let Ok(count) = report.read(&mut said) else { break };
                    *open = count > 0;
                    if count == 0 && !unread.is_empty() {
                        unread.push(b'\n'); // it died in the middle of a line
                    }
                    unread.extend_from_slice(&said[..count]);
                    while let Some(end) = unread.iter().position(|&byte| byte == b'\n') {
                        let line: Vec<u8> = unread.drain(..=end).collect();
                        match Report::parse(&String::from_utf8_lossy(&line[..end])) {
                            Report::LastWords(words) => keep(last_words, &words),
                            Report::Trace(addresses) => *trace = addresses,
                            report @ (Report::Ready | Report::Recycle(_)) => reports.push(report),
                        }
                    }
                    unread.truncate(LAST_WORDS);
                    if count == 0 {
                        break;
                    }
                }
                reports
            }
            Link::Program { output, open, .. } => {
                let slot = self.slot;
                *open = output.read(|line| log_line(slot, pid, line));
                Vec::new()
            }
        }
    }

    /// Hands out what is left after the child's end, and returns its last words, and where it crashed.
    pub(crate) fn bury(mut self, pid: Pid) -> (String, String) {
        self.listen(pid);
        match self.link {
            Link::Worker { last_words, trace, .. } => (last_words, trace),
            Link::Program { output, .. } => {
                output.finish(|line| log_line(self.slot, pid, line));
                Default::default()
            }
        }
    }
}

/// Adds a line to a worker's last words, as far as there is room.
fn keep(last_words: &mut String, line: &str) {
    let separator = if last_words.is_empty() { "" } else { "; " };
    let room = LAST_WORDS.saturating_sub(last_words.len() + separator.len());
    let line: String = line.chars().take(room / 4).collect();
    if !line.is_empty() {
        *last_words += separator;
        *last_words += &line;
    }
}

fn log_line(slot: u32, pid: Pid, line: &str) {
    log::info!(target: "app", "slot={slot} pid={pid} | {line}");
}

/// Whether process `pid` holds a socket beside its standard input: a connection, as a rule.
pub(crate) fn has_connection(pid: Pid) -> bool {
    let Ok(entries) = std::fs::read_dir(format!("/proc/{pid}/fd")) else { return false };
    let beside_standard = entries.filter_map(Result::ok).filter(|entry| entry.file_name() != "0");
    let mut targets = beside_standard.filter_map(|entry| std::fs::read_link(entry.path()).ok());
    targets.any(|target| target.to_string_lossy().starts_with("socket:"))
}

/// Whether process `pid` sleeps in `accept` on its standard input, as far as the kernel tells us.
pub(crate) fn is_accepting(pid: Pid) -> bool {
    let Ok(text) = std::fs::read_to_string(format!("/proc/{pid}/syscall")) else { return false };
    let mut words = text.split_ascii_whitespace();
    let call = words.next().and_then(|number| number.parse().ok());
    let first = words.next();
    matches!(call, Some(libc::SYS_accept | libc::SYS_accept4)) && first == Some("0x0")
}
