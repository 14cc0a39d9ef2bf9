//! Functions that run on although nobody waits for their response: one that does so for long hangs. If its request has got its 504, its
//! worker wants to be replaced; and no worker that leaves waits for it.

use std::cell::RefCell;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use super::{Job, pool};

/// How long a function may run on; zero is for ever.
static PATIENCE: OnceLock<Duration> = OnceLock::new();
static ONE_HANGS: Notify = Notify::const_new();
/// The request of the last one that was found to hang.
static HANGING: Mutex<String> = Mutex::new(String::new());
/// Those that run on, since when; and some that have ended.
static ABANDONED: Mutex<Vec<(Instant, Weak<dyn Job>)>> = Mutex::new(Vec::new());

thread_local! {
    /// The request that is being given up, because its time is over.
    static GIVEN_UP: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Sets how long a function may run on. Called once, in a new worker.
pub(crate) fn set_patience(patience: Duration) {
    let _ = PATIENCE.set(patience);
}

fn patience() -> Duration {
    PATIENCE.get().copied().unwrap_or_default()
}

/// Drops the response to a request whose time is over.
pub(crate) fn give_up(what: String, drop: impl FnOnce()) {
    GIVEN_UP.set(Some(what));
    drop();
    GIVEN_UP.set(None);
}

/// Returns the request of a function that hangs. One that does so while nobody waits here is told to the next who does.
pub(crate) async fn one_hangs() -> String {
    ONE_HANGS.notified().await;
    HANGING.lock().unwrap_or_else(PoisonError::into_inner).clone()
}

/// How many functions hang, and when a further one will if it is not over by then.
pub(super) fn hanging() -> (usize, Option<Instant>) {
    let patience = patience();
    if patience.is_zero() {
        return (0, None);
    }
    // No response is dropped under the lock: it is the application's.
    let alive: Vec<_> = abandoned().iter().filter_map(|(since, job)| Some((*since, job.upgrade()?))).collect();
    let ends = alive.iter().filter(|(_, job)| job.is_running()).filter_map(|(since, _)| since.checked_add(patience));
    let now = Instant::now();
    let (hang, will): (Vec<Instant>, Vec<Instant>) = ends.partition(|end| *end <= now);
    (hang.len(), will.into_iter().min())
}

fn abandoned() -> MutexGuard<'static, Vec<(Instant, Weak<dyn Job>)>> {
    ABANDONED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Watches a function that goes on although its response is not wanted any more.
pub(super) fn watch(job: &Arc<dyn Job>) {
    let mut abandoned = abandoned();
    abandoned.retain(|(_, job)| job.strong_count() > 0);
    abandoned.push((Instant::now(), Arc::downgrade(job)));
    drop(abandoned);
    let (patience, Some(what)) = (patience(), GIVEN_UP.take()) else { return };
    if patience.is_zero() {
        return;
    }
    let job = Arc::downgrade(job);
    tokio::task::spawn_local(async move {
        tokio::time::sleep(patience).await;
        if job.upgrade().is_some_and(|job| job.is_running()) {
            log::error!(
                "a function still runs {}ms after its request got 504 (--hang-timeout): this worker asks to be replaced request={what:?}",
                patience.as_millis()
            );
            *HANGING.lock().unwrap_or_else(PoisonError::into_inner) = what;
            ONE_HANGS.notify_one();
            pool::look_whether_stuck();
        }
    });
}
