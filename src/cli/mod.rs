//! The command line: flags, their FORKYARD_* variables and their help, turned into a [`Config`].
//!
//! Two commands share the serving flags: `forkyard run … -- COMMAND`, for an application in any language, and
//! every binary that calls [`crate::run`], for the application linked into it. Both have the same sub-commands beside.
//!
//! - [`control`]: the sub-commands. [`file`]: the configuration file. [`check`]: what `check` tries.

pub(crate) mod check;
mod control;
mod file;

mod events;
mod failures;
mod helpers;
mod logs;
mod numbers;
mod privileges;
mod publish;

mod upgrade;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{ArgMatches, Args, Command, CommandFactory as _, FromArgMatches as _, Parser, Subcommand, ValueEnum};

pub(crate) use self::control::Task;
use self::control::{ControlOptions, Operation};
use self::logs::{AccessLogOptions, LogOptions, NoAccessLog};
use self::numbers::{NumberOptions, OfEachWorker, RefusedByRun};
use self::privileges::{PrivilegeOptions, SandboxOptions};
use crate::cgi_call;
use crate::config::events::EventsConfig;
use crate::config::failures::Failures;
use crate::config::logs::Filters;
use crate::config::privileges::{PrivilegesConfig, SandboxConfig};
use crate::config::{
    CacheConfig, Config, Limits, Numbers, Range, Timeouts, Trust, parse_duration, parse_mode, parse_size,
};
use crate::listen::{self, Address, Bind, Protocol};
use crate::peers::{Peers, Who};
use crate::protocol::forwarded::Family;
use crate::systemd;

const SIGNALS: &str = "\
Signals to the master:
  TERM       drain and stop: finish what is being served, for --drain-timeout at most
  INT, QUIT  stop at once
  HUP        replace the workers one by one; each new one is ready before an old one drains;
             the file of --config is read anew
  TTIN, TTOU one worker more, one worker less; of a range, both ends
  USR1       open the log file and the access log again, after a rotation
  USR2       become the program's new build, if it passes its check; then replace the workers as HUP does
Exit status: 0 asked to stop, 1 failure, 2 wrong usage. A worker that exits 125 asks not to be replaced.";

/// The flags of everything that serves.
#[derive(Args, Debug)]
struct ServeOptions {
    /// Listen here; repeatable. PROTO is http, fastcgi or scgi; ADDR is HOST:PORT, unix:PATH, unix:@NAME, fd:N
    /// or systemd[:NAME]. Without it: the sockets that systemd passes; standard input if that is a listening socket (a web server started us); one CGI request, if
    /// the environment has one; else http:127.0.0.1:8080
    #[arg(long, value_name = "PROTO:ADDR", env = "FORKYARD_BIND", value_delimiter = ',', help_heading = "Sockets")]
    bind: Vec<Bind>,

    /// Connections that may wait in the kernel's queue of each socket
    #[arg(long, value_name = "N", env = "FORKYARD_BACKLOG", default_value = "1024", help_heading = "Sockets")]
    backlog: u32,

    /// Permissions of Unix socket files, in octal [default: as the umask says]
    #[arg(long, value_name = "MODE", env = "FORKYARD_SOCKET_MODE", value_parser = parse_mode, help_heading = "Sockets")]
    socket_mode: Option<u32>,

    /// Worker processes: 1 to 1024; a range as in 2..16, to have as many as are needed (0..4: none while nobody asks);
    /// or auto for one per processor
    #[arg(long, value_name = "N", env = "FORKYARD_WORKERS", default_value = "auto", help_heading = "Processes")]
    workers: Range,

    #[command(flatten)]
    numbers: NumberOptions,

    /// A worker that is not ready by then is killed and counts as failed
    #[arg(long, value_name = "TIME", env = "FORKYARD_START_TIMEOUT", default_value = "60s", value_parser = parse_duration, help_heading = "Processes")]
    start_timeout: Duration,

    /// How long a worker that was asked to stop may finish what it serves; then it is killed
    #[arg(long, value_name = "TIME", env = "FORKYARD_DRAIN_TIMEOUT", default_value = "30s", value_parser = parse_duration, help_heading = "Processes")]
    drain_timeout: Duration,

    /// Workers that are replaced at once within a second; beyond that the replacements wait
    #[arg(long, value_name = "N", env = "FORKYARD_RESPAWN_RATE", default_value = "64", value_parser = clap::value_parser!(u32).range(1..), help_heading = "Processes")]
    respawn_rate: u32,

    #[command(flatten)]
    upgrade: upgrade::UpgradeOptions,

    /// What is logged: off, error, warn, info, debug or trace, also per module as in info,hyper=debug
    #[arg(long, value_name = "LEVEL", env = "FORKYARD_LOG_LEVEL", default_value = "info", value_parser = Filters::parse, help_heading = "Logging")]
    log_level: Filters,

    #[command(flatten)]
    logs: LogOptions,

    #[command(flatten)]
    privileges: PrivilegeOptions,

    #[command(flatten)]
    control: ControlOptions,

    #[command(flatten)]
    helpers: helpers::HelperOptions,

    #[command(flatten)]
    publish: publish::PublishOptions,
}

impl ServeOptions {
    /// Without `--bind`, systemd's sockets come first.
    fn bind_what_is_passed(&mut self) {
        if self.bind.is_empty() {
            self.bind = systemd::binds();
        }
    }
}

/// The further flags of a binary with an application linked into it.
#[derive(Args, Debug)]
struct WorkerOptions {
    /// Threads per worker that run blocking functions, each one request at a time
    #[arg(long, value_name = "N", env = "FORKYARD_THREADS", default_value = "1", value_parser = clap::value_parser!(u32).range(1..=1024), help_heading = "Processes")]
    threads: u32,

    /// Size of the page cache that all workers share, as in 64M; 0 for none
    #[arg(long, value_name = "SIZE", env = "FORKYARD_CACHE", default_value = "64M", value_parser = parse_size, help_heading = "Memory and limits")]
    cache: u64,

    #[command(flatten)]
    keep: KeepOptions,

    #[command(flatten)]
    events: events::EventsOptions,

    #[command(flatten)]
    access: AccessOptions,

    /// Largest request body; a larger one gets 413
    #[arg(long, value_name = "SIZE", env = "FORKYARD_MAX_BODY", default_value = "1G", value_parser = parse_size, help_heading = "Memory and limits")]
    max_body: u64,

    /// Largest head of a request (FastCGI parameters, HTTP headers), at least 8K; a larger one gets 431
    #[arg(long, value_name = "SIZE", env = "FORKYARD_MAX_PARAMS", default_value = "128K", value_parser = parse_max_params, help_heading = "Memory and limits")]
    max_params: usize,

    /// Connections that one worker holds at a time
    #[arg(long, value_name = "N", env = "FORKYARD_MAX_CONNECTIONS", default_value = "4096", value_parser = clap::value_parser!(u32).range(1..), help_heading = "Memory and limits")]
    max_connections: u32,

    /// Requests per worker that may wait for a thread; further ones get 503
    #[arg(long, value_name = "N", env = "FORKYARD_QUEUE", default_value = "1024", value_parser = clap::value_parser!(u32).range(1..), help_heading = "Memory and limits")]
    queue: u32,

    /// Headers of a request; one with more gets 431
    #[arg(long, value_name = "N", env = "FORKYARD_MAX_HEADERS", default_value = "100", value_parser = clap::value_parser!(u16).range(1..=1024), help_heading = "Memory and limits")]
    max_headers: u16,

    /// Longest path with its query, at most 65534 bytes; a longer one gets 414
    #[arg(long, value_name = "SIZE", env = "FORKYARD_MAX_URI", default_value = "16K", value_parser = parse_max_uri, help_heading = "Memory and limits")]
    max_uri: usize,

    /// Requests after which an HTTP connection is closed; 0 for any number
    #[arg(
        long,
        value_name = "N",
        env = "FORKYARD_MAX_REQUESTS_PER_CONNECTION",
        default_value = "0",
        help_heading = "Memory and limits"
    )]
    max_requests_per_connection: u32,

    /// Requests at a time on one FastCGI connection (a further one is refused with CANT_MPX_CONN) or HTTP/2 connection
    #[arg(long, value_name = "N", env = "FORKYARD_MAX_MULTIPLEXED", default_value = "64", value_parser = clap::value_parser!(u16).range(1..), help_heading = "Memory and limits")]
    max_multiplexed: u16,

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

/// How long a client may take. All are kept to the second.
#[derive(Args, Debug)]
struct TimeoutOptions {
    /// How long a connection is kept without a request; 0 for no limit, here and below
    #[arg(long, value_name = "TIME", env = "FORKYARD_IDLE_TIMEOUT", default_value = "75s", value_parser = parse_duration, help_heading = "Memory and limits")]
    idle_timeout: Duration,

    /// How long a client may take to send the head of a request
    #[arg(long, value_name = "TIME", env = "FORKYARD_HEADER_TIMEOUT", default_value = "30s", value_parser = parse_duration, help_heading = "Memory and limits")]
    header_timeout: Duration,

    /// How long a client may take to send the next 4 KiB of a body that the application waits for
    #[arg(long, value_name = "TIME", env = "FORKYARD_BODY_TIMEOUT", default_value = "30s", value_parser = parse_duration, help_heading = "Memory and limits")]
    body_timeout: Duration,

    /// How long a client may take to read the next 4 KiB of a response
    #[arg(long, value_name = "TIME", env = "FORKYARD_WRITE_TIMEOUT", default_value = "30s", value_parser = parse_duration, help_heading = "Memory and limits")]
    write_timeout: Duration,

    /// How long an upgraded connection (a WebSocket) may be silent in both directions
    #[arg(long, value_name = "TIME", env = "FORKYARD_UPGRADED_TIMEOUT", default_value = "0s", value_parser = parse_duration, help_heading = "Memory and limits")]
    upgraded_timeout: Duration,
}

impl TimeoutOptions {
    fn timeouts(&self) -> Timeouts {
        Timeouts {
            idle: self.idle_timeout,
            header: self.header_timeout,
            body: self.body_timeout,
            write: self.write_timeout,
            upgraded: self.upgraded_timeout,
        }
    }
}

/// Who may connect, and who is believed.
#[derive(Args, Debug)]
struct AccessOptions {
    /// Who may connect; repeatable. WHO is an address, a network as in 10.0.0.0/8, or unix. Without it: anybody, and
    /// over FastCGI those in FCGI_WEB_SERVER_ADDRS, if that is set
    #[arg(long, value_name = "WHO", env = "FORKYARD_ALLOW", value_delimiter = ',', help_heading = "Sockets")]
    allow: Vec<Who>,

    /// A proxy that is believed when it tells who its client is, by the PROXY protocol or by headers; repeatable. WHO
    /// is as for --allow
    #[arg(long, value_name = "WHO", env = "FORKYARD_TRUST", value_delimiter = ',', help_heading = "Sockets")]
    trust: Vec<Who>,

    /// The headers that those of --trust write; with --trust, no others of their kind reach the application
    #[arg(
        long,
        value_name = "NAME",
        env = "FORKYARD_TRUST_HEADER",
        default_value = "x-forwarded",
        help_heading = "Sockets"
    )]
    trust_header: TrustHeader,
}

/// The names of [`Family`] on the command line.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum TrustHeader {
    /// X-Forwarded-For, -Proto and -Host
    XForwarded,
    /// Forwarded (RFC 7239)
    Forwarded,
}

impl AccessOptions {
    /// # Errors
    /// A sentence for the operator: the web server's variable makes no sense.
    fn access(self) -> Result<Access, String> {
        let family = match self.trust_header {
            TrustHeader::XForwarded => Family::X,
            TrustHeader::Forwarded => Family::Rfc7239,
        };
        let variable = std::env::var("FCGI_WEB_SERVER_ADDRS").unwrap_or_default();
        let allow = Peers::new(self.allow);
        let web_servers = if allow.is_none() { Peers::web_servers(&variable)? } else { None };
        Ok(Access { allow, web_servers, trust: Peers::new(self.trust).map(|peers| Trust { peers, family }) })
    }
}

/// What the page cache keeps, and where.
#[derive(Args, Debug)]
struct KeepOptions {
    /// Largest page that the cache takes, as in 4M; a 64th of the cache if not given, but at least 1M as far as that fits
    #[arg(long, value_name = "SIZE", env = "FORKYARD_CACHE_MAX_ENTRY", value_parser = parse_size, help_heading = "Memory and limits")]
    cache_max_entry: Option<u64>,

    /// Keep the cache in this file, so that it is warm after a stop and a start
    #[arg(long, value_name = "FILE", env = "FORKYARD_CACHE_FILE", help_heading = "Memory and limits")]
    cache_file: Option<PathBuf>,
}

impl KeepOptions {
    fn cache(self, bytes: u64) -> CacheConfig {
        CacheConfig { bytes, max_entry: self.cache_max_entry.unwrap_or(0), file: self.cache_file }
    }
}

/// A binary with an application linked into it.
#[derive(Parser, Debug)]
#[command(version, about = "Serves its web application from supervised worker processes", after_help = SIGNALS)]
#[command(args_conflicts_with_subcommands = true, subcommand_help_heading = "Instead of serving")]
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
    /// Find everything that is wrong with the settings, and serve nothing
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
    /// Supervise an external application
    #[command(after_help = SIGNALS)]
    Run(Box<RunOptions>),
    /// Find everything that is wrong with the settings of run, and run nothing
    Check(Box<RunOptions>),
    #[command(flatten)]
    Operation(Operation),
}

#[derive(Args, Debug)]
struct RunOptions {
    #[command(flatten)]
    serve: ServeOptions,

    /// Let the application accept from the public socket itself, as its standard input (as under spawn-fcgi)
    #[arg(long, env = "FORKYARD_DIRECT", help_heading = "Sockets")]
    direct: bool,

    /// Size of the cache in the shared memory that each process gets as FORKYARD_SHM, for programs that use
    /// the forkyard-shm library; 0 for none
    #[arg(long, value_name = "SIZE", env = "FORKYARD_CACHE", default_value = "0", value_parser = parse_size, help_heading = "Processes")]
    cache: u64,

    #[command(flatten)]
    keep: KeepOptions,

    #[command(flatten)]
    events: events::LogOfProgram,

    /// An application process counts as started when it waits for connections, has one, or has run for so long
    #[arg(long, value_name = "TIME", env = "FORKYARD_SETTLE", default_value = "1s", value_parser = parse_duration, help_heading = "Processes")]
    settle: Duration,

    #[command(flatten)]
    refused: RefusedByRun,

    #[command(flatten)]
    no_access_log: NoAccessLog,

    /// The program and its arguments, as in: -- php-cgi -d memory_limit=64M
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

/// What the command line asks for.
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) config: Config,
    /// One request is to be answered, which is in the environment and on standard input.
    pub(crate) cgi: bool,
    /// The external program, and whether `--direct` was given.
    pub(crate) program: Option<(Vec<OsString>, bool)>,
}

/// What is to be done.
#[derive(Debug)]
pub(crate) enum Invocation {
    Serve(Box<Request>),
    /// Only what is wrong is to be said.
    Check(Box<Request>),
    /// The configuration file has these mistakes. `checked`: that was to be found out.
    Broken {
        mistakes: Vec<String>,
        checked: bool,
    },
    /// Something beside serving.
    Task(Task),
}

/// Reads the command line of a binary with an application linked into it.
///
/// # Errors
/// clap's, which also carries the text of `--help` and `--version`.
pub(crate) fn parse_linked(arguments: &[OsString]) -> Result<Invocation, clap::Error> {
    let name =
        arguments.first().and_then(|path| Path::new(path).file_name()).map(|name| name.to_string_lossy().into_owned());
    let mut command = Linked::command();
    if let Some(name) = name {
        command = command.name(name.clone()).bin_name(name);
    }
    let matches = match matches(&mut command, arguments, &["check"])? {
        Ok(matches) => matches,
        Err(broken) => return Ok(broken),
    };
    let linked = Linked::from_arg_matches(&matches)?;
    Ok(match linked.command {
        None => Invocation::Serve(Box::new(linked_request(linked.options, &mut command)?)),
        Some(LinkedCommands::Check(options)) => Invocation::Check(Box::new(linked_request(*options, &mut command)?)),
        Some(LinkedCommands::Operation(operation)) => Invocation::Task(operation.task(&mut command)?),
    })
}

fn linked_request(mut linked: LinkedOptions, command: &mut Command) -> Result<Request, clap::Error> {
    linked.serve.bind_what_is_passed();
    let cgi = linked.serve.bind.is_empty() && cgi_call::is_one();
    let WorkerOptions {
        threads,
        queue,
        cache,
        keep,
        events,
        access,
        timeouts,
        of_each,
        sandbox,
        failures,
        access_log,
        ..
    } = linked.worker;
    let numbers = linked.serve.numbers.numbers(of_each);
    let access = access.access().map_err(|cause| command.error(clap::error::ErrorKind::ValueValidation, cause))?;
    let sandbox = sandbox.config().map_err(|cause| command.error(clap::error::ErrorKind::ValueValidation, cause))?;
    let limits = Limits {
        max_body: linked.worker.max_body,
        max_params: linked.worker.max_params,
        max_connections: linked.worker.max_connections,
        max_headers: linked.worker.max_headers.into(),
        max_uri: linked.worker.max_uri,
        max_multiplexed: linked.worker.max_multiplexed.into(),
        max_requests_per_connection: linked.worker.max_requests_per_connection,
        timeouts: timeouts.timeouts(),
    };
    let of_workers = OfWorkers { threads, queue, limits, access, sandbox, failures: failures.failures(), access_log };
    let config = config(linked.serve, numbers, (keep.cache(cache), events.config()), Duration::ZERO, of_workers)
        .map_err(|cause| command.error(clap::error::ErrorKind::ValueValidation, cause))?;
    Ok(Request { config, cgi, program: None })
}

/// Reads the command line of `forkyard`.
///
/// # Errors
/// clap's, which also carries the text of `--help` and `--version`.
pub(crate) fn parse_forkyard(arguments: &[OsString]) -> Result<Invocation, clap::Error> {
    let mut command = Forkyard::command().bin_name("forkyard");
    let matches = match matches(&mut command, arguments, &["run", "check"])? {
        Ok(matches) => matches,
        Err(broken) => return Ok(broken),
    };
    Ok(match Forkyard::from_arg_matches(&matches)?.command {
        Subcommands::Run(run) => Invocation::Serve(Box::new(run_request(*run, "run", &mut command)?)),
        Subcommands::Check(run) => Invocation::Check(Box::new(run_request(*run, "check", &mut command)?)),
        Subcommands::Operation(operation) => Invocation::Task(operation.task(&mut command)?),
    })
}

fn run_request(mut run: RunOptions, name: &str, command: &mut Command) -> Result<Request, clap::Error> {
    run.serve.bind_what_is_passed();
    let no_command = || "no COMMAND: give it after '--', or as command in the configuration file".to_owned();
    let some = if run.command.is_empty() { Err(no_command()) } else { Ok(()) };
    let mut refuse = |cause: String| {
        command.build();
        let run = command.find_subcommand_mut(name).cloned().unwrap_or_else(|| command.clone());
        run.bin_name(format!("forkyard {name}")).error(clap::error::ErrorKind::ValueValidation, cause)
    };
    some.and_then(|()| check_run(&run.serve.bind)).map_err(&mut refuse)?;
    let numbers = run.serve.numbers.numbers(OfEachWorker::default());
    let config =
        config(run.serve, numbers, (run.keep.cache(run.cache), run.events.config()), run.settle, OfWorkers::default())
            .map_err(refuse)?;
    Ok(Request { config, cgi: false, program: Some((run.command, run.direct)) })
}

/// What the arguments say, together with the configuration file, if they or a variable name one. `serving` are the
/// sub-commands that take the flags of serving.
fn matches(
    command: &mut Command,
    arguments: &[OsString],
    serving: &[&str],
) -> Result<Result<ArgMatches, Invocation>, clap::Error> {
    let matches = command.try_get_matches_from_mut(arguments)?;
    let (name, given) = match matches.subcommand() {
        Some((name, given)) if serving.contains(&name) => (Some(name), given),
        Some(_) => return Ok(Ok(matches)),
        None => (None, &matches),
    };
    let Some(path) = given.get_one::<PathBuf>("config") else { return Ok(Ok(matches)) };
    let grammar = name.and_then(|name| command.find_subcommand(name)).unwrap_or(command);
    let additions = match file::read(path, grammar, given) {
        Ok(additions) => additions,
        Err(mistakes) => return Ok(Err(Invocation::Broken { mistakes, checked: name == Some("check") })),
    };
    // In front of all that was given: behind the program's name, and the sub-command.
    let (before, after) = arguments.split_at(arguments.len().min(1 + usize::from(name.is_some())));
    let mut all = [before, &additions.flags, after].concat();
    if !additions.command.is_empty() {
        all.extend([OsString::from("--")].into_iter().filter(|dashes| !arguments.contains(dashes)));
        all.extend(additions.command);
    }
    command.try_get_matches_from_mut(all).map(Ok)
}

/// An external program gets one socket, and speaks FastCGI on it.
fn check_run(binds: &[Bind]) -> Result<(), String> {
    const FORM: &str = "as in --bind fastcgi:unix:/run/app.sock";
    match binds {
        [Bind { protocol: Protocol::FastCgi, .. }] => Ok(()),
        [] if listen::started_by_web_server() => Ok(()),
        [] => Err(format!("run needs to know where to listen, {FORM}")),
        [bind] => Err(format!(
            "run cannot serve {bind}: a program that accepts for itself is served over fastcgi only, {FORM}"
        )),
        binds => Err(format!(
            "run takes one --bind and got {}: a program that accepts for itself has one socket, its standard input",
            binds.len()
        )),
    }
}

/// What concerns our own workers, and no external program.
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

/// As in [`Config`].
#[derive(Debug, Default)]
struct Access {
    allow: Option<Peers>,
    web_servers: Option<Peers>,
    trust: Option<Trust>,
}

/// # Errors
/// A sentence for the operator: flags that do not go together.
fn config(
    serve: ServeOptions,
    numbers: Numbers,
    (cache, events): (CacheConfig, EventsConfig),
    settle: Duration,
    of_workers: OfWorkers,
) -> Result<Config, String> {
    let mut binds = serve.bind;
    if binds.is_empty() {
        binds.push(if listen::started_by_web_server() {
            Bind { protocol: Protocol::FastCgi, address: Address::Inherited(0) }
        } else {
            Bind { protocol: Protocol::Http, address: Address::Tcp("127.0.0.1:8080".to_owned()) }
        });
    }
    let privileges: PrivilegesConfig = serve.privileges.config(of_workers.sandbox);
    Ok(Config {
        binds,
        workers: serve.workers,
        numbers,
        threads: of_workers.threads,
        queue: of_workers.queue,
        cache,
        events,
        publish: serve.publish.config(),
        backlog: serve.backlog,
        socket_mode: serve.socket_mode,
        start_timeout: serve.start_timeout,
        drain_timeout: serve.drain_timeout,
        settle,
        respawn_rate: serve.respawn_rate,
        limits: of_workers.limits,
        allow: of_workers.access.allow,
        web_servers: of_workers.access.web_servers,
        trust: of_workers.access.trust,
        privileges,
        failures: of_workers.failures,
        control: serve.control.config(),
        logs: serve.logs.config(serve.log_level, of_workers.access_log),
        helpers: serve.helpers.config()?,
        upgrade: serve.upgrade.config(),
    })
}

fn parse_max_uri(text: &str) -> Result<usize, String> {
    // The type of a URI holds no more.
    let size = usize::try_from(parse_size(text)?).ok().filter(|size| (1..=65534).contains(size));
    size.ok_or(format!("'{text}' is out of range (expected 1 to 65534)"))
}

fn parse_max_params(text: &str) -> Result<usize, String> {
    let size = parse_size(text)?;
    if !(8 << 10..=16 << 20).contains(&size) {
        return Err(format!("'{text}' is out of range (expected 8K to 16M)"));
    }
    usize::try_from(size).map_err(|_| format!("'{text}' does not fit this machine"))
}
