//! Gives an application access to the worker it runs in.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use forkyard_shm::{Cache, Segment};

use super::events::Events;

/// The application's view of the worker it runs in: the shared cache and event log, and the worker's identity.
///
/// The factory receives a context in each worker. A context is cheap to clone.
#[derive(Clone, Debug)]
pub struct Context {
    slot: u32,
    generation: u64,
    segment: Segment,
    draining: Arc<AtomicBool>,
    events: Events,
}

impl Context {
    pub(crate) fn new(slot: u32, generation: u64, segment: Segment, draining: Arc<AtomicBool>, events: Events) -> Self {
        Self { slot, generation, segment, draining, events }
    }

    /// Returns the page cache that all workers share.
    #[must_use]
    pub fn cache(&self) -> Cache {
        self.segment.cache()
    }

    /// Returns the event log that all workers share.
    #[must_use]
    pub fn events(&self) -> Events {
        self.events.clone()
    }

    /// Returns the number of this worker's slot, unique among the running workers.
    #[must_use]
    pub fn slot(&self) -> u32 {
        self.slot
    }

    /// Returns the generation of this worker: 1 for the first workers, incremented by each reload.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Whether this worker has been asked to finish its requests and exit.
    ///
    /// A health check can report that the worker is draining, and a long task can stop at a suitable point.
    #[must_use]
    pub fn draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }
}
