//! Waiting for a lock: a little spinning, then sleeping on its word, and looking whether the owner is dead.
//!
//! No wait is longer than [`LOCK_TIMEOUT`]: an owner may also be stopped, which is no death, and then one does without what the
//! lock protects.

use std::sync::atomic::AtomicU32;
use std::time::{Duration, Instant};

use crossbeam::utils::Backoff;

use super::SharedMemory;
use super::futex;
use crate::protocols::lock::{Taken, announce, release as give_back, take};

/// The longest wait for a lock.
const LOCK_TIMEOUT: Duration = Duration::from_millis(20);
/// How long to sleep before looking whether the owner is dead.
const POLL_INTERVAL: Duration = Duration::from_micros(500);

impl SharedMemory {
    /// Takes a lock; whether its last owner died with it. `None` if that cannot be in time; with `hurry`, without waiting
    /// for anybody who lives; never in memory that is lost.
    pub(crate) fn take_lock(&self, lock: &AtomicU32, hurry: bool) -> Option<bool> {
        let me = self.member_at_last().filter(|_| !self.map.is_lost())?.number;
        let backoff = Backoff::new();
        let mut since = None;
        let mut has_released = false;
        loop {
            let (owner, seen) = match take(lock, me, since.is_some()) {
                Taken::Free => return Some(false),
                Taken::FromTheDead => return Some(true),
                Taken::No { owner, word } => (owner, word),
            };
            if !backoff.is_completed() && !hurry {
                backoff.snooze();
                continue;
            }
            // Patience is for the living: who finds the owner dead goes on, however long that took. Once: if that does not
            // help, nothing will.
            if owner != me && !has_released && self.release_if_dead(owner) {
                has_released = true;
                continue;
            }
            if hurry || self.map.is_lost() || since.get_or_insert_with(Instant::now).elapsed() >= LOCK_TIMEOUT {
                return None;
            }
            has_released = false;
            if let Some(seen) = announce(lock, seen) {
                futex::wait(lock, seen, POLL_INTERVAL);
            }
        }
    }
}

/// Gives a lock back, by its owner, and wakes who waits for it.
pub(crate) fn release(lock: &AtomicU32) {
    if give_back(lock) {
        futex::wake(lock, 1);
    }
}
