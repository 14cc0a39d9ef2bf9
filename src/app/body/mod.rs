//! The type of request bodies in all protocols, and of response bodies of blocking functions.

mod filter;
pub(crate) mod pipe;

use std::fmt;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{self, Thread};

use bytes::{Buf as _, Bytes};
use http::StatusCode;
use http_body::{Body as _, Frame, SizeHint};
use http_body_util::BodyExt as _;
use http_body_util::combinators::UnsyncBoxBody;
use hyper::body::Incoming;
use tokio::sync::oneshot;

pub use self::filter::FilterData;
use crate::request::activity::Activity;
use crate::request::body_wait::BodyWait;
use crate::sys::BoxError;

/// The body of a request; also usable as the body of a response.
///
/// It implements [`http_body::Body`] with [`Bytes`] as its data. The body of a request is read in chunks as they
/// arrive; at most about 64 KiB are buffered. A blocking function reads a body through [`Body::reader`].
#[derive(Debug)]
pub struct Body {
    kind: Kind,
    /// Number of further bytes allowed.
    allowed: u64,
    /// Set when the body has been read to its end, or was too long, too slow or cut short.
    outcome: Option<Arc<BodyOutcome>>,
    /// Tracks the time spent waiting for the client to send more.
    wait: Option<BodyWait>,
}

/// How reading a body ended. The worker derives the response from this outcome, regardless of how the application
/// handled the error.
#[derive(Debug, Default)]
pub(crate) struct BodyOutcome(AtomicU8);

impl BodyOutcome {
    const TOO_LARGE: u8 = 1;
    const TOO_SLOW: u8 = 2;
    const CUT: u8 = 3;
    /// The body was read to its end without an error.
    const WHOLE: u8 = 4;

    /// Returns the status that replaces the application's response, if any.
    pub(crate) fn status(&self) -> Option<StatusCode> {
        self.cause().map(|(status, _)| status).filter(|&status| status != StatusCode::BAD_REQUEST)
    }

    /// Returns the status and the reason for a body that failed because of the client.
    pub(crate) fn cause(&self) -> Option<(StatusCode, &'static str)> {
        match self.0.load(Ordering::Relaxed) {
            Self::TOO_LARGE => Some((StatusCode::PAYLOAD_TOO_LARGE, "a body larger than --max-body")),
            Self::TOO_SLOW => Some((StatusCode::REQUEST_TIMEOUT, "a body that arrived too slowly (--body-timeout)")),
            Self::CUT => Some((StatusCode::BAD_REQUEST, "an incomplete or malformed body")),
            _ => None,
        }
    }

    /// Whether the body may still fail, because it has not been read to its end.
    pub(crate) fn may_still_fail(&self) -> bool {
        self.0.load(Ordering::Relaxed) != Self::WHOLE
    }

    /// Stores the outcome. Only the first call has an effect.
    fn set(&self, outcome: u8) {
        let _ = self.0.compare_exchange(0, outcome, Ordering::Relaxed, Ordering::Relaxed);
    }
}

#[derive(Debug)]
enum Kind {
    Full(Bytes),
    /// The body from a FastCGI, SCGI or CGI connection, and the number of announced bytes that have not arrived yet, if
    /// a length was announced.
    Stdin(pipe::Reader, Option<u64>),
    Http(Unread),
    Other(UnsyncBoxBody<Bytes, BoxError>),
}

/// The unread part of an HTTP request's body. Dropping it returns the body to its connection: hyper
/// would otherwise close the connection immediately, and a peer that is still sending might never read
/// the response.
#[derive(Debug)]
struct Unread {
    /// `None` only during the drop.
    incoming: Option<Incoming>,
    /// Whether a read has failed.
    is_broken: bool,
    rest: Option<oneshot::Sender<UnreadBody>>,
}

/// The part of an HTTP request's body that the application did not read.
#[derive(Debug)]
pub(crate) struct UnreadBody {
    pub(crate) incoming: Incoming,
    /// Whether a read has failed.
    pub(crate) is_broken: bool,
}

impl Drop for Unread {
    fn drop(&mut self) {
        if let (Some(incoming), Some(rest)) = (self.incoming.take(), self.rest.take())
            && !incoming.is_end_stream()
        {
            let _ = rest.send(UnreadBody { incoming, is_broken: self.is_broken }); // fails if the connection has closed
        }
    }
}

fn pair<A, B>((a, b): (A, B)) -> (Option<A>, Option<B>) {
    (Some(a), Some(b))
}

/// Why a body could not be read to its end.
#[derive(Debug)]
#[non_exhaustive]
pub enum BodyError {
    /// The body is longer than `--max-body`.
    TooLarge,
    /// The client disconnected or cancelled the request.
    Cut,
    /// The client took longer than `--body-timeout`.
    TimedOut,
    /// The underlying body failed.
    Other(BoxError),
}

impl fmt::Display for BodyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooLarge => f.write_str("the body is larger than --max-body allows"),
            Self::Cut => f.write_str("the client disconnected before the body was complete"),
            Self::TimedOut => f.write_str("the client sent the body too slowly (--body-timeout)"),
            Self::Other(cause) => write!(f, "the body cannot be read: {cause}"),
        }
    }
}

impl std::error::Error for BodyError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Other(cause) => Some(cause.as_ref()),
            Self::TooLarge | Self::Cut | Self::TimedOut => None,
        }
    }
}

impl Body {
    /// Creates an empty body.
    #[must_use]
    pub fn empty() -> Self {
        Self::from(Bytes::new())
    }

    /// Wraps another body, such as a response that is produced in chunks.
    pub fn new<B>(body: B) -> Self
    where
        B: http_body::Body<Data = Bytes, Error: Into<BoxError>> + Send + 'static,
    {
        Self::from_kind(Kind::Other(body.map_err(Into::into).boxed_unsync()), u64::MAX)
    }

    /// Converts the body into a blocking reader, for use in a [`crate::blocking`] function or on any other thread that
    /// may block.
    #[must_use]
    pub fn reader(self) -> BodyReader {
        BodyReader { body: self, piece: Bytes::new() }
    }

    pub(crate) fn stdin(reader: pipe::Reader, length: Option<u64>, allowed: u64) -> Self {
        Self::from_kind(Kind::Stdin(reader, length), allowed)
    }

    /// Creates the body of an HTTP request, and a receiver that returns the unread part of the body if the body is
    /// dropped early.
    pub(crate) fn http(incoming: Incoming, allowed: u64) -> (Self, Option<oneshot::Receiver<UnreadBody>>) {
        let (sender, rest) = if incoming.is_end_stream() { (None, None) } else { pair(oneshot::channel()) };
        let unread = Unread { incoming: Some(incoming), is_broken: false, rest: sender };
        (Self::from_kind(Kind::Http(unread), allowed), rest)
    }

    /// Makes the body record in its connection's [`Activity`] when a reader is waiting for a chunk.
    pub(crate) fn with_activity(mut self, activity: &Arc<Activity>) -> Self {
        self.wait = Some(BodyWait::new(activity));
        self
    }

    /// Returns the state that will be set if the body is too long, too slow or cut short; `None` if
    /// the whole body has arrived.
    pub(crate) fn watch(&mut self) -> Option<Arc<BodyOutcome>> {
        if http_body::Body::is_end_stream(self) {
            return None;
        }
        Some(Arc::clone(self.outcome.get_or_insert_default()))
    }

    fn report(&self, outcome: u8) {
        if let Some(reported) = &self.outcome {
            reported.set(outcome);
        }
    }

    fn from_kind(kind: Kind, allowed: u64) -> Self {
        Self { kind, allowed, outcome: None, wait: None }
    }
}

impl http_body::Body for Body {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let frame = match &mut self.kind {
            Kind::Full(bytes) if bytes.is_empty() => Poll::Ready(None),
            Kind::Full(bytes) => Poll::Ready(Some(Ok(Frame::data(std::mem::take(bytes))))),
            Kind::Stdin(reader, announced) => reader.poll_next(context).map(|piece| match piece {
                Some(Ok(bytes)) => {
                    *announced = announced.map(|announced| announced.saturating_sub(bytes.len() as u64));
                    Some(Ok(Frame::data(bytes)))
                }
                // If the body is shorter than announced, the client has failed (FastCGI specification, sections 6.2 and
                // 6.4).
                None if announced.is_none_or(|announced| announced == 0) => None,
                None | Some(Err(pipe::Cut)) => Some(Err(BodyError::Cut)),
            }),
            Kind::Http(Unread { incoming: Some(incoming), is_broken, .. }) => {
                Pin::new(incoming).poll_frame(context).map_err(|error| {
                    *is_broken = true;
                    BodyError::Other(error.into())
                })
            }
            Kind::Http(_) => Poll::Ready(None),
            Kind::Other(body) => Pin::new(body).poll_frame(context).map_err(BodyError::Other),
        };
        if let Some(wait) = &mut self.wait {
            let is_late = if frame.is_pending() {
                wait.begin(context)
            } else {
                wait.end();
                matches!(frame, Poll::Ready(Some(Err(_)))) && wait.has_expired()
            };
            if is_late {
                if let Kind::Http(unread) = &mut self.kind {
                    unread.is_broken = true;
                }
                self.report(BodyOutcome::TOO_SLOW);
                return Poll::Ready(Some(Err(BodyError::TimedOut)));
            }
        }
        if let Poll::Ready(Some(Err(_))) = frame
            && !matches!(self.kind, Kind::Other(_))
        {
            self.report(BodyOutcome::CUT);
        }
        if let Poll::Ready(Some(Ok(frame))) = &frame
            && let Some(bytes) = frame.data_ref()
        {
            let length = bytes.len() as u64;
            if let Some(wait) = &self.wait {
                wait.taken(bytes.len());
            }
            if length > self.allowed {
                self.report(BodyOutcome::TOO_LARGE);
                return Poll::Ready(Some(Err(BodyError::TooLarge)));
            }
            self.allowed -= length;
        }
        if matches!(frame, Poll::Ready(None)) || frame.is_ready() && http_body::Body::is_end_stream(&*self) {
            self.report(BodyOutcome::WHOLE);
        }
        frame
    }

    fn is_end_stream(&self) -> bool {
        match &self.kind {
            Kind::Full(bytes) => bytes.is_empty(),
            Kind::Stdin(reader, announced) => announced.unwrap_or(0) == 0 && reader.is_at_end(),
            Kind::Http(unread) => unread.incoming.as_ref().is_none_or(http_body::Body::is_end_stream),
            Kind::Other(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.kind {
            Kind::Full(bytes) => SizeHint::with_exact(bytes.len() as u64),
            // The body may be longer than announced: it ends where the stream ends.
            Kind::Stdin(_, length) => {
                let mut hint = SizeHint::new();
                hint.set_lower(length.unwrap_or(0));
                hint
            }
            Kind::Http(unread) => unread.incoming.as_ref().map_or_else(SizeHint::new, http_body::Body::size_hint),
            Kind::Other(body) => body.size_hint(),
        }
    }
}

impl Default for Body {
    fn default() -> Self {
        Self::empty()
    }
}

impl From<Bytes> for Body {
    fn from(bytes: Bytes) -> Self {
        Self::from_kind(Kind::Full(bytes), u64::MAX)
    }
}

impl From<Vec<u8>> for Body {
    fn from(bytes: Vec<u8>) -> Self {
        Self::from(Bytes::from(bytes))
    }
}

impl From<String> for Body {
    fn from(text: String) -> Self {
        Self::from(Bytes::from(text))
    }
}

impl From<&'static str> for Body {
    fn from(text: &'static str) -> Self {
        Self::from(Bytes::from_static(text.as_bytes()))
    }
}

impl From<&'static [u8]> for Body {
    fn from(bytes: &'static [u8]) -> Self {
        Self::from(Bytes::from_static(bytes))
    }
}

impl From<()> for Body {
    fn from((): ()) -> Self {
        Self::empty()
    }
}

/// Reads a [`Body`] through [`io::Read`]. Each read blocks its thread until data arrives.
#[derive(Debug)]
pub struct BodyReader {
    body: Body,
    piece: Bytes,
}

thread_local! {
    static UNPARK: Waker = Waker::from(Arc::new(Unpark(thread::current())));
}

impl io::Read for BodyReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.piece.is_empty() {
            let frame = UNPARK.with(|waker| Pin::new(&mut self.body).poll_frame(&mut Context::from_waker(waker)));
            match frame {
                Poll::Ready(None) => return Ok(0),
                Poll::Ready(Some(Ok(frame))) => self.piece = frame.into_data().unwrap_or_default(),
                Poll::Ready(Some(Err(error))) => return Err(io::Error::other(error)),
                Poll::Pending => thread::park(),
            }
        }
        let count = self.piece.len().min(buffer.len());
        self.piece.copy_to_slice(&mut buffer[..count]);
        Ok(count)
    }
}

/// Wakes a parked thread.
struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use super::*;

    #[test]
    fn a_thread_reads_what_another_writes() {
        let (writer, reader) = pipe::pipe();
        let mut reader = Body::stdin(reader, None, 1 << 20).reader();
        let reading = thread::spawn(move || {
            let mut all = Vec::new();
            reader.read_to_end(&mut all).map(|_| all)
        });
        for _ in 0..100 {
            writer.push(Bytes::from_static(b"0123456789"));
        }
        writer.finish();
        assert_eq!(reading.join().unwrap().unwrap(), b"0123456789".repeat(100));
    }

    #[test]
    fn a_body_beyond_the_limit_is_an_error() {
        let (writer, reader) = pipe::pipe();
        let mut body = Body::stdin(reader, None, 10).reader();
        writer.push(Bytes::from_static(b"0123456789"));
        let mut read = [0; 10];
        body.read_exact(&mut read).unwrap();
        writer.push(Bytes::from_static(b"0"));
        assert_eq!(body.read(&mut read).unwrap_err().to_string(), BodyError::TooLarge.to_string());
    }
}
