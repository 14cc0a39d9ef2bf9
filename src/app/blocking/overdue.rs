//! Watches functions that are still running although nothing waits for their response any more.
//!
//! A draining worker waits for such a function for up to `--hang-timeout`. If the function is still running
//! `--hang-timeout` after the deadline of its request (`--request-timeout`), the function counts as hanging, and the
//! worker requests its own replacement. This applies whether the client received the 504 or had disconnected before.

use std::cell::RefCell;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

use tokio::sync::Notify;
use tokio::time::sleep_until;

use super::{Job, pool};
use crate::config::in_ms;

/// How long an abandoned function may continue to run; zero means no limit.
static HANG_TIMEOUT: OnceLock<Duration> = OnceLock::new();
/// Abandoned functions that are still running, and some that have returned.
static OVERRUNS: Mutex<Vec<Overrun>> = Mutex::new(Vec::new());
/// Signals a new entry in [`OVERRUNS`].
static ONE_MORE: Notify = Notify::const_new();

thread_local! {
    /// The request that is being abandoned, and its deadline.
    static GIVEN_UP: RefCell<Option<(Arc<str>, Instant)>> = const { RefCell::new(None) };
}

/// A function that is still running after its request was abandoned.
#[derive(Clone)]
struct Overrun {
    job: Weak<dyn Job>,
    /// When the wait for the function's response ended.
    since: Instant,
    /// The request, and the deadline at which the 504 response was due. `None` if the request had no deadline.
    over: Option<(Arc<str>, Instant)>,
    is_reported: bool,
}

impl Overrun {
    /// Returns the time at which a draining worker stops waiting for this function.
    fn ends(&self) -> Option<Instant> {
        self.since.checked_add(patience())
    }

    /// Returns the time from which the function counts as hanging and its worker must be replaced.
    fn hangs_at(&self) -> Option<Instant> {
        self.over.as_ref()?.1.checked_add(patience())
    }
}

/// Sets how long an abandoned function may continue to run. Called once, in a new worker.
pub(crate) fn set_hang_timeout(timeout: Duration) {
    let _ = HANG_TIMEOUT.set(timeout);
}

fn patience() -> Duration {
    HANG_TIMEOUT.get().copied().unwrap_or_default()
}

/// Runs `drop`, which drops the response future of the request `what`. The request's deadline, `over`, has passed.
pub(crate) fn give_up(what: String, over: Instant, drop: impl FnOnce()) {
    GIVEN_UP.set(Some((what.into(), over)));
    drop();
    GIVEN_UP.set(None);
}

/// Returns the request of the next function that hangs; reports each function once.
pub(crate) async fn one_hangs() -> String {
    loop {
        let now = Instant::now();
        let waits = running().into_iter().filter(|one| !one.is_reported);
        let next = waits.filter_map(|one| Some((one.hangs_at()?, one))).min_by_key(|(at, _)| *at);
        match next {
            Some((at, Overrun { job, over: Some((what, _)), .. })) if at <= now => {
                let mut overruns = overruns();
                overruns.iter_mut().filter(|one| one.job.ptr_eq(&job)).for_each(|one| one.is_reported = true);
                drop(overruns);
                log::error!(
                    request:% = what, overdue = in_ms(patience());
                    "a blocking function hangs: it still runs although its request has timed out; this worker requests its \
                     replacement (--request-timeout, --hang-timeout)"
                );
                pool::look_whether_stuck();
                return what.to_string();
            }
            Some((at, _)) => tokio::select! {
                () = sleep_until(at.into()) => {}
                () = ONE_MORE.notified() => {}
            },
            None => ONE_MORE.notified().await,
        }
    }
}

/// Returns the number of functions that hang.
pub(super) fn hung() -> usize {
    let now = Instant::now();
    running().iter().filter(|one| one.hangs_at().is_some_and(|at| at <= now)).count()
}

/// Returns the number of functions that a draining worker no longer waits for, and the time at which the worker stops
/// waiting for the next function.
pub(super) fn outstaying() -> (usize, Option<Instant>) {
    let now = Instant::now();
    let ends = running().into_iter().filter_map(|one| one.ends());
    let (over, will): (Vec<Instant>, Vec<Instant>) = ends.partition(|end| *end <= now);
    (over.len(), will.into_iter().min())
}

/// Returns the abandoned functions that are still running, or none if functions never count as hanging.
fn running() -> Vec<Overrun> {
    if patience().is_zero() {
        return Vec::new();
    }
    let all = overruns().clone();
    // The last reference to a job must not be dropped under the lock, because that drops the
    // application's response.
    all.into_iter().filter(|one| one.job.upgrade().is_some_and(|job| job.is_running())).collect()
}

fn overruns() -> MutexGuard<'static, Vec<Overrun>> {
    OVERRUNS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Watches a function that is still running although nothing waits for its response any more.
pub(super) fn watch(job: &Arc<dyn Job>) {
    let over = GIVEN_UP.with_borrow(Clone::clone);
    let mut overruns = overruns();
    overruns.retain(|one| one.job.strong_count() > 0);
    overruns.push(Overrun { job: Arc::downgrade(job), since: Instant::now(), over, is_reported: false });
    drop(overruns);
    ONE_MORE.notify_one();
}
