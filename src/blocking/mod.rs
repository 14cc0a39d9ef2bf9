//! Plain functions as services: [`blocking`] runs them on a bounded pool of threads.
//!
//! The event loop of a worker stays free while they run, so idle connections and event streams cost no
//! thread. There are `--threads` threads in each worker; `--queue` requests may wait for one of them, and a
//! request beyond that gets 503 at once. A function that has been quick for a while is run on the event loop's
//! own thread instead, between two turns of the loop.
//!
//! - [`pool`] has the threads.
//! - [`turn`] runs what is quick, and knows what is.

mod pool;
mod turn;

use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Instant;

use http::header::RETRY_AFTER;
use http::{HeaderValue, Request, Response, StatusCode};
use http_body::Body as _;
use tower_service::Service;

pub(crate) use self::pool::{configure, finish};
use self::turn::Pace;
pub(crate) use self::turn::{jobs_wait, run_jobs};
use crate::body::{Body, FilterData};

/// Makes a service of a function that may block.
///
/// ```no_run
/// use forkyard::http::{Request, Response};
///
/// fn main() -> std::process::ExitCode {
///     forkyard::run(|_cx| forkyard::blocking(|_request: Request<forkyard::Body>| Response::new("Hello, world\n")))
/// }
/// ```
pub fn blocking<F, B>(function: F) -> Blocking<F>
where
    F: Fn(Request<Body>) -> Response<B> + Send + Sync + 'static,
    B: Into<Body>,
{
    Blocking { shared: Arc::new(Shared { function, pace: Pace::default() }) }
}

/// The service that [`blocking`] makes.
#[derive(Debug)]
pub struct Blocking<F> {
    shared: Arc<Shared<F>>,
}

#[derive(Debug)]
struct Shared<F> {
    function: F,
    pace: Pace,
}

impl<F> Clone for Blocking<F> {
    fn clone(&self) -> Self {
        Self { shared: Arc::clone(&self.shared) }
    }
}

impl<F, B> Service<Request<Body>> for Blocking<F>
where
    F: Fn(Request<Body>) -> Response<B> + Send + Sync + 'static,
    B: Into<Body>,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Answer;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Answer {
        let place = Arc::new(Mutex::new(Place::default()));
        let fill = Fill(Arc::clone(&place));
        let shared = Arc::clone(&self.shared);
        // A body that is still coming in needs the loop: to wait for it here would be to wait for ever.
        let all_has_come = request.body().is_end_stream() && !FilterData::is_coming(request.extensions());
        let quick = all_has_come && self.shared.pace.is_quick();
        let job = move || {
            // A client that left while its request waited took its answer along.
            if Arc::strong_count(&fill.0) > 1 {
                let begun = Instant::now();
                let response = (shared.function)(request);
                shared.pace.took(begun.elapsed());
                fill.put(Ok(response.map(Into::into)));
            }
        };
        let started = match if quick { turn::run_after_turn(job) } else { Err(job) } {
            Ok(()) => true,
            Err(job) => pool::pool().start(job),
        };
        if !started {
            let mut response = Response::new(Body::from("503: too many requests are waiting\n"));
            *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
            response.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("1"));
            lock(&place).outcome = Some(Ok(response));
        }
        Answer(place)
    }
}

/// Where a thread leaves the response for the event loop.
#[derive(Debug, Default)]
struct Place {
    outcome: Option<Result<Response<Body>, Panicked>>,
    waker: Option<Waker>,
}

#[derive(Debug)]
struct Panicked;

/// The thread's side of a [`Place`]: dropped unfilled, the function panicked.
struct Fill(Arc<Mutex<Place>>);

impl Fill {
    fn put(&self, outcome: Result<Response<Body>, Panicked>) {
        let mut place = lock(&self.0);
        place.outcome.get_or_insert(outcome);
        let waker = place.waker.take();
        drop(place);
        if let Some(waker) = waker {
            turn::wake(waker);
        }
    }
}

impl Drop for Fill {
    fn drop(&mut self) {
        self.put(Err(Panicked)); // does nothing where there is an outcome
    }
}

fn lock(place: &Mutex<Place>) -> MutexGuard<'_, Place> {
    // No code that can panic runs under the lock.
    place.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The response to come.
#[derive(Debug)]
pub struct Answer(Arc<Mutex<Place>>);

impl Future for Answer {
    type Output = Result<Response<Body>, Infallible>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let mut place = lock(&self.0);
        match place.outcome.take() {
            Some(Ok(response)) => Poll::Ready(Ok(response)),
            Some(Err(Panicked)) => {
                drop(place);
                // The panic goes on here, where the worker turns it into this request's 500.
                std::panic::resume_unwind(Box::new(Panicked))
            }
            None => {
                place.waker = Some(context.waker().clone());
                Poll::Pending
            }
        }
    }
}

type Job = Box<dyn FnOnce() + Send>;

fn run(job: Job) {
    // The panic was logged by the hook; the job's place tells the event loop.
    let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(job));
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt as _;

    use super::*;

    #[tokio::test(flavor = "current_thread")]
    async fn a_function_answers_from_its_thread_and_a_panic_stays_with_its_request() {
        let mut service = blocking(|request: Request<Body>| {
            assert_ne!(request.uri().path(), "/panic");
            Response::new(std::thread::current().name().unwrap_or_default().to_owned())
        });
        let panicked = service.call(Request::get("/panic").body(Body::empty()).unwrap());
        assert!(tokio::spawn(panicked).await.unwrap_err().is_panic());

        let response = service.call(Request::new(Body::empty())).await.unwrap();
        let body = response.into_body().collect().await.unwrap().to_bytes();
        assert!(body.starts_with(b"blocking-"), "{body:?}");
    }
}
