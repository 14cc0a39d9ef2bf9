//! The table of topics, with the position of the latest event of each.
//!
//! The search for a topic starts at the cell selected by the topic's hash and ends at a cell that has never been used.
//! A cell whose topic was replaced, or whose writer died, remains marked as used, so that searches do not end there.
//!
//! Readers search without a lock, and check the name again after they have read the cell.
//!
//! Must not wait. Must not refuse a topic because other topics fill the table.

use std::sync::atomic::{Ordering, fence};

use xxhash_rust::xxh3::xxh3_64;

use crate::crash;
use crate::memory::SharedMemory;
use crate::memory::layout::{EVENTS_HEAD, EventsHead, TOPIC_BYTES, TOPIC_CELL, TopicCell};
use crate::memory::map::Map;
use crate::protocols::latest_event;

/// Value of the length in a used cell that contains no topic.
const GIVEN_UP: u32 = u32::MAX;
const TEXT_AT: u64 = 32;

#[derive(Clone, Copy, Debug)]
pub(super) struct Topics<'a> {
    map: &'a Map,
    at: u64,
    cells: &'a [TopicCell],
}

impl<'a> Topics<'a> {
    pub(super) fn of(segment: &'a SharedMemory) -> Option<Topics<'a>> {
        let at = segment.geometry.events_at + EVENTS_HEAD;
        Some(Topics { map: &segment.map, at, cells: segment.map.slice(at, segment.geometry.topics)? })
    }

    /// Whether a name is valid: 1 to 128 bytes without control characters.
    pub(super) fn is_name(topic: &str) -> bool {
        (1..=TOPIC_BYTES).contains(&topic.len()) && !topic.chars().any(char::is_control)
    }

    pub(super) fn cell(&self, index: u32) -> Option<&'a TopicCell> {
        self.cells.get(index as usize)
    }

    /// Returns the names of all topics.
    pub(super) fn names(&self) -> impl Iterator<Item = String> {
        let all = self.cells.iter().zip(0_u64..);
        all.filter_map(|(cell, index)| {
            let length = cell.length.load(Ordering::Acquire);
            let length = usize::try_from(length).ok().filter(|length| (1..=TOPIC_BYTES).contains(length))?;
            let mut text = Vec::with_capacity(length);
            self.map.read(self.text_at(index), length as u64, &mut text)?;
            String::from_utf8(text).ok()
        })
    }

    /// Returns the id of a topic's latest event, and the position of that event or of a later one.
    pub(super) fn last(&self, topic: &str) -> Option<(u64, u64)> {
        let (number, cell) = self.search(topic).0?;
        let last = latest_event::load(&cell.last_id, &cell.last_at);
        // If the cell belonged to a different topic when it was read, the check of the name fails.
        self.is(number, cell, topic, xxh3_64(topic.as_bytes())).then_some(last)
    }

    /// Whether a cell contains this topic.
    fn is(&self, number: u32, cell: &TopicCell, topic: &str, hash: u64) -> bool {
        cell.length.load(Ordering::Acquire) as usize == topic.len()
            && cell.hash.load(Ordering::Relaxed) == hash
            && self.map.equals(self.text_at(number.into()), topic.as_bytes()) == Some(true)
    }

    /// Returns the cell of a topic. If there is none, returns the never-used cell at which the search ended.
    fn search(&self, topic: &str) -> (Option<(u32, &'a TopicCell)>, Option<u32>) {
        let hash = xxh3_64(topic.as_bytes());
        let count = self.cells.len();
        let first = usize::try_from(hash % (count as u64).max(1)).unwrap_or(0);
        for step in 0..count {
            let index = (first + step) % count;
            let (Some(cell), Ok(number)) = (self.cells.get(index), u32::try_from(index)) else { break };
            if cell.length.load(Ordering::Acquire) == 0 {
                return (None, Some(number));
            }
            if self.is(number, cell, topic, hash) {
                return (Some((number, cell)), None);
            }
        }
        (None, None)
    }

    /// Returns the cell of a topic. A new topic receives a free cell, or replaces the topic that has been idle for longest. Returns `None`
    /// if the table has no cells or lies outside the memory. Requires the lock, and cells that are up to date.
    pub(super) fn find_or_make(&self, topic: &str, head: &EventsHead) -> Option<(u32, &'a TopicCell)> {
        let (found, unused) = self.search(topic);
        if found.is_some() {
            return found;
        }
        let index = match unused {
            Some(unused) => unused,
            None => self.idle_longest()?,
        };
        let cell = self.cell(index)?;
        if cell.length.load(Ordering::Relaxed) != 0 {
            let retired = cell.last_id.load(Ordering::Relaxed).max(head.retired.load(Ordering::Relaxed));
            head.retired.store(retired, Ordering::Release);
            crash::point("topic: retired");
        }
        cell.length.store(GIVEN_UP, Ordering::Release);
        // A reader that observes anything written after this fence also observes that the name is gone.
        fence(Ordering::Release);
        crash::point("topic: cell taken");
        cell.last_at.store(0, Ordering::Relaxed);
        cell.last_id.store(head.retired.load(Ordering::Relaxed), Ordering::Relaxed);
        cell.hash.store(xxh3_64(topic.as_bytes()), Ordering::Relaxed);
        self.map.write(self.text_at(index.into()), topic.as_bytes())?;
        crash::point("topic: written");
        cell.length.store(u32::try_from(topic.len()).ok()?, Ordering::Release);
        crash::point("topic: made");
        Some((index, cell))
    }

    /// Returns a cell without a topic, or else the cell whose last event is the oldest, whether or not that event is still in the log.
    fn idle_longest(&self) -> Option<u32> {
        let last_at = |cell: &TopicCell| match cell.length.load(Ordering::Relaxed) {
            GIVEN_UP => 0,
            _ => cell.last_at.load(Ordering::Relaxed),
        };
        (0_u32..).zip(self.cells).min_by_key(|(_, cell)| last_at(cell)).map(|(index, _)| index)
    }

    fn text_at(&self, index: u64) -> u64 {
        self.at + index * TOPIC_CELL + TEXT_AT
    }
}
