//! What lies where in the segment.
//!
//! All sizes follow from the [`Plan`] alone, by [`Geometry::of`]. The creator writes the plan into the header; whoever
//! attaches computes the geometry again and keeps its own copy, so no later change of the header moves any bound.
//!
//! ```text
//! segment   0      header          4096    magic, version, plan, seed, checksum; on a line of its own: the tag clock
//!           4096   scoreboard      rows x 2176, rounded up to pages
//!           ...    tag table       slots x 8, rounded up to pages                    \  absent without a cache
//!           ...    shards          n x shard_bytes                                   /
//!
//! header    0 magic 8 | 8 version 4 | 12 rows 4 | 16 fingerprint 8 | 24 cache_bytes 8 | 32 total 8 | 40 seed 8
//!           48 checksum 8 | 128 tag clock 8 | 136 cleared 8
//!
//! row       0 epoch 8 | 8 pid 4 | 12 state 4 | 16 generation 8 | 24 started_ms 8 | 32 requests 8
//!           40 connections 4 | 44 in_flight 4 | 128 cells 16 x 128
//! cell      0 stamp_ms 8 (0 = free) | 8 length 8 | 16 text 112
//!
//! shard     0 lock 64
//!           64 dirty 4 | 68 suspect 4 | 72 head 8 | 80 tail 8 | 88 live_bytes 8 | 96 dead_bytes 8 | 104 entries 8
//!           128 counters 10 x 8
//!           256 buckets n x 8 (virtual position of the newest entry of the chain, 0 = none)
//!           ... ring
//!
//! record    0 size 4 (all of it, a multiple of 16) | 4 flags 4 (kind in the low byte, visited in bit 8)
//! entry     0 record 8 | 8 hash 8 | 16 next 8 (older entry of the chain) | 24 position 8 (its own)
//!           32 expires_ms 8 (0 = never) | 40 snapshot 8 (tag clock when rendered) | 48 key_len 4 | 52 tag_count 4
//!           56 value_len 8 | 64 tag hashes 8 each | key, padded to 8 | value, padded to 16
//! ```
//!
//! May not: read or write anything.
#![expect(unsafe_code, reason = "declares which structs may be viewed in shared memory")]

use std::mem::offset_of;
use std::sync::atomic::{AtomicU32, AtomicU64};

use crate::Plan;
use crate::error::SegmentError;
use crate::lock::RobustMutex;
use crate::map::Plain;

/// "forkyard" in ASCII.
pub(crate) const MAGIC: u64 = u64::from_le_bytes(*b"forkyard");
/// Raised with every change of anything in this file, or of what the words mean.
pub(crate) const VERSION: u32 = 1;

pub(crate) const PAGE: u64 = 4096;
pub(crate) const SMALLEST_CACHE: u64 = 256 * 1024;
/// 64 TiB: keeps every sum of sizes far from overflow.
const LARGEST_CACHE: u64 = 1 << 46;
const SMALLEST_SHARD: u64 = 4 << 20;
const MOST_SHARDS: u64 = 16;
pub(crate) const MOST_ROWS: u32 = 16_384;
/// Bytes of a shard for each of its buckets.
const SHARD_BYTES_PER_BUCKET: u64 = 512;
/// Bytes of the cache for each slot of the tag table.
const CACHE_BYTES_PER_TAG_SLOT: u64 = 512;

/// Every record starts at a multiple of this.
pub(crate) const GRAIN: u64 = 16;
pub(crate) const CELLS: usize = 16;
pub(crate) const TEXT_WORDS: usize = 14;

pub(crate) const KIND_MASK: u32 = 0xff;
pub(crate) const KIND_LIVE: u32 = 1;
pub(crate) const KIND_DEAD: u32 = 2;
pub(crate) const KIND_PAD: u32 = 3;
pub(crate) const VISITED: u32 = 0x100;

#[repr(C, align(128))]
#[derive(Debug)]
pub(crate) struct Header {
    pub(crate) magic: AtomicU64,
    pub(crate) version: AtomicU32,
    pub(crate) rows: AtomicU32,
    pub(crate) fingerprint: AtomicU64,
    pub(crate) cache_bytes: AtomicU64,
    pub(crate) total: AtomicU64,
    pub(crate) seed: AtomicU64,
    pub(crate) checksum: AtomicU64,
    unused: [AtomicU64; 9],
    pub(crate) tag_clock: AtomicU64,
    pub(crate) cleared: AtomicU64,
    unused_too: [AtomicU64; 14],
}

#[repr(C, align(128))]
#[derive(Debug)]
pub(crate) struct RowCells {
    pub(crate) epoch: AtomicU64,
    pub(crate) pid: AtomicU32,
    pub(crate) state: AtomicU32,
    pub(crate) generation: AtomicU64,
    pub(crate) started_ms: AtomicU64,
    pub(crate) requests: AtomicU64,
    pub(crate) connections: AtomicU32,
    pub(crate) in_flight: AtomicU32,
    unused: [AtomicU64; 10],
    pub(crate) cells: [Cell; CELLS],
}

#[repr(C, align(128))]
#[derive(Debug)]
pub(crate) struct Cell {
    pub(crate) stamp_ms: AtomicU64,
    pub(crate) length: AtomicU64,
    pub(crate) text: [AtomicU64; TEXT_WORDS],
}

#[repr(C, align(64))]
#[derive(Debug)]
pub(crate) struct ShardHead {
    pub(crate) lock: RobustMutex,
    /// Not 0 while the words below, the ring's records or the chains are being changed.
    pub(crate) dirty: AtomicU32,
    /// Not 0 from a lock timeout until the lock is next taken: meanwhile nobody waits for it.
    pub(crate) suspect: AtomicU32,
    pub(crate) head: AtomicU64,
    pub(crate) tail: AtomicU64,
    pub(crate) live_bytes: AtomicU64,
    pub(crate) dead_bytes: AtomicU64,
    pub(crate) entries: AtomicU64,
    unused: [AtomicU64; 2],
    pub(crate) counters: Counters,
    unused_too: [AtomicU64; 6],
}

/// Only ever added to; a death between two of them leaves them a little apart, and that is all.
#[repr(C)]
#[derive(Debug)]
pub(crate) struct Counters {
    pub(crate) hits: AtomicU64,
    pub(crate) misses: AtomicU64,
    pub(crate) stores: AtomicU64,
    pub(crate) evictions: AtomicU64,
    pub(crate) expirations: AtomicU64,
    pub(crate) purges: AtomicU64,
    pub(crate) refused: AtomicU64,
    pub(crate) lock_recoveries: AtomicU64,
    pub(crate) shards_lost: AtomicU64,
    pub(crate) lock_timeouts: AtomicU64,
}

/// What every record of the ring starts with; all that a pad record has.
#[repr(C, align(8))]
#[derive(Debug)]
pub(crate) struct RecordHead {
    pub(crate) size: AtomicU32,
    pub(crate) flags: AtomicU32,
}

#[repr(C)]
#[derive(Debug)]
pub(crate) struct EntryHead {
    pub(crate) record: RecordHead,
    pub(crate) hash: AtomicU64,
    pub(crate) next: AtomicU64,
    pub(crate) position: AtomicU64,
    pub(crate) expires_ms: AtomicU64,
    pub(crate) snapshot: AtomicU64,
    pub(crate) key_len: AtomicU32,
    pub(crate) tag_count: AtomicU32,
    pub(crate) value_len: AtomicU64,
}

pub(crate) const ENTRY_HEAD: u64 = size_of::<EntryHead>() as u64;
pub(crate) const ROW_BYTES: u64 = size_of::<RowCells>() as u64;
pub(crate) const SHARD_HEAD: u64 = size_of::<ShardHead>() as u64;

// SAFETY: for each of these: `repr(C)`, all fields are atomics, arrays of them, or structs of this list (or the lock),
// and there is no padding, which the assertions on offsets and sizes below show.
unsafe impl Plain for Header {}
// SAFETY: as above.
unsafe impl Plain for RowCells {}
// SAFETY: as above.
unsafe impl Plain for ShardHead {}
// SAFETY: as above.
unsafe impl Plain for RecordHead {}
// SAFETY: as above.
unsafe impl Plain for EntryHead {}

// The byte table of the module documentation.
const _: () = {
    assert!(offset_of!(Header, version) == 8 && offset_of!(Header, rows) == 12);
    assert!(offset_of!(Header, fingerprint) == 16 && offset_of!(Header, cache_bytes) == 24);
    assert!(offset_of!(Header, total) == 32 && offset_of!(Header, seed) == 40);
    assert!(offset_of!(Header, checksum) == 48 && offset_of!(Header, tag_clock) == 128);
    assert!(offset_of!(Header, cleared) == 136 && size_of::<Header>() == 256);

    assert!(offset_of!(RowCells, pid) == 8 && offset_of!(RowCells, state) == 12);
    assert!(offset_of!(RowCells, generation) == 16 && offset_of!(RowCells, started_ms) == 24);
    assert!(offset_of!(RowCells, requests) == 32 && offset_of!(RowCells, connections) == 40);
    assert!(offset_of!(RowCells, in_flight) == 44 && offset_of!(RowCells, cells) == 128);
    assert!(size_of::<RowCells>() == 2176 && size_of::<Cell>() == 128);
    assert!(offset_of!(Cell, length) == 8 && offset_of!(Cell, text) == 16);

    assert!(size_of::<RobustMutex>() == 64 && offset_of!(ShardHead, dirty) == 64);
    assert!(offset_of!(ShardHead, suspect) == 68 && offset_of!(ShardHead, head) == 72);
    assert!(offset_of!(ShardHead, tail) == 80 && offset_of!(ShardHead, live_bytes) == 88);
    assert!(offset_of!(ShardHead, dead_bytes) == 96 && offset_of!(ShardHead, entries) == 104);
    assert!(offset_of!(ShardHead, counters) == 128 && size_of::<Counters>() == 80);
    assert!(size_of::<ShardHead>() == 256);

    assert!(size_of::<RecordHead>() == 8 && offset_of!(EntryHead, hash) == 8);
    assert!(offset_of!(EntryHead, next) == 16 && offset_of!(EntryHead, position) == 24);
    assert!(offset_of!(EntryHead, expires_ms) == 32 && offset_of!(EntryHead, snapshot) == 40);
    assert!(offset_of!(EntryHead, key_len) == 48 && offset_of!(EntryHead, tag_count) == 52);
    assert!(offset_of!(EntryHead, value_len) == 56 && ENTRY_HEAD == 64);
};

/// Tells apart builds that would disagree about the bytes though the version is the same: byte order, word size,
/// and the C library's mutex.
pub(crate) const FINGERPRINT: u64 = {
    let order = if cfg!(target_endian = "little") { 1 } else { 2 };
    let words = size_of::<usize>() as u64;
    let mutex = size_of::<libc::pthread_mutex_t>() as u64;
    let library = if cfg!(target_env = "musl") { 2 } else { 1 };
    order | words << 8 | mutex << 16 | library << 32
};

/// Where everything is, computed from the plan and nothing else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Geometry {
    pub(crate) rows: u32,
    pub(crate) rows_at: u64,
    pub(crate) tags_at: u64,
    /// A power of two, or 0 without a cache.
    pub(crate) tag_slots: u64,
    pub(crate) shards_at: u64,
    /// A power of two, or 0 without a cache.
    pub(crate) shards: u64,
    pub(crate) shard_bytes: u64,
    /// For each shard; a power of two.
    pub(crate) buckets: u64,
    pub(crate) ring_len: u64,
    /// The largest record an entry may take, header included.
    pub(crate) max_record: u64,
    pub(crate) total: u64,
}

impl Geometry {
    pub(crate) fn of(plan: &Plan) -> Result<Geometry, SegmentError> {
        let Plan { cache_bytes, rows } = *plan;
        if rows > MOST_ROWS {
            return Err(SegmentError::TooManyRows { asked: rows, most: MOST_ROWS });
        }
        if cache_bytes > LARGEST_CACHE {
            let source = std::io::ErrorKind::OutOfMemory.into();
            return Err(SegmentError::NoMemory { bytes: cache_bytes, source });
        }
        let rows_at = PAGE;
        let tags_at = rows_at + (u64::from(rows) * ROW_BYTES).next_multiple_of(PAGE);
        let without = Geometry {
            rows,
            rows_at,
            tags_at,
            tag_slots: 0,
            shards_at: tags_at,
            shards: 0,
            shard_bytes: 0,
            buckets: 0,
            ring_len: 0,
            max_record: 0,
            total: tags_at,
        };
        match cache_bytes {
            0 => Ok(without),
            1..SMALLEST_CACHE => Err(SegmentError::CacheTooSmall { asked: cache_bytes, least: SMALLEST_CACHE }),
            SMALLEST_CACHE.. => Ok(without.with_cache(cache_bytes)),
        }
    }

    fn with_cache(self, cache_bytes: u64) -> Geometry {
        let tag_slots = floor_power_of_two(cache_bytes / CACHE_BYTES_PER_TAG_SLOT).clamp(1 << 10, 1 << 18);
        let shards_at = self.tags_at + (tag_slots * 8).next_multiple_of(PAGE);
        let shards = floor_power_of_two(cache_bytes / SMALLEST_SHARD).clamp(1, MOST_SHARDS);
        let shard_bytes = cache_bytes / shards / PAGE * PAGE;
        let buckets = floor_power_of_two(shard_bytes / SHARD_BYTES_PER_BUCKET);
        let ring_len = (shard_bytes - SHARD_HEAD - buckets * 8) / GRAIN * GRAIN;
        // An entry and the pad in front of it then always fit into half the ring.
        let max_record = (ring_len / 4).min(1 << 30) / GRAIN * GRAIN;
        let total = shards_at + shards * shard_bytes;
        Geometry { tag_slots, shards_at, shards, shard_bytes, buckets, ring_len, max_record, total, ..self }
    }
}

/// The largest power of two that is not larger than `value`; 1 for 0.
const fn floor_power_of_two(value: u64) -> u64 {
    if value == 0 { 1 } else { 1 << value.ilog2() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn geometry(cache_bytes: u64, rows: u32) -> Geometry {
        Geometry::of(&Plan { cache_bytes, rows }).unwrap()
    }

    #[test]
    fn parts_neither_overlap_nor_leave_the_segment() {
        for cache_bytes in [0, 262_144, 262_145, 1 << 20, 4 << 20, (9 << 20) + 777, 64 << 20, (1 << 40) + 5, 1 << 46] {
            for rows in [0, 1, 5, 256, MOST_ROWS] {
                let g = geometry(cache_bytes, rows);
                assert!(g.rows_at + u64::from(rows) * ROW_BYTES <= g.tags_at);
                assert!(g.tags_at + g.tag_slots * 8 <= g.shards_at);
                assert_eq!(g.shards_at + g.shards * g.shard_bytes, g.total);
                if cache_bytes > 0 {
                    assert!(SHARD_HEAD + g.buckets * 8 + g.ring_len <= g.shard_bytes);
                    assert!(g.ring_len > g.shard_bytes * 9 / 10);
                    assert!(g.tag_slots.is_power_of_two() && g.shards.is_power_of_two());
                    assert!(g.shards == 1 || g.shard_bytes >= SMALLEST_SHARD);
                    assert_eq!(g.max_record % GRAIN, 0);
                    assert!(u32::try_from(g.max_record).is_ok());
                }
            }
        }
        assert_eq!(geometry(64 << 20, 8).shards, 16);
        assert_eq!(geometry(9 << 20, 8).shards, 2);
    }

    #[test]
    fn refuses_absurd_plans() {
        let plan = |cache_bytes, rows| Geometry::of(&Plan { cache_bytes, rows });
        assert!(matches!(plan(1, 0), Err(SegmentError::CacheTooSmall { .. })));
        assert!(matches!(plan(SMALLEST_CACHE - 1, 0), Err(SegmentError::CacheTooSmall { .. })));
        assert!(matches!(plan(u64::MAX, 0), Err(SegmentError::NoMemory { .. })));
        assert!(matches!(plan(0, u32::MAX), Err(SegmentError::TooManyRows { .. })));
    }
}
