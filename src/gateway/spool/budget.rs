//! Counts the memory and the file space that all spools of a process use, and limits both sums.
//!
//! No I/O, no clock.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// The limits for all spools of a process, and the current sums. Clones share the sums.
#[derive(Clone, Debug)]
pub(crate) struct SpoolBudget {
    memory: Arc<Counter>,
    files: Arc<Counter>,
}

impl SpoolBudget {
    /// Creates a budget of `memory` bytes in memory and `files` bytes in temporary files.
    pub(crate) fn new(memory: u64, files: u64) -> Self {
        let counter = |limit| Arc::new(Counter { used: AtomicU64::new(0), limit });
        Self { memory: counter(memory), files: counter(files) }
    }

    #[cfg(test)]
    pub(crate) fn memory_used(&self) -> u64 {
        self.memory.used.load(Relaxed)
    }

    #[cfg(test)]
    pub(crate) fn files_used(&self) -> u64 {
        self.files.used.load(Relaxed)
    }

    pub(super) fn memory(&self) -> Share {
        Share { counter: Arc::clone(&self.memory), held: 0 }
    }

    pub(super) fn files(&self) -> Share {
        Share { counter: Arc::clone(&self.files), held: 0 }
    }
}

#[derive(Debug)]
struct Counter {
    used: AtomicU64,
    limit: u64,
}

/// The bytes that one spool has taken from one of the sums. Dropping it returns them.
#[derive(Debug)]
pub(super) struct Share {
    counter: Arc<Counter>,
    held: u64,
}

impl Share {
    pub(super) fn held(&self) -> u64 {
        self.held
    }

    /// The limit of the sum over all spools.
    pub(super) fn limit(&self) -> u64 {
        self.counter.limit
    }

    pub(super) fn has_room(&self) -> bool {
        self.counter.used.load(Relaxed) < self.counter.limit
    }

    /// Takes `bytes` if the sum stays within its limit. Otherwise takes nothing and returns false.
    #[must_use]
    pub(super) fn try_take(&mut self, bytes: u64) -> bool {
        let limit = self.counter.limit;
        let sum = |used: u64| used.checked_add(bytes).filter(|&sum| sum <= limit);
        let is_taken = self.counter.used.fetch_update(Relaxed, Relaxed, sum).is_ok();
        if is_taken {
            self.held += bytes;
        }
        is_taken
    }

    /// Takes `bytes` even if the sum then exceeds its limit.
    pub(super) fn take_anyway(&mut self, bytes: u64) {
        self.counter.used.fetch_add(bytes, Relaxed);
        self.held += bytes;
    }

    pub(super) fn give_back(&mut self, bytes: u64) {
        let bytes = bytes.min(self.held);
        self.counter.used.fetch_sub(bytes, Relaxed);
        self.held -= bytes;
    }

    pub(super) fn give_all_back(&mut self) {
        self.give_back(self.held);
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.give_all_back();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_takes_no_more_than_the_limit_and_returns_everything() {
        let budget = SpoolBudget::new(100, 0);
        let (mut one, mut other) = (budget.memory(), budget.memory());
        assert!(one.try_take(60));
        assert!(!other.try_take(41));
        assert!(other.try_take(40) && !other.has_room());
        assert!(!other.try_take(u64::MAX), "the sum must not wrap around");
        other.take_anyway(5);
        assert_eq!((budget.memory_used(), one.held(), other.held()), (105, 60, 45));
        one.give_back(1000);
        assert_eq!(budget.memory_used(), 45);
        drop((one, other));
        assert_eq!(budget.memory_used(), 0);
        assert!(!budget.files().try_take(1));
    }
}
