//! Determines whether an entry is still valid, based on its expiry times and on purges of its key, its tags or a prefix of its key.
//!
//! Must not change anything.

use std::sync::atomic::Ordering;

use super::entry::{Entry, Key, Times};
use super::prefixes::Prefixes;
use super::tags::TagClock;
use crate::memory::SharedMemory;
use crate::memory::layout::SegmentHead;

/// The current time, and the purges that entries are checked against.
#[derive(Clone, Copy, Debug)]
pub(crate) struct FreshnessCheck<'a> {
    pub(crate) moment: Moment<'a>,
    pub(crate) inner: &'a SharedMemory,
    pub(crate) header: &'a SegmentHead,
}

/// A time on the segment's clock.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Moment<'a> {
    At(u64),
    /// The time is read from the clock only when it is needed, because it is not needed for pages that never expire.
    Now(&'a SharedMemory),
}

impl Moment<'_> {
    pub(crate) fn ms(self) -> u64 {
        match self {
            Moment::At(ms) => ms,
            Moment::Now(inner) => inner.now_ms(),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Freshness {
    Fresh,
    /// Expired, but may be served while it is being rendered again.
    Stale,
    /// Expired, but may be served if rendering fails.
    OnError,
    Expired,
    Purged,
}

impl Freshness {
    /// Whether the entry may still be served under some condition.
    pub(crate) fn keeps(self) -> bool {
        match self {
            Freshness::Fresh | Freshness::Stale | Freshness::OnError => true,
            Freshness::Expired | Freshness::Purged => false,
        }
    }
}

impl FreshnessCheck<'_> {
    pub(crate) fn freshness_of(&self, entry: &Entry<'_>) -> Freshness {
        let times = entry.times();
        if self.is_purged(entry, times.snapshot) {
            Freshness::Purged
        } else if times.expires_ms == 0 {
            Freshness::Fresh
        } else {
            freshness(&times, self.moment.ms())
        }
    }

    /// Whether the entry's key, a prefix of it, or one of its tags was purged after the rendering began.
    fn is_purged(&self, entry: &Entry<'_>, snapshot: u64) -> bool {
        // Usually there has been no purge since `snapshot`, and the check costs a single load.
        if snapshot >= self.header.tag_clock.load(Ordering::SeqCst) {
            return false;
        }
        let (Some(clock), Some(prefixes)) = (self.clock(), self.prefixes()) else { return true };
        !clock.outlived_clear(snapshot)
            || !clock.is_current(entry.hash(), snapshot)
            || entry.tags().iter().any(|tag| !clock.is_current(tag.load(Ordering::Relaxed), snapshot))
            || prefixes.purged_entry(entry, snapshot)
    }

    /// Whether a page that is about to be stored is already out of date.
    pub(crate) fn is_outdated(&self, key: Key<'_>, tags: &[u64], snapshot: u64) -> bool {
        let (Some(clock), Some(prefixes)) = (self.clock(), self.prefixes()) else { return true };
        !clock.outlived_clear(snapshot)
            || !clock.is_current(key.hash, snapshot)
            || tags.iter().any(|&tag| !clock.is_current(tag, snapshot))
            || prefixes.purged_key(key.bytes, snapshot)
    }

    fn clock(&self) -> Option<TagClock<'_>> {
        TagClock::of(self.inner)
    }

    fn prefixes(&self) -> Option<Prefixes<'_>> {
        Prefixes::of(self.inner)
    }
}

/// Returns the freshness based on an entry's times alone.
pub(crate) fn freshness(times: &Times, now_ms: u64) -> Freshness {
    let until = |grace_ms: u32| times.expires_ms.saturating_add(grace_ms.into());
    if times.expires_ms == 0 || now_ms < times.expires_ms {
        Freshness::Fresh
    } else if now_ms < until(times.stale_ms) {
        Freshness::Stale
    } else if now_ms < until(times.error_ms) {
        Freshness::OnError
    } else {
        Freshness::Expired
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn graces_follow_the_expiry() {
        let times =
            |expires_ms| Times { snapshot: 0, stored_ms: 0, expires_ms, stale_ms: 10, error_ms: 30, cost_ms: 0 };
        let at = |now_ms| freshness(&times(100), now_ms);
        assert_eq!([at(99), at(100), at(109)], [Freshness::Fresh, Freshness::Stale, Freshness::Stale]);
        assert_eq!([at(110), at(129), at(130)], [Freshness::OnError, Freshness::OnError, Freshness::Expired]);
        assert_eq!(freshness(&times(0), u64::MAX), Freshness::Fresh);
        assert_eq!(freshness(&times(u64::MAX), u64::MAX), Freshness::Expired);
    }
}
