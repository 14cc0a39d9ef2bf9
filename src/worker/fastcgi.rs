//! One FastCGI connection: records in, requests to the application, responses out as records.
//!
//! One task does it all for its connection: it reads, lets each request go on as far as it can, and writes; so
//! it reads while it writes, and a request body and a response stream at the same time. Requests of one
//! connection may overlap; they share its output, in turn.
//!
//! What bounds the memory of a connection: the parameters of each request (`--max-params`), the pipe of each
//! body, and [`OUTPUT_LIMIT`] of output. When a body is not read, the connection stops reading; when the
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

use super::output::Output;
use super::serve::{Application, BoxError, Served};
use crate::body::{Body, pipe};
use crate::context::Drain;
use crate::protocol::cgi;
use crate::protocol::fastcgi::{self, Decoder, Event, Fault, LARGEST_CONTENT, Params, RequestId};

/// Output that may wait on a connection before its responses do.
const OUTPUT_LIMIT: usize = 64 << 10;
/// A read takes at least, and at most, so much.
const READ_SIZES: (usize, usize) = (4 << 10, 64 << 10);
/// How long, and for how many bytes, a peer that still sends is listened to after our last word.
const LINGER: (Duration, u64) = (Duration::from_secs(2), 64 << 20);

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
        output: Output::default(),
        head: BytesMut::new(),
        exchanges: Vec::new(),
        application,
        closing: false,
        draining: false,
        used: false,
        unread: false,
    };
    let mut drained = pin!(drain.wait());
    let mut unused = pin!(drain.wait_for_first_request());
    let ended = poll_fn(|context| {
        if !connection.draining && drained.as_mut().poll(context).is_ready() {
            connection.draining = true;
        }
        if connection.draining && !connection.used && unused.as_mut().poll(context).is_ready() {
            connection.used = true;
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
    output: Output,
    /// Where the head of a response is put together.
    head: BytesMut,
    exchanges: Vec<Exchange<B>>,
    application: Rc<Application<S>>,
    /// The peer did not ask to keep the connection.
    closing: bool,
    /// The worker was asked to leave.
    draining: bool,
    /// Something was sent on it, or it has had its time to begin.
    used: bool,
    /// A request was answered before all of it had come.
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
            let held_back = self.output.len() >= OUTPUT_LIMIT;
            if let Poll::Ready(Err(error)) = self.output.poll_write(Pin::new(&mut self.socket), context) {
                return Poll::Ready(Err(error));
            }
            if self.is_over() {
                return Poll::Ready(Ok(()));
            }
            let room_again = held_back && self.output.len() < OUTPUT_LIMIT;
            if self.poll_input(context)?.is_pending() && !room_again {
                return Poll::Pending;
            }
        }
    }

    fn is_over(&self) -> bool {
        if !self.exchanges.is_empty() || !self.output.is_empty() {
            return false;
        }
        // A request that has half arrived when we are asked to drain is served; but a peer that did not want
        // the connection kept is owed nothing more, and may be waiting for us to close it.
        self.closing || (self.draining && self.used && self.input.is_empty() && self.decoder.is_idle())
    }

    fn poll_exchanges(&mut self, context: &mut Context<'_>) -> io::Result<()> {
        for exchange in &mut self.exchanges {
            exchange.poll(context, &mut self.output, &mut self.head)?;
        }
        let Self { exchanges, decoder, closing, unread, .. } = self;
        exchanges.retain(|exchange| {
            let ended = matches!(exchange.state, State::Ended);
            if ended {
                *unread |= !decoder.finish(exchange.id);
                *closing |= !exchange.keep_connection;
            }
            !ended
        });
        Ok(())
    }

    /// Takes in what the peer sent. Pending when there is nothing more, or no room for it.
    fn poll_input(&mut self, context: &mut Context<'_>) -> io::Result<Poll<()>> {
        if self.output.len() >= OUTPUT_LIMIT {
            return Ok(Poll::Pending); // the socket wakes us when the peer reads
        }
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
                self.used = true;
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
            self.take(event);
            // A piece of a body: see whether there is room for the next one.
            if body_came || self.output.len() >= OUTPUT_LIMIT {
                return Ok(true);
            }
        }
    }

    fn take(&mut self, event: Event) {
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
                    fastcgi::stdout_end(self.output.tail(), id, 0);
                }
            }
            Event::Reply { bytes, then_close } => {
                self.output.push(bytes);
                self.closing |= then_close;
            }
        }
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
    fn poll(&mut self, context: &mut Context<'_>, output: &mut Output, head: &mut BytesMut) -> io::Result<()> {
        while output.len() < OUTPUT_LIMIT {
            match &mut self.state {
                State::Answering { answer, is_head } => {
                    let Poll::Ready(response) = answer.as_mut().poll(context) else { return Ok(()) };
                    let is_head = *is_head;
                    self.send_head(response, is_head, context, output, head)?;
                }
                State::Sending(body) => match body.as_mut().poll_frame(context) {
                    Poll::Pending => return Ok(()),
                    Poll::Ready(Some(frame)) => {
                        if let Ok(data) = frame.map_err(io::Error::other)?.into_data() {
                            let ended = body.is_end_stream();
                            self.send(data, output);
                            if ended {
                                self.end(output);
                            }
                        }
                    }
                    Poll::Ready(None) => self.end(output),
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
        output: &mut Output,
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
        fastcgi::stdout_header(output.tail(), self.id, head.len() + with_head.len());
        output.tail().extend_from_slice(head);
        output.push(with_head);
        self.send(first, output);
        self.state = State::Sending(body);
        if ended {
            self.end(output);
        }
        Ok(())
    }

    fn send(&self, mut data: Bytes, output: &mut Output) {
        while !data.is_empty() {
            let content = data.split_to(data.len().min(LARGEST_CONTENT));
            fastcgi::stdout_header(output.tail(), self.id, content.len());
            output.push(content);
        }
    }

    fn end(&mut self, output: &mut Output) {
        fastcgi::stdout_end(output.tail(), self.id, 0);
        self.state = State::Ended;
        self.stdin = None;
    }
}
