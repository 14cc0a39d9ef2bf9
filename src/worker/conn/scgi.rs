//! Serves one SCGI connection: one request and its response.
//!
//! One task does all the work, as for FastCGI: it reads while it writes, so the request body and the response are
//! transferred at the same time.
//!
//! **The last byte of a request is left in the kernel's queue**, peeked at but not read, until the response is
//! complete. SCGI does not mark the end of a response: the connection simply ends, as it also does when a worker dies
//! or a body fails. But if a socket has unread bytes when its process closes it or dies, the kernel resets the
//! connection, and the web server reads an error instead of a normal end. This works on Unix sockets and over TCP,
//! whatever killed the process. (It does not work for a body without an announced length, whose last byte is not
//! known.)

use std::future::{Future as _, poll_fn};
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd as _, BorrowedFd};
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::{Context, Poll};

use bytes::{BufMut as _, BytesMut};
use http::{Method, Request, StatusCode};
use nix::poll::{PollFd, PollFlags, PollTimeout};
use nix::sys::socket::{MsgFlags, recv};
use tokio_util::io::poll_read_buf;
use tower_service::Service;

use super::fastcgi::OUTBOX_LIMIT;
use super::linger;
use super::outbox::Outbox;
use super::reply::CgiResponseBody;
use super::socket::Socket;
use super::under_way::UnderWay;
use crate::app::body::{Body, pipe};
use crate::config::address::Protocol;
use crate::protocol::cgi;
use crate::protocol::params::Params;
use crate::protocol::scgi::{ScgiDecoder, ScgiError, ScgiEvent};
use crate::worker::lifecycle::drain::Drain;
use crate::worker::service::serve::{AppService, Application, ResponseBody, ResponseFuture};

/// Minimum and maximum number of bytes of one read.
const READ_SIZES: (usize, usize) = (4 << 10, 64 << 10);

/// Serves one connection until it ends.
pub(crate) async fn serve<S, B>(socket: Socket, from: Option<SocketAddr>, application: Rc<Application<S>>, drain: Drain)
where
    S: AppService<B>,
    B: ResponseBody,
{
    let mut connection = Connection {
        socket,
        from,
        input: BytesMut::new(),
        read_size: READ_SIZES.0,
        rest: RemainingInput::Coming,
        decoder: ScgiDecoder::new(application.limits.max_params),
        outbox: Outbox::default(),
        stdin: None,
        state: State::Reading,
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
                return Poll::Ready(Err(io::Error::other("the worker drains, and no request has arrived")));
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
    /// The peer's address.
    from: Option<SocketAddr>,
    input: BytesMut,
    read_size: usize,
    rest: RemainingInput,
    decoder: ScgiDecoder,
    outbox: Outbox,
    /// Pipe of the request body, while the body lasts.
    stdin: Option<pipe::Writer>,
    state: State<S, B>,
    application: Rc<Application<S>>,
}

/// State of the input after the bytes read so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum RemainingInput {
    /// The state is unknown.
    Coming,
    /// One byte, which was peeked at and is still in the kernel's queue.
    LastByte,
    /// The stream has ended.
    Nothing,
}

enum State<S: Service<Request<Body>>, B> {
    /// The request is not complete yet.
    Reading,
    Answering {
        answer: Pin<Box<ResponseFuture<S, B>>>,
        is_head: bool,
    },
    Sending(CgiResponseBody<B>),
    Answered,
}

impl<S, B> Connection<S, B>
where
    S: AppService<B>,
    B: ResponseBody,
{
    /// Advances the connection as far as possible. Becomes ready when the response is written. Returns an error if the
    /// peer has disconnected, or if the response failed.
    fn poll(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            self.poll_response(context)?;
            let held_back = self.outbox.len() >= OUTBOX_LIMIT;
            self.socket.conn().queue(self.outbox.len());
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

    fn is_untouched(&self) -> bool {
        matches!(self.state, State::Reading) && self.decoder.is_untouched() && self.input.is_empty()
    }

    /// Advances the response until it waits, has ended, or has filled the output.
    fn poll_response(&mut self, context: &mut Context<'_>) -> io::Result<()> {
        while self.outbox.len() < OUTBOX_LIMIT {
            match &mut self.state {
                State::Answering { answer, is_head } => {
                    let Poll::Ready(mut response) = answer.as_mut().poll(context) else { return Ok(()) };
                    if let Some(guard) = response.body_mut().guard_mut() {
                        guard.response_begins(self.outbox.len());
                    }
                    self.state = State::Sending(CgiResponseBody::begin(response, *is_head, self.outbox.tail()));
                }
                State::Sending(reply) => match reply.poll_piece(context) {
                    Poll::Pending => return Ok(()),
                    Poll::Ready(Some(piece)) => self.outbox.push(piece?),
                    Poll::Ready(None) => {
                        if let Some(guard) = reply.guard() {
                            guard.response_ends(self.outbox.len());
                        }
                        self.state = State::Answered;
                        self.stdin = None;
                    }
                },
                State::Reading | State::Answered => return Ok(()),
            }
        }
        Ok(())
    }

    /// Reads and decodes input from the peer. Returns Pending when there is no more input, or no space for more input.
    fn poll_input(&mut self, context: &mut Context<'_>) -> io::Result<Poll<()>> {
        if self.stdin.as_ref().is_some_and(|stdin| stdin.poll_room(context).is_pending()) {
            return Ok(Poll::Pending);
        }
        if self.decode() {
            return Ok(Poll::Ready(()));
        }
        match (self.rest, self.decoder.to_come(self.input.len())) {
            (RemainingInput::Nothing, _) => return Ok(Poll::Pending),
            (_, Some(0)) => return self.poll_hangup(context),
            (_, Some(1)) => {
                let Poll::Ready(last) = self.poll_last_byte(context)? else { return Ok(Poll::Pending) };
                match last {
                    Some(byte) => {
                        self.rest = RemainingInput::LastByte;
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
                    // The input has timed out, but the response must still be written.
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

    /// Peeks at the next byte and leaves it in the queue. Returns `None` at the end of the stream.
    fn poll_last_byte(&mut self, context: &mut Context<'_>) -> io::Result<Poll<Option<u8>>> {
        let mut byte = [0];
        let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        let looked = self.socket.poll_try(context, |fd| Ok(recv(fd.as_raw_fd(), &mut byte, flags)?))?;
        Ok(looked.map(|count| byte.first().copied().filter(|_| count > 0)))
    }

    /// Waits for the peer to disconnect, because the whole request was received. Returns an error when the peer has
    /// disconnected.
    fn poll_hangup(&mut self, context: &mut Context<'_>) -> io::Result<Poll<()>> {
        let hung_up = |fd: BorrowedFd<'_>| {
            let mut sockets = [PollFd::new(fd, PollFlags::from_bits_retain(libc::POLLRDHUP))];
            match nix::poll::poll(&mut sockets, PollTimeout::ZERO)? {
                0 => Err(io::ErrorKind::WouldBlock.into()),
                _ => Ok(()),
            }
        };
        if self.socket.poll_try(context, hung_up)?.is_ready() {
            return Err(io::Error::other("the peer disconnected before it had received its response"));
        }
        Ok(Poll::Pending)
    }

    fn stream_ended(&mut self) -> io::Result<()> {
        if matches!(self.state, State::Reading) {
            if self.socket.activity().has_expired() && !self.is_untouched() {
                let why = "a head that did not arrive within --header-timeout";
                self.application.turned_away(Protocol::Scgi, StatusCode::REQUEST_TIMEOUT, self.from, why);
            }
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.rest = RemainingInput::Nothing;
        // Dropping the unfinished pipe truncates the body. If `--body-timeout` caused the end, the peer did not end the
        // stream.
        if let Some(stdin) = self.stdin.take()
            && self.decoder.ends_with_the_stream()
            && !self.socket.activity().has_expired()
        {
            stdin.finish();
        }
        Ok(())
    }

    /// Decodes until an event requires action. Returns false if there was no event.
    fn decode(&mut self) -> bool {
        let mut any = false;
        loop {
            match self.decoder.decode(&mut self.input) {
                Ok(None) => return any,
                Ok(Some(ScgiEvent::Request { params, length })) => self.begin(params, length),
                Ok(Some(ScgiEvent::Body(bytes))) => {
                    if let Some(stdin) = &self.stdin {
                        stdin.push(bytes);
                    }
                    return true; // check whether there is space for the next chunk
                }
                Ok(Some(ScgiEvent::End)) => {
                    if let Some(stdin) = self.stdin.take() {
                        stdin.finish();
                    }
                }
                Err(error) => {
                    self.rest = RemainingInput::Coming; // the remainder of the input is unknown
                    let status = match error {
                        ScgiError::TooLong => StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
                        ScgiError::Size
                        | ScgiError::Comma
                        | ScgiError::Strings
                        | ScgiError::Length
                        | ScgiError::Version => StatusCode::BAD_REQUEST,
                    };
                    self.refuse(status, format!("the peer sent {error}"));
                }
            }
            any = true;
        }
    }

    /// Records the request in the journal before the application receives it.
    fn enter(&self, is_head: bool) -> UnderWay {
        let conn = self.socket.conn();
        UnderWay::begin(self.socket.activity(), conn, conn.begin(1, is_head, true))
    }

    fn begin(&mut self, params: Params, length: Option<u64>) {
        let max_body = self.application.limits.max_body;
        let activity = self.socket.activity();
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
        let under_way = self.enter(is_head);
        self.socket.activity().tell_waited(&mut request);
        let answer = Box::pin(self.application.answer(Protocol::Scgi, request, Some(under_way)));
        self.state = State::Answering { answer, is_head };
    }

    fn refuse(&mut self, status: StatusCode, why: impl Into<String>) {
        let under_way = self.enter(false);
        let answer = Box::pin(self.application.refuse(Protocol::Scgi, status, self.from, why, under_way));
        self.state = State::Answering { answer, is_head: false };
    }

    /// Closes the connection after the response. Reads the bytes that the peer has sent: closing a socket with unread
    /// bytes would destroy output in transit.
    async fn close(self, drain: &Drain) {
        match self.rest {
            RemainingInput::LastByte => {
                let _ = self.socket.fd().map(|fd| recv(fd.as_raw_fd(), &mut [0], MsgFlags::MSG_DONTWAIT));
            }
            RemainingInput::Coming => linger::linger(self.socket, drain).await,
            RemainingInput::Nothing => {}
        }
    }
}
