//! Places where a test can have the process die, and repairs that it can have left out.
//!
//! Each step of a change in shared memory that others could find half done is marked with `point`. Without the feature
//! `crash-test` a mark is nothing. With it, `tests/crash_points.rs` has a child killed at the n-th mark, for each n, and
//! then looks whether everything holds; and it shows that each repair is needed by leaving it out.

/// Something done for a process that died.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recovery {
    /// Bringing the books of a shard up to date.
    Books,
    /// Finishing the emptying of a shard.
    Empty,
    /// Freeing the locks it held.
    FreeLocks,
    /// Freeing what it read in place.
    Unpin,
    /// Freeing the leases it held.
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

    /// A step after which this process may be killed.
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

    /// Has this process killed at the n-th step from now on; [`u64::MAX`] for never, one less to record the names.
    pub fn die_at(step: u64) {
        PASSED.store(0, Ordering::Relaxed);
        DIE_AT.store(step, Ordering::Relaxed);
        if let Ok(mut names) = NAMES.lock() {
            names.clear();
        }
    }

    /// The names of the steps passed since [`die_at`] began to record them.
    pub fn points_passed() -> Vec<&'static str> {
        NAMES.lock().map(|names| names.clone()).unwrap_or_default()
    }

    /// Leaves out one repair in this process; `None` for none.
    pub fn skip(recovery: Option<Recovery>) {
        SKIPPED.store(recovery.map_or(0, |recovery| recovery as u32 + 1), Ordering::Relaxed);
    }

    /// Whether a repair is to be left out.
    pub fn skips(recovery: Recovery) -> bool {
        SKIPPED.load(Ordering::Relaxed) == recovery as u32 + 1
    }
}
