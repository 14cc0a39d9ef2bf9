//! Limits the time that a client has to send more of a request body. Each body has its own limit, so a stalled body
//! ends neither its connection nor the other requests on that connection.
//!
//! This module is not involved if a body has arrived before it is read. The first wait for a body adds the body to its
//! connection's [`Activity`]. The watchdog then counts the ticks of all waits for the body until enough bytes have
//! arrived.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Waker};

use super::activity::Activity;

/// A body for which a reader has waited.
#[derive(Debug, Default)]
pub(crate) struct SlowBody {
    /// The waiting reader.
    reader: Mutex<Option<Waker>>,
    has_expired: AtomicBool,
    /// Bytes read; wraps around.
    read: AtomicU32,
    /// Used by the watchdog: number of ticks with a waiting reader.
    ticks: AtomicU32,
    /// Used by the watchdog: the value of `read` when the count of `ticks` began.
    counted_from: AtomicU32,
}

impl SlowBody {
    pub(super) fn is_waited_for(&self) -> bool {
        self.reader().is_some()
    }

    /// Counts a tick with a waiting reader. Returns the number of ticks in which fewer than `progress` bytes were read.
    pub(crate) fn tick(&self, progress: u32) -> u32 {
        let read = self.read.load(Relaxed);
        if read.wrapping_sub(self.counted_from.load(Relaxed)) >= progress {
            self.counted_from.store(read, Relaxed);
            self.ticks.store(0, Relaxed);
        }
        let ticks = self.ticks.load(Relaxed) + 1;
        self.ticks.store(ticks, Relaxed);
        ticks
    }

    /// Ends the wait with an error for the reader, because the client took too long.
    pub(super) fn expire(&self) {
        self.has_expired.store(true, Relaxed);
        let reader = self.reader().take();
        if let Some(reader) = reader {
            reader.wake();
        }
    }

    /// Returns the number of ticks since enough bytes were last read.
    pub(super) fn ticks(&self) -> u32 {
        self.ticks.load(Relaxed)
    }

    fn reader(&self) -> MutexGuard<'_, Option<Waker>> {
        self.reader.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The reader's side of a wait; there is one for each request body. Dropping this value ends the wait.
#[derive(Debug)]
pub(crate) struct BodyWait {
    activity: Arc<Activity>,
    waits: bool,
    /// `None` before the first wait.
    slow: Option<Arc<SlowBody>>,
}

impl BodyWait {
    pub(crate) fn new(activity: &Arc<Activity>) -> Self {
        Self { activity: Arc::clone(activity), waits: false, slow: None }
    }

    /// Records that the reader has to wait. Returns true if the client took too long.
    pub(crate) fn begin(&mut self, context: &Context<'_>) -> bool {
        let slow = self.slow.get_or_insert_with(|| {
            let slow = Arc::<SlowBody>::default();
            self.activity.slow_bodies().push(Arc::clone(&slow));
            slow
        });
        let mut reader = slow.reader();
        let is_over = slow.has_expired.load(Relaxed); // an expiry after this load wakes the reader
        match &mut *reader {
            _ if is_over => {}
            Some(waker) => waker.clone_from(context.waker()),
            reader => *reader = Some(context.waker().clone()),
        }
        drop(reader);
        self.set(!is_over);
        is_over
    }

    /// Records that a chunk of the body, or its end, has arrived.
    pub(crate) fn end(&mut self) {
        if let Some(slow) = &self.slow {
            slow.reader().take();
        }
        self.set(false);
    }

    /// Records bytes read from the body.
    pub(crate) fn taken(&self, bytes: usize) {
        self.activity.held().taken(bytes);
        if let Some(slow) = &self.slow {
            slow.read.fetch_add(u32::try_from(bytes).unwrap_or(u32::MAX), Relaxed);
        }
    }

    /// Whether the client took too long with this body, or the connection was cut off for another
    /// reason.
    pub(crate) fn has_expired(&self) -> bool {
        self.activity.has_expired() || self.slow.as_ref().is_some_and(|slow| slow.has_expired.load(Relaxed))
    }

    fn set(&mut self, waits: bool) {
        if std::mem::replace(&mut self.waits, waits) != waits {
            if waits {
                self.activity.bodies().fetch_add(1, Relaxed);
            } else {
                self.activity.bodies().fetch_sub(1, Relaxed);
            }
        }
    }
}

impl Drop for BodyWait {
    fn drop(&mut self) {
        self.set(false);
        if let Some(slow) = self.slow.take() {
            self.activity.slow_bodies().retain(|other| !Arc::ptr_eq(other, &slow));
        }
    }
}
