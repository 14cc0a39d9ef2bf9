//! The command line: flags, their FORKYARD_* variables and their help, turned into a [`Config`].
//!
//! Two commands share the serving flags: `forkyard run … -- COMMAND`, for an application in any language, and
//! every binary that calls [`crate::run`], for the application linked into it. Both have the same other sub-commands.
//!
//! - Each group of flags has its own file. The flags for sockets, startup and shutdown are in this file.
//! - [`control`]: the sub-commands. [`file`]: the configuration file. [`check`]: the tests of `check`.
//! - [`parse`]: reads arguments, variables and file. [`refused_flags`]: flags of the other command. [`hints`]: tips for
//!   invalid command lines.

pub(crate) mod check;
pub(crate) mod scaling;
pub(crate) mod sidecars;

mod access;
mod cache;
mod control;
mod events;
mod failures;
mod file;
mod files;
mod gateway;
mod hints;
mod logs;
mod parse;
mod privileges;
mod programs;
mod publish;
mod recycling;
mod refused_flags;
mod request_limits;
mod timeouts;
mod upgrade;

use std::ffi::OsString;
use std::path::Path;
use std::time::Duration;

use clap::{Args, Command, CommandFactory as _, FromArgMatches as _, Parser, Subcommand};

use self::access::{Access, AccessOptions};
use self::cache::CacheOptions;
pub(crate) use self::control::Task;
use self::control::{ControlOptions, Operation};
use self::events::LogOfProgram;
use self::gateway::{GatewayOptions, OfGateways};
use self::logs::{AccessLogOptions, LogOptions};
use self::parse::{Mismatch, Read, conclude, or_note, read};
use self::privileges::{PrivilegeOptions, SandboxOptions};
use self::programs::{ProgramOptions, ReadyPathOptions};
use self::refused_flags::ServingCommand;
use self::request_limits::LimitOptions;
use self::scaling::{OfEachWorker, ScalingOptions};
use self::timeouts::TimeoutOptions;
use crate::config::address::{Address, Bind, Protocol};
use crate::config::events::EventsConfig;
use crate::config::failures::Failures;
use crate::config::gateway::{Backend, GatewayConfig, PhpSettings};
use crate::config::logs::Filters;
use crate::config::privileges::{PrivilegesConfig, SandboxConfig};
use crate::config::{
    CacheConfig, Config, Limits, Range, Scaling, parse_duration, parse_mode, parse_positive_duration, parse_size,
};
use crate::net::listen;
use crate::startup::cgi_invocation;
use crate::startup::systemd;

const NOTES: &str = "\
TIME is in seconds, or has a unit: ms, s, m or h. SIZE is in bytes, or has a unit: K, M, G or T.

Signals to the master:
  TERM       stop: finish the requests in flight, within --drain-timeout, and exit
  INT, QUIT  stop immediately
  HUP        reload: read the file of --config again and replace all workers; each new worker is
             ready before an old one drains
  TTIN, TTOU add a worker, remove a worker; with a range of --workers, both limits move
  USR1       reopen the log file and the access log, after a rotation
  USR2       upgrade: switch to the program's new build, if it passes its check; then reload

Exit status: 0 stopped as requested, 1 failure, 2 wrong usage.
A worker that was ready and exits with status 125 is not replaced.";

/// Help for `--bind` in `forkyard run`, which has no default address.
const BIND_OF_RUN: [&str; 2] = [
    "Listen on this address, as in http:127.0.0.1:8080 or fastcgi:unix:/run/app.sock (repeatable)",
    "\
Listen on this address, as in http:127.0.0.1:8080 or fastcgi:unix:/run/app.sock (repeatable)

PROTO is http, fastcgi or scgi; with --direct, it is fastcgi, and the flag is not repeatable. ADDR is HOST:PORT, unix:PATH, unix:@NAME (abstract namespace), fd:N (an inherited descriptor) or \
systemd[:NAME] (a socket that systemd passes).

Without --bind, the socket that systemd passes is used, or standard input, if it is a listening socket (started by a \
web server).",
];

const CHECK: &str = "\
TIME is in seconds, or has a unit: ms, s, m or h. SIZE is in bytes, or has a unit: K, M, G or T.
Each line on standard error begins with 'forkyard: error: ' or 'forkyard: warning: '.
With an error, a start would fail; with a warning, it would not.
Exit status: 0 no error, 1 errors, 2 wrong usage (for example an unknown flag).";

/// Flags of both commands that serve.
#[derive(Args, Debug)]
struct ServeOptions {
    /// Listen on this address; repeatable
    ///
    /// PROTO is http, fastcgi or scgi. ADDR is HOST:PORT, unix:PATH, unix:@NAME (abstract namespace), fd:N (an
    /// inherited descriptor) or systemd[:NAME] (sockets that systemd passes).
    ///
    /// Without --bind, the first of these that exists is used: the sockets that systemd passes; standard input, if it
    /// is a listening socket (started by a web server); one CGI request, if the environment contains one;
    /// http:127.0.0.1:8080.
    #[arg(long, value_name = "PROTO:ADDR", env = "FORKYARD_BIND", value_delimiter = ',', help_heading = "Sockets")]
    bind: Vec<Bind>,

    /// Connections that may wait in the kernel's accept queue of each socket; 0 allows one
    #[arg(long, value_name = "N", env = "FORKYARD_BACKLOG", default_value = "1024", help_heading = "Sockets")]
    backlog: u32,

    /// Permissions of Unix socket files, in octal, as in 660 [default: from the umask]
    #[arg(long, value_name = "MODE", env = "FORKYARD_SOCKET_MODE", value_parser = parse_mode, help_heading = "Sockets")]
    socket_mode: Option<u32>,

    /// Number of worker processes: a number, a range as in 2..16, or auto
    ///
    /// The numbers are 1 to 1024. With a range, the number follows the load; with a minimum of 0, no worker runs while
    /// there are no requests. auto starts one worker per processor.
    #[arg(long, value_name = "N", env = "FORKYARD_WORKERS", default_value = "auto", help_heading = "Processes")]
    workers: Range,

    #[command(flatten)]
    scaling: ScalingOptions,

    /// Time for a new worker to become ready; then it is killed, and counts as a failed start
    #[arg(long, value_name = "TIME", env = "FORKYARD_START_TIMEOUT", default_value = "60s", value_parser = parse_positive_duration, help_heading = "Processes")]
    start_timeout: Duration,

    /// Time for a worker that was asked to stop to finish its requests; 0 kills it immediately
    ///
    /// After this time the worker is killed.
    #[arg(long, value_name = "TIME", env = "FORKYARD_DRAIN_TIMEOUT", default_value = "30s", value_parser = parse_duration, help_heading = "Processes")]
    drain_timeout: Duration,

    /// Dead workers per second that are replaced immediately; further replacements are delayed
    #[arg(long, value_name = "N", env = "FORKYARD_RESPAWN_RATE", default_value = "64", value_parser = clap::value_parser!(u32).range(1..), help_heading = "Processes")]
    respawn_rate: u32,

    #[command(flatten)]
    upgrade: upgrade::UpgradeOptions,

    /// Lines to log: off, error, warn, info, debug or trace; also per module, as in info,hyper=debug
    #[arg(long, value_name = "LEVEL", env = "FORKYARD_LOG_LEVEL", default_value = "info", value_parser = Filters::parse, help_heading = "Logging")]
    log_level: Filters,

    #[command(flatten)]
    logs: LogOptions,

    #[command(flatten)]
    privileges: PrivilegeOptions,

    #[command(flatten)]
    control: ControlOptions,

    #[command(flatten)]
    sidecars: sidecars::SidecarOptions,

    #[command(flatten)]
    publish: publish::PublishOptions,
}

impl ServeOptions {
    /// Makes the sockets that systemd passes take precedence over the other defaults of `--bind`.
    fn bind_what_is_passed(&mut self) {
        if self.bind.is_empty() {
            self.bind = systemd::binds();
        }
    }
}

/// Flags that only linked applications have.
#[derive(Args, Debug)]
struct WorkerOptions {
    /// Threads per worker for blocking functions; each thread runs one request at a time
    #[arg(long, value_name = "N", env = "FORKYARD_THREADS", default_value = "1", value_parser = clap::value_parser!(u32).range(1..=1024), help_heading = "Processes")]
    threads: u32,

    /// Size of the page cache, which all workers share; 0 disables it
    ///
    /// [default: 64M, or a quarter of the memory of the machine or container, if that is less]
    #[arg(long, value_name = "SIZE", env = "FORKYARD_CACHE", value_parser = parse_size, help_heading = "Cache and events")]
    cache: Option<u64>,

    #[command(flatten)]
    cache_options: CacheOptions,

    #[command(flatten)]
    events: events::EventsOptions,

    #[command(flatten)]
    access: AccessOptions,

    #[command(flatten)]
    limits: LimitOptions,

    #[command(flatten)]
    timeouts: TimeoutOptions,

    #[command(flatten)]
    of_each: OfEachWorker,

    #[command(flatten)]
    sandbox: SandboxOptions,

    #[command(flatten)]
    failures: failures::FailureOptions,

    #[command(flatten)]
    access_log: AccessLogOptions,
}

/// A binary with a linked application.
#[derive(Parser, Debug)]
#[command(about = "Serve a web application from supervised worker processes", after_help = NOTES)]
#[command(args_conflicts_with_subcommands = true, subcommand_help_heading = "Commands (instead of serving)")]
struct Linked {
    #[command(subcommand)]
    command: Option<LinkedCommands>,
    #[command(flatten)]
    options: LinkedOptions,
}

#[derive(Args, Debug)]
struct LinkedOptions {
    #[command(flatten)]
    serve: ServeOptions,
    #[command(flatten)]
    worker: WorkerOptions,
}

#[derive(Subcommand, Debug)]
enum LinkedCommands {
    /// Report all errors in the settings, without serving
    #[command(after_help = CHECK)]
    Check(Box<LinkedOptions>),
    #[command(flatten)]
    Operation(Operation),
}

/// The `forkyard` binary.
#[derive(Parser, Debug)]
#[command(name = "forkyard", version, about = "A prefork process manager for web applications in any language")]
struct Forkyard {
    #[command(subcommand)]
    command: Subcommands,
}

#[derive(Subcommand, Debug)]
enum Subcommands {
    /// Run a program in supervised worker processes
    #[command(after_help = NOTES)]
    Run(Box<RunOptions>),
    /// Report all errors in the settings of run, without running the program
    #[command(after_help = CHECK)]
    Check(Box<RunOptions>),
    #[command(flatten)]
    Operation(Operation),
}

#[derive(Args, Debug)]
struct RunOptions {
    #[command(flatten)]
    serve: ServeOptions,

    /// Let the program accept connections itself, on its standard input (as with spawn-fcgi)
    ///
    /// There are no gateways then: nothing reads the requests, answers the clients of a process that dies, or queues
    /// requests.
    #[arg(long, env = "FORKYARD_DIRECT", help_heading = "Sockets")]
    direct: bool,

    #[command(flatten)]
    gateway: GatewayOptions,

    /// Size of the shared-memory cache for programs with the forkyard-shm library; 0 disables it
    ///
    /// Each process gets the descriptor of the shared memory in FORKYARD_SHM.
    #[arg(long, value_name = "SIZE", env = "FORKYARD_CACHE", default_value = "0", value_parser = parse_size, help_heading = "Cache and events")]
    cache: u64,

    #[command(flatten)]
    cache_options: CacheOptions,

    #[command(flatten)]
    events: LogOfProgram,

    #[command(flatten)]
    programs: ProgramOptions,

    /// The program and its arguments, as in: -- php-cgi -d memory_limit=64M
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

/// What the command line requests from a serving process.
#[derive(Debug)]
pub(crate) struct ServeRequest {
    pub(crate) config: Config,
    /// Whether to serve a single CGI request, which is read from the environment and standard input.
    pub(crate) cgi: bool,
    /// The external program and its arguments; `None` for a linked application.
    pub(crate) program: Option<Vec<OsString>>,
}

#[derive(Debug)]
pub(crate) enum Invocation {
    Serve(Box<ServeRequest>),
    /// Report these errors and those that `check` finds, and serve nothing.
    Check {
        request: Box<ServeRequest>,
        mistakes: Vec<String>,
    },
    /// Report these errors in the configuration file, and exit.
    Broken {
        mistakes: Vec<String>,
    },
    /// Perform the task of a sub-command that does not serve.
    Task(Task),
}

/// The application's own version and description.
#[derive(Clone, Debug, Default)]
pub(crate) struct AppInfo {
    pub(crate) version: Option<String>,
    pub(crate) about: Option<String>,
}

/// Reads the command line of a binary with a linked application.
///
/// # Errors
/// Returns an error from clap, which can also be the text of `--help` or `--version`.
pub(crate) fn parse_linked(arguments: &[OsString], app_info: &AppInfo) -> Result<Invocation, clap::Error> {
    let name =
        arguments.first().and_then(|path| Path::new(path).file_name()).map(|name| name.to_string_lossy().into_owned());
    let run = RunOptions::augment_args(Command::new("run"));
    let mut command = refused_flags::add(Linked::command(), &run, ServingCommand::Linked);
    command = command.mut_subcommand("check", |check| refused_flags::add(check, &run, ServingCommand::Linked));
    // This is the application's version. Otherwise clap would print this library's version after the application's
    // name.
    command = command.version(app_info.version.clone().unwrap_or_default());
    if let Some(about) = &app_info.about {
        command = command.about(about.clone());
    }
    if let Some(name) = name {
        command = command.name(name.clone()).bin_name(name);
    }
    let Read { matches, mistakes, checked } = match read(&mut command, arguments, &["check"]) {
        Err(error) if error.kind() == clap::error::ErrorKind::DisplayVersion && app_info.version.is_none() => {
            return Ok(Invocation::Task(Task::Print(format!("{}\n", command.get_name()).into_bytes())));
        }
        read => read?,
    };
    let linked = Linked::from_arg_matches(&matches)?;
    let (options, is_check) = match linked.command {
        Some(LinkedCommands::Operation(operation)) => return Ok(Invocation::Task(operation.task(&mut command)?)),
        Some(LinkedCommands::Check(options)) => (*options, true),
        None => (linked.options, false),
    };
    if !is_check && !mistakes.lines.is_empty() {
        return Ok(Invocation::Broken { mistakes: mistakes.lines });
    }
    let (request, wrong) = linked_request(options);
    conclude(request, wrong, mistakes, checked, &mut command)
}

/// Returns the request, and the contradictions among its settings.
fn linked_request(mut linked: LinkedOptions) -> (ServeRequest, Vec<Mismatch>) {
    linked.serve.bind_what_is_passed();
    let cgi = linked.serve.bind.is_empty() && cgi_invocation::is_one();
    let WorkerOptions {
        threads,
        cache,
        cache_options,
        events,
        access,
        limits,
        timeouts,
        of_each,
        sandbox,
        failures,
        access_log,
    } = linked.worker;
    let mut wrong = Vec::new();
    let scaling = linked.serve.scaling.scaling(of_each);
    let serves_fastcgi = listen::started_by_web_server() && linked.serve.bind.is_empty()
        || linked.serve.bind.iter().any(|bind| bind.protocol == Protocol::FastCgi);
    let access = or_note(access.access(serves_fastcgi), &["allow", "bind"], &mut wrong);
    let sandbox = or_note(sandbox.config(), &["sandbox", "sandbox-read", "sandbox-write"], &mut wrong);
    let memory = (cache_options.cache(cache), events.config(limits.max_connections));
    let (queue, limits) = (limits.queue, limits.limits(timeouts.timeouts()));
    let of_workers = OfWorkers { threads, queue, limits, access, sandbox, failures: failures.failures(), access_log };
    let config = config(linked.serve, scaling, memory, of_workers, &mut wrong);
    (ServeRequest { config, cgi, program: None }, wrong)
}

/// Reads the command line of `forkyard`.
///
/// # Errors
/// Returns an error from clap, which can also be the text of `--help` or `--version`.
pub(crate) fn parse_forkyard(arguments: &[OsString]) -> Result<Invocation, clap::Error> {
    let linked = LinkedOptions::augment_args(Command::new("linked"));
    let mut command = Forkyard::command().bin_name("forkyard");
    for name in ["run", "check"] {
        command = command.mut_subcommand(name, |run| {
            let run = run.mut_arg("bind", |bind| bind.help(BIND_OF_RUN[0]).long_help(BIND_OF_RUN[1]));
            refused_flags::add(run, &linked, ServingCommand::Run)
        });
    }
    let Read { matches, mistakes, checked } = read(&mut command, arguments, &["run", "check"])?;
    let (run, name) = match Forkyard::from_arg_matches(&matches)?.command {
        Subcommands::Operation(operation) => return Ok(Invocation::Task(operation.task(&mut command)?)),
        Subcommands::Run(_) if !mistakes.lines.is_empty() => {
            return Ok(Invocation::Broken { mistakes: mistakes.lines });
        }
        Subcommands::Run(run) => (*run, "run"),
        Subcommands::Check(run) => (*run, "check"),
    };
    let given = matches.subcommand().map(|(_, matches)| gateway::given(matches)).unwrap_or_default();
    let (request, wrong) = run_request(run, &given);
    command.build();
    let sub = command.find_subcommand(name).cloned().unwrap_or_else(|| command.clone());
    conclude(request, wrong, mistakes, checked, &mut sub.bin_name(format!("forkyard {name}")))
}

/// Like [`linked_request`], for `forkyard run`. `of_gateways` are the given flags that apply to gateways only.
fn run_request(mut run: RunOptions, of_gateways: &[String]) -> (ServeRequest, Vec<Mismatch>) {
    run.serve.bind_what_is_passed();
    let mut wrong = Vec::new();
    if run.command.is_empty() {
        let text = "no program to run: give COMMAND after '--', or set command in the configuration file".to_owned();
        wrong.push(Mismatch { settings: &["command"], text });
    }
    let cache = run.cache_options.cache(Some(run.cache));
    let config = if run.direct {
        or_note(check_run(&run.serve.bind), &["bind"], &mut wrong);
        let refused = of_gateways.iter().map(|flag| refused_flags::sentence(flag, ServingCommand::Run));
        wrong.extend(refused.map(|text| Mismatch { settings: &["direct"], text }));
        let scaling = run.serve.scaling.scaling(OfEachWorker::default());
        let memory = (cache, run.events.config());
        let program = run.programs.config(None, ReadyPathOptions::default(), &mut wrong);
        let config = config(run.serve, scaling, memory, OfWorkers::default(), &mut wrong);
        Config { program: Some(program), ..config }
    } else {
        let (options, gateway) = run.gateway.split();
        let children = run.serve.privileges.variable(GatewayConfig::PHP_CHILDREN).map(str::to_owned);
        let php = PhpSettings {
            program: run.command.first().map(OsString::as_os_str).unwrap_or_default(),
            children: children.as_deref(),
            concurrency: options.app_concurrency,
        };
        let program = run.programs.config(Some(gateway.backend), options.ready.clone(), &mut wrong);
        let mut config = gateways_config(run.serve, (cache, &run.events), options, gateway, &mut wrong);
        or_note(config.use_php_children(&php), &["app-concurrency", "env"], &mut wrong);
        Config { program: Some(program), ..config }
    };
    (ServeRequest { config, cgi: false, program: Some(run.command) }, wrong)
}

fn check_scripts(gateway: &GatewayConfig) -> Result<(), (&'static [&'static str], String)> {
    match (&gateway.scripts.root, &gateway.scripts.index, gateway.backend) {
        (None, Some(_), _) => Err((&["index"], "--index names a script below --root, which is missing".to_owned())),
        (Some(_), _, Backend::Http) => {
            Err((&["root"], "--root has no effect with --backend http: the program itself maps paths".to_owned()))
        }
        (None, None, _) | (Some(_), _, Backend::Fastcgi | Backend::Scgi | Backend::Cgi) => Ok(()),
    }
}

/// Returns the settings of gateways and app processes.
fn gateways_config(
    serve: ServeOptions,
    (cache, log): (CacheConfig, &LogOfProgram),
    options: OfGateways,
    mut gateway: GatewayConfig,
    wrong: &mut Vec<Mismatch>,
) -> Config {
    if serve.bind.is_empty() && !listen::started_by_web_server() {
        let text = "forkyard run needs an address to listen on, as in --bind http:127.0.0.1:8080".to_owned();
        wrong.push(Mismatch { settings: &["bind"], text });
    }
    if let Err((settings, text)) = check_scripts(&gateway) {
        wrong.push(Mismatch { settings, text });
    }
    or_note(gateway.files.check(), &["static", "sendfile"], wrong);
    let scaling = serve.scaling.scaling(OfEachWorker::of_app_processes(options.recycling));
    let serves_fastcgi = serve.bind.is_empty() || serve.bind.iter().any(|bind| bind.protocol == Protocol::FastCgi);
    let access = or_note(options.access.access(serves_fastcgi), &["allow", "bind"], wrong);
    let (events, routes) = options.streams.config(log, options.limits.max_connections, wrong);
    gateway.sse = routes;
    let (queue, limits) = (options.limits.queue, options.limits.limits(options.timeouts.timeouts()));
    let of_workers = OfWorkers {
        threads: 1,
        queue,
        limits,
        access,
        failures: options.failures.failures(),
        access_log: options.access_log,
        ..OfWorkers::default()
    };
    Config { gateway: Some(gateway), ..config(serve, scaling, (cache, events), of_workers, wrong) }
}

/// Checks that there is one FastCGI socket: an external program accepts connections from a single socket.
fn check_run(binds: &[Bind]) -> Result<(), String> {
    const FORM: &str = "as in --bind fastcgi:unix:/run/app.sock";
    match binds {
        [Bind { protocol: Protocol::FastCgi, .. }] => Ok(()),
        [] if listen::started_by_web_server() => Ok(()),
        [] => Err(format!("forkyard run needs an address to listen on, {FORM}")),
        [bind] => Err(format!(
            "with --direct, forkyard run cannot listen on {bind}: a program accepts connections itself, over fastcgi only, {FORM} (or remove \
             --direct)"
        )),
        binds => Err(format!(
            "with --direct, forkyard run takes one --bind and got {}: a program has one listening socket, its standard input (or remove \
             --direct)",
            binds.len()
        )),
    }
}

/// The settings that exist only for workers of linked applications.
#[derive(Default)]
struct OfWorkers {
    threads: u32,
    queue: u32,
    limits: Limits,
    access: Access,
    sandbox: Option<SandboxConfig>,
    failures: Failures,
    access_log: AccessLogOptions,
}

/// Builds the configuration. Adds contradictory settings to `wrong`.
fn config(
    serve: ServeOptions,
    scaling: Scaling,
    (cache, events): (CacheConfig, EventsConfig),
    of_workers: OfWorkers,
    wrong: &mut Vec<Mismatch>,
) -> Config {
    let mut binds = serve.bind;
    if binds.is_empty() {
        binds.push(if listen::started_by_web_server() {
            Bind { protocol: Protocol::FastCgi, address: Address::Inherited(0) }
        } else {
            Bind { protocol: Protocol::Http, address: Address::Tcp("127.0.0.1:8080".to_owned()) }
        });
    }
    let privileges: PrivilegesConfig = serve.privileges.config(of_workers.sandbox);
    Config {
        binds,
        workers: serve.workers,
        scaling,
        threads: of_workers.threads,
        queue: of_workers.queue,
        cache,
        events,
        publish: serve.publish.config(),
        backlog: serve.backlog,
        socket_mode: serve.socket_mode,
        start_timeout: serve.start_timeout,
        drain_timeout: serve.drain_timeout,
        program: None,
        respawn_rate: serve.respawn_rate,
        limits: of_workers.limits,
        allow: of_workers.access.allow,
        web_servers: of_workers.access.web_servers,
        trust: of_workers.access.trust,
        proxy_protocol: of_workers.access.proxy_protocol,
        privileges,
        failures: of_workers.failures,
        control: serve.control.config(),
        logs: serve.logs.config(serve.log_level, of_workers.access_log),
        sidecars: or_note(serve.sidecars.config(), &["daemon", "cron"], wrong),
        upgrade: serve.upgrade.config(),
        gateway: None,
    }
}
