//! The tag clock, a logical clock that makes a purge by tag a constant-time operation, however many pages carry the tag.
//!
//! The clock counts purges. A purge writes the next time into the tag's slots and raises the clock to that time (`protocols/purge.rs`). A
//! page stores the time that was read *before* its rendering began. A page is therefore out of date if and only if one of its tags was
//! purged later than that time. A page whose tag is purged while the page is being rendered is out of date before it is stored.
//!
//! A tag has two slots, selected by the two halves of its hash. The earlier of the two times in these slots is the time at which the tag
//! was last purged. Tags that share one slot do not affect each other; tags that share both slots only cause additional misses. Every key
//! counts as a tag of its own page, so purging a key is a purge of this tag, and is possible even while the key's shard is locked.
//!
//! There are no locks. If a purger is killed before its last store, the purge may or may not have taken effect, but the purge never
//! returned to its caller.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::memory::SharedMemory;
use crate::memory::layout::SegmentHead;
use crate::protocols::purge;

/// A time on the cache's logical clock: see [`Cache::clock`](crate::Cache::clock).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PurgeSnapshot(pub(crate) u64);

/// The clock and the tag table of one segment.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TagClock<'a> {
    now: &'a AtomicU64,
    cleared: &'a AtomicU64,
    slots: &'a [AtomicU64],
}

impl<'a> TagClock<'a> {
    /// Returns the clock of a segment, or `None` if there is no cache.
    pub(crate) fn of(segment: &'a SharedMemory) -> Option<TagClock<'a>> {
        let header = segment.map.at::<SegmentHead>(0)?;
        let slots = segment.map.slice::<AtomicU64>(segment.geometry.tags_at, segment.geometry.tag_slots)?;
        let clock = TagClock { now: &header.tag_clock, cleared: &header.cleared, slots };
        (!slots.is_empty()).then_some(clock)
    }

    pub(crate) fn now(self) -> u64 {
        self.now.load(Ordering::SeqCst)
    }

    /// Invalidates everything that carries this tag and whose rendering began before now.
    pub(crate) fn purge(self, tag: u64) {
        purge::purge(self.now, &self.slots_of(tag));
    }

    /// Invalidates everything whose rendering began before now.
    pub(crate) fn clear(self) {
        purge::purge(self.now, &[self.cleared]);
    }

    /// Whether this tag has not been purged since `snapshot`, the time at which a page's rendering began.
    pub(crate) fn is_current(self, tag: u64, snapshot: u64) -> bool {
        purge::is_current(&self.slots_of(tag), snapshot)
    }

    /// Whether a page whose rendering began at `snapshot` is newer than the last `clear`.
    pub(crate) fn outlived_clear(self, snapshot: u64) -> bool {
        purge::is_current(&[self.cleared], snapshot)
    }

    /// Completes a purge of one of these tags, or a clear, by a process that died before it raised the clock. Must be called when one of
    /// these tags is found to be purged.
    pub(crate) fn finish(self, tags: impl Iterator<Item = u64>) {
        purge::finish(self.now, &[self.cleared]);
        tags.for_each(|tag| purge::finish(self.now, &self.slots_of(tag)));
    }

    /// Advances the clock and returns the new time.
    pub(crate) fn tick(self) -> u64 {
        self.now.fetch_add(1, Ordering::SeqCst).wrapping_add(1)
    }

    fn slots_of(self, tag: u64) -> [&'a AtomicU64; 2] {
        // The table's length is a power of two no larger than 2^18, so either half of the hash has enough bits.
        let mask = self.slots.len() - 1;
        let [a, b, c, d, e, f, g, h] = tag.to_le_bytes();
        let halves = [u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h])];
        halves.map(|half| &self.slots[half as usize & mask])
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use crate::{Plan, Segment, StoreOptions};

    #[test]
    fn purges_are_seen_by_what_was_rendered_before() {
        let segment = Segment::create(&Plan { cache_bytes: 256 * 1024, ..Plan::default() }).unwrap();
        let cache = segment.cache();
        let clock = cache.tag_clock().unwrap();
        let (one, other) = (0x0000_0001_0000_0002, 0x0000_0003_0000_0004);
        let before = clock.now();
        assert!(clock.is_current(one, before));
        clock.purge(one);
        assert!(!clock.is_current(one, before));
        assert!(clock.is_current(one, clock.now()));
        assert!(clock.is_current(other, before));
        // This tag shares one of its two slots with the purged tag.
        assert!(clock.is_current(0x0000_0001_0000_0004, before));
        assert!(clock.outlived_clear(before));
        clock.clear();
        assert!(!clock.outlived_clear(before) && clock.outlived_clear(clock.now()));
    }

    #[test]
    fn a_purge_that_nobody_finished_is_finished_by_the_next_store() {
        let segment = Segment::create(&Plan { cache_bytes: 256 * 1024, ..Plan::default() }).unwrap();
        let cache = segment.cache();
        let clock = cache.tag_clock().unwrap();
        let options = StoreOptions::new().tags(["tag"]);
        cache.set("page", "old", &options).unwrap();
        // The state that a purger leaves if it is killed before it raises the clock.
        for slot in clock.slots_of(cache.tag("tag")) {
            slot.store(clock.now() + 1, Ordering::SeqCst);
        }
        clock.cleared.store(clock.now() + 1, Ordering::SeqCst);
        cache.set("page", "new", &options).unwrap();
        assert_eq!(cache.get("page"), None, "who knows whether this was rendered before or after");
        cache.set("page", "new", &options).unwrap();
        assert_eq!(cache.get("page").unwrap(), b"new");
    }

    #[test]
    fn without_a_cache_there_is_no_clock() {
        let segment = Segment::create(&Plan { rows: 1, ..Plan::default() }).unwrap();
        assert!(segment.cache().tag_clock().is_none());
    }
}
