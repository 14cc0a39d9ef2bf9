//! Carries upgraded connections: `101 Switching Protocols` over HTTP/1.1, and extended CONNECT over
//! HTTP/2 (RFC 8441).
//!
//! The application gets the type that every server built on hyper provides, [`hyper::upgrade::Upgraded`]. This value
//! contains a [`Tunnel`] rather than the connection itself, and may move to any thread. The connection's task keeps the
//! socket and copies the bytes between socket and tunnel ([`carry`]). So an upgraded connection is still one of the
//! worker's connections: it is counted and in the journal, the watchdog checks it, and a drain ends it.
//!
//! Only hyper can create an `Upgraded`. A second, very short HTTP/1 connection in memory turns the [`Tunnel`] into an
//! `Upgraded`: the tunnel supplies a request and discards the head of the response ([`Offer`]).

use std::cell::Cell;
use std::convert::Infallible;
use std::future::{Future, poll_fn};
use std::io;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use bytes::{Buf as _, Bytes};
use http::{Method, Request, Response, StatusCode, Version};
use hyper::rt::{Read, ReadBufCursor, Write};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::upgrade::OnUpgrade;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::{Instant, sleep_until};

use super::connection_header::asks_for_upgrade;
use super::requests::OpenRequest;
use crate::app::body::{Body, pipe};
use crate::request::activity::{Activity, Wait};
use crate::request::shared_block::poll_block;
use crate::worker::conn::linger::discard;
use crate::worker::lifecycle::drain::Drain;
use crate::worker::service::request_guard::RequestGuard;
use crate::worker::service::serve::Switch;

/// The request on the in-memory connection.
const PREFACE: &[u8] = b"GET / HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n";
/// The end of the response head on the in-memory connection.
const END_OF_HEAD: &[u8] = b"\r\n\r\n";
/// Maximum number of bytes that one write of the application passes on.
const PIECE: usize = 64 << 10;

/// The application's end of an upgraded connection.
struct Tunnel {
    /// Unread part of [`PREFACE`].
    preface: &'static [u8],
    /// Number of bytes of [`END_OF_HEAD`] at the end of the last write; the whole length once the
    /// application has the tunnel.
    head_end: usize,
    from_client: pipe::Reader,
    /// Bytes that have been taken from the pipe but not yet read.
    rest: Bytes,
    /// `None` when the application has shut down its direction.
    to_client: Option<pipe::Writer>,
}

/// The connection task's end of a [`Tunnel`].
struct Link {
    from_client: pipe::Writer,
    to_client: pipe::Reader,
}

impl Read for Tunnel {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        mut buffer: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        if !self.preface.is_empty() {
            let (now, later) = self.preface.split_at(self.preface.len().min(buffer.remaining()));
            buffer.put_slice(now);
            self.preface = later;
            return Poll::Ready(Ok(()));
        }
        if self.head_end < END_OF_HEAD.len() {
            return Poll::Pending;
        }
        if self.rest.is_empty() {
            self.rest = match ready!(self.from_client.poll_next(context)) {
                None => return Poll::Ready(Ok(())),
                Some(Ok(bytes)) => bytes,
                Some(Err(pipe::Cut)) => return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into())),
            };
        }
        let count = self.rest.len().min(buffer.remaining());
        buffer.put_slice(&self.rest.split_to(count));
        Poll::Ready(Ok(()))
    }
}

impl Write for Tunnel {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if self.head_end < END_OF_HEAD.len() {
            for &byte in bytes {
                match END_OF_HEAD.get(self.head_end) {
                    None => break,
                    Some(&expected) if expected == byte => self.head_end += 1,
                    Some(_) => self.head_end = usize::from(byte == b'\r'),
                }
            }
            return Poll::Ready(Ok(bytes.len()));
        }
        let Some(to_client) = &self.to_client else { return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())) };
        ready!(to_client.poll_room(context));
        if to_client.is_abandoned() {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        let piece = bytes.get(..PIECE).unwrap_or(bytes);
        to_client.push_copy(piece);
        Poll::Ready(Ok(piece.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(())) // the connection's task writes the bytes
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        if let Some(to_client) = self.to_client.take() {
            to_client.finish();
        }
        Poll::Ready(Ok(()))
    }
}

/// An upgrade that the application may take.
pub(super) struct Offer {
    pub(super) switch: Switch,
    /// hyper's handle for the real connection.
    theirs: OnUpgrade,
    link: Link,
    is_taken: Rc<Cell<bool>>,
    in_memory: Pin<Box<dyn Future<Output = hyper::Result<()>>>>,
}

impl Offer {
    /// Returns the upgrade that a request offers, if any. An [`OnUpgrade`] stays in the request's extensions only if
    /// there is an offer.
    pub(super) fn of(request: &mut Request<Body>) -> Option<Self> {
        let theirs = request.extensions_mut().remove::<OnUpgrade>()?;
        let switch = if request.version() == Version::HTTP_2 {
            request.extensions().get::<hyper::ext::Protocol>()?;
            Switch::Connect
        } else if request.method() != Method::CONNECT && asks_for_upgrade(request.headers()) {
            Switch::Upgrade
        } else {
            return None;
        };
        let ((from_client, read), (write, to_client)) = (pipe::pipe(), pipe::pipe());
        let tunnel =
            Tunnel { preface: PREFACE, head_end: 0, from_client: read, rest: Bytes::new(), to_client: Some(write) };
        let (is_taken, ours) = (Rc::new(Cell::new(false)), Rc::new(Cell::new(None)));
        let (taken, captured) = (Rc::clone(&is_taken), Rc::clone(&ours));
        let answer = service_fn(move |mut request: Request<hyper::body::Incoming>| {
            captured.set(request.extensions_mut().remove::<OnUpgrade>());
            let taken = Rc::clone(&taken);
            poll_fn(move |_| if taken.get() { Poll::Ready(Ok::<_, Infallible>(switching())) } else { Poll::Pending })
        });
        let mut in_memory: Pin<Box<dyn Future<Output = _>>> =
            Box::pin(http1::Builder::new().serve_connection(tunnel, answer).with_upgrades());
        // Every await in this future completes immediately, except the wait for `is_taken`.
        let _ = in_memory.as_mut().poll(&mut Context::from_waker(Waker::noop()));
        request.extensions_mut().insert(ours.take()?);
        Some(Self { switch, theirs, link: Link { from_client, to_client }, is_taken, in_memory })
    }

    /// Completes the upgrade after the application has taken it: the application's `OnUpgrade` yields the tunnel.
    pub(super) fn take(mut self, guard: RequestGuard, open_request: OpenRequest) -> AcceptedUpgrade {
        self.is_taken.set(true);
        let done = self.in_memory.as_mut().poll(&mut Context::from_waker(Waker::noop()));
        debug_assert!(done.is_ready(), "nothing delays the write of the head");
        AcceptedUpgrade { link: self.link, theirs: self.theirs, guard, open_request }
    }
}

fn switching() -> Response<http_body_util::Empty<Bytes>> {
    let mut response = Response::new(http_body_util::Empty::new());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    response
}

/// An upgrade that the application has taken. The worker counts it as a request until it ends.
pub(super) struct AcceptedUpgrade {
    link: Link,
    theirs: OnUpgrade,
    guard: RequestGuard,
    open_request: OpenRequest,
}

impl AcceptedUpgrade {
    /// Copies the bytes of an HTTP/1 connection; `early` was received after the request. Returns
    /// when both directions have ended and the socket must be closed.
    pub(super) async fn carry(self, io: impl AsyncRead + AsyncWrite + Unpin, early: Bytes, ends: &Ends) {
        let Self { link, mut guard, open_request, .. } = self;
        open_request.is_upgraded();
        carry(io, early, link, &mut guard, None, ends).await;
        drop((guard, open_request));
    }

    /// Copies the bytes of an HTTP/2 stream.
    pub(super) async fn carry_stream(self, activity: Arc<Activity>, ends: Ends) {
        let Self { link, theirs, mut guard, open_request } = self;
        open_request.is_upgraded();
        match theirs.await {
            Ok(stream) => {
                let (stream, room) = (hyper_util::rt::TokioIo::new(stream), Wait::for_room(&activity));
                carry(stream, Bytes::new(), link, &mut guard, Some(room), &ends).await;
            }
            Err(error) => log::debug!("cannot upgrade an HTTP/2 stream: {error}"),
        }
        drop((guard, open_request));
    }
}

/// Reasons for the server to end an upgraded connection.
#[derive(Clone, Debug)]
pub(super) struct Ends {
    pub(super) drain: Drain,
    /// Time without a byte in either direction; zero means no limit.
    pub(super) idle: Duration,
}

impl Ends {
    /// Returns when the worker's drain is nearly over, or the connection has been idle for too
    /// long.
    async fn reached(&self, moved: &Cell<Instant>) {
        let idle = async {
            loop {
                let last = moved.get();
                sleep_until(last + self.idle).await;
                if moved.get() == last {
                    return log::debug!(idle:? = self.idle; "an upgraded connection is idle (--upgraded-timeout)");
                }
            }
        };
        tokio::select! {
            () = self.drain.wait_for_end() => {}
            () = idle, if !self.idle.is_zero() => {}
        }
    }
}

/// Copies bytes in both directions until both have ended. When one of the `ends` is reached, the application reads the
/// end of its input and has the time of [`Drain::farewell`] for its last output. Then the direction towards the client
/// is shut down.
async fn carry(
    mut io: impl AsyncRead + AsyncWrite + Unpin,
    early: Bytes,
    link: Link,
    guard: &mut RequestGuard,
    room: Option<Wait>,
    ends: &Ends,
) {
    let moved = Cell::new(Instant::now());
    let mut copy =
        BidirectionalCopy { link: Some(link), output: Bytes::new(), input_ended: false, output_ended: false, room };
    if let Some(link) = copy.link.as_ref().filter(|_| !early.is_empty()) {
        link.from_client.push(early);
    }
    let mut ended = pin!(ends.reached(&moved));
    let mut farewell = pin!(None);
    let carried = poll_fn(|context| {
        if farewell.is_none() && ended.as_mut().poll(context).is_ready() {
            farewell.set(Some(sleep_until(Instant::now() + ends.drain.farewell())));
            copy.end_input();
        }
        let carried = copy.poll(&mut io, context, guard, &moved);
        match farewell.as_mut().as_pin_mut() {
            Some(farewell) if carried.is_pending() => farewell.poll(context).map(Ok),
            _ => carried,
        }
    });
    match carried.await {
        Ok(()) => {
            let (input_ended, mut room) = (copy.input_ended, copy.room.take());
            drop(copy); // the application reads the end of the stream
            // Over HTTP/2, the end of the stream must wait until there was window for the data.
            if let Some(room) = &mut room {
                room.set(true);
            }
            let _ = poll_fn(|context| Pin::new(&mut io).poll_shutdown(context)).await;
            drop(room);
            if !input_ended {
                discard(io, ends.drain.farewell()).await;
            }
        }
        Err(error) => log::debug!("an upgraded connection ended: {error}"),
    }
}

/// The state of both directions.
struct BidirectionalCopy {
    /// `None` when the application has dropped its end.
    link: Option<Link>,
    /// Bytes being written.
    output: Bytes,
    /// Whether the client has sent all its bytes.
    input_ended: bool,
    output_ended: bool,
    room: Option<Wait>,
}

impl BidirectionalCopy {
    /// Makes the application read the end of the input.
    fn end_input(&mut self) {
        if let Some(link) = &self.link {
            link.from_client.finish();
        }
    }

    /// Copies bytes in both directions. Becomes ready when both directions have ended, or when the application has
    /// dropped its end.
    fn poll(
        &mut self,
        io: &mut (impl AsyncRead + AsyncWrite + Unpin),
        context: &mut Context<'_>,
        guard: &mut RequestGuard,
        moved: &Cell<Instant>,
    ) -> Poll<io::Result<()>> {
        let Some(link) = &self.link else { return Poll::Ready(Ok(())) };
        while !self.input_ended && !link.from_client.is_abandoned() && link.from_client.poll_room(context).is_ready() {
            let Poll::Ready(read) = poll_block(Pin::new(&mut *io), context)? else { break };
            moved.set(Instant::now());
            if read.is_empty() {
                self.input_ended = true;
                link.from_client.finish();
            } else {
                link.from_client.push(read.freeze());
            }
        }
        let written = loop {
            if self.output.is_empty() && !self.output_ended {
                self.output = match link.to_client.poll_next(context) {
                    Poll::Pending => break Poll::Pending,
                    Poll::Ready(Some(Ok(bytes))) => bytes,
                    // The application has dropped its end or shut it down. Either means that its output has ended.
                    Poll::Ready(None | Some(Err(pipe::Cut))) => {
                        self.output_ended = true;
                        break Pin::new(&mut *io).poll_shutdown(context)?;
                    }
                };
            }
            if self.output_ended {
                break Poll::Ready(());
            }
            let Poll::Ready(count) = Pin::new(&mut *io).poll_write(context, &self.output)? else {
                break Poll::Pending;
            };
            if count == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            moved.set(Instant::now());
            guard.carried(count);
            self.output.advance(count);
            if self.output.is_empty() {
                let _ = Pin::new(&mut *io).poll_flush(context)?;
            }
        };
        if let Some(room) = &mut self.room {
            room.set(!self.output.is_empty());
        }
        let nobody_reads = self.input_ended || link.from_client.is_abandoned();
        if written.is_ready() && nobody_reads { Poll::Ready(Ok(())) } else { Poll::Pending }
    }
}
