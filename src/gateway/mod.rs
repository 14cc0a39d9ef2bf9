//! The application of a gateway: forwards each request to an app process.
//!
//! A gateway is a worker like any other, and this is its application. Connections, limits, the access log, the heir and
//! the quarantine are those of the worker. The path of a request:
//!
//! ```text
//! collect the body ─▶ claim an app process (queue.rs) ─▶ attempt (attempt.rs) ─▶ response
//!  (spool.rs)          ▲                                  │ the process died or had not begun the request
//!                      └──────────────────────────────────┘
//! ```
//!
//! - A request for a static file is answered before (`files.rs`), and needs no app process.
//! - The body of the request is complete before an app process is claimed, and the response is taken at the speed of the
//!   app process. A slow client therefore never occupies an app process.
//! - A request that an app process has not begun is sent to another one, whatever its method. If an app process dies, a
//!   request with an idempotent method of which the client has received nothing is sent to another one, up to `--retries`
//!   times. Everything else is answered with 502.
//! - An app process that has not begun its response within `--request-timeout` is replaced: the gateway reports it to the
//!   master. A process that serves several requests at a time over HTTP, and has begun other responses in that time, is
//!   kept. Time in the queue, and time in which the client sends the body, do not count.
//! - The gateway itself serves the event streams of `--sse`, and those to which an application hands its client over
//!   (event_streams.rs).

mod activity;
mod app_stream;
mod attempt;
mod beneath;
mod body;
mod cgi_output;
mod event_streams;
mod fastcgi;
mod files;
mod http;
mod kept_connections;
mod own_task;
mod queue;
pub(crate) mod ready_request;
mod scgi;
mod scripts;
pub(crate) mod spool;

use std::cell::{Cell, RefCell};
use std::fs::File;
use std::future::{Future, poll_fn};
use std::io::Write as _;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context as TaskContext, Poll};
use std::time::Duration;

use ::http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, header, request};
use bytes::Bytes;
use forkyard_shm::{Quarantine, request_text};
use tokio::sync::oneshot::{self, error::RecvError};
use tokio::time::Instant;
use tower_service::Service;

use self::activity::Activity;
use self::attempt::{Answer, Attempt, Failure, Message, Outgoing};
use self::body::GatewayBody;
use self::event_streams::EventStreams;
use self::files::Files;
use self::kept_connections::KeptConnections;
use self::own_task::OwnTask;
use self::queue::{Queue, QueueError};
use self::scripts::{Script, ScriptRoot};
use self::spool::{CollectError, SpoolBudget, SpoolError, SpoolLimits, Spooled, collect};
use crate::app::body::{Body, BodyError};
use crate::app::context::Context;
use crate::app::events::Events;
use crate::config::Config;
use crate::config::failures::QuarantineConfig;
use crate::config::gateway::Backend;
use crate::diagnostics::request_key::RequestKey;
use crate::inherited_by_workers::{Heritage, Report};
use crate::net::app_channel::AppChannel;
use crate::protocol::cgi::ClientInfo;
use crate::protocol::cgi::variables::{ScriptPaths, ServerAddress, forwarded_variables, request_variables};

/// Number of times that a request is sent to an app process although none has begun it. A process that does not listen
/// any more, but does not exit either, would otherwise keep a request forever.
const MAX_NOT_BEGUN: u32 = 100;

/// After this time, a gateway that does not close its kept connections is reported to the master.
const BLOCKED_TIMEOUT: Duration = Duration::from_secs(1);

/// If an app process closes this many kept FastCGI connections in a row, the gateway keeps no further ones.
const MAX_CLOSED_KEPT: u32 = 3;

/// How long a request that may be quarantined waits before it is sent to a further app process.
const QUARANTINE_WAIT: Duration = Duration::from_millis(100);

/// What all requests of a gateway share.
#[derive(Debug)]
pub(crate) struct Shared {
    queue: Rc<Queue>,
    /// Limits for the body of a request.
    limits: SpoolLimits,
    /// Limits for the part of a response that the client has not read.
    response_limits: SpoolLimits,
    quarantine: Option<(Quarantine, QuarantineConfig)>,
    budget: SpoolBudget,
    files: Arc<Files>,
    scripts: Option<ScriptRoot>,
    streams: EventStreams,
    backend: Backend,
    /// Number of requests that one app process serves at a time.
    concurrency: u32,
    /// Whether the program is php-cgi with children.
    has_php_children: bool,
    activity: Activity,
    kept: KeptConnections,
    /// Maximum number of bytes in the head of a response.
    max_head: usize,
    /// Maximum number of headers in the response of an HTTP application (`--max-headers`), unless it is hyper's own.
    max_headers_to_set: Option<usize>,
    /// `None` if there is no limit.
    request_timeout: Option<Duration>,
    queue_timeout: Duration,
    retries: u32,
    report: RefCell<File>,
    /// Number of consecutive FastCGI connections that an app process has closed before they were used again.
    closed_kept: Cell<u32>,
}

/// The service of a gateway.
#[derive(Clone, Debug)]
pub(crate) struct Gateway(Rc<Shared>);

/// Returns the function that creates the service in a gateway process.
///
/// # Errors
/// Returns a message for the operator if a descriptor or the directory of scripts is not available.
pub(crate) fn factory(
    channel: &Arc<AppChannel>,
    heritage: &Heritage,
) -> Result<impl Fn(Context) -> Gateway + Sync + use<>, String> {
    let (channel, config, slot) = (Arc::clone(channel), Arc::clone(&heritage.config), heritage.slot);
    let gateway = config.gateway.as_ref().ok_or("the configuration has no gateways")?;
    ScriptRoot::open(&gateway.scripts)?;
    let files = Arc::new(Files::open(gateway)?);
    let quarantine = heritage.segment.quarantine();
    let report = heritage.report.try_clone().map_err(|error| format!("cannot duplicate a descriptor: {error}"))?;
    Ok(move |context: Context| {
        let report = report.try_clone().expect("a descriptor is available");
        let (quarantine, report, files) = (quarantine.clone(), File::from(report), Arc::clone(&files));
        Gateway::new(Arc::clone(&channel), slot, &config, quarantine, report, files, context.events())
    })
}

impl Gateway {
    fn new(
        channel: Arc<AppChannel>,
        slot: u32,
        config: &Config,
        quarantine: Quarantine,
        report: File,
        files: Arc<Files>,
        events: Events,
    ) -> Self {
        let gateway = config.gateway.clone().expect("only a server with gateways runs gateways");
        let limit = usize::try_from(config.queue).unwrap_or(usize::MAX);
        let queue = Queue::new(channel, slot, limit, gateway.counts_requests);
        let weak = Rc::downgrade(&queue);
        tokio::task::spawn_local(async move {
            if let Err(error) = queue::run(weak).await {
                log::error!("this gateway cannot be woken, and looks for idle app processes at intervals: {error}");
            }
        });
        let limits = SpoolLimits {
            memory_each: SpoolLimits::MEMORY_EACH,
            file_each: config.limits.max_body,
            directory: gateway.temp_dir.as_path().into(),
        };
        let settings = config.failures.quarantine;
        Self(Rc::new(Shared {
            queue,
            response_limits: SpoolLimits { file_each: gateway.buffer_files, ..limits.clone() },
            limits,
            quarantine: (settings.deaths > 0).then_some((quarantine, settings)),
            budget: SpoolBudget::new(gateway.buffer_memory, gateway.buffer_files),
            files,
            scripts: ScriptRoot::open(&gateway.scripts).unwrap_or_default(),
            streams: EventStreams::new(events, gateway.sse),
            backend: gateway.backend,
            concurrency: gateway.concurrency,
            has_php_children: gateway.php.is_some(),
            activity: Activity::default(),
            kept: KeptConnections::default(),
            max_head: config.limits.max_params,
            max_headers_to_set: config.limits.max_headers_to_set(),
            request_timeout: Some(gateway.request_timeout).filter(|timeout| !timeout.is_zero()),
            queue_timeout: gateway.queue_timeout,
            retries: gateway.retries,
            report: RefCell::new(report),
            closed_kept: Cell::new(0),
        }))
    }
}

impl Service<Request<Body>> for Gateway {
    type Response = Response<GatewayBody>;
    type Error = BodyError;
    type Future = Pin<Box<dyn Future<Output = Result<Response<GatewayBody>, BodyError>>>>;

    fn poll_ready(&mut self, _: &mut TaskContext<'_>) -> Poll<Result<(), BodyError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        Box::pin(Rc::clone(&self.0).answer(request))
    }
}

impl Shared {
    async fn answer(self: Rc<Self>, request: Request<Body>) -> Result<Response<GatewayBody>, BodyError> {
        let (mut parts, body) = request.into_parts();
        if parts.method == Method::CONNECT {
            return Ok(refusal(StatusCode::NOT_IMPLEMENTED));
        }
        if let Some(stream) = self.streams.serve(&parts) {
            return Ok(stream);
        }
        if let Some(response) = self.files.answer(&parts).await {
            return Ok(response);
        }
        self.files.remove_influence(&mut parts);
        let script = match &self.scripts {
            Some(root) if !came_with_variables(&parts) => match root.find(parts.uri.path()) {
                Some(script) => Some(script),
                None => return Ok(refusal(StatusCode::NOT_FOUND)),
            },
            Some(_) | None => None,
        };
        let body = match collect(body, &self.limits, &self.budget).await {
            Ok(body) => body,
            Err(CollectError::Body(error)) => return Err(error),
            Err(CollectError::Spool(error)) => return Ok(self.no_room(&parts, &error)),
        };
        Ok(match self.outgoing(&parts, script.as_deref(), body) {
            Ok(outgoing) => {
                let outgoing = Rc::new(outgoing);
                let response = Rc::clone(&self).forward(&parts, Rc::clone(&outgoing)).await;
                self.files.send_selected(&parts, &outgoing.what, response).await
            }
            Err(error) => self.no_room(&parts, &error),
        })
    }

    /// Sends a request to app processes until one has answered, or until it may not be sent again.
    async fn forward(self: Rc<Self>, parts: &request::Parts, outgoing: Rc<Outgoing>) -> Response<GatewayBody> {
        let (mut left, mut not_begun, mut blocked_since) = (self.retries, 0, None);
        loop {
            let unit = match self.queue.claim(self.queue_timeout).await {
                Ok(unit) => unit,
                Err(error) => return overloaded(error, &outgoing.what),
            };
            let (slot, pid) = (unit.slot(), unit.pid());
            let (reply, answer) = oneshot::channel();
            let attempt = Attempt::new(unit, Rc::clone(&outgoing), Rc::clone(&self));
            let failure = match answer_of(OwnTask::new(attempt.run(reply)), answer).await {
                Ok(Ok(mut answer)) => match self.streams.take_over(parts, &mut answer.head) {
                    Ok(stream) => return stream.unwrap_or_else(|| response(answer)),
                    Err(error) => Failure::Broken(error),
                },
                Ok(Err(failure)) => failure,
                Err(_) => Failure::Broken("the attempt panicked".to_owned()),
            };
            match failure {
                Failure::NotBegun if not_begun < MAX_NOT_BEGUN => {
                    not_begun += 1;
                    continue;
                }
                Failure::Blocked(keeper, keeper_pid) => {
                    let since = *blocked_since.get_or_insert_with(Instant::now);
                    if since.elapsed() >= BLOCKED_TIMEOUT {
                        self.report(&Report::GatewayStuck { slot: keeper, pid: keeper_pid });
                        blocked_since = None;
                    }
                    continue;
                }
                Failure::Died | Failure::Ended
                    if self.is_quarantined_soon(&outgoing.what, self.retries - left).await =>
                {
                    log::error!(slot, pid, request = outgoing.what; "answered 503: the request has been quarantined");
                    return unavailable();
                }
                Failure::Died | Failure::ChildDied if left > 0 && parts.method.is_idempotent() => {
                    left -= 1;
                    let of =
                        if let Failure::ChildDied = failure { "a child of an app process" } else { "an app process" };
                    log::info!(slot, pid, request = outgoing.what; "{of} died: the request is repeated");
                    continue;
                }
                Failure::Ended if left > 0 => {
                    left -= 1;
                    log::info!(slot, pid, request = outgoing.what; "an app process has exited: the request is repeated");
                    continue;
                }
                Failure::ChildDied if parts.method.is_idempotent() && self.is_enough_for_quarantine(self.retries) => {
                    self.report(&Report::ChildrenDied { slot, pid, request: outgoing.what.clone() });
                }
                Failure::NotBegun
                | Failure::Died
                | Failure::ChildDied
                | Failure::Ended
                | Failure::TimedOut
                | Failure::Broken(_)
                | Failure::NotSent(_) => {}
            }
            return failed(&failure, slot, pid, &outgoing.what);
        }
    }

    fn outgoing(&self, parts: &request::Parts, script: Option<&Script>, body: Spooled) -> Result<Outgoing, SpoolError> {
        let target = parts.uri.path_and_query().map_or("/", |target| target.as_str());
        let what = request_text(parts.method.as_str(), target);
        let has_body = body.len() > 0 || parts.headers.contains_key(header::CONTENT_LENGTH);
        let length = (has_body || parts.method == Method::POST).then_some(body.len());
        let unknown = ClientInfo::of_http(None, false);
        let client = parts.extensions.get::<ClientInfo>().unwrap_or(&unknown);
        let variables = |pair: &mut dyn FnMut(&[u8], &[u8])| self.variables(parts, client, script, length, pair);
        let message = match self.backend {
            Backend::Http => Message::Http(Box::new(http::Message::new(parts, client, length, body))),
            Backend::Fastcgi | Backend::Cgi => {
                Message::Fastcgi(fastcgi::Message::new(parts.method.is_idempotent(), variables, body)?)
            }
            Backend::Scgi => Message::Scgi(scgi::Message::new(&parts.method, variables, body)?),
        };
        Ok(Outgoing { message, what })
    }

    /// Passes the CGI variables of a request, in order.
    fn variables(
        &self,
        parts: &request::Parts,
        client: &ClientInfo,
        script: Option<&Script>,
        length: Option<u64>,
        pair: &mut dyn FnMut(&[u8], &[u8]),
    ) {
        if came_with_variables(parts) {
            return forwarded_variables(parts, client, &ScriptPaths::default(), length, pair);
        }
        let path = scripts::path_info(parts.uri.path());
        let paths = scripts::paths(self.scripts.as_ref().zip(script), path.as_deref());
        let server = ServerAddress { name: None, port: port_of(parts, client.is_https), address: None };
        request_variables(parts, client, &server, &paths, length, pair);
    }

    /// Returns when an app process must have begun its response to a request that it received at `begun`.
    fn deadline(&self, begun: Instant) -> Option<Instant> {
        self.request_timeout.map(|timeout| begun + timeout)
    }

    /// Returns the response to a request whose body cannot be stored.
    fn no_room(&self, parts: &request::Parts, error: &SpoolError) -> Response<GatewayBody> {
        if let SpoolError::TooLong { .. } = error {
            return refusal(StatusCode::PAYLOAD_TOO_LARGE);
        }
        log::error!(request:% = format_args!("{} {}", parts.method, parts.uri.path()); "answered 503: {error}");
        unavailable()
    }

    /// Records whether a connection that was kept could be used again.
    fn note_kept(&self, was_useful: bool) {
        self.closed_kept.set(if was_useful { 0 } else { self.closed_kept.get().saturating_add(1) });
    }

    /// Whether connections to FastCGI programs are kept. Some programs close every connection after one response. If a
    /// program serves several requests at a time, a kept connection may occupy the child that another request needs, unless
    /// there is a child for each of them.
    fn keeps_connections(&self) -> bool {
        (self.concurrency == 1 || self.has_php_children) && self.closed_kept.get() < MAX_CLOSED_KEPT
    }

    /// Whether the master quarantines a request of which `repeated` + 1 app processes have died. If their number is enough
    /// for the quarantine, waits for the master, which decides when it has reaped the processes.
    async fn is_quarantined_soon(&self, what: &str, repeated: u32) -> bool {
        let Some((quarantine, QuarantineConfig { by, .. })) = &self.quarantine else { return false };
        if self.is_enough_for_quarantine(repeated) {
            tokio::time::sleep(QUARANTINE_WAIT).await;
        }
        !quarantine.is_empty() && RequestKey::of(what, *by).keys().any(|key| quarantine.left(key).is_some())
    }

    /// Whether the quarantine needs no more deaths than those of a request that was repeated `repeated` times.
    fn is_enough_for_quarantine(&self, repeated: u32) -> bool {
        self.quarantine.as_ref().is_some_and(|(_, QuarantineConfig { deaths, .. })| repeated + 1 >= *deaths)
    }

    /// Reports that an app process has not begun its response in time. The master replaces the process.
    fn report_hang(&self, (slot, pid): (u32, i32), connection: u32, what: &str, is_abandoned: bool) {
        if is_abandoned {
            log::error!(slot, pid, request = what; "an app process works on a request whose client has left (--request-timeout)");
        }
        self.report(&Report::AppHung { slot, pid, connection, request: what.to_owned() });
    }

    /// Reports that an app process died while it served a request.
    fn report_death(&self, slot: u32, pid: i32, what: &str) {
        self.report(&Report::AppDied { slot, pid, request: what.to_owned() });
    }

    fn report(&self, report: &Report) {
        let _ = self.report.borrow_mut().write_all(report.line().as_bytes()); // fails if the master is dead
    }
}

/// Runs an attempt until it has answered.
async fn answer_of(
    mut attempt: OwnTask,
    mut answer: oneshot::Receiver<Result<Answer, Failure>>,
) -> Result<Result<Answer, Failure>, RecvError> {
    poll_fn(|context| {
        attempt.poll(context);
        Pin::new(&mut answer).poll(context)
    })
    .await
}

/// Whether a web server has sent the CGI variables of a request.
fn came_with_variables(parts: &request::Parts) -> bool {
    parts.extensions.get::<ClientInfo>().is_some_and(|client| client.params.iter().next().is_some())
}

/// Returns the port that the client asked for.
fn port_of(parts: &request::Parts, is_https: bool) -> u16 {
    let authority = parts.uri.authority().and_then(::http::uri::Authority::port_u16);
    let host = || parts.headers.get(header::HOST)?.to_str().ok()?.rsplit_once(':')?.1.parse().ok();
    authority.or_else(host).unwrap_or(if is_https { 443 } else { 80 })
}

/// Whether a response must reach the client while it is being produced.
fn is_streamed(headers: &HeaderMap) -> bool {
    let is_off = headers.get("x-accel-buffering").is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"no"));
    let kind = headers.get(header::CONTENT_TYPE).map(HeaderValue::as_bytes).unwrap_or_default();
    is_off || kind.get(..17).is_some_and(|kind| kind.eq_ignore_ascii_case(b"text/event-stream"))
}

fn response(answer: Answer) -> Response<GatewayBody> {
    let Answer { head, body } = answer;
    let mut response = Response::new(body);
    *response.status_mut() = head.status;
    *response.headers_mut() = head.headers;
    response.headers_mut().remove("x-accel-buffering");
    response
}

fn refusal(status: StatusCode) -> Response<GatewayBody> {
    let mut response = Response::new(GatewayBody::Whole(Bytes::from(format!("{status}\n"))));
    *response.status_mut() = status;
    response
}

fn unavailable() -> Response<GatewayBody> {
    let mut response = refusal(StatusCode::SERVICE_UNAVAILABLE);
    response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
    response
}

/// Returns the response to a request that got no app process.
fn overloaded(error: QueueError, what: &str) -> Response<GatewayBody> {
    match error {
        QueueError::Full => log::warn!(request = what; "answered 503: too many requests wait (--queue)"),
        QueueError::TimedOut => log::warn!(request = what; "answered 503: no app process was idle (--queue-timeout)"),
    }
    unavailable()
}

/// Returns the response to a request that no app process has answered.
fn failed(failure: &Failure, slot: u32, pid: i32, what: &str) -> Response<GatewayBody> {
    let status = match failure {
        Failure::TimedOut => StatusCode::GATEWAY_TIMEOUT,
        Failure::NotSent(_) => StatusCode::INTERNAL_SERVER_ERROR,
        Failure::NotBegun
        | Failure::Blocked(..)
        | Failure::Died
        | Failure::ChildDied
        | Failure::Ended
        | Failure::Broken(_) => StatusCode::BAD_GATEWAY,
    };
    log::error!(slot, pid, request = what; "answered {}: {}", status.as_u16(), reason(failure));
    refusal(status)
}

fn reason(failure: &Failure) -> String {
    match failure {
        Failure::NotBegun | Failure::Blocked(..) => "no app process has begun the request".to_owned(),
        Failure::Died | Failure::Ended => "the app process died".to_owned(),
        Failure::ChildDied => "the app process closed the connection before the end of the response".to_owned(),
        Failure::TimedOut => "the app process has not answered in time (--request-timeout)".to_owned(),
        Failure::Broken(why) => why.clone(),
        Failure::NotSent(error) => format!("cannot send the request to an app process: {error}"),
    }
}
