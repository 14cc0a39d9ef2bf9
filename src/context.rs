//! What an application knows of its surroundings.

use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use forkyard_shm::{Cache, Segment};
use tokio::sync::Notify;

/// How long an idle connection is kept, once the worker drains, for a request that may be on its way.
const LAST_REQUEST: Duration = Duration::from_secs(1);

/// Given to the application's factory in each worker. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Context {
    slot: u32,
    generation: u64,
    segment: Segment,
    draining: Arc<AtomicBool>,
}

impl Context {
    pub(crate) fn new(slot: u32, generation: u64, segment: Segment, drain: &Drain) -> Self {
        Self { slot, generation, segment, draining: Arc::clone(&drain.0.flag) }
    }

    /// The page cache that all workers share.
    #[must_use]
    pub fn cache(&self) -> Cache {
        self.segment.cache()
    }

    /// This worker's number, unique among the living processes.
    #[must_use]
    pub fn slot(&self) -> u32 {
        self.slot
    }

    /// 1 for the first workers, one more for those of each reload.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Whether this worker was asked to finish what it serves and leave. A health check may say so, and a
    /// long task may stop at a good place.
    #[must_use]
    pub fn draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }
}

/// The order to drain, as the worker's own tasks see it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Drain(Rc<DrainState>);

#[derive(Debug, Default)]
struct DrainState {
    flag: Arc<AtomicBool>,
    begun: Notify,
}

impl Drain {
    pub(crate) fn begin(&self) {
        self.0.flag.store(true, Ordering::Relaxed);
        self.0.begun.notify_waiters();
    }

    pub(crate) fn has_begun(&self) -> bool {
        self.0.flag.load(Ordering::Relaxed)
    }

    /// Returns when the order has come.
    pub(crate) async fn wait(&self) {
        let begun = self.0.begun.notified();
        if !self.has_begun() {
            begun.await;
        }
    }

    /// Returns when the order has come, and an idle connection has had its time for one more request.
    ///
    /// Who has just connected, or had a response a moment ago, may be about to send: to close on him would be to
    /// fail a request.
    pub(crate) async fn wait_for_last_request(&self) {
        self.wait().await;
        tokio::time::sleep(LAST_REQUEST).await;
    }
}
