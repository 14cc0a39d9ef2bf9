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
//! The check runs alongside the loop: a child, a pipe and a deadline. The check's output is untrusted, and truncated to
//! 4 KiB.
//!
//! If the new build fails after the exec although it passed its check, there is no way back: the process exits. The
//! workers then detect the end of the lifeline, finish their requests and exit.

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
use super::pool::spawn::blocking;
use crate::control::wire::ControlReply;
use crate::sys::{self, Ending};
use crate::upgrade::saved_state::Saved;
use crate::upgrade::start_command::FileIdentity;
use crate::upgrade::takeover::{CHECK, STATE};
use crate::upgrade::{VARIABLES, password};

/// Maximum number of bytes kept from the end of the check's output.
const LAST_WORDS: usize = 4096;
/// How long a check may take to exit after it has been asked to.
const ABORT_STEPS: Duration = Duration::from_secs(2);

/// The reason for refusing an upgrade while the server stops.
const STOPPING: &str = "the server is stopping";

/// Why no upgrade takes place, for the operator.
pub(super) struct Refusal {
    why: String,
    /// How the check ended, if that is the reason.
    ending: Option<Ending>,
    /// The end of the check's output. Empty if there is no output, or if it is not related to the reason.
    output: String,
}

impl From<String> for Refusal {
    fn from(why: String) -> Self {
        Self { why, ending: None, output: String::new() }
    }
}

impl From<&str> for Refusal {
    fn from(why: &str) -> Self {
        Self::from(why.to_owned())
    }
}

fn cannot_write(error: &io::Error) -> String {
    format!("this master's state cannot be written to memory for the new build: {}", sys::explain(error))
}

/// The progress of an upgrade.
#[derive(Default)]
pub(super) enum Upgrade {
    #[default]
    No,
    Checking(Check),
    /// The check has passed. The build in this file may be executed if the file has not changed since.
    Passed(FileIdentity),
}

/// The running check: a process of the new build.
pub(super) struct Check {
    pid: Pid,
    output: LineReader,
    open: bool,
    passed: bool,
    last_words: String,
    /// When to ask the check to exit or, after that, when to kill it. `None` after the check has been killed.
    deadline: Option<Instant>,
    /// Why the check was asked to exit, if it was. The check then exits without leaving anything behind.
    cut_short: Option<&'static str>,
    build: FileIdentity,
}

impl Check {
    /// Sends SIGTERM to the check. SIGKILL follows later.
    fn ask_to_end(&mut self, why: &'static str) {
        self.cut_short = Some(why);
        self.deadline = Some(Instant::now() + ABORT_STEPS);
        let _ = killpg(self.pid, Signal::SIGTERM);
    }

    fn listen(&mut self) {
        let password = password();
        let (passed, last_words) = (&mut self.passed, &mut self.last_words);
        self.open = self.output.read(MAX_REST, &mut |line, _| {
            // The line may begin with earlier output that did not end in a line feed.
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

    /// Returns the refusal for a check that has ended with `ending`.
    fn failure(self, ending: Ending) -> Refusal {
        let failed = "the new build failed its check";
        let why = match (self.cut_short, ending) {
            (Some(why), _) => format!("{failed}: {why}"),
            (None, Ending::Exited(0)) => format!("{failed}: it did not report that it can take over"),
            (None, Ending::Exited(_) | Ending::Signaled(_)) => failed.to_owned(),
        };
        Refusal { why, ending: Some(ending).filter(|_| self.cut_short.is_none()), output: self.last_words }
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

    /// Reads the check's output, and stops a check that takes too long. The check's death is handled like that of any other child.
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

    /// Handles the exit of the check.
    ///
    /// # Errors
    /// Returns the reason why no upgrade takes place if the check has failed.
    fn ended(&mut self, ending: Ending) -> Result<(), Refusal> {
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
    pub(super) fn refuse_upgrade(&mut self, refusal: impl Into<Refusal>) {
        let Refusal { why, ending, output } = refusal.into();
        let (status, signal) = (ending.and_then(Ending::exit_status), ending.and_then(Ending::signal_name));
        let said = Some(output.as_str()).filter(|output| !output.is_empty());
        let mut text = format!("cannot upgrade; nothing has changed: {why}");
        log::error!(status, signal, said; "{text}");
        let details = [
            status.map(|status| format!("exit status {status}")),
            signal.map(|signal| format!("signal {signal}")),
            said.map(|said| format!("output: {said:?}")),
        ];
        let details: Vec<String> = details.into_iter().flatten().collect();
        if !details.is_empty() {
            text = format!("{text} ({})", details.join(", "));
        }
        self.reply_to_waiting(Waiting::Upgrade, &ControlReply::failed(text));
    }

    pub(super) fn upgrade_check_ended(&mut self, ending: Ending) {
        if let Err(why) = self.upgrade.ended(ending) {
            self.refuse_upgrade(why);
        }
    }

    pub(super) fn begin_upgrade(&mut self) {
        if !matches!(self.upgrade, Upgrade::No) {
            log::warn!("ignored a request for an upgrade: an upgrade is already in progress");
            return;
        }
        if !self.start_command.directory.is_dir() {
            let directory = self.start_command.directory.display();
            let remedy = "create it again, or stop the server and start it in a different directory";
            let why =
                format!("the directory in which the server was started no longer exists: {directory:?} ({remedy})");
            return self.refuse_upgrade(why);
        }
        match self.start_check() {
            Ok(check) => {
                let program = self.start_command.program.display();
                log::info!(program:%, pid = check.pid.as_raw(); "upgrade: checking the new build");
                let text = format!("upgrade: checking {program}");
                self.reply_to_waiting(Waiting::Upgrade, &ControlReply::Progress { text });
                self.upgrade = Upgrade::Checking(check);
            }
            Err(why) => self.refuse_upgrade(why),
        }
    }

    /// # Errors
    /// Returns a message for the operator if the check cannot be started.
    fn start_check(&self) -> Result<Check, String> {
        let build = FileIdentity::of(&self.start_command.program).map_err(|error| self.cannot_start(&error))?;
        let saved = self.save().ok_or(STOPPING)?;
        let state = saved.write().map_err(|error| cannot_write(&error))?;
        let no_pipe =
            |error: io::Error| format!("cannot create a pipe for the check of the new build: {}", sys::explain(&error));
        let (output, write) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).map_err(|errno| no_pipe(errno.into()))?;
        let write = blocking(write).map_err(no_pipe)?;
        let mut arguments = self.start_command.arguments().into_iter();
        let mut command = Command::new(&self.start_command.program);
        command
            .arg0(arguments.next().unwrap_or_default())
            .args(arguments)
            .current_dir(&self.start_command.directory)
            .env(CHECK, "1")
            .env(STATE, state.as_raw_fd().to_string())
            .stdout(Stdio::from(write.try_clone().map_err(no_pipe)?))
            .stderr(Stdio::from(write));
        let pass = [&[state.as_raw_fd()], saved.foundation().as_slice()].concat();
        // The check keeps all privileges, because the new build must be able to replace this process.
        let child = sys::spawn(&mut command, &pass, || Ok(())).map_err(|error| self.cannot_start(&error))?;
        Ok(Check {
            pid: Pid::from_raw(child.id().cast_signed()),
            output: LineReader::new(output),
            open: true,
            passed: false,
            last_words: String::new(),
            deadline: Some(Instant::now() + self.pool.spawner.config.upgrade.timeout),
            cut_short: None,
            build,
        })
    }

    /// Returns the message for a check that could not be started. The message suggests a remedy only if the cause is
    /// the program rather than the machine.
    fn cannot_start(&self, error: &io::Error) -> String {
        let is_machine =
            matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::EAGAIN | libc::ENOMEM));
        let remedy = if is_machine { "" } else { " (put the new build there)" };
        format!("{} cannot be started: {}{remedy}", self.start_command.program.display(), sys::explain(error))
    }

    /// Becomes the new build, if that build has passed the check.
    pub(super) fn finish_upgrade(&mut self) {
        let Upgrade::Passed(build) = &self.upgrade else { return };
        let same = FileIdentity::of(&self.start_command.program).is_ok_and(|now| now == *build);
        self.upgrade = Upgrade::No;
        if !same {
            return self.refuse_upgrade(
                "the program's file was changed after its check (try again when the file is complete)",
            );
        }
        let program = self.start_command.program.display();
        log::info!(program:%; "upgrade: executing the new build");
        let text = format!("upgrade: executing {program}");
        self.reply_to_waiting(Waiting::Upgrade, &ControlReply::Progress { text });
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
