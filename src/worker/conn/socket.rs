//! Wraps the socket of an accepted connection.
//!
//! A socket is registered with the event loop only when it has to wait. A short request on a new connection has usually
//! arrived before the connection is accepted, and its response fits in the socket's buffer. Such a connection costs
//! four system calls: accept, read, write and close. The [`Watchdog`] monitors connections that wait.

use std::cell::Cell;
use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd, RawFd};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::BytesMut;
use nix::sys::socket::Shutdown;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio_util::io::poll_read_buf;

use crate::heir::journal::{ConnHandle, READ_BUFFER};
use crate::request::activity::Activity;
use crate::request::buffered;
use crate::request::shared_block::poll_block;
use crate::sys;
use crate::worker::deferred_wakes;
use crate::worker::lifecycle::watchdog::Watchdog;

#[derive(Debug)]
pub(crate) struct Socket {
    /// Bytes that were read ahead and will be read again.
    early: BytesMut,
    link: Link,
    conn: ConnHandle,
    activity: Arc<Activity>,
    watchdog: Rc<Watchdog>,
    /// Whether to measure how long the first bytes waited in the kernel.
    asks_wait: Cell<bool>,
}

#[derive(Debug)]
enum Link {
    /// The socket has not had to wait yet.
    Fresh(OwnedFd, Look),
    Registered(AsyncFd<OwnedFd>),
    /// The socket could not be registered, or is closed.
    Broken,
}

/// Maximum size of a read before the connection has waited.
const FIRST: usize = 4 << 10;

/// Whether an unregistered socket may have input to read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Look {
    /// It may have input.
    Now,
    /// Everything that had arrived was read.
    Deferred,
    /// Everything that had arrived was read, and every runnable task has run since.
    Last,
}

impl Socket {
    /// Wraps a connection. `accepted` is a non-blocking connection that has a journal record; `early` contains bytes
    /// that were read from it before.
    pub(crate) fn new(accepted: OwnedFd, conn: ConnHandle, early: &[u8], watchdog: &Rc<Watchdog>) -> Self {
        let (link, early) = (Link::Fresh(accepted, Look::Now), BytesMut::from(early));
        let asks_wait = Cell::new(false);
        Self { early, link, conn, activity: Arc::default(), watchdog: Rc::clone(watchdog), asks_wait }
    }

    /// Measures how long the first request waited in the kernel, if the connection uses TCP. Must be called before the first read.
    pub(crate) fn ask_wait(&self) {
        self.asks_wait.set(true);
    }

    /// Returns the connection's handle in the journal.
    pub(crate) fn conn(&self) -> &ConnHandle {
        &self.conn
    }

    pub(crate) fn activity(&self) -> &Arc<Activity> {
        &self.activity
    }

    /// Bytes that will be read again.
    pub(crate) fn early(&self) -> &[u8] {
        &self.early
    }

    /// Puts back the bytes that were read last.
    pub(crate) fn put_back(&mut self, bytes: &[u8]) {
        if !bytes.is_empty() {
            self.early = [bytes, &self.early].concat().as_slice().into();
        }
    }

    /// Reads the next bytes and keeps them to be read again. Returns their number.
    ///
    /// # Errors
    /// Returns the error from the socket.
    pub(crate) async fn look_ahead(&mut self) -> io::Result<usize> {
        poll_fn(|context| {
            let mut early = std::mem::take(&mut self.early); // the read below must not return these bytes again
            early.reserve(FIRST);
            let read = poll_read_buf(Pin::new(&mut *self), context, &mut early);
            // A connection that waits has no buffer.
            self.early = if early.is_empty() { BytesMut::new() } else { early };
            read
        })
        .await
    }

    /// Reads the available bytes into the [shared block](crate::request::shared_block). An empty buffer means the end of
    /// the stream.
    ///
    /// # Errors
    /// Returns the error from the socket, or `TimedOut` if the peer took too long.
    pub(crate) fn poll_bytes(&mut self, context: &mut Context<'_>) -> Poll<io::Result<BytesMut>> {
        poll_block(Pin::new(self), context)
    }

    pub(crate) fn fd(&self) -> Option<BorrowedFd<'_>> {
        match &self.link {
            Link::Fresh(socket, _) => Some(socket.as_fd()),
            Link::Registered(socket) => Some(socket.get_ref().as_fd()),
            Link::Broken => None,
        }
    }

    /// Registers the socket with the event loop, because it has to wait.
    fn register(&mut self) -> io::Result<()> {
        if !matches!(self.link, Link::Fresh(..)) {
            return Ok(());
        }
        self.link = match std::mem::replace(&mut self.link, Link::Broken) {
            Link::Fresh(socket, _) => Link::Registered(sys::register(socket, Interest::READABLE | Interest::WRITABLE)?),
            registered => registered,
        };
        if let Some(fd) = self.fd() {
            self.watchdog.watch(fd, &self.activity);
        }
        Ok(())
    }

    /// Registers the socket before a wait. First lets every other task run: one of them may produce the response, so
    /// that the connection can end without a registration. Becomes ready when the socket is registered.
    fn poll_register(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        if let Link::Fresh(_, look) = &mut self.link
            && *look != Look::Last
        {
            *look = Look::Last;
            deferred_wakes::wake_later(context.waker().clone());
            return Poll::Pending;
        }
        Poll::Ready(self.register())
    }

    /// Tries a system call until it does not return `WouldBlock`: now, and each time the socket
    /// becomes readable.
    pub(crate) fn poll_try<T>(
        &mut self,
        context: &mut Context<'_>,
        mut call: impl FnMut(BorrowedFd<'_>) -> io::Result<T>,
    ) -> Poll<io::Result<T>> {
        if let (Link::Fresh(_, Look::Now), Some(fd)) = (&self.link, self.fd())
            && let Some(outcome) = at_once(|| call(fd))
        {
            return Poll::Ready(outcome);
        }
        ready!(self.poll_register(context))?;
        let Link::Registered(socket) = &self.link else { return Poll::Ready(Err(io::ErrorKind::NotConnected.into())) };
        loop {
            let mut readable = ready!(socket.poll_read_ready(context))?;
            match call(socket.get_ref().as_fd()) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => readable.clear_ready(),
                // `poll(2)` fails with this error if a signal arrives, even with a timeout of zero.
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                outcome => return Poll::Ready(outcome),
            }
        }
    }

    /// Records a read of `count` bytes; 0 is the end of the stream.
    fn came(&self, count: usize) -> io::Result<()> {
        if count == 0 && self.activity.has_expired() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        self.activity.add_read(count);
        if count > 0 && buffered::is_full() {
            self.watchdog.shed();
        }
        if self.asks_wait.take()
            && let Some(Ok(waited)) = self.fd().map(sys::since_last_received)
        {
            self.activity.set_waited(waited);
        }
        Ok(())
    }

    fn poll_write_registered(&self, context: &mut Context<'_>, slices: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        let Link::Registered(fd) = &self.link else { return Poll::Ready(Err(io::ErrorKind::NotConnected.into())) };
        loop {
            let mut writable = ready!(fd.poll_write_ready(context))?;
            match self.conn.write(fd.get_ref().as_fd(), slices) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => writable.clear_ready(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                outcome => return Poll::Ready(outcome),
            }
        }
    }

    fn went(&self, outcome: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if let Poll::Ready(Ok(count)) = &outcome {
            self.activity.add_written(*count);
        }
        self.activity.set_writing(outcome.is_pending());
        outcome
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        self.activity.close();
        self.conn.close(std::mem::replace(&mut self.link, Link::Broken));
    }
}

/// Makes one system call on an unregistered socket. Returns `None` if the call would have to wait.
fn at_once<T>(mut call: impl FnMut() -> io::Result<T>) -> Option<io::Result<T>> {
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return None,
            outcome => return Some(outcome),
        }
    }
}

impl AsyncRead for Socket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if !self.early.is_empty() {
            let count = self.early.len().min(buffer.remaining());
            buffer.put_slice(&self.early.split_to(count));
            if self.early.is_empty() {
                self.early = BytesMut::new(); // the memory is not needed again
            }
            return Poll::Ready(Ok(()));
        }
        let socket = &mut *self;
        if let Link::Fresh(fd, look @ Look::Now) = &mut socket.link {
            let room = buffer.remaining().min(FIRST);
            if let Some(read) = at_once(|| socket.conn.read(fd.as_fd(), buffer, room)) {
                let count = read?;
                if count < room {
                    *look = Look::Deferred;
                }
                return Poll::Ready(socket.came(count));
            }
        }
        ready!(socket.poll_register(context))?;
        let Link::Registered(fd) = &socket.link else { return Poll::Ready(Err(io::ErrorKind::NotConnected.into())) };
        let room = buffer.remaining().min(READ_BUFFER);
        loop {
            let mut readable = ready!(fd.poll_read_ready(context))?;
            match socket.conn.read(fd.get_ref().as_fd(), buffer, room) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => readable.clear_ready(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Poll::Ready(Err(error)),
                Ok(count) => {
                    // The socket is empty now; a new event reports later bytes.
                    if count > 0 && count < room {
                        readable.clear_ready();
                    }
                    return Poll::Ready(socket.came(count));
                }
            }
        }
    }
}

impl AsyncWrite for Socket {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(context, &[IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let socket = &mut *self;
        if let Link::Fresh(fd, _) = &socket.link {
            match at_once(|| socket.conn.write(fd.as_fd(), slices)) {
                Some(written) => return Poll::Ready(written),
                None => socket.register()?,
            }
        }
        let written = socket.poll_write_registered(context, slices);
        socket.went(written)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    /// Does nothing, because the socket has no buffer to flush.
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.conn.flushed();
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.fd() {
            Some(fd) => Poll::Ready(shut(fd.as_raw_fd(), Shutdown::Write)),
            None => Poll::Ready(Err(io::ErrorKind::NotConnected.into())),
        }
    }
}

pub(crate) fn shut(fd: RawFd, how: Shutdown) -> io::Result<()> {
    Ok(nix::sys::socket::shutdown(fd, how)?)
}
