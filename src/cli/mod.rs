//! The command line: flags, their FORKYARD_* variables and their help, turned into a [`Config`].
//!
//! Two commands share the serving flags: `forkyard run … -- COMMAND`, for an application in any language, and
//! every binary that calls [`crate::run`], for the application linked into it. Both have the same other sub-commands.
//!
//! - [`control`]: the sub-commands. [`file`]: the configuration file. [`check`]: what `check` tries.
//! - [`refused`]: flags of the other command. [`hints`]: tips for wrong command lines.

pub(crate) mod check;
mod control;
mod file;
mod hints;
mod refused;
pub(crate) mod scaling;
pub(crate) mod sidecars;

mod events;
mod failures;
mod logs;
mod privileges;
mod publish;

mod upgrade;

use std::ffi::OsString;
use std::net::{IpAddr, ToSocketAddrs as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{ArgMatches, Args, Command, CommandFactory as _, FromArgMatches as _, Parser, Subcommand, ValueEnum};

pub(crate) use self::control::Task;
use self::control::{ControlOptions, Operation};
use self::file::Mistakes;
use self::logs::{AccessLogOptions, LogOptions};
use self::privileges::{PrivilegeOptions, SandboxOptions};
use self::refused::Way;
use self::scaling::{OfEachWorker, ScalingOptions};
use crate::config::address::{Address, Bind, Protocol};
use crate::config::events::EventsConfig;
use crate::config::failures::Failures;
use crate::config::logs::Filters;
use crate::config::peers::{Peers, Who};
use crate::config::privileges::{PrivilegesConfig, SandboxConfig};
use crate::config::{
    CacheConfig, Config, Limits, Range, Scaling, Timeouts, Trust, parse_duration, parse_mode, parse_positive_duration,
    parse_size,
};
use crate::net::listen;
use crate::protocol::forwarded::Family;
use crate::startup::cgi_invocation;
use crate::startup::systemd;

const NOTES: &str = "\
TIME is in seconds, or has a unit: ms, s, m or h. SIZE is in bytes, or has a unit: K, M, G or T.

Signals to the master:
  TERM       stop: finish the requests in flight, within --drain-timeout, and exit
  INT, QUIT  stop at once
  HUP        reload: read the file of --config again and replace all workers; each new worker is
             ready before an old one drains
  TTIN, TTOU add a worker, remove a worker; with a range of --workers, both limits move
  USR1       reopen the log file and the access log, after a rotation
  USR2       upgrade: switch to the program's new build, if it passes its check; then reload

Exit status: 0 stopped as requested, 1 failure, 2 wrong usage.
A worker that was ready and exits with status 125 is not replaced.";

/// `forkyard run` takes one address, over FastCGI, and has no default address.
const BIND_OF_RUN: [&str; 2] = [
    "Listen on this address, as in fastcgi:unix:/run/app.sock",
    "\
Listen on this address, as in fastcgi:unix:/run/app.sock

PROTO is fastcgi. ADDR is HOST:PORT, unix:PATH, unix:@NAME (abstract namespace), fd:N (an inherited descriptor) or \
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
    /// is a listening socket (started by a web server); one CGI request, if the environment has one;
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
    /// The numbers are 1 to 1024. With a range, the number follows the load; with a minimum of 0, no worker runs
    /// while there are no requests. auto starts one worker per processor.
    #[arg(long, value_name = "N", env = "FORKYARD_WORKERS", default_value = "auto", help_heading = "Processes")]
    workers: Range,

    #[command(flatten)]
    scaling: ScalingOptions,

    /// Time for a new worker to become ready; then it is killed, and counts as a failed start
    #[arg(long, value_name = "TIME", env = "FORKYARD_START_TIMEOUT", default_value = "60s", value_parser = parse_positive_duration, help_heading = "Processes")]
    start_timeout: Duration,

    /// Time for a worker that was asked to stop to finish its requests; 0 kills it at once
    ///
    /// After this time the worker is killed.
    #[arg(long, value_name = "TIME", env = "FORKYARD_DRAIN_TIMEOUT", default_value = "30s", value_parser = parse_duration, help_heading = "Processes")]
    drain_timeout: Duration,

    /// Workers per second that are replaced at once when they die; further replacements are delayed
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
    /// Sockets that systemd passes take precedence over other defaults of `--bind`.
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
    keep: KeepOptions,

    #[command(flatten)]
    events: events::EventsOptions,

    #[command(flatten)]
    access: AccessOptions,

    /// Largest request body; larger ones get 413. 0 rejects every body
    #[arg(long, value_name = "SIZE", env = "FORKYARD_MAX_BODY", default_value = "1G", value_parser = parse_size, help_heading = "Limits")]
    max_body: u64,

    /// Largest head of a request (HTTP headers, FastCGI parameters), 8K to 16M; larger ones get 431
    #[arg(long, value_name = "SIZE", env = "FORKYARD_MAX_PARAMS", default_value = "128K", value_parser = parse_max_params, help_heading = "Limits")]
    max_params: usize,

    /// Connections per worker
    ///
    /// At the limit, a worker closes the connections that have been idle for longest. If none is idle, new
    /// connections wait in the kernel's accept queue.
    #[arg(long, value_name = "N", env = "FORKYARD_MAX_CONNECTIONS", default_value = "4096", value_parser = clap::value_parser!(u32).range(1..), help_heading = "Limits")]
    max_connections: u32,

    /// Connections per worker from one client address; 0 for no limit
    ///
    /// Further connections are closed at once. An IPv6 client counts by its /64 network. Unix sockets, peers of
    /// --trust and connections taken over from another worker are not counted.
    #[arg(
        long,
        value_name = "N",
        env = "FORKYARD_MAX_CONNECTIONS_PER_ADDRESS",
        default_value = "0",
        help_heading = "Limits"
    )]
    max_connections_per_address: u32,

    /// Memory per worker for heads and bodies of requests that clients are sending; 0 for no limit
    ///
    /// Beyond the limit, connections that send slowly are closed and further requests get 503.
    #[arg(long, value_name = "SIZE", env = "FORKYARD_MAX_BUFFERED", default_value = "256M", value_parser = parse_size, help_heading = "Limits")]
    max_buffered: u64,

    /// Requests per worker that may wait for a thread; further ones get 503
    #[arg(long, value_name = "N", env = "FORKYARD_QUEUE", default_value = "1024", value_parser = clap::value_parser!(u32).range(1..), help_heading = "Limits")]
    queue: u32,

    /// Headers per request; requests with more get 431
    #[arg(long, value_name = "N", env = "FORKYARD_MAX_HEADERS", default_value = "100", value_parser = clap::value_parser!(u16).range(1..=1024), help_heading = "Limits")]
    max_headers: u16,

    /// Longest path and query of a request, at most 65534 bytes; longer ones get 414
    #[arg(long, value_name = "SIZE", env = "FORKYARD_MAX_URI", default_value = "16K", value_parser = parse_max_uri, help_heading = "Limits")]
    max_uri: usize,

    /// Requests after which an HTTP connection is closed; 0 for no limit
    #[arg(
        long,
        value_name = "N",
        env = "FORKYARD_MAX_REQUESTS_PER_CONNECTION",
        default_value = "0",
        help_heading = "Limits"
    )]
    max_requests_per_connection: u32,

    /// Concurrent requests per FastCGI or HTTP/2 connection
    ///
    /// A further FastCGI request is refused with CANT_MPX_CONN.
    #[arg(long, value_name = "N", env = "FORKYARD_MAX_MULTIPLEXED", default_value = "64", value_parser = clap::value_parser!(u16).range(1..), help_heading = "Limits")]
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

/// Time limits for clients.
#[derive(Args, Debug)]
struct TimeoutOptions {
    /// Time that a connection is kept open without a request; 0 for no limit
    ///
    /// This limit, and the next three, are rounded up to whole seconds and checked once a second, so a connection
    /// may live up to a second longer.
    #[arg(long, value_name = "TIME", env = "FORKYARD_IDLE_TIMEOUT", default_value = "75s", value_parser = parse_duration, help_heading = "Timeouts")]
    idle_timeout: Duration,

    /// Time for a client to send the head of a request; 0 for no limit
    #[arg(long, value_name = "TIME", env = "FORKYARD_HEADER_TIMEOUT", default_value = "30s", value_parser = parse_duration, help_heading = "Timeouts")]
    header_timeout: Duration,

    /// Time for a client to send the next 4 KiB of a request body; 0 for no limit
    ///
    /// The time counts only while the application waits for the body.
    #[arg(long, value_name = "TIME", env = "FORKYARD_BODY_TIMEOUT", default_value = "30s", value_parser = parse_duration, help_heading = "Timeouts")]
    body_timeout: Duration,

    /// Time for a client to read the next 4 KiB of a response; 0 for no limit
    #[arg(long, value_name = "TIME", env = "FORKYARD_WRITE_TIMEOUT", default_value = "30s", value_parser = parse_duration, help_heading = "Timeouts")]
    write_timeout: Duration,

    /// Time that an upgraded connection (WebSocket) may be silent in both directions; 0 for no limit
    #[arg(long, value_name = "TIME", env = "FORKYARD_UPGRADED_TIMEOUT", default_value = "0s", value_parser = parse_duration, help_heading = "Timeouts")]
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

/// Peers that may connect, and proxies that are trusted.
#[derive(Args, Debug)]
struct AccessOptions {
    /// Accept connections only from this peer; repeatable
    ///
    /// PEER is an address, a network as in 10.0.0.0/8, or unix for peers on Unix sockets. Without --allow, every peer
    /// may connect; over FastCGI, only the addresses in the variable FCGI_WEB_SERVER_ADDRS, if that is set.
    #[arg(
        long,
        value_name = "PEER",
        env = "FORKYARD_ALLOW",
        value_delimiter = ',',
        help_heading = "Clients and proxies"
    )]
    allow: Vec<Who>,

    /// Proxy whose headers state the client's address, scheme and host; repeatable
    ///
    /// PEER is as for --allow.
    #[arg(
        long,
        value_name = "PEER",
        env = "FORKYARD_TRUST",
        value_delimiter = ',',
        help_heading = "Clients and proxies"
    )]
    trust: Vec<Who>,

    /// Load balancer that sends the client's address in a PROXY header (version 1 or 2); repeatable
    ///
    /// PEER is as for --allow. Every connection from such a peer must begin with the header.
    #[arg(
        long,
        value_name = "PEER",
        env = "FORKYARD_PROXY_PROTOCOL",
        value_delimiter = ',',
        help_heading = "Clients and proxies"
    )]
    proxy_protocol: Vec<Who>,

    /// Headers that the proxies of --trust write
    ///
    /// With --trust, no other headers of this kind reach the application.
    #[arg(
        long,
        value_name = "NAME",
        env = "FORKYARD_TRUST_HEADER",
        default_value = "x-forwarded",
        help_heading = "Clients and proxies"
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
    /// A sentence for the operator: `FCGI_WEB_SERVER_ADDRS` is invalid.
    fn access(self, serves_fastcgi: bool) -> Result<Access, String> {
        let family = match self.trust_header {
            TrustHeader::XForwarded => Family::X,
            TrustHeader::Forwarded => Family::Rfc7239,
        };
        let allow = Peers::new(self.allow);
        // Where the variable has no effect, its errors are not reported.
        let counts = allow.is_none() && serves_fastcgi;
        let variable = if counts { std::env::var("FCGI_WEB_SERVER_ADDRS").unwrap_or_default() } else { String::new() };
        let web_servers = Peers::web_servers(&variable, addresses_of)?;
        let trust = Peers::new(self.trust).map(|peers| Trust { peers, family });
        Ok(Access { allow, web_servers, trust, proxy_protocol: Peers::new(self.proxy_protocol) })
    }
}

fn addresses_of(name: &str) -> Vec<IpAddr> {
    (name, 0).to_socket_addrs().map(|found| found.map(|address| address.ip()).collect()).unwrap_or_default()
}

/// The page cache: its entries, and its file.
#[derive(Args, Debug)]
struct KeepOptions {
    /// Largest page that the cache stores, as in 4M; 0 for the default
    ///
    /// [default: a 64th of the cache, but at least 1M if the cache has room for it]
    #[arg(long, value_name = "SIZE", env = "FORKYARD_CACHE_MAX_ENTRY", value_parser = parse_size, help_heading = "Cache and events")]
    cache_max_entry: Option<u64>,

    /// Keep the cache in this file, so that its pages are still there after a restart
    #[arg(long, value_name = "FILE", env = "FORKYARD_CACHE_FILE", help_heading = "Cache and events")]
    cache_file: Option<PathBuf>,
}

impl KeepOptions {
    /// Without `bytes`, the size depends on the available memory.
    fn cache(self, bytes: Option<u64>) -> CacheConfig {
        let sized = match bytes {
            Some(bytes) => CacheConfig { bytes, ..CacheConfig::default() },
            None => CacheConfig::sized_for(forkyard_shm::memory_limit()),
        };
        CacheConfig { max_entry: self.cache_max_entry.unwrap_or(0), file: self.cache_file, ..sized }
    }
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
    /// This is the only mode in this version, with or without the flag.
    #[arg(long, env = "FORKYARD_DIRECT", help_heading = "Sockets")]
    direct: bool,

    /// Size of the shared-memory cache for programs with the forkyard-shm library; 0 disables it
    ///
    /// Each process gets the descriptor of the shared memory in FORKYARD_SHM.
    #[arg(long, value_name = "SIZE", env = "FORKYARD_CACHE", default_value = "0", value_parser = parse_size, help_heading = "Cache and events")]
    cache: u64,

    #[command(flatten)]
    keep: KeepOptions,

    #[command(flatten)]
    events: events::LogOfProgram,

    /// Count a program as started once it has run for this long; 0 counts it at once
    ///
    /// A program also counts as started when it is seen waiting for connections or serving one. [default: 1s until
    /// one program was seen to do so; after that, every program must be seen]
    #[arg(long, value_name = "TIME", env = "FORKYARD_SETTLE", value_parser = parse_duration, help_heading = "Processes")]
    settle: Option<Duration>,

    /// The program and its arguments, as in: -- php-cgi -d memory_limit=64M
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

/// What the command line requests of a serving process.
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) config: Config,
    /// Serve one CGI request, from the environment and standard input.
    pub(crate) cgi: bool,
    /// The external program and its arguments; `None` for a linked application.
    pub(crate) program: Option<Vec<OsString>>,
}

#[derive(Debug)]
pub(crate) enum Invocation {
    Serve(Box<Request>),
    /// Report these errors and those that an examination finds, and serve nothing.
    Check {
        request: Box<Request>,
        mistakes: Vec<String>,
    },
    /// The configuration file has these errors.
    Broken {
        mistakes: Vec<String>,
    },
    /// A sub-command that does not serve.
    Task(Task),
}

/// The application's own version and description.
#[derive(Clone, Debug, Default)]
pub(crate) struct Identity {
    pub(crate) version: Option<String>,
    pub(crate) about: Option<String>,
}

/// Reads the command line of a binary with a linked application.
///
/// # Errors
/// An error of clap, which also carries the text of `--help` and `--version`.
pub(crate) fn parse_linked(arguments: &[OsString], identity: &Identity) -> Result<Invocation, clap::Error> {
    let name =
        arguments.first().and_then(|path| Path::new(path).file_name()).map(|name| name.to_string_lossy().into_owned());
    let run = RunOptions::augment_args(Command::new("run"));
    let mut command = refused::know(Linked::command(), &run, Way::Linked);
    command = command.mut_subcommand("check", |check| refused::know(check, &run, Way::Linked));
    // Not the version of this library, which would be printed after the application's name.
    command = command.version(identity.version.clone().unwrap_or_default());
    if let Some(about) = &identity.about {
        command = command.about(about.clone());
    }
    if let Some(name) = name {
        command = command.name(name.clone()).bin_name(name);
    }
    let Read { matches, mistakes, checked } = match read(&mut command, arguments, &["check"]) {
        Err(error) if error.kind() == clap::error::ErrorKind::DisplayVersion && identity.version.is_none() => {
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

/// The request, and the settings in it that contradict each other.
fn linked_request(mut linked: LinkedOptions) -> (Request, Vec<Mismatch>) {
    linked.serve.bind_what_is_passed();
    let cgi = linked.serve.bind.is_empty() && cgi_invocation::is_one();
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
    let mut wrong = Vec::new();
    let scaling = linked.serve.scaling.scaling(of_each);
    let serves_fastcgi = listen::started_by_web_server() && linked.serve.bind.is_empty()
        || linked.serve.bind.iter().any(|bind| bind.protocol == Protocol::FastCgi);
    let access = or_note(access.access(serves_fastcgi), &["allow", "bind"], &mut wrong);
    let sandbox = or_note(sandbox.config(), &["sandbox", "sandbox-read", "sandbox-write"], &mut wrong);
    let limits = Limits {
        max_body: linked.worker.max_body,
        max_params: linked.worker.max_params,
        max_connections: linked.worker.max_connections,
        max_connections_per_address: linked.worker.max_connections_per_address,
        max_buffered: linked.worker.max_buffered,
        max_headers: linked.worker.max_headers.into(),
        max_uri: linked.worker.max_uri,
        max_multiplexed: linked.worker.max_multiplexed.into(),
        max_requests_per_connection: linked.worker.max_requests_per_connection,
        timeouts: timeouts.timeouts(),
    };
    let of_workers = OfWorkers { threads, queue, limits, access, sandbox, failures: failures.failures(), access_log };
    let memory = (keep.cache(cache), events.config(linked.worker.max_connections));
    let config = config(linked.serve, scaling, memory, None, of_workers, &mut wrong);
    (Request { config, cgi, program: None }, wrong)
}

/// Reads the command line of `forkyard`.
///
/// # Errors
/// An error of clap, which also carries the text of `--help` and `--version`.
pub(crate) fn parse_forkyard(arguments: &[OsString]) -> Result<Invocation, clap::Error> {
    let linked = LinkedOptions::augment_args(Command::new("linked"));
    let mut command = Forkyard::command().bin_name("forkyard");
    for name in ["run", "check"] {
        command = command.mut_subcommand(name, |run| {
            let run = run.mut_arg("bind", |bind| bind.help(BIND_OF_RUN[0]).long_help(BIND_OF_RUN[1]));
            refused::know(run, &linked, Way::Run)
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
    let (request, wrong) = run_request(run);
    command.build();
    let sub = command.find_subcommand(name).cloned().unwrap_or_else(|| command.clone());
    conclude(request, wrong, mistakes, checked, &mut sub.bin_name(format!("forkyard {name}")))
}

/// Like [`linked_request`], for `forkyard run`.
fn run_request(mut run: RunOptions) -> (Request, Vec<Mismatch>) {
    run.serve.bind_what_is_passed();
    let mut wrong = Vec::new();
    if run.command.is_empty() {
        let text = "no program to run: give COMMAND after '--', or set command in the configuration file".to_owned();
        wrong.push(Mismatch { settings: &["command"], text });
    }
    or_note(check_run(&run.serve.bind), &["bind"], &mut wrong);
    let scaling = run.serve.scaling.scaling(OfEachWorker::default());
    let memory = (run.keep.cache(Some(run.cache)), run.events.config());
    let config = config(run.serve, scaling, memory, run.settle, OfWorkers::default(), &mut wrong);
    (Request { config, cgi: false, program: Some(run.command) }, wrong)
}

fn conclude(
    request: Request,
    mut wrong: Vec<Mismatch>,
    mistakes: Mistakes,
    checked: bool,
    command: &mut Command,
) -> Result<Invocation, clap::Error> {
    let request = Box::new(request);
    if checked {
        // An error that follows from a setting that could not be read is not reported.
        let is_unread = |setting: &&str| mistakes.settings.iter().any(|unread| unread == setting);
        wrong.retain(|mismatch| !mismatch.settings.iter().any(is_unread));
        let wrong = wrong.into_iter().map(|mismatch| mismatch.text);
        return Ok(Invocation::Check { request, mistakes: mistakes.lines.into_iter().chain(wrong).collect() });
    }
    if wrong.is_empty() {
        return Ok(Invocation::Serve(request));
    }
    let texts: Vec<String> = wrong.into_iter().map(|mismatch| mismatch.text).collect();
    Err(command.error(clap::error::ErrorKind::ValueValidation, texts.join("\n       ")))
}

/// An error in a combination of settings.
struct Mismatch {
    settings: &'static [&'static str],
    text: String,
}

fn or_note<T: Default>(found: Result<T, String>, settings: &'static [&'static str], wrong: &mut Vec<Mismatch>) -> T {
    found.unwrap_or_else(|text| {
        wrong.push(Mismatch { settings, text });
        T::default()
    })
}

struct Read {
    matches: ArgMatches,
    mistakes: Mistakes,
    /// The sub-command is `check`.
    checked: bool,
}

/// Reads the arguments, together with the configuration file if they or a variable name one. `serving` are the
/// sub-commands that take the flags of serving.
///
/// # Errors
/// An error of clap. For `check`, invalid values are among the mistakes instead.
fn read(command: &mut Command, arguments: &[OsString], serving: &[&str]) -> Result<Read, clap::Error> {
    let mut mistakes = Mistakes::default();
    let mut arguments = arguments.to_vec();
    let checked = arguments.get(1).is_some_and(|name| name == "check");
    let matches = loop {
        match command.try_get_matches_from_mut(&arguments) {
            Ok(matches) => break matches,
            Err(error) if checked && without(&error, command, &mut arguments, &mut mistakes) => {}
            Err(error) => {
                let is_good = |line: &[OsString]| command.clone().try_get_matches_from(line).is_ok();
                return Err(hints::improve(error, command, &arguments, is_good));
            }
        }
    };
    let (name, given) = match matches.subcommand() {
        Some((name, given)) if serving.contains(&name) => (Some(name), given),
        Some(_) => return Ok(Read { matches, mistakes, checked: false }),
        None => (None, &matches),
    };
    let grammar = name.and_then(|name| command.find_subcommand(name)).unwrap_or(command);
    let refused = refused::given(grammar, given);
    if checked {
        mistakes.lines.extend(refused);
    } else if !refused.is_empty() {
        let text = refused.join("\n       ");
        let bin_name = name.map(|name| format!("{} {name}", command.get_name()));
        let mut grammar = grammar.clone();
        if let Some(bin_name) = bin_name {
            grammar = grammar.bin_name(bin_name);
        }
        return Err(grammar.error(clap::error::ErrorKind::UnknownArgument, text));
    }
    let Some(path) = given.get_one::<PathBuf>("config") else { return Ok(Read { matches, mistakes, checked }) };
    let (additions, of_file) = file::read(path, grammar, given);
    mistakes.lines.extend(of_file.lines);
    mistakes.settings.extend(of_file.settings);
    // Before all arguments that were given: after the program's name and the sub-command.
    let (before, after) = arguments.split_at(arguments.len().min(1 + usize::from(name.is_some())));
    let mut all = [before, &additions.flags, after].concat();
    if !additions.command.is_empty() {
        all.extend([OsString::from("--")].into_iter().filter(|dashes| !arguments.contains(dashes)));
        all.extend(additions.command);
    }
    let matches = command.try_get_matches_from_mut(all)?;
    Ok(Read { matches, mistakes, checked })
}

/// Removes an invalid value from the arguments, or the variable that has it from the command, and records the error.
/// False if the error is of another kind.
fn without(error: &clap::Error, command: &mut Command, arguments: &mut Vec<OsString>, mistakes: &mut Mistakes) -> bool {
    use clap::error::{ContextKind, ContextValue, ErrorKind};
    if !matches!(error.kind(), ErrorKind::ValueValidation | ErrorKind::InvalidValue) {
        return false;
    }
    let Some(ContextValue::String(shown)) = error.get(ContextKind::InvalidArg) else { return false };
    // The text has the form `--workers <N>`.
    let Some(flag) = shown.split([' ', '=', '[']).next().and_then(|flag| flag.strip_prefix("--")) else { return false };
    let long = format!("--{flag}");
    let with_value = format!("{long}=");
    let given = |argument: &OsString| *argument == *long || argument.to_string_lossy().starts_with(&with_value);
    let dashes = arguments.iter().position(|argument| argument == "--").unwrap_or(arguments.len());
    let mut is_new = !mistakes.settings.iter().any(|known| known == flag);
    let mut removed = false;
    while let Some(at) = arguments[..dashes.min(arguments.len())].iter().position(given) {
        let count = if arguments[at] == *long { 2 } else { 1 };
        arguments.drain(at..arguments.len().min(at + count));
        removed = true;
    }
    if !removed {
        // The value came from a variable.
        let forget = |check: Command| {
            check.mut_args(|argument| {
                if argument.get_long() == Some(flag) {
                    argument.env(clap::builder::Resettable::Reset)
                } else {
                    argument
                }
            })
        };
        let whole = std::mem::take(command);
        *command = whole.mut_subcommand("check", forget).mut_args(|argument| {
            if argument.get_long() == Some(flag) { argument.env(clap::builder::Resettable::Reset) } else { argument }
        });
        is_new |= !mistakes.settings.iter().any(|known| *known == format!("{flag} "));
        mistakes.settings.push(format!("{flag} "));
    }
    if is_new {
        mistakes.lines.push(format!("{long}: {}", file::explain(error)));
        mistakes.settings.push(flag.to_owned());
    }
    // Each call removes a value, so that the caller's loop ends.
    removed || is_new
}

/// An external program has one socket, and speaks FastCGI on it.
fn check_run(binds: &[Bind]) -> Result<(), String> {
    const FORM: &str = "as in --bind fastcgi:unix:/run/app.sock";
    match binds {
        [Bind { protocol: Protocol::FastCgi, .. }] => Ok(()),
        [] if listen::started_by_web_server() => Ok(()),
        [] => Err(format!("forkyard run needs an address to listen on, {FORM}")),
        [bind] => Err(format!(
            "forkyard run cannot listen on {bind}: a program accepts connections itself, over fastcgi only, {FORM}"
        )),
        binds => Err(format!(
            "forkyard run takes one --bind and got {}: a program has one listening socket, its standard input",
            binds.len()
        )),
    }
}

/// Settings that only workers of linked applications have.
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

/// The fields of [`Config`] with the same names.
#[derive(Debug, Default)]
struct Access {
    allow: Option<Peers>,
    web_servers: Option<Peers>,
    trust: Option<Trust>,
    proxy_protocol: Option<Peers>,
}

/// Adds to `wrong` the settings that contradict each other.
fn config(
    serve: ServeOptions,
    scaling: Scaling,
    (cache, events): (CacheConfig, EventsConfig),
    settle: Option<Duration>,
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
        settle,
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
    }
}

fn parse_max_uri(text: &str) -> Result<usize, String> {
    // The maximum of `http::Uri`.
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
