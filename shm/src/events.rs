//! The event log: any process can publish events, and every process can read them in order, any number of times.
//!
//! ```text
//! topics   "prices" last 17 ──────────────────────────────┐    "chat" last 4 ─────┐
//!                                                         ▼                       ▼
//! ring     ... free ... | prices 15 | chat 3 | prices 16 | prices 17 | pad | ... | chat 4 | ... free ...
//!                       ^ floor          each links to the previous event of its topic          ^ head
//! ```
//! All topics share one ring of records with endless positions, as in the page cache. The ids of a topic count from 1 without gaps. An
//! event is written beyond the head, and the oldest events are evicted to make room for it.
//!
//! - **One store publishes an event**: raising the head turns the record before it into an event. If a publisher is killed before that
//!   store, the event is not published; if it is killed after that store, the event is published. The topic's cell is updated after that
//!   store. `linked` is the position up to which the cells are updated. A reader that looks for the events of a topic also searches beyond
//!   `linked`, so a publisher that dies between the two stores needs no special treatment.
//! - **Publishers hold the log's lock** (`protocols/lock.rs`), but only while they copy an event. The lock of a dead publisher is taken
//!   over.
//! - **Readers take no lock and write nothing.** They copy a record and then check that the floor has not passed it.
//! - **Waiting readers** wait for the futex `sequence` to change. A publisher makes the system call that wakes them only if a reader is
//!   sleeping. If a publisher is killed before that call, the sleeping readers are woken by the next publisher or by their timeout. The
//!   timeout should therefore be short.
//!
//! The files: [`publish`] writes, and [`read`] reads. [`topics`] is the table of topics. [`ring`] defines the record format that both use.
//! [`bell`] and [`latest_event`] are protocols between processes, which are also tested with loom. [`audit`] is for tests.
//!
//! # Reading without gaps
//! To read all events of a topic after some id, and then each new event, a reader first takes a [`Tail`] and then calls [`Events::since`].
//! An event that was published between these two calls is returned by both; the reader recognizes it by its id.
//!
//! # Replaced topics
//! The table has room for one topic per 4 KiB of the log. If the table is full, a new topic replaces the topic that has been idle for
//! longest, so that a publisher that creates many topics cannot prevent other processes from publishing. Events of a replaced topic stay in
//! the log. A reader that follows the log with a [`Tail`] receives them, but a lookup by the topic's name no longer finds them.
//!
//! If an event is published to a replaced topic again, the topic's ids continue above the highest id of any replaced topic. No id is
//! therefore used twice, and a reader that requests the events after its last id receives the number of events that it missed. Until an
//! event is published, that highest id is returned as the topic's last id, so a reader that starts there misses nothing. The ids of a topic
//! that never existed also start above that id, because new and replaced topics cannot be distinguished.

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

/// A handle to the event log. Cheap to clone, and usable from any thread.
#[derive(Clone, Debug)]
pub struct Events {
    segment: Arc<SharedMemory>,
}

/// Statistics of the event log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct EventStats {
    /// Number of events published so far.
    pub published: u64,
    /// Number of published events that have been evicted.
    pub evicted: u64,
    /// Number of topics in the table.
    pub topics: u64,
    /// Maximum number of topics in the table.
    pub most_topics: u64,
    /// Number of bytes in use.
    pub used_bytes: u64,
    /// Number of bytes available for events.
    pub capacity: u64,
    /// When the oldest event in the log was published, in microseconds since 1970; 0 if there is no event.
    pub oldest_us: u64,
    /// Number of times that a publisher died while publishing and another publisher took over.
    pub recoveries: u64,
    /// Number of times that the log was found inconsistent and was emptied.
    pub restarts: u64,
}

impl Events {
    pub(crate) fn new(segment: Arc<SharedMemory>) -> Events {
        Events { segment }
    }

    /// Whether the segment was created without a log.
    pub fn is_none(&self) -> bool {
        self.segment.geometry.events_ring_len == 0
    }

    /// Returns a number that distinguishes this log from earlier logs, or 0 if there is no log. Ids from a different epoch have no meaning
    /// in this log.
    pub fn epoch(&self) -> u32 {
        self.segment.events_head().map_or(0, |head| head.epoch.load(Ordering::Relaxed))
    }

    /// Returns the maximum length of an event's name and data together, in bytes.
    pub fn max_event(&self) -> u64 {
        self.segment.geometry.max_event
    }

    /// Returns the number of publications so far, for [`Events::wait`]. The number wraps around.
    pub fn sequence(&self) -> u32 {
        self.segment.events_head().map_or(0, |head| head.sequence.load(Ordering::SeqCst))
    }

    /// Sleeps until the sequence differs from `seen`, `longest` has passed, a signal arrives, or [`Events::wake`] is called. Returns the
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

    /// Wakes all waiting readers.
    pub fn wake(&self) {
        if let Some(head) = self.segment.events_head() {
            futex::wake(&head.sequence, i32::MAX);
        }
    }

    /// Returns the statistics of the log.
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
    /// Returns the log of a segment, or `None` if there is no log or if its file was truncated.
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

    /// Initializes the event log. Position 0 means "none", so the ring starts after it.
    pub(crate) fn init_events(&self) -> Option<()> {
        if self.geometry.events_ring_len == 0 {
            return Some(());
        }
        let head = self.events_head()?;
        let random = RandomState::new().hash_one(std::process::id()); // seeded with the system's random numbers
        #[expect(clippy::cast_possible_truncation, reason = "half of the random bits will do")]
        head.epoch.store((random as u32).max(1), Ordering::Relaxed);
        for position in [&head.floor, &head.head, &head.linked] {
            position.store(GRAIN, Ordering::Relaxed);
        }
        Some(())
    }
}
