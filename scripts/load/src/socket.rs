//! Wraps the system calls on one connection. It neither counts nor parses.

use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::socket::sockopt::{ReceiveTimeout, SendTimeout, TcpNoDelay};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, connect, recv, send, setsockopt, socket};
use nix::sys::time::{TimeVal, TimeValLike as _};

use crate::target::Peer;

/// A stream socket, which is closed when dropped.
#[derive(Debug)]
pub(crate) struct Socket(OwnedFd);

impl Socket {
    /// Starts to connect, without waiting. Also returns whether the connection is already established. If it is not, `send`
    /// returns `EAGAIN` until the connection is established, or the error if connecting failed.
    pub(crate) fn open(peer: &Peer) -> Result<(Self, bool), Errno> {
        let socket = Self::unconnected(peer, SockFlag::SOCK_NONBLOCK)?;
        match connect(socket.0.as_raw_fd(), peer.address()) {
            Ok(()) => Ok((socket, true)),
            Err(Errno::EINPROGRESS) => Ok((socket, false)),
            Err(error) => Err(error),
        }
    }

    /// Connects, and waits until the connection is established. Each call on the socket blocks for up to `timeout`, and then
    /// returns `EAGAIN`.
    pub(crate) fn open_blocking(peer: &Peer, timeout: Duration) -> Result<Self, Errno> {
        let socket = Self::unconnected(peer, SockFlag::empty())?;
        let timeout = TimeVal::microseconds(i64::try_from(timeout.as_micros()).unwrap_or(i64::MAX));
        setsockopt(&socket.0, SendTimeout, &timeout)?;
        setsockopt(&socket.0, ReceiveTimeout, &timeout)?;
        connect(socket.0.as_raw_fd(), peer.address())?;
        Ok(socket)
    }

    fn unconnected(peer: &Peer, flags: SockFlag) -> Result<Self, Errno> {
        let fd = socket(peer.family(), SockType::Stream, flags | SockFlag::SOCK_CLOEXEC, None)?;
        if peer.family() != AddressFamily::Unix {
            setsockopt(&fd, TcpNoDelay, &true)?;
        }
        Ok(Self(fd))
    }

    pub(crate) fn send(&self, bytes: &[u8]) -> Result<usize, Errno> {
        retry_interrupted(|| send(self.0.as_raw_fd(), bytes, MsgFlags::MSG_NOSIGNAL))
    }

    /// Receives data. Returns zero if the server has closed the connection.
    pub(crate) fn receive(&self, into: &mut [u8]) -> Result<usize, Errno> {
        retry_interrupted(|| recv(self.0.as_raw_fd(), into, MsgFlags::empty()))
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn retry_interrupted(mut call: impl FnMut() -> Result<usize, Errno>) -> Result<usize, Errno> {
    loop {
        match call() {
            Err(Errno::EINTR) => {}
            result => return result,
        }
    }
}

/// Raises the descriptor limit as far as possible. If the limit is still too low, some clients cannot connect, and these
/// failures are counted.
pub(crate) fn raise_descriptor_limit() {
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
}
