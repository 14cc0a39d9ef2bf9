//! The application as the connections see it: a request in, always a response out.
//!
//! Around the user's service stand here, once for all protocols: the scoreboard, the limit of a body, and the
//! panic that costs one 500.

use std::cell::{Cell, RefCell};
use std::error::Error;
use std::future::poll_fn;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::{Pin, pin};
use std::sync::atomic::Ordering;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};
use forkyard_shm::{InFlight, Row};
use http::{Request, Response, StatusCode};
use http_body::{Body as HttpBody, Frame, SizeHint};
use pin_project_lite::pin_project;
use tower_service::Service;

use crate::body::{Body, BodyError};
use crate::config::Limits;

/// What an error of the application's may be.
pub(crate) type BoxError = Box<dyn Error + Send + Sync>;

/// The user's service, and what each of its requests needs.
#[derive(Debug)]
pub(crate) struct Application<S> {
    service: S,
    row: Row,
    pub(crate) limits: Limits,
}

impl<S> Application<S> {
    pub(crate) fn new(service: S, row: Row, limits: Limits) -> Self {
        Self { service, row, limits }
    }
}

impl<S, B> Application<S>
where
    S: Service<Request<Body>, Response = Response<B>> + Clone,
    S::Error: Into<BoxError>,
    B: HttpBody,
    B::Error: Into<BoxError>,
{
    /// Has the application answer; if it fails or panics, answers for it.
    pub(crate) async fn answer(&self, mut request: Request<Body>) -> Response<Served<B>> {
        let target = request.uri().path_and_query().map_or("/", |target| target.as_str());
        let in_flight = self.row.begin(request.method().as_str(), target);
        if request.body().size_hint().lower() > self.limits.max_body {
            return refusal(StatusCode::PAYLOAD_TOO_LARGE, in_flight);
        }
        let too_large = request.body_mut().watch_limit();
        let mut service = self.service.clone();
        let answering = async move {
            poll_fn(|context| service.poll_ready(context)).await?;
            service.call(request).await
        };
        let answer = without_panic(answering).await;
        if too_large.is_some_and(|too_large| too_large.load(Ordering::Relaxed)) {
            return refusal(StatusCode::PAYLOAD_TOO_LARGE, in_flight); // whatever the application made of it
        }
        match answer {
            Ok(Ok(response)) if response.status().is_informational() => {
                log::error!("{} is no final response request={:?}", response.status(), in_flight.what());
                refusal(StatusCode::INTERNAL_SERVER_ERROR, in_flight)
            }
            Ok(Ok(response)) => response.map(|body| Served::App { body, in_flight }),
            Ok(Err(error)) => {
                let error: BoxError = error.into();
                log::error!("a request failed: {error} request={:?}", in_flight.what());
                refusal(StatusCode::INTERNAL_SERVER_ERROR, in_flight)
            }
            Err(panic) => {
                log::error!("a request panicked: {panic} request={:?}", in_flight.what());
                refusal(StatusCode::INTERNAL_SERVER_ERROR, in_flight)
            }
        }
    }

    /// An answer that the application had no part in.
    pub(crate) fn refuse(&self, status: StatusCode) -> Response<Served<B>> {
        refusal(status, self.row.begin("-", "-"))
    }
}

fn refusal<B>(status: StatusCode, in_flight: InFlight) -> Response<Served<B>> {
    let text = format!("{status}\n");
    let mut response = Response::new(Served::Canned { text: Bytes::from(text), in_flight });
    *response.status_mut() = status;
    response
}

/// Runs a future to its end or its panic.
async fn without_panic<F: Future>(future: F) -> Result<F::Output, String> {
    let mut future = pin!(future);
    poll_fn(|context| match catch_panic(|| future.as_mut().poll(context)) {
        Ok(poll) => poll.map(Ok),
        Err(panic) => Poll::Ready(Err(panic)),
    })
    .await
}

thread_local! {
    /// Whether a panic on this thread will be told by whoever catches it; and what it said.
    static CAUGHT: RefCell<Option<String>> = const { RefCell::new(None) };
    static CATCHING: Cell<bool> = const { Cell::new(false) };
}

/// Has panics end in the log instead of on standard error: at once, unless [`catch_panic`] is at work.
pub(crate) fn install_panic_hook() {
    std::panic::set_hook(Box::new(|panic| {
        let text = panic.to_string().replace('\n', " ");
        if CATCHING.get() {
            CAUGHT.replace(Some(text));
        } else {
            log::error!("{text}");
        }
    }));
}

/// Runs code that may panic; returns the panic in words.
pub(crate) fn catch_panic<T>(code: impl FnOnce() -> T) -> Result<T, String> {
    CAUGHT.replace(None);
    CATCHING.set(true);
    let outcome = catch_unwind(AssertUnwindSafe(code));
    CATCHING.set(false);
    outcome.map_err(|panic| {
        // A panic that goes on here from another thread has passed the hook there, and one of an application that
        // set its own hook has not passed ours at all.
        let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
        let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
        CAUGHT.take().or(text).unwrap_or_else(|| "see the line above".to_owned())
    })
}

pin_project! {
    /// The body of a response, with the request's place in the scoreboard, which it keeps until it is dropped.
    #[project = Projected]
    pub(crate) enum Served<B> {
        App { #[pin] body: B, in_flight: InFlight },
        Canned { text: Bytes, in_flight: InFlight },
    }
}

impl<B> HttpBody for Served<B>
where
    B: HttpBody,
    B::Error: Into<BoxError>,
{
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let (body, in_flight) = match self.project() {
            Projected::App { body, in_flight } => (body, in_flight),
            Projected::Canned { text, .. } if text.is_empty() => return Poll::Ready(None),
            Projected::Canned { text, .. } => return Poll::Ready(Some(Ok(Frame::data(std::mem::take(text))))),
        };
        let error: BoxError = match catch_panic(|| body.poll_frame(context)) {
            Ok(frame) => match ready!(frame) {
                None => return Poll::Ready(None),
                Some(Ok(frame)) => {
                    return Poll::Ready(Some(Ok(frame.map_data(|mut data| data.copy_to_bytes(data.remaining())))));
                }
                Some(Err(error)) => error.into(),
            },
            Err(panic) => panic.into(),
        };
        log::error!("a response broke off: {error} request={:?}", in_flight.what());
        Poll::Ready(Some(Err(BodyError::Other(error))))
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::App { body, .. } => body.is_end_stream(),
            Self::Canned { text, .. } => text.is_empty(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::App { body, .. } => body.size_hint(),
            Self::Canned { text, .. } => SizeHint::with_exact(text.len() as u64),
        }
    }
}
