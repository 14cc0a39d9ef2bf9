//! The first bytes of a connection: what is read before it is known what is spoken, and by whom.
//!
//! Nothing here waits for more than it needs to tell; what was read too much goes back in front ([`Socket::unread`]).

use std::io;

use bytes::{Buf as _, BytesMut};
use tokio::io::AsyncReadExt as _;

use super::socket::Socket;
use crate::protocol::cgi::Origin;
use crate::protocol::proxy::{self, Opening, Source};

/// What an HTTP/2 connection begins with (RFC 9113, section 3.4).
const HTTP2_PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Room for most heads.
const FIRST_READ: usize = 4 << 10;

/// Reads the PROXY header of a connection, if it begins with one, and makes `origin` what it says.
///
/// # Errors
/// What the socket says, its end included; or the header makes no sense.
pub(crate) async fn read_proxy_header(socket: &mut Socket, origin: &mut Origin) -> io::Result<()> {
    let mut early = BytesMut::with_capacity(FIRST_READ);
    loop {
        match proxy::decode(&early).map_err(io::Error::other)? {
            Opening::Incomplete => {}
            Opening::Other => {
                socket.unread(early);
                return Ok(());
            }
            Opening::Header(header) => {
                early.advance(header.length);
                let is_https = header.is_tls;
                match header.source {
                    Source::Itself => {}
                    Source::Inet(address) => *origin = Origin::of_http(Some(address), is_https),
                    Source::Unix => *origin = Origin::of_http(None, is_https),
                }
                socket.unread(early);
                return Ok(());
            }
        }
        if socket.read_buf(&mut early).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
}

/// Tells whether a connection speaks HTTP/2, as soon as its bytes can be told from HTTP/1.
///
/// # Errors
/// What the socket says. (Its end is left to be found again.)
pub(crate) async fn speaks_http2(socket: &mut Socket) -> io::Result<bool> {
    let mut early = BytesMut::with_capacity(FIRST_READ);
    while early.len() < HTTP2_PREFACE.len() && HTTP2_PREFACE.starts_with(&early) {
        if socket.read_buf(&mut early).await? == 0 {
            break;
        }
    }
    let is_http2 = early.starts_with(HTTP2_PREFACE);
    socket.unread(early);
    Ok(is_http2)
}
