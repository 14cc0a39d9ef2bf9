//! Serves one FastCGI connection: decodes records into requests for the application, and encodes
//! the responses as records.
//!
//! One task does all the work for its connection: it reads, advances each request as far as possible, and writes. A
//! request body and a response are therefore transferred at the same time. Requests on one connection may overlap; they
//! take turns to write their output.
//!
//! The memory of a connection is bounded by the parameters of each request (`--max-params`), the pipe of each body, and
//! [`OUTBOX_LIMIT`] bytes of output. When the application does not read a body, the connection stops reading; when the
//! peer does not read, the responses wait.

mod exchange;

use std::future::{Future as _, poll_fn};
use std::io;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::BytesMut;
use http::{Method, Request, StatusCode};
use tower_service::Service;

use self::exchange::{Exchange, Work};
use super::linger;
use super::outbox::Outbox;
use super::socket::Socket;
use super::under_way::UnderWay;
use crate::app::body::{Body, FilterData, pipe};
use crate::config::address::Protocol;
use crate::heir::journal::RequestIndex;
use crate::protocol::cgi::{self, ClientInfo};
use crate::protocol::fastcgi::{self, FastCgiDecoder, FastCgiEvent, Fault, RequestId};
use crate::protocol::params::Params;
use crate::protocol::role::Role;
use crate::request::activity::Activity;
use crate::worker::lifecycle::drain::{Drain, WakerRegistration};
use crate::worker::service::serve::{AppService, Application, ResponseBody, ResponseFuture};

/// Bytes of output that may be queued on a connection before its responses pause.
pub(crate) const OUTBOX_LIMIT: usize = 64 << 10;
/// Number of bytes of management replies and refusals that may be queued in addition to the responses. One chunk of a
/// response may be queued too.
const REPLIES_LIMIT: usize = 1 << 20;

/// Serves one connection until it ends.
pub(crate) async fn serve<S, B>(socket: Socket, from: Option<SocketAddr>, application: Rc<Application<S>>, drain: Drain)
where
    S: AppService<B>,
    B: ResponseBody,
{
    let limits = application.limits;
    socket.activity().set_knows_heads();
    let mut connection = Connection {
        socket,
        from,
        input: BytesMut::new(),
        decoder: FastCgiDecoder::new(limits.max_params, limits.max_multiplexed),
        outbox: Outbox::default(),
        head: BytesMut::new(),
        exchanges: Vec::new(),
        spare: None,
        application,
        closing: false,
        broken: false,
        draining: false,
        last_chance_over: false,
        moving: false,
        assembled: Vec::new(),
        unread: false,
        ignores_input: false,
    };
    let mut drained = pin!(drain.wait());
    let mut last_chance = pin!(drain.wait_for_last_request());
    let mut registration = WakerRegistration::default();
    let ended = poll_fn(|context| {
        if !connection.draining && (registration.is_new(context) || drain.has_begun()) {
            connection.draining = drained.as_mut().poll(context).is_ready();
        }
        if connection.draining {
            connection.moving = drain.has_sibling();
            if !connection.last_chance_over && last_chance.as_mut().poll(context).is_ready() {
                connection.last_chance_over = true;
            }
        }
        connection.poll(context)
    });
    match ended.await {
        Ok(Outcome::Over) => connection.close(&drain).await,
        Ok(Outcome::Movable) => {
            let Connection { socket, input, .. } = connection;
            drain.hand_over(socket, &input).await;
        }
        Err(error) => log::debug!("a FastCGI connection ended: {error}"),
    }
}

enum Outcome {
    /// The peer must be notified that no more output follows.
    Over,
    /// Nothing is under way, and another worker may continue.
    Movable,
}

struct Connection<S: Service<Request<Body>>, B> {
    socket: Socket,
    /// The peer's address.
    from: Option<SocketAddr>,
    input: BytesMut,
    decoder: FastCgiDecoder,
    outbox: Outbox,
    /// Buffer in which the head of a response is built.
    head: BytesMut,
    exchanges: Vec<Exchange<S, B>>,
    /// The heap allocation of an ended exchange, for reuse.
    spare: Option<Pin<Box<Work<S, B>>>>,
    application: Rc<Application<S>>,
    /// Whether the connection ends because the peer did not ask to keep it.
    closing: bool,
    /// Whether a response has failed and no other response is in flight, in which case the connection ends after the
    /// queued output.
    broken: bool,
    /// Whether the worker is draining.
    draining: bool,
    /// Whether, since the drain began, a request was answered or the time for one more request has passed.
    last_chance_over: bool,
    /// Whether a sibling can take the connection over.
    moving: bool,
    /// Requests that have arrived in part, with their journal entries.
    assembled: Vec<(RequestId, RequestIndex)>,
    /// Whether the last request was answered before it was received completely.
    unread: bool,
    /// Whether the peer has exceeded a timeout, in which case no more input is read from it.
    ignores_input: bool,
}

impl<S, B> Connection<S, B>
where
    S: AppService<B>,
    B: ResponseBody,
{
    /// Advances the connection as far as possible. Becomes ready when the connection must be closed. Returns an error
    /// if the peer has disconnected or violated the protocol.
    fn poll(&mut self, context: &mut Context<'_>) -> Poll<io::Result<Outcome>> {
        loop {
            self.poll_exchanges(context);
            let held_back = self.outbox.len() >= OUTBOX_LIMIT;
            self.socket.conn().queue(self.outbox.len());
            if let Poll::Ready(Err(error)) = self.outbox.poll_write(Pin::new(&mut self.socket), context) {
                return Poll::Ready(Err(error));
            }
            if self.moving && !self.closing && !self.broken {
                if self.is_idle() {
                    return Poll::Ready(Ok(Outcome::Movable));
                }
                // The next worker reads the following requests.
                if !self.exchanges.is_empty() && self.is_whole() {
                    return Poll::Pending;
                }
            }
            if self.is_over() {
                return Poll::Ready(Ok(Outcome::Over));
            }
            let room_again = held_back && self.outbox.len() < OUTBOX_LIMIT;
            // After a response has failed, nothing more is read.
            if self.broken || self.poll_input(context)?.is_pending() && !room_again {
                return Poll::Pending;
            }
        }
    }

    fn is_over(&self) -> bool {
        if !self.exchanges.is_empty() || !self.outbox.is_empty() {
            return false;
        }
        // A request that has partly arrived when the drain begins is served. But a peer that did not ask to keep the
        // connection receives no further response, and may be waiting for the connection to end.
        self.closing || self.broken || (self.draining && self.last_chance_over && self.is_idle())
    }

    /// Whether nothing is under way, and no part of a further request has arrived.
    fn is_idle(&self) -> bool {
        self.exchanges.is_empty() && self.outbox.is_empty() && self.input.is_empty() && self.decoder.is_idle()
    }

    /// Whether all requests that have begun were received completely, with no byte beyond them.
    fn is_whole(&self) -> bool {
        let streams = self.exchanges.iter().flat_map(|exchange| exchange.stdin.iter().chain(&exchange.data));
        streams.count() == 0 && self.input.is_empty() && self.decoder.is_between_records()
    }

    fn poll_exchanges(&mut self, context: &mut Context<'_>) {
        if self.exchanges.len() > 1 {
            self.exchanges.rotate_left(1); // the exchange that filled the outbox is the last to continue
        }
        for exchange in &mut self.exchanges {
            if exchange.poll(context, &mut self.outbox, &mut self.head).is_err() {
                exchange.break_off();
            }
        }
        let mut index = 0;
        while let Some(exchange) = self.exchanges.get(index) {
            if !matches!(*exchange.work, Work::Ended) {
                index += 1;
                continue;
            }
            let ended = self.exchanges.remove(index);
            self.unread = !self.decoder.finish(ended.id);
            self.closing |= !ended.keep_connection;
            self.last_chance_over |= self.draining;
            self.spare = Some(ended.work);
        }
        let broken_off = |exchange: &Exchange<S, B>| matches!(*exchange.work, Work::BrokenOff { .. });
        if !self.exchanges.is_empty() && self.exchanges.iter().all(broken_off) {
            // All other responses have ended before the connection is broken off.
            for exchange in self.exchanges.drain(..) {
                self.unread |= !self.decoder.finish(exchange.id);
            }
            fastcgi::break_off(self.outbox.tail());
            self.broken = true;
        }
    }

    /// Reads and decodes input from the peer. Returns Pending when there is no more input, or no space for more input.
    fn poll_input(&mut self, context: &mut Context<'_>) -> io::Result<Poll<()>> {
        // Input is read regardless of how much output is queued, because a peer may write its whole request before it
        // reads. A body that the application has dropped takes no memory, and a body that is being read is bounded by
        // its pipe.
        for stream in self.exchanges.iter().flat_map(|exchange| exchange.stdin.iter().chain(&exchange.data)) {
            if stream.poll_room(context).is_pending() {
                return Ok(Poll::Pending);
            }
        }
        if self.ignores_input {
            return Ok(Poll::Pending);
        }
        if self.decode()? {
            return Ok(Poll::Ready(()));
        }
        match self.socket.poll_bytes(context) {
            Poll::Pending => {
                let is_idle = self.input.is_empty() && self.decoder.is_idle();
                self.socket.activity().set_head_begun(!is_idle);
                self.enter_assembled();
                // The wait may be long, so the remaining bytes are copied: otherwise they would keep the whole read
                // block allocated.
                self.decoder.unshare();
                if !self.input.is_empty() {
                    self.input = BytesMut::from(&self.input[..]);
                }
                Ok(Poll::Pending)
            }
            Poll::Ready(Ok(bytes)) if bytes.is_empty() && self.exchanges.is_empty() => {
                Err(io::ErrorKind::UnexpectedEof.into())
            }
            Poll::Ready(Ok(bytes)) if bytes.is_empty() => {
                Err(io::Error::other("the peer disconnected before it had received its responses"))
            }
            Poll::Ready(Ok(bytes)) => {
                self.input.unsplit(bytes);
                self.decode()?;
                Ok(Poll::Ready(()))
            }
            Poll::Ready(Err(error)) if error.kind() == io::ErrorKind::TimedOut && !self.exchanges.is_empty() => {
                // The bodies are truncated, but the application can still respond.
                for exchange in &mut self.exchanges {
                    (exchange.stdin, exchange.data) = (None, None);
                }
                (self.ignores_input, self.closing) = (true, true);
                Ok(Poll::Pending)
            }
            Poll::Ready(Err(error)) => {
                if error.kind() == io::ErrorKind::TimedOut && self.begins_request() {
                    let why = "parameters that did not arrive within --header-timeout";
                    self.application.turned_away(Protocol::FastCgi, StatusCode::REQUEST_TIMEOUT, self.from, why);
                }
                Err(error)
            }
        }
    }

    /// Whether part of a request's parameters, or of a possible new request, has arrived. The remainder of a body does
    /// not count.
    fn begins_request(&self) -> bool {
        self.decoder.assembled().next().is_some() || self.decoder.is_between_records() && !self.input.is_empty()
    }

    /// Decodes until an event requires action. Returns false if there was no event.
    fn decode(&mut self) -> io::Result<bool> {
        let mut any = false;
        loop {
            let event = self.decoder.decode(&mut self.input).map_err(|error| {
                let why = format!("the peer sent {error} (the connection is closed)");
                self.application.turned_away(Protocol::FastCgi, StatusCode::BAD_REQUEST, self.from, why);
                io::Error::other(error)
            })?;
            let Some(event) = event else {
                if self.input.is_empty() && self.decoder.is_between_records() {
                    self.socket.conn().clean();
                }
                return Ok(any);
            };
            any = true;
            let body_came = matches!(event, FastCgiEvent::Stdin { .. } | FastCgiEvent::Data { .. });
            self.take(event)?;
            // After a chunk of a body, check whether there is space for the next one.
            if body_came {
                return Ok(true);
            }
        }
    }

    /// Records partly received requests in the journal: the peer will not send their bytes again.
    fn enter_assembled(&mut self) {
        let conn = *self.socket.conn();
        let (decoder, outbox) = (&self.decoder, &self.outbox);
        self.assembled.retain(|&(known, index)| {
            let goes_on = decoder.assembled().any(|(id, _)| id == known);
            if !goes_on {
                conn.response_to(index, conn.output(outbox.len())); // the request was aborted
            }
            goes_on
        });
        for (id, keep_connection) in self.decoder.assembled() {
            if !self.assembled.iter().any(|&(known, _)| known == id) {
                self.assembled.push((id, conn.begin(id, false, !keep_connection)));
            }
        }
    }

    /// Records a request in the journal before the application receives it.
    fn enter(&mut self, id: RequestId, keep_connection: bool, is_head: bool) -> UnderWay {
        let assembled = self.assembled.iter().position(|&(known, _)| known == id);
        let index = match assembled {
            Some(index) => self.assembled.swap_remove(index).1,
            None => self.socket.conn().begin(id, is_head, !keep_connection),
        };
        UnderWay::begin(self.socket.activity(), self.socket.conn(), index)
    }

    fn take(&mut self, event: FastCgiEvent) -> io::Result<()> {
        match event {
            FastCgiEvent::Request { id, keep_connection, role, params } => {
                self.begin(id, keep_connection, role, params)
            }
            FastCgiEvent::BadRequest { id, keep_connection, fault } => {
                let (status, why) = match fault {
                    Fault::ParamsTooLong => {
                        (StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, "parameters larger than --max-params")
                    }
                    Fault::ParamsMalformed => (StatusCode::BAD_REQUEST, "malformed parameters"),
                };
                self.refuse(id, keep_connection, status, why);
            }
            FastCgiEvent::Stdin { id, bytes } => {
                if let Some(stdin) = self.exchange(id).and_then(|exchange| exchange.stdin.as_ref()) {
                    stdin.push(bytes);
                }
            }
            FastCgiEvent::StdinEnd { id } => {
                if let Some(stdin) = self.exchange(id).and_then(|exchange| exchange.stdin.take()) {
                    stdin.finish();
                }
            }
            FastCgiEvent::Data { id, bytes } => {
                if let Some(data) = self.exchange(id).and_then(|exchange| exchange.data.as_ref()) {
                    data.push(bytes);
                }
            }
            FastCgiEvent::DataEnd { id } => {
                if let Some(data) = self.exchange(id).and_then(|exchange| exchange.data.take()) {
                    data.finish();
                }
            }
            FastCgiEvent::Abort { id } => {
                // Dropping the response future cancels the application's work.
                if let Some(exchange) = self.exchanges.iter_mut().find(|exchange| exchange.id == id) {
                    exchange.app_status = 0;
                    exchange.end(&mut self.outbox);
                }
            }
            FastCgiEvent::Reply { bytes, then_close } => {
                self.outbox.push(bytes);
                self.closing |= then_close;
                self.unread |= then_close; // the remainder of the refused request
                if self.outbox.len() > OUTBOX_LIMIT + REPLIES_LIMIT {
                    return Err(io::Error::other("the peer sends requests without reading the replies"));
                }
            }
        }
        Ok(())
    }

    fn exchange(&mut self, id: RequestId) -> Option<&mut Exchange<S, B>> {
        self.exchanges.iter_mut().find(|exchange| exchange.id == id)
    }

    fn begin(&mut self, id: RequestId, keep_connection: bool, role: Role, params: Params) {
        let max_body = self.application.limits.max_body;
        let activity = self.socket.activity();
        let mut stdin = None;
        let made = cgi::request(params, |length| {
            // An authorizer has no body (FastCGI specification, section 6.3), even if a server
            // announces one.
            if role == Role::Authorizer
                || length == Some(0)
                || length.is_none() && self.decoder.body_is_empty(id, &self.input)
            {
                return Body::empty();
            }
            let (writer, reader) = pipe::pipe();
            stdin = Some(writer);
            Body::stdin(reader, length, max_body).with_activity(activity)
        });
        let mut request = match made {
            Ok(request) => request,
            Err(error) => {
                return self.refuse(id, keep_connection, error.status(), error.to_string());
            }
        };
        let data = give_role(&mut request, role, self.socket.activity());
        let is_head = request.method() == Method::HEAD;
        let under_way = self.enter(id, keep_connection, is_head);
        self.socket.activity().tell_waited(&mut request);
        let answer = self.application.answer(Protocol::FastCgi, request, Some(under_way));
        self.start(id, keep_connection, answer);
        if let Some(exchange) = self.exchanges.last_mut() {
            (exchange.is_head, exchange.stdin, exchange.data) = (is_head, stdin, data);
        }
    }

    fn refuse(&mut self, id: RequestId, keep_connection: bool, status: StatusCode, why: impl Into<String>) {
        let under_way = self.enter(id, keep_connection, false);
        let answer = self.application.refuse(Protocol::FastCgi, status, self.from, why, under_way);
        self.start(id, keep_connection, answer);
    }

    fn start(&mut self, id: RequestId, keep_connection: bool, answer: ResponseFuture<S, B>) {
        let mut work = self.spare.take().unwrap_or_else(|| Box::pin(Work::Ended));
        work.set(Work::Answering { answer });
        let (is_head, stdin, data, app_status) = (false, None, None, 0);
        self.exchanges.push(Exchange { id, keep_connection, is_head, stdin, data, app_status, work });
    }

    /// Closes the connection. If the peer may still be sending, this function first shuts down the write side and reads
    /// until the peer closes, because closing a socket with unread bytes would destroy output in transit.
    async fn close(self, drain: &Drain) {
        if self.unread {
            linger::linger(self.socket, drain).await;
        }
    }
}

/// Adds the role to the request unless the role is Responder, the usual one. Returns the pipe for a filter's file.
fn give_role(request: &mut Request<Body>, role: Role, activity: &Arc<Activity>) -> Option<pipe::Writer> {
    if role == Role::Responder {
        return None;
    }
    request.extensions_mut().insert(role);
    if role != Role::Filter {
        return None;
    }
    let length = request.extensions().get::<ClientInfo>().and_then(|origin| origin.params.get("FCGI_DATA_LENGTH"));
    let length = length.and_then(|length| std::str::from_utf8(length).ok()?.parse().ok());
    let (writer, reader) = pipe::pipe();
    request.extensions_mut().insert(FilterData::new(Body::stdin(reader, length, u64::MAX).with_activity(activity)));
    Some(writer)
}
