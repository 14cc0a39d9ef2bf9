//! The first bytes of a connection: what is read before it is known what is spoken, and by whom.
//!
//! Nothing here waits for more than it needs to tell; what was read too much goes back in front ([`Socket::look_ahead`]), or is
//! only looked at.

use std::future::poll_fn;
use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd};
use std::time::{Duration, Instant};

use nix::sys::socket::{MsgFlags, recv};
use tokio::io::AsyncReadExt as _;
use tokio::time::sleep;

use super::socket::Socket;
use crate::protocol::cgi::Origin;
use crate::protocol::proxy::{self, Opening, Source};

/// What an HTTP/2 connection begins with (RFC 9113, section 3.4).
const HTTP2_PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// A PROXY header has so many bytes at most: those of version 2, and 4 KiB of additions.
const MOST_OF_PROXY: usize = 16 + (4 << 10);
/// Between two looks at a PROXY header of which not all has come.
const PAUSE: Duration = Duration::from_millis(5);
const PEEK: MsgFlags = MsgFlags::MSG_PEEK.union(MsgFlags::MSG_DONTWAIT);

/// Reads the PROXY header of a connection, if it begins with one, and makes `origin` what it says. What is behind it is
/// left in the kernel's queue: SCGI needs its last byte there.
///
/// # Errors
/// What the socket says, its end included; or the header makes no sense, or does not come in `time` (zero is no limit).
pub(crate) async fn read_proxy_header(socket: &mut Socket, origin: &mut Origin, time: Duration) -> io::Result<()> {
    let begun = Instant::now();
    let mut seen = vec![0; MOST_OF_PROXY]; // not in the future, which every connection has
    loop {
        let look = |fd: BorrowedFd<'_>, seen: &mut [u8]| Ok(recv(fd.as_raw_fd(), seen, PEEK)?);
        let count = poll_fn(|context| socket.poll_try(context, |fd| look(fd, &mut seen))).await?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        match proxy::decode(seen.get(..count).unwrap_or_default()).map_err(io::Error::other)? {
            Opening::Other => return Ok(()),
            Opening::Header(header) => {
                socket.read_exact(seen.get_mut(..header.length).unwrap_or_default()).await?;
                socket.pulse().set_head_begun(false);
                match header.source {
                    Source::Itself => {}
                    Source::Inet(address) => *origin = Origin::of_http(Some(address), header.is_tls),
                    Source::Unix => *origin = Origin::of_http(None, header.is_tls),
                }
                return Ok(());
            }
            // Those who write it do so at once. There is no event for "more than that".
            Opening::Incomplete => sleep(PAUSE).await,
        }
        if !time.is_zero() && begun.elapsed() >= time {
            return Err(io::ErrorKind::TimedOut.into());
        }
    }
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
