//! One HTTP connection, of version 1 or 2. hyper does the protocols; this file tells them apart, refuses what hyper
//! lets pass and no application should see, and joins them to the application and to the drain.
//!
//! A request comes to the application in one form, whatever the version: its URI is a path, its host is in `Host`,
//! and how it came is in [`Origin`].

use std::cell::Cell;
use std::convert::Infallible;
use std::error::Error;
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use http::header::{self, HeaderMap, HeaderValue};
use http::uri::{PathAndQuery, Uri};
use http::{Method, Request, Response, StatusCode, Version};
use http_body::{Body as HttpBody, Frame, SizeHint};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use hyper::server::conn::http1::{self, Parts};
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use pin_project_lite::pin_project;
use tokio::sync::{Notify, oneshot};
use tower_service::Service;

use super::closing::{LINGER, linger};
use super::drain::{Asked, Drain};
use super::opening;
use super::serve::{Application, BoxError, Served};
use super::socket::Socket;
use crate::body::{Body, BodyError};
use crate::config::Limits;
use crate::heir::ledger::{Account, Entry, LANDING, Tongue};
use crate::listen::Protocol;
use crate::protocol::cgi::Origin;
use crate::pulse::{Pulse, Wait};

/// Bytes of a request's body that may be on their way in one stream of HTTP/2, and in all streams of a connection.
const WINDOWS: (u32, u32) = (64 << 10, 1 << 20);
/// Bytes of one stream's response that may wait to be written.
const SEND_BUFFER: usize = 64 << 10;
/// Streams that a client has reset and the application has not yet heard of; and those that we had to reset. Beyond that
/// the connection is closed: whoever does so at length wants to keep us busy (CVE-2023-44487).
const RESETS: (usize, usize) = (20, 128);
/// The longest body of which the end is known as a position, which wraps around.
const LONGEST_BODY: u32 = 1 << 30;
/// Headers that hyper's parser has room for without asking for memory. More cost two allocations a request.
const ROOM_FOR_HEADERS: usize = 100;

/// Serves one connection to its end.
pub(crate) async fn serve<S, B>(mut socket: Socket, origin: Origin, application: Rc<Application<S>>, drain: Drain)
where
    S: Service<Request<Body>, Response = Response<B>> + Clone + 'static,
    S::Error: Into<BoxError>,
    B: HttpBody + 'static,
    B::Error: Into<BoxError>,
{
    let limits = application.limits;
    let first_bytes = tokio::select! {
        biased;
        read = opening::speaks_http2(&mut socket) => read,
        () = drain.wait_to_move() => return drain.hand_over(socket, &[]).await,
    };
    let is_http2 = match first_bytes {
        Ok(is_http2) => is_http2,
        Err(error) => return log::debug!("an HTTP connection ended: {error}"),
    };
    let (pulse, account) = (Arc::clone(socket.pulse()), *socket.account());
    if is_http2 {
        pulse.set_knows_heads();
        account.set_tongue(Tongue::Http2);
    }
    let socket = TokioIo::new(socket);
    let requests = Rc::new(Requests::new(limits.max_requests_per_connection, pulse, account));
    let connection = Rc::new(Connection { application, origin, requests: Rc::clone(&requests) });
    let answer = service_fn(move |request| Rc::clone(&connection).answer(request));
    let ended = if is_http2 {
        let connection = Box::pin(http2_settings(&limits).serve_connection(socket, answer));
        until_drained(connection, |connection| connection.as_mut().graceful_shutdown(), &requests, &drain).await
    } else {
        let connection = http1_settings(&limits).serve_connection(socket, answer);
        match until_movable(connection, &requests, &drain).await {
            Served1::Ended(ended) => ended,
            Served1::Movable(connection) => {
                let Parts { io, read_buf, .. } = connection.into_parts();
                let socket = io.into_inner();
                // What hyper has taken in must be whole requests: the rest of a body must not become one.
                if usize::try_from(socket.account().unfinished()) == Ok(read_buf.len() + socket.early().len()) {
                    return drain.hand_over(socket, &read_buf).await;
                }
                return linger(socket).await;
            }
            Served1::Ending(connection) => {
                let connection = pin!(connection);
                until_drained(connection, |connection| connection.as_mut().graceful_shutdown(), &requests, &drain).await
            }
        }
    };
    if let Err(error) = ended {
        log::debug!("an HTTP connection ended: {}", with_causes(&error));
    }
}

/// How far an HTTP/1 connection was served.
enum Served1<C> {
    Ended(hyper::Result<()>),
    /// The worker leaves, a sibling is there, and nothing is under way: it can be passed on.
    Movable(C),
    /// It is to be closed when what has begun is over.
    Ending(C),
}

/// Serves an HTTP/1 connection until it ends, or the worker leaves.
async fn until_movable<C>(mut connection: C, requests: &Requests, drain: &Drain) -> Served1<C>
where
    C: Future<Output = hyper::Result<()>> + Unpin,
{
    let mut drained = pin!(drain.wait());
    let mut asked = Asked::default();
    let ended = poll_fn(|context| {
        if !drain.has_begun() && asked.is_new(context) {
            let _ = drained.as_mut().poll(context);
        }
        if let Poll::Ready(ended) = Pin::new(&mut connection).poll(context) {
            return Poll::Ready(Some(ended));
        }
        let leaves =
            drain.has_begun() && (requests.are_over() || !drain.has_sibling() || requests.end_is_unknown.get());
        if leaves || requests.are_enough() { Poll::Ready(None) } else { Poll::Pending }
    });
    match ended.await {
        Some(ended) => Served1::Ended(ended),
        None if drain.has_begun() && drain.has_sibling() && requests.can_go_on_elsewhere() => {
            Served1::Movable(connection)
        }
        None => Served1::Ending(connection),
    }
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
    builder
        .timer(TokioTimer::new())
        .initial_stream_window_size(WINDOWS.0)
        .initial_connection_window_size(WINDOWS.1)
        .max_send_buf_size(SEND_BUFFER)
        .max_concurrent_streams(u32::try_from(limits.max_multiplexed).unwrap_or(u32::MAX))
        .max_header_list_size(u32::try_from(limits.max_params).unwrap_or(u32::MAX))
        .max_pending_accept_reset_streams(RESETS.0)
        .max_local_error_reset_streams(RESETS.1);
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
        () = requests.last_begun.notified(), if requests.limit > 0 => {}
    }
    shut_down(&mut connection);
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
    origin: Origin,
    requests: Rc<Requests>,
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
            let body = match rest {
                None => body,
                Some(rest) => {
                    tokio::task::spawn_local(read_rest(rest));
                    body.with_pulse(&self.requests.pulse)
                }
            };
            let mut request = Request::from_parts(head, body);
            let is_http2 = request.version() == Version::HTTP_2;
            let answer = match settle(&mut request) {
                Ok(()) => {
                    request.extensions_mut().insert(self.origin.clone());
                    self.requests.pulse.tell_waited(&mut request);
                    self.application.answer(Protocol::Http, request)
                }
                Err(refusal) => {
                    log::debug!("an HTTP request was refused: {}", refusal.why);
                    under_way.is_last = true;
                    self.application.refuse(Protocol::Http, refusal.status)
                }
            };
            let mut response = answer.await;
            under_way.is_answered();
            if under_way.is_last && !is_http2 {
                response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
            }
            under_way.enter_response(&response);
            response.body_mut().tell(&self.requests.pulse);
            let room = is_http2.then(|| {
                let mut room = Wait::for_room(&self.requests.pulse);
                room.set(true);
                room
            });
            Ok(response.map(|body| Reply { body, room, under_way }))
        }
    }
}

pin_project! {
    /// The body of a response; until it is dropped its request is under way.
    struct Reply<B> {
        #[pin]
        body: Served<B>,
        // Over HTTP/2: while the last piece has not been taken, the peer gives no room for it.
        room: Option<Wait>,
        under_way: UnderWay,
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

/// A request that no application gets to see.
#[derive(Debug, PartialEq, Eq)]
struct Refusal {
    status: StatusCode,
    why: &'static str,
}

/// Brings a request into the one form that applications see.
fn settle<B>(request: &mut Request<B>) -> Result<(), Refusal> {
    let refuse = |status, why| Err(Refusal { status, why });
    if request.method() == Method::CONNECT {
        return refuse(StatusCode::NOT_IMPLEMENTED, "CONNECT is for proxies");
    }
    // hyper has seen to it that the last coding is chunked; it has undone that one, and would hide the others from nobody.
    let mut codings = request.headers().get_all(header::TRANSFER_ENCODING).iter();
    if let Some(coding) = codings.next()
        && (codings.next().is_some() || !coding.as_bytes().eq_ignore_ascii_case(b"chunked"))
    {
        return refuse(StatusCode::NOT_IMPLEMENTED, "Transfer-Encoding is more than chunked");
    }
    let version = request.version();
    if request.uri().authority().is_some() {
        if request.uri().scheme().is_none() {
            return refuse(StatusCode::BAD_REQUEST, "the target is neither a path nor a URI");
        }
        // An absolute URI (RFC 9112, section 3.2.2) or :authority (RFC 9113, section 8.3.1) outdoes Host.
        let uri = std::mem::take(request.uri_mut()).into_parts();
        let host = uri.authority.and_then(|authority| HeaderValue::from_str(authority.as_str()).ok());
        let path = uri.path_and_query.unwrap_or_else(|| PathAndQuery::from_static("/"));
        *request.uri_mut() = Uri::from(path);
        if let Some(host) = host {
            request.headers_mut().insert(header::HOST, host);
        }
    }
    // RFC 9112, section 3.2.
    let mut hosts = request.headers().get_all(header::HOST).iter();
    match (hosts.next(), hosts.next()) {
        (None, _) if version < Version::HTTP_11 => {}
        (None, _) => return refuse(StatusCode::BAD_REQUEST, "there is no Host"),
        (Some(_), Some(_)) => return refuse(StatusCode::BAD_REQUEST, "there are several Hosts"),
        (Some(host), None) if !is_host(host.as_bytes()) => {
            return refuse(StatusCode::BAD_REQUEST, "Host is not a host");
        }
        (Some(_), None) => {}
    }
    if version == Version::HTTP_2 {
        join_cookies(request.headers_mut());
    }
    Ok(())
}

/// Whether these are the characters of a host and a port (RFC 3986, section 3.2.2; not `userinfo@`).
pub(super) fn is_host(host: &[u8]) -> bool {
    const OTHERS: &[u8] = b".:-_~!$&'()*+,;=[]%";
    host.iter().all(|byte| byte.is_ascii_alphanumeric() || OTHERS.contains(byte))
}

/// HTTP/2 clients may send each cookie by itself; elsewhere they are one header (RFC 9113, section 8.2.3).
fn join_cookies(headers: &mut HeaderMap) {
    let cookies: Vec<&[u8]> = headers.get_all(header::COOKIE).iter().map(HeaderValue::as_bytes).collect();
    if cookies.len() > 1
        && let Ok(joined) = HeaderValue::from_bytes(&cookies.join(&b"; "[..]))
    {
        headers.insert(header::COOKIE, joined);
    }
}

/// Reads what the application did not read of a body, up to a limit: the peer may not look for the response before it
/// has sent all, and hyper closes a connection on which a body is dropped.
async fn read_rest(rest: oneshot::Receiver<Incoming>) {
    let Ok(mut body) = rest.await else { return }; // it was read to its end
    let (time, mut left) = LINGER;
    let reading = async {
        while let Some(Ok(frame)) = body.frame().await {
            let length = frame.data_ref().map_or(0, Bytes::len) as u64;
            let Some(rest) = left.checked_sub(length) else { return };
            left = rest;
        }
    };
    let _ = tokio::time::timeout(time, reading).await;
}

/// The requests of a connection.
struct Requests {
    pulse: Arc<Pulse>,
    account: Account,
    /// Those that the application has not answered yet: they can be told that they are the last.
    unanswered: Cell<u32>,
    begun: Notify,
    count: Cell<u32>,
    /// How many it may have; 0 is any number.
    limit: u32,
    last_begun: Notify,
    /// There was a request of which nobody knows where in the input it ends.
    end_is_unknown: Cell<bool>,
}

impl Requests {
    fn new(limit: u32, pulse: Arc<Pulse>, account: Account) -> Self {
        let (unanswered, count) = (Cell::new(0), Cell::new(0));
        let (begun, last_begun, end_is_unknown) = (Notify::new(), Notify::new(), Cell::new(false));
        Self { pulse, account, unanswered, begun, count, limit, last_begun, end_is_unknown }
    }

    fn begin(self: &Rc<Self>, request: &Request<Incoming>) -> UnderWay {
        let entry = (request.version() != Version::HTTP_2).then(|| self.enter(request));
        self.pulse.request_came();
        self.unanswered.set(self.unanswered.get() + 1);
        self.count.set(self.count.get().saturating_add(1));
        self.begun.notify_waiters();
        if self.are_enough() {
            self.last_begun.notify_one();
        }
        UnderWay { requests: Rc::clone(self), entry, is_last: self.are_enough(), is_answered: false }
    }

    /// Has the ledger know of an HTTP/1 request, and of where it ends.
    fn enter(&self, request: &Request<Incoming>) -> Entry {
        let head = self.account.look_at_fresh(|position, bytes| Some((position, head_length(bytes)?)));
        let entry =
            self.account.begin(1, request.method() == Method::HEAD, is_last(request.version(), request.headers()));
        let body = request.body().size_hint().exact().and_then(|length| u32::try_from(length).ok());
        match (head, body.filter(|&length| length <= LONGEST_BODY)) {
            (Some((position, head)), Some(body)) => {
                self.account.clean_up_to(position.wrapping_add(head).wrapping_add(body));
            }
            _ => self.end_is_unknown.set(true),
        }
        entry
    }

    /// Whether there can be no further request.
    fn are_enough(&self) -> bool {
        self.limit > 0 && self.count.get() >= self.limit
    }

    /// Whether another worker can go on: all that was taken in are whole requests, or the beginning of one that fits a
    /// message.
    fn can_go_on_elsewhere(&self) -> bool {
        let unfinished = usize::try_from(self.account.unfinished());
        !self.are_enough() && !self.end_is_unknown.get() && unfinished.is_ok_and(|length| length <= LANDING)
    }

    /// Whether all responses have been written.
    fn are_over(&self) -> bool {
        self.pulse.under_way() == 0 && !self.pulse.is_writing()
    }

    async fn one_under_way(&self) {
        if self.unanswered.get() == 0 {
            self.begun.notified().await;
        }
    }
}

/// Bytes of a head at the beginning of `input`, if all of it is there, and its lines end as they should: hyper takes others
/// too.
fn head_length(input: &[u8]) -> Option<u32> {
    let mut from = 0;
    loop {
        let end = from + input.get(from..)?.iter().position(|&byte| byte == b'\n')?;
        let line = input.get(from..end)?.strip_suffix(b"\r")?;
        from = end + 1;
        if line.is_empty() {
            // An empty line in front is none of the request's.
            return u32::try_from(from).ok().filter(|&length| length > 2);
        }
    }
}

/// Whether a message says that the connection is not kept after it (RFC 9112, section 9.3).
fn is_last(version: Version, headers: &HeaderMap) -> bool {
    let options =
        headers.get_all(header::CONNECTION).iter().flat_map(|value| value.as_bytes().split(|&byte| byte == b','));
    let mut options = options.map(<[u8]>::trim_ascii);
    if version < Version::HTTP_11 {
        !options.any(|option| option.eq_ignore_ascii_case(b"keep-alive"))
    } else {
        options.any(|option| option.eq_ignore_ascii_case(b"close"))
    }
}

struct UnderWay {
    requests: Rc<Requests>,
    /// In the ledger, over HTTP/1.
    entry: Option<Entry>,
    /// The connection may have no further request.
    is_last: bool,
    is_answered: bool,
}

impl UnderWay {
    /// The application has answered.
    fn is_answered(&mut self) {
        if !std::mem::replace(&mut self.is_answered, true) {
            self.requests.unanswered.set(self.requests.unanswered.get() - 1);
        }
    }

    /// Has the ledger know that the response is on its way.
    fn enter_response<B>(&self, response: &Response<B>) {
        let Some(entry) = self.entry else { return };
        let account = &self.requests.account;
        account.response_from(entry, account.output(0));
        if is_last(Version::HTTP_11, response.headers()) {
            account.is_last(entry);
        }
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.is_answered();
        if let Some(entry) = self.entry {
            self.requests.account.response_over(entry);
        }
        self.requests.pulse.request_over();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settled(version: Version, method: &str, uri: &str, headers: &[(&str, &str)]) -> Result<Request<()>, Refusal> {
        let mut request = Request::builder().version(version).method(method).uri(uri);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let mut request = request.body(()).unwrap();
        settle(&mut request).map(|()| request)
    }

    #[test]
    fn a_request_has_one_form_whatever_the_version() {
        for (version, uri, headers, path) in [
            (Version::HTTP_11, "/a?b", &[("host", "x:80")][..], "/a?b"),
            (Version::HTTP_11, "http://x:80/a?b", &[("host", "other")], "/a?b"),
            (Version::HTTP_11, "http://x:80", &[("host", "other"), ("host", "another")], "/"),
            (Version::HTTP_10, "/a", &[("host", "x:80")], "/a"),
            (Version::HTTP_2, "http://x:80/a?b", &[], "/a?b"),
            (Version::HTTP_2, "/a", &[("host", "x:80")], "/a"),
            (Version::HTTP_11, "*", &[("host", "x:80")], "*"),
        ] {
            let request = settled(version, "GET", uri, headers).unwrap();
            assert_eq!(
                (request.uri().to_string(), &request.headers()["host"]),
                (path.to_owned(), &"x:80".parse().unwrap())
            );
        }
        assert!(settled(Version::HTTP_10, "GET", "/", &[]).unwrap().headers().is_empty());
        let cookies = settled(Version::HTTP_2, "GET", "http://x/", &[("cookie", "a=1"), ("cookie", "b=2")]).unwrap();
        assert_eq!(cookies.headers().get_all("cookie").iter().collect::<Vec<_>>(), ["a=1; b=2"]);
    }

    #[test]
    fn what_no_application_should_see_is_refused() {
        for (method, uri, headers, status) in [
            ("GET", "/", &[][..], 400),
            ("GET", "/", &[("host", "a"), ("host", "a")], 400),
            ("GET", "/", &[("host", "a/b")], 400),
            ("GET", "/", &[("host", "a b")], 400),
            ("GET", "http://user@x/", &[("host", "x")], 400),
            ("GET", "x", &[("host", "x")], 400),
            ("CONNECT", "x:80", &[("host", "x:80")], 501),
            ("POST", "/", &[("host", "x"), ("transfer-encoding", "gzip, chunked")], 501),
            ("POST", "/", &[("host", "x"), ("transfer-encoding", "gzip"), ("transfer-encoding", "chunked")], 501),
        ] {
            let refusal = settled(Version::HTTP_11, method, uri, headers).unwrap_err();
            assert_eq!(refusal.status.as_u16(), status, "{method} {uri} {headers:?}: {}", refusal.why);
        }
        assert!(settled(Version::HTTP_11, "POST", "/", &[("host", ""), ("transfer-encoding", "Chunked")]).is_ok());
    }
}
