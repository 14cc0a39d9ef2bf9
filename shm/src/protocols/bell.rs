//! The protocol by which readers sleep until something is published, and publishers wake them.
//!
//! ```text
//! sequence   counts publications, and is what readers sleep on
//! sleepers   counts who was about to sleep
//! woken      what `sleepers` was before a publication whose publisher then woke everybody
//! ```
//! If `woken` is `sleepers`, everybody who ever lay down was woken since: he had counted himself before that publication,
//! so the sequence that he lay down with was an older one. Only then a publisher makes no system call. One who dies before he
//! has woken the others leaves `woken` as it was, and so they are the next publisher's to wake.
//!
//! May not: wait, or make system calls.

use super::sync::{AtomicU32, Ordering, fence_after_swap};

#[derive(Clone, Copy, Debug)]
pub(crate) struct Bell<'a> {
    pub(crate) sequence: &'a AtomicU32,
    pub(crate) sleepers: &'a AtomicU32,
    pub(crate) woken: &'a AtomicU32,
}

impl Bell<'_> {
    /// Whether one may lie down, as nothing has been published since the sequence was `seen`. The kernel is to look once more.
    pub(crate) fn may_sleep(self, seen: u32) -> bool {
        if self.sequence.load(Ordering::SeqCst) != seen {
            return false;
        }
        self.sleepers.fetch_add(1, Ordering::SeqCst);
        fence_after_swap();
        self.sequence.load(Ordering::SeqCst) == seen
    }

    /// Counts a publication. If somebody may sleep, he is to be woken, and then [`Bell::all_woken`] told the number.
    pub(crate) fn ring(self) -> Option<u32> {
        let before = self.sleepers.load(Ordering::SeqCst);
        self.sequence.fetch_add(1, Ordering::SeqCst);
        fence_after_swap();
        (self.sleepers.load(Ordering::SeqCst) != self.woken.load(Ordering::Relaxed)).then_some(before)
    }

    /// All who lay down before the publication have been woken.
    pub(crate) fn all_woken(self, before: u32) {
        self.woken.store(before, Ordering::Relaxed);
    }
}
