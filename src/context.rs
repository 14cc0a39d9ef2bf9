//! What an application knows of its surroundings.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use forkyard_shm::{Cache, Segment};

use crate::events::Events;

/// Given to the application's factory in each worker. Cheap to clone.
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

    /// The page cache that all workers share.
    #[must_use]
    pub fn cache(&self) -> Cache {
        self.segment.cache()
    }

    /// The event log that all workers share.
    #[must_use]
    pub fn events(&self) -> Events {
        self.events.clone()
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
