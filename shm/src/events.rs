//! The event log: what any process publishes, every process can read, in order, and again.
//!
//! ```text
//! topics   "prices" last 17 ──────────────────────────────┐    "chat" last 4 ─────┐
//!                                                         ▼                       ▼
//! ring     ... free ... | prices 15 | chat 3 | prices 16 | prices 17 | pad | ... | chat 4 | ... free ...
//!                       ^ floor          each knows the one of its topic before it        ^ head
//! ```
//! One ring of records for all topics, with endless positions, as the page cache has them. The ids of a topic count from 1
//! without a gap. What is published is written beyond the head, and the oldest events make room for it.
//!
//! - **One store publishes**: that of the head, which makes the record before it an event. Whoever is killed before has not
//!   published, and whoever is killed after has. The topics are told next; how far they have been is in `linked`, and who
//!   looks for events of a topic looks beyond that as well. So a death in between is nothing special.
//! - **Publishers hold the log's lock** (`lock.rs`), never for longer than a copy of the event. Of a dead one it is taken over.
//! - **Readers take no lock and write nothing.** They copy, and then look whether the floor is still below.
//! - **Waiting** is for the `sequence` to change, a futex. A publisher makes that system call only if somebody sleeps. Killed
//!   before it, it leaves the sleepers to the next publisher, or to the end of their time: they should not sleep for long.
//!
//! The files: [`publish`] writes, [`read`] reads, [`topics`] is the table, [`ring`] is what both know of records, [`bell`] and
//! [`told`] are protocols between processes, which loom runs as well, [`audit`] is for tests.
//!
//! # To miss nothing
//! Whoever wants all events of a topic from some id on, and then each new one, takes a [`Tail`] first and asks
//! [`Events::since`] next: what is published in between comes from both, and is told by its id.
//!
//! # Topics that come and go
//! The table has room for one topic for each 4 KiB of the log. If it is full, a new topic takes the place of the one that has
//! been idle for longest, so that no publisher can keep others from publishing, however many topics it makes. Events of the topic that was given up
//! stay in the log, and whoever follows it by a [`Tail`] gets them; by its name they are found no more. Should it come back, its ids go on above the
//! highest that any topic in its situation had: no id is used twice, and whoever asks for what came after its last
//! one learns that something may be missing. Until then that highest id is what is told as its last: a reader who begins
//! there misses nothing. A topic that is new then begins above it as well, as nobody knows whether it is.

mod audit;
mod publish;
mod read;
mod ring;
mod topics;

#[cfg(test)]
mod tests;

use std::hash::{BuildHasher as _, RandomState};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

pub use self::publish::PublishError;
pub use self::read::{Event, Since, Tail, Tailed};
use self::ring::Ring;
use crate::memory::SharedMemory;
use crate::memory::futex;
use crate::memory::layout::{EventsHead, GRAIN};
use crate::protocols::bell::Bell;

/// A handle of the event log; cheap to clone, usable from any thread.
#[derive(Clone, Debug)]
pub struct Events {
    segment: Arc<SharedMemory>,
}

/// What the log holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct EventStats {
    /// Events published so far.
    pub published: u64,
    /// Of these, the ones that made room for others.
    pub evicted: u64,
    /// Topics that the table knows.
    pub topics: u64,
    /// Topics that it has room for.
    pub most_topics: u64,
    /// Bytes in use.
    pub used_bytes: u64,
    /// Bytes for events.
    pub capacity: u64,
    /// When the oldest of the events that are there was published, in microseconds since 1970; 0 if there is none.
    pub oldest_us: u64,
    /// How often a publisher died at work, and another went on in its place.
    pub recoveries: u64,
    /// How often the log contradicted itself and was emptied.
    pub restarts: u64,
}

impl Events {
    pub(crate) fn new(segment: Arc<SharedMemory>) -> Events {
        Events { segment }
    }

    /// Whether the segment was made without a log.
    pub fn is_none(&self) -> bool {
        self.segment.geometry.events_ring_len == 0
    }

    /// A number that tells this log from those before it, never 0: ids of another epoch mean nothing here.
    pub fn epoch(&self) -> u32 {
        self.segment.events_head().map_or(0, |head| head.epoch.load(Ordering::Relaxed))
    }

    /// The most bytes that the name and the data of an event may have together.
    pub fn max_event(&self) -> u64 {
        self.segment.geometry.max_event
    }

    /// Counts the publications, and wraps around: for [`Events::wait`].
    pub fn sequence(&self) -> u32 {
        self.segment.events_head().map_or(0, |head| head.sequence.load(Ordering::SeqCst))
    }

    /// Sleeps until the sequence is not `seen` any more, the time is over, or a signal or [`Events::wake`] comes. Returns the
    /// sequence.
    pub fn wait(&self, seen: u32, longest: Duration) -> u32 {
        let Some(head) = self.segment.events_head() else {
            std::thread::sleep(longest);
            return seen;
        };
        if head.bell().may_sleep(seen) {
            futex::wait(&head.sequence, seen, longest);
        }
        head.sequence.load(Ordering::SeqCst)
    }

    /// Ends the sleep of all who wait.
    pub fn wake(&self) {
        if let Some(head) = self.segment.events_head() {
            futex::wake(&head.sequence, i32::MAX);
        }
    }

    /// What the log holds.
    pub fn stats(&self) -> EventStats {
        let Some(log) = Log::of(&self.segment) else { return EventStats::default() };
        let counters = &log.head.counters;
        let (floor, head) = (log.head.floor.load(Ordering::Acquire), log.head.head.load(Ordering::Acquire));
        EventStats {
            published: counters.published.load(Ordering::Relaxed),
            evicted: counters.evicted.load(Ordering::Relaxed),
            topics: log.topics.names().count() as u64,
            most_topics: self.segment.geometry.topics,
            used_bytes: head.saturating_sub(floor),
            capacity: self.segment.geometry.events_ring_len,
            oldest_us: log.oldest_us(),
            recoveries: counters.recoveries.load(Ordering::Relaxed),
            restarts: counters.restarts.load(Ordering::Relaxed),
        }
    }
}

/// The parts of the log.
#[derive(Clone, Copy, Debug)]
struct Log<'a> {
    head: &'a EventsHead,
    ring: Ring<'a>,
    topics: topics::Topics<'a>,
}

impl<'a> Log<'a> {
    /// `None` if there is none, or its file was truncated.
    fn of(segment: &'a SharedMemory) -> Option<Log<'a>> {
        if segment.map.is_lost() {
            return None;
        }
        let (head, geometry) = (segment.events_head()?, &segment.geometry);
        let ring = Ring::new(&segment.map, geometry.events_ring_at, geometry.events_ring_len);
        let topics = topics::Topics::of(segment)?;
        Some(Log { head, ring, topics })
    }
}

impl EventsHead {
    fn bell(&self) -> Bell<'_> {
        Bell { sequence: &self.sequence, sleepers: &self.sleepers, woken: &self.woken }
    }
}

impl SharedMemory {
    pub(crate) fn events_head(&self) -> Option<&EventsHead> {
        if self.geometry.events_ring_len == 0 { None } else { self.map.at(self.geometry.events_at) }
    }

    /// Position 0 means "none", so the ring starts behind it.
    pub(crate) fn init_events(&self) -> Option<()> {
        if self.geometry.events_ring_len == 0 {
            return Some(());
        }
        let head = self.events_head()?;
        let random = RandomState::new().hash_one(std::process::id()); // keyed by the system's random numbers
        #[expect(clippy::cast_possible_truncation, reason = "half of the random bits will do")]
        head.epoch.store((random as u32).max(1), Ordering::Relaxed);
        for position in [&head.floor, &head.head, &head.linked] {
            position.store(GRAIN, Ordering::Relaxed);
        }
        Some(())
    }
}
