//! The protocol of a purge: how a tag and the clock are raised so that no page falls between the two.
//!
//! A page is good as long as the tags of what it shows were last purged no later than its *snapshot*, the clock before it
//! was rendered. A page may be made of fragments found in the cache, which were rendered earlier, and takes over their tags.
//! So a page that found a fragment before its purge must have a snapshot before the purge's time, however long the
//! purger rests between its steps. Hence:
//!
//! 1. the tag's slots get the time *after* the clock's; from now on the fragment is not found any more;
//! 2. the clock is raised to that, if nobody else has raised it meanwhile; or else again from 1.
//!
//! Whoever found the fragment did so before 1 was done, and read the clock before that, when it was lower than the time it
//! got in 2. (The other way round, a page that begins between the two steps has the purge's own time for
//! its snapshot, finds the fragment, and outlives the purge: `tests/protocols.rs` shows it.)
//!
//! Each turn of the loop that fails is another purge that succeeded. Killed between 1 and 2, a purge leaves its tag one
//! tick ahead of the clock, and pages with that tag out of date before they are stored: whoever meets such a page
//! raises the clock in its stead ([`finish`]).
//!
//! May not: wait, make system calls, or know what a tag is.

use super::sync::{AtomicU64, Ordering};
use crate::crash;

/// Makes out of date whatever was rendered before now and depends on all of these slots.
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

/// Whether what was rendered at `snapshot` is still good, as far as these slots go: those of one tag.
pub(crate) fn is_current(slots: &[&AtomicU64], snapshot: u64) -> bool {
    slots.iter().any(|slot| slot.load(Ordering::SeqCst) <= snapshot)
}

/// Raises the clock for a purge of one of these slots that nobody may ever finish.
pub(crate) fn finish(clock: &AtomicU64, slots: &[&AtomicU64]) {
    let now = clock.load(Ordering::SeqCst);
    let next = now.wrapping_add(1);
    if slots.iter().any(|slot| slot.load(Ordering::SeqCst) == next) {
        // If that fails, somebody else did it.
        let _ = clock.compare_exchange(now, next, Ordering::SeqCst, Ordering::SeqCst);
    }
}
