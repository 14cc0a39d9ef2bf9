//! Asks the kernel about a Unix socket of this process: how many connections wait in its queue, and which socket is its peer.
//!
//! The answers come from the kernel's socket diagnosis (`NETLINK_SOCK_DIAG`, `unix_diag`), which requires no privilege. It
//! is not available in a kernel without `unix_diag`, and for a socket from another network namespace.
//!
//! This module must not block. It does not need to wait for a reply, because the kernel puts the reply into the socket
//! before `send` returns.

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{self, AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType};
use nix::sys::stat::fstat;

/// `SOCK_DIAG_BY_FAMILY`, from `linux/sock_diag.h`.
const BY_FAMILY: u16 = 20;
/// Size of `struct nlmsghdr`.
const HEADER: usize = 16;
/// Size of the `struct unix_diag_msg` that follows.
const UNIX: usize = 16;

/// A number that the kernel reports about a socket.
#[derive(Clone, Copy, Debug)]
struct Attribute {
    /// The bit that asks for it, from `linux/unix_diag.h`.
    show: u32,
    /// Its number in the reply.
    number: u16,
}

/// `UDIAG_SHOW_RQLEN` and `UNIX_DIAG_RQLEN`: the connections in the queue of a listening socket.
const QUEUE: Attribute = Attribute { show: 0x10, number: 4 };
/// `UDIAG_SHOW_PEER` and `UNIX_DIAG_PEER`: the inode of the socket at the other end.
const PEER: Attribute = Attribute { show: 0x4, number: 2 };

/// A connection to the kernel's socket diagnosis.
#[derive(Debug)]
pub(crate) struct UnixDiagnosis(OwnedFd);

impl UnixDiagnosis {
    /// # Errors
    /// Fails if the kernel has no socket diagnosis, or if no descriptor is available.
    pub(crate) fn new() -> io::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let (family, kind) = (AddressFamily::Netlink, SockType::Raw);
        Ok(Self(socket::socket(family, kind, flags, SockProtocol::NetlinkSockDiag)?))
    }

    /// Returns the number of connections in the queue of a listening socket.
    ///
    /// # Errors
    /// Fails if the kernel does not report it.
    pub(crate) fn queue(&self, listener: BorrowedFd<'_>) -> io::Result<u32> {
        self.ask(listener, QUEUE)
    }

    /// Returns the inode of the socket to which a socket is connected; 0 if no process has accepted the connection, or if the
    /// other end is closed.
    ///
    /// # Errors
    /// Fails if the kernel does not report it.
    pub(crate) fn peer(&self, connection: BorrowedFd<'_>) -> io::Result<u32> {
        self.ask(connection, PEER)
    }

    fn ask(&self, about: BorrowedFd<'_>, attribute: Attribute) -> io::Result<u32> {
        // The kernel identifies sockets by the number of their inode, truncated to 32 bits.
        let inode = fstat(about)?.st_ino & u64::from(u32::MAX);
        let inode = u32::try_from(inode).map_err(io::Error::other)?;
        // Discard replies to an earlier request that failed before its replies were read.
        let mut answer = [0; 512];
        while socket::recv(self.0.as_raw_fd(), &mut answer, MsgFlags::MSG_DONTWAIT).is_ok() {}
        socket::send(self.0.as_raw_fd(), &question(inode, attribute), MsgFlags::MSG_DONTWAIT)?;
        let length = socket::recv(self.0.as_raw_fd(), &mut answer, MsgFlags::MSG_DONTWAIT)?;
        value_in(&answer[..length.min(answer.len())], inode, attribute).ok_or(Errno::ENOENT.into())
    }
}

/// Returns a `struct nlmsghdr` and a `struct unix_diag_req` for one socket, with any cookie.
fn question(inode: u32, attribute: Attribute) -> Vec<u8> {
    const LENGTH: u32 = 40;
    const REQUEST: u16 = 1;
    let family = u8::try_from(libc::AF_UNIX).unwrap_or(1);
    let mut bytes = Vec::with_capacity(LENGTH as usize);
    bytes.extend(LENGTH.to_ne_bytes());
    bytes.extend(BY_FAMILY.to_ne_bytes());
    bytes.extend(REQUEST.to_ne_bytes());
    bytes.extend([0; 8]); // sequence and port: no other code uses this socket
    bytes.extend([family, 0, 0, 0]);
    bytes.extend(u32::MAX.to_ne_bytes()); // sockets in any state
    bytes.extend(inode.to_ne_bytes());
    bytes.extend(attribute.show.to_ne_bytes());
    bytes.extend([0xff; 8]); // no cookie
    bytes
}

/// Returns the value of the attribute in the kernel's reply, or `None` if the reply is not about this socket.
fn value_in(answer: &[u8], inode: u32, attribute: Attribute) -> Option<u32> {
    let kind = u16::from_ne_bytes(answer.get(4..6)?.try_into().ok()?);
    let of = u32::from_ne_bytes(answer.get(HEADER + 4..HEADER + 8)?.try_into().ok()?);
    if kind != BY_FAMILY || of != inode {
        return None;
    }
    let mut attributes = answer.get(HEADER + UNIX..)?;
    while let Some((head, rest)) = attributes.split_first_chunk::<4>() {
        let length = usize::from(u16::from_ne_bytes([head[0], head[1]]));
        if u16::from_ne_bytes([head[2], head[3]]) == attribute.number {
            return rest.first_chunk().map(|bytes| u32::from_ne_bytes(*bytes));
        }
        // Each attribute begins at a multiple of four. A length below that of the attribute's own header would loop forever.
        attributes = rest.get(length.max(4).next_multiple_of(4) - 4..)?;
    }
    None
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd as _;
    use std::os::unix::net::{UnixListener, UnixStream};

    use super::*;

    #[test]
    fn the_peer_is_known_when_the_connection_is_accepted() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let diagnosis = UnixDiagnosis::new().unwrap();
        let connection = UnixStream::connect(&path).unwrap();
        assert_eq!((diagnosis.queue(listener.as_fd()).unwrap(), diagnosis.peer(connection.as_fd()).unwrap()), (1, 0));
        let (accepted, _) = listener.accept().unwrap();
        let inode = u32::try_from(fstat(&accepted).unwrap().st_ino).unwrap();
        assert_eq!(
            (diagnosis.queue(listener.as_fd()).unwrap(), diagnosis.peer(connection.as_fd()).unwrap()),
            (0, inode)
        );
        drop(accepted);
        assert_eq!(diagnosis.peer(connection.as_fd()).unwrap(), 0, "closed");
    }

    #[test]
    fn an_invalid_reply_is_none() {
        let mut answer = vec![0; HEADER + UNIX];
        answer[4..6].copy_from_slice(&BY_FAMILY.to_ne_bytes());
        answer[HEADER + 4..HEADER + 8].copy_from_slice(&7_u32.to_ne_bytes());
        assert_eq!(value_in(&answer, 7, QUEUE), None, "no attribute");
        answer.extend([0, 0, 0, 0, 12, 0]);
        assert_eq!(value_in(&answer, 7, QUEUE), None, "an attribute of length 0, and half of one");
        answer.extend([QUEUE.number.to_ne_bytes()[0], 0, 5, 0, 0, 0, 8, 0, 0, 0]);
        assert_eq!(value_in(&answer, 7, QUEUE), Some(5));
        assert_eq!(value_in(&answer, 7, PEER), None, "another attribute");
        assert_eq!(value_in(&answer, 8, QUEUE), None, "another socket's");
        for end in 0..HEADER + UNIX {
            assert_eq!(value_in(&answer[..end], 7, QUEUE), None, "cut at {end}");
        }
    }
}
