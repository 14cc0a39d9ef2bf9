//! Forks workers with their heritage, and starts external programs.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd, RawFd};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;

use forkyard_shm::Segment;
use nix::fcntl::OFlag;
use nix::sys::signal::Signal;
use nix::unistd::{Pid, pipe2, setpgid};

use super::apps::{AppState, Probe};
use super::child::{Child, Link};
use super::http_apps::expect_same_address;
use super::programs::ProgramState;
use super::ready_check::{EncodeReadyRequest, ReadyRequest};
use super::ready_descriptor::{self, Declaration};
use crate::app::hooks::{Hooks, WorkerHooks, WorkerId};
use crate::config::gateway::{Backend, GatewayConfig};
use crate::config::programs::ReadyBy;
use crate::config::{Config, Program};
use crate::inherited_by_workers::{Heritage, WorkerMain};
use crate::logging::files::LogFiles;
use crate::master::output::Output;
use crate::master::signals::SignalInbox;
use crate::master::{procfs, sd_notify};
use crate::net::app_channel::AppChannel;
use crate::net::app_endpoint::ListenOn;
use crate::net::handover::Channel;
use crate::net::listen::Listener;
use crate::net::publish_socket;
use crate::privileges::{self, Privileges};
use crate::startup::systemd;
use crate::upgrade::{self, Ties};
use crate::{heir, logging, sys};

/// Environment variables for the master only. They are not passed on.
pub(in crate::master) const OF_THE_MASTER: &[&[&str]] =
    &[&upgrade::VARIABLES, &sd_notify::VARIABLES, &systemd::VARIABLES];
/// The code that the processes run.
pub(crate) enum Launch {
    /// The application linked into this binary, in a fork of the master, with its hooks.
    Worker(WorkerMain, Hooks),
    /// An external program that accepts clients' connections from its standard input.
    Program(Program),
    /// An external program that accepts the connections of gateways, from a private socket.
    App(Program, Arc<AppChannel>, EncodeReadyRequest),
}

impl Launch {
    /// Whether each process executes a program.
    pub(crate) fn executes(&self) -> bool {
        match self {
            Self::Worker(..) => false,
            Self::Program(_) | Self::App(..) => true,
        }
    }
}

/// Settings of new processes that a reload may change.
#[derive(Clone, Debug)]
pub(crate) struct SpawnSettings {
    pub(crate) config: Arc<Config>,
    pub(super) privileges: Arc<Privileges>,
    /// The external program; `None` if the linked application runs.
    program: Option<Program>,
    pub(crate) log_files: Arc<LogFiles>,
    /// The path of the publish socket for programs.
    pub(crate) events: Option<PathBuf>,
}

impl SpawnSettings {
    /// Returns the signal that asks a process to exit.
    pub(super) fn stop_signal(&self) -> Signal {
        self.config.program.as_ref().map_or(Signal::SIGTERM, |program| program.stop_signal.0)
    }

    fn ready_by(&self) -> ReadyBy {
        self.config.program.as_ref().map(|program| program.ready_by).unwrap_or_default()
    }
}

/// The settings and resources for starting processes.
pub(crate) struct Spawner {
    /// The settings of the master itself: the latest configuration read.
    pub(crate) config: Arc<Config>,
    /// The settings of the serving processes.
    pub(crate) current: SpawnSettings,
    /// The settings read by a reload that has not begun.
    read: Option<SpawnSettings>,
    /// The settings of processes from this generation on, until the reload is done or has failed.
    next: Option<(u64, SpawnSettings)>,
    pub(crate) listeners: Arc<[Listener]>,
    pub(crate) segment: Segment,
    pub(crate) launch: Launch,
    pub(crate) handover: Arc<Channel>,
    /// Both ends of a pipe. When it closes, workers and heirs detect that the master is dead.
    lifeline: (OwnedFd, OwnedFd),
    application: Arc<[RawFd]>,
    worker_hooks: Arc<WorkerHooks>,
}

impl Spawner {
    /// Creates a spawner. `ties` connect the running workers of a former master to this master.
    ///
    /// # Errors
    /// Fails if no pipe is available, or if processes cannot have the configured privileges.
    pub(crate) fn new(
        config: Arc<Config>,
        listeners: Arc<[Listener]>,
        segment: Segment,
        mut launch: Launch,
        application: Arc<[RawFd]>,
        log_files: Arc<LogFiles>,
        ties: Ties,
    ) -> io::Result<Self> {
        let lifeline = match ties.lifeline {
            Some(left) => left,
            None => pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?,
        };
        let handover = Arc::new(ties.handover.map_or_else(Channel::open, Ok)?);
        let privileges = Privileges::resolve(&config.privileges, launch.executes()).map_err(io::Error::other)?;
        if let (Launch::Worker(..), Some(error)) = (&launch, heir::obstacle()) {
            log::warn!(
                "workers have no heirs, so a worker's death resets its connections: pidfd_open(2) is not available: {error} \
                 (it requires Linux 5.3, and a container's seccomp profile must allow it)"
            );
        }
        let (worker_hooks, program) = match &mut launch {
            Launch::Worker(_, hooks) => (Arc::new(std::mem::take(&mut hooks.of_worker)), None),
            Launch::Program(program) | Launch::App(program, ..) => (Arc::default(), Some(program.clone())),
        };
        let privileges = Arc::new(privileges);
        let current = SpawnSettings { config: Arc::clone(&config), privileges, program, log_files, events: None };
        Ok(Self {
            config,
            current,
            read: None,
            next: None,
            listeners,
            segment,
            launch,
            handover,
            lifeline,
            application,
            worker_hooks,
        })
    }

    /// Returns the settings of processes for a new configuration, and for a new program if `program` is set.
    ///
    /// # Errors
    /// Returns a message for the operator if processes cannot have the configured privileges.
    pub(crate) fn prepare(&self, config: &Arc<Config>, program: Option<Program>) -> Result<SpawnSettings, String> {
        if let (Launch::App(first, ..), Some(program)) = (&self.launch, &program) {
            expect_same_address(config, first, program)?;
        }
        Ok(SpawnSettings {
            config: Arc::clone(config),
            privileges: Arc::new(Privileges::resolve(&config.privileges, self.launch.executes())?),
            program: program.or_else(|| self.current.program.clone()),
            log_files: self.current.log_files.reconfigured(&config.logs)?,
            events: None,
        })
    }

    /// Stores the settings of a reload that is about to begin.
    pub(crate) fn adopt(&mut self, settings: SpawnSettings) {
        self.config = Arc::clone(&settings.config);
        self.read = Some(settings);
    }

    /// Begins a reload: from this generation on, processes use the stored settings. Processes of older generations, and
    /// their replacements, use the old settings. Returns true if there are stored settings.
    pub(crate) fn begin(&mut self, generation: u64) -> bool {
        let Some(settings) = self.read.take() else { return false };
        self.next = Some((generation, settings));
        true
    }

    /// Ends a reload successfully. Returns the old settings, if they have been replaced.
    pub(crate) fn finish(&mut self) -> Option<SpawnSettings> {
        let (_, settings) = self.next.take()?;
        Some(std::mem::replace(&mut self.current, settings))
    }

    /// Ends a failed reload. Returns the settings that the reload tried.
    pub(crate) fn give_up(&mut self) -> Option<SpawnSettings> {
        self.next.take().map(|(_, settings)| settings)
    }

    /// Discards the settings of a reload that will not begin.
    pub(crate) fn forget_read(&mut self) {
        self.read = None;
    }

    /// Returns the settings of a generation.
    fn settings(&self, generation: u64) -> &SpawnSettings {
        self.next.as_ref().filter(|(from, _)| generation >= *from).map_or(&self.current, |(_, settings)| settings)
    }

    /// Returns all settings for new processes, the newest last.
    pub(crate) fn in_use(&self) -> impl Iterator<Item = &SpawnSettings> {
        [&self.current].into_iter().chain(self.next.as_ref().map(|(_, settings)| settings)).chain(&self.read)
    }

    /// Returns the descriptors of both ends of the lifeline.
    pub(crate) fn lifeline(&self) -> (RawFd, RawFd) {
        (self.lifeline.0.as_raw_fd(), self.lifeline.1.as_raw_fd())
    }

    /// Closes the lifeline, so that the heirs of the last workers behave as if the master were dead.
    pub(crate) fn end_lifeline(&mut self) {
        // If no pipe is available, the old one stays open, and the heirs take a little longer.
        if let Ok(pipe) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK) {
            self.lifeline = pipe;
        }
    }

    /// Returns a descriptor that takes the place of closed sockets.
    pub(crate) fn stand_in(&self) -> &OwnedFd {
        &self.lifeline.0
    }

    /// Starts a process for `slot`.
    ///
    /// # Errors
    /// Fails if no pipe is available, or if fork or exec fails.
    pub(crate) fn spawn(&self, slot: u32, generation: u64, signals: &SignalInbox) -> io::Result<(Pid, Child)> {
        let (read, write) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
        // O_NONBLOCK is set for each end separately, and the process's end must block.
        let write = blocking(write)?;
        let settings = self.settings(generation);
        let mut declaration = None;
        let (pid, link, files) = match &self.launch {
            Launch::Worker(main, hooks) => {
                hooks.of_master.before_fork(WorkerId { slot, generation })?;
                self.fork_worker(main, settings, slot, generation, signals, write)?
            }
            Launch::Program(first) => {
                let program = settings.program.as_ref().unwrap_or(first);
                let socket = self.listeners[0].duplicate()?;
                let ready = (settings.ready_by() == ReadyBy::Descriptor).then(Declaration::expect).transpose()?;
                let (expected, ready) = ready.unzip();
                declaration = expected;
                let output = (write, read.as_fd());
                let pid = self.start_program(program, settings, (slot, generation), socket, ready, output)?;
                (pid, Link::Program(ProgramState::default()), None)
            }
            Launch::App(first, channel, encode) => {
                let program = settings.program.as_ref().unwrap_or(first);
                let request = ReadyRequest::of(&settings.config, *encode).map_err(io::Error::other)?;
                let (listen, probe) = channel.prepare(slot)?;
                let output = (write, read.as_fd());
                let pid = match (settings.config.backend(), listen) {
                    (Backend::Fastcgi, ListenOn::Socket(socket)) => {
                        self.start_program(program, settings, (slot, generation), socket, None, output)?
                    }
                    (Backend::Cgi, ListenOn::Socket(socket)) => {
                        self.start_cgi_runner(program, settings, (slot, generation), signals, socket, output.0)?
                    }
                    (Backend::Fastcgi | Backend::Http | Backend::Scgi | Backend::Cgi, listen) => {
                        self.start_http_app(program, settings, slot, generation, listen, output)?
                    }
                };
                let state = AppState::new(Some(Probe::new(probe)), request, settings.config.scaling.max_requests);
                (pid, Link::App(state), None)
            }
        };
        let output = Some(Output::new(slot, read));
        let log_files = Some(Arc::clone(&settings.log_files));
        let stop_signal = settings.stop_signal();
        Ok((pid, Child { output, files, log_files, stop_signal, declaration, ..Child::new(slot, generation, link) }))
    }

    fn fork_worker(
        &self,
        main: &WorkerMain,
        settings: &SpawnSettings,
        slot: u32,
        generation: u64,
        signals: &SignalInbox,
        output: OwnedFd,
    ) -> io::Result<(Pid, Link, Option<OwnedFd>)> {
        let (masters, files) = settings.log_files.channel()?.unzip();
        let (read, report) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
        let heritage = Heritage {
            slot,
            generation,
            master: nix::unistd::getpid(),
            config: Arc::clone(&settings.config),
            listeners: Arc::clone(&self.listeners),
            segment: self.segment.clone(),
            report,
            handover: Arc::clone(&self.handover),
            lifeline: self.lifeline.0.try_clone()?,
            application: Arc::clone(&self.application),
            privileges: Arc::clone(&settings.privileges),
            log_files: Arc::clone(&settings.log_files),
            files,
            hooks: Arc::clone(&self.worker_hooks),
        };
        let pid = sys::fork(|| {
            signals.leave();
            logging::begin_worker(&heritage.config.logs);
            if [1, 2].into_iter().try_for_each(|fd| sys::replace(fd, &output)).is_err() {
                return 1;
            }
            let keep = [&[0, 1, 2], heritage.descriptors().as_slice()].concat();
            sys::close_all_except(&keep);
            sys::forget_environment(OF_THE_MASTER);
            // The worker has its own group, so that Ctrl-C at a terminal reaches only the master.
            let grouped = setpgid(Pid::from_raw(0), Pid::from_raw(0));
            if let Err(error) = heritage.apply_privileges() {
                return heritage.fail(&error);
            }
            if let Some(socket) = &settings.events {
                sys::set_environment(publish_socket::VARIABLE, socket);
            }
            // This must come after the privileges are dropped, because the kernel resets the parent-death signal when
            // the user changes.
            if grouped.is_err() || sys::die_with_parent(heritage.master).is_err() {
                return 1;
            }
            main(heritage)
        })?;
        let (report, last_words, trace) = (File::from(read), String::new(), String::new());
        Ok((pid, Link::Worker { report, open: true, unread: Vec::new(), last_words, trace }, masters))
    }

    fn start_program(
        &self,
        program: &Program,
        settings: &SpawnSettings,
        (slot, generation): (u32, u64),
        socket: OwnedFd,
        ready: Option<OwnedFd>,
        (write, read): (OwnedFd, BorrowedFd<'_>),
    ) -> io::Result<Pid> {
        let segment = to_pass(&self.segment)?;
        let mut command = self.command(program, settings, (slot, generation), &segment, write)?;
        command.args(&program.arguments).stdin(Stdio::from(socket));
        let mut pass = vec![segment.as_raw_fd()];
        if let Some(ready) = &ready {
            command.env(ready_descriptor::VARIABLE, ready.as_raw_fd().to_string());
            pass.push(ready.as_raw_fd());
        }
        let steps = settings.privileges.steps(slot).map_err(io::Error::other)?;
        let prepare = move || privileges::carry_out_before_exec(&steps);
        let child = sys::spawn(&mut command, &pass, prepare)
            .map_err(|error| explain(&error, read, &settings.privileges, program))?;
        Ok(Pid::from_raw(i32::try_from(child.id()).map_err(io::Error::other)?))
    }

    /// Returns the command of a program, without its arguments and its standard input.
    pub(super) fn command(
        &self,
        program: &Program,
        settings: &SpawnSettings,
        (slot, generation): (u32, u64),
        segment: &OwnedFd,
        write: OwnedFd,
    ) -> io::Result<Command> {
        let mut command = Command::new(&program.path);
        settings.privileges.set_environment(&mut command);
        command
            .env("FORKYARD_SLOT", slot.to_string())
            .env("FORKYARD_GENERATION", generation.to_string())
            .env_remove(ready_descriptor::VARIABLE)
            .env("FORKYARD_SHM", segment.as_raw_fd().to_string())
            .envs(settings.events.iter().map(|socket| (publish_socket::VARIABLE, socket)))
            .stdout(Stdio::from(write.try_clone()?))
            .stderr(Stdio::from(write));
        set_php_variables(&mut command, &settings.config);
        for name in OF_THE_MASTER.iter().copied().flatten() {
            command.env_remove(name);
        }
        std::os::unix::process::CommandExt::arg0(&mut command, &program.name);
        Ok(command)
    }
}

/// Sets the variables of php-cgi that `--env` does not set.
fn set_php_variables(command: &mut Command, config: &Config) {
    let is_given = |name: &str| config.privileges.variables.iter().any(|variable| variable.name == name);
    let php = config.gateway.as_ref().and_then(|gateway| gateway.php);
    if !is_given(GatewayConfig::PHP_CHILDREN) {
        // Without gateways, the master would not supervise the children.
        let children = php.and_then(|php| php.number).unwrap_or(0);
        command.env(GatewayConfig::PHP_CHILDREN, children.to_string());
    }
    if let Some(limit) = php.and_then(|php| php.max_requests).filter(|_| !is_given(GatewayConfig::PHP_MAX_REQUESTS)) {
        command.env(GatewayConfig::PHP_MAX_REQUESTS, limit.to_string());
    }
}

/// Returns the reason why a program did not start. The step that failed has written the flag that requested it to the
/// output.
pub(in crate::master) fn explain(
    error: &io::Error,
    output: BorrowedFd<'_>,
    privileges: &Privileges,
    program: &Program,
) -> io::Error {
    let mut flag = [0; 64];
    let read = nix::unistd::read(output, &mut flag).unwrap_or(0);
    let flag = String::from_utf8_lossy(&flag[..read]);
    io::Error::other(match flag.trim_end() {
        "" => privileges.explain_exec(error, program),
        flag => format!("{flag}: {}", sys::explain(error)),
    })
}

/// Returns the memory for a process that may outlive the workers. The descriptor does not hold the workers' lock on the
/// file, because the next server needs that lock.
pub(in crate::master) fn to_pass(segment: &Segment) -> io::Result<OwnedFd> {
    segment.fd_without_lock().or_else(|error| {
        log::debug!("programs share the cache file's lock: cannot open the file a second time: {error}");
        segment.fd().try_clone_to_owned()
    })
}

pub(in crate::master) fn blocking(pipe: OwnedFd) -> io::Result<OwnedFd> {
    use nix::fcntl::{FcntlArg, fcntl};
    fcntl(&pipe, FcntlArg::F_SETFL(OFlag::empty()))?;
    Ok(pipe)
}

/// Whether any heir of a dead worker is still running. Such heirs are now children of this process.
pub(in crate::master) fn has_heirs() -> bool {
    procfs::own_children().into_iter().any(|pid| procfs::stat(pid).is_some_and(|stat| stat.is_heir()))
}
