//! Counts the connections in the kernel's queue of a listening socket that have not been accepted yet.
//!
//! A TCP socket reports its own count. The count of a Unix socket is available only from the kernel's socket diagnosis
//! (`NETLINK_SOCK_DIAG`), which requires no privilege; php-fpm and uWSGI show 0 for Unix sockets. If this diagnosis is
//! not available (a kernel without `unix_diag`, a socket from another network namespace), it can only be determined
//! whether any connection is waiting.
//!
//! This module must not block. It does not need to wait for a reply, because the kernel puts the reply into the socket
//! before `send` returns.

use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{self, AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType};
use nix::sys::stat::fstat;

use super::listen::{Listener, SocketFamily};
use crate::sys;

/// `SOCK_DIAG_BY_FAMILY`, from `linux/sock_diag.h`.
const BY_FAMILY: u16 = 20;
/// `UDIAG_SHOW_RQLEN`, from `linux/unix_diag.h`.
const SHOW_QUEUE: u32 = 0x10;
/// `UNIX_DIAG_RQLEN`, the attribute in the reply.
const QUEUE: u16 = 4;
/// Size of `struct nlmsghdr`.
const HEADER: usize = 16;
/// Size of the `struct unix_diag_msg` that follows.
const UNIX: usize = 16;

/// Queries the kernel for the lengths of the queues.
#[derive(Debug)]
pub(crate) struct QueueDepth {
    /// `None` if the kernel has no socket diagnosis.
    diagnosis: Option<OwnedFd>,
}

impl QueueDepth {
    pub(crate) fn new() -> Self {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let (family, kind) = (AddressFamily::Netlink, SockType::Raw);
        Self { diagnosis: socket::socket(family, kind, flags, SockProtocol::NetlinkSockDiag).ok() }
    }

    /// Returns the number of connections in this listener's queue. If the kernel does not count them, returns 1 if
    /// there are any.
    pub(crate) fn of(&self, listener: &Listener) -> u32 {
        self.counted(listener).unwrap_or_else(|| u32::from(is_readable(listener)))
    }

    /// Like [`QueueDepth::of`], but returns `None` if the kernel does not count the connections. The result is correct
    /// even if a Unix socket was shut down, although poll(2) reports such a socket as readable forever.
    pub(crate) fn counted(&self, listener: &Listener) -> Option<u32> {
        match listener.family {
            SocketFamily::Tcp => sys::tcp_queue(listener.as_fd()).ok(),
            SocketFamily::Unix => self.diagnosis.as_ref().and_then(|diagnosis| unix_queue(diagnosis, listener).ok()),
        }
    }
}

fn is_readable(listener: &Listener) -> bool {
    let mut watched = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
    poll(&mut watched, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
}

fn unix_queue(diagnosis: &OwnedFd, listener: &Listener) -> io::Result<u32> {
    // The kernel identifies sockets by the number of their inode, truncated to 32 bits.
    let inode = fstat(listener.as_fd())?.st_ino & u64::from(u32::MAX);
    let inode = u32::try_from(inode).map_err(io::Error::other)?;
    // Discard replies to an earlier request that failed before its replies were read.
    let mut answer = [0; 512];
    while socket::recv(diagnosis.as_raw_fd(), &mut answer, MsgFlags::MSG_DONTWAIT).is_ok() {}
    socket::send(diagnosis.as_raw_fd(), &question(inode), MsgFlags::MSG_DONTWAIT)?;
    let length = socket::recv(diagnosis.as_raw_fd(), &mut answer, MsgFlags::MSG_DONTWAIT)?;
    queue_in(&answer[..length.min(answer.len())], inode).ok_or(Errno::ENOENT.into())
}

/// Returns a `struct nlmsghdr` and a `struct unix_diag_req` for one socket, with any cookie.
fn question(inode: u32) -> Vec<u8> {
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
    bytes.extend(SHOW_QUEUE.to_ne_bytes());
    bytes.extend([0xff; 8]); // no cookie
    bytes
}

/// Returns the queue length in the kernel's reply, or `None` if the reply is not about this socket.
fn queue_in(answer: &[u8], inode: u32) -> Option<u32> {
    let kind = u16::from_ne_bytes(answer.get(4..6)?.try_into().ok()?);
    let of = u32::from_ne_bytes(answer.get(HEADER + 4..HEADER + 8)?.try_into().ok()?);
    if kind != BY_FAMILY || of != inode {
        return None;
    }
    let mut attributes = answer.get(HEADER + UNIX..)?;
    while let Some((head, rest)) = attributes.split_first_chunk::<4>() {
        let length = usize::from(u16::from_ne_bytes([head[0], head[1]]));
        if u16::from_ne_bytes([head[2], head[3]]) == QUEUE {
            return rest.first_chunk().map(|bytes| u32::from_ne_bytes(*bytes));
        }
        // Each attribute begins at a multiple of four. A length below that of the attribute's own header would loop forever.
        attributes = rest.get(length.max(4).next_multiple_of(4) - 4..)?;
    }
    None
}

#[cfg(test)]
mod tests {
    use std::net::TcpStream;
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::config::address::{Address, Bind};

    fn listener(bind: &str) -> Listener {
        Listener::bind(&bind.parse::<Bind>().unwrap(), 8, None, false).unwrap()
    }

    #[test]
    fn connections_that_are_not_accepted_yet_are_counted() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.sock");
        let (unix, tcp) = (listener(&format!("http:unix:{}", path.display())), listener("http:127.0.0.1:0"));
        let Address::Tcp(address) = &tcp.address else { panic!("not TCP") };
        let depth = QueueDepth::new();
        assert_eq!((depth.of(&unix), depth.of(&tcp)), (0, 0));
        let waiting: Vec<UnixStream> = (0..3).map(|_| UnixStream::connect(&path).unwrap()).collect();
        let other: Vec<TcpStream> = (0..5).map(|_| TcpStream::connect(address).unwrap()).collect();
        assert_eq!((depth.of(&unix), depth.of(&tcp)), (3, 5));
        drop(sys::accept(unix.as_fd()).unwrap());
        drop(sys::accept(tcp.as_fd()).unwrap());
        assert_eq!((depth.of(&unix), depth.of(&tcp)), (2, 4));
        // Without the kernel's diagnosis the count is 0 or 1.
        let blind = QueueDepth { diagnosis: None };
        assert_eq!(blind.of(&unix), 1);
        drop((waiting, other));
        unix.remove_file();
    }

    #[test]
    fn an_invalid_reply_is_none() {
        let mut answer = vec![0; HEADER + UNIX];
        answer[4..6].copy_from_slice(&BY_FAMILY.to_ne_bytes());
        answer[HEADER + 4..HEADER + 8].copy_from_slice(&7_u32.to_ne_bytes());
        assert_eq!(queue_in(&answer, 7), None, "no attribute");
        answer.extend([0, 0, 0, 0, 12, 0]);
        assert_eq!(queue_in(&answer, 7), None, "an attribute of length 0, and half of one");
        answer.extend([QUEUE.to_ne_bytes()[0], 0, 5, 0, 0, 0, 8, 0, 0, 0]);
        assert_eq!(queue_in(&answer, 7), Some(5));
        assert_eq!(queue_in(&answer, 8), None, "another socket's");
        for end in 0..HEADER + UNIX {
            assert_eq!(queue_in(&answer[..end], 7), None, "cut at {end}");
        }
    }
}
