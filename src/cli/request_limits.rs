//! The flags for the limits of connections and requests.

use clap::Args;

use crate::config::{Limits, Timeouts, parse_size};

/// Flags of linked applications.
#[derive(Args, Debug)]
pub(super) struct LimitOptions {
    /// Largest request body; larger ones get 413. 0 rejects every body
    #[arg(long, value_name = "SIZE", env = "FORKYARD_MAX_BODY", default_value = "1G", value_parser = parse_size, help_heading = "Limits")]
    max_body: u64,

    /// Largest head of a request (HTTP headers, FastCGI parameters), 8K to 16M; larger ones get 431
    #[arg(long, value_name = "SIZE", env = "FORKYARD_MAX_PARAMS", default_value = "128K", value_parser = parse_max_params, help_heading = "Limits")]
    max_params: usize,

    /// Connections per worker
    ///
    /// At the limit, a worker closes the connections that have been idle the longest. If none is idle, new connections
    /// wait in the kernel's accept queue.
    #[arg(long, value_name = "N", env = "FORKYARD_MAX_CONNECTIONS", default_value = "4096", value_parser = clap::value_parser!(u32).range(1..), help_heading = "Limits")]
    pub(super) max_connections: u32,

    /// Connections per worker from one client address; 0 for no limit
    ///
    /// Further connections are closed immediately. An IPv6 client is counted by its /64 network. Unix sockets, peers of
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

    /// Requests per worker that may wait for a thread, or per gateway for an app process; further ones get 503
    #[arg(long, value_name = "N", env = "FORKYARD_QUEUE", default_value = "1024", value_parser = clap::value_parser!(u32).range(1..), help_heading = "Limits")]
    pub(super) queue: u32,

    /// Headers per request, and per response of an HTTP application; requests with more get 431, and responses 502
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
}

impl LimitOptions {
    pub(super) fn limits(&self, timeouts: Timeouts) -> Limits {
        Limits {
            max_body: self.max_body,
            max_params: self.max_params,
            max_connections: self.max_connections,
            max_connections_per_address: self.max_connections_per_address,
            max_buffered: self.max_buffered,
            max_headers: self.max_headers.into(),
            max_uri: self.max_uri,
            max_multiplexed: self.max_multiplexed.into(),
            max_requests_per_connection: self.max_requests_per_connection,
            timeouts,
        }
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
