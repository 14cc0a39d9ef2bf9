//! A scoreboard, a page cache and an event log in shared memory, for processes that were forked from one another.
//!
//! One process creates a [`Segment`]. Its children inherit the mapping, and any process that receives the descriptor can
//! [attach](Segment::attach). The memory outlives each of these processes: any of them may be killed at any instruction,
//! and the others continue. The cache loses at most the page that was being stored.
//!
//! ```
//! use std::convert::Infallible;
//! use std::time::Duration;
//!
//! use forkyard_shm::{StoreOptions, Plan, Segment, State};
//!
//! let segment = Segment::create(&Plan { cache_bytes: 8 << 20, rows: 4, ..Plan::default() })?;
//! // ... fork; in the child with slot 0 of generation 1:
//! let row = segment.scoreboard().claim(0, std::process::id(), 1).expect("there are four rows");
//! row.set_state(State::Ready);
//! let request = row.begin("GET", "/news");
//! let cache = segment.cache();
//! let options = StoreOptions::new().ttl(Duration::from_secs(60)).stale(Duration::from_secs(10)).tags(["news"]);
//! let page = cache.get_or_render("/news", &options, |_| Ok::<_, Infallible>(b"<h1>News</h1>".to_vec()));
//! # let Ok(_) = page;
//! drop(request);
//! assert_eq!(row.requests(), 1);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Architecture
//! ```text
//! segment (a sealed memfd, or a file; reserved when it is created, of fixed size)
//!  |- header      format, plan, tag clock                                          written: creator; clock: all
//!  |- scoreboard  one row per process: pid, state, counts, requests                written: the row's owner
//!  |- members     one cell per process that uses the cache: its pins and counts    written: its owner, or the process that buries it
//!  |- tag table   when each tag was last purged                                    written: all, atomically
//!  |- prefixes    the latest purges by prefix                                      written: holder of the prefix lock
//!  |- leases      which member renders which key                                   written: all, one word each
//!  |- shard 0..15 lock | floors | heads | accounting | intent | counters           written: holder of the shard's lock
//!  |              index: buckets of 7 slots and their visits                       slots: holder of the lock; visits: all
//!  |              ghosts: hashes of recently evicted entries                       written: holder of the lock
//!  |              small ring: new entries       main ring: requested again         written: holder of the lock
//!  `- event log   lock | floor | head; topics and the ring of events: `events.rs`  written: holder of the log's lock
//!
//! a ring, with endless positions        floor                                  head
//!                          ... free ... | old | dead | live | pad | live | new | ... free ...
//!                                         ^ evicted, or moved to a head         ^ written next
//! ```
//! A slot is one word that contains the location of an entry: a position in a ring's endless log. Positions are never reused. An entry is
//! valid, and does not change, as long as its position is not below the ring's floor. This has the following consequences:
//!
//! - **Readers take no lock.** A reader follows the slot, copies the entry, and checks the floor again. It writes nothing that is shared,
//!   except the visit count of an entry that has been requested fewer than three times.
//! - **A writer locks one shard.** It writes an entry beyond the head, advances the head, and publishes the entry with one store
//!   to a slot.
//! - **Space is freed at the floor**, by S3-FIFO. `cache/eviction.rs` describes the policy and the reasons for it.
//! - **Reading in place** ([`Cache::pin`]) records the entry in the reader's own member cell. The head skips pinned entries.
//!
//! `memory/layout.rs` defines the byte layout, which assertions check. All positions are offsets; the segment contains no pointers. Each
//! protocol between processes is in its own file in `protocols/`, without system calls, so that the model checker loom can run it too:
//! `lock.rs`, `lease.rs`, `pin.rs`, `purge.rs`, `bell.rs`, `latest_event.rs`, and `units.rs` and `kept.rs` for the table of claims.
//!
//! # Locks
//! There are three kinds of locks: one lock per shard, one for the prefix table, and one for the event log. No process holds two locks at
//! the same time, so there is no lock order. No lock is held across a system call or an allocation. A process waits for a lock for up to 20
//! ms, but does not wait at all while another process is known not to release the lock. A page that cannot be stored for this reason is
//! reported as [`StoreError::Busy`] and counted. An event that cannot be published for this reason is reported as [`PublishError::Busy`].
//! Reading is not affected. The scoreboard has no locks, so a process that must never wait may read and write it.
//!
//! # Crash tolerance
//! A process that uses the cache or publishes events is a *member*. It holds a lock on one byte of the segment's file. The kernel releases
//! this lock when the process terminates (`memory/members.rs`). A dead member is cleaned up (*buried*) by the first process that needs
//! something that the dead member held, or by the [sweep](Cache::sweep) within a second.
//!
//! | killed while | what the other processes find |
//! |---|---|
//! | creating the segment | nothing: no other process has the descriptor yet; a file without the magic number is recreated |
//! | writing its row | the part of the row that was written; readers can handle partial rows |
//! | becoming a member | the byte is unlocked again; the next process that claims the cell first cleans it up |
//! | looking up, copying out | nothing: the process wrote nothing |
//! | reading in place | the entry's bytes are not reused until the member is cleaned up |
//! | waiting for a lock or a lease | nothing |
//! | writing the bytes of an entry or of padding, lock held | the lock is taken over; the bytes lie beyond the head and are overwritten |
//! | the head raised, no slot stored | the lock is taken over; no slot leads to the record, which is dropped when the floor reaches it |
//! | the slot stored, the accounting not | the next owner finds the intent and the intended word in the slot, and updates the accounting |
//! | moving an entry | the slot leads to the old copy or to the new copy, and both are whole |
//! | the floor raised | the bytes below it are free; a writer looks for pins before it overwrites them |
//! | emptying a shard | the next owner finds the intent and finishes |
//! | purging a tag, between its two stores | the purge may or may not have taken effect; it never returned to its caller |
//! | purging a prefix, before its time is stored | the purge has not taken effect; its cell is reused |
//! | purging a prefix, while removing pages | the purge is in effect for all readers; the sweep removes the remaining pages |
//! | clearing, the clock raised, some shards not emptied | no old page is served; the memory is freed gradually |
//! | rendering under a lease | the first process that waits buries the member within milliseconds, and another process renders |
//! | the page stored, the lease held | other processes find the page |
//! | cleaning up after a member | the byte is unlocked again; the next process repeats the whole cleanup, and the repetition is harmless |
//! | taking over a lock, before the repair | the lock reports a dead owner again, because the intent is still there |
//! | publishing an event | `events/publish.rs` |
//! | using a file | `segment/file.rs` |
//!
//! A process that is stopped, but not dead, keeps its lock. Until it continues, other processes do not store in that shard. A lease that it
//! holds ends at its deadline.
//!
//! # Trust
//! The processes that share a segment trust each other about as much as threads do, with two differences. First, the death of a process
//! does not harm the others. Second, no value read from the segment is trusted where it could lead outside the segment or into an endless
//! loop. A shard that is found inconsistent is emptied and counted.
//!
//! There is no defence against a process that overwrites the segment. Such a process can serve any content, change what another process is
//! reading in place, or name a running process as the owner of a shard's lock. In the last case, other processes cannot store in that shard
//! until the named process exits. A process that closes descriptors that it did not open (all descriptors above 2, for example) also closes
//! the descriptor whose lock shows that the process is alive. Other processes then treat that process as dead, and it must not use the
//! cache any more. [`Segment::damage`] detects an overwritten header or a truncated file, but no other damage.
//!
//! Even a process that overwrites the segment cannot cause undefined behaviour in the safe functions of this crate. [`Segment::attach`],
//! [`Segment::open`], [`Segment::adopt`] and [`Segment::join`] are safe, although they map memory that other processes write to, for three
//! reasons. First, the size of the memory is fixed, because it is sealed or because the file is reserved and locked. Reading the memory
//! therefore raises no SIGBUS unless the file is truncated. If it is truncated, a signal handler maps zeroes in place of the lost pages
//! (`memory/lost_pages.rs`), and the memory is not used any more. Second, the only references to the memory are references to atomics, for
//! which any value is valid; raw pointers do not leave `memory/map.rs`. Third, bytes are copied by instructions that are opaque to the
//! compiler. The only function that lends a slice of shared memory, [`Pinned::into_slice`], is unsafe and documents its caller's
//! obligations.

mod cache;
mod claims;
#[doc(hidden)]
pub mod crash;
mod events;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzzing;
mod memory;
mod protocols;
mod scoreboard;
mod segment;

pub use self::cache::Cache;
#[cfg(feature = "crash-test")]
#[doc(hidden)]
pub use self::cache::Held;
pub use self::cache::list::{Distribution, EntryInfo};
pub use self::cache::options::StoreOptions;
pub use self::cache::page::{CorruptPage, Encoding, Header, NotStorable, Page};
pub use self::cache::pinned::{Pinned, PinnedSlice};
pub use self::cache::recorder::Recorder;
pub use self::cache::refused::StoreError;
pub use self::cache::render::{CacheStatus, Cached};
pub use self::cache::stats::Stats;
pub use self::cache::tags::PurgeSnapshot;
pub use self::cache::value::CacheValue;
pub use self::claims::{AppDemand, AppProcess, AppRequest, ClaimAttempt, Claims, Door, HeldUnit, KeptConnection, Wake};
pub use self::events::{Event, EventStats, Events, PublishError, Since, Tail, Tailed};
pub use self::memory::error::SegmentError;
pub use self::memory::lost_pages::recover_lost_pages;
pub use self::memory::memory_limit::memory_limit;
pub use self::scoreboard::quarantine::Quarantine;
pub use self::scoreboard::{
    Before, EventLoopBeat, InFlight, Load, Occupancy, Row, Scoreboard, Serving, Snapshot, State, ThreadSlot,
    request_text,
};
pub use self::segment::Segment;
pub use self::segment::file::Found;

/// The layout of a segment: what it contains, and how large each part is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Size of the page cache in bytes: at least 256 KiB, or 0 for no cache.
    pub cache_bytes: u64,
    /// Number of scoreboard rows: one for each process that needs one.
    pub rows: u32,
    /// Maximum size of a value in the cache, in bytes. 0 selects 1/64 of the cache, but at least 1 MiB if there is
    /// room.
    pub max_entry: u64,
    /// Size of the event log in bytes: at least 64 KiB, or 0 for no log.
    pub events_bytes: u64,
}

impl Plan {
    /// Checks whether a memory segment for this plan would fit into the available memory and the limits of control groups. Reserves
    /// nothing.
    ///
    /// # Errors
    /// Fails if the plan is out of range, or if the memory is not available: see [`SegmentError`].
    pub fn check_memory(&self) -> Result<(), SegmentError> {
        crate::segment::check_memory(crate::memory::geometry::Geometry::of(self)?.total)
    }
}
