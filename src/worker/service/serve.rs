//! Wraps the application for the connections: every request is answered.
//!
//! For all protocols, this adds to the user's service: the records of a request (`request_guard.rs`), the limit on a
//! body, the conversion of a panic into a 500 response, and the check of a response's announced length.

mod client;
mod response;
mod served;

use std::cell::{Cell, RefCell};
use std::net::SocketAddr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use forkyard_shm::{Quarantine, Row, request_text};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Version, header};
use http_body::Body as HttpBody;
use pin_project_lite::pin_project;
use tokio::time::Sleep;
use tower_service::Service;

use self::client::Begun;
pub(super) use self::client::ClientFaults;
pub(crate) use self::response::Switch;
use self::response::{is_event_stream, prepare_switch, promised, without_body};
pub(crate) use self::served::Served;
use super::access_log::{AccessLog, AccessLogEntry};
use super::request_guard::RequestGuard;
use crate::app::body::Body;
use crate::app::{blocking, events};
use crate::config::address::Protocol;
use crate::config::failures::QuarantineBy;
use crate::config::{Limits, Trust};
use crate::diagnostics::request_key::RequestKey;
use crate::protocol::cgi::ClientInfo;
use crate::protocol::forwarded;
use crate::protocol::host::is_host;
use crate::request::queue_time::BeginBy;
use crate::request::{buffered, queue_time};
use crate::sys::BoxError;
use crate::worker::conn::refusals::Refusals;
use crate::worker::conn::throttle::Throttle;
use crate::worker::conn::under_way::UnderWay;

/// The user's service: any tower service from a request to a response.
pub(crate) trait AppService<B>:
    Service<Request<Body>, Response = Response<B>, Error: Into<BoxError>> + Clone + 'static
{
}

impl<S, B> AppService<B> for S where
    S: Service<Request<Body>, Response = Response<B>, Error: Into<BoxError>> + Clone + 'static
{
}

/// The body of the user's responses.
pub(crate) trait ResponseBody: HttpBody<Error: Into<BoxError>> + 'static {}

impl<B> ResponseBody for B where B: HttpBody<Error: Into<BoxError>> + 'static {}

/// The user's service, with the settings and records that each request needs.
#[derive(Debug)]
pub(crate) struct Application<S> {
    service: S,
    row: Row,
    pub(crate) limits: Limits,
    pub(crate) trust: Option<Trust>,
    protection: Protection,
    access_log: Option<Rc<AccessLog>>,
    /// Counts requests refused for lack of memory.
    refused: Throttle,
    refusals: Rc<Refusals>,
}

/// Protections of a worker that serves more than one request.
#[derive(Debug, Default)]
pub(crate) struct Protection {
    /// Limit for the head of a response; zero means no limit.
    pub(crate) request_timeout: Duration,
    /// Limit for the wait before the application begins; zero means no limit.
    pub(crate) max_queue_time: Duration,
    /// Requests that have killed workers.
    pub(crate) quarantine: Option<Quarantine>,
    pub(crate) by: QuarantineBy,
}

impl<S> Application<S> {
    pub(crate) fn new(service: S, row: Row, limits: Limits, trust: Option<Trust>) -> Self {
        let (protection, refused, refusals) = (Protection::default(), Throttle::default(), Rc::default());
        Self { service, row, limits, trust, protection, access_log: None, refused, refusals }
    }

    pub(crate) fn protected(self, protection: Protection) -> Self {
        Self { protection, ..self }
    }

    pub(crate) fn logged(self, access_log: Option<Rc<AccessLog>>) -> Self {
        Self { access_log, ..self }
    }
}

impl Protection {
    /// Returns how long the quarantine will continue to refuse this request, or `None` if it does not refuse it.
    fn refuses(&self, method: &Method, target: &str) -> Option<Duration> {
        let quarantine = self.quarantine.as_ref().filter(|quarantine| !quarantine.is_empty())?;
        let suspect = RequestKey::of(&request_text(method.as_str(), target), self.by);
        suspect.keys().filter_map(|key| quarantine.left(key)).max()
    }

    fn deadline(&self) -> Option<Pin<Box<Sleep>>> {
        (!self.request_timeout.is_zero()).then(|| Box::pin(tokio::time::sleep(self.request_timeout)))
    }
}

impl<S, B> Application<S>
where
    S: Service<Request<Body>, Response = Response<B>> + Clone,
{
    /// Calls the application. If the application fails or panics, produces an error response. `under_way` is `None` for
    /// a request that has no connection.
    pub(crate) fn answer(
        &self,
        protocol: Protocol,
        mut request: Request<Body>,
        under_way: Option<UnderWay>,
    ) -> ResponseFuture<S, B> {
        let is_trusted = self.trust.as_ref().is_some_and(|trust| apply_forwarded_headers(trust, &mut request));
        let is_head = request.method() == Method::HEAD;
        let mut guard = RequestGuard::begin(&self.row, self.access_log.as_ref(), protocol, &request, under_way);
        let from = request.extensions().get::<ClientInfo>().and_then(|origin| origin.address);
        if let Some((status, why)) = self.beyond_limits(&request, protocol) {
            self.refusals.note(protocol, status, from, why);
            return ResponseFuture::refused(status, guard).to(is_head);
        }
        let target = request.uri().path_and_query().map_or("/", |target| target.as_str());
        if let Some(left) = self.protection.refuses(request.method(), target) {
            return ResponseFuture::put_off(left, guard).to(is_head);
        }
        if buffered::is_full() {
            if let Some(count) = self.refused.add(1) {
                log::warn!(count; "answered 503: requests hold too much memory (--max-buffered)");
            }
            return ResponseFuture::put_off(Duration::ZERO, guard).to(is_head);
        }
        if self.sheds() && !queue_time::admits(self.protection.max_queue_time, &mut request, is_trusted) {
            queue_time::count();
            return ResponseFuture::put_off(Duration::ZERO, guard).to(is_head);
        }
        let client = |outcome| Box::new(ClientFaults { outcome, refusals: Rc::clone(&self.refusals), protocol, from });
        guard.set_client(request.body_mut().watch().map(client));
        let stage = Stage::Asking { service: self.service.clone(), request: Some(request) };
        let (switch, guard, deadline) = (Switch::No, Some(guard), self.protection.deadline());
        ResponseFuture { stage, is_head, switch, guard, deadline, begun: None }
    }

    /// Whether requests that have waited too long are refused.
    pub(crate) fn sheds(&self) -> bool {
        !self.protection.max_queue_time.is_zero()
    }

    /// Returns the configured limit that a request exceeds, if any.
    fn beyond_limits(&self, request: &Request<Body>, protocol: Protocol) -> Option<(StatusCode, &'static str)> {
        let limits = &self.limits;
        if request.uri().path_and_query().is_some_and(|target| target.as_str().len() > limits.max_uri) {
            Some((StatusCode::URI_TOO_LONG, "a target longer than --max-uri"))
        } else if request.headers().len() > limits.max_headers {
            Some((StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, "more headers than --max-headers"))
        } else if protocol == Protocol::Http
            && request.version() == Version::HTTP_2
            && length_of(request.headers()) > limits.max_params
        {
            Some((StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, "headers larger than --max-params"))
        } else if request.body().size_hint().lower() > limits.max_body {
            Some((StatusCode::PAYLOAD_TOO_LARGE, "a body larger than --max-body"))
        } else {
            None
        }
    }

    /// Answers a request that does not reach the application. `from` is the peer, which may be a
    /// proxy.
    pub(crate) fn refuse(
        &self,
        protocol: Protocol,
        status: StatusCode,
        from: Option<SocketAddr>,
        why: impl Into<String>,
        under_way: UnderWay,
    ) -> ResponseFuture<S, B> {
        self.refusals.note(protocol, status, from, why);
        let log = self.access_log.as_ref().map(|log| (log, protocol, from));
        ResponseFuture::refused(status, RequestGuard::begin_unread(&self.row, log, Some(under_way)))
    }
}

impl<S> Application<S> {
    /// Records a request that could not be read. The caller has sent the response with this status, or has closed the
    /// connection.
    pub(crate) fn turned_away(
        &self,
        protocol: Protocol,
        status: StatusCode,
        from: Option<SocketAddr>,
        why: impl Into<String>,
    ) {
        self.refusals.note(protocol, status, from, why);
        if let Some(log) = &self.access_log {
            AccessLogEntry::of_unread(log, protocol, from).answered(status);
        }
    }

    /// Logs the refusals that have been counted but not yet logged.
    pub(crate) fn report_refusals(&self) {
        self.refusals.report();
    }
}

/// Returns the size of the headers, computed as in HTTP/2 (RFC 9113, section 6.5.2).
fn length_of(headers: &HeaderMap) -> usize {
    headers.iter().map(|(name, value)| name.as_str().len() + value.len() + 32).sum()
}

pin_project! {
    /// The future response.
    pub(crate) struct ResponseFuture<S: Service<Request<Body>>, B> {
        #[pin]
        stage: Stage<S>,
        is_head: bool,
        switch: Switch,
        guard: Option<RequestGuard>,
        // The time at which the application's work is abandoned.
        deadline: Option<Pin<Box<Sleep>>>,
        // Boxed, because most responses do not need it.
        begun: Option<Box<Begun<B>>>,
    }

    impl<S: Service<Request<Body>>, B> PinnedDrop for ResponseFuture<S, B> {
        // If this future is dropped without a response, the client has disconnected. A function that is still running
        // keeps the deadline of its request.
        fn drop(this: Pin<&mut Self>) {
            let mut answer = this.project();
            if let (Some(guard), Some(deadline)) = (answer.guard, answer.deadline) {
                let refused = Stage::Refused { status: StatusCode::GATEWAY_TIMEOUT, again_after: None };
                let over = deadline.deadline().into_std();
                blocking::give_up(guard.what(), over, || answer.stage.set(refused));
            }
        }
    }
}

pin_project! {
    #[project = StageProjected]
    enum Stage<S: Service<Request<Body>>> {
        /// Waits until the service is ready.
        Asking { service: S, request: Option<Request<Body>> },
        Called { #[pin] response: S::Future },
        Refused { status: StatusCode, again_after: Option<Duration> },
    }
}

impl<S: Service<Request<Body>>, B> ResponseFuture<S, B> {
    fn refused(status: StatusCode, guard: RequestGuard) -> Self {
        let (stage, guard) = (Stage::Refused { status, again_after: None }, Some(guard));
        Self { stage, is_head: false, switch: Switch::No, guard, deadline: None, begun: None }
    }

    fn to(mut self, is_head: bool) -> Self {
        self.is_head = is_head;
        self
    }

    /// Allows the application to switch protocols.
    pub(crate) fn offering(mut self, switch: Switch) -> Self {
        self.switch = switch;
        self
    }

    /// Creates a refusal with a `Retry-After` of `left`.
    fn put_off(left: Duration, guard: RequestGuard) -> Self {
        let stage = Stage::Refused { status: StatusCode::SERVICE_UNAVAILABLE, again_after: Some(left) };
        Self { stage, is_head: false, switch: Switch::No, guard: Some(guard), deadline: None, begun: None }
    }

    /// Returns the request, until its response is available.
    pub(crate) fn guard(self: Pin<&mut Self>) -> Option<&mut RequestGuard> {
        let answer = self.project();
        answer.begun.as_mut().map(|begun| &mut begun.guard).or(answer.guard.as_mut())
    }
}

impl<S, B> Stage<S>
where
    S: Service<Request<Body>, Response = Response<B>>,
{
    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<Response<B>, Failure<S::Error>>> {
        if let StageProjected::Asking { service, request } = self.as_mut().project() {
            match catch_panic(|| service.poll_ready(context)) {
                Ok(ready) => ready!(ready).map_err(Failure::Error)?,
                Err(panic) => return Poll::Ready(Err(Failure::Panic(panic))),
            }
            if request.as_ref().is_some_and(BeginBy::is_past) {
                queue_time::count();
                return Poll::Ready(Err(Failure::Refused(StatusCode::SERVICE_UNAVAILABLE, Some(Duration::ZERO))));
            }
            let response = catch_panic(|| request.take().map(|request| service.call(request)));
            let Some(response) = response.map_err(Failure::Panic)? else { return Poll::Pending };
            self.set(Stage::Called { response });
        }
        match self.project() {
            StageProjected::Called { response } => {
                // Requests and responses are large, so each is moved as rarely as possible.
                let mut polled = Poll::Pending;
                match catch_panic(|| polled = response.poll(context)) {
                    Ok(()) => polled.map_err(Failure::Error),
                    Err(panic) => Poll::Ready(Err(Failure::Panic(panic))),
                }
            }
            StageProjected::Refused { status, again_after } => {
                Poll::Ready(Err(Failure::Refused(*status, *again_after)))
            }
            StageProjected::Asking { .. } => Poll::Pending,
        }
    }
}

/// The reason why the application produced no response.
enum Failure<E> {
    Error(E),
    Panic(String),
    Refused(StatusCode, Option<Duration>),
}

impl<S, B> Future for ResponseFuture<S, B>
where
    S: AppService<B>,
    B: ResponseBody,
{
    type Output = Response<Served<B>>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let answer = self.project();
        if answer.begun.is_some() {
            return Begun::poll(answer.begun, context);
        }
        let Some(guard) = answer.guard.as_ref() else { return Poll::Pending };
        let mut stage = answer.stage;
        let polled = guard.run(|| stage.as_mut().poll(context));
        let outcome = match (polled, answer.deadline.as_mut()) {
            (Poll::Ready(outcome), _) => outcome,
            (Poll::Pending, None) => return Poll::Pending,
            (Poll::Pending, Some(deadline)) => {
                ready!(deadline.as_mut().poll(context));
                let (status, what) = (StatusCode::GATEWAY_TIMEOUT, guard.what());
                log::error!(request = what; "a request timed out: answered 504 (--request-timeout)");
                let over = deadline.deadline().into_std();
                let give_up =
                    || blocking::give_up(what, over, || stage.set(Stage::Refused { status, again_after: None }));
                if let Err(panic) = catch_panic(give_up) {
                    log::error!(request = guard.what(); "a request that timed out panicked when dropped: {panic}");
                }
                Err(Failure::Refused(status, None))
            }
        };
        let Some(mut guard) = answer.guard.take() else { return Poll::Pending };
        // A fault of the client determines the status, whatever the application returned.
        if let Some(status) = guard.client().and_then(ClientFaults::breach) {
            return Poll::Ready(without_body(refusal(status, guard), *answer.is_head));
        }
        let response = match outcome {
            Ok(mut response) if answer.switch.is_made_by(response.status()) => {
                if let Err(why) = prepare_switch(&mut response) {
                    log::error!(request = guard.what(); "{why}");
                    return Poll::Ready(refusal(StatusCode::INTERNAL_SERVER_ERROR, guard));
                }
                guard.answered(response.status());
                guard.becomes_stream();
                guard.set_client(None);
                response.map(|body| Served::app(body, None, guard))
            }
            Ok(response) if response.status().is_informational() => {
                let (status, why) = (response.status(), why_not_interim(response.status(), *answer.switch));
                log::error!(status = status.as_u16(), request = guard.what(); "cannot send a response with this status: {why}");
                refusal(StatusCode::INTERNAL_SERVER_ERROR, guard) // other servers do not accept it as a final response either
            }
            Ok(mut response) => {
                response::settle(&mut response, &guard);
                guard.answered(response.status());
                let promised = promised(&mut response, &guard);
                let left = promised.filter(|_| !*answer.is_head);
                if response.extensions().get::<events::EndsWithWorker>().is_some() {
                    guard.ends_with_worker();
                }
                if is_event_stream(&response) {
                    guard.becomes_stream();
                }
                response.map(|body| Served::app(body, left, guard))
            }
            Err(failure) => apologize(failure, guard),
        };
        let response = without_body(response, *answer.is_head);
        if !Begun::is_needed(&response) {
            return Poll::Ready(response);
        }
        *answer.begun = Begun::new(response);
        Begun::poll(answer.begun, context)
    }
}

/// Returns the reason why a response with an informational status is refused.
fn why_not_interim(status: StatusCode, switch: Switch) -> &'static str {
    match (status, switch) {
        (StatusCode::SWITCHING_PROTOCOLS, Switch::Connect) => "over HTTP/2, status 200 accepts an extended CONNECT",
        (StatusCode::SWITCHING_PROTOCOLS, _) => {
            "the request does not offer an upgrade (only HTTP/1.1 requests with Connection: upgrade do)"
        }
        _ => "an application cannot send interim responses",
    }
}

/// Returns the response for a request that the application did not answer.
fn apologize<E: Into<BoxError>, B>(failure: Failure<E>, guard: RequestGuard) -> Response<Served<B>> {
    match failure {
        Failure::Refused(status, again_after) => {
            let mut response = refusal(status, guard);
            if let Some(left) = again_after {
                let seconds = left.as_secs().saturating_add(1);
                response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
            }
            return response;
        }
        Failure::Error(error) => {
            if let Some(status) = guard.client().and_then(ClientFaults::fault) {
                return refusal(status, guard);
            }
            let error: BoxError = error.into();
            log::error!(request = guard.what(); "a request failed: {error}");
        }
        Failure::Panic(panic) => log::error!(request = guard.what(); "a request panicked: {panic}"),
    }
    refusal(StatusCode::INTERNAL_SERVER_ERROR, guard)
}

/// If a request comes from a trusted proxy, sets [`ClientInfo`] and `Host` from the proxy's forwarding headers. Removes
/// forwarding headers that a client may have forged, because applications often trust such headers. Returns whether the
/// proxy is trusted.
fn apply_forwarded_headers(trust: &Trust, request: &mut Request<Body>) -> bool {
    let Some(origin) = request.extensions().get::<ClientInfo>() else { return false };
    let is_trusted = match origin.address {
        Some(address) => trust.peers.contain(Some(address.ip())),
        None => origin.over_unix && trust.peers.contain(None),
    };
    let believed = is_trusted.then_some(trust.family);
    let params = forwarded::without(&origin.params, believed);
    if let (Some(params), Some(origin)) = (params, request.extensions_mut().get_mut::<ClientInfo>()) {
        origin.params = params;
    }
    let headers = request.headers_mut();
    forwarded::remove(headers, believed);
    if !is_trusted {
        return false;
    }
    let client = forwarded::client(headers, trust.family, |address| trust.peers.contain(Some(address)));
    if let Some(host) = client.host.filter(|host| is_host(host.as_bytes())) {
        headers.insert(header::HOST, host);
    }
    if let Some(origin) = request.extensions_mut().get_mut::<ClientInfo>() {
        origin.is_https = client.is_https.unwrap_or(origin.is_https);
        if let Some(address) = client.address {
            (origin.address, origin.over_unix) = (address, false);
        }
    }
    true
}

/// Returns a response whose body consists of the status code and its reason phrase.
pub(crate) fn refusal<B>(status: StatusCode, mut guard: RequestGuard) -> Response<Served<B>> {
    guard.answered(status);
    let text = format!("{status}\n");
    let mut response = Response::new(Served::canned(Bytes::from(text), guard));
    *response.status_mut() = status;
    response
}

thread_local! {
    static CATCHING: Cell<Catching> = const { Cell::new(Catching::No) };
    /// Text of the panic, if the state is [`Catching::Panicked`].
    static PANIC: RefCell<String> = const { RefCell::new(String::new()) };
}

/// Whether the catching code reports a panic on this thread.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Catching {
    No,
    Yes,
    /// A panic was caught.
    Panicked,
}

/// Installs a hook that logs panics instead of writing them to standard error: immediately, unless [`catch_panic`] is
/// running.
pub(crate) fn install_panic_hook() {
    std::panic::set_hook(Box::new(|panic| {
        let text = panic.to_string().replace('\n', " ");
        if CATCHING.get() == Catching::No {
            log::error!("{text}");
        } else {
            CATCHING.set(Catching::Panicked);
            PANIC.replace(text);
        }
    }));
}

/// Runs code that may panic; returns the text of a panic.
pub(crate) fn catch_panic<T>(code: impl FnOnce() -> T) -> Result<T, String> {
    CATCHING.set(Catching::Yes);
    let outcome = catch_unwind(AssertUnwindSafe(code));
    let catching = CATCHING.replace(Catching::No);
    outcome.map_err(|panic| {
        if catching == Catching::Panicked {
            return PANIC.take();
        }
        // If the panic is resumed here from another thread, the hook has run on that thread. If the application has set
        // its own hook, this module's hook has not run.
        let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
        let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
        text.unwrap_or_else(|| "unknown cause (see the line above)".to_owned())
    })
}
