//! Who may come in: `--allow`, and for FastCGI the web servers' variable. What is turned away has been accepted, and
//! nothing was read of it.

use std::cell::Cell;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use crate::config::Config;
use crate::config::address::Protocol;
use crate::config::peers::Peers;

/// Lines about connections that were turned away are so far apart.
const TELL_EVERY: Duration = Duration::from_secs(60);

/// The door of one listener. A peer that may not come in sees its connection closed, and the log gets one line a minute.
#[derive(Debug)]
pub(crate) struct Door {
    allow: Option<Peers>,
    protocol: Protocol,
    turned_away: Cell<u64>,
    last_told: Cell<Option<Instant>>,
}

impl Door {
    pub(crate) fn new(config: &Config, protocol: Protocol) -> Self {
        let allow = match protocol {
            Protocol::FastCgi => config.allow.as_ref().or(config.web_servers.as_ref()),
            Protocol::Scgi | Protocol::Http => config.allow.as_ref(),
        };
        Self { allow: allow.cloned(), protocol, turned_away: Cell::new(0), last_told: Cell::new(None) }
    }

    /// Whether `peer` may; `None` is a peer on a Unix socket.
    pub(crate) fn permits(&self, peer: Option<SocketAddr>) -> bool {
        let Some(allow) = &self.allow else { return true };
        let permitted = allow.contain(peer.map(|peer| peer.ip()));
        if !permitted {
            self.turned_away.set(self.turned_away.get() + 1);
            if self.last_told.get().is_none_or(|told| told.elapsed() >= TELL_EVERY) {
                self.last_told.set(Some(Instant::now()));
                let from = peer.map_or_else(|| "a Unix socket".to_owned(), |peer| peer.ip().to_string());
                let (protocol, count) = (self.protocol, self.turned_away.take());
                log::warn!(
                    "closed a {protocol} connection from {from}, which is not allowed (see --allow) count={count}"
                );
            }
        }
        permitted
    }
}
