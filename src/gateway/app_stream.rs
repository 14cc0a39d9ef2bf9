//! A connection of a gateway to an app process.
//!
//! The connection is shared between the codec, which reads and writes it, and the gateway, which checks an idle
//! connection before it uses it again ([`AppStream::is_quiet`]). It reports the master's byte [`NOT_SERVED`] as an error,
//! because an HTTP codec would only find that the response is malformed.

use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, RawFd};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::task::{Context, Poll, ready};

use bytes::BytesMut;
use nix::errno::Errno;
use nix::sys::socket::{self, MsgFlags};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, Interest, ReadBuf};
use tokio::net::{TcpStream, UnixStream};

use crate::net::app_channel::NOT_SERVED;
use crate::net::app_endpoint::AppConnection;
use crate::request::shared_block::poll_block;

/// Bytes of a long response that are read at a time.
const READ_SIZE: usize = 64 << 10;

/// States of [`Shared::received`].
const NOTHING: u8 = 0;
const SOMETHING: u8 = 1;
const TURNED_AWAY: u8 = 2;

/// A handle of the connection. The connection is closed with its last handle.
#[derive(Clone, Debug)]
pub(super) struct AppStream(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    socket: Socket,
    /// What the first byte was, if one was received.
    received: AtomicU8,
}

#[derive(Debug)]
enum Socket {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl AppStream {
    /// Waits until a connection is established.
    ///
    /// # Errors
    /// Returns the error from connect(2), or from epoll_ctl(2).
    pub(super) async fn establish(connection: AppConnection) -> io::Result<Self> {
        let socket = match connection {
            AppConnection::Unix(fd) => Socket::Unix(UnixStream::from_std(fd.into())?),
            AppConnection::Tcp(fd) => {
                let stream = TcpStream::from_std(fd.into())?;
                stream.writable().await?;
                if let Some(error) = stream.take_error()? {
                    return Err(error);
                }
                Socket::Tcp(stream)
            }
        };
        Ok(Self(Arc::new(Shared { socket, received: AtomicU8::new(NOTHING) })))
    }

    /// Whether the master has turned the connection away, because no process has accepted it.
    pub(super) fn is_turned_away(&self) -> bool {
        self.0.received.load(Ordering::Relaxed) == TURNED_AWAY
    }

    /// Whether any byte was received.
    pub(super) fn has_received(&self) -> bool {
        self.0.received.load(Ordering::Relaxed) != NOTHING
    }

    /// Forgets what was received, before the next request on the connection.
    pub(super) fn reset(&self) {
        self.0.received.store(NOTHING, Ordering::Relaxed);
    }

    /// Whether the process has neither sent anything nor closed the connection.
    pub(super) fn is_quiet(&self) -> bool {
        let mut byte = [0];
        socket::recv(self.fd(), &mut byte, MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT) == Err(Errno::EAGAIN)
    }

    /// Like [`is_quiet`](Self::is_quiet), as far as the event loop has been notified. Usually makes no system call. If the
    /// process has sent something, a byte of it is lost.
    pub(super) fn is_known_quiet(&self) -> bool {
        let read = match &self.0.socket {
            Socket::Unix(stream) => stream.try_read(&mut [0]),
            Socket::Tcp(stream) => stream.try_read(&mut [0]),
        };
        read.is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock)
    }

    /// Reads more of a response, after the bytes in `input`. The first read of a response is short in most cases, and uses the
    /// shared block of memory, so that a request that waits for its response has no buffer. `is_long` is false for the first
    /// read only. Returns the number of bytes; 0 is the end of the stream.
    ///
    /// # Errors
    /// Returns the error from the socket.
    pub(super) async fn read_response(&mut self, input: &mut BytesMut, is_long: bool) -> io::Result<usize> {
        if is_long {
            input.reserve(READ_SIZE);
            return self.read_buf(input).await;
        }
        let bytes = poll_fn(|context| poll_block(Pin::new(&mut *self), context)).await?;
        input.unsplit(bytes);
        Ok(input.len())
    }

    /// Whether this is a Unix socket.
    pub(super) fn is_local(&self) -> bool {
        matches!(self.0.socket, Socket::Unix(_))
    }

    pub(super) fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.0.socket {
            Socket::Unix(stream) => stream.as_fd(),
            Socket::Tcp(stream) => stream.as_fd(),
        }
    }

    fn fd(&self) -> RawFd {
        self.as_fd().as_raw_fd()
    }

    fn note(&self, bytes: &[u8]) -> io::Result<()> {
        let Some(&first) = bytes.first() else { return Ok(()) };
        if self.has_received() {
            return Ok(());
        }
        let is_turned_away = first == NOT_SERVED;
        self.0.received.store(if is_turned_away { TURNED_AWAY } else { SOMETHING }, Ordering::Relaxed);
        if is_turned_away { Err(io::Error::other("no app process has accepted the connection")) } else { Ok(()) }
    }
}

impl Socket {
    fn poll_readable(&self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self {
            Self::Unix(stream) => stream.poll_read_ready(context),
            Self::Tcp(stream) => stream.poll_read_ready(context),
        }
    }

    /// Declares that everything has been read, so that the next read waits for a notification instead of a system call. The
    /// event loop of this thread has not been notified of anything since the read.
    fn expect_notification(&self) {
        let nothing = || Err::<(), _>(io::ErrorKind::WouldBlock.into());
        let _ = match self {
            Self::Unix(stream) => stream.try_io(Interest::READABLE, nothing),
            Self::Tcp(stream) => stream.try_io(Interest::READABLE, nothing),
        };
    }

    fn poll_writable(&self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self {
            Self::Unix(stream) => stream.poll_write_ready(context),
            Self::Tcp(stream) => stream.poll_write_ready(context),
        }
    }

    fn try_write(&self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        match self {
            Self::Unix(stream) => stream.try_write_vectored(parts),
            Self::Tcp(stream) => stream.try_write_vectored(parts),
        }
    }
}

impl AsyncRead for AppStream {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            ready!(self.0.socket.poll_readable(context))?;
            let before = buffer.filled().len();
            let read = match &self.0.socket {
                Socket::Unix(stream) => stream.try_read_buf(buffer),
                Socket::Tcp(stream) => stream.try_read_buf(buffer),
            };
            match read {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
                Ok(_) => {
                    let is_end = buffer.filled().len() == before;
                    if buffer.remaining() > 0 && !is_end {
                        self.0.socket.expect_notification();
                    }
                    return Poll::Ready(self.note(buffer.filled().get(before..).unwrap_or_default()));
                }
            }
        }
    }
}

impl AsyncWrite for AppStream {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(context, &[IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        parts: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        loop {
            ready!(self.0.socket.poll_writable(context))?;
            match self.0.socket.try_write(parts) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                outcome => return Poll::Ready(outcome),
            }
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        match socket::shutdown(self.fd(), socket::Shutdown::Write) {
            Ok(()) | Err(Errno::ENOTCONN) => Poll::Ready(Ok(())),
            Err(errno) => Poll::Ready(Err(errno.into())),
        }
    }
}
