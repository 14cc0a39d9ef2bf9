//! Computes the size and the offset of each part of a segment.
//!
//! The geometry follows from the [`Plan`] alone. The creator writes the plan into the header. A process that attaches computes the geometry
//! from the plan and keeps its own copy, so later changes to the header cannot move any bound.
//!
//! Must not read or write the segment.

use super::error::SegmentError;
use super::layout::{
    BUCKET_BYTES, EVENT_HEAD, EVENTS_HEAD, GRAIN, LEASE_BYTES, MEMBER_HEAD, PREFIX_BYTES, PREFIXES, ROW_BYTES,
    SHARD_HEAD, TALLY_BYTES, TOPIC_BYTES, TOPIC_CELL,
};
use crate::Plan;

pub(crate) const PAGE: u64 = 4096;
pub(crate) const MIN_CACHE: u64 = 256 * 1024;
/// Maximum size of the cache: 64 TiB. This limit keeps all sums of sizes far from overflow, and all positions within a slot's 52 bits for
/// decades.
const MAX_CACHE: u64 = 1 << 46;
/// Minimum size of a shard in bytes. A shard also has room for at least [`SHARD_ENTRIES`] entries of the maximum size.
const MIN_SHARD: u64 = 8 << 20;
const SHARD_ENTRIES: u64 = 6;
const MAX_SHARDS: u64 = 16;
pub(crate) const MAX_ROWS: u32 = 16_384;
/// Number of processes, in addition to those with scoreboard rows, that may use the cache at the same time.
const MORE_MEMBERS: u32 = 32;
/// Bytes of a shard per bucket of seven entries.
const SHARD_BYTES_PER_BUCKET: u64 = 3072;
/// Bytes of a shard per bucket of eight ghosts.
const SHARD_BYTES_PER_GHOSTS: u64 = 16 * 1024;
/// Bytes of the cache per slot of the tag table.
const CACHE_BYTES_PER_TAG_SLOT: u64 = 1024;
/// Bytes of the cache per lease.
const CACHE_BYTES_PER_LEASE: u64 = 16 * 1024;
/// The default maximum entry is this fraction (1/n) of the cache, but at least [`DEFAULT_ENTRY`].
const ENTRY_SHARE: u64 = 64;
const DEFAULT_ENTRY: u64 = 1 << 20;
pub(crate) const MIN_LOG: u64 = 64 * 1024;
/// Bytes of the event log per topic.
const LOG_BYTES_PER_TOPIC: u64 = 4096;
/// The maximum event is this fraction (1/n) of the log's ring.
const EVENT_SHARE: u64 = 8;
/// Maximum size of a record in bytes, because the size is stored in a 32-bit word.
const MAX_ENTRY: u64 = 1 << 30;

/// The location of every part, computed from the plan alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Geometry {
    pub(crate) rows: u32,
    pub(crate) rows_at: u64,
    pub(crate) members: u32,
    pub(crate) members_at: u64,
    pub(crate) member_bytes: u64,
    pub(crate) tags_at: u64,
    /// Number of slots in the tag table. A power of two, or 0 without a cache.
    pub(crate) tag_slots: u64,
    pub(crate) prefixes_at: u64,
    pub(crate) leases_at: u64,
    /// Number of leases. A power of two, or 0 without a cache.
    pub(crate) leases: u64,
    pub(crate) shards_at: u64,
    /// Number of shards. A power of two, or 0 without a cache.
    pub(crate) shards: u64,
    pub(crate) shard_bytes: u64,
    /// Number of buckets in each shard.
    pub(crate) buckets: u64,
    /// Number of buckets of eight ghosts in each shard.
    pub(crate) ghosts: u64,
    /// Bytes of the small ring and of the main ring of each shard.
    pub(crate) ring_len: [u64; 2],
    /// Offsets of the two rings within the shard.
    pub(crate) ring_at: [u64; 2],
    /// Maximum size of an entry's record in bytes, including the header.
    pub(crate) max_record: u64,
    /// Offset of the event log.
    pub(crate) events_at: u64,
    /// Maximum number of topics; 0 without a log.
    pub(crate) topics: u64,
    pub(crate) events_ring_at: u64,
    pub(crate) events_ring_len: u64,
    /// Maximum length of an event's name and data together, in bytes.
    pub(crate) max_event: u64,
    pub(crate) total: u64,
}

impl Geometry {
    pub(crate) fn of(plan: &Plan) -> Result<Geometry, SegmentError> {
        let Plan { cache_bytes, rows, .. } = *plan;
        if rows > MAX_ROWS {
            return Err(SegmentError::TooManyRows { asked: rows, most: MAX_ROWS });
        }
        if cache_bytes.max(plan.events_bytes) > MAX_CACHE {
            let source = std::io::ErrorKind::OutOfMemory.into();
            return Err(SegmentError::no_memory(cache_bytes.max(plan.events_bytes), source));
        }
        let rows_at = PAGE;
        let members_at = rows_at + (u64::from(rows) * ROW_BYTES).next_multiple_of(PAGE);
        let without = Geometry {
            rows,
            rows_at,
            members: 0,
            members_at,
            member_bytes: 0,
            tags_at: members_at,
            tag_slots: 0,
            prefixes_at: members_at,
            leases_at: members_at,
            leases: 0,
            shards_at: members_at,
            shards: 0,
            shard_bytes: 0,
            buckets: 0,
            ghosts: 0,
            ring_len: [0, 0],
            ring_at: [0, 0],
            max_record: 0,
            events_at: members_at,
            topics: 0,
            events_ring_at: members_at,
            events_ring_len: 0,
            max_event: 0,
            total: members_at,
        };
        let with_cache = match cache_bytes {
            0 => without,
            1..MIN_CACHE => {
                return Err(SegmentError::CacheTooSmall { asked: cache_bytes, least: MIN_CACHE });
            }
            MIN_CACHE.. => without.with_cache(plan)?,
        };
        match plan.events_bytes {
            0 => Ok(with_cache),
            1..MIN_LOG => Err(SegmentError::LogTooSmall { asked: plan.events_bytes, least: MIN_LOG }),
            bytes => Ok(with_cache.with_events(bytes)),
        }
    }

    fn with_events(mut self, bytes: u64) -> Geometry {
        if self.members == 0 {
            // The lock of the log requires members too.
            (self.members, self.member_bytes) = (self.rows + MORE_MEMBERS, MEMBER_HEAD);
            self.total += (u64::from(self.members) * MEMBER_HEAD).next_multiple_of(PAGE);
            (self.tags_at, self.prefixes_at) = (self.total, self.total);
            (self.leases_at, self.shards_at) = (self.total, self.total);
        }
        let bytes = bytes / PAGE * PAGE;
        let topics = (bytes / LOG_BYTES_PER_TOPIC).min(1 << 16);
        let before_ring = (EVENTS_HEAD + topics * TOPIC_CELL).next_multiple_of(64);
        let ring_len = (bytes - before_ring) / GRAIN * GRAIN;
        Geometry {
            events_at: self.total,
            topics,
            events_ring_at: self.total + before_ring,
            events_ring_len: ring_len,
            // The other parts of a record are subtracted. The size of a record must also fit into 32 bits.
            max_event: (ring_len / EVENT_SHARE).min(MAX_ENTRY) - EVENT_HEAD - TOPIC_BYTES as u64 - GRAIN,
            total: self.total + bytes,
            ..self
        }
    }

    fn with_cache(self, plan: &Plan) -> Result<Geometry, SegmentError> {
        let cache_bytes = plan.cache_bytes;
        let default_entry = (cache_bytes / ENTRY_SHARE).clamp(DEFAULT_ENTRY, MAX_ENTRY);
        let wanted = if plan.max_entry == 0 { default_entry } else { plan.max_entry };
        let smallest = MIN_SHARD.max(wanted.saturating_mul(SHARD_ENTRIES));
        let shards = floor_power_of_two(cache_bytes / smallest).clamp(1, MAX_SHARDS);

        let members = self.rows + MORE_MEMBERS;
        let member_bytes = MEMBER_HEAD + shards * TALLY_BYTES;
        let tags_at = self.members_at + (u64::from(members) * member_bytes).next_multiple_of(PAGE);
        let tag_slots = floor_power_of_two(cache_bytes / CACHE_BYTES_PER_TAG_SLOT).clamp(1 << 9, 1 << 18);
        let prefixes_at = tags_at + (tag_slots * 8).next_multiple_of(PAGE);
        let leases_at = prefixes_at + PREFIXES as u64 * PREFIX_BYTES;
        let leases = floor_power_of_two(cache_bytes / CACHE_BYTES_PER_LEASE).clamp(64, 4096);
        let shards_at = leases_at + (leases * LEASE_BYTES).next_multiple_of(PAGE);

        let shard_bytes = (cache_bytes - (shards_at - tags_at)) / shards / PAGE * PAGE;
        let buckets = shard_bytes / SHARD_BYTES_PER_BUCKET;
        let ghosts = floor_power_of_two(shard_bytes / SHARD_BYTES_PER_GHOSTS);
        let index = SHARD_HEAD + (buckets + ghosts) * BUCKET_BYTES;
        let rings = shard_bytes - index;
        // As in S3-FIFO, a tenth is reserved for new entries.
        let small = rings / 10 / GRAIN * GRAIN;
        let main = (rings - small) / GRAIN * GRAIN;
        // With this limit, an entry and the padding before it always fit into half the ring.
        let most = (main / 4).min(MAX_ENTRY) / GRAIN * GRAIN;
        if plan.max_entry > most - PAGE {
            return Err(SegmentError::EntryTooLarge { asked: plan.max_entry, most: most - PAGE });
        }
        Ok(Geometry {
            members,
            member_bytes,
            tags_at,
            tag_slots,
            prefixes_at,
            leases_at,
            leases,
            shards_at,
            shards,
            shard_bytes,
            buckets,
            ghosts,
            ring_len: [small, main],
            ring_at: [index, index + small],
            // Room for a value of the requested size, plus one page for its key, tags and header.
            max_record: (wanted.next_multiple_of(GRAIN) + PAGE).min(most),
            events_at: shards_at + shards * shard_bytes,
            total: shards_at + shards * shard_bytes,
            ..self
        })
    }

    /// Returns the offset of a shard.
    pub(crate) fn shard_at(&self, index: u64) -> u64 {
        self.shards_at + index * self.shard_bytes
    }
}

/// Returns the largest power of two that is not above `value`; 1 for 0.
const fn floor_power_of_two(value: u64) -> u64 {
    if value == 0 { 1 } else { 1 << value.ilog2() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn geometry(cache_bytes: u64, rows: u32) -> Geometry {
        Geometry::of(&Plan { cache_bytes, rows, ..Plan::default() }).unwrap()
    }

    #[test]
    fn parts_neither_overlap_nor_leave_the_segment() {
        for cache_bytes in [0, 262_144, 262_145, 1 << 20, 4 << 20, (9 << 20) + 777, 64 << 20, (1 << 40) + 5, 1 << 46] {
            for rows in [0, 1, 5, 256, MAX_ROWS] {
                let g = geometry(cache_bytes, rows);
                assert!(g.rows_at + u64::from(rows) * ROW_BYTES <= g.members_at);
                assert!(g.members_at + u64::from(g.members) * g.member_bytes <= g.tags_at);
                assert!(g.tags_at + g.tag_slots * 8 <= g.prefixes_at);
                assert!(g.leases_at + g.leases * LEASE_BYTES <= g.shards_at);
                assert_eq!(g.shards_at + g.shards * g.shard_bytes, g.total);
                if cache_bytes > 0 {
                    assert!(g.total - g.tags_at <= cache_bytes, "the cache keeps to what was asked for");
                    let [small, main] = g.ring_len;
                    let index = SHARD_HEAD + (g.buckets + g.ghosts) * BUCKET_BYTES;
                    assert!(index + small + main <= g.shard_bytes);
                    assert!((small + main) * g.shards > cache_bytes * 88 / 100, "{cache_bytes}: {g:?}");
                    assert!(g.tag_slots.is_power_of_two() && g.shards.is_power_of_two());
                    assert!(g.leases.is_power_of_two() && g.ghosts.is_power_of_two());
                    assert!(g.shards == 1 || g.shard_bytes * 11 / 10 >= MIN_SHARD);
                    assert!(g.max_record.is_multiple_of(GRAIN) && g.max_record <= main / 4);
                    assert!(g.members < 1 << 15, "a lease has 15 bits for a member");
                }
            }
        }
    }

    #[test]
    fn the_largest_entry_is_a_64th_or_what_was_asked_for() {
        assert_eq!(geometry(64 << 20, 8).max_record, (1 << 20) + PAGE);
        assert_eq!(geometry(64 << 20, 8).shards, 8);
        assert_eq!(geometry(1 << 30, 8).max_record, (16 << 20) + PAGE);
        assert_eq!(geometry(9 << 20, 8).shards, 1);
        let plan = |max_entry| Plan { cache_bytes: 64 << 20, rows: 1, max_entry, ..Plan::default() };
        assert_eq!(Geometry::of(&plan(8 << 20)).unwrap().max_record, (8 << 20) + PAGE);
        assert!(matches!(Geometry::of(&plan(32 << 20)), Err(SegmentError::EntryTooLarge { .. })));
        assert!(matches!(Geometry::of(&plan(u64::MAX)), Err(SegmentError::EntryTooLarge { .. })));
    }

    #[test]
    fn the_event_log_has_its_own_place() {
        for cache_bytes in [0, 1 << 20] {
            for events_bytes in [MIN_LOG, MIN_LOG + 777, 1 << 20, 1 << 30] {
                let without = geometry(cache_bytes, 3);
                let with = Geometry::of(&Plan { cache_bytes, rows: 3, events_bytes, ..Plan::default() }).unwrap();
                assert!(with.events_at >= without.total && with.members == 3 + MORE_MEMBERS);
                assert!(with.members_at + u64::from(with.members) * with.member_bytes <= with.events_at);
                assert!(with.events_at + EVENTS_HEAD + with.topics * TOPIC_CELL <= with.events_ring_at);
                assert!(with.events_ring_at + with.events_ring_len <= with.total);
                assert!(with.total - with.events_at <= events_bytes && with.topics >= 16);
                assert!(with.events_ring_len > events_bytes * 9 / 10 - 4096, "{with:?}");
                assert!(with.max_event > 1024);
                assert!(events_bytes != 1 << 20 || with.max_event == 125_704, "as the documentation says: {with:?}");
            }
        }
        let plan = Plan { events_bytes: MIN_LOG - 1, ..Plan::default() };
        assert!(matches!(Geometry::of(&plan), Err(SegmentError::LogTooSmall { .. })));
    }

    #[test]
    fn refuses_absurd_plans() {
        let plan = |cache_bytes, rows| Geometry::of(&Plan { cache_bytes, rows, ..Plan::default() });
        assert!(matches!(plan(1, 0), Err(SegmentError::CacheTooSmall { .. })));
        assert!(matches!(plan(MIN_CACHE - 1, 0), Err(SegmentError::CacheTooSmall { .. })));
        assert!(matches!(plan(u64::MAX, 0), Err(SegmentError::NoMemory { .. })));
        assert!(matches!(plan(0, u32::MAX), Err(SegmentError::TooManyRows { .. })));
    }
}
