//! The first bytes of a connection: what is read before it is known what is spoken, and by whom.
//!
//! Nothing here waits for more than it needs to tell; what was read too much goes back in front ([`Rewound`]).

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::{Buf as _, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, ReadBuf};

use super::socket::Socket;
use crate::protocol::cgi::Peer;
use crate::protocol::proxy::{self, Opening, Source};
use crate::pulse::Stage;

/// What an HTTP/2 connection begins with (RFC 9113, section 3.4).
const HTTP2_PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Room for most heads.
const FIRST_READ: usize = 4 << 10;

/// Reads the PROXY header of a connection, if it begins with one, and makes `peer` what it says. Returns what was read
/// beyond it.
///
/// # Errors
/// What the socket says, its end included; or the header makes no sense.
pub(crate) async fn read_proxy_header<IO>(socket: &mut IO, peer: &mut Peer) -> io::Result<BytesMut>
where
    IO: AsyncRead + Unpin,
{
    let mut early = BytesMut::with_capacity(FIRST_READ);
    loop {
        match proxy::decode(&early).map_err(io::Error::other)? {
            Opening::Incomplete => {}
            Opening::Other => return Ok(early),
            Opening::Header(header) => {
                early.advance(header.length);
                let is_https = header.is_tls;
                match header.source {
                    Source::Itself => {}
                    Source::Inet(address) => *peer = Peer { address: Some(address), is_https, over_unix: false },
                    Source::Unix => *peer = Peer { address: None, is_https, over_unix: true },
                }
                return Ok(early);
            }
        }
        if socket.read_buf(&mut early).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
}

/// Tells whether a connection speaks HTTP/2, as soon as its bytes can be told from HTTP/1. `early` is what was read of it
/// already; what is read here comes after that.
///
/// # Errors
/// What the socket says. (Its end is left to be found again.)
pub(crate) async fn speaks_http2<IO>(socket: &mut IO, early: &mut BytesMut) -> io::Result<bool>
where
    IO: AsyncRead + Unpin,
{
    while early.len() < HTTP2_PREFACE.len() && HTTP2_PREFACE.starts_with(early) {
        early.reserve(FIRST_READ);
        if socket.read_buf(early).await? == 0 {
            break;
        }
    }
    Ok(early.starts_with(HTTP2_PREFACE))
}

/// A socket some bytes of which were read too early: they are read again first.
#[derive(Debug)]
pub(crate) struct Rewound {
    early: BytesMut,
    socket: Socket,
    is_http2: bool,
}

impl Rewound {
    pub(crate) fn new(early: BytesMut, socket: Socket, is_http2: bool) -> Self {
        if is_http2 {
            socket.pulse().set_stage(Stage::Idle); // that was no request's head yet
        }
        Self { early, socket, is_http2 }
    }
}

impl AsyncRead for Rewound {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.early.is_empty() {
            let read = Pin::new(&mut self.socket).poll_read(context, buffer);
            // What comes between streams of HTTP/2 is no request's head: a ping, or the answer to our settings.
            if self.is_http2 && read.is_ready() && self.socket.pulse().stage() == Stage::Head {
                self.socket.pulse().set_stage(Stage::Idle);
            }
            return read;
        }
        let count = self.early.len().min(buffer.remaining());
        buffer.put_slice(&self.early.split_to(count));
        if self.early.is_empty() {
            self.early = BytesMut::new(); // its memory is not needed again
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Rewound {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.socket.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(context)
    }
}
