//! Serves one HTTP connection, version 1 or 2. hyper implements the protocols. This module detects the version, rejects
//! requests that hyper accepts but no application should receive, and connects hyper to the application and to the
//! drain.
//!
//! The application receives requests of either version in the same form: the URI is a path, the host is in `Host`, and
//! the client's address and scheme are in [`ClientInfo`].

mod connection_header;
mod request;
mod requests;
mod rest;
mod upgrade;

use std::convert::Infallible;
use std::error::Error;
use std::future::{Future, poll_fn};
use std::io;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use http::header;
use http::{Request, Response, StatusCode, Version};
use http_body::{Body as HttpBody, Frame, SizeHint};
use hyper::body::Incoming;
use hyper::server::conn::http1::{self, Parts};
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use pin_project_lite::pin_project;
use tokio::io::AsyncWriteExt as _;
use tower_service::Service;

use self::connection_header::{response_closes, set_connection};
use self::request::settle;
use self::requests::{OpenRequest, Requests};
use self::rest::UnreadBodyReader;
use self::upgrade::{Ends, Offer};
use super::linger::linger;
use super::preface;
use super::socket::Socket;
use crate::app::body::{Body, BodyError};
use crate::config::Limits;
use crate::config::address::Protocol;
use crate::heir::journal::WireProtocol;
use crate::protocol::cgi::ClientInfo;
use crate::request::activity::{Stage, Wait};
use crate::worker::lifecycle::drain::{Drain, WakerRegistration};
use crate::worker::service::serve::{AppService, Application, ResponseBody, Served, Switch, refusal};

/// Bytes of a request body that may be in transit on one HTTP/2 stream.
const WINDOW: u32 = 64 << 10;
/// Largest window of a connection (RFC 9113, section 6.9.1).
const LARGEST_WINDOW: u32 = i32::MAX.cast_unsigned();
/// Bytes of one stream's response that may be queued.
const SEND_BUFFER: usize = 64 << 10;
/// Maximum number of streams that the client resets before the application receives them, and of streams that the
/// server has to reset. A connection that exceeds either limit is closed, because a client could otherwise keep the
/// server busy with resets (CVE-2023-44487).
const RESETS: (usize, usize) = (20, 128);
/// The first bytes of a TLS connection: a handshake record, version 3 (RFC 8446, section 5.1).
const TLS_HANDSHAKE: &[u8] = &[0x16, 0x03];
const TLS_ON_PLAIN_PORT: &str = "a TLS handshake on a port that speaks plain HTTP";

/// Serves one connection until it ends.
///
/// Everything that only a connection in use needs is in boxed futures, so that many idle connections need little memory.
pub(crate) async fn serve<S, B>(socket: Socket, origin: ClientInfo, application: Rc<Application<S>>, drain: Drain)
where
    S: AppService<B>,
    B: ResponseBody,
{
    let most = application.limits.max_requests_per_connection;
    let requests = Rc::new(Requests::new(most, Arc::clone(socket.activity()), *socket.conn()));
    let ends = Ends { drain, idle: application.limits.timeouts.upgraded };
    let connection = Rc::new(Connection { application, origin, requests, ends });
    let Some((mut socket, is_http2)) = with_version(socket, &connection).await else { return };
    if is_http2 {
        return Box::pin(serve_http2(socket, connection)).await;
    }
    while let Some(idle) = Box::pin(serve_http1(socket, Rc::clone(&connection))).await {
        socket = idle;
        rest(&mut socket, &connection.ends.drain).await;
    }
}

async fn serve_http2<S, B>(socket: Socket, connection: Rc<Connection<S>>)
where
    S: AppService<B>,
    B: ResponseBody,
{
    socket.activity().set_knows_heads();
    socket.activity().set_says_goodbye();
    socket.conn().set_wire_protocol(WireProtocol::Http2);
    let answer = {
        let connection = Rc::clone(&connection);
        service_fn(move |request| Rc::clone(&connection).answer(request))
    };
    let settings = http2_settings(&connection.application.limits);
    let serving = pin!(settings.serve_connection(TokioIo::new(socket), answer));
    let (requests, drain) = (&connection.requests, &connection.ends.drain);
    let ended = until_drained(serving, |serving| serving.as_mut().graceful_shutdown(), requests, drain).await;
    if let Err(error) = ended {
        report(&error, &connection.application, connection.origin.address, false);
    }
}

/// Serves a connection until it ends, or is to [rest](Http1End::Resting). Returns the socket if it is to rest.
async fn serve_http1<S, B>(socket: Socket, connection: Rc<Connection<S>>) -> Option<Socket>
where
    S: AppService<B>,
    B: ResponseBody,
{
    let begins_as_tls = socket.early().starts_with(TLS_HANDSHAKE);
    let Connection { application, origin, requests, ends } = &*connection;
    let (from, drain) = (origin.address, &ends.drain);
    let answer = {
        let connection = Rc::clone(&connection);
        service_fn(move |request| Rc::clone(&connection).answer(request))
    };
    let settings = http1_settings(&application.limits);
    let mut serving = settings.serve_connection(TokioIo::new(socket), answer);
    let ended = loop {
        match until_movable(&mut serving, requests, drain).await {
            Http1End::Ended(ended) => break ended,
            end @ (Http1End::Unsettled | Http1End::Resting) => {
                let Parts { io, read_buf, service, .. } = serving.into_parts();
                let mut socket = io.into_inner();
                socket.put_back(&read_buf);
                requests.settle(socket.early().len());
                if matches!(end, Http1End::Resting) {
                    return Some(socket);
                }
                serving = settings.serve_connection(TokioIo::new(socket), service);
            }
            Http1End::Movable => {
                let Parts { io, read_buf, .. } = serving.into_parts();
                move_on(io.into_inner(), &read_buf, drain).await;
                return None;
            }
            Http1End::Ending => {
                requests.close();
                let serving = Pin::new(&mut serving);
                break until_drained(serving, |serving| serving.as_mut().graceful_shutdown(), requests, drain).await;
            }
        }
    };
    if let Some(upgrade) = requests.take_upgrade().filter(|_| ended.is_ok()) {
        let Parts { io, read_buf, .. } = serving.into_parts();
        Box::pin(upgrade.carry(io.into_inner(), read_buf, ends)).await;
        return None;
    }
    if ended.as_ref().is_err_and(is_timeout) && requests.activity().stage() == Stage::Head {
        Box::pin(time_out(serving.into_parts().io.into_inner(), application, from, drain)).await;
        return None;
    }
    let is_refused = ended.as_ref().is_err_and(|error| refused(error).is_some());
    let unread = (requests.left_unread() || is_refused).then(|| serving.into_parts().io.into_inner());
    if let Err(error) = ended {
        report(&error, application, from, begins_as_tls && requests.are_none());
    }
    if let Some(socket) = unread {
        linger(socket, drain).await;
    }
    None
}

/// Logs the error with which a connection ended.
fn report<S>(error: &hyper::Error, application: &Application<S>, from: Option<SocketAddr>, is_tls: bool) {
    if let Some((status, why)) = refused(error) {
        let why = if is_tls { TLS_ON_PLAIN_PORT.to_owned() } else { why };
        application.turned_away(Protocol::Http, status, from, why);
    }
    log::debug!("an HTTP connection ended: {}", with_causes(error));
}

/// Detects whether the client uses HTTP/2. Returns `None` if the connection has ended or was handed over.
async fn with_version<S>(mut socket: Socket, connection: &Connection<S>) -> Option<(Socket, bool)> {
    let Connection { application, origin, ends, .. } = connection;
    let drain = &ends.drain;
    let read = tokio::select! {
        biased;
        read = preface::speaks_http2(&mut socket) => Some(read),
        () = drain.wait_to_move() => None,
    };
    match read {
        Some(Ok(is_http2)) => return Some((socket, is_http2)),
        Some(Err(error)) if error.kind() == io::ErrorKind::TimedOut && !socket.early().is_empty() => {
            Box::pin(time_out(socket, application, origin.address, drain)).await;
        }
        Some(Err(error)) => log::debug!("an HTTP connection ended: {error}"),
        None => drain.hand_over(socket, &[]).await,
    }
    None
}

/// Hands a connection over with the bytes that hyper has read, if these are exactly the bytes that the journal lists as
/// unfinished. Otherwise closes the connection, because the remainder of a body must not be read as a request.
async fn move_on(socket: Socket, taken_in: &[u8], drain: &Drain) {
    if usize::try_from(socket.conn().unfinished()) == Ok(taken_in.len() + socket.early().len()) {
        return drain.hand_over(socket, taken_in).await;
    }
    linger(socket, drain).await;
}

/// How serving an HTTP/1 connection ended.
enum Http1End {
    Ended(hyper::Result<()>),
    /// Nothing is under way, but a request arrived in several reads, or its body in chunks. The journal and the drain
    /// need to know how many bytes of the next request hyper has read, and hyper reveals this number only when it
    /// returns its buffer.
    Unsettled,
    /// The connection is idle, and hyper's buffers, 16 KiB, are to be freed until the next request.
    Resting,
    /// The worker is draining, a sibling is available, and nothing is under way: the connection can be handed over.
    Movable,
    /// The connection must be closed when the requests that have begun are complete.
    Ending,
}

/// Serves an HTTP/1 connection until it ends, the worker drains, or no further request is allowed.
async fn until_movable<C>(connection: &mut C, requests: &Requests, drain: &Drain) -> Http1End
where
    C: Future<Output = hyper::Result<()>> + Unpin,
{
    let mut drained = pin!(drain.wait());
    let mut registration = WakerRegistration::default();
    let mut rests = false;
    let ended = poll_fn(|context| {
        if !drain.has_begun() && registration.is_new(context) {
            let _ = drained.as_mut().poll(context);
            requests.activity().can_rest(context.waker());
        }
        if let Poll::Ready(ended) = Pin::new(&mut *connection).poll(context) {
            return Poll::Ready(Some(ended));
        }
        requests.await_bodies(context);
        let leaves = drain.has_begun() && (requests.are_over() || !drain.has_sibling());
        rests = requests.are_to_rest();
        let is_pending = !leaves && !rests && !requests.are_to_be_settled() && !requests.are_enough();
        if is_pending { Poll::Pending } else { Poll::Ready(None) }
    });
    match ended.await {
        Some(ended) => Http1End::Ended(ended),
        None if requests.are_to_be_settled() && !requests.are_enough() => Http1End::Unsettled,
        None if drain.has_begun() && drain.has_sibling() && requests.can_go_on_elsewhere() => Http1End::Movable,
        None if rests && !drain.has_begun() && !requests.are_enough() => Http1End::Resting,
        None => Http1End::Ending,
    }
}

/// Returns when bytes of the next request have been read, the connection has ended, or the drain has begun.
async fn rest(socket: &mut Socket, drain: &Drain) {
    if !socket.early().is_empty() {
        return;
    }
    tokio::select! {
        biased;
        // The socket reports the end or an error once more when hyper reads from it.
        _ = socket.look_ahead() => {}
        () = drain.wait() => {}
    }
}

/// Answers 408 to a request head that did not arrive completely in time.
async fn time_out<S>(mut socket: Socket, application: &Application<S>, from: Option<SocketAddr>, drain: &Drain) {
    let why = "a head that did not arrive within --header-timeout";
    application.turned_away(Protocol::Http, StatusCode::REQUEST_TIMEOUT, from, why);
    let date = jiff::Timestamp::now().strftime("%a, %d %b %Y %H:%M:%S GMT");
    let text = "408 Request Timeout\n";
    let head = format!(
        "HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: {}\r\ndate: {date}\r\n\r\n{text}",
        text.len()
    );
    if socket.write_all(head.as_bytes()).await.is_ok() {
        linger(socket, drain).await;
    }
}

/// Whether a connection ended because its client exceeded a timeout.
fn is_timeout(error: &hyper::Error) -> bool {
    let causes = std::iter::successors(error.source(), |&error| error.source());
    let mut errors = causes.filter_map(|error| error.downcast_ref::<io::Error>());
    errors.any(|error| error.kind() == io::ErrorKind::TimedOut)
}

/// Returns the status and the reason if hyper itself refused a request, or ended the connection
/// because of the client's input.
fn refused(error: &hyper::Error) -> Option<(StatusCode, String)> {
    let text = with_causes(error);
    if error.is_parse_too_large() {
        // hyper uses the same error for all three limits.
        return Some(if text.contains("URI") {
            (StatusCode::URI_TOO_LONG, "a target longer than --max-uri can allow".to_owned())
        } else {
            let why = "a head larger than --max-params, or with more headers than --max-headers, or with a Content-Length \
                above 2^64 - 3";
            (StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, why.to_owned())
        });
    }
    // Over HTTP/2, the client may also report an error, which hyper describes as "received".
    let is_clients = error.is_parse() || text.contains("connection error detected");
    is_clients.then_some((StatusCode::BAD_REQUEST, text))
}

/// Adds the sources of an error to its text: hyper's errors name the layer, and their sources name
/// the cause.
fn with_causes(error: &dyn Error) -> String {
    let causes = std::iter::successors(error.source(), |&error| error.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

fn http1_settings(limits: &Limits) -> http1::Builder {
    let mut builder = http1::Builder::new();
    // The watchdog enforces the timeout.
    builder.header_read_timeout(None).max_buf_size(limits.max_params).max_header_size(limits.max_params);
    if let Some(most) = limits.max_headers_to_set() {
        builder.max_headers(most);
    }
    builder
}

fn http2_settings(limits: &Limits) -> http2::Builder<LocalTasks> {
    let mut builder = http2::Builder::new(LocalTasks);
    let streams = u32::try_from(limits.max_multiplexed).unwrap_or(u32::MAX);
    // The connection's window is the sum of all streams' windows. With a smaller one, bodies that are not being read
    // would leave no window for a body that is being read.
    let window = WINDOW.saturating_mul(streams).min(LARGEST_WINDOW);
    builder
        .timer(TokioTimer::new())
        .initial_stream_window_size(WINDOW)
        .initial_connection_window_size(window)
        .max_send_buf_size(SEND_BUFFER)
        .max_concurrent_streams(streams)
        // h2 rejects larger header lists itself and does not report it. So [`Application::answer`]
        // enforces the limit for sizes up to this value.
        .max_header_list_size(u32::try_from(limits.max_params.saturating_mul(2)).unwrap_or(u32::MAX))
        .max_pending_accept_reset_streams(RESETS.0)
        .max_local_error_reset_streams(RESETS.1)
        .enable_connect_protocol();
    builder
}

/// Serves a connection until it ends. When the worker drains, or the connection has served its
/// limit of requests, the connection is shut down gracefully: the requests that have begun are
/// still answered.
async fn until_drained<C>(
    mut connection: Pin<C>,
    shut_down: impl FnOnce(&mut Pin<C>),
    requests: &Rc<Requests>,
    drain: &Drain,
) -> hyper::Result<()>
where
    Pin<C>: Future<Output = hyper::Result<()>> + Unpin,
{
    let drained = async {
        drain.wait().await;
        // hyper closes an idle connection immediately. Waiting here lets the next request be answered, with a notice
        // that it is the last one. The requests that have begun get the same notice.
        tokio::select! {
            () = requests.one_under_way() => {}
            () = drain.wait_for_last_request() => {}
        }
    };
    tokio::select! {
        biased;
        ended = &mut connection => return ended,
        () = drained => {}
        () = requests.last_begun(), if requests.are_limited() => {}
        () = requests.activity().goodbye() => {}
    }
    // No graceful shutdown begins while a request may switch protocols: hyper would add `close` to the `Connection`
    // options of the response that switches. After a switch, the connection ends anyway.
    tokio::select! {
        biased;
        ended = &mut connection => return ended,
        () = requests.no_upgrade_offered() => {}
    }
    shut_down(&mut connection);
    requests.activity().set_said_goodbye();
    connection.await
}

/// Runs HTTP/2 streams as tasks of the worker's event loop.
#[derive(Clone, Copy, Debug)]
struct LocalTasks;

impl<F: Future<Output: 'static> + 'static> hyper::rt::Executor<F> for LocalTasks {
    fn execute(&self, stream: F) {
        tokio::task::spawn_local(stream);
    }
}

/// State that the requests of a connection share.
struct Connection<S> {
    application: Rc<Application<S>>,
    origin: ClientInfo,
    requests: Rc<Requests>,
    ends: Ends,
}

impl<S, B> Connection<S>
where
    // The bound on `Response` is repeated, because the supertrait's bound does not constrain `B`.
    S: AppService<B> + Service<Request<Body>, Response = Response<B>>,
    B: ResponseBody,
{
    fn answer(
        self: Rc<Self>,
        request: Request<Incoming>,
    ) -> impl Future<Output = Result<Response<HttpResponseBody<B>>, Infallible>> {
        // The request is counted here, because hyper may poll the response future later.
        let (under_way, mut open_request) = self.requests.begin(&request);
        async move {
            let max_body = self.application.limits.max_body;
            let (head, incoming) = request.into_parts();
            let (body, rest) = Body::http(incoming, max_body);
            let body = if rest.is_some() { body.with_activity(self.requests.activity()) } else { body };
            let mut rest = rest.map(|rest| {
                let is_awaited = head.headers.contains_key(header::EXPECT);
                UnreadBodyReader::new(rest, is_awaited, self.requests.activity())
            });
            let mut request = Request::from_parts(head, body);
            let version = request.version();
            let offer = Offer::of(&mut request);
            let switch = offer.as_ref().map_or(Switch::No, |offer| offer.switch);
            open_request.offers_upgrade(offer.is_some());
            let answer = match settle(&mut request) {
                Ok(()) => {
                    request.extensions_mut().insert(self.origin.clone());
                    self.requests.activity().tell_waited(&mut request);
                    self.application.answer(Protocol::Http, request, Some(under_way)).offering(switch)
                }
                Err(refusal) => {
                    open_request.is_last = true;
                    let from = self.origin.address;
                    self.application.refuse(Protocol::Http, refusal.status, from, refusal.why, under_way)
                }
            };
            let mut response = {
                let mut answer = pin!(answer);
                let polled = poll_fn(|context| {
                    let response = answer.as_mut().poll(context);
                    if response.is_pending()
                        && let Some(rest) = &mut rest
                    {
                        let _ = rest.poll(context);
                    }
                    response
                });
                polled.await
            };
            open_request.is_answered();
            let offer = offer.filter(|_| switch.is_made_by(response.status()));
            if let Some(mut rest) = rest {
                if offer.is_some() {
                    let is_read = tokio::select! {
                        () = rest.read() => true,
                        () = self.ends.drain.wait_for_end() => false,
                    };
                    if !is_read {
                        rest.cut();
                    }
                }
                open_request.is_last |= rest.ends_connection();
                self.read_rest(rest);
            }
            if let Some(offer) = offer {
                if !self.requests.left_unread() {
                    return Ok(self.switch(response, offer, open_request));
                }
                response = without_switch(response);
            }
            Ok(self.reply(response, version, open_request))
        }
    }

    /// Completes the head of a response to a request of this version, and begins to send the response.
    fn reply(
        &self,
        mut response: Response<Served<B>>,
        version: Version,
        mut open_request: OpenRequest,
    ) -> Response<HttpResponseBody<B>> {
        let is_http2 = version == Version::HTTP_2;
        open_request.offers_upgrade(false);
        if is_http2 {
            response.headers_mut().remove(header::TE); // hyper removes the other such headers, but h2 would reset the stream
        } else {
            open_request.is_last |= self.requests.are_closing() || response_closes(response.headers());
            open_request.is_last |= version < Version::HTTP_11 && ends_with_connection(response.body());
            set_connection(&mut response, version, open_request.is_last);
        }
        if let Some(guard) = response.body_mut().guard_mut() {
            guard.response_begins(0);
            if open_request.is_last && !is_http2 {
                guard.is_last();
                self.requests.close();
            }
        }
        let room = is_http2.then(|| {
            let mut room = Wait::for_room(self.requests.activity());
            room.set(true);
            room
        });
        response.map(|body| HttpResponseBody { body, room, open_request: Some(open_request) })
    }

    /// Reads the unread part of a request's body while the response is sent.
    fn read_rest(&self, mut rest: UnreadBodyReader) {
        if rest.is_cut() {
            self.requests.leave_unread();
        } else if !rest.is_over() {
            let (open, drain) = (self.requests.open_body(), self.ends.drain.clone());
            tokio::task::spawn_local(async move {
                tokio::select! {
                    () = poll_fn(|context| rest.poll(context)) => {}
                    () = drain.wait_for_end() => rest.cut(),
                }
                open.end(rest.is_cut());
            });
        }
    }

    /// Turns the connection or stream over to the application's upgrade: the bytes after the response belong to another
    /// protocol.
    fn switch(
        &self,
        response: Response<Served<B>>,
        offer: Offer,
        open_request: OpenRequest,
    ) -> Response<HttpResponseBody<B>> {
        let (head, body) = response.into_parts();
        let (body, guard) = body.switch();
        if let Some(mut guard) = guard {
            guard.response_begins(0);
            let switch = offer.switch;
            let upgrade = offer.take(guard, open_request);
            if switch == Switch::Connect {
                tokio::task::spawn_local(upgrade.carry_stream(Arc::clone(self.requests.activity()), self.ends.clone()));
            } else {
                self.requests.set_upgrade(upgrade);
            }
        }
        Response::from_parts(head, HttpResponseBody { body, room: None, open_request: None })
    }
}

/// Refuses to switch protocols, because the request's body has not ended, and the other protocol's bytes begin after
/// the body.
fn without_switch<B>(response: Response<Served<B>>) -> Response<Served<B>> {
    let (body, guard) = response.into_body().switch();
    guard.map_or_else(|| Response::new(body), |guard| refusal(StatusCode::BAD_REQUEST, guard))
}

/// Whether this body ends with the connection in HTTP/1.0, which does not have chunked coding.
fn ends_with_connection(body: &impl HttpBody) -> bool {
    !body.is_end_stream() && body.size_hint().exact().is_none()
}

pin_project! {
    /// The body of a response. The request counts as open until this value is dropped.
    struct HttpResponseBody<B>
    where
        B: ResponseBody,
    {
        #[pin]
        body: Served<B>,
        // The wait for window over HTTP/2, as long as the last chunk has not been taken.
        room: Option<Wait>,
        // `None` if the request continues as an upgraded connection.
        open_request: Option<OpenRequest>,
    }

    impl<B> PinnedDrop for HttpResponseBody<B>
    where
        B: ResponseBody,
    {
        // hyper drops an HTTP/1 body at the end of its Content-Length.
        fn drop(this: Pin<&mut Self>) {
            this.project().body.check_end();
        }
    }
}

impl<B> HttpBody for HttpResponseBody<B>
where
    B: ResponseBody,
{
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let reply = self.project();
        let frame = reply.body.poll_frame(context);
        if let Some(room) = reply.room {
            room.set(matches!(frame, Poll::Ready(Some(Ok(_)))));
        }
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
