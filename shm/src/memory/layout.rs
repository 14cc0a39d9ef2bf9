//! Defines the byte layout of a segment.
//!
//! ```text
//! segment   0      header          4096
//!           4096   scoreboard      rows x 4352, rounded up to pages
//!           ...    members         (rows + 32) x (320 + 64 x shards), rounded up to pages
//!           ...    tag table       slots x 8, rounded up to pages        \
//!           ...    prefixes        32 x 128                              |  cache_bytes in all,
//!           ...    leases          n x 64, rounded up to pages           |  absent without a cache
//!           ...    shards          n x shard_bytes                       /
//!           ...    events          head, topics x 160, ring              events_bytes in all, absent without a log
//!
//! header    0 magic 8 | 8 version 4 | 12 rows 4 | 16 fingerprint 8 | 24 cache_bytes 8 | 32 total 8 | 40 seed 8
//!           48 max_entry 8 | 56 checksum 8 | 64 events_bytes 8
//!           128 tag clock 8 | 136 cleared 8 | 144 newest prefix purge 8 | 152 prefix floor 8 (latest prefix purge not in the table)
//!           256 time_base 8 | 264 clean 8 | 272 clean_ms 8 | 280 clean_real_ms 8 | 288 boot id 16 | 304 sweep_due 8
//!           312 prefix lock 4 | 316 claimed rows 4 (no row from this number on was ever claimed)
//!           1024 quarantine: 0 count 4 | 4 unused 4 | 64 entries 64 x 16        (written only by the master)
//! barred    0 key 8 (0 = free) | 8 until_ms 8
//!
//! row       0 epoch 8 | 8 pid 4 | 12 state 4 | 16 generation 8 | 24 started_ms 8 | 32 requests 8
//!           40 connections 4 | 44 in_flight 4 | 48 occupied 4 | 52 seated 4 (thread slots ever used)
//!           56 busy_ms 8 (0 = the event loop is sleeping) | 64 pulse 4 | 68 loop thread 4 | 72 streams 4
//!           76 hung 4 (number of hung threads; the highest bit: all are hung)
//!           128 cells 16 x 128 | 2176 thread slots 16 x 128 | 4224 culprit: a cell, its stamp 1 (0 = unknown)
//! cell      0 stamp_ms 8 (0 = free) | 8 text
//! thread slot      0 current 8 (a cell + 1; 0 = no request; beyond the row's cells: the request with this text) | 8 text
//! text      0 length 8 | 8 words 112
//!
//! member    0 pid 4 (0 = unused) | 4 unused | 8 epoch 8 | 64 pins 32 x 8 (see `pin.rs`)
//!           320 tallies, one for each shard, 64 each
//! tally     0 hits 8 | 8 misses 8 | 16 stale 8 | 24 retries 8 | 32 lease_waits 8 | 40 renders 8
//!
//! prefix    0 clock 8 (0 = free) | 8 length 4 | 12 swept 4 | 16 text 112
//! lease     0 word 8 (tag 17, member + 1 15, deadline 32; 0 = free) | 8 turn 4 | 12 waiters 4
//!           16 pass 8 (tag 17, 1 15, until 32: no process waits for this key; 0 = none)
//!
//! shard     0 lock 4 | 4 suspect 4
//!           64 floor of the small ring 8 | 72 of the main ring 8        (the only words of a shard's head that readers read)
//!           128 rings 2 x 16: head 8 | clear_to 8
//!           160 books 4 x 8: live bytes in small, in main, entries in small, in main
//!           192 ghost_seq 8 | 200 sweep_at 8 | 208 restarts 8
//!           256 intent: 0 armed 8 | 8 slot 8 | 16 new 8 | 24 books afterwards 4 x 8
//!           320 counters 16 x 8
//!           512 buckets n x 64 | ghosts n x 64 | small ring | main ring
//! bucket    0 slots 7 x 8 | 56 visits 7 x 1 | 63 unused
//! slot      0 = free; else fingerprint 11 | ring 1 | position / 32, 52 bits
//! ghost     8 x 8: hash 32 | sequence 32
//!
//! record    0 size 4 (of the whole record, a multiple of 32) | 4 kind 4
//! entry     0 record 8 | 8 hash 8 | 16 position 8 (its own) | 24 snapshot 8 (tag clock when rendered)
//!           32 stored_ms 8 | 40 expires_ms 8 (0 = never) | 48 stale_ms 4 | 52 error_ms 4 | 56 cost_ms 4
//!           60 tag_count 4 | 64 key_len 4 | 68 meta_len 4 | 72 value_len 8
//!           80 tag hashes 8 each | key, padded to 8 | meta, padded to 8 | value, padded to 32
//!
//! events    0 lock 4 | 4 sequence 4 (of publications) | 8 sleepers 4 | 12 epoch 4 | 16 woken 4 | 20 suspect 4
//!           64 floor 8 | 72 head 8 | 80 linked 8 (the topics' cells are up to date up to here) | 88 retired 8 (the highest
//!           id of a replaced topic) | 128 counters 4 x 8
//!           192 topics n x 160 | ring
//! topic     0 length 4 (0 = never used; all ones = no longer a topic) | 4 unused | 8 hash 8 | 16 last_id 8
//!           24 last_at 8 (0 = none) | 32 text 128
//! event     0 record 8 | 8 position 8 (its own) | 16 id 8 | 24 before 8 (position of the topic's event before it; 0 = none)
//!           32 published_us 8 (wall clock) | 40 topic 4 (a cell) | 44 topic_len 4 | 48 name_len 4 | 52 data_len 4
//!           56 unused 8 | topic | name | data, padded to 32
//! ```
//!
//! The offset of each part follows from the [`Plan`](crate::Plan) alone: see `geometry.rs`.
//!
//! Must not read or write the segment.
#![expect(unsafe_code, reason = "declares which structs may be viewed in shared memory")]

use std::mem::offset_of;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64};

use super::map::Plain;

/// "forkyard" in ASCII.
pub(crate) const MAGIC: u64 = u64::from_le_bytes(*b"forkyard");
/// Version of the layout. Must be incremented with every change to this file or to the meaning of a word.
pub(crate) const VERSION: u32 = 6;

/// Every record starts at a multiple of this many bytes.
pub(crate) const GRAIN: u64 = 32;
pub(crate) const CELLS: usize = 16;
pub(crate) const THREADS: usize = 16;
pub(crate) const TEXT_WORDS: usize = 14;
/// Offset of the quarantine in the header's page.
pub(crate) const QUARANTINE_AT: u64 = 1024;
pub(crate) const BARRED: usize = 64;
pub(crate) const PINS: usize = 32;
pub(crate) const SLOTS: usize = 7;
pub(crate) const PREFIXES: usize = 32;
pub(crate) const PREFIX_WORDS: usize = 14;

pub(crate) const KIND_ENTRY: u32 = 1;
pub(crate) const KIND_PAD: u32 = 2;
pub(crate) const KIND_EVENT: u32 = 3;
/// Maximum length of a topic in bytes.
pub(crate) const TOPIC_BYTES: usize = 128;

#[repr(C, align(128))]
#[derive(Debug)]
pub(crate) struct SegmentHead {
    pub(crate) magic: AtomicU64,
    pub(crate) version: AtomicU32,
    pub(crate) rows: AtomicU32,
    pub(crate) fingerprint: AtomicU64,
    pub(crate) cache_bytes: AtomicU64,
    pub(crate) total: AtomicU64,
    pub(crate) seed: AtomicU64,
    pub(crate) max_entry: AtomicU64,
    pub(crate) checksum: AtomicU64,
    pub(crate) events_bytes: AtomicU64,
    unused: [AtomicU64; 7],
    pub(crate) tag_clock: AtomicU64,
    pub(crate) cleared: AtomicU64,
    pub(crate) prefix_clock: AtomicU64,
    pub(crate) prefix_floor: AtomicU64,
    unused_too: [AtomicU64; 12],
    pub(crate) time_base: AtomicU64,
    pub(crate) clean: AtomicU64,
    pub(crate) clean_ms: AtomicU64,
    pub(crate) clean_real_ms: AtomicU64,
    pub(crate) boot_id: [AtomicU64; 2],
    pub(crate) sweep_due: AtomicU64,
    pub(crate) prefix_lock: AtomicU32,
    pub(crate) claimed_rows: AtomicU32,
    unused_at_the_end: [AtomicU64; 8],
}

/// The requests that are currently quarantined.
#[repr(C, align(64))]
#[derive(Debug)]
pub(crate) struct QuarantineTable {
    pub(crate) count: AtomicU32,
    unused: AtomicU32,
    unused_too: [AtomicU64; 7],
    pub(crate) barred: [Barred; BARRED],
}

#[repr(C)]
#[derive(Debug)]
pub(crate) struct Barred {
    pub(crate) key: AtomicU64,
    pub(crate) until_ms: AtomicU64,
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
    pub(crate) occupied: AtomicU32,
    pub(crate) registered_threads: AtomicU32,
    pub(crate) busy_ms: AtomicU64,
    pub(crate) pulse: AtomicU32,
    pub(crate) loop_thread: AtomicU32,
    pub(crate) streams: AtomicU32,
    pub(crate) hung: AtomicU32,
    unused: [AtomicU32; 12],
    pub(crate) cells: [Cell; CELLS],
    pub(crate) threads: [ThreadCells; THREADS],
    pub(crate) culprit: Cell,
}

#[repr(C, align(128))]
#[derive(Debug, Default)]
pub(crate) struct Cell {
    pub(crate) stamp_ms: AtomicU64,
    pub(crate) text: Text,
}

/// The request that a thread is processing.
#[repr(C, align(128))]
#[derive(Debug, Default)]
pub(crate) struct ThreadCells {
    pub(crate) current: AtomicU64,
    pub(crate) text: Text,
}

/// The text of a request, such as "GET /path".
#[repr(C)]
#[derive(Debug)]
pub(crate) struct Text {
    pub(crate) length: AtomicU64,
    pub(crate) words: [AtomicU64; TEXT_WORDS],
}

/// A process that uses the cache. Its tallies follow in memory.
#[repr(C, align(64))]
#[derive(Debug)]
pub(crate) struct MemberHead {
    pub(crate) pid: AtomicU32,
    unused: AtomicU32,
    pub(crate) epoch: AtomicU64,
    unused_too: [AtomicU64; 6],
    /// The entries that the process is reading in place.
    pub(crate) pins: [AtomicU64; PINS],
}

/// The counts of one process for one shard, including those of previous owners of the same cell.
#[repr(C, align(64))]
#[derive(Debug)]
pub(crate) struct Tally {
    pub(crate) hits: AtomicU64,
    pub(crate) misses: AtomicU64,
    pub(crate) stale: AtomicU64,
    pub(crate) retries: AtomicU64,
    pub(crate) lease_waits: AtomicU64,
    pub(crate) renders: AtomicU64,
    unused: [AtomicU64; 2],
}

#[repr(C, align(128))]
#[derive(Debug)]
pub(crate) struct PrefixCell {
    pub(crate) clock: AtomicU64,
    pub(crate) length: AtomicU32,
    pub(crate) swept: AtomicU32,
    pub(crate) text: [AtomicU64; PREFIX_WORDS],
}

#[repr(C, align(64))]
#[derive(Debug)]
pub(crate) struct LeaseCell {
    pub(crate) word: AtomicU64,
    pub(crate) turn: AtomicU32,
    pub(crate) waiters: AtomicU32,
    pub(crate) pass: AtomicU64,
    unused: [AtomicU64; 5],
}

#[repr(C, align(64))]
#[derive(Debug)]
pub(crate) struct ShardHead {
    pub(crate) lock: AtomicU32,
    /// Nonzero from a lock timeout until the lock is next taken. While it is nonzero, no process waits for the lock.
    pub(crate) suspect: AtomicU32,
    unused: [AtomicU64; 7],
    /// The lowest valid position of each ring.
    pub(crate) floors: [AtomicU64; 2],
    unused_too: [AtomicU64; 6],
    pub(crate) rings: [RingHead; 2],
    pub(crate) books: [AtomicU64; 4],
    pub(crate) ghost_seq: AtomicU64,
    pub(crate) sweep_at: AtomicU64,
    pub(crate) restarts: AtomicU64,
    unused_word: [AtomicU64; 5],
    pub(crate) intent: Intent,
    pub(crate) counters: Counters,
    unused_at_the_end: [AtomicU64; 8],
}

#[repr(C)]
#[derive(Debug)]
pub(crate) struct RingHead {
    /// Position of the next record.
    pub(crate) head: AtomicU64,
    /// There are no pins between the head and this position.
    pub(crate) clear_to: AtomicU64,
}

/// An announced change of a slot, with the accounting that applies after the change. If the process that announced the change dies, the
/// next owner of the lock completes it.
#[repr(C)]
#[derive(Debug)]
pub(crate) struct Intent {
    pub(crate) armed: AtomicU64,
    pub(crate) slot: AtomicU64,
    pub(crate) new: AtomicU64,
    pub(crate) books: [AtomicU64; 4],
    unused: AtomicU64,
}

/// Counters that are changed under the lock, except for the last three. If a process dies between two changes, the counters become slightly
/// inconsistent; this is harmless.
#[repr(C)]
#[derive(Debug)]
pub(crate) struct Counters {
    pub(crate) stores: AtomicU64,
    pub(crate) replaced: AtomicU64,
    pub(crate) evicted_small: AtomicU64,
    pub(crate) evicted_main: AtomicU64,
    pub(crate) evicted_index: AtomicU64,
    pub(crate) expired: AtomicU64,
    pub(crate) purged: AtomicU64,
    pub(crate) promoted: AtomicU64,
    pub(crate) reprieved: AtomicU64,
    pub(crate) moved_bytes: AtomicU64,
    pub(crate) ghost_hits: AtomicU64,
    pub(crate) lock_recoveries: AtomicU64,
    pub(crate) lost: AtomicU64,
    pub(crate) refused: AtomicU64,
    pub(crate) outdated: AtomicU64,
    pub(crate) lock_timeouts: AtomicU64,
}

#[repr(C, align(64))]
#[derive(Debug)]
pub(crate) struct Bucket {
    pub(crate) slots: [AtomicU64; SLOTS],
    /// Number of requests for each slot's entry, up to 3. This is a hint that readers increment.
    pub(crate) visits: [AtomicU8; 8],
}

#[repr(C, align(64))]
#[derive(Debug)]
pub(crate) struct GhostBucket {
    pub(crate) ghosts: [AtomicU64; 8],
}

/// The first words of every record in a ring; a pad record consists of nothing else.
#[repr(C, align(8))]
#[derive(Debug)]
pub(crate) struct RecordHead {
    pub(crate) size: AtomicU32,
    pub(crate) kind: AtomicU32,
}

#[repr(C)]
#[derive(Debug)]
pub(crate) struct EntryHead {
    pub(crate) record: RecordHead,
    pub(crate) hash: AtomicU64,
    pub(crate) position: AtomicU64,
    pub(crate) snapshot: AtomicU64,
    pub(crate) stored_ms: AtomicU64,
    pub(crate) expires_ms: AtomicU64,
    pub(crate) stale_ms: AtomicU32,
    pub(crate) error_ms: AtomicU32,
    pub(crate) cost_ms: AtomicU32,
    pub(crate) tag_count: AtomicU32,
    pub(crate) key_len: AtomicU32,
    pub(crate) meta_len: AtomicU32,
    pub(crate) value_len: AtomicU64,
}

/// The head of the event log.
#[repr(C, align(64))]
#[derive(Debug)]
pub(crate) struct EventsHead {
    pub(crate) lock: AtomicU32,
    pub(crate) sequence: AtomicU32,
    pub(crate) sleepers: AtomicU32,
    pub(crate) epoch: AtomicU32,
    pub(crate) woken: AtomicU32,
    /// Nonzero from a lock timeout until the lock is next taken. While it is nonzero, no process waits for the lock.
    pub(crate) suspect: AtomicU32,
    unused: [AtomicU64; 5],
    /// The lowest valid position.
    pub(crate) floor: AtomicU64,
    /// Position of the next record. Raising it publishes the record before it.
    pub(crate) head: AtomicU64,
    pub(crate) linked: AtomicU64,
    pub(crate) retired: AtomicU64,
    unused_too: [AtomicU64; 4],
    pub(crate) counters: EventCounters,
    unused_at_the_end: [AtomicU64; 4],
}

#[repr(C)]
#[derive(Debug)]
pub(crate) struct EventCounters {
    pub(crate) published: AtomicU64,
    pub(crate) evicted: AtomicU64,
    pub(crate) recoveries: AtomicU64,
    pub(crate) restarts: AtomicU64,
}

#[repr(C, align(32))]
#[derive(Debug)]
pub(crate) struct TopicCell {
    pub(crate) length: AtomicU32,
    unused: AtomicU32,
    pub(crate) hash: AtomicU64,
    pub(crate) last_id: AtomicU64,
    pub(crate) last_at: AtomicU64,
    pub(crate) text: [AtomicU64; TOPIC_BYTES / 8],
}

#[repr(C, align(32))]
#[derive(Debug)]
pub(crate) struct EventHead {
    pub(crate) record: RecordHead,
    pub(crate) position: AtomicU64,
    pub(crate) id: AtomicU64,
    pub(crate) before: AtomicU64,
    pub(crate) published_us: AtomicU64,
    pub(crate) topic: AtomicU32,
    pub(crate) topic_len: AtomicU32,
    pub(crate) name_len: AtomicU32,
    pub(crate) data_len: AtomicU32,
    unused: AtomicU64,
}

pub(crate) const EVENTS_HEAD: u64 = size_of::<EventsHead>() as u64;
pub(crate) const TOPIC_CELL: u64 = size_of::<TopicCell>() as u64;
pub(crate) const EVENT_HEAD: u64 = size_of::<EventHead>() as u64;
pub(crate) const ENTRY_HEAD: u64 = size_of::<EntryHead>() as u64;
pub(crate) const ROW_BYTES: u64 = size_of::<RowCells>() as u64;
pub(crate) const MEMBER_HEAD: u64 = size_of::<MemberHead>() as u64;
pub(crate) const TALLY_BYTES: u64 = size_of::<Tally>() as u64;
pub(crate) const SHARD_HEAD: u64 = size_of::<ShardHead>() as u64;
pub(crate) const BUCKET_BYTES: u64 = size_of::<Bucket>() as u64;
pub(crate) const LEASE_BYTES: u64 = size_of::<LeaseCell>() as u64;
pub(crate) const PREFIX_BYTES: u64 = size_of::<PrefixCell>() as u64;

// SAFETY: this type and the types below are `repr(C)`, all their fields are atomics, arrays of atomics, or structs in this list, and they
// have no padding, as the assertions on offsets and sizes below show.
unsafe impl Plain for SegmentHead {}
// SAFETY: as for `SegmentHead`.
unsafe impl Plain for RowCells {}
// SAFETY: as for `SegmentHead`.
unsafe impl Plain for QuarantineTable {}
// SAFETY: as for `SegmentHead`.
unsafe impl Plain for MemberHead {}
// SAFETY: as for `SegmentHead`.
unsafe impl Plain for Tally {}
// SAFETY: as for `SegmentHead`.
unsafe impl Plain for PrefixCell {}
// SAFETY: as for `SegmentHead`.
unsafe impl Plain for LeaseCell {}
// SAFETY: as for `SegmentHead`.
unsafe impl Plain for ShardHead {}
// SAFETY: as for `SegmentHead`.
unsafe impl Plain for Bucket {}
// SAFETY: as for `SegmentHead`.
unsafe impl Plain for GhostBucket {}
// SAFETY: as for `SegmentHead`.
unsafe impl Plain for RecordHead {}
// SAFETY: as for `SegmentHead`.
unsafe impl Plain for EntryHead {}
// SAFETY: as for `SegmentHead`.
unsafe impl Plain for EventsHead {}
// SAFETY: as for `SegmentHead`.
unsafe impl Plain for TopicCell {}
// SAFETY: as for `SegmentHead`.
unsafe impl Plain for EventHead {}

// Verifies the byte table in the module documentation.
const _: () = {
    assert!(offset_of!(SegmentHead, version) == 8 && offset_of!(SegmentHead, rows) == 12);
    assert!(offset_of!(SegmentHead, fingerprint) == 16 && offset_of!(SegmentHead, cache_bytes) == 24);
    assert!(offset_of!(SegmentHead, total) == 32 && offset_of!(SegmentHead, seed) == 40);
    assert!(offset_of!(SegmentHead, max_entry) == 48 && offset_of!(SegmentHead, checksum) == 56);
    assert!(offset_of!(SegmentHead, tag_clock) == 128 && offset_of!(SegmentHead, cleared) == 136);
    assert!(offset_of!(SegmentHead, prefix_clock) == 144 && offset_of!(SegmentHead, prefix_floor) == 152);
    assert!(offset_of!(SegmentHead, time_base) == 256 && offset_of!(SegmentHead, clean) == 264);
    assert!(offset_of!(SegmentHead, clean_ms) == 272 && offset_of!(SegmentHead, clean_real_ms) == 280);
    assert!(offset_of!(SegmentHead, boot_id) == 288 && offset_of!(SegmentHead, sweep_due) == 304);
    assert!(offset_of!(SegmentHead, prefix_lock) == 312 && size_of::<SegmentHead>() == 384);
    assert!(offset_of!(QuarantineTable, barred) == 64 && size_of::<Barred>() == 16);
    assert!(QUARANTINE_AT + size_of::<QuarantineTable>() as u64 <= 4096);

    assert!(offset_of!(RowCells, pid) == 8 && offset_of!(RowCells, state) == 12);
    assert!(offset_of!(RowCells, generation) == 16 && offset_of!(RowCells, started_ms) == 24);
    assert!(offset_of!(RowCells, requests) == 32 && offset_of!(RowCells, connections) == 40);
    assert!(offset_of!(RowCells, in_flight) == 44 && offset_of!(RowCells, occupied) == 48);
    assert!(offset_of!(RowCells, registered_threads) == 52 && offset_of!(RowCells, busy_ms) == 56);
    assert!(offset_of!(RowCells, pulse) == 64 && offset_of!(RowCells, loop_thread) == 68);
    assert!(offset_of!(RowCells, streams) == 72 && offset_of!(RowCells, hung) == 76);
    assert!(offset_of!(RowCells, cells) == 128);
    assert!(offset_of!(RowCells, threads) == 2176 && offset_of!(RowCells, culprit) == 4224);
    assert!(size_of::<RowCells>() == 4352 && size_of::<Cell>() == 128 && size_of::<ThreadCells>() == 128);
    assert!(offset_of!(Cell, text) == 8 && offset_of!(ThreadCells, text) == 8 && size_of::<Text>() == 120);

    assert!(offset_of!(MemberHead, epoch) == 8 && offset_of!(MemberHead, pins) == 64 && MEMBER_HEAD == 320);
    assert!(offset_of!(Tally, stale) == 16 && offset_of!(Tally, renders) == 40);
    assert!(TALLY_BYTES == 64);

    assert!(offset_of!(PrefixCell, length) == 8 && offset_of!(PrefixCell, swept) == 12);
    assert!(offset_of!(PrefixCell, text) == 16 && PREFIX_BYTES == 128);
    assert!(offset_of!(LeaseCell, turn) == 8 && offset_of!(LeaseCell, waiters) == 12);
    assert!(offset_of!(LeaseCell, pass) == 16 && LEASE_BYTES == 64);

    assert!(offset_of!(ShardHead, suspect) == 4 && offset_of!(ShardHead, floors) == 64);
    assert!(offset_of!(ShardHead, rings) == 128 && size_of::<RingHead>() == 16);
    assert!(offset_of!(ShardHead, books) == 160 && offset_of!(ShardHead, ghost_seq) == 192);
    assert!(offset_of!(ShardHead, sweep_at) == 200 && offset_of!(ShardHead, restarts) == 208);
    assert!(offset_of!(ShardHead, intent) == 256 && size_of::<Intent>() == 64 && offset_of!(Intent, books) == 24);
    assert!(offset_of!(ShardHead, counters) == 320 && size_of::<Counters>() == 128 && SHARD_HEAD == 512);
    assert!(BUCKET_BYTES == 64 && offset_of!(Bucket, visits) == 56 && size_of::<GhostBucket>() == 64);

    assert!(size_of::<RecordHead>() == 8 && offset_of!(EntryHead, hash) == 8);
    assert!(offset_of!(EntryHead, position) == 16 && offset_of!(EntryHead, snapshot) == 24);
    assert!(offset_of!(EntryHead, stored_ms) == 32 && offset_of!(EntryHead, expires_ms) == 40);
    assert!(offset_of!(EntryHead, stale_ms) == 48 && offset_of!(EntryHead, error_ms) == 52);
    assert!(offset_of!(EntryHead, cost_ms) == 56 && offset_of!(EntryHead, tag_count) == 60);
    assert!(offset_of!(EntryHead, key_len) == 64 && offset_of!(EntryHead, meta_len) == 68);
    assert!(offset_of!(EntryHead, value_len) == 72 && ENTRY_HEAD == 80);

    assert!(offset_of!(SegmentHead, events_bytes) == 64);
    assert!(offset_of!(EventsHead, sequence) == 4 && offset_of!(EventsHead, sleepers) == 8);
    assert!(offset_of!(EventsHead, epoch) == 12 && offset_of!(EventsHead, woken) == 16);
    assert!(offset_of!(EventsHead, suspect) == 20 && offset_of!(EventsHead, floor) == 64);
    assert!(offset_of!(EventsHead, head) == 72 && offset_of!(EventsHead, linked) == 80);
    assert!(offset_of!(EventsHead, retired) == 88 && offset_of!(EventsHead, counters) == 128);
    assert!(EVENTS_HEAD == 192 && TOPIC_CELL == 160 && EVENT_HEAD == 64);
    assert!(offset_of!(TopicCell, hash) == 8 && offset_of!(TopicCell, last_id) == 16);
    assert!(offset_of!(TopicCell, last_at) == 24 && offset_of!(TopicCell, text) == 32);
    assert!(offset_of!(EventHead, id) == 16 && offset_of!(EventHead, before) == 24);
    assert!(offset_of!(EventHead, published_us) == 32 && offset_of!(EventHead, topic) == 40);
    assert!(offset_of!(EventHead, topic_len) == 44 && offset_of!(EventHead, data_len) == 52);
};

/// Distinguishes builds with the same version that would lay out bytes differently because their byte order or word
/// size differs.
pub(crate) const FINGERPRINT: u64 = {
    let order = if cfg!(target_endian = "little") { 1 } else { 2 };
    order | (size_of::<usize>() as u64) << 8
};
