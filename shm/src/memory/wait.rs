//! Waits for a lock: spins briefly, then sleeps on the lock's word, and checks whether the owner is dead.
//!
//! No wait is longer than [`LOCK_TIMEOUT`], because the owner may be stopped rather than dead. After a timeout, the caller continues
//! without accessing what the lock protects.

use std::sync::atomic::AtomicU32;
use std::time::{Duration, Instant};

use crossbeam::utils::Backoff;

use super::SharedMemory;
use super::futex;
use crate::protocols::lock::{Taken, announce, release as give_back, take};

/// Maximum wait for a lock.
const LOCK_TIMEOUT: Duration = Duration::from_millis(20);
/// Time to sleep before checking whether the owner is dead.
const POLL_INTERVAL: Duration = Duration::from_micros(500);

impl SharedMemory {
    /// Takes a lock. Returns whether its last owner died while holding it, or `None` if the lock does not become available in time or if
    /// the memory is lost. With `hurry`, does not wait for a live owner.
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
            // The timeout applies to living owners. If the owner is dead, another attempt is made however much time has passed, but only
            // once before each sleep, because a second attempt would not help.
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

/// Releases a lock that the caller owns, and wakes a waiting process.
pub(crate) fn release(lock: &AtomicU32) {
    if give_back(lock) {
        futex::wake(lock, 1);
    }
}
