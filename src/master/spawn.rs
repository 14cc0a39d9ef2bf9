//! Birth: how a worker is forked with its heritage, and how an external program is started.

use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::{AsFd, AsRawFd as _, OwnedFd, RawFd};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Instant;

use forkyard_shm::Segment;
use nix::fcntl::OFlag;
use nix::unistd::{Pid, pipe2, setpgid};

use super::program_log::LineReader;
use super::signals::SignalInbox;
use super::upgrade;
use crate::config::{Config, Program};
use crate::heritage::{Heritage, Report, WorkerMain};
use crate::listen::Listener;
use crate::{notify, sys, systemd};

/// Variables that concern the master alone, and no process of its.
const OF_THE_MASTER: &[&[&str]] = &[&upgrade::VARIABLES, &notify::VARIABLES, &systemd::VARIABLES];
/// Bytes of a worker's last words that are kept, and of a line of its reports.
const LAST_WORDS: usize = 4096;

/// What the processes run.
pub(crate) enum Launch {
    /// The application linked into this binary, in a fork of the master.
    Worker(WorkerMain),
    /// An external program, which accepts from its standard input.
    Program(Program),
}

/// All that is needed to make a process.
pub(crate) struct Nursery {
    pub(crate) config: Arc<Config>,
    pub(crate) listeners: Arc<[Listener]>,
    pub(crate) segment: Segment,
    pub(crate) launch: Launch,
    /// Both ends of the pipe that tells workers by its end that the master is dead.
    lifeline: (OwnedFd, OwnedFd),
    application: Arc<[RawFd]>,
}

/// A process that lives, as the master sees it.
pub(crate) struct Child {
    pub(crate) slot: u32,
    pub(crate) generation: u64,
    pub(crate) since: Instant,
    /// It was told to leave, so its end is no accident.
    pub(crate) asked_to_leave: bool,
    pub(crate) link: Link,
}

/// What the master hears of a child.
pub(crate) enum Link {
    Worker { report: File, open: bool, unread: Vec<u8>, last_words: String },
    Program { output: LineReader, open: bool, started: bool },
}

impl Nursery {
    /// `lifeline` is the one of a former master whose workers live on.
    ///
    /// # Errors
    /// If no pipe can be had.
    pub(crate) fn new(
        config: Arc<Config>,
        listeners: Arc<[Listener]>,
        segment: Segment,
        launch: Launch,
        application: Arc<[RawFd]>,
        lifeline: Option<(OwnedFd, OwnedFd)>,
    ) -> io::Result<Self> {
        let lifeline = match lifeline {
            Some(left) => left,
            None => pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?,
        };
        Ok(Self { config, listeners, segment, launch, lifeline, application })
    }

    /// The descriptors of the lifeline's ends.
    pub(crate) fn lifeline(&self) -> (RawFd, RawFd) {
        (self.lifeline.0.as_raw_fd(), self.lifeline.1.as_raw_fd())
    }

    /// Makes a process for `slot`.
    ///
    /// # Errors
    /// What fork or exec says, or that no pipe can be had.
    pub(crate) fn spawn(&self, slot: u32, generation: u64, signals: &SignalInbox) -> io::Result<(Pid, Child)> {
        let (pid, link) = match &self.launch {
            Launch::Worker(main) => self.fork_worker(main, slot, generation, signals)?,
            Launch::Program(program) => self.start_program(program, slot, generation)?,
        };
        Ok((pid, Child { slot, generation, since: Instant::now(), asked_to_leave: false, link }))
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
            lifeline: self.lifeline.0.try_clone()?,
            application: Arc::clone(&self.application),
        };
        let pid = sys::fork(|| {
            signals.leave();
            let keep = [&[0, 1, 2], heritage.descriptors().as_slice()].concat();
            sys::close_all_except(&keep);
            sys::forget_environment(OF_THE_MASTER);
            // A group of its own: Ctrl-C at a terminal is the master's to handle.
            let grouped = setpgid(Pid::from_raw(0), Pid::from_raw(0));
            if grouped.is_err() || sys::die_with_parent(heritage.master).is_err() {
                return 1;
            }
            main(heritage)
        })?;
        Ok((pid, Link::Worker { report: File::from(read), open: true, unread: Vec::new(), last_words: String::new() }))
    }

    fn start_program(&self, program: &Program, slot: u32, generation: u64) -> io::Result<(Pid, Link)> {
        let (read, write) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
        // Non-blocking is a property of each end; the program's must block.
        let write = blocking(write)?;
        let segment = self.segment.fd();
        let mut command = Command::new(&program.path);
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
        for name in OF_THE_MASTER.iter().copied().flatten() {
            command.env_remove(name);
        }
        std::os::unix::process::CommandExt::arg0(&mut command, &program.name);
        let child = sys::spawn(&mut command, &[segment.as_raw_fd()])?;
        let pid = Pid::from_raw(i32::try_from(child.id()).map_err(io::Error::other)?);
        Ok((pid, Link::Program { output: LineReader::new(read), open: true, started: false }))
    }
}

/// The same pipe, with reading or writing that waits.
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
            Link::Worker { report, open, unread, last_words } => {
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

    /// Hands out what is left after the child's end, and returns its last words.
    pub(crate) fn bury(mut self, pid: Pid) -> String {
        self.listen(pid);
        match self.link {
            Link::Worker { last_words, .. } => last_words,
            Link::Program { output, .. } => {
                output.finish(|line| log_line(self.slot, pid, line));
                String::new()
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
