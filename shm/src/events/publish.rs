//! Publishes an event, completely or not at all.
//!
//! | killed while | what the other processes find |
//! |---|---|
//! | creating a topic | a cell without a topic, which stays unused until the table is full; or the topic, without events |
//! | raising the floor | the oldest events are gone; nothing has been written in their place |
//! | writing beyond the head | nothing: the bytes are overwritten |
//! | the head raised, the topic's cell not updated | the event; the next publisher updates the cell |
//! | before waking sleeping readers | the event; they are woken by the next publisher, or by their timeout |
//!
//! Must not wait for readers. Must not hold the lock across a system call.

use std::fmt;
use std::sync::atomic::{Ordering, fence};
use std::time::{SystemTime, UNIX_EPOCH};

use super::ring::{Draft, Record};
use super::topics::Topics;
use super::{Events, Log};
use crate::crash;
use crate::memory::SharedMemory;
use crate::memory::layout::{EventsHead, GRAIN};
use crate::memory::{futex, wait};
use crate::protocols::latest_event;

/// Why an event was not published.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum PublishError {
    /// The segment has no event log.
    Off,
    /// The topic name is invalid.
    BadTopic,
    /// The name and the data together are too long.
    TooLong {
        /// The maximum length in bytes.
        most: u64,
    },
    /// The log is too small for any topic. (A log with topics always has room for another topic, which replaces the topic that has been
    /// idle for longest.)
    TooManyTopics {
        /// The maximum number of topics.
        most: u64,
    },
    /// A stopped process holds the log's lock, or this process cannot become a member because there is no `/proc` or there are too many
    /// processes.
    Busy,
    /// The file that contains the log was truncated.
    Lost,
}

impl fmt::Display for PublishError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Off => f.write_str("event not published: there is no event log (--events gives it a size)"),
            Self::BadTopic => f.write_str("event not published: a topic has 1 to 128 bytes, and no control characters"),
            Self::TooLong { most } => {
                write!(
                    f,
                    "event not published: longer than the {most} bytes it may have (a larger log takes longer ones)"
                )
            }
            Self::TooManyTopics { most } => {
                write!(f, "event not published: the log has room for {most} topics, and none of them can be used")
            }
            Self::Busy => f.write_str("event not published: another process holds the event log (try again)"),
            Self::Lost => f.write_str("event not published: the file of the shared memory was truncated"),
        }
    }
}

impl std::error::Error for PublishError {}

impl Events {
    /// Publishes an event and returns its id. `name` is the kind of event and may be empty.
    ///
    /// Waits up to 20 ms for other publishers, but does not wait at all while one of them is known to be stopped. Never waits for readers.
    ///
    /// # Errors
    /// See [`PublishError`]. If an error is returned, nothing has been published.
    pub fn publish(&self, topic: &str, name: &str, data: &[u8]) -> Result<u64, PublishError> {
        if self.segment.map.is_lost() {
            return Err(PublishError::Lost);
        }
        let log = Log::of(&self.segment).ok_or(PublishError::Off)?;
        if !Topics::is_name(topic) {
            return Err(PublishError::BadTopic);
        }
        let most = self.max_event();
        if (name.len() as u64).saturating_add(data.len() as u64) > most {
            return Err(PublishError::TooLong { most });
        }
        let published_us = wall_us();
        if !self.segment.lock_events(log.head) {
            return Err(PublishError::Busy);
        }
        let outcome = log.publish(topic, name, data, published_us);
        wait::release(&log.head.lock);
        crash::point("event: lock released");
        if outcome.is_some() {
            announce(log.head);
        }
        if self.segment.map.is_lost() {
            return Err(PublishError::Lost); // only this process would see the event
        }
        outcome.ok_or(PublishError::TooManyTopics { most: self.segment.geometry.topics })
    }
}

impl SharedMemory {
    /// Takes the log's lock. As for a shard, after a timeout no caller waits for a live owner until the lock has been taken again.
    fn lock_events(&self, head: &EventsHead) -> bool {
        let suspect = head.suspect.load(Ordering::Relaxed) != 0;
        let Some(from_the_dead) = self.take_lock(&head.lock, suspect) else {
            head.suspect.store(1, Ordering::Relaxed);
            return false;
        };
        if head.suspect.load(Ordering::Relaxed) != 0 {
            head.suspect.store(0, Ordering::Relaxed);
        }
        if from_the_dead {
            head.counters.recoveries.fetch_add(1, Ordering::Relaxed);
        }
        true
    }
}

/// Wakes the readers that are waiting for events.
fn announce(head: &EventsHead) {
    let Some(before) = head.bell().ring() else { return };
    crash::point("event: counted");
    futex::wake(&head.sequence, i32::MAX);
    crash::point("event: others woken");
    head.bell().all_woken(before);
}

/// Operations that require the lock.
impl Log<'_> {
    /// Publishes an event and returns its id. Returns `None` if there is no room for the topic.
    fn publish(&self, topic: &str, name: &str, data: &[u8], published_us: u64) -> Option<u64> {
        self.check();
        self.link();
        let (cell_number, cell) = self.topics.find_or_make(topic, self.head)?;
        let id = cell.last_id.load(Ordering::Relaxed).saturating_add(1);
        let before = cell.last_at.load(Ordering::Relaxed);
        let draft = Draft { id, before, published_us, cell: cell_number, topic, name, data };
        let (head, size) = (self.head.head.load(Ordering::Relaxed), draft.size());
        let pad = if size > self.ring.left_from(head) { self.ring.left_from(head) } else { 0 };
        self.make_room(head + pad + size);
        crash::point("event: room made");
        if pad > 0 {
            self.ring.write_pad(head, pad)?;
        }
        self.ring.write(head + pad, &draft)?;
        crash::point("event: written");
        self.head.head.store(head + pad + size, Ordering::Release);
        crash::point("event: published");
        self.head.counters.published.fetch_add(1, Ordering::Relaxed);
        self.link();
        Some(id)
    }

    /// Raises the floor until everything up to `end` fits into the ring.
    fn make_room(&self, end: u64) {
        let head = self.head.head.load(Ordering::Relaxed);
        let mut floor = self.head.floor.load(Ordering::Relaxed);
        let mut evicted = 0;
        while end - floor > self.ring.len() {
            match self.ring.record(floor, head) {
                Some(record) => {
                    floor += record.size();
                    evicted += u64::from(matches!(record, Record::Event(_)));
                }
                None => {
                    // The death of a process cannot cause this state, so the log was overwritten.
                    self.head.counters.restarts.fetch_add(1, Ordering::Relaxed);
                    floor = head;
                }
            }
        }
        self.head.counters.evicted.fetch_add(evicted, Ordering::Relaxed);
        self.head.floor.store(floor, Ordering::Release);
        // A reader that observes anything written after this fence also observes the raised floor.
        fence(Ordering::Release);
    }

    /// Updates the topics' cells for the events beyond `linked`: for the event just published, and for an event whose publisher died.
    fn link(&self) {
        let head = self.head.head.load(Ordering::Relaxed);
        let mut at = self.head.linked.load(Ordering::Relaxed);
        while at < head {
            let Some(record) = self.ring.record(at, head) else { break };
            if let Record::Event(lies) = record
                && let Some(cell) = self.topics.cell(lies.topic)
            {
                latest_event::store(&cell.last_id, &cell.last_at, (lies.id, at));
            }
            at += record.size();
        }
        self.head.linked.store(head, Ordering::Release);
        crash::point("link: done");
    }

    /// Empties the log if its positions are invalid.
    fn check(&self) {
        let [floor, head, linked] =
            [&self.head.floor, &self.head.head, &self.head.linked].map(|position| position.load(Ordering::Relaxed));
        let is_sound = floor <= head
            && head - floor <= self.ring.len()
            && linked <= head
            && linked >= floor
            && head < 1 << 62
            && [floor, head, linked].iter().all(|position| *position >= GRAIN && position.is_multiple_of(GRAIN));
        if !is_sound {
            self.head.counters.restarts.fetch_add(1, Ordering::Relaxed);
            let anew = if head < 1 << 62 { head.next_multiple_of(GRAIN).max(GRAIN) } else { GRAIN };
            self.head.head.store(anew, Ordering::Release);
            self.head.linked.store(anew, Ordering::Release);
            self.head.floor.store(anew, Ordering::Release);
            fence(Ordering::Release);
        }
    }
}

/// Returns the current time in microseconds since 1970.
fn wall_us() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
}
