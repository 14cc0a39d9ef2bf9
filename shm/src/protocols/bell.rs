//! The protocol by which readers sleep until something is published, and by which publishers wake them.
//!
//! ```text
//! sequence   counts publications; the futex that readers sleep on
//! sleepers   counts readers that were about to sleep
//! woken      the value of `sleepers` before the last publication whose publisher woke all readers
//! ```
//! If `woken` equals `sleepers`, every reader that went to sleep has been woken since. Each of these readers had counted itself before the
//! publication that woke it, so it had passed an older sequence to the futex. Only in this case does a publisher make no system call. A
//! publisher that dies before it has woken the readers leaves `woken` unchanged, so the next publisher wakes them.
//!
//! Must not wait, or make system calls.

use super::sync::{AtomicU32, Ordering, fence_after_swap};

#[derive(Clone, Copy, Debug)]
pub(crate) struct Bell<'a> {
    pub(crate) sequence: &'a AtomicU32,
    pub(crate) sleepers: &'a AtomicU32,
    pub(crate) woken: &'a AtomicU32,
}

impl Bell<'_> {
    /// Whether a reader may sleep because nothing has been published since the sequence was `seen`. The futex checks this again.
    pub(crate) fn may_sleep(self, seen: u32) -> bool {
        if self.sequence.load(Ordering::SeqCst) != seen {
            return false;
        }
        self.sleepers.fetch_add(1, Ordering::SeqCst);
        fence_after_swap();
        self.sequence.load(Ordering::SeqCst) == seen
    }

    /// Counts a publication. If a reader may be asleep, returns the number to be passed to [`Bell::all_woken`] after all readers have been
    /// woken.
    pub(crate) fn ring(self) -> Option<u32> {
        let before = self.sleepers.load(Ordering::SeqCst);
        self.sequence.fetch_add(1, Ordering::SeqCst);
        fence_after_swap();
        (self.sleepers.load(Ordering::SeqCst) != self.woken.load(Ordering::Relaxed)).then_some(before)
    }

    /// Records that all readers that went to sleep before the publication have been woken.
    pub(crate) fn all_woken(self, before: u32) {
        self.woken.store(before, Ordering::Relaxed);
    }
}
