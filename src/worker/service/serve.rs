//! Wraps the application for the connections: every request gets a response.
//!
//! For all protocols alike, this adds to the user's service: the entry in the scoreboard, the limit
//! of a body, the conversion of a panic into a 500 response, and the check of a response's
//! announced length.

mod client;
mod response;
mod served;

use std::cell::{Cell, RefCell};
use std::error::Error;
use std::net::SocketAddr;
use std::ops::Deref;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use forkyard_shm::{InFlight, Quarantine, Row, request_text};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Version, header};
use http_body::{Body as HttpBody, Frame};
use pin_project_lite::pin_project;
use tokio::time::Sleep;
use tower_service::Service;

use self::client::{Begun, Client};
pub(crate) use self::response::Switch;
use self::response::{is_event_stream, prepare_switch, promised, without_body};
pub(crate) use self::served::Served;
use super::access_log::{AccessLog, Entry};
use crate::app::body::Body;
use crate::app::{blocking, events};
use crate::config::address::Protocol;
use crate::config::failures::QuarantineBy;
use crate::config::{Limits, Trust};
use crate::diagnostics::current_request;
use crate::diagnostics::request_key::RequestKey;
use crate::protocol::cgi::ClientInfo;
use crate::protocol::forwarded;
use crate::protocol::host::is_host;
use crate::request::activity::Wait;
use crate::request::queue_time::BeginBy;
use crate::request::{buffered, queue_time};
use crate::worker::conn::refusals::Refusals;
use crate::worker::conn::throttle::Throttle;

/// An error of the application.
pub(crate) type BoxError = Box<dyn Error + Send + Sync>;

/// The user's service, with the settings and records that each of its requests needs.
#[derive(Debug)]
pub(crate) struct Application<S> {
    service: S,
    row: Row,
    pub(crate) limits: Limits,
    pub(crate) trust: Option<Trust>,
    guard: Guard,
    access_log: Option<Rc<AccessLog>>,
    /// Counts requests refused because memory was short.
    refused: Throttle,
    refusals: Rc<Refusals>,
}

/// Protections of a worker that serves more than one request.
#[derive(Debug, Default)]
pub(crate) struct Guard {
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
        let (guard, refused, refusals) = (Guard::default(), Throttle::default(), Rc::default());
        Self { service, row, limits, trust, guard, access_log: None, refused, refusals }
    }

    pub(crate) fn guarded(self, guard: Guard) -> Self {
        Self { guard, ..self }
    }

    pub(crate) fn logged(self, access_log: Option<Rc<AccessLog>>) -> Self {
        Self { access_log, ..self }
    }
}

impl Guard {
    /// How long the quarantine will still refuse this request; `None` if it does not.
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
    /// Calls the application; if it fails or panics, produces an error response.
    pub(crate) fn answer(&self, protocol: Protocol, mut request: Request<Body>) -> ResponseFuture<S, B> {
        let is_trusted = self.trust.as_ref().is_some_and(|trust| apply_forwarded_headers(trust, &mut request));
        let is_head = request.method() == Method::HEAD;
        let target = request.uri().path_and_query().map_or("/", |target| target.as_str());
        let mut in_flight = Serving {
            in_flight: self.row.begin(request.method().as_str(), target),
            entry: self.access_log.as_ref().map(|log| Entry::begin(log, protocol, Some(&request))),
            kind: Kind::ResponseFuture,
            client: None,
        };
        let from = request.extensions().get::<ClientInfo>().and_then(|origin| origin.address);
        if let Some((status, why)) = self.beyond_limits(&request, protocol) {
            self.refusals.note(protocol, status, from, why);
            return ResponseFuture::refused(status, in_flight).to(is_head);
        }
        if let Some(left) = self.guard.refuses(request.method(), target) {
            return ResponseFuture::put_off(left, in_flight).to(is_head);
        }
        if buffered::is_full() {
            if let Some(count) = self.refused.add(1) {
                log::warn!("requests got 503: too much memory is held for requests (--max-buffered) count={count}");
            }
            return ResponseFuture::put_off(Duration::ZERO, in_flight).to(is_head);
        }
        if self.sheds() && !queue_time::admits(self.guard.max_queue_time, &mut request, is_trusted) {
            queue_time::count();
            return ResponseFuture::put_off(Duration::ZERO, in_flight).to(is_head);
        }
        let client = |trouble| Box::new(Client { trouble, refusals: Rc::clone(&self.refusals), protocol, from });
        in_flight.client = request.body_mut().watch().map(client);
        let stage = Stage::Asking { service: self.service.clone(), request: Some(request) };
        let (switch, in_flight, deadline) = (Switch::No, Some(in_flight), self.guard.deadline());
        ResponseFuture { stage, is_head, switch, in_flight, deadline, begun: None }
    }

    /// Whether requests that have waited too long are refused.
    pub(crate) fn sheds(&self) -> bool {
        !self.guard.max_queue_time.is_zero()
    }

    /// The configured limit that a request exceeds, if any.
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
    ) -> ResponseFuture<S, B> {
        self.refusals.note(protocol, status, from, why);
        let in_flight = self.row.begin("-", "-");
        let entry = self.access_log.as_ref().map(|log| Entry::of_unread(log, protocol, from));
        ResponseFuture::refused(status, Serving { in_flight, entry, kind: Kind::ResponseFuture, client: None })
    }
}

impl<S> Application<S> {
    /// Records a request that could not be read. The response with this status was sent elsewhere,
    /// or the connection was closed.
    pub(crate) fn turned_away(
        &self,
        protocol: Protocol,
        status: StatusCode,
        from: Option<SocketAddr>,
        why: impl Into<String>,
    ) {
        self.refusals.note(protocol, status, from, why);
        if let Some(log) = &self.access_log {
            Entry::of_unread(log, protocol, from).answered(status);
        }
    }

    /// Logs the refusals that were counted and not logged yet.
    pub(crate) fn report_refusals(&self) {
        self.refusals.report();
    }
}

/// Size of the headers, computed as in HTTP/2 (RFC 9113, section 6.5.2).
fn length_of(headers: &HeaderMap) -> usize {
    headers.iter().map(|(name, value)| name.as_str().len() + value.len() + 32).sum()
}

/// A request that is being served: its entry in the scoreboard, and its line in the access log.
#[derive(Debug)]
pub(crate) struct Serving {
    in_flight: InFlight,
    entry: Option<Box<Entry>>,
    kind: Kind,
    /// Present if the request has a body, which may fail.
    client: Option<Box<Client>>,
}

/// The kind of the response.
#[derive(Debug)]
enum Kind {
    ResponseFuture,
    /// Events, until the worker leaves. The wait marks this on the connection.
    Events(Option<Wait>),
}

impl From<InFlight> for Serving {
    fn from(in_flight: InFlight) -> Self {
        Self { in_flight, entry: None, kind: Kind::ResponseFuture, client: None }
    }
}

impl Deref for Serving {
    type Target = InFlight;

    fn deref(&self) -> &InFlight {
        &self.in_flight
    }
}

impl Serving {
    fn answered(&mut self, status: StatusCode) {
        if let Some(entry) = &mut self.entry {
            entry.answered(status);
        }
    }

    fn becomes_stream(&mut self) {
        self.in_flight.becomes_stream();
    }

    /// Counts bytes sent to the client in an upgraded connection.
    pub(crate) fn carried(&mut self, bytes: usize) {
        if let Some(entry) = &mut self.entry {
            entry.sent(bytes);
        }
    }

    fn sent(&mut self, frame: Option<&Frame<Bytes>>) {
        if let (Some(entry), Some(data)) = (&mut self.entry, frame.and_then(Frame::data_ref)) {
            entry.sent(data.len());
        }
    }
}

pin_project! {
    /// The future response.
    pub(crate) struct ResponseFuture<S: Service<Request<Body>>, B> {
        #[pin]
        stage: Stage<S>,
        is_head: bool,
        switch: Switch,
        in_flight: Option<Serving>,
        // Time at which the application's work is abandoned.
        deadline: Option<Pin<Box<Sleep>>>,
        // Boxed, because most responses do not need it.
        begun: Option<Box<Begun<B>>>,
    }

    impl<S: Service<Request<Body>>, B> PinnedDrop for ResponseFuture<S, B> {
        // Dropped without a response, the client has left. A function that still runs keeps the
        // deadline of its request.
        fn drop(this: Pin<&mut Self>) {
            let mut answer = this.project();
            if let (Some(serving), Some(deadline)) = (answer.in_flight, answer.deadline) {
                let refused = Stage::Refused { status: StatusCode::GATEWAY_TIMEOUT, again_after: None };
                let over = deadline.deadline().into_std();
                blocking::give_up(serving.what(), over, || answer.stage.set(refused));
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
    fn refused(status: StatusCode, in_flight: Serving) -> Self {
        let (stage, in_flight) = (Stage::Refused { status, again_after: None }, Some(in_flight));
        Self { stage, is_head: false, switch: Switch::No, in_flight, deadline: None, begun: None }
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

    /// A refusal with a `Retry-After` of `left`.
    fn put_off(left: Duration, in_flight: Serving) -> Self {
        let stage = Stage::Refused { status: StatusCode::SERVICE_UNAVAILABLE, again_after: Some(left) };
        let in_flight = Some(in_flight);
        Self { stage, is_head: false, switch: Switch::No, in_flight, deadline: None, begun: None }
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
    S: Service<Request<Body>, Response = Response<B>>,
    S::Error: Into<BoxError>,
    B: HttpBody,
    B::Error: Into<BoxError>,
{
    type Output = Response<Served<B>>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let answer = self.project();
        if answer.begun.is_some() {
            return Begun::poll(answer.begun, context);
        }
        let Some(serving) = answer.in_flight.as_ref() else { return Poll::Pending };
        let mut stage = answer.stage;
        let polled = current_request::enter(Some(serving.cell()), || stage.as_mut().poll(context));
        serving.beat();
        let outcome = match (polled, answer.deadline.as_mut()) {
            (Poll::Ready(outcome), _) => outcome,
            (Poll::Pending, None) => return Poll::Pending,
            (Poll::Pending, Some(deadline)) => {
                ready!(deadline.as_mut().poll(context));
                let (status, what) = (StatusCode::GATEWAY_TIMEOUT, serving.what());
                log::error!("a request takes too long (--request-timeout): answered 504 request={what:?}");
                let over = deadline.deadline().into_std();
                let give_up =
                    || blocking::give_up(what, over, || stage.set(Stage::Refused { status, again_after: None }));
                if let Err(panic) = catch_panic(give_up) {
                    log::error!("a request that was given up panicked: {panic} request={:?}", serving.what());
                }
                Err(Failure::Refused(status, None))
            }
        };
        let Some(mut in_flight) = answer.in_flight.take() else { return Poll::Pending };
        // The client's fault determines the status, whatever the application returned.
        if let Some(status) = in_flight.client.as_deref().and_then(Client::breach) {
            return Poll::Ready(without_body(refusal(status, in_flight), *answer.is_head));
        }
        let response = match outcome {
            Ok(mut response) if answer.switch.is_made_by(response.status()) => {
                if let Err(why) = prepare_switch(&mut response) {
                    log::error!("{why} request={:?}", in_flight.what());
                    return Poll::Ready(refusal(StatusCode::INTERNAL_SERVER_ERROR, in_flight));
                }
                in_flight.answered(response.status());
                in_flight.becomes_stream();
                in_flight.client = None;
                response.map(|body| Served::App { body, in_flight, left: None })
            }
            Ok(response) if response.status().is_informational() => {
                let (status, what) = (response.status(), in_flight.what());
                let why = why_not_interim(status, *answer.switch);
                log::error!("a response has status {status}: {why} request={what:?}");
                refusal(StatusCode::INTERNAL_SERVER_ERROR, in_flight) // other servers do not accept it as a final response either
            }
            Ok(mut response) => {
                response::settle(&mut response, &in_flight);
                in_flight.answered(response.status());
                let promised = promised(&mut response, &in_flight);
                let left = promised.filter(|_| !*answer.is_head);
                if response.extensions().get::<events::EndsWithWorker>().is_some() {
                    in_flight.kind = Kind::Events(None);
                }
                if is_event_stream(&response) {
                    in_flight.becomes_stream();
                }
                response.map(|body| Served::App { body, in_flight, left })
            }
            Err(failure) => apologize(failure, in_flight),
        };
        let response = without_body(response, *answer.is_head);
        if !Begun::is_needed(&response) {
            return Poll::Ready(response);
        }
        *answer.begun = Some(Begun::new(response));
        Begun::poll(answer.begun, context)
    }
}

/// The reason why a response with an informational status is refused.
fn why_not_interim(status: StatusCode, switch: Switch) -> &'static str {
    match (status, switch) {
        (StatusCode::SWITCHING_PROTOCOLS, Switch::Connect) => "over HTTP/2 an extended CONNECT is accepted by 200",
        (StatusCode::SWITCHING_PROTOCOLS, _) => {
            "the request asks for no upgrade (Connection: upgrade, over HTTP/1.1), or came over FastCGI, SCGI or CGI, which have none"
        }
        _ => "that is no answer, and an application cannot send interim responses",
    }
}

/// The response for a request that the application did not answer.
fn apologize<E: Into<BoxError>, B>(failure: Failure<E>, in_flight: Serving) -> Response<Served<B>> {
    match failure {
        Failure::Refused(status, again_after) => {
            let mut response = refusal(status, in_flight);
            if let Some(left) = again_after {
                let seconds = left.as_secs().saturating_add(1);
                response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
            }
            return response;
        }
        Failure::Error(error) => {
            if let Some(status) = in_flight.client.as_deref().and_then(Client::fault) {
                return refusal(status, in_flight);
            }
            let error: BoxError = error.into();
            log::error!("a request failed: {error} request={:?}", in_flight.what());
        }
        Failure::Panic(panic) => log::error!("a request panicked: {panic} request={:?}", in_flight.what()),
    }
    refusal(StatusCode::INTERNAL_SERVER_ERROR, in_flight)
}

/// If a request comes from a trusted proxy, sets [`ClientInfo`] and `Host` from the proxy's
/// forwarding headers. Removes headers that a client may have forged, because applications often
/// trust them. Returns whether the proxy is trusted.
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

/// A response with a status and its name as the body.
pub(crate) fn refusal<B>(status: StatusCode, mut in_flight: Serving) -> Response<Served<B>> {
    in_flight.answered(status);
    let text = format!("{status}\n");
    let mut response = Response::new(Served::Canned { text: Bytes::from(text), in_flight });
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

/// Logs panics instead of writing them to standard error: at once, unless [`catch_panic`] is
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
        // A panic that is resumed here from another thread ran the hook on that thread. An
        // application that set its own hook has bypassed ours.
        let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
        let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
        text.unwrap_or_else(|| "see the line above".to_owned())
    })
}
