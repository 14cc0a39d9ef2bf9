//! The upgrade in place: this process becomes the program's new build, and keeps its pid, its sockets, the shared memory
//! and its children.
//!
//! ```text
//! begin: start the new build with FORKYARD_UPGRADE_CHECK ── fails, or too late ──▶ a log line, nothing has changed
//!          │ it reads this command line, this state, maps the segment, runs `preload`, says so and ends
//! exec:    signals blocked ─▶ state into a sealed memory file ─▶ exec ── fails ──▶ as above
//!          │
//! the new build (builder.rs): takes descriptors and children over, unblocks signals, reloads: new workers, then the old drain
//! ```
//!
//! The check runs beside the loop: a child, a pipe and a deadline. What it says is gossip, cut at 4 KiB.
//!
//! If the new build fails after the exec, though it passed its check, there is no way back: the process ends, the workers
//! notice (the lifeline's end), finish what they serve and leave.

mod origin;
mod saved;
mod takeover;

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, RawFd};
use std::os::unix::process::CommandExt as _;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::fcntl::OFlag;
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::{Pid, pipe2};

use self::origin::Identity;
pub(crate) use self::origin::Origin;
use self::saved::{FORMAT, Saved, SavedChild, SavedLink, SavedListener, SavedSegment};
use self::takeover::{CHECK, STATE};
pub(crate) use self::takeover::{Takeover, is_check};
use super::program_log::LineReader;
use super::spawn::{Child, Link, blocking};
use super::supervisor::Command as Asked;
use super::{Event, Master};
use crate::sys::{self, Ending};

/// The variables of an upgrade, which are the master's alone.
pub(crate) const VARIABLES: [&str; 2] = [STATE, CHECK];
/// Bytes of what the check says that are kept: the last ones.
const LAST_WORDS: usize = 4096;

/// What the check says when it has come to its end.
pub(crate) fn password() -> String {
    format!("forkyard: this build can take over (state format {FORMAT})")
}

/// How far an upgrade has come.
#[derive(Default)]
pub(super) enum Upgrade {
    #[default]
    No,
    Checking(Check),
    /// This build may be executed, as long as it is the one that was checked.
    Passed(Identity),
}

/// The new build, which looks whether it could take over.
pub(super) struct Check {
    pid: Pid,
    output: LineReader,
    open: bool,
    passed: bool,
    last_words: String,
    /// Until it is met.
    deadline: Option<Instant>,
    build: Identity,
}

impl Check {
    fn listen(&mut self) {
        let password = password();
        let (passed, last_words) = (&mut self.passed, &mut self.last_words);
        self.open = self.output.read(|line| {
            if line == password {
                *passed = true;
                return;
            }
            if !last_words.is_empty() {
                last_words.push_str("; ");
            }
            last_words.push_str(line);
            let surplus = last_words.len().saturating_sub(LAST_WORDS);
            last_words.drain(..last_words.ceil_char_boundary(surplus));
        });
    }
}

impl Upgrade {
    pub(super) fn watched(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Checking(check) => check.open.then(|| check.output.as_fd()),
            Self::No | Self::Passed(_) => None,
        }
    }

    pub(super) fn due_in(&self) -> Option<Duration> {
        match self {
            Self::Checking(check) => Some(check.deadline?.saturating_duration_since(Instant::now())),
            Self::No | Self::Passed(_) => None,
        }
    }

    /// Takes in what the check said, and ends one that takes too long; its death is heard of like any other.
    pub(super) fn listen(&mut self) {
        let Self::Checking(check) = self else { return };
        check.listen();
        if check.deadline.take_if(|deadline| *deadline <= Instant::now()).is_some() {
            check.last_words.push_str(" (it took too long: --upgrade-timeout)");
            let _ = killpg(check.pid, Signal::SIGKILL);
        }
    }

    /// A child has ended; whether that was the check. What it started and left behind is ended too.
    pub(super) fn is_check(&self, pid: Pid) -> bool {
        matches!(self, Self::Checking(check) if check.pid == pid)
    }

    pub(super) fn ended(&mut self, ending: Ending) {
        let Self::Checking(mut check) = std::mem::take(self) else { return };
        check.listen();
        if check.passed && ending == Ending::Exited(0) {
            *self = Self::Passed(check.build);
        } else {
            let mute = if ending == Ending::Exited(0) { " it did not say that it can take over" } else { "" };
            refused(format!("the new build fails its check: {ending}{mute} said={:?}", check.last_words));
        }
    }
}

fn refused(why: impl std::fmt::Display) {
    log::error!("no upgrade, and nothing has changed: {why}");
}

impl Master {
    pub(super) fn begin_upgrade(&mut self) {
        if !matches!(self.upgrade, Upgrade::No) {
            log::warn!("an upgrade is under way already");
            return;
        }
        let program = self.origin.program.display();
        match self.start_check() {
            Ok(check) => {
                log::info!("upgrade: checking {program} pid={}", check.pid);
                self.upgrade = Upgrade::Checking(check);
            }
            Err(error) => refused(format!("{program} cannot be started: {error} (put the new build there)")),
        }
    }

    fn start_check(&self) -> io::Result<Check> {
        let build = Identity::of(&self.origin.program)?;
        let saved = self.save().ok_or(io::ErrorKind::Interrupted)?;
        let state = saved.write()?;
        let (output, said) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
        let said = blocking(said)?;
        let mut arguments = std::env::args_os();
        let mut command = Command::new(&self.origin.program);
        command
            .arg0(arguments.next().unwrap_or_default())
            .args(arguments)
            .current_dir(&self.origin.folder)
            .env(CHECK, "1")
            .env(STATE, state.as_raw_fd().to_string())
            .stdout(Stdio::from(said.try_clone()?))
            .stderr(Stdio::from(said));
        let child = sys::spawn(&mut command, &[&[state.as_raw_fd()], saved.foundation().as_slice()].concat())?;
        Ok(Check {
            pid: Pid::from_raw(i32::try_from(child.id()).map_err(io::Error::other)?),
            output: LineReader::new(output),
            open: true,
            passed: false,
            last_words: String::new(),
            deadline: Some(Instant::now() + self.nursery.config.upgrade.timeout),
            build,
        })
    }

    /// Becomes the new build, if it has passed.
    pub(super) fn finish_upgrade(&mut self) {
        let Upgrade::Passed(build) = &self.upgrade else { return };
        let same = Identity::of(&self.origin.program).is_ok_and(|now| now == *build);
        self.upgrade = Upgrade::No;
        if !same {
            return refused("the program's file was changed after its check (try again when it is complete)");
        }
        let before = sys::block_signals();
        self.signals.hand_on();
        let why = match self.save() {
            Some(saved) => self.exec(&saved).to_string(),
            None => "everything is being stopped".to_owned(),
        };
        sys::restore_signals(&before);
        refused(why);
    }

    /// Returns only if it fails.
    fn exec(&self, saved: &Saved) -> io::Error {
        let state = match saved.write() {
            Ok(state) => state,
            Err(error) => return error,
        };
        let arguments: Vec<OsString> = std::env::args_os().collect();
        let variables = std::env::vars_os().filter(|(name, _)| VARIABLES.iter().all(|ours| name != ours));
        let number = OsString::from(state.as_raw_fd().to_string());
        let environment: Vec<_> = variables.chain([(OsString::from(STATE), number)]).collect();
        let keep: Vec<RawFd> = saved.descriptors().into_iter().chain([state.as_raw_fd()]).collect();
        log::info!("upgrade: becoming {}", self.origin.program.display());
        sys::exec(&self.origin.program, &arguments, &environment, &self.origin.folder, &keep)
    }

    fn save(&self) -> Option<Saved> {
        let nursery = &self.nursery;
        let listeners = nursery.listeners.iter().map(|listener| SavedListener {
            fd: listener.as_fd().as_raw_fd(),
            bind: listener.bind.to_string(),
            file: listener.file(),
        });
        let children = self.children.iter().map(|(pid, child)| child.save(*pid));
        Some(Saved {
            format: FORMAT,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: nix::unistd::getpid().as_raw(),
            origin: self.origin.clone(),
            listeners: listeners.collect(),
            segment: SavedSegment { fd: nursery.segment.fd().as_raw_fd(), file: nursery.config.cache.file.clone() },
            lifeline: nursery.lifeline(),
            roster: self.supervisor.save(self.now())?,
            children: children.collect(),
        })
    }

    /// Takes the children of the former program over and has them replaced. Who is no child of ours is forgotten; who has
    /// ended is reaped as ever.
    pub(super) fn adopt(&mut self, mut left: Takeover) {
        for saved in std::mem::take(&mut left.saved.children) {
            let pid = Pid::from_raw(saved.pid);
            if !sys::is_child(pid) {
                log::error!("worker pid={pid} is not ours any more");
            } else if let Some(child) = Child::restore(saved, &mut left) {
                self.children.insert(pid, child);
            } else {
                log::error!("worker pid={pid} cannot be heard any more: it is asked to leave");
                let _ = kill(pid, Signal::SIGTERM);
            }
        }
        left.saved.roster.places.retain(|place| self.children.contains_key(&Pid::from_raw(place.pid)));
        let now = self.now();
        self.supervisor = super::Supervisor::restore(super::policy(&self.nursery.config), &left.saved.roster, now);
        let (version, from) = (env!("CARGO_PKG_VERSION"), &left.saved.version);
        log::info!("upgraded version={version} from={from} workers={}", self.children.len());
        drop(left);
        self.feed(Event::Command(Asked::Reload));
        self.reap();
    }
}

impl Child {
    fn save(&self, pid: Pid) -> SavedChild {
        let link = match &self.link {
            Link::Worker { report, open, unread, last_words } => SavedLink::Worker {
                report: report.as_raw_fd(),
                open: *open,
                unread: unread.clone(),
                last_words: last_words.clone(),
            },
            Link::Program { output, open, started } => SavedLink::Program {
                output: output.as_fd().as_raw_fd(),
                open: *open,
                partial: output.partial().to_vec(),
                started: *started,
            },
        };
        SavedChild {
            pid: pid.as_raw(),
            slot: self.slot,
            generation: self.generation,
            age_ms: u64::try_from(self.since.elapsed().as_millis()).unwrap_or(u64::MAX),
            asked_to_leave: self.asked_to_leave,
            link,
        }
    }

    fn restore(saved: SavedChild, left: &mut Takeover) -> Option<Self> {
        let SavedChild { slot, generation, age_ms, asked_to_leave, link, .. } = saved;
        let link = match link {
            SavedLink::Worker { report, open, unread, last_words } => {
                Link::Worker { report: left.claim(report)?.into(), open, unread, last_words }
            }
            SavedLink::Program { output, open, partial, started } => {
                Link::Program { output: LineReader::resume(left.claim(output)?, partial), open, started }
            }
        };
        let now = Instant::now();
        let since = now.checked_sub(Duration::from_millis(age_ms)).unwrap_or(now);
        Some(Self { slot, generation, since, asked_to_leave, link })
    }
}
