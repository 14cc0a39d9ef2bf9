//! The flags that select which peers may connect and which proxies are trusted.

use std::net::{IpAddr, ToSocketAddrs as _};

use clap::{Args, ValueEnum};

use crate::config::Trust;
use crate::config::peers::{PeerPattern, Peers};
use crate::protocol::forwarded::ForwardingHeaders;

/// Flags of linked applications.
#[derive(Args, Debug)]
pub(super) struct AccessOptions {
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
    allow: Vec<PeerPattern>,

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
    trust: Vec<PeerPattern>,

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
    proxy_protocol: Vec<PeerPattern>,

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

/// The names of [`ForwardingHeaders`] on the command line.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum TrustHeader {
    /// X-Forwarded-For, -Proto and -Host
    XForwarded,
    /// Forwarded (RFC 7239)
    Forwarded,
}

impl AccessOptions {
    /// # Errors
    /// Returns a message for the operator if `FCGI_WEB_SERVER_ADDRS` is invalid.
    pub(super) fn access(self, serves_fastcgi: bool) -> Result<Access, String> {
        let family = match self.trust_header {
            TrustHeader::XForwarded => ForwardingHeaders::X,
            TrustHeader::Forwarded => ForwardingHeaders::Rfc7239,
        };
        let allow = Peers::new(self.allow);
        // Where the variable has no effect, its errors are not reported.
        let is_used = allow.is_none() && serves_fastcgi;
        let variable = if is_used { std::env::var("FCGI_WEB_SERVER_ADDRS").unwrap_or_default() } else { String::new() };
        let web_servers = Peers::web_servers(&variable, addresses_of)?;
        let trust = Peers::new(self.trust).map(|peers| Trust { peers, family });
        Ok(Access { allow, web_servers, trust, proxy_protocol: Peers::new(self.proxy_protocol) })
    }
}

fn addresses_of(name: &str) -> Vec<IpAddr> {
    (name, 0).to_socket_addrs().map(|found| found.map(|address| address.ip()).collect()).unwrap_or_default()
}

/// Fields with the same names as in [`Config`](crate::config::Config).
#[derive(Debug, Default)]
pub(super) struct Access {
    pub(super) allow: Option<Peers>,
    pub(super) web_servers: Option<Peers>,
    pub(super) trust: Option<Trust>,
    pub(super) proxy_protocol: Option<Peers>,
}
