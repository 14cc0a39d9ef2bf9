//! Reads the first bytes of a connection to detect the protocol and the client.
//!
//! These functions wait for no more bytes than they need. Bytes beyond that are kept to be read again
//! ([`Socket::look_ahead`]), or are only peeked at.

use std::future::poll_fn;
use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, recv};
use tokio::io::AsyncReadExt as _;
use tokio::time::timeout;

use super::socket::Socket;
use crate::protocol::cgi::ClientInfo;
use crate::protocol::proxy::{self, Header, Opening, Source};

/// The first bytes of an HTTP/2 connection (RFC 9113, section 3.4).
const HTTP2_PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Maximum size of a PROXY header: the fixed part of version 2, and 4 KiB of addresses and
/// additions.
const MAX_PROXY_HEADER: usize = 16 + (4 << 10);
const PEEK: MsgFlags = MsgFlags::MSG_PEEK.union(MsgFlags::MSG_DONTWAIT);

/// Reads the required PROXY header, and sets `origin` to the client that the header reports. The bytes after the header
/// stay in the kernel's queue, because SCGI needs the last byte of its request there.
///
/// # Errors
/// Fails if reading from the socket fails, if the stream ends, or if the header is missing or malformed, or does not
/// arrive within `time` (zero means no limit).
pub(crate) async fn read_proxy_header(socket: &mut Socket, origin: &mut ClientInfo, time: Duration) -> io::Result<()> {
    let mut seen = vec![0; MAX_PROXY_HEADER]; // on the heap, not in the future, which every connection has
    let looking = poll_fn(|context| socket.poll_try(context, |fd| look(fd, &mut seen)));
    let header = match time.is_zero() {
        true => looking.await?,
        false => timeout(time, looking).await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??,
    };
    socket.read_exact(seen.get_mut(..header.length).unwrap_or_default()).await?;
    socket.activity().set_head_begun(false);
    match header.source {
        Source::Itself => {}
        Source::Inet(address) => *origin = ClientInfo::of_http(Some(address), header.is_tls),
        Source::Unix => *origin = ClientInfo::of_http(None, header.is_tls),
    }
    Ok(())
}

/// Peeks at the received bytes. Returns `WouldBlock` for an incomplete header. The event loop reports further bytes
/// even though the first ones were not read.
fn look(fd: BorrowedFd<'_>, seen: &mut [u8]) -> io::Result<Header> {
    let count = recv(fd.as_raw_fd(), seen, PEEK)?;
    match proxy::decode(seen.get(..count).unwrap_or_default()).map_err(io::Error::other)? {
        Opening::Header(header) => Ok(header),
        Opening::Other => Err(io::Error::other("the connection does not begin with a PROXY header")),
        Opening::Incomplete if count == 0 || has_ended(fd) => Err(io::ErrorKind::UnexpectedEof.into()),
        Opening::Incomplete => Err(io::ErrorKind::WouldBlock.into()),
    }
}

/// Whether the peer has shut down its side.
fn has_ended(fd: BorrowedFd<'_>) -> bool {
    let mut watched = [PollFd::new(fd, PollFlags::from_bits_retain(libc::POLLRDHUP))];
    poll(&mut watched, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
}

/// Detects whether the client speaks HTTP/2, and returns as soon as the bytes show it.
///
/// # Errors
/// Returns the error from the socket. (The end of the stream is left for the next read.)
pub(crate) async fn speaks_http2(socket: &mut Socket) -> io::Result<bool> {
    // The bytes stay with the socket: the connection may be handed over before this function returns.
    while socket.early().len() < HTTP2_PREFACE.len() && HTTP2_PREFACE.starts_with(socket.early()) {
        if socket.look_ahead().await? == 0 {
            break;
        }
    }
    Ok(socket.early().starts_with(HTTP2_PREFACE))
}
