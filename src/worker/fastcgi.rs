//! One FastCGI connection: records in, requests to the application, responses out as records.
//!
//! One task does it all for its connection: it reads, lets each request go on as far as it can, and writes; so
//! it reads while it writes, and a request body and a response stream at the same time. Requests of one
//! connection may overlap; they share its output, in turn.
//!
//! What bounds the memory of a connection: the parameters of each request (`--max-params`), the pipe of each
//! body, and [`OUTBOX_LIMIT`] of output. When a body is not read, the connection stops reading; when the
//! peer does not read, the responses wait.

use std::future::{Future, poll_fn};
use std::io;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::{Method, Request, Response, StatusCode};
use http_body::Body as HttpBody;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio_util::io::poll_read_buf;
use tower_service::Service;

use super::outbox::Outbox;
use super::serve::{Application, BoxError, Served};
use crate::body::{Body, pipe};
use crate::context::Drain;
use crate::protocol::cgi;
use crate::protocol::fastcgi::{self, Decoder, Event, Fault, LARGEST_CONTENT, RequestId};
use crate::protocol::params::Params;

/// Output that may wait on a connection before its responses do.
const OUTBOX_LIMIT: usize = 64 << 10;
/// Replies to management records and refusals that may wait beside it; one piece of a response may too.
const REPLIES_LIMIT: usize = 1 << 20;
/// A read takes at least, and at most, so much.
const READ_SIZES: (usize, usize) = (4 << 10, 64 << 10);
/// How long, and for how many bytes, a peer that still sends is listened to after our last word.
pub(super) const LINGER: (Duration, u64) = (Duration::from_secs(2), 64 << 20);

/// Serves one connection to its end.
pub(crate) async fn serve<IO, S, B>(socket: IO, application: Rc<Application<S>>, drain: Drain)
where
    IO: AsyncRead + AsyncWrite + Unpin,
    S: Service<Request<Body>, Response = Response<B>> + Clone + 'static,
    S::Error: Into<BoxError>,
    B: HttpBody + 'static,
    B::Error: Into<BoxError>,
{
    let limits = application.limits;
    let mut connection = Connection {
        socket,
        input: BytesMut::new(),
        read_size: READ_SIZES.0,
        decoder: Decoder::new(limits.max_params, limits.max_multiplexed),
        outbox: Outbox::default(),
        head: BytesMut::new(),
        exchanges: Vec::new(),
        application,
        closing: false,
        draining: false,
        last_chance_over: false,
        unread: false,
    };
    let mut drained = pin!(drain.wait());
    let mut last_chance = pin!(drain.wait_for_last_request());
    let ended = poll_fn(|context| {
        if !connection.draining && drained.as_mut().poll(context).is_ready() {
            connection.draining = true;
        }
        if connection.draining && !connection.last_chance_over && last_chance.as_mut().poll(context).is_ready() {
            connection.last_chance_over = true;
        }
        connection.poll(context)
    });
    match ended.await {
        Ok(()) => connection.close().await,
        Err(error) => log::debug!("a FastCGI connection ended: {error}"),
    }
}

struct Connection<IO, S, B> {
    socket: IO,
    input: BytesMut,
    read_size: usize,
    decoder: Decoder,
    outbox: Outbox,
    /// Where the head of a response is put together.
    head: BytesMut,
    exchanges: Vec<Exchange<B>>,
    application: Rc<Application<S>>,
    /// The peer did not ask to keep the connection.
    closing: bool,
    /// The worker was asked to leave.
    draining: bool,
    /// Since then a request was answered, or time enough has passed for one to come.
    last_chance_over: bool,
    /// The last request was answered before all of it had come.
    unread: bool,
}

/// A request and its response.
struct Exchange<B> {
    id: RequestId,
    keep_connection: bool,
    /// Its body, while it lasts and somebody may read it.
    stdin: Option<pipe::Writer>,
    state: State<B>,
}

enum State<B> {
    Answering { answer: Pin<Box<dyn Future<Output = Response<Served<B>>>>>, is_head: bool },
    Sending(Pin<Box<Served<B>>>),
    Ended,
}

impl<IO, S, B> Connection<IO, S, B>
where
    IO: AsyncRead + AsyncWrite + Unpin,
    S: Service<Request<Body>, Response = Response<B>> + Clone + 'static,
    S::Error: Into<BoxError>,
    B: HttpBody + 'static,
    B::Error: Into<BoxError>,
{
    /// Goes on as far as it can. Ready when the connection is to be closed; an error if the peer is gone or
    /// broke the protocol.
    fn poll(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            self.poll_exchanges(context)?;
            let held_back = self.outbox.len() >= OUTBOX_LIMIT;
            if let Poll::Ready(Err(error)) = self.outbox.poll_write(Pin::new(&mut self.socket), context) {
                return Poll::Ready(Err(error));
            }
            if self.is_over() {
                return Poll::Ready(Ok(()));
            }
            let room_again = held_back && self.outbox.len() < OUTBOX_LIMIT;
            if self.poll_input(context)?.is_pending() && !room_again {
                return Poll::Pending;
            }
        }
    }

    fn is_over(&self) -> bool {
        if !self.exchanges.is_empty() || !self.outbox.is_empty() {
            return false;
        }
        // A request that has half arrived when we are asked to drain is served; but a peer that did not want
        // the connection kept is owed nothing more, and may be waiting for us to close it.
        self.closing || (self.draining && self.last_chance_over && self.input.is_empty() && self.decoder.is_idle())
    }

    fn poll_exchanges(&mut self, context: &mut Context<'_>) -> io::Result<()> {
        if self.exchanges.len() > 1 {
            self.exchanges.rotate_left(1); // the one that filled the outbox is the last to go on
        }
        for exchange in &mut self.exchanges {
            exchange.poll(context, &mut self.outbox, &mut self.head)?;
        }
        let Self { exchanges, decoder, closing, draining, last_chance_over, unread, .. } = self;
        exchanges.retain(|exchange| {
            let ended = matches!(exchange.state, State::Ended);
            if ended {
                *unread = !decoder.finish(exchange.id);
                *closing |= !exchange.keep_connection;
                *last_chance_over |= *draining;
            }
            !ended
        });
        Ok(())
    }

    /// Takes in what the peer sent. Pending when there is nothing more, or no room for it.
    fn poll_input(&mut self, context: &mut Context<'_>) -> io::Result<Poll<()>> {
        // However much output waits: a peer may write all of its request before it reads. A body that nobody reads
        // costs nothing, and one that somebody reads has its pipe.
        for exchange in &self.exchanges {
            if exchange.stdin.as_ref().is_some_and(|stdin| stdin.poll_room(context).is_pending()) {
                return Ok(Poll::Pending);
            }
        }
        if self.decode()? {
            return Ok(Poll::Ready(()));
        }
        if self.input.capacity() - self.input.len() < READ_SIZES.0 {
            self.input.reserve(self.read_size);
        }
        let room = self.input.capacity() - self.input.len();
        match poll_read_buf(Pin::new(&mut self.socket), context, &mut self.input) {
            Poll::Pending => {
                if self.exchanges.is_empty() && self.input.is_empty() && self.read_size > READ_SIZES.0 {
                    // Idle: a connection that had a large body keeps no large buffer.
                    self.input = BytesMut::new();
                    self.read_size = READ_SIZES.0;
                }
                Ok(Poll::Pending)
            }
            Poll::Ready(Ok(0)) if self.exchanges.is_empty() => Err(io::ErrorKind::UnexpectedEof.into()),
            Poll::Ready(Ok(0)) => Err(io::Error::other("the peer left before it had its responses")),
            Poll::Ready(Ok(read)) => {
                if read == room {
                    self.read_size = (self.read_size * 4).min(READ_SIZES.1);
                }
                self.decode()?;
                Ok(Poll::Ready(()))
            }
            Poll::Ready(Err(error)) => Err(error),
        }
    }

    /// Decodes until something is to be done about it. False if there was no event.
    fn decode(&mut self) -> io::Result<bool> {
        let mut any = false;
        loop {
            let event = self.decoder.decode(&mut self.input).map_err(|error| {
                log::warn!("closing a FastCGI connection: the peer sent {error}");
                io::Error::other(error)
            })?;
            let Some(event) = event else { return Ok(any) };
            any = true;
            let body_came = matches!(event, Event::Stdin { .. });
            self.take(event)?;
            // A piece of a body: see whether there is room for the next one.
            if body_came {
                return Ok(true);
            }
        }
    }

    fn take(&mut self, event: Event) -> io::Result<()> {
        match event {
            Event::Request { id, keep_connection, params } => self.begin(id, keep_connection, params),
            Event::BadRequest { id, keep_connection, fault } => {
                let status = match fault {
                    Fault::ParamsTooLong => StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
                    Fault::ParamsMalformed => StatusCode::BAD_REQUEST,
                };
                self.refuse(id, keep_connection, status);
            }
            Event::Stdin { id, bytes } => {
                if let Some(stdin) = self.stdin_of(id) {
                    stdin.push(bytes);
                }
            }
            Event::StdinEnd { id } => {
                if let Some(exchange) = self.exchanges.iter_mut().find(|exchange| exchange.id == id)
                    && let Some(stdin) = exchange.stdin.take()
                {
                    stdin.finish();
                }
            }
            Event::Abort { id } => {
                // Its future is dropped, and with it whatever it was doing.
                if let Some(exchange) = self.exchanges.iter_mut().find(|exchange| exchange.id == id) {
                    exchange.state = State::Ended;
                    exchange.stdin = None;
                    fastcgi::stdout_end(self.outbox.tail(), id, 0);
                }
            }
            Event::Reply { bytes, then_close } => {
                self.outbox.push(bytes);
                self.closing |= then_close;
                if self.outbox.len() > OUTBOX_LIMIT + REPLIES_LIMIT {
                    return Err(io::Error::other("the peer asks and asks, and reads no reply"));
                }
            }
        }
        Ok(())
    }

    fn stdin_of(&self, id: RequestId) -> Option<&pipe::Writer> {
        self.exchanges.iter().find(|exchange| exchange.id == id)?.stdin.as_ref()
    }

    fn begin(&mut self, id: RequestId, keep_connection: bool, params: Params) {
        let max_body = self.application.limits.max_body;
        let mut stdin = None;
        let made = cgi::request(params, |length| {
            if length == Some(0) || length.is_none() && self.decoder.body_is_empty(id, &self.input) {
                return Body::empty();
            }
            let (writer, reader) = pipe::pipe();
            stdin = Some(writer);
            Body::stdin(reader, length, max_body)
        });
        let request = match made {
            Ok(request) => request,
            Err(error) => {
                log::warn!("a FastCGI request was refused: {error}");
                return self.refuse(id, keep_connection, StatusCode::BAD_REQUEST);
            }
        };
        let is_head = request.method() == Method::HEAD;
        let application = Rc::clone(&self.application);
        let answer = Box::pin(async move { application.answer(request).await });
        self.exchanges.push(Exchange { id, keep_connection, stdin, state: State::Answering { answer, is_head } });
    }

    fn refuse(&mut self, id: RequestId, keep_connection: bool, status: StatusCode) {
        let response = self.application.refuse(status);
        let answer = Box::pin(std::future::ready(response));
        let state = State::Answering { answer, is_head: false };
        self.exchanges.push(Exchange { id, keep_connection, stdin: None, state });
    }

    /// If the peer may still be sending, says that nothing more will come, and listens until it has heard: closing
    /// a socket with bytes unread in it would destroy what we wrote on its way.
    async fn close(mut self) {
        if self.unread && self.socket.shutdown().await.is_ok() {
            let (time, bytes) = LINGER;
            let mut rest = self.socket.take(bytes);
            let mut sink = tokio::io::sink();
            let _ = tokio::time::timeout(time, tokio::io::copy(&mut rest, &mut sink)).await;
        }
    }
}

impl<B> Exchange<B>
where
    B: HttpBody,
    B::Error: Into<BoxError>,
{
    /// Goes on until it waits for something, has ended, or has filled the output.
    ///
    /// # Errors
    /// If the response broke off: only closing the connection tells the peer.
    fn poll(&mut self, context: &mut Context<'_>, outbox: &mut Outbox, head: &mut BytesMut) -> io::Result<()> {
        while outbox.len() < OUTBOX_LIMIT {
            match &mut self.state {
                State::Answering { answer, is_head } => {
                    let Poll::Ready(response) = answer.as_mut().poll(context) else { return Ok(()) };
                    let is_head = *is_head;
                    self.send_head(response, is_head, context, outbox, head)?;
                }
                State::Sending(body) => match body.as_mut().poll_frame(context) {
                    Poll::Pending => return Ok(()),
                    Poll::Ready(Some(frame)) => {
                        if let Ok(data) = frame.map_err(io::Error::other)?.into_data() {
                            let ended = body.is_end_stream();
                            self.send(data, outbox);
                            if ended {
                                self.end(outbox);
                            }
                        }
                    }
                    Poll::Ready(None) => self.end(outbox),
                },
                State::Ended => return Ok(()),
            }
        }
        Ok(())
    }

    /// Sends the head, and in the same record as much of the body as is there already.
    fn send_head(
        &mut self,
        response: Response<Served<B>>,
        is_head: bool,
        context: &mut Context<'_>,
        outbox: &mut Outbox,
        head: &mut BytesMut,
    ) -> io::Result<()> {
        let (parts, body) = response.into_parts();
        let status = parts.status;
        let bodiless = matches!(status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED) || status.is_informational();
        let length = body.size_hint().exact().filter(|_| !bodiless);
        head.clear();
        cgi::response_head(head, status, &parts.headers, length);

        let mut body = Box::pin(body);
        let mut first = Bytes::new();
        let mut ended = bodiless || is_head || body.is_end_stream();
        if !ended {
            match body.as_mut().poll_frame(context) {
                Poll::Ready(Some(frame)) => {
                    first = frame.map_err(io::Error::other)?.into_data().unwrap_or_default();
                    ended = body.is_end_stream();
                }
                Poll::Ready(None) => ended = true,
                Poll::Pending => {}
            }
        }
        if head.len() > LARGEST_CONTENT {
            log::error!(
                "a response was not sent: its head has {} bytes, and a record holds {LARGEST_CONTENT}",
                head.len()
            );
            return Err(io::Error::other("the head of a response is longer than a record holds"));
        }
        let with_head = first.split_to(first.len().min(LARGEST_CONTENT - head.len()));
        fastcgi::stdout_header(outbox.tail(), self.id, head.len() + with_head.len());
        outbox.tail().extend_from_slice(head);
        outbox.push(with_head);
        self.send(first, outbox);
        self.state = State::Sending(body);
        if ended {
            self.end(outbox);
        }
        Ok(())
    }

    fn send(&self, mut data: Bytes, outbox: &mut Outbox) {
        while !data.is_empty() {
            let content = data.split_to(data.len().min(LARGEST_CONTENT));
            fastcgi::stdout_header(outbox.tail(), self.id, content.len());
            outbox.push(content);
        }
    }

    fn end(&mut self, outbox: &mut Outbox) {
        fastcgi::stdout_end(outbox.tail(), self.id, 0);
        self.state = State::Ended;
        self.stdin = None;
    }
}
