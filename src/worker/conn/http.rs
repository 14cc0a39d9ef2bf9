//! One HTTP connection, of version 1 or 2. hyper does the protocols; this file tells them apart, refuses what hyper
//! lets pass and no application should see, and joins them to the application and to the drain.
//!
//! A request comes to the application in one form, whatever the version: its URI is a path, its host is in `Host`,
//! and how it came is in [`ClientInfo`].

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
use http::header::{self, HeaderMap, HeaderValue};
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

use self::request::settle;
use self::requests::{Requests, UnderWay};
use self::rest::Rest;
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
use crate::worker::lifecycle::drain::{Asked, Drain};
use crate::worker::service::serve::{Application, BoxError, Served, Switch};

/// Bytes of a request's body that may be on their way in one stream of HTTP/2.
const WINDOW: u32 = 64 << 10;
/// What the window of a connection can be (RFC 9113, section 6.9.1).
const LARGEST_WINDOW: u32 = i32::MAX.cast_unsigned();
/// Bytes of one stream's response that may wait to be written.
const SEND_BUFFER: usize = 64 << 10;
/// Streams that a client has reset and the application has not yet heard of; and those that we had to reset. Beyond that
/// the connection is closed: whoever does so at length wants to keep us busy (CVE-2023-44487).
const RESETS: (usize, usize) = (20, 128);
/// How the first record of a TLS connection begins: a handshake, version 3 (RFC 8446, section 5.1).
const TLS_HANDSHAKE: &[u8] = &[0x16, 0x03];
const TLS_ON_PLAIN_PORT: &str = "a TLS handshake on a port that speaks plain HTTP";
/// Headers that hyper's parser has room for without asking for memory. More cost two allocations a request.
const ROOM_FOR_HEADERS: usize = 100;

/// Serves one connection to its end.
pub(crate) async fn serve<S, B>(socket: Socket, origin: ClientInfo, application: Rc<Application<S>>, drain: Drain)
where
    S: Service<Request<Body>, Response = Response<B>> + Clone + 'static,
    S::Error: Into<BoxError>,
    B: HttpBody + 'static,
    B::Error: Into<BoxError>,
{
    let limits = application.limits;
    let from = origin.address;
    let Some((socket, is_http2)) = with_version(socket, &application, from, &drain).await else { return };
    let begins_as_tls = socket.early().starts_with(TLS_HANDSHAKE);
    let (activity, conn) = (Arc::clone(socket.activity()), *socket.conn());
    if is_http2 {
        activity.set_knows_heads();
        activity.set_says_goodbye();
        conn.set_wire_protocol(WireProtocol::Http2);
    }
    let socket = TokioIo::new(socket);
    let requests = Rc::new(Requests::new(limits.max_requests_per_connection, activity, conn));
    let ends = Ends { drain: drain.clone(), idle: limits.timeouts.upgraded };
    let connection =
        Connection { application: Rc::clone(&application), origin, requests: Rc::clone(&requests), ends: ends.clone() };
    let connection = Rc::new(connection);
    let answer = service_fn(move |request| Rc::clone(&connection).answer(request));
    let mut unread = None;
    let ended = if is_http2 {
        let connection = Box::pin(http2_settings(&limits).serve_connection(socket, answer));
        until_drained(connection, |connection| connection.as_mut().graceful_shutdown(), &requests, &drain).await
    } else {
        let mut connection = http1_settings(&limits).serve_connection(socket, answer);
        let ended = loop {
            match until_movable(&mut connection, &requests, &drain).await {
                Http1End::Ended(ended) => break ended,
                Http1End::Unsettled => {
                    let Parts { io, read_buf, service, .. } = connection.into_parts();
                    let mut socket = io.into_inner();
                    socket.put_back(&read_buf);
                    requests.settle(socket.early().len());
                    connection = http1_settings(&limits).serve_connection(TokioIo::new(socket), service);
                }
                Http1End::Movable => {
                    let Parts { io, read_buf, .. } = connection.into_parts();
                    return move_on(io.into_inner(), &read_buf, &drain).await;
                }
                Http1End::Ending => {
                    let connection = Pin::new(&mut connection);
                    break until_drained(connection, |it| it.as_mut().graceful_shutdown(), &requests, &drain).await;
                }
            }
        };
        if let Some(taken) = requests.taken().filter(|_| ended.is_ok()) {
            let Parts { io, read_buf, .. } = connection.into_parts();
            return taken.carry(io.into_inner(), read_buf, &ends).await;
        }
        if ended.as_ref().is_err_and(is_timeout) && requests.activity().stage() == Stage::Head {
            return time_out(connection.into_parts().io.into_inner(), &application, from, &drain).await;
        }
        if requests.left_unread() || ended.as_ref().is_err_and(|error| refused(error).is_some()) {
            unread = Some(connection.into_parts().io.into_inner());
        }
        ended
    };
    if let Err(error) = ended {
        if let Some((status, why)) = refused(&error) {
            let why = if begins_as_tls && requests.are_none() { TLS_ON_PLAIN_PORT.to_owned() } else { why };
            application.turned_away(Protocol::Http, status, from, why);
        }
        log::debug!("an HTTP connection ended: {}", with_causes(&error));
    }
    if let Some(socket) = unread {
        linger(socket, &drain).await;
    }
}

/// Finds out whether the client speaks HTTP/2. `None` if the connection is over, or another worker's.
async fn with_version<S, B>(
    mut socket: Socket,
    application: &Application<S>,
    from: Option<SocketAddr>,
    drain: &Drain,
) -> Option<(Socket, bool)>
where
    S: Service<Request<Body>, Response = Response<B>> + Clone + 'static,
    S::Error: Into<BoxError>,
    B: HttpBody + 'static,
    B::Error: Into<BoxError>,
{
    let read = tokio::select! {
        biased;
        read = preface::speaks_http2(&mut socket) => Some(read),
        () = drain.wait_to_move() => None,
    };
    match read {
        Some(Ok(is_http2)) => return Some((socket, is_http2)),
        Some(Err(error)) if error.kind() == io::ErrorKind::TimedOut && !socket.early().is_empty() => {
            time_out(socket, application, from, drain).await;
        }
        Some(Err(error)) => log::debug!("an HTTP connection ended: {error}"),
        None => drain.hand_over(socket, &[]).await,
    }
    None
}

/// Passes a connection on with what hyper has taken in: whole requests, for the rest of a body must not become one.
async fn move_on(socket: Socket, taken_in: &[u8], drain: &Drain) {
    if usize::try_from(socket.conn().unfinished()) == Ok(taken_in.len() + socket.early().len()) {
        return drain.hand_over(socket, taken_in).await;
    }
    linger(socket, drain).await;
}

/// How far an HTTP/1 connection was served.
enum Http1End {
    Ended(hyper::Result<()>),
    /// Nothing is under way, but requests came in pieces, or their bodies in chunks: how much of the next one hyper has read is
    /// known only when hyper gives its buffer back. The journal and the drain have to know it.
    Unsettled,
    /// The worker leaves, a sibling is there, and nothing is under way: it can be passed on.
    Movable,
    /// It is to be closed when what has begun is over.
    Ending,
}

/// Serves an HTTP/1 connection until it ends, or the worker leaves.
async fn until_movable<C>(connection: &mut C, requests: &Requests, drain: &Drain) -> Http1End
where
    C: Future<Output = hyper::Result<()>> + Unpin,
{
    let mut drained = pin!(drain.wait());
    let mut asked = Asked::default();
    let ended = poll_fn(|context| {
        if !drain.has_begun() && asked.is_new(context) {
            let _ = drained.as_mut().poll(context);
        }
        if let Poll::Ready(ended) = Pin::new(&mut *connection).poll(context) {
            return Poll::Ready(Some(ended));
        }
        requests.await_bodies(context);
        let leaves = drain.has_begun() && (requests.are_over() || !drain.has_sibling());
        if leaves || requests.are_to_be_settled() || requests.are_enough() { Poll::Ready(None) } else { Poll::Pending }
    });
    match ended.await {
        Some(ended) => Http1End::Ended(ended),
        None if requests.are_to_be_settled() && !requests.are_enough() => Http1End::Unsettled,
        None if drain.has_begun() && drain.has_sibling() && requests.can_go_on_elsewhere() => Http1End::Movable,
        None => Http1End::Ending,
    }
}

/// A head that has come in part only is answered, too late or not.
async fn time_out<S>(mut socket: Socket, application: &Application<S>, from: Option<SocketAddr>, drain: &Drain) {
    let why = "a head that did not come within --header-timeout";
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

/// Whether a connection ended because its client took too long.
fn is_timeout(error: &hyper::Error) -> bool {
    let causes = std::iter::successors(error.source(), |&error| error.source());
    let mut errors = causes.filter_map(|error| error.downcast_ref::<io::Error>());
    errors.any(|error| error.kind() == io::ErrorKind::TimedOut)
}

/// If hyper has refused a request by itself, or broken off for what the client sent: with which status, and why.
fn refused(error: &hyper::Error) -> Option<(StatusCode, String)> {
    let text = with_causes(error);
    if error.is_parse_too_large() {
        // hyper has one error for all of them.
        return Some(if text.contains("URI") {
            (StatusCode::URI_TOO_LONG, "a target longer than --max-uri can be".to_owned())
        } else {
            let why = "a head larger than --max-params, or with more headers than --max-headers, or with a Content-Length \
                above 2^64 - 3";
            (StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, why.to_owned())
        });
    }
    // Over HTTP/2 the client breaks off as well: "received".
    let is_clients = error.is_parse() || text.contains("connection error detected");
    is_clients.then_some((StatusCode::BAD_REQUEST, text))
}

/// hyper's errors name the layer; what happened is in their sources.
fn with_causes(error: &dyn Error) -> String {
    let causes = std::iter::successors(error.source(), |&error| error.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

fn http1_settings(limits: &Limits) -> http1::Builder {
    let mut builder = http1::Builder::new();
    // The time is the watchdog's.
    builder.header_read_timeout(None).max_buf_size(limits.max_params).max_header_size(limits.max_params);
    if limits.max_headers != ROOM_FOR_HEADERS {
        builder.max_headers(limits.max_headers);
    }
    builder
}

fn http2_settings(limits: &Limits) -> http2::Builder<LocalTasks> {
    let mut builder = http2::Builder::new(LocalTasks);
    let streams = u32::try_from(limits.max_multiplexed).unwrap_or(u32::MAX);
    // As much as all streams may have: or bodies that nobody reads yet would leave no room for the one that is being read.
    let window = WINDOW.saturating_mul(streams).min(LARGEST_WINDOW);
    builder
        .timer(TokioTimer::new())
        .initial_stream_window_size(WINDOW)
        .initial_connection_window_size(window)
        .max_send_buf_size(SEND_BUFFER)
        .max_concurrent_streams(streams)
        // h2 answers what is larger by itself, and nobody hears of it: so that is left to [`Application::answer`], up to this.
        .max_header_list_size(u32::try_from(limits.max_params.saturating_mul(2)).unwrap_or(u32::MAX))
        .max_pending_accept_reset_streams(RESETS.0)
        .max_local_error_reset_streams(RESETS.1)
        .enable_connect_protocol();
    builder
}

/// Serves a connection to its end. Once the worker drains, or enough requests were served on it, it is asked to end
/// when it has answered what has begun.
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
        // hyper closes an idle connection at once. This way the next request is answered, and told that it was
        // the last one; what had begun before is told the same.
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
    // Or hyper would add `close` to the options of a response that switches protocols. When there was one, the connection ends.
    tokio::select! {
        biased;
        ended = &mut connection => return ended,
        () = requests.no_upgrade_offered() => {}
    }
    shut_down(&mut connection);
    requests.activity().set_said_goodbye();
    connection.await
}

/// Runs the streams of HTTP/2 connections, as tasks of the worker's event loop.
#[derive(Clone, Copy, Debug)]
struct LocalTasks;

impl<F: Future<Output: 'static> + 'static> hyper::rt::Executor<F> for LocalTasks {
    fn execute(&self, stream: F) {
        tokio::task::spawn_local(stream);
    }
}

/// What the requests of a connection have in common.
struct Connection<S> {
    application: Rc<Application<S>>,
    origin: ClientInfo,
    requests: Rc<Requests>,
    ends: Ends,
}

impl<S, B> Connection<S>
where
    S: Service<Request<Body>, Response = Response<B>> + Clone,
    S::Error: Into<BoxError>,
    B: HttpBody,
    B::Error: Into<BoxError>,
{
    fn answer(
        self: Rc<Self>,
        request: Request<Incoming>,
    ) -> impl Future<Output = Result<Response<Reply<B>>, Infallible>> {
        // Counted now: hyper may let some time pass before it asks for the answer.
        let mut under_way = self.requests.begin(&request);
        async move {
            let max_body = self.application.limits.max_body;
            let (head, incoming) = request.into_parts();
            let (body, rest) = Body::http(incoming, max_body);
            let body = if rest.is_some() { body.with_activity(self.requests.activity()) } else { body };
            let mut rest = rest.map(|rest| Rest::new(rest, head.headers.contains_key(header::EXPECT)));
            let mut request = Request::from_parts(head, body);
            let is_http2 = request.version() == Version::HTTP_2;
            let offer = Offer::of(&mut request);
            let switch = offer.as_ref().map_or(Switch::No, |offer| offer.switch);
            under_way.offers_upgrade(offer.is_some());
            let answer = match settle(&mut request) {
                Ok(()) => {
                    request.extensions_mut().insert(self.origin.clone());
                    self.requests.activity().tell_waited(&mut request);
                    self.application.answer(Protocol::Http, request).offering(switch)
                }
                Err(refusal) => {
                    under_way.is_last = true;
                    self.application.refuse(Protocol::Http, refusal.status, self.origin.address, refusal.why)
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
            under_way.is_answered();
            if let Some(mut rest) = rest {
                under_way.is_last |= rest.ends_connection();
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
            if let Some(offer) = offer.filter(|_| switch.is_made_by(response.status())) {
                return Ok(self.switch(response, offer, under_way));
            }
            under_way.offers_upgrade(false);
            if is_http2 {
                response.headers_mut().remove(header::TE); // hyper removes the others, and h2 would reset the stream for this
            } else {
                set_connection(response.headers_mut(), under_way.is_last);
            }
            under_way.enter_response(&response);
            response.body_mut().tell(self.requests.activity());
            let room = is_http2.then(|| {
                let mut room = Wait::for_room(self.requests.activity());
                room.set(true);
                room
            });
            Ok(response.map(|body| Reply { body, room, under_way: Some(under_way) }))
        }
    }

    /// The application has taken an upgrade: what follows its response is another protocol's.
    fn switch(&self, response: Response<Served<B>>, offer: Offer, under_way: UnderWay) -> Response<Reply<B>> {
        under_way.enter_response(&response);
        let (head, body) = response.into_parts();
        let (body, serving) = body.switch();
        if let Some(serving) = serving {
            let switch = offer.switch;
            let taken = offer.take(serving, under_way);
            if switch == Switch::Connect {
                tokio::task::spawn_local(taken.carry_stream(Arc::clone(self.requests.activity()), self.ends.clone()));
            } else {
                self.requests.take(taken);
            }
        }
        Response::from_parts(head, Reply { body, room: None, under_way: None })
    }
}

/// Says in `Connection` what goes with the response.
fn set_connection(headers: &mut HeaderMap, is_last: bool) {
    // RFC 9110, section 7.8.
    if headers.contains_key(header::UPGRADE) && !headers.contains_key(header::CONNECTION) {
        headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
    }
    if is_last {
        headers.append(header::CONNECTION, HeaderValue::from_static("close"));
    }
}

pin_project! {
    /// The body of a response; until it is dropped its request is under way.
    struct Reply<B> {
        #[pin]
        body: Served<B>,
        // Over HTTP/2: while the last piece has not been taken, the peer gives no room for it.
        room: Option<Wait>,
        // None if it lives on behind an upgrade.
        under_way: Option<UnderWay>,
    }
}

impl<B> HttpBody for Reply<B>
where
    B: HttpBody,
    B::Error: Into<BoxError>,
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
