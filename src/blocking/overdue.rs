//! Functions that run on although their request has got its 504: one that does so for long hangs, and its worker wants
//! to be replaced.

use std::cell::RefCell;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tokio::sync::Notify;

use super::Job;

/// How long a function may run on; zero is for ever.
static PATIENCE: OnceLock<Duration> = OnceLock::new();
static ONE_HANGS: Notify = Notify::const_new();

thread_local! {
    /// The request that is being given up, because its time is over.
    static GIVEN_UP: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Sets how long a function may run on. Called once, in a new worker.
pub(crate) fn set_patience(patience: Duration) {
    let _ = PATIENCE.set(patience);
}

/// Drops the response to a request whose time is over.
pub(crate) fn give_up(what: String, drop: impl FnOnce()) {
    GIVEN_UP.set(Some(what));
    drop();
    GIVEN_UP.set(None);
}

/// Returns when a function hangs. One that does so while nobody waits here is told to the next who does.
pub(crate) async fn one_hangs() {
    ONE_HANGS.notified().await;
}

/// Watches a function whose response is not wanted any more, if that is because its time is over.
pub(super) fn watch(job: &Arc<dyn Job>) {
    let patience = PATIENCE.get().copied().unwrap_or_default();
    let Some(what) = GIVEN_UP.take() else { return };
    if patience.is_zero() || !job.is_running() {
        return;
    }
    let job = Arc::clone(job);
    tokio::task::spawn_local(async move {
        tokio::time::sleep(patience).await;
        if job.is_running() {
            log::error!(
                "a function still runs {}ms after its request got 504 (--hang-timeout): this worker asks to be replaced request={what:?}",
                patience.as_millis()
            );
            ONE_HANGS.notify_one();
        }
    });
}
