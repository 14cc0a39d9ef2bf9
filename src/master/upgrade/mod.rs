//! Performs the upgrade in place: this process becomes the program's new build, and keeps its pid, its sockets, the shared memory and its
//! children.
//!
//! ```text
//! begin: start the new build with FORKYARD_UPGRADE_CHECK ── fails, or too late ──▶ a log line, nothing has changed
//!          │ it reads this command line and this state, maps the segment, runs `preload`, reports success and exits
//! exec:    signals blocked ─▶ state into a sealed memory file ─▶ exec ── fails ──▶ a log line, nothing has changed
//!          │
//! the new build (builder.rs): takes over descriptors and children, unblocks signals, reloads: new workers, then the old drain
//! ```
//!
//! The check runs alongside the loop: a child, a pipe and a deadline. Its output is untrusted, and truncated to 4 KiB.
//!
//! If the new build fails after the exec although it passed its check, there is no way back: the process exits; the workers see the end of
//! the lifeline, finish their requests and exit.

mod adopt;

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, RawFd};
use std::os::unix::process::CommandExt as _;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::fcntl::OFlag;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::{Pid, pipe2};

use super::Master;
use super::control::Waiting;
use super::output::{LineReader, MAX_REST};
use super::spawn::blocking;
use crate::control::wire::Reply;
use crate::sys::{self, Ending};
use crate::upgrade::saved_state::Saved;
use crate::upgrade::start_command::Identity;
use crate::upgrade::takeover::{CHECK, STATE};
use crate::upgrade::{VARIABLES, password};

/// Maximum number of bytes of the check's output that are kept: the last ones.
const LAST_WORDS: usize = 4096;
/// How long a check may take to exit after it was asked to.
const ABORT_STEPS: Duration = Duration::from_secs(2);

/// The reason for refusing an upgrade while the server stops.
const STOPPING: &str = "everything is being stopped";

fn cannot_write(error: &io::Error) -> String {
    format!("this master's state cannot be written to memory for the new build: {}", sys::explain(error))
}

/// The progress of an upgrade.
#[derive(Default)]
pub(super) enum Upgrade {
    #[default]
    No,
    Checking(Check),
    /// The check has passed. This build may be executed if its file has not changed since.
    Passed(Identity),
}

/// The running check: a process of the new build.
pub(super) struct Check {
    pid: Pid,
    output: LineReader,
    open: bool,
    passed: bool,
    last_words: String,
    /// `None` when it has passed.
    deadline: Option<Instant>,
    /// Why the check was asked to exit. It then exits without leaving anything behind.
    cut_short: Option<&'static str>,
    build: Identity,
}

impl Check {
    /// Sends TERM to the check; KILL follows later.
    fn ask_to_end(&mut self, why: &'static str) {
        self.cut_short = Some(why);
        self.deadline = Some(Instant::now() + ABORT_STEPS);
        let _ = killpg(self.pid, Signal::SIGTERM);
    }

    fn listen(&mut self) {
        let password = password();
        let (passed, last_words) = (&mut self.passed, &mut self.last_words);
        self.open = self.output.read(MAX_REST, &mut |line, _| {
            // The line may begin with earlier output that had no line end.
            if line.ends_with(&password) {
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

    /// The reason for the refusal, for a check that ended in this way.
    fn failure(&self, ending: Ending) -> String {
        let why = match (self.cut_short, ending) {
            (Some(why), _) => why.to_owned(),
            (None, Ending::Exited(0)) => format!("{ending} it did not say that it can take over"),
            (None, _) => ending.to_string(),
        };
        let said = match self.last_words.as_str() {
            "" if self.cut_short.is_some() => String::new(),
            words => format!(" said={words:?}"),
        };
        format!("the new build fails its check: {why}{said}")
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

    /// Reads the check's output, and stops a check that takes too long. Its death is handled like that of any other child.
    pub(super) fn listen(&mut self) {
        let Self::Checking(check) = self else { return };
        check.listen();
        if check.deadline.take_if(|deadline| *deadline <= Instant::now()).is_some() {
            if check.cut_short.is_some() {
                let _ = killpg(check.pid, Signal::SIGKILL);
            } else {
                check.ask_to_end("it took too long (--upgrade-timeout)");
            }
        }
    }

    /// Stops a running check, because its result is no longer needed.
    pub(super) fn cancel(&mut self) {
        if let Self::Checking(check) = self
            && check.cut_short.is_none()
        {
            check.ask_to_end(STOPPING);
        }
    }

    pub(super) fn is_checking(&self) -> bool {
        matches!(self, Self::Checking(_))
    }

    /// Whether this process is the check of the new build.
    pub(super) fn has(&self, pid: Pid) -> bool {
        matches!(self, Self::Checking(check) if check.pid == pid)
    }

    /// Handles the exit of the check. Returns why there is no upgrade, if the check failed.
    ///
    /// # Errors
    /// A sentence for the operator.
    fn ended(&mut self, ending: Ending) -> Result<(), String> {
        let Self::Checking(mut check) = std::mem::take(self) else { return Ok(()) };
        check.listen();
        if check.passed && check.cut_short.is_none() && ending == Ending::Exited(0) {
            *self = Self::Passed(check.build);
            return Ok(());
        }
        Err(check.failure(ending))
    }
}

impl Master {
    /// Logs the refusal, and reports it to the clients that wait for the upgrade.
    pub(super) fn refuse_upgrade(&mut self, why: impl std::fmt::Display) {
        let text = format!("no upgrade, and nothing has changed: {why}");
        log::error!("{text}");
        self.reply_to_waiting(Waiting::Upgrade, &Reply::failed(text));
    }

    fn tell_of_upgrade(&mut self, text: String) {
        log::info!("{text}");
        self.reply_to_waiting(Waiting::Upgrade, &Reply::Progress { text });
    }

    pub(super) fn upgrade_check_ended(&mut self, ending: Ending) {
        if let Err(why) = self.upgrade.ended(ending) {
            self.refuse_upgrade(why);
        }
    }

    pub(super) fn begin_upgrade(&mut self) {
        if !matches!(self.upgrade, Upgrade::No) {
            log::warn!("an upgrade is under way already");
            return;
        }
        let program = self.start_command.program.display().to_string();
        if !self.start_command.directory.is_dir() {
            let directory = self.start_command.directory.display();
            let remedy = "make it again, or stop and start elsewhere";
            return self.refuse_upgrade(format!("the directory of the first start is gone: {directory:?} ({remedy})"));
        }
        match self.start_check() {
            Ok(check) => {
                self.tell_of_upgrade(format!("upgrade: checking {program} pid={}", check.pid));
                self.upgrade = Upgrade::Checking(check);
            }
            Err(why) => self.refuse_upgrade(why),
        }
    }

    /// # Errors
    /// A sentence for the operator.
    fn start_check(&self) -> Result<Check, String> {
        let build = Identity::of(&self.start_command.program).map_err(|error| self.cannot_start(&error))?;
        let saved = self.save().ok_or(STOPPING)?;
        let state = saved.write().map_err(|error| cannot_write(&error))?;
        let no_pipe = |error: io::Error| format!("no pipe for the check of the new build: {}", sys::explain(&error));
        let (output, said) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).map_err(|errno| no_pipe(errno.into()))?;
        let said = blocking(said).map_err(no_pipe)?;
        let mut arguments = self.start_command.arguments().into_iter();
        let mut command = Command::new(&self.start_command.program);
        command
            .arg0(arguments.next().unwrap_or_default())
            .args(arguments)
            .current_dir(&self.start_command.directory)
            .env(CHECK, "1")
            .env(STATE, state.as_raw_fd().to_string())
            .stdout(Stdio::from(said.try_clone().map_err(no_pipe)?))
            .stderr(Stdio::from(said));
        let pass = [&[state.as_raw_fd()], saved.foundation().as_slice()].concat();
        // The check keeps all privileges, since it must be able to become what this process is.
        let child = sys::spawn(&mut command, &pass, || Ok(())).map_err(|error| self.cannot_start(&error))?;
        Ok(Check {
            pid: Pid::from_raw(child.id().cast_signed()),
            output: LineReader::new(output),
            open: true,
            passed: false,
            last_words: String::new(),
            deadline: Some(Instant::now() + self.spawner.config.upgrade.timeout),
            cut_short: None,
            build,
        })
    }

    /// The message for a failed start. It names a remedy only if the program, and not the machine, is the cause.
    fn cannot_start(&self, error: &io::Error) -> String {
        let is_machine =
            matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::EAGAIN | libc::ENOMEM));
        let remedy = if is_machine { "" } else { " (put the new build there)" };
        format!("{} cannot be started: {}{remedy}", self.start_command.program.display(), sys::explain(error))
    }

    /// Becomes the new build, if that build has passed the check.
    pub(super) fn finish_upgrade(&mut self) {
        let Upgrade::Passed(build) = &self.upgrade else { return };
        let same = Identity::of(&self.start_command.program).is_ok_and(|now| now == *build);
        self.upgrade = Upgrade::No;
        if !same {
            return self
                .refuse_upgrade("the program's file was changed after its check (try again when it is complete)");
        }
        self.tell_of_upgrade(format!("upgrade: becoming {}", self.start_command.program.display()));
        let before = sys::block_signals();
        self.signals.hand_on();
        let why = match self.save() {
            Some(saved) => self.exec(&saved),
            None => STOPPING.to_owned(),
        };
        sys::restore_signals(&before);
        self.refuse_upgrade(why);
    }

    /// Replaces this process. Returns only on failure, with the reason.
    fn exec(&self, saved: &Saved) -> String {
        let state = match saved.write() {
            Ok(state) => state,
            Err(error) => return cannot_write(&error),
        };
        let variables = std::env::vars_os().filter(|(name, _)| VARIABLES.iter().all(|ours| name != ours));
        let number = OsString::from(state.as_raw_fd().to_string());
        let environment: Vec<_> = variables.chain([(OsString::from(STATE), number)]).collect();
        let keep: Vec<RawFd> = saved.descriptors().into_iter().chain([state.as_raw_fd()]).collect();
        let error = sys::exec(
            &self.start_command.program,
            &self.start_command.arguments(),
            &environment,
            &self.start_command.directory,
            &keep,
        );
        self.cannot_start(&error)
    }
}
