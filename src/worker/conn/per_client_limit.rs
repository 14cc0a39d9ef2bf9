//! Limits the connections of one client (`--max-connections-per-address`) in this worker. A client
//! is an IPv4 address or an IPv6 network.
//!
//! A connection above the limit is closed before anything is read from it. A connection that another worker has
//! admitted and handed over does not count: the client's connections were spread over several workers, and together
//! they may exceed the limit of one worker.

use std::cell::RefCell;
use std::collections::HashMap;
use std::net::IpAddr;
use std::rc::Rc;

use super::throttle::Throttle;

/// Counts the connections of each client, if they are limited.
#[derive(Debug)]
pub(crate) struct ClientConnections {
    /// Zero means no limit.
    most: u32,
    open: RefCell<HashMap<Client, u32>>,
    turned_away: Throttle,
}

/// The unit by which connections are counted. An IPv6 client usually has a whole /64 network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Client {
    V4(u32),
    V6(u64),
}

impl Client {
    fn of(address: IpAddr) -> Self {
        match address.to_canonical() {
            IpAddr::V4(address) => Self::V4(address.to_bits()),
            IpAddr::V6(address) => Self::V6((address.to_bits() >> 64) as u64),
        }
    }
}

/// A connection that counts as open until this value is dropped.
#[derive(Debug)]
pub(crate) struct ConnectionPermit(Option<(Rc<ClientConnections>, Client)>);

impl ClientConnections {
    pub(crate) fn new(most: u32) -> Rc<Self> {
        Rc::new(Self { most, open: RefCell::default(), turned_away: Throttle::default() })
    }

    /// Admits a connection from this client. Returns `None` if the client is at the limit. A client without an address
    /// (a Unix socket, or a proxy with many clients) is always admitted.
    pub(crate) fn admit(self: &Rc<Self>, client: Option<IpAddr>) -> Option<ConnectionPermit> {
        let Some(address) = client.filter(|_| self.most > 0) else { return Some(ConnectionPermit(None)) };
        let client = Client::of(address);
        let mut open = self.open.borrow_mut();
        let count = open.entry(client).or_insert(0);
        if *count >= self.most {
            drop(open);
            self.report(address);
            return None;
        }
        *count += 1;
        Some(ConnectionPermit(Some((Rc::clone(self), client))))
    }

    fn report(&self, address: IpAddr) {
        if let Some(count) = self.turned_away.add(1) {
            log::warn!(
                limit = self.most, from:% = address, count;
                "closed a connection: its client is at the limit of this worker (--max-connections-per-address)"
            );
        }
    }
}

impl Drop for ConnectionPermit {
    fn drop(&mut self) {
        let Some((connections, client)) = self.0.take() else { return };
        let mut open = connections.open.borrow_mut();
        if let Some(count) = open.get_mut(&client) {
            *count -= 1;
            if *count == 0 {
                open.remove(&client);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_has_as_many_connections_as_it_may_and_those_that_end_make_room() {
        let connections = ClientConnections::new(2);
        let admit = |text: &str| connections.admit(Some(text.parse().unwrap()));
        let first = admit("192.0.2.1").unwrap();
        let second = admit("::ffff:192.0.2.1").unwrap();
        assert!(admit("192.0.2.1").is_none());
        let _other = admit("192.0.2.2").unwrap();
        drop(second);
        let _third = admit("192.0.2.1").unwrap();
        assert!(admit("192.0.2.1").is_none());
        drop(first);
        let network: Vec<ConnectionPermit> = ["2001:db8::1", "2001:db8::2:1"].map(|one| admit(one).unwrap()).into();
        assert!(admit("2001:db8::3").is_none() && admit("2001:db8:0:1::3").is_some());
        drop(network);
        assert!(admit("2001:db8::3").is_some());
        assert!((0..9).all(|_| connections.admit(None).is_some()), "a client without an address is not counted");
    }

    #[test]
    fn without_a_limit_nothing_is_counted() {
        let connections = ClientConnections::new(0);
        let all: Vec<_> = (0..9).map(|_| connections.admit(Some("192.0.2.1".parse().unwrap())).unwrap()).collect();
        assert!(all.len() == 9 && connections.open.borrow().is_empty());
    }
}
