//! Turns plain functions into services: [`blocking`] runs them on a bounded pool of threads.
//!
//! A worker's event loop stays free while the functions run, so idle connections and event streams occupy no thread.
//! Each worker has `--threads` threads; up to `--queue` requests may wait for a thread, and further requests are
//! answered with 503 immediately. A function that blocks delays no other request as long as a thread is free. A
//! function whose author declares that it never blocks ([`Blocking::inline`]) runs on the event loop's own thread,
//! between two iterations of the loop.
//!
//! - [`pool`] runs the threads.
//! - [`overdue`] watches functions that are still running after their request was abandoned.
//! - [`inline`] connects the threads and the event loop, and runs quick functions.

pub(crate) mod inline;
mod overdue;
mod pool;

use std::convert::Infallible;
use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker, ready};
use std::time::{Duration, Instant};

use http::header::RETRY_AFTER;
use http::{HeaderValue, Request, Response, StatusCode};
use http_body::Body as _;
use tokio::time::{Sleep, sleep_until};
use tower_service::Service;

use self::inline::{EventLoopNotifier, InlinePolicy};
pub(crate) use self::inline::{jobs_wait, run_jobs};
pub(crate) use self::overdue::{give_up, one_hangs, set_hang_timeout};
pub(crate) use self::pool::{configure, finish, one_is_free, pool_became_full, pool_is_full};
use super::body::{Body, FilterData};
use crate::config::in_ms;
use crate::diagnostics::current_request;
use crate::request::queue_time;
use crate::request::queue_time::BeginBy;

/// Inline runs of at least this length are logged.
const LONG_FOR_THE_LOOP: Duration = Duration::from_millis(100);

/// Makes a service from a function that may block. The function runs on the worker's threads (`--threads`), and never
/// on the event loop, however quick it is.
///
/// Up to `--queue` requests wait for a free thread; any further request is immediately answered with 503.
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
    Blocking { shared: Arc::new(Shared { function, policy: InlinePolicy::default() }), is_inline: false }
}

/// The service returned by [`blocking`].
#[derive(Debug)]
pub struct Blocking<F> {
    shared: Arc<Shared<F>>,
    is_inline: bool,
}

impl<F> Blocking<F> {
    /// Declares that the function never waits, and runs it on the event loop's own thread.
    ///
    /// Passing each request to another thread and the response back costs several times as much as a function that
    /// answers from memory; this avoids that cost. The function must not wait for anything: a disk, a database, another
    /// server, a lock that may be held for long, or another worker ([`get_or_render`](crate::Cache::get_or_render)
    /// waits while another worker renders the page). **While the function waits, everything else in its worker waits
    /// too:** no connection is accepted, no other response is sent, `--request-timeout` cannot send its 504, and the
    /// worker is killed after `--hang-timeout`.
    ///
    /// The function runs on threads until 32 consecutive runs have taken at most 50 µs each. A run of a millisecond or
    /// more moves the function back to the threads, until twice as many consecutive runs have been that quick. A
    /// request whose body is still arriving always runs on a thread.
    ///
    /// ```no_run
    /// use forkyard::http::{Request, Response};
    ///
    /// fn main() -> std::process::ExitCode {
    ///     forkyard::run(|_cx| forkyard::blocking(|_: Request<forkyard::Body>| Response::new("Hello, world\n")).inline())
    /// }
    /// ```
    #[must_use]
    pub fn inline(self) -> Self {
        Self { is_inline: true, ..self }
    }
}

#[derive(Debug)]
struct Shared<F> {
    function: F,
    policy: InlinePolicy,
}

impl<F> Clone for Blocking<F> {
    fn clone(&self) -> Self {
        Self { shared: Arc::clone(&self.shared), is_inline: self.is_inline }
    }
}

impl<F, B> Service<Request<Body>> for Blocking<F>
where
    F: Fn(Request<Body>) -> Response<B> + Send + Sync + 'static,
    B: Into<Body>,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = BlockingFuture;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> BlockingFuture {
        // The event loop receives the rest of the body, so a wait for the body on the loop's own thread would never
        // end.
        let all_has_come = || request.body().is_end_stream() && !FilterData::is_coming(request.extensions());
        let quick = self.is_inline && self.shared.policy.is_quick() && all_has_come();
        let begin_by = request.extensions().get::<BeginBy>().map(|&BeginBy(at)| Box::pin(sleep_until(at.into())));
        let progress = Mutex::new(Progress { request: Some(request), ..Progress::default() });
        let (shared, cell, notifier) =
            (Arc::clone(&self.shared), current_request::current(), EventLoopNotifier::of_this_thread());
        let call = Arc::new(Call { shared, cell, notifier, is_quick: quick, progress });
        let job: Arc<dyn Job> = Arc::<Call<F>>::clone(&call);
        let started = match if quick { inline::run_inline(job) } else { Err(job) } {
            Ok(()) => true,
            Err(job) => pool::pool().start(job),
        };
        if !started {
            call.refuse();
        }
        BlockingFuture { job: call, begin_by }
    }
}

/// One call of a function. Holds the request until a thread takes it, and the response until the event loop takes it.
struct Call<F> {
    shared: Arc<Shared<F>>,
    /// The request's cell in the scoreboard, as long as the response is waited for.
    cell: Option<usize>,
    /// The notifier of the event loop that waits for the response.
    notifier: Option<Arc<EventLoopNotifier>>,
    /// Whether the call runs on the event loop's thread.
    is_quick: bool,
    progress: Mutex<Progress>,
}

#[derive(Default)]
struct Progress {
    request: Option<Request<Body>>,
    outcome: Option<Result<Response<Body>, Panicked>>,
    /// Whether an outcome was stored. It may have been taken since.
    is_over: bool,
    waker: Option<Waker>,
}

#[derive(Debug)]
struct Panicked;

/// A [`Call`] of any function.
trait Job: Send + Sync {
    /// Runs the function, unless the client has disconnected.
    fn run(&self);
    /// Returns the response if it is ready. Otherwise, registers the task to be woken.
    fn poll(&self, context: &Context<'_>) -> Poll<Result<Response<Body>, Panicked>>;
    /// Refuses the request because it has waited too long, unless the function is running.
    fn shed(&self);
    /// Refuses the request because no thread will become free for it.
    fn refuse(&self);
    /// Marks that the response is no longer waited for. Returns true if the function is running.
    fn abandon(&self) -> bool;
    /// Whether the response is waited for and the function has not begun.
    fn is_waiting(&self) -> bool;
    /// Whether the function is running.
    fn is_running(&self) -> bool;
    /// Returns the notifier of the event loop that waits for the response.
    fn notifier(&self) -> Option<&Arc<EventLoopNotifier>>;
}

impl<F> Call<F> {
    fn progress(&self) -> MutexGuard<'_, Progress> {
        // Code under the lock cannot panic.
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn put(&self, outcome: Result<Response<Body>, Panicked>) {
        let mut progress = self.progress();
        (progress.outcome, progress.is_over) = (Some(outcome), true);
        let waker = progress.waker.take();
        drop(progress);
        match (waker, &self.notifier) {
            (Some(waker), Some(notifier)) => notifier.wake(waker),
            (Some(waker), None) => waker.wake(),
            (None, _) => {}
        }
    }
}

impl<F, B> Job for Call<F>
where
    F: Fn(Request<Body>) -> Response<B> + Send + Sync + 'static,
    B: Into<Body>,
{
    fn run(&self) {
        current_request::enter(None, || {
            let mut progress = self.progress();
            // If the client disconnected while its request waited, the request has been dropped.
            let Some(request) = progress.request.take() else { return };
            if BeginBy::is_past(&request) {
                drop(progress);
                return self.put(Ok(queue_time::shed()));
            }
            current_request::switch_to(self.cell);
            drop(progress);
            let begun = Instant::now();
            // The hook has logged the panic; the outcome reports it to the event loop.
            let outcome = catch_unwind(AssertUnwindSafe(|| (self.shared.function)(request).map(Into::into)));
            let took = begun.elapsed();
            if self.shared.policy.took(took) && self.is_quick && took >= LONG_FOR_THE_LOOP {
                log::warn!(
                    took = in_ms(took);
                    "an inline function (Blocking::inline) blocked the event loop; from now on it runs on threads again"
                );
            }
            // This must precede storing the response: as soon as the response is stored, the cell may be reused for
            // another request.
            current_request::switch_to(None);
            self.put(outcome.map_err(|_| Panicked));
        });
    }

    fn poll(&self, context: &Context<'_>) -> Poll<Result<Response<Body>, Panicked>> {
        let mut progress = self.progress();
        match progress.outcome.take() {
            Some(outcome) => Poll::Ready(outcome),
            None => {
                match &mut progress.waker {
                    Some(waker) => waker.clone_from(context.waker()),
                    waker => *waker = Some(context.waker().clone()),
                }
                Poll::Pending
            }
        }
    }

    fn shed(&self) {
        let mut progress = self.progress();
        let request = progress.request.take();
        if request.is_some() {
            (progress.outcome, progress.is_over) = (Some(Ok(queue_time::shed())), true);
        }
        drop(progress);
        drop(request); // after the lock is released
    }

    fn refuse(&self) {
        let request = self.progress().request.take();
        if request.is_some() {
            let mut response = Response::new(Body::from("503: too many requests are waiting\n"));
            *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
            response.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("1"));
            self.put(Ok(response));
        }
    }

    fn abandon(&self) -> bool {
        let mut progress = self.progress();
        if progress.is_over {
            return false; // the usual case
        }
        let request = progress.request.take();
        let is_running = request.is_none();
        if let (true, Some(cell)) = (is_running, self.cell) {
            current_request::forget(cell); // the cell will belong to another request while a thread still runs this one
        }
        drop(progress);
        drop(request); // after the lock is released
        is_running
    }

    fn is_waiting(&self) -> bool {
        self.progress().request.is_some()
    }

    fn is_running(&self) -> bool {
        let progress = self.progress();
        progress.request.is_none() && !progress.is_over
    }

    fn notifier(&self) -> Option<&Arc<EventLoopNotifier>> {
        self.notifier.as_ref()
    }
}

/// The future returned by [`Blocking`]. It resolves to the response.
pub struct BlockingFuture {
    job: Arc<dyn Job>,
    /// Time at which the request is abandoned if no thread has begun it.
    begin_by: Option<Pin<Box<Sleep>>>,
}

impl std::fmt::Debug for BlockingFuture {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BlockingFuture").finish_non_exhaustive()
    }
}

impl Future for BlockingFuture {
    type Output = Result<Response<Body>, Infallible>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        if let Some(begin_by) = &mut self.begin_by
            && begin_by.as_mut().poll(context).is_ready()
        {
            self.begin_by = None;
            self.job.shed();
        }
        match ready!(self.job.poll(context)) {
            Ok(response) => Poll::Ready(Ok(response)),
            // The panic is resumed here, where the worker turns it into a 500 response.
            Err(Panicked) => std::panic::resume_unwind(Box::new(Panicked)),
        }
    }
}

impl Drop for BlockingFuture {
    fn drop(&mut self) {
        if self.job.abandon() {
            overdue::watch(&self.job);
        }
    }
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
