//! Hands connections over from one process to another.
//!
//! The master creates one channel: a pair of sockets, of which every worker has both ends. A worker that exits hands
//! over its open connections, and the heir of a dead worker hands over the connections that can continue. Any worker
//! with free capacity takes connections from the channel, as it takes new connections from a listener. A connection in
//! the channel belongs to no process, and survives the process that sent it.
//!
//! Each message is one connection: its descriptor and a [`Handoff`].
//!
//! This module must not depend on the protocol of a connection.

use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};

use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, sendmsg, setsockopt, socketpair, sockopt,
};

/// Size of a handoff's header, which precedes the connection's bytes.
pub(crate) const HEADER: usize = 32;
const MAGIC: [u8; 4] = *b"FYHO";
/// Send buffer for connections in transit. If the kernel allows this size, the buffer holds some thousands of
/// connections with the kernel's overhead.
const BUFFER: usize = 4 << 20;

/// The message that accompanies a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Handoff {
    /// Index of the listener that accepted the connection.
    pub(crate) listener: u16,
    /// The peer of the connection.
    pub(crate) origin: PackedOrigin,
    /// Bytes that were read from the connection and must be read again.
    pub(crate) early: Vec<u8>,
}

impl Handoff {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut message = Vec::with_capacity(HEADER + self.early.len());
        message.extend(MAGIC);
        message.extend(self.listener.to_le_bytes());
        message.extend([0; 2]);
        message.extend(self.origin.0.iter().flat_map(|part| part.to_le_bytes()));
        message.extend(&self.early);
        message
    }

    /// Decodes a message. Returns `None` if the message is not a handoff.
    pub(crate) fn decode(message: &[u8]) -> Option<Self> {
        let (header, early) = message.split_first_chunk::<HEADER>()?;
        let (magic, rest) = header.split_first_chunk::<4>()?;
        let (&listener, rest) = rest.split_first_chunk::<2>()?;
        let (parts, _) = rest.get(2..)?.as_chunks::<8>();
        let &[first, second, third] = parts else { return None };
        let origin = PackedOrigin([first, second, third].map(u64::from_le_bytes));
        (*magic == MAGIC).then(|| Self { listener: u16::from_le_bytes(listener), origin, early: early.to_vec() })
    }
}

/// The peer of a connection, as three words.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct PackedOrigin(pub(crate) [u64; 3]);

/// Flags in the first word, above the port.
const HAS_ADDRESS: u64 = 1 << 16;
const IS_V4: u64 = 1 << 17;
const IS_TLS: u64 = 1 << 18;
const IS_ADMITTED: u64 = 1 << 19;

impl PackedOrigin {
    /// Creates the origin of a connection from which nothing was read. `peer` is `None` for a peer on a Unix socket.
    pub(crate) fn of_peer(peer: Option<SocketAddr>) -> Self {
        let Some(peer) = peer else { return Self::default() };
        let (ip, is_v4) = match peer.ip() {
            IpAddr::V4(ip) => (ip.to_ipv6_mapped(), IS_V4),
            IpAddr::V6(ip) => (ip, 0),
        };
        let bits = ip.to_bits();
        #[expect(clippy::cast_possible_truncation, reason = "the two halves")]
        let (high, low) = ((bits >> 64) as u64, bits as u64);
        Self([HAS_ADDRESS | is_v4 | u64::from(peer.port()), high, low])
    }

    /// Creates the origin of a connection that has passed access control. `is_tls` is true if the client used TLS.
    pub(crate) fn admitted(client: Option<SocketAddr>, is_tls: bool) -> Self {
        let Self([head, high, low]) = Self::of_peer(client);
        Self([head | IS_ADMITTED | if is_tls { IS_TLS } else { 0 }, high, low])
    }

    pub(crate) fn address(self) -> Option<SocketAddr> {
        let Self([head, high, low]) = self;
        let ip = Ipv6Addr::from_bits(u128::from(high) << 64 | u128::from(low));
        let ip = ip.to_ipv4_mapped().filter(|_| head & IS_V4 != 0).map_or(IpAddr::V6(ip), IpAddr::V4);
        #[expect(clippy::cast_possible_truncation, reason = "the port is the low half")]
        let port = head as u16;
        (head & HAS_ADDRESS != 0).then(|| SocketAddr::new(ip, port))
    }

    pub(crate) fn is_tls(self) -> bool {
        self.0[0] & IS_TLS != 0
    }

    /// Whether the connection has passed access control, in which case its next bytes are a request.
    pub(crate) fn is_admitted(self) -> bool {
        self.0[0] & IS_ADMITTED != 0
    }
}

/// Both ends of the channel.
#[derive(Debug)]
pub(crate) struct Channel {
    send: OwnedFd,
    receive: OwnedFd,
}

impl Channel {
    /// # Errors
    /// Fails if no sockets are available.
    pub(crate) fn open() -> io::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let (send, receive) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)?;
        if setsockopt(&send, sockopt::SndBufForce, &BUFFER).is_err() {
            setsockopt(&send, sockopt::SndBuf, &BUFFER)?; // without root: up to the system's limit
        }
        Ok(Self { send, receive })
    }

    /// Adopts the ends of a former master's channel.
    pub(crate) fn resume((send, receive): (OwnedFd, OwnedFd)) -> Self {
        Self { send, receive }
    }

    /// Returns the end into which connections are passed.
    pub(crate) fn sender(&self) -> BorrowedFd<'_> {
        self.send.as_fd()
    }

    /// Returns the end from which connections are taken.
    pub(crate) fn receiver(&self) -> BorrowedFd<'_> {
        self.receive.as_fd()
    }
}

/// Sends a connection into the channel. The caller must then close its own descriptor of the connection.
///
/// # Errors
/// Returns `WouldBlock` if too many connections are in transit already, or another error from the channel.
pub(crate) fn hand_off(channel: BorrowedFd<'_>, connection: BorrowedFd<'_>, message: &[u8]) -> io::Result<()> {
    use std::os::fd::AsRawFd as _;
    let descriptors = [connection.as_raw_fd()];
    let control = [ControlMessage::ScmRights(&descriptors)];
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    sendmsg::<()>(channel.as_raw_fd(), &[io::IoSlice::new(message)], &control, flags, None)?;
    Ok(())
}

/// Whether the error is temporary: too many connections are in transit, in this channel or in the whole system.
pub(crate) fn is_for_later(error: &io::Error) -> bool {
    let for_later = [libc::EAGAIN, libc::ETOOMANYREFS, libc::ENOBUFS, libc::ENOMEM];
    error.raw_os_error().is_some_and(|code| for_later.contains(&code))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_origin_is_the_same_after_packing() {
        for address in [None, Some("127.0.0.1:80"), Some("[::1]:65535"), Some("[::ffff:1.2.3.4]:1")] {
            let address = address.map(|address| address.parse().unwrap());
            let fresh = PackedOrigin::of_peer(address);
            assert_eq!((fresh.address(), fresh.is_tls(), fresh.is_admitted()), (address, false, false));
            for is_tls in [false, true] {
                let origin = PackedOrigin::admitted(address, is_tls);
                assert_eq!((origin.address(), origin.is_tls(), origin.is_admitted()), (address, is_tls, true));
            }
        }
    }

    #[test]
    fn a_handoff_is_decoded_and_other_messages_are_refused() {
        let handoff = Handoff { listener: 3, origin: PackedOrigin([1, u64::MAX, 0]), early: b"GET / HT".to_vec() };
        let message = handoff.encode();
        assert_eq!(Handoff::decode(&message), Some(handoff));
        assert_eq!(Handoff::decode(&message[..HEADER - 1]), None);
        assert_eq!(Handoff::decode(&[0; HEADER]), None);
    }
}
