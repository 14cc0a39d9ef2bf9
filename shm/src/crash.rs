//! Marks the points at which a test can kill the process, and the repairs that a test can skip.
//!
//! Each step of a change in shared memory that another process could find partly done is marked with `point`. Without the feature
//! `crash-test`, `point` does nothing. With this feature, `tests/crash_points.rs` makes a child process kill itself at the n-th point, for
//! each n, and then checks that all guarantees hold. The tests also skip each repair in turn, to show that the repair is necessary.

/// A repair after the death of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recovery {
    /// Completing the accounting of a shard.
    Books,
    /// Finishing the emptying of a shard.
    Empty,
    /// Freeing the locks of the dead process.
    FreeLocks,
    /// Freeing the pins of the dead process.
    Unpin,
    /// Freeing the leases of the dead process.
    PassLeases,
}

#[cfg(not(feature = "crash-test"))]
pub(crate) fn point(_: &'static str) {}

#[cfg(not(feature = "crash-test"))]
pub(crate) fn skips(_: Recovery) -> bool {
    false
}

#[cfg(feature = "crash-test")]
pub use armed::{die_at, point, points_passed, skip, skips};

#[cfg(feature = "crash-test")]
mod armed {
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

    use nix::sys::signal::{Signal, raise};

    use super::Recovery;

    static DIE_AT: AtomicU64 = AtomicU64::new(u64::MAX);
    static PASSED: AtomicU64 = AtomicU64::new(0);
    static SKIPPED: AtomicU32 = AtomicU32::new(0);
    static NAMES: Mutex<Vec<&'static str>> = Mutex::new(Vec::new());

    /// Marks a step after which this process may be killed.
    pub fn point(name: &'static str) {
        if PASSED.fetch_add(1, Ordering::Relaxed) == DIE_AT.load(Ordering::Relaxed) {
            let _ = raise(Signal::SIGKILL);
        }
        if DIE_AT.load(Ordering::Relaxed) == u64::MAX - 1
            && let Ok(mut names) = NAMES.lock()
        {
            names.push(name);
        }
    }

    /// Kills this process at the n-th step from now. [`u64::MAX`] never kills the process; [`u64::MAX`] - 1 only records the names of the
    /// steps.
    pub fn die_at(step: u64) {
        PASSED.store(0, Ordering::Relaxed);
        DIE_AT.store(step, Ordering::Relaxed);
        if let Ok(mut names) = NAMES.lock() {
            names.clear();
        }
    }

    /// Returns the names of the steps passed since [`die_at`] started recording.
    pub fn points_passed() -> Vec<&'static str> {
        NAMES.lock().map(|names| names.clone()).unwrap_or_default()
    }

    /// Skips one repair in this process; `None` skips none.
    pub fn skip(recovery: Option<Recovery>) {
        SKIPPED.store(recovery.map_or(0, |recovery| recovery as u32 + 1), Ordering::Relaxed);
    }

    /// Whether a repair is skipped.
    pub fn skips(recovery: Recovery) -> bool {
        SKIPPED.load(Ordering::Relaxed) == recovery as u32 + 1
    }
}
