//! A scoreboard and a page cache in shared memory, for processes that were forked from one another.
//!
//! One process makes a [`Segment`]; its children inherit the mapping, and any process that gets the descriptor can
//! [attach](Segment::attach). The memory outlives each of them: any process may be killed at any instruction, and the
//! others go on, with at most a sixteenth of the cache lost.
//!
//! ```
//! use forkyard_shm::{Options, Plan, Segment, State};
//!
//! let segment = Segment::create(&Plan { cache_bytes: 8 << 20, rows: 4, ..Plan::default() })?;
//! // ... fork; in the child with slot 0 of generation 1:
//! let row = segment.scoreboard().claim(0, std::process::id(), 1).expect("there are four rows");
//! row.set_state(State::Ready);
//! let request = row.begin("GET", "/news");
//! let cache = segment.cache();
//! if cache.get("/news").is_none() {
//!     let clock = cache.clock();
//!     let page = "<h1>News</h1>";
//!     cache.set("/news", page, &Options::new().tags(["news"]).as_of(clock))?;
//! }
//! drop(request);
//! assert_eq!(row.requests(), 1);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # The picture
//! ```text
//! segment (sealed memfd, reserved at creation, its size fixed)
//!  |- header       what it is, and the plan it was made from; the logical clock     written: creator; clock: all, atomics
//!  |- scoreboard   one row for each process: pid, state, counts, what it serves     written: the row's owner, atomics
//!  |- tag table    when each tag was last purged                                    written: all, atomics
//!  `- shard 0..15  lock | words | hash buckets | ring log of entries                written: whoever holds its lock
//!
//! ring log        tail                                  head
//!   ... free ...  | old | dead | live | pad | live |new |  ... free ...
//!                   ^ evicted, or moved to the head if it was asked for meanwhile
//! ```
//! What lies at which byte is in `layout.rs`, held by assertions. All positions are offsets; nothing in the segment is a
//! pointer of ours.
//!
//! # Locks
//! There is one kind, the shard lock, and nobody holds two: there is no order to get wrong. It is never held across
//! a system call or an allocation. Waiting for it is bounded: 20 ms, and while one process is known to sit on it, not at
//! all. What then cannot be looked up is a miss, and what cannot be stored is [`Refused::Busy`]. The scoreboard has no
//! locks, so a process that must never wait may read and write it.
//!
//! # What holds after a death
//! | killed while | what the others see |
//! |---|---|
//! | making the segment | nothing: nobody else has the descriptor yet |
//! | writing its row | the row as far as written; the reader expects as much |
//! | looking up, lock held | the lock is taken over; nothing is lost |
//! | writing the bytes of a new entry, lock held | the same: they lie beyond the head, where nobody looks |
//! | changing a shard (`dirty` is set) | the next to take the lock empties this shard and counts it |
//! | emptying a shard | `dirty` is still set: the next begins again |
//! | purging a tag, between its two stores | the purge has not happened; its caller never got an answer |
//! | clearing, the clock raised, some shards not emptied | no old page is served; the memory returns with time |
//!
//! A process that is stopped and not dead keeps its lock, and the others do without that shard until it goes on.
//!
//! # Whom this trusts
//! The processes of one segment trust each other about as far as threads do, with two differences: a death harms nobody,
//! and of what lies in the segment nothing is believed that could lead outside it or into an endless loop. A shard
//! that contradicts itself is emptied and counted. What is not defended against: a process that writes
//! over a lock while another one holds it can crash that one, as the C library keeps list pointers in there; and one that
//! forges entries can serve what it likes.

mod audit;
mod cache;
mod clock;
#[doc(hidden)]
pub mod crash;
mod entry;
mod error;
mod fork;
mod futex;
mod geometry;
mod ghosts;
mod index;
mod judge;
mod layout;
mod lease;
mod list;
mod lock;
mod map;
mod member;
mod options;
mod page;
mod pin;
mod pinned;
mod prefixes;
mod read;
mod room;
mod scoreboard;
mod segment;
mod shard;
mod stats;
mod sweep;
mod sync;
mod tags;

#[cfg(feature = "crash-test")]
#[doc(hidden)]
pub use cache::Held;
pub use cache::Cache;
pub use error::{Refused, SegmentError};
pub use list::{Distribution, Listed};
pub use options::Options;
pub use page::{Damaged, Encoding, Header, NotStorable, Page};
pub use pinned::Pinned;
pub use scoreboard::{InFlight, Row, Scoreboard, Serving, Snapshot, State};
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
}
