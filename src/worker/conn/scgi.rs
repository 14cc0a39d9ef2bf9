//! One SCGI connection: a request in, its response out, and that is all.
//!
//! One task does it all, as for FastCGI: it reads while it writes, and the body of the request and the response stream
//! at the same time.
//!
//! **The last byte of a request is left in the kernel's queue**, looked at but not taken, until the response is complete.
//! SCGI has no mark for the end of a response: the connection ends, and so it does when a worker dies or a body breaks
//! off. But who closes a socket with something unread in it, or dies, resets the connection, and the web server
//! sees an error instead of an end. That works on Unix sockets and over TCP, and for deaths of any kind.
//! (Not for a body without an announced length, which has no last byte before its end.)

use std::future::{Future as _, poll_fn};
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd as _, BorrowedFd};
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::{Context, Poll};

use bytes::{BufMut as _, BytesMut};
use http::{Method, Request, Response, StatusCode};
use http_body::Body as HttpBody;
use nix::poll::{PollFd, PollFlags, PollTimeout};
use nix::sys::socket::{MsgFlags, recv};
use tokio_util::io::poll_read_buf;
use tower_service::Service;

use super::fastcgi::OUTBOX_LIMIT;
use super::linger;
use super::outbox::Outbox;
use super::reply::Reply;
use super::socket::Socket;
use crate::app::body::{Body, pipe};
use crate::config::address::Protocol;
use crate::heir::journal::Entry;
use crate::protocol::cgi;
use crate::protocol::params::Params;
use crate::protocol::scgi::{Decoder, Error, Event};
use crate::worker::lifecycle::drain::Drain;
use crate::worker::service::serve::{Application, BoxError, ResponseFuture};

/// A read takes at least, and at most, so much.
const READ_SIZES: (usize, usize) = (4 << 10, 64 << 10);

/// Serves one connection to its end.
pub(crate) async fn serve<S, B>(socket: Socket, from: Option<SocketAddr>, application: Rc<Application<S>>, drain: Drain)
where
    S: Service<Request<Body>, Response = Response<B>> + Clone + 'static,
    S::Error: Into<BoxError>,
    B: HttpBody + 'static,
    B::Error: Into<BoxError>,
{
    let mut connection = Connection {
        socket,
        from,
        input: BytesMut::new(),
        read_size: READ_SIZES.0,
        rest: Rest::Coming,
        decoder: Decoder::new(application.limits.max_params),
        outbox: Outbox::default(),
        stdin: None,
        state: State::Reading,
        entry: None,
        application,
    };
    let mut drained = pin!(drain.wait());
    let mut last_chance = pin!(drain.wait_for_last_request());
    let ended = poll_fn(|context| {
        if connection.is_untouched() && (drain.has_begun() || drained.as_mut().poll(context).is_ready()) {
            if drain.has_sibling() {
                return Poll::Ready(Ok(false));
            }
            if last_chance.as_mut().poll(context).is_ready() {
                return Poll::Ready(Err(io::Error::other("the worker leaves, and no request has come")));
            }
        }
        connection.poll(context).map_ok(|()| true)
    });
    match ended.await {
        Ok(true) => connection.close(&drain).await,
        Ok(false) => drain.hand_over(connection.socket, &[]).await,
        Err(error) => log::debug!("an SCGI connection ended: {error}"),
    }
}

struct Connection<S: Service<Request<Body>>, B> {
    socket: Socket,
    /// Who is at its other end.
    from: Option<SocketAddr>,
    input: BytesMut,
    read_size: usize,
    rest: Rest,
    decoder: Decoder,
    outbox: Outbox,
    /// The request's body, while it lasts.
    stdin: Option<pipe::Writer>,
    state: State<S, B>,
    /// The request in the journal, as soon as something of it has come.
    entry: Option<Entry>,
    application: Rc<Application<S>>,
}

/// What is left of what the peer sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rest {
    /// Nobody knows.
    Coming,
    /// One byte, which has been looked at and is still in the kernel's queue.
    LastByte,
    /// Nothing: the stream is at its end.
    Nothing,
}

enum State<S: Service<Request<Body>>, B> {
    /// The request has not come yet.
    Reading,
    Answering {
        answer: Pin<Box<ResponseFuture<S, B>>>,
        is_head: bool,
    },
    Sending(Reply<B>),
    Answered,
}

impl<S, B> Connection<S, B>
where
    S: Service<Request<Body>, Response = Response<B>> + Clone + 'static,
    S::Error: Into<BoxError>,
    B: HttpBody + 'static,
    B::Error: Into<BoxError>,
{
    /// Goes on as far as it can. Ready when the response is written; an error if the peer is gone, or the response
    /// broke off.
    fn poll(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            let waiting = self.outbox.len();
            self.poll_response(context)?;
            let held_back = self.outbox.len() >= OUTBOX_LIMIT;
            self.enter_response(waiting);
            if let Poll::Ready(Err(error)) = self.outbox.poll_write(Pin::new(&mut self.socket), context) {
                return Poll::Ready(Err(error));
            }
            if matches!(self.state, State::Answered) && self.outbox.is_empty() {
                return Poll::Ready(Ok(()));
            }
            let room_again = held_back && self.outbox.len() < OUTBOX_LIMIT;
            if self.poll_input(context)?.is_pending() && !room_again {
                return Poll::Pending;
            }
        }
    }

    /// Has the journal know of what has been added to the output, of which `waiting` bytes were there before.
    fn enter_response(&self, waiting: usize) {
        let Some(entry) = self.entry else { return };
        let (conn, now) = (self.socket.conn(), self.outbox.len());
        if now > waiting && !conn.has_begun(entry) {
            conn.response_from(entry, conn.output(waiting));
        }
        if matches!(self.state, State::Answered) {
            conn.response_to(entry, conn.output(now));
        }
        conn.queue(now);
    }

    fn is_untouched(&self) -> bool {
        matches!(self.state, State::Reading) && self.decoder.is_untouched() && self.input.is_empty()
    }

    /// Goes on with the response until it waits for something, has ended, or has filled the output.
    fn poll_response(&mut self, context: &mut Context<'_>) -> io::Result<()> {
        while self.outbox.len() < OUTBOX_LIMIT {
            match &mut self.state {
                State::Answering { answer, is_head } => {
                    let Poll::Ready(mut response) = answer.as_mut().poll(context) else { return Ok(()) };
                    response.body_mut().tell(self.socket.activity());
                    self.state = State::Sending(Reply::begin(response, *is_head, self.outbox.tail()));
                }
                State::Sending(reply) => match reply.poll_piece(context) {
                    Poll::Pending => return Ok(()),
                    Poll::Ready(Some(piece)) => self.outbox.push(piece?),
                    Poll::Ready(None) => {
                        self.state = State::Answered;
                        self.stdin = None;
                    }
                },
                State::Reading | State::Answered => return Ok(()),
            }
        }
        Ok(())
    }

    /// Takes in what the peer sent. Pending when there is nothing more, or no room for it.
    fn poll_input(&mut self, context: &mut Context<'_>) -> io::Result<Poll<()>> {
        if self.stdin.as_ref().is_some_and(|stdin| stdin.poll_room(context).is_pending()) {
            return Ok(Poll::Pending);
        }
        if self.decode() {
            return Ok(Poll::Ready(()));
        }
        match (self.rest, self.decoder.to_come(self.input.len())) {
            (Rest::Nothing, _) => return Ok(Poll::Pending),
            (_, Some(0)) => return self.poll_hangup(context),
            (_, Some(1)) => {
                let Poll::Ready(last) = self.poll_last_byte(context)? else { return Ok(Poll::Pending) };
                match last {
                    Some(byte) => {
                        self.rest = Rest::LastByte;
                        self.input.put_u8(byte);
                    }
                    None => self.stream_ended()?,
                }
            }
            (_, to_come) => {
                let most = to_come.and_then(|to_come| usize::try_from(to_come - 1).ok()).unwrap_or(usize::MAX);
                match self.poll_read(context, most) {
                    Ok(Poll::Pending) => return Ok(Poll::Pending),
                    Ok(Poll::Ready(0)) => self.stream_ended()?,
                    Ok(Poll::Ready(_)) => {}
                    // Its answer is still to come.
                    Err(error) if error.kind() == io::ErrorKind::TimedOut => self.stream_ended()?,
                    Err(error) => return Err(error),
                }
            }
        }
        self.decode();
        Ok(Poll::Ready(()))
    }

    fn poll_read(&mut self, context: &mut Context<'_>, most: usize) -> io::Result<Poll<usize>> {
        if self.input.capacity() - self.input.len() < READ_SIZES.0.min(most) {
            self.input.reserve(self.read_size);
        }
        let room = most.min(self.input.capacity() - self.input.len());
        let read = poll_read_buf(Pin::new(&mut self.socket), context, &mut (&mut self.input).limit(room))?;
        if matches!(read, Poll::Ready(read) if read == room && room >= READ_SIZES.0) {
            self.read_size = (self.read_size * 4).min(READ_SIZES.1);
        }
        Ok(read)
    }

    /// Looks at the next byte, and leaves it where it is. `None` at the end of the stream.
    fn poll_last_byte(&mut self, context: &mut Context<'_>) -> io::Result<Poll<Option<u8>>> {
        let mut byte = [0];
        let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        let looked = self.socket.poll_try(context, |fd| Ok(recv(fd.as_raw_fd(), &mut byte, flags)?))?;
        Ok(looked.map(|count| byte.first().copied().filter(|_| count > 0)))
    }

    /// All of the request is here. An error when the peer has left; as long as it stays there is nothing to do.
    fn poll_hangup(&mut self, context: &mut Context<'_>) -> io::Result<Poll<()>> {
        let hung_up = |fd: BorrowedFd<'_>| {
            let mut sockets = [PollFd::new(fd, PollFlags::from_bits_retain(libc::POLLRDHUP))];
            match nix::poll::poll(&mut sockets, PollTimeout::ZERO)? {
                0 => Err(io::ErrorKind::WouldBlock.into()),
                _ => Ok(()),
            }
        };
        if self.socket.poll_try(context, hung_up)?.is_ready() {
            return Err(io::Error::other("the peer left before it had its response"));
        }
        Ok(Poll::Pending)
    }

    fn stream_ended(&mut self) -> io::Result<()> {
        if matches!(self.state, State::Reading) {
            if self.socket.activity().has_expired() && !self.is_untouched() {
                let why = "a head that did not come within --header-timeout";
                self.application.turned_away(Protocol::Scgi, StatusCode::REQUEST_TIMEOUT, self.from, why);
            }
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.rest = Rest::Nothing;
        // Dropping the body unfinished cuts it. An end that `--body-timeout` has made is not the peer's.
        if let Some(stdin) = self.stdin.take()
            && self.decoder.ends_with_the_stream()
            && !self.socket.activity().has_expired()
        {
            stdin.finish();
        }
        Ok(())
    }

    /// Decodes until something is to be done about it. False if there was no event.
    fn decode(&mut self) -> bool {
        let mut any = false;
        loop {
            match self.decoder.decode(&mut self.input) {
                Ok(None) => return any,
                Ok(Some(Event::Request { params, length })) => self.begin(params, length),
                Ok(Some(Event::Body(bytes))) => {
                    if let Some(stdin) = &self.stdin {
                        stdin.push(bytes);
                    }
                    return true; // see whether there is room for the next one
                }
                Ok(Some(Event::End)) => {
                    if let Some(stdin) = self.stdin.take() {
                        stdin.finish();
                    }
                }
                Err(error) => {
                    self.rest = Rest::Coming; // whatever it is
                    let status = match error {
                        Error::TooLong => StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
                        Error::Size | Error::Comma | Error::Strings | Error::Length | Error::Version => {
                            StatusCode::BAD_REQUEST
                        }
                    };
                    self.refuse(status, format!("the peer sent {error}"));
                }
            }
            any = true;
        }
    }

    fn enter(&mut self, is_head: bool) {
        if self.entry.is_none() {
            self.entry = Some(self.socket.conn().begin(1, is_head, true));
        }
    }

    fn begin(&mut self, params: Params, length: Option<u64>) {
        let max_body = self.application.limits.max_body;
        let activity = self.socket.activity();
        activity.request_came();
        let made = cgi::request(params, |_| {
            if length == Some(0) {
                return Body::empty();
            }
            let (writer, reader) = pipe::pipe();
            self.stdin = Some(writer);
            Body::stdin(reader, length, max_body).with_activity(activity)
        });
        let mut request = match made {
            Ok(request) => request,
            Err(error) => {
                self.stdin = None;
                return self.refuse(error.status(), error.to_string());
            }
        };
        let is_head = request.method() == Method::HEAD;
        self.enter(is_head);
        self.socket.activity().tell_waited(&mut request);
        let answer = Box::pin(self.application.answer(Protocol::Scgi, request));
        self.state = State::Answering { answer, is_head };
    }

    fn refuse(&mut self, status: StatusCode, why: impl Into<String>) {
        self.enter(false);
        self.socket.activity().request_came();
        let answer = Box::pin(self.application.refuse(Protocol::Scgi, status, self.from, why));
        self.state = State::Answering { answer, is_head: false };
    }

    /// The response is written. Takes what the peer has sent: closing a socket with bytes unread in it would destroy
    /// what we wrote on its way.
    async fn close(self, drain: &Drain) {
        match self.rest {
            Rest::LastByte => {
                let _ = self.socket.fd().map(|fd| recv(fd.as_raw_fd(), &mut [0], MsgFlags::MSG_DONTWAIT));
            }
            Rest::Coming => linger::linger(self.socket, drain).await,
            Rest::Nothing => {}
        }
    }
}
