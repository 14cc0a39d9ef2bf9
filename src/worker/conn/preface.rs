//! The first bytes of a connection: what is read before it is known what is spoken, and by whom.
//!
//! Nothing here waits for more than it needs to tell; what was read too much goes back in front ([`Socket::look_ahead`]), or is
//! only looked at.

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

/// What an HTTP/2 connection begins with (RFC 9113, section 3.4).
const HTTP2_PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// A PROXY header has so many bytes at most: those of version 2, and 4 KiB of additions.
const MAX_PROXY_HEADER: usize = 16 + (4 << 10);
const PEEK: MsgFlags = MsgFlags::MSG_PEEK.union(MsgFlags::MSG_DONTWAIT);

/// Reads the PROXY header that a connection has to begin with, and makes `origin` what it says. What is behind it is
/// left in the kernel's queue: SCGI needs its last byte there.
///
/// # Errors
/// What the socket says, its end included; or there is no header, it makes no sense, or does not come in `time` (zero is no limit).
pub(crate) async fn read_proxy_header(socket: &mut Socket, origin: &mut ClientInfo, time: Duration) -> io::Result<()> {
    let mut seen = vec![0; MAX_PROXY_HEADER]; // not in the future, which every connection has
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

/// Looks at what has come, and leaves it where it is. `WouldBlock` if that is a part of a header: the event loop tells of each
/// further piece that comes, though nothing was taken.
fn look(fd: BorrowedFd<'_>, seen: &mut [u8]) -> io::Result<Header> {
    let count = recv(fd.as_raw_fd(), seen, PEEK)?;
    match proxy::decode(seen.get(..count).unwrap_or_default()).map_err(io::Error::other)? {
        Opening::Header(header) => Ok(header),
        Opening::Other => Err(io::Error::other("it does not begin with a PROXY header (--proxy-protocol)")),
        Opening::Incomplete if count == 0 || has_ended(fd) => Err(io::ErrorKind::UnexpectedEof.into()),
        Opening::Incomplete => Err(io::ErrorKind::WouldBlock.into()),
    }
}

/// Whether the peer will send nothing more.
fn has_ended(fd: BorrowedFd<'_>) -> bool {
    let mut watched = [PollFd::new(fd, PollFlags::from_bits_retain(libc::POLLRDHUP))];
    poll(&mut watched, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
}

/// Tells whether a connection speaks HTTP/2, as soon as its bytes can be told from HTTP/1.
///
/// # Errors
/// What the socket says. (Its end is left to be found again.)
pub(crate) async fn speaks_http2(socket: &mut Socket) -> io::Result<bool> {
    // What was read stays with the socket: it may be passed on before this returns.
    while socket.early().len() < HTTP2_PREFACE.len() && HTTP2_PREFACE.starts_with(socket.early()) {
        if socket.look_ahead().await? == 0 {
            break;
        }
    }
    Ok(socket.early().starts_with(HTTP2_PREFACE))
}
