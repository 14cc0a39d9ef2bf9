//! Functions that run on although nobody waits for their response: one that does so for long hangs. Once the time of its request
//! (`--request-timeout`) is over too, its worker wants to be replaced, whether its client got the 504 or had left before. No worker
//! that leaves waits for it.

use std::cell::RefCell;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

use tokio::sync::Notify;
use tokio::time::sleep_until;

use super::{Job, pool};

/// How long a function may run on; zero is for ever.
static HANG_TIMEOUT: OnceLock<Duration> = OnceLock::new();
/// Those that run on; and some that have ended.
static OVERRUNS: Mutex<Vec<Overrun>> = Mutex::new(Vec::new());
/// There is one more.
static ONE_MORE: Notify = Notify::const_new();

thread_local! {
    /// The request that is being given up, and when its time is over.
    static GIVEN_UP: RefCell<Option<(Arc<str>, Instant)>> = const { RefCell::new(None) };
}

/// A function that runs on.
#[derive(Clone)]
struct Overrun {
    job: Weak<dyn Job>,
    /// Since when nobody waits for its response.
    since: Instant,
    /// Its request, and when that got its 504, or would have got it. `None` if there is no such time.
    over: Option<(Arc<str>, Instant)>,
    is_told: bool,
}

impl Overrun {
    /// When a worker that leaves waits for it no longer.
    fn ends(&self) -> Option<Instant> {
        self.since.checked_add(patience())
    }

    /// When it hangs, which is a reason to replace its worker.
    fn hangs_at(&self) -> Option<Instant> {
        self.over.as_ref()?.1.checked_add(patience())
    }
}

/// Sets how long a function may run on. Called once, in a new worker.
pub(crate) fn set_patience(patience: Duration) {
    let _ = HANG_TIMEOUT.set(patience);
}

fn patience() -> Duration {
    HANG_TIMEOUT.get().copied().unwrap_or_default()
}

/// Drops the response to a request whose time is over at that moment.
pub(crate) fn give_up(what: String, over: Instant, drop: impl FnOnce()) {
    GIVEN_UP.set(Some((what.into(), over)));
    drop();
    GIVEN_UP.set(None);
}

/// Returns the request of a function that hangs: once for each, as soon as it does.
pub(crate) async fn one_hangs() -> String {
    loop {
        let now = Instant::now();
        let waits = running().into_iter().filter(|one| !one.is_told);
        let next = waits.filter_map(|one| Some((one.hangs_at()?, one))).min_by_key(|(at, _)| *at);
        match next {
            Some((at, Overrun { job, over: Some((what, _)), .. })) if at <= now => {
                let mut overruns = overruns();
                overruns.iter_mut().filter(|one| one.job.ptr_eq(&job)).for_each(|one| one.is_told = true);
                drop(overruns);
                log::error!(
                    "a function still runs {}ms after the time of its request was over (--request-timeout, --hang-timeout): this worker asks to be replaced request={what:?}",
                    patience().as_millis()
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

/// How many functions hang.
pub(super) fn hung() -> usize {
    let now = Instant::now();
    running().iter().filter(|one| one.hangs_at().is_some_and(|at| at <= now)).count()
}

/// For how many functions a worker that leaves waits no longer, and when there will be a further one if it is not over by then.
pub(super) fn outstaying() -> (usize, Option<Instant>) {
    let now = Instant::now();
    let ends = running().into_iter().filter_map(|one| one.ends());
    let (over, will): (Vec<Instant>, Vec<Instant>) = ends.partition(|end| *end <= now);
    (over.len(), will.into_iter().min())
}

/// Those that run on at this moment. None if none is said to hang.
fn running() -> Vec<Overrun> {
    if patience().is_zero() {
        return Vec::new();
    }
    let all = overruns().clone();
    // No response is dropped under the lock: it is the application's.
    all.into_iter().filter(|one| one.job.upgrade().is_some_and(|job| job.is_running())).collect()
}

fn overruns() -> MutexGuard<'static, Vec<Overrun>> {
    OVERRUNS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Watches a function that goes on although its response is not wanted any more.
pub(super) fn watch(job: &Arc<dyn Job>) {
    let over = GIVEN_UP.with_borrow(Clone::clone);
    let mut overruns = overruns();
    overruns.retain(|one| one.job.strong_count() > 0);
    overruns.push(Overrun { job: Arc::downgrade(job), since: Instant::now(), over, is_told: false });
    drop(overruns);
    ONE_MORE.notify_one();
}
