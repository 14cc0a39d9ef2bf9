//! A scoreboard, a page cache and an event log in shared memory, for processes that were forked from one another.
//!
//! One process makes a [`Segment`]; its children inherit the mapping, and any process that gets the descriptor can
//! [attach](Segment::attach). The memory outlives each of them: any process may be killed at any instruction, and the
//! others go on, with nothing of the cache lost but what was being stored.
//!
//! ```
//! use std::convert::Infallible;
//! use std::time::Duration;
//!
//! use forkyard_shm::{Options, Plan, Segment, State};
//!
//! let segment = Segment::create(&Plan { cache_bytes: 8 << 20, rows: 4, ..Plan::default() })?;
//! // ... fork; in the child with slot 0 of generation 1:
//! let row = segment.scoreboard().claim(0, std::process::id(), 1).expect("there are four rows");
//! row.set_state(State::Ready);
//! let request = row.begin("GET", "/news");
//! let cache = segment.cache();
//! let options = Options::new().ttl(Duration::from_secs(60)).stale(Duration::from_secs(10)).tags(["news"]);
//! let page = cache.get_or_render("/news", &options, |_| Ok::<_, Infallible>(b"<h1>News</h1>".to_vec()));
//! # let Ok(_) = page;
//! drop(request);
//! assert_eq!(row.requests(), 1);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # The picture
//! ```text
//! segment (a sealed memfd, or a file; reserved when it is made, its size fixed)
//!  |- header       what it is, and the plan it was made from; the tag clock        written: creator; clock: all
//!  |- scoreboard   one row for each process: pid, state, counts, what it serves    written: the row's owner
//!  |- members      one cell for each process that uses the cache: what it reads    written: its owner, or who buries it
//!  |               in place, what it counted
//!  |- tag table    when each tag was last purged                                   written: all, atomically
//!  |- prefixes     the latest purges by prefix                                     written: who holds their lock
//!  |- leases       who renders what                                                written: all, one word each
//!  |- shard 0..15  lock | floors | heads | books | intent | counters               written: who holds its lock
//!  |               index: buckets of 7 slots and their visits                      slots: who holds the lock; visits: all
//!  |               ghosts: hashes of what was evicted lately                       written: who holds its lock
//!  |               small ring: what is new       main ring: what was asked for     written: who holds its lock
//!  `- event log    lock | floor | head; topics and the ring of events: `events.rs` written: who holds its lock
//!
//! a ring, with endless positions        floor                                  head
//!                          ... free ... | old | dead | live | pad | live | new | ... free ...
//!                                         ^ evicted, or moved to a head         ^ written next
//! ```
//! A slot says in one word where an entry lies: a position in a ring's endless log, which is never used twice. An entry is
//! valid as long as its position is not below the ring's floor, and does not change until then. All of the rest follows:
//!
//! - **Readers take no lock.** They follow the slot, copy, and look at the floor once more. On the way they write nothing that
//!   is shared, but for the visits of an entry that has not been asked for three times yet.
//! - **Writers lock one shard.** They write an entry beyond the head, raise the head, and publish it with one store of a slot.
//! - **Room is made at the floor**, by S3-FIFO: `room.rs` says how, and why that policy.
//! - **Reading in place** ([`Cache::pin`]) names the entry in the reader's own cell; the head jumps over pinned entries.
//!
//! What lies at which byte is in `layout.rs`, held by assertions. All positions are offsets; nothing in the segment is a pointer.
//! Each protocol between processes is a file of its own, without system calls, which the model checker loom runs
//! as well: `lock.rs`, `lease.rs`, `pin.rs`, `purge.rs`, `events/bell.rs`, `events/told.rs`.
//!
//! # Locks
//! There are three kinds, the shard lock, that of the prefix table and that of the event log, and nobody holds two: there
//! is no order to get wrong.
//! None is held across a system call or an allocation. Waiting for one is bounded: 20 ms, and while one process is
//! known to sit on it, not at all. What then cannot be stored is [`Refused::Busy`], and counted, and what cannot be
//! published is [`PublishError::Busy`]; reading goes on. The scoreboard
//! has no locks, so a process that must never wait may read and write it.
//!
//! # What holds after a death
//! A process that uses the cache, or publishes events, is a *member*: it holds a lock on one byte of the segment's file,
//! which the kernel gives free when the process is gone (`member.rs`). Whoever runs into something of a dead member's, or the [sweep](Cache::sweep)
//! within a second, buries it.
//!
//! | killed while | what the others see |
//! |---|---|
//! | making the segment | nothing: nobody else has the descriptor yet; a file without a magic number is made anew |
//! | writing its row | the row as far as written; the reader expects as much |
//! | becoming a member | the byte is free again; whoever claims the cell next begins with burying |
//! | looking up, copying out | nothing: it wrote nothing |
//! | reading in place | the entry's bytes are not used again until the member is buried; then they are |
//! | waiting for a lock or a lease | nothing |
//! | writing the bytes of an entry or of padding, lock held | the lock is taken over; the bytes lie beyond the head, and are overwritten |
//! | the head raised, no slot stored | the same; the record belongs to nobody, and is dropped when the floor gets there |
//! | the slot stored, the books not | the next owner finds the intent, sees that the slot says what was intended, and finishes the books |
//! | moving an entry | the slot leads to the old copy or to the new one, and both are whole |
//! | the floor raised | what is below is free, for pins are looked for before it is written to |
//! | emptying a shard | the next owner finds the intent and finishes |
//! | purging a tag, between its two stores | the purge has not happened; its caller never got an answer |
//! | purging a prefix, before its time is stored | the same; the cell is used again |
//! | purging a prefix, while removing | the purge holds for all readers; the sweep removes the rest |
//! | clearing, the clock raised, some shards not emptied | no old page is served; the memory returns with time |
//! | rendering under a lease | the lease is freed when the member is buried, by the first who waits for it, within milliseconds; another renders |
//! | the page stored, the lease held | the others find the page |
//! | burying somebody | the byte is free again; the next one buries from the start, which does no harm |
//! | taking a lock over, before the repair | the lock says again that its owner died, as the intent is still there |
//! | publishing an event | `events/publish.rs` |
//! | using a file | `file.rs` |
//!
//! A process that is stopped and not dead keeps its lock, and the others do without storing in that shard until it goes on.
//! A lease it holds ends at its deadline.
//!
//! # Whom this trusts
//! The processes of one segment trust each other about as far as threads do, with two differences: a death harms nobody,
//! and of what lies in the segment nothing is believed that could lead outside it or into an endless loop. A shard
//! that contradicts itself is emptied and counted. What is not defended against: a process that writes over the segment can
//! serve what it likes, change what another reads in place, or name a living process as the owner of a lock, which
//! keeps others from storing in that shard until that process ends. A process that closes descriptors it did not open
//! (all above 2, say) closes the one by which it is known to live: it is taken for dead, and must not use the cache
//! any more. [`Segment::damage`] finds a segment that was written over.
//!
//! What such a process cannot do is make the safe functions of this crate undefined. [`Segment::attach`], [`Segment::open`],
//! [`Segment::adopt`] and [`Segment::join`] are safe, although they map memory that other processes write, because of three
//! things together. The size of the memory is fixed (sealed, or a file that is reserved and locked), so that reading it
//! raises no SIGBUS unless somebody truncates that file, which ends the process. Nothing refers to the memory but
//! references to atomics, of which any value is valid, and pointers that do not leave `map.rs`. And bytes are copied by
//! instructions that the compiler does not see through. The one function that lends a slice of shared memory,
//! [`Pinned::into_slice`], is unsafe and says what its caller answers for.

mod adopt;
mod audit;
mod cache;
mod claim;
mod clock;
#[doc(hidden)]
pub mod crash;
mod early;
mod entry;
mod error;
mod events;
mod file;
mod fork;
mod futex;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzzing;
mod geometry;
mod ghosts;
mod index;
mod judge;
mod kept;
mod layout;
mod lease;
#[cfg(test)]
mod lease_tests; // not in lease.rs, which is also compiled for the model tests
mod list;
mod lock;
mod lookup;
mod map;
mod member;
mod memory_limit;
mod options;
mod page;
mod pin;
#[cfg(test)]
mod pin_tests;
mod pinned;
mod prefixes;
mod purge;
mod quarantine;
mod read;
mod recorder;
mod render;
mod room;
mod scoreboard;
mod segment;
mod shard;
mod stats;
mod sweep;
mod sync;
mod tags;
mod wait;
mod watch;

pub use cache::Cache;
#[cfg(feature = "crash-test")]
#[doc(hidden)]
pub use cache::Held;
pub use error::{Refused, SegmentError};
pub use events::{Event, EventStats, Events, PublishError, Since, Tail, Tailed};
pub use file::Found;
pub use kept::Keep;
pub use list::{Distribution, Listed};
pub use memory_limit::memory_limit;
pub use options::Options;
pub use page::{Damaged, Encoding, Header, NotStorable, Page};
pub use pinned::{Pinned, PinnedSlice};
pub use quarantine::Quarantine;
pub use recorder::Recorder;
pub use render::{Served, Source};
pub use scoreboard::{
    Before, InFlight, Load, Occupancy, Pulse, Row, Scoreboard, Seat, Serving, Snapshot, State, request_text,
};
pub use segment::Segment;
pub use stats::Stats;
pub use tags::Clock;

/// What a segment is to hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Bytes for the page cache: at least 256 KiB, or 0 for none.
    pub cache_bytes: u64,
    /// Rows of the scoreboard: one for each process that is to have one.
    pub rows: u32,
    /// The largest value the cache takes, in bytes; 0 for a 64th of the cache, but at least a MiB, as far as there is room.
    pub max_entry: u64,
    /// Bytes for the event log: at least 64 KiB, or 0 for none.
    pub events_bytes: u64,
}

impl Plan {
    /// Whether a memory segment of this plan would fit into the memory that there is, and into what control groups allow. None
    /// is reserved.
    ///
    /// # Errors
    /// As for [`Segment::create`].
    pub fn check_memory(&self) -> Result<(), SegmentError> {
        segment::check_memory(geometry::Geometry::of(self)?.total)
    }
}
