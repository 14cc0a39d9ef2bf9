//! Checks a peer's address against `--allow` or, for FastCGI without `--allow`, against `FCGI_WEB_SERVER_ADDRS`. A
//! refused connection is accepted, and closed before anything is read from it.

use std::net::SocketAddr;

use super::throttle::Throttle;
use crate::config::Config;
use crate::config::address::Protocol;
use crate::config::peers::Peers;

/// Access control for one listener. Connections from peers that are not permitted are closed, with at most one log line
/// a minute.
#[derive(Debug)]
pub(crate) struct Acl {
    allow: Option<Peers>,
    protocol: Protocol,
    turned_away: Throttle,
}

impl Acl {
    pub(crate) fn new(config: &Config, protocol: Protocol) -> Self {
        let allow = match protocol {
            Protocol::FastCgi => config.allow.as_ref().or(config.web_servers.as_ref()),
            Protocol::Scgi | Protocol::Http => config.allow.as_ref(),
        };
        Self { allow: allow.cloned(), protocol, turned_away: Throttle::default() }
    }

    /// Whether `peer` may connect; `None` is a peer on a Unix socket.
    pub(crate) fn permits(&self, peer: Option<SocketAddr>) -> bool {
        let Some(allow) = &self.allow else { return true };
        let permitted = allow.contain(peer.map(|peer| peer.ip()));
        if !permitted && let Some(count) = self.turned_away.add(1) {
            let from = peer.map_or_else(|| "unix".to_owned(), |peer| peer.ip().to_string());
            log::warn!(
                protocol:% = self.protocol, from, count;
                "closed a connection from a client that is not allowed (see --allow)"
            );
        }
        permitted
    }
}
