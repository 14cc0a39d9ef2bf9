//! Plain functions as services: [`blocking`] runs them on a bounded pool of threads.
//!
//! The event loop of a worker stays free while they run, so idle connections and event streams cost no
//! thread. There are `--threads` threads in each worker; `--queue` requests may wait for one of them, and a
//! request beyond that gets 503 at once.

use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::task::{Context, Poll, Waker};
use std::thread;

use crossbeam::channel::{Receiver, Sender, bounded};
use crossbeam::sync::WaitGroup;
use http::header::RETRY_AFTER;
use http::{HeaderValue, Request, Response, StatusCode};
use tower_service::Service;

use crate::body::Body;

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
    Blocking { function: Arc::new(function) }
}

/// The service that [`blocking`] makes.
#[derive(Debug)]
pub struct Blocking<F> {
    function: Arc<F>,
}

impl<F> Clone for Blocking<F> {
    fn clone(&self) -> Self {
        Self { function: Arc::clone(&self.function) }
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
        let function = Arc::clone(&self.function);
        let fill = Fill(Arc::clone(&place));
        let job = move || {
            // A client that left while its request waited took its answer along.
            if Arc::strong_count(&fill.0) > 1 {
                fill.put(Ok(function(request).map(Into::into)));
            }
        };
        if !pool().start(job) {
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
            waker.wake();
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

/// The threads, and the queue from which they take.
struct Pool {
    queue: Sender<Job>,
    /// Held by each job that waits or runs.
    jobs: Mutex<WaitGroup>,
}

type Job = Box<dyn FnOnce() + Send>;

/// This worker's `--threads` and `--queue`.
static SIZE: OnceLock<(u32, u32)> = OnceLock::new();
static POOL: OnceLock<Pool> = OnceLock::new();

/// Sets the size of the pool that will be made. Called once, in a new worker.
pub(crate) fn configure(threads: u32, queue: u32) {
    let _ = SIZE.set((threads, queue));
}

/// Waits for all that runs. Called once, when nothing new can come.
pub(crate) fn finish() {
    if let Some(pool) = POOL.get() {
        // Our own hold on the group is given up with it.
        let jobs = std::mem::take(&mut *pool.jobs.lock().unwrap_or_else(PoisonError::into_inner));
        jobs.wait();
    }
}

/// The first call starts the threads: a worker without blocking functions has none, nor has the master.
fn pool() -> &'static Pool {
    POOL.get_or_init(|| {
        let &(threads, queue) = SIZE.get().unwrap_or(&(1, 1024));
        let (sender, receiver) = bounded(queue as usize);
        let started = (0..threads).filter(|&number| start_thread(number, receiver.clone())).count();
        assert!(started > 0, "not one of the {threads} threads for blocking functions could be started");
        Pool { queue: sender, jobs: Mutex::new(WaitGroup::new()) }
    })
}

impl Pool {
    /// False if too many wait already.
    fn start(&self, job: impl FnOnce() + Send + 'static) -> bool {
        let held = self.jobs.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let job = move || {
            job();
            drop(held);
        };
        self.queue.try_send(Box::new(job)).is_ok()
    }
}

fn start_thread(number: u32, jobs: Receiver<Job>) -> bool {
    let work = move || {
        for job in jobs {
            // The panic was logged by the hook; the job's place tells the event loop.
            let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(job));
        }
    };
    match thread::Builder::new().name(format!("blocking-{number}")).spawn(work) {
        Ok(_) => true,
        Err(error) => {
            log::error!("cannot start a thread for blocking functions: {error}");
            false
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
            Response::new(thread::current().name().unwrap_or_default().to_owned())
        });
        let panicked = service.call(Request::get("/panic").body(Body::empty()).unwrap());
        assert!(tokio::spawn(panicked).await.unwrap_err().is_panic());

        let response = service.call(Request::new(Body::empty())).await.unwrap();
        let body = response.into_body().collect().await.unwrap().to_bytes();
        assert!(body.starts_with(b"blocking-"), "{body:?}");
    }
}
