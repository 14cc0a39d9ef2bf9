//! The flags of `forkyard run` for gateways, and those that only gateways have in common with linked applications.

use std::path::PathBuf;
use std::time::Duration;

use clap::parser::ValueSource;
use clap::{ArgMatches, Args, Command};

use super::access::AccessOptions;
use super::events::StreamOptions;
use super::failures::FailureOptions;
use super::files::FileOptions;
use super::logs::AccessLogOptions;
use super::programs::ReadyPathOptions;
use super::recycling::RequestRecyclingOptions;
use super::request_limits::LimitOptions;
use super::timeouts::TimeoutOptions;
use crate::config::gateway::{Backend, GatewayConfig, GatewayCount, Scripts};
use crate::config::sse::SseRoutes;
use crate::config::{parse_duration, parse_size};

#[derive(Args, Debug)]
pub(super) struct GatewayOptions {
    /// Number of gateways in front of the program: 1 to 64, or auto
    ///
    /// Gateways accept the clients' connections, over HTTP, FastCGI and SCGI, and forward requests to the program's
    /// processes over FastCGI, HTTP or SCGI, or run it as a CGI program. They answer the clients of a process that dies, queue requests, receive the bodies of
    /// slow clients, and write the access log. auto starts one per processor, up to 4.
    #[arg(long, value_name = "N", env = "FORKYARD_GATEWAYS", default_value = "auto", help_heading = "Gateways")]
    gateways: GatewayCount,

    #[command(flatten)]
    of_gateways: OfGateways,
}

/// Flags that apply to gateways only.
#[derive(Args, Debug)]
pub(super) struct OfGateways {
    /// Protocol of the program: fastcgi, http, scgi or cgi
    ///
    /// With fastcgi, the program accepts connections from descriptor 0. With http, it accepts them from descriptor 3
    /// (LISTEN_FDS=1), or from the address that COMMAND contains as {port} (a port of 127.0.0.1, also in PORT) or
    /// {socket} (the path of a Unix socket). {fd} in COMMAND is replaced by 3. With scgi, the program has the socket as
    /// descriptor 0 and 3, or listens on {port} or {socket}. With cgi, COMMAND is started once for each request.
    #[arg(long, value_name = "PROTO", env = "FORKYARD_BACKEND", default_value = "fastcgi", help_heading = "Gateways")]
    backend: Backend,

    /// Requests that one process of the program serves at a time [default: 1; 64 with --backend http; --workers for php-cgi]
    ///
    /// More than 1 is for programs with threads or an event loop, and for programs that run several processes on one
    /// socket. php-cgi has children for them, which share opcache and APCu; by default, one php-cgi has as many children as
    /// --workers. An HTTP server that serves one request at a time (gunicorn with sync workers) requires 1.
    #[arg(long, value_name = "N", env = "FORKYARD_APP_CONCURRENCY", value_parser = clap::value_parser!(u32).range(1..=1024), help_heading = "Gateways")]
    pub(super) app_concurrency: Option<u32>,

    /// Further processes that a request is sent to if the process that serves it dies; 0 disables
    ///
    /// Only requests whose method is idempotent are repeated, and only while the client has not received any part of the
    /// response. A request that a process has not begun is always repeated.
    #[arg(long, value_name = "N", env = "FORKYARD_RETRIES", default_value = "3", value_parser = clap::value_parser!(u32).range(0..=100), help_heading = "Gateways")]
    retries: u32,

    /// Answer 503 to a request that has waited this long for a process of the program; 0 disables
    #[arg(long, value_name = "TIME", env = "FORKYARD_QUEUE_TIMEOUT", default_value = "30s", value_parser = parse_duration, help_heading = "Gateways")]
    queue_timeout: Duration,

    /// Memory per gateway for the bodies of requests and responses; the rest goes to temporary files; 0 for files only
    #[arg(long, value_name = "SIZE", env = "FORKYARD_BUFFER_MEMORY", default_value = "64M", value_parser = parse_size, help_heading = "Gateways")]
    buffer_memory: u64,

    /// Space per gateway for temporary files, in --temp-dir; 0 for no files
    #[arg(long, value_name = "SIZE", env = "FORKYARD_BUFFER_FILES", default_value = "4G", value_parser = parse_size, help_heading = "Gateways")]
    buffer_files: u64,

    /// Directory for temporary files, which have no name [default: $TMPDIR or /tmp]
    #[arg(long, value_name = "DIR", env = "FORKYARD_TEMP_DIR", help_heading = "Gateways")]
    temp_dir: Option<PathBuf>,

    /// Directory of the scripts that the program runs, as with php-cgi
    ///
    /// The script of a request is the shortest beginning of its path that is a file with the extension .php. Over FastCGI
    /// and SCGI, the web server's parameters name the script, and this flag has no effect.
    #[arg(long, value_name = "DIR", env = "FORKYARD_ROOT", help_heading = "Gateways")]
    root: Option<PathBuf>,

    /// Script below --root for requests whose path names no script (a front controller), as in index.php
    #[arg(long, value_name = "FILE", env = "FORKYARD_INDEX", help_heading = "Gateways")]
    index: Option<String>,

    #[command(flatten)]
    pub(super) ready: ReadyPathOptions,

    #[command(flatten)]
    files: FileOptions,

    #[command(flatten)]
    pub(super) streams: StreamOptions,

    #[command(flatten)]
    pub(super) recycling: RequestRecyclingOptions,

    #[command(flatten)]
    pub(super) access: AccessOptions,

    #[command(flatten)]
    pub(super) limits: LimitOptions,

    #[command(flatten)]
    pub(super) timeouts: TimeoutOptions,

    #[command(flatten)]
    pub(super) failures: FailureOptions,

    #[command(flatten)]
    pub(super) access_log: AccessLogOptions,
}

impl GatewayOptions {
    /// Returns the flags that apply to gateways, with the settings of the gateways.
    pub(super) fn split(self) -> (OfGateways, GatewayConfig) {
        let options = self.of_gateways;
        let config = GatewayConfig {
            gateways: self.gateways,
            backend: options.backend,
            concurrency: options.app_concurrency.unwrap_or(options.backend.default_concurrency()),
            php: None,
            counts_requests: false,
            retries: options.retries,
            queue_timeout: options.queue_timeout,
            request_timeout: options.failures.request_timeout(),
            buffer_memory: options.buffer_memory,
            buffer_files: options.buffer_files,
            temp_dir: options.temp_dir.clone().unwrap_or_else(std::env::temp_dir),
            scripts: Scripts { root: options.root.clone(), index: options.index.clone() },
            files: options.files.config(),
            sse: SseRoutes::default(),
        };
        (options, config)
    }
}

/// Returns the flags on the command line that cannot be combined with `--direct`.
pub(super) fn given(matches: &ArgMatches) -> Vec<String> {
    let flags = GatewayOptions::augment_args(Command::new("gateways"));
    let names = flags.get_arguments().filter_map(|argument| Some((argument.get_id().as_str(), argument.get_long()?)));
    let given = names.filter(|(id, _)| matches.value_source(id) == Some(ValueSource::CommandLine));
    given.map(|(_, long)| long.to_owned()).collect()
}
