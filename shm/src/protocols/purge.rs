//! The protocol of a purge, which raises a tag and the clock so that no outdated page slips between the two steps.
//!
//! A page is valid as long as the tags of everything it shows were last purged no later than its *snapshot*, the time on the clock before
//! the page was rendered. A page may be composed of fragments that were found in the cache and had been rendered earlier; the page inherits
//! their tags. If a page found a fragment before the fragment was purged, the page's snapshot must therefore be earlier than the purge's
//! time, however long the purger pauses between its steps. This is ensured as follows:
//!
//! 1. The tag's slots are raised to the time *after* the clock's current time. From this step on, the fragment is no longer found.
//! 2. The clock is raised to that time. If another process has raised the clock since step 1, the purger restarts from step 1.
//!
//! A reader that found the fragment had found it before the end of step 1. The reader had read the clock before it looked for the fragment,
//! so its snapshot is lower than the time stored in step 2. (In the reverse order, a page whose rendering begins between the two steps has
//! the purge's own time as its snapshot, finds the fragment, and outlives the purge; `tests/protocols.rs` shows this.)
//!
//! Each failed iteration of the loop means that another purge succeeded. A purger that is killed between steps 1 and 2 leaves its tag one
//! tick ahead of the clock, and pages with that tag are out of date before they are stored. A process that finds such a page raises the
//! clock on behalf of the purger ([`finish`]).
//!
//! Must not wait, make system calls, or depend on what a tag is.

use super::sync::{AtomicU64, Ordering};
use crate::crash;

/// Invalidates everything that depends on all of these slots and whose rendering began before now.
pub(crate) fn purge(clock: &AtomicU64, slots: &[&AtomicU64]) {
    let mut now = clock.load(Ordering::SeqCst);
    loop {
        let time = now.wrapping_add(1);
        for slot in slots {
            slot.fetch_max(time, Ordering::SeqCst);
            crash::point("purge: slot raised");
        }
        match clock.compare_exchange(now, time, Ordering::SeqCst, Ordering::SeqCst) {
            Ok(_) => break,
            Err(later) => now = later,
        }
    }
    crash::point("purge: clock raised");
}

/// Whether something rendered at `snapshot` is still valid with regard to these slots, which belong to one tag.
pub(crate) fn is_current(slots: &[&AtomicU64], snapshot: u64) -> bool {
    slots.iter().any(|slot| slot.load(Ordering::SeqCst) <= snapshot)
}

/// Raises the clock for a purge of one of these slots whose process may have died.
pub(crate) fn finish(clock: &AtomicU64, slots: &[&AtomicU64]) {
    let now = clock.load(Ordering::SeqCst);
    let next = now.wrapping_add(1);
    if slots.iter().any(|slot| slot.load(Ordering::SeqCst) == next) {
        // If this fails, another process has raised the clock.
        let _ = clock.compare_exchange(now, next, Ordering::SeqCst, Ordering::SeqCst);
    }
}
