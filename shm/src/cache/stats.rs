//! Statistics of the cache's content and operations.

use std::sync::atomic::{AtomicU64, Ordering};

use super::index::Ring;
use super::shard::Shard;
use crate::cache::Cache;
use crate::memory::geometry::Geometry;

/// Statistics of the cache: sums over all shards, or the values of one shard. The values are read without a lock, so they may be slightly
/// inconsistent with each other.
///
/// `used_bytes + free_bytes == capacity`, and `live_bytes + wasted_bytes == used_bytes`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stats {
    /// Bytes available for entries.
    pub capacity: u64,
    /// Bytes that have been written but not yet freed.
    pub used_bytes: u64,
    /// Unused bytes.
    pub free_bytes: u64,
    /// Bytes of entries that can be served, or whose expiry or purge the cache has not detected yet.
    pub live_bytes: u64,
    /// Bytes of replaced, purged and expired entries and of padding. They are freed when the ring's floor passes them.
    pub wasted_bytes: u64,
    /// Number of entries in `live_bytes`.
    pub entries: u64,
    /// Lookups that returned a fresh page. If several threads of a process count at the same instant, some lookups are not counted.
    pub hits: u64,
    /// Lookups that returned a stale page.
    pub stale_hits: u64,
    /// Lookups that returned no page.
    pub misses: u64,
    /// Lookups repeated because the page was overwritten or moved while it was being read.
    pub retries: u64,
    /// Pages stored.
    pub stores: u64,
    /// Pages stored that replaced an older page under the same key.
    pub replaced: u64,
    /// Valid pages evicted from the small ring to make room. They had not been requested while they were in it.
    pub evicted_small: u64,
    /// Valid pages evicted from the main ring to make room.
    pub evicted_main: u64,
    /// Valid pages evicted because the index was full. This happens if the pages are so small that the cache holds more of them than the
    /// index was sized for.
    pub evicted_index: u64,
    /// Pages dropped because they had expired.
    pub expired: u64,
    /// Pages dropped because they, one of their tags, or a prefix of their key had been purged.
    pub purged: u64,
    /// Pages not stored because they were purged while they were being rendered.
    pub outdated: u64,
    /// Pages refused because of their size.
    pub refused: u64,
    /// Pages moved from the small ring to the main ring.
    pub promoted: u64,
    /// Pages moved to the head of their ring instead of being evicted.
    pub reprieved: u64,
    /// New pages stored in the main ring because they had been evicted shortly before.
    pub ghost_hits: u64,
    /// Bytes copied within the cache.
    pub moved_bytes: u64,
    /// Number of times that a caller waited for a page that another caller was rendering.
    pub lease_waits: u64,
    /// Pages rendered by [`get_or_render`](Cache::get_or_render).
    pub renders: u64,
    /// Number of times that a process died while it held a lock.
    pub lock_recoveries: u64,
    /// Number of times that a lock could not be acquired.
    pub lock_timeouts: u64,
    /// Number of times that a shard was found inconsistent and was emptied.
    pub lost: u64,
    /// Number of shards; 1 in the statistics of one shard.
    pub shards: u64,
}

impl Cache {
    /// Returns the statistics of the whole cache.
    pub fn stats(&self) -> Stats {
        let mut sum = Stats::default();
        for shard in self.shard_stats() {
            sum.add(&shard);
        }
        sum
    }

    /// Returns the statistics of each shard.
    pub fn shard_stats(&self) -> Vec<Stats> {
        self.shards().map(|shard| Stats::of(&shard, &self.segment.geometry)).collect()
    }
}

impl Stats {
    fn of(shard: &Shard<'_>, geometry: &Geometry) -> Stats {
        let value = |word: &AtomicU64| word.load(Ordering::Relaxed);
        let books = shard.books();
        let capacity = geometry.ring_len.iter().sum();
        let used = |ring: Ring| {
            let head = value(&ring.of(&shard.head.rings).head);
            head.saturating_sub(value(shard.floor(ring))).min(*ring.of(&geometry.ring_len))
        };
        let used_bytes = Ring::BOTH.into_iter().map(used).sum();
        let live_bytes = books.bytes.iter().fold(0, |sum: u64, &bytes| sum.saturating_add(bytes));
        let counters = shard.counters();
        let mut stats = Stats {
            capacity,
            used_bytes,
            free_bytes: capacity - used_bytes,
            live_bytes,
            wasted_bytes: used_bytes.saturating_sub(live_bytes),
            entries: books.entries.iter().fold(0, |sum: u64, &entries| sum.saturating_add(entries)),
            stores: value(&counters.stores),
            replaced: value(&counters.replaced),
            evicted_small: value(&counters.evicted_small),
            evicted_main: value(&counters.evicted_main),
            evicted_index: value(&counters.evicted_index),
            expired: value(&counters.expired),
            purged: value(&counters.purged),
            outdated: value(&counters.outdated),
            refused: value(&counters.refused),
            promoted: value(&counters.promoted),
            reprieved: value(&counters.reprieved),
            ghost_hits: value(&counters.ghost_hits),
            moved_bytes: value(&counters.moved_bytes),
            lock_recoveries: value(&counters.lock_recoveries),
            lock_timeouts: value(&counters.lock_timeouts),
            lost: value(&counters.lost),
            shards: 1,
            ..Stats::default()
        };
        let at = usize::try_from(shard.number).unwrap_or(usize::MAX);
        for tally in shard.inner.member_cells().filter_map(|member| member.tallies.get(at)) {
            stats.hits = stats.hits.wrapping_add(value(&tally.hits));
            stats.misses = stats.misses.wrapping_add(value(&tally.misses));
            stats.stale_hits = stats.stale_hits.wrapping_add(value(&tally.stale));
            stats.retries = stats.retries.wrapping_add(value(&tally.retries));
            stats.lease_waits = stats.lease_waits.wrapping_add(value(&tally.lease_waits));
            stats.renders = stats.renders.wrapping_add(value(&tally.renders));
        }
        stats
    }

    fn add(&mut self, more: &Stats) {
        for (sum, more) in [
            (&mut self.capacity, more.capacity),
            (&mut self.used_bytes, more.used_bytes),
            (&mut self.free_bytes, more.free_bytes),
            (&mut self.live_bytes, more.live_bytes),
            (&mut self.wasted_bytes, more.wasted_bytes),
            (&mut self.entries, more.entries),
            (&mut self.hits, more.hits),
            (&mut self.stale_hits, more.stale_hits),
            (&mut self.misses, more.misses),
            (&mut self.retries, more.retries),
            (&mut self.stores, more.stores),
            (&mut self.replaced, more.replaced),
            (&mut self.evicted_small, more.evicted_small),
            (&mut self.evicted_main, more.evicted_main),
            (&mut self.evicted_index, more.evicted_index),
            (&mut self.expired, more.expired),
            (&mut self.purged, more.purged),
            (&mut self.outdated, more.outdated),
            (&mut self.refused, more.refused),
            (&mut self.promoted, more.promoted),
            (&mut self.reprieved, more.reprieved),
            (&mut self.ghost_hits, more.ghost_hits),
            (&mut self.moved_bytes, more.moved_bytes),
            (&mut self.lease_waits, more.lease_waits),
            (&mut self.renders, more.renders),
            (&mut self.lock_recoveries, more.lock_recoveries),
            (&mut self.lock_timeouts, more.lock_timeouts),
            (&mut self.lost, more.lost),
            (&mut self.shards, more.shards),
        ] {
            *sum = sum.wrapping_add(more);
        }
    }
}
