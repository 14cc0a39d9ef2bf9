//! Turns a command line into a running master. [`crate::run`] and the `forkyard` command share this code.

use std::cell::RefCell;
use std::io;
use std::os::fd::{OwnedFd, RawFd};
use std::process::ExitCode;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use forkyard_shm::{Plan, Segment};
use http::{Request as HttpRequest, Response};
use http_body::Body as HttpBody;
use log::Level;
use nix::sys::signal::SigSet;
use signal_hook::consts::signal::SIGXFSZ;
use tower_service::Service;

use crate::app::body::Body;
use crate::app::context::Context;
use crate::app::hooks::{Hooks, WorkerExit, WorkerId};
use crate::cli::check::Findings;
use crate::cli::{self, AppInfo, Invocation, ServeRequest, Task};
use crate::config::address::Address;
use crate::config::control::{Reserved, reloaded};
use crate::config::gateway::{GatewayConfig, ListenMethod};
use crate::config::{CacheConfig, Config, Program};
use crate::inherited_by_workers::WorkerMain;
use crate::logging::files::LogFiles;
use crate::master::{
    self, Application, Control, EarlierChildren, Launch, Operators, Reloaded, Reread, SignalInbox, Start, StopReason,
};
use crate::net::app_channel::AppChannel;
use crate::net::app_endpoint::AppEndpoint;
use crate::net::control_listener::ControlListener;
use crate::net::listen::Listener;
use crate::net::publish_socket::PublishSocket;
use crate::privileges::Privileges;
use crate::startup::abort::{self, Leftover};
use crate::startup::cgi_invocation;
use crate::startup::conflicts::{self, Conflict};
use crate::startup::pid_file::PidFile;
use crate::startup::{banner, descriptor_limit, memory, rlimits, sockets};
use crate::sys::BoxError;
use crate::upgrade::{StartCommand, Takeover};
use crate::{control, gateway, logging, sys, worker};

/// Answers one CGI request, and writes the response to the given descriptor.
type CgiMain = Box<dyn Fn(&Config, Segment, OwnedFd) -> Result<(), BoxError>>;
/// Reads the command line and the configuration file.
type Parse = Box<dyn Fn() -> Result<Invocation, clap::Error>>;
type Preload = Box<dyn FnOnce() -> Result<(), BoxError>>;

/// Configures an application before it is served: like [`crate::run`], with hooks and further
/// settings.
///
/// ```no_run
/// use std::process::ExitCode;
/// use forkyard::http::{Request, Response};
///
/// fn main() -> ExitCode {
///     forkyard::Builder::app(|cx| {
///         let slot = cx.slot();
///         forkyard::blocking(move |_: Request<forkyard::Body>| Response::new(format!("worker {slot}\n")))
///     })
///     .preload(|| Ok(()))
///     .run()
/// }
/// ```
#[must_use = "nothing is served before `run`"]
pub struct Builder {
    worker: WorkerMain,
    cgi: CgiMain,
    preload: Option<Preload>,
    hooks: Hooks,
    app_info: AppInfo,
}

impl std::fmt::Debug for Builder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Builder").field("preload", &self.preload.is_some()).finish_non_exhaustive()
    }
}

impl Builder {
    /// Creates a builder for the application that `factory` returns.
    ///
    /// `factory` runs once in each worker, after the fork, inside the worker's tokio runtime. Start threads, open
    /// database connections, and create anything else that does not survive a fork there.
    ///
    /// The application is any tower service: an `axum::Router`, or the service that [`crate::blocking`] makes from a
    /// function.
    pub fn app<F, S, B>(factory: F) -> Self
    where
        F: Fn(Context) -> S + Sync + 'static,
        S: Service<HttpRequest<Body>, Response = Response<B>, Error: Into<BoxError>> + Clone + 'static,
        B: HttpBody<Error: Into<BoxError>> + 'static,
    {
        let factory = Rc::new(factory);
        let of_cgi = Rc::clone(&factory);
        Self {
            worker: Box::new(move |heritage| worker::run(&*factory, heritage)),
            cgi: Box::new(move |config, segment, output| worker::conn::cgi::run(&*of_cgi, config, segment, output)),
            preload: None,
            hooks: Hooks::default(),
            app_info: AppInfo::default(),
        }
    }

    /// Sets the application's version, which `--version` prints after the name of the binary, for example
    /// `env!("CARGO_PKG_VERSION")`.
    ///
    /// Without it, `--version` prints the name alone. Forkyard's own version is in the startup banner and in `status`.
    ///
    /// ```no_run
    /// # use forkyard::http::{Request, Response};
    /// # fn main() -> std::process::ExitCode {
    /// # let answer = |_: Request<forkyard::Body>| Response::new("");
    /// forkyard::Builder::app(move |_cx| forkyard::blocking(answer))
    ///     .version(env!("CARGO_PKG_VERSION"))
    ///     .about("Takes orders for coffee")
    ///     .run()
    /// # }
    /// ```
    pub fn version(mut self, version: impl Into<String>) -> Self {
        self.app_info.version = Some(version.into());
        self
    }

    /// Sets the one-sentence description of the application that `--help` prints.
    pub fn about(mut self, about: impl Into<String>) -> Self {
        self.app_info.about = Some(about.into());
        self
    }

    /// Runs `load` once in the master, before the first fork.
    ///
    /// All workers share, copy-on-write, the data that `load` stores in memory (in statics, for example). Files that
    /// `load` opens stay open in the workers, as do files opened by `main`.
    ///
    /// `load` must leave no thread running and must not use tokio: neither threads nor a tokio runtime survive a fork,
    /// and the master refuses to fork while it has more than one thread.
    pub fn preload(mut self, load: impl FnOnce() -> Result<(), BoxError> + 'static) -> Self {
        self.preload = Some(Box::new(load));
        self
    }

    /// Runs `hook` in the master before each worker is forked, on the master's only thread.
    ///
    /// Use the hook to refresh data that all later workers share. The hook must not block, because nothing is
    /// supervised while it runs. As with [`preload`](Self::preload), it must leave no thread running. Descriptors that
    /// the hook opens are closed in the workers.
    ///
    /// If the hook returns an error or panics, that worker is not created. The master logs the reason and tries again
    /// after a delay.
    ///
    /// ```no_run
    /// # use forkyard::http::{Request, Response};
    /// # fn main() -> std::process::ExitCode {
    /// # let answer = |_: Request<forkyard::Body>| Response::new("");
    /// forkyard::Builder::app(move |_cx| forkyard::blocking(answer))
    ///     .before_fork(|worker| Ok(log::debug!("about to fork a worker for slot {}", worker.slot)))
    ///     .after_fork(|_worker| Ok(std::env::set_current_dir("data")?))
    ///     .on_ready(|_worker| Ok(std::fs::write("ready", "")?))
    ///     .on_drain(|worker, within| log::info!("{worker:?} has {within:?} left"))
    ///     .on_exit(|_worker| drop(std::fs::remove_file("ready")))
    ///     .on_worker_exit(|exit| log::info!("pid {} served {}: {}", exit.pid, exit.served, exit.status))
    ///     .run()
    /// # }
    /// ```
    pub fn before_fork(mut self, hook: impl FnMut(WorkerId) -> Result<(), BoxError> + 'static) -> Self {
        self.hooks.of_master.before_fork = Some(RefCell::new(Box::new(hook)));
        self
    }

    /// Runs `hook` in each worker after the fork, once the worker has dropped its privileges and before its event loop
    /// and the factory start.
    ///
    /// If the hook returns an error or panics, the worker exits; this counts as a failed start.
    pub fn after_fork(mut self, hook: impl Fn(WorkerId) -> Result<(), BoxError> + Send + Sync + 'static) -> Self {
        self.hooks.of_worker.after_fork = Some(Box::new(hook));
        self
    }

    /// Runs `hook` in each worker that can serve (the factory and the request to `--health-path` have succeeded), just
    /// before the worker reports to the master that it is ready.
    ///
    /// The hook runs on the event loop: nothing is served until the hook returns, and a worker that is not ready within
    /// `--start-timeout` is killed. If the hook returns an error or panics, the worker exits; this counts as a failed
    /// start.
    pub fn on_ready(mut self, hook: impl Fn(WorkerId) -> Result<(), BoxError> + Send + Sync + 'static) -> Self {
        self.hooks.of_worker.on_ready = Some(Box::new(hook));
        self
    }

    /// Runs `hook` in a worker that has been asked to exit. The second argument of `hook` is the time within which the
    /// worker must drain (`--drain-timeout`).
    ///
    /// By then, [`Context::draining`] returns true. The hook runs on the event loop, and nothing is served until the
    /// hook returns: use this hook to ask threads to stop, and [`on_exit`](Self::on_exit) to wait for the threads. A
    /// panic is logged.
    pub fn on_drain(mut self, hook: impl Fn(WorkerId, Duration) + Send + Sync + 'static) -> Self {
        self.hooks.of_worker.on_drain = Some(Box::new(move |(worker, within)| hook(worker, within)));
        self
    }

    /// Runs `hook` in a worker that has drained, as the last step before the worker exits: all requests have been
    /// answered, and the event loop has stopped.
    ///
    /// The hook may take the time that remains of `--drain-timeout`. It does not run in a worker that crashes, is
    /// killed, or fails to start. A panic is logged.
    pub fn on_exit(mut self, hook: impl Fn(WorkerId) + Send + Sync + 'static) -> Self {
        self.hooks.of_worker.on_exit = Some(Box::new(hook));
        self
    }

    /// Runs `hook` in the master each time a worker has exited or was killed, before a new worker takes its place.
    ///
    /// The hook must not block, because no process is supervised while it runs. A panic is logged.
    pub fn on_worker_exit(mut self, hook: impl FnMut(WorkerExit) + 'static) -> Self {
        self.hooks.of_master.on_worker_exit = Some(RefCell::new(Box::new(hook)));
        self
    }

    /// Reads this program's command line and serves until the server is asked to stop.
    ///
    /// If a web server has started the program as a CGI program, answers that single CGI request in this process
    /// instead.
    ///
    /// Returns 0 after a requested shutdown or an answered CGI request, 1 after a failure, and 2 if the command line is
    /// invalid. Error messages go to standard error.
    pub fn run(self) -> ExitCode {
        let begun = Instant::now();
        // From here on, signals are blocked until their handlers are installed: if this process has pid 1, the kernel
        // discards signals that have no handler.
        let mask = sys::block_signals();
        let Self { worker, cgi, preload, hooks, app_info } = self;
        let arguments = cgi_invocation::trusted(std::env::args_os().collect());
        let parse: Parse = Box::new(move || cli::parse_linked(&arguments, &app_info));
        finish(parse(), &mask, |request| {
            if request.cgi {
                sys::restore_signals(&mask);
                return answer(&request.config, &cgi, preload);
            }
            serve(*request, Launch::Worker(worker, hooks), preload, begun, parse)
        })
    }
}

/// Runs the `forkyard` command, which serves programs in any language: `forkyard run … -- COMMAND`.
#[must_use]
pub fn command_line() -> ExitCode {
    let begun = Instant::now();
    let mask = sys::block_signals(); // for the same reason as in `Builder::run`
    let parse: Parse = Box::new(|| cli::parse_forkyard(&std::env::args_os().collect::<Vec<_>>()));
    finish(parse(), &mask, |request| {
        let command = request.program.as_ref().ok_or("no COMMAND")?;
        let program = Program::for_privileges(command, &request.config.privileges)?;
        serve(*request, Launch::Program(program), None, begun, parse)
    })
}

fn finish(
    invocation: Result<Invocation, clap::Error>,
    mask: &SigSet,
    serve: impl FnOnce(Box<ServeRequest>) -> Result<StopReason, BoxError>,
) -> ExitCode {
    if !matches!(invocation, Ok(Invocation::Serve(_))) {
        sys::restore_signals(mask);
    }
    let request = match invocation {
        Ok(Invocation::Serve(request)) => request,
        Ok(Invocation::Check { request, mistakes }) => return check(&request, mistakes),
        Ok(Invocation::Broken { mistakes }) => {
            mistakes.iter().for_each(|mistake| banner::complain(mistake));
            return ExitCode::from(2);
        }
        Ok(Invocation::Task(task)) => return perform(&task),
        Err(error) => {
            // clap also returns the text of --help and --version as an error, with exit status 0.
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    match serve(request) {
        Ok(StopReason::Asked) => ExitCode::SUCCESS,
        Ok(StopReason::Retired) => {
            banner::complain(&"every worker asked not to be replaced (exit status 125)");
            ExitCode::FAILURE
        }
        Ok(StopReason::NeverReady) => {
            banner::complain(&"no worker ever became ready (see the log for why, and --give-up-after)");
            ExitCode::FAILURE
        }
        Err(error) => {
            match error.downcast_ref::<io::Error>() {
                Some(error) => banner::complain(&sys::explain(error)),
                None => banner::complain(&error),
            }
            ExitCode::FAILURE
        }
    }
}

/// Reports the problems that would prevent serving.
fn check(request: &ServeRequest, mistakes: Vec<String>) -> ExitCode {
    let Findings { errors, warnings } = cli::check::examine(request, mistakes);
    errors.iter().for_each(|line| banner::report(Level::Error, line));
    warnings.iter().for_each(|line| banner::report(Level::Warn, line));
    if !errors.is_empty() {
        return ExitCode::FAILURE;
    }
    perform(&Task::Print(b"configuration is fine\n".to_vec()))
}

/// Performs a task other than serving.
fn perform(task: &Task) -> ExitCode {
    use std::io::Write as _;
    let done = match task {
        Task::Control(task) => control::commands::run(task),
        Task::Print(text) => control::commands::printed(std::io::stdout().write_all(text)),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            banner::complain(&why);
            ExitCode::FAILURE
        }
    }
}

/// Returns a function that rereads the configuration file of a running master, by parsing the
/// command line again.
fn reread(running: &Config, channel: Option<&AppChannel>, parse: Parse) -> Reread {
    if running.control.file.is_none() {
        return Box::new(|_| Ok(None));
    }
    let reserved = Reserved {
        workers: running.slots(),
        gateways: running.of_gateways().slots(),
        units: channel.map_or(0, AppChannel::units),
    };
    Box::new(move |running| match parse() {
        Ok(Invocation::Serve(request)) => {
            let (config, fixed) = reloaded(running, request.config, reserved);
            let unusable = config.gateway.as_ref().map(GatewayConfig::examine).unwrap_or_default();
            if !unusable.is_empty() {
                return Err(unusable.join("; "));
            }
            let program = request.program.map(|command| Program::for_privileges(&command, &config.privileges));
            Ok(Some(Reloaded { config, program: program.transpose()?, fixed }))
        }
        Ok(Invocation::Broken { mistakes, .. }) => Err(mistakes.join("; ")),
        Ok(Invocation::Check { .. } | Invocation::Task(_)) => Ok(None),
        Err(error) => Err(error.to_string().trim().replace('\n', " ")),
    })
}

/// Binds the sockets, maps the memory, runs the preload, and forks and supervises the workers. If a running master is
/// checking whether this build can replace it, takes only the steps before the first fork.
fn serve(
    request: ServeRequest,
    launch: Launch,
    preload: Option<Preload>,
    begun: Instant,
    parse: Parse,
) -> Result<StopReason, BoxError> {
    let ServeRequest { config, .. } = request;
    let front = config.of_gateways();
    let opened = sys::own_descriptors()?;
    let earlier = EarlierChildren::record();
    let signals = SignalInbox::open()?;
    start_log(&config, &conflicts::find(&config))?;
    let mut takeover = Takeover::find()?;
    takeover.as_ref().map_or(Ok(()), |left| left.check_apps(&config))?;
    let start_command =
        takeover.as_ref().map_or_else(StartCommand::record, |left| Ok(left.saved.start_command.clone()))?;
    let log_files = Arc::new(LogFiles::open(&config.logs)?);
    let executes = launch.executes();
    let blocking = executes && config.gateway.is_none();
    check_settings(&config, executes)?;
    let pid_file = PidFile::open(config.privileges.pid_file.as_deref(), takeover.as_mut())?;
    let mut listeners: Vec<Listener> = Vec::new();
    let (mut control, mut publish) = (None, None);
    let outcome = sockets::open(&config, blocking, takeover.as_mut(), &mut listeners)
        .and_then(|()| {
            control = sockets::open_control(&config, takeover.as_mut())?;
            publish = sockets::open_publish(&config, takeover.as_mut())?;
            memory::open(&front, takeover.as_mut())
        })
        .and_then(|segment| {
            // After a takeover, a signal must not terminate this process during the preload: the event loop handles the
            // signal later, and lets the former master's workers finish their requests.
            let may_end = takeover.as_ref().is_none_or(|left| left.check);
            let made = || leftovers(&listeners, pid_file.as_ref(), control.as_ref(), publish.as_ref());
            Ok((segment, run_preload(preload, may_end.then(made))?))
        })
        .and_then(|pair| Ok(sys::expect_one_thread().map(|()| pair)?));
    let is_check = takeover.as_ref().is_some_and(|left| left.check);
    let asked_to_end = signals.asks_for_end();
    if is_check || (asked_to_end && takeover.is_none()) {
        // If this is a check, the running master still uses the adopted sockets.
        listeners.iter().filter(|listener| !listener.is_adopted()).for_each(Listener::remove_file);
        pid_file.into_iter().for_each(PidFile::remove);
        return outcome.and_then(|(segment, _)| end_early(segment, is_check, asked_to_end));
    }
    let listeners: Arc<[Listener]> = listeners.into();
    let outcome = outcome.and_then(|(segment, preloaded)| {
        if takeover.is_none() {
            show(&config, &listeners, &launch);
        }
        if let Some(warning) = config.privileges.of_root() {
            log::warn!("{warning}");
        }
        for contradiction in config.contradictions(config.most_descriptors()) {
            log::warn!("{contradiction}");
        }
        let application = application(&config, &front, launch, [opened, preloaded].concat(), takeover.as_mut())?;
        let kept = segment.clone();
        let operators = Operators {
            reread: reread(&config, application.channel(), parse),
            control: control.take().map(|listener| Control::new(Some(listener))),
            publish: publish.take(),
            log_files,
            pid_file: pid_file.as_ref().map(PidFile::saved),
        };
        let start = Start { begun, signals, start_command, earlier, takeover };
        let ended = master::run(Arc::new(front), Arc::clone(&listeners), segment, application, start, operators);
        if ended.is_err() {
            memory::close(kept);
        }
        ended.map_err(|error| format!("the master cannot run: {}", sys::explain(&error)).into())
    });
    listeners.iter().for_each(Listener::remove_file);
    pid_file.into_iter().for_each(PidFile::remove);
    // Dropping the control socket notifies clients that wait for this master to exit. All files of this master have
    // been removed by then.
    let (ended, control) = outcome?;
    drop(control);
    Ok(ended)
}

/// Checks the settings before anything is created, so that an impossible setting fails immediately. `executes` is true if
/// the processes execute a program.
fn check_settings(config: &Config, executes: bool) -> Result<(), BoxError> {
    Privileges::resolve(&config.privileges, executes)?;
    rlimits::check(config, executes)?;
    master::check_sidecars(config)?;
    let unusable = config.gateway.as_ref().map(GatewayConfig::examine).unwrap_or_default();
    if !unusable.is_empty() {
        return Err(unusable.join("; ").into());
    }
    Ok(descriptor_limit::ensure(config, executes)?)
}

/// Returns what the processes run. If there are gateways, creates the channel between them and the app processes.
/// `descriptors` are those that the application opened.
fn application(
    config: &Config,
    front: &Config,
    launch: Launch,
    mut descriptors: Vec<RawFd>,
    takeover: Option<&mut Takeover>,
) -> Result<Application, String> {
    let (gateway, program) = match (&config.gateway, launch) {
        (Some(gateway), Launch::Program(program)) => (gateway, program),
        (_, launch) => return Ok(Application { launch, apps: None, descriptors: descriptors.into() }),
    };
    let method = ListenMethod::of_command(gateway.backend, &program.arguments)?;
    let create = || {
        let owner = config.privileges.owner_of_files();
        let endpoint = || AppEndpoint::create(method, &gateway.temp_dir, owner);
        AppChannel::create(config.slots(), gateway.units(), front.slots(), endpoint).map_err(|error| {
            let directory = gateway.temp_dir.display();
            format!("cannot create the private sockets of app processes in {directory}: {error} (see --temp-dir)")
        })
    };
    let left = takeover.map(Takeover::channel).transpose()?.flatten();
    let channel = Arc::new(left.map_or_else(create, Ok)?);
    descriptors.extend(channel.descriptors());
    let of_gateways = Arc::clone(&channel);
    let gateways: WorkerMain = Box::new(move |heritage| match gateway::factory(&of_gateways, &heritage) {
        Ok(factory) => worker::run(&factory, heritage),
        Err(error) => heritage.fail(&error),
    });
    Ok(Application {
        launch: Launch::Worker(gateways, Hooks::default()),
        apps: Some((Arc::new(config.clone()), Launch::App(program, channel, gateway::ready_request::encode))),
        descriptors: descriptors.into(),
    })
}

/// Opens the log, unless a different setting names the same file.
fn start_log(config: &Config, conflicts: &[Conflict]) -> Result<(), BoxError> {
    // With this handler, a write above the file size limit fails like a write to a full disk. The handler is empty
    // rather than `SIG_IGN`, because programs would inherit `SIG_IGN`.
    signal_hook::flag::register(SIGXFSZ, Arc::default())?;
    if !conflicts.iter().any(|conflict| conflict.flags.contains(&"--log-file")) {
        logging::start(&config.logs)?;
    }
    if conflicts.is_empty() { Ok(()) } else { Err(Conflict::join(conflicts).into()) }
}

/// Ends startup without serving, because this process only checked its build, or because the server was asked to stop.
fn end_early(segment: Segment, is_check: bool, asked_to_end: bool) -> Result<StopReason, BoxError> {
    match (is_check, asked_to_end) {
        (true, true) => return Err("it received a signal to stop".into()),
        (true, false) => drop(banner::can_take_over()),
        (false, _) => {
            log::info!("received a signal to stop before the server was ready");
            memory::close(segment);
        }
    }
    Ok(StopReason::Asked)
}

fn show(config: &Config, listeners: &[Listener], launch: &Launch) {
    let program = match launch {
        Launch::Program(program) | Launch::App(program, ..) => Some(program.path.to_string_lossy().into_owned()),
        Launch::Worker(..) => None,
    };
    banner::show(config, listeners, program.as_deref());
}

/// Returns the files that this startup has created.
fn leftovers(
    listeners: &[Listener],
    pid_file: Option<&PidFile>,
    control: Option<&ControlListener>,
    publish: Option<&PublishSocket>,
) -> Vec<Leftover> {
    let made = listeners.iter().filter(|listener| !listener.is_adopted());
    let sockets = made.filter_map(|listener| match &listener.address {
        Address::Path(path) => Leftover::file(path, listener.file()?),
        Address::Tcp(_) | Address::Abstract(_) | Address::Inherited(_) | Address::Systemd(_) => None,
    });
    let control = control.and_then(|control| Leftover::file(control.path(), control.file()?));
    let publish = publish.into_iter().flat_map(|publish| {
        let file = publish.file().and_then(|file| Leftover::file(publish.path(), file));
        file.into_iter().chain(publish.own_directory().and_then(Leftover::directory))
    });
    let pid_file = pid_file.and_then(|pid_file| pid_file.leftover());
    sockets.chain(control).chain(publish).chain(pid_file).collect()
}

/// Answers the request of a CGI process.
fn answer(config: &Config, cgi: &CgiMain, preload: Option<Preload>) -> Result<StopReason, BoxError> {
    // This must come before any application code runs, because the application's output must not precede the response.
    let output = cgi_invocation::take_output().map_err(|error| format!("cannot use standard output: {error}"))?;
    start_log(config, &conflicts::find_among_files(config))?;
    if let Some(preload) = preload {
        preload().map_err(cannot_preload)?;
    }
    cgi(config, join_segment(config)?, output)?;
    Ok(StopReason::Asked)
}

fn cannot_preload(error: BoxError) -> BoxError {
    format!("the application's preload failed: {error}").into()
}

/// Returns the cache of a CGI process: the cache in the configured file, which other CGI processes and a server share.
/// If the file cannot be used, the request is answered without a shared cache.
fn join_segment(config: &Config) -> Result<Segment, BoxError> {
    let CacheConfig { bytes, file, .. } = &config.cache;
    if let Some(path) = file.as_ref().filter(|_| *bytes > 0) {
        match Segment::join(path, &memory::plan(config)) {
            Ok(segment) => return Ok(segment),
            Err(error) => log::error!(file:% = path.display(); "cannot use the cache file: {error}"),
        }
    }
    Ok(Segment::create(&Plan { rows: 1, ..Plan::default() })?)
}

/// Runs the application's preload and returns the descriptors that the preload left open. If `leftovers` is `Some`, a
/// termination signal during the preload removes these files and terminates the process.
fn run_preload(preload: Option<Preload>, leftovers: Option<Vec<Leftover>>) -> Result<Vec<RawFd>, BoxError> {
    let Some(preload) = preload else { return Ok(Vec::new()) };
    let before = sys::open_descriptors()?;
    abort::interruptible(leftovers, preload).map_err(cannot_preload)?;
    let mut after = sys::open_descriptors()?;
    after.retain(|fd| !before.contains(fd));
    Ok(after)
}
