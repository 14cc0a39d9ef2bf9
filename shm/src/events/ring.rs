//! Reads and writes records in the ring, and checks what is read.
//!
//! Positions are endless; the offset in the ring is the position modulo the length of the ring. A record never crosses the end of the ring:
//! a pad fills the space left there.
//!
//! Must not use a length before it has been checked. Does not determine whether what was read is still valid.

use std::sync::atomic::Ordering;

use crate::memory::layout::{EVENT_HEAD, EventHead, GRAIN, KIND_EVENT, KIND_PAD, RecordHead, TOPIC_BYTES};
use crate::memory::map::Map;

#[derive(Clone, Copy, Debug)]
pub(super) struct Ring<'a> {
    map: &'a Map,
    at: u64,
    len: u64,
}

/// The head of a record, as read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Record {
    Pad { size: u64 },
    Event(Lies),
}

/// An event and the location of its parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Lies {
    pub(super) size: u64,
    pub(super) id: u64,
    pub(super) before: u64,
    pub(super) published_us: u64,
    pub(super) topic: u32,
    pub(super) topic_len: u64,
    pub(super) name_len: u64,
    pub(super) data_len: u64,
}

impl Record {
    pub(super) fn size(&self) -> u64 {
        match *self {
            Self::Pad { size } | Self::Event(Lies { size, .. }) => size,
        }
    }
}

/// An event to be written.
#[derive(Clone, Copy, Debug)]
pub(super) struct Draft<'d> {
    pub(super) id: u64,
    pub(super) before: u64,
    pub(super) published_us: u64,
    pub(super) cell: u32,
    pub(super) topic: &'d str,
    pub(super) name: &'d str,
    pub(super) data: &'d [u8],
}

impl Draft<'_> {
    pub(super) fn size(&self) -> u64 {
        let parts = self.topic.len() + self.name.len() + self.data.len();
        (EVENT_HEAD + parts as u64).next_multiple_of(GRAIN)
    }
}

impl<'a> Ring<'a> {
    pub(super) fn new(map: &'a Map, at: u64, len: u64) -> Ring<'a> {
        Ring { map, at, len }
    }

    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// Returns the number of bytes from a position to the end of the ring.
    pub(super) fn left_from(&self, position: u64) -> u64 {
        self.len - position % self.len
    }

    fn offset(&self, position: u64) -> u64 {
        self.at + position % self.len
    }

    /// Returns the record at a position, if it is valid and ends at or before `head`.
    pub(super) fn record(&self, position: u64, head: u64) -> Option<Record> {
        let record: &RecordHead = self.map.at(self.offset(position))?;
        let size = u64::from(record.size.load(Ordering::Relaxed));
        let room = head.saturating_sub(position).min(self.left_from(position));
        if size == 0 || !size.is_multiple_of(GRAIN) || size > room {
            return None;
        }
        match record.kind.load(Ordering::Relaxed) {
            KIND_PAD => Some(Record::Pad { size }),
            KIND_EVENT => self.event(position, size).map(Record::Event),
            _ => None,
        }
    }

    fn event(&self, position: u64, size: u64) -> Option<Lies> {
        let event: &EventHead = self.map.at(self.offset(position))?;
        let word = |word: &std::sync::atomic::AtomicU32| u64::from(word.load(Ordering::Relaxed));
        let lies = Lies {
            size,
            id: event.id.load(Ordering::Relaxed),
            before: event.before.load(Ordering::Relaxed),
            published_us: event.published_us.load(Ordering::Relaxed),
            topic: event.topic.load(Ordering::Relaxed),
            topic_len: word(&event.topic_len),
            name_len: word(&event.name_len),
            data_len: word(&event.data_len),
        };
        let parts = lies.topic_len + lies.name_len + lies.data_len;
        let is_one = event.position.load(Ordering::Relaxed) == position
            && lies.before < position
            && lies.topic_len <= TOPIC_BYTES as u64
            && size == (EVENT_HEAD + parts).next_multiple_of(GRAIN);
        is_one.then_some(lies)
    }

    /// Whether an event belongs to this topic.
    pub(super) fn is_of(&self, position: u64, lies: &Lies, topic: &str) -> bool {
        let at = self.offset(position) + EVENT_HEAD;
        lies.topic_len == topic.len() as u64 && self.map.equals(at, topic.as_bytes()) == Some(true)
    }

    /// Copies the topic, name and data, one after the other.
    pub(super) fn copy(&self, position: u64, lies: &Lies) -> Option<Vec<u8>> {
        let length = lies.topic_len + lies.name_len + lies.data_len;
        let mut bytes = Vec::with_capacity(usize::try_from(length).ok()?);
        self.map.read(self.offset(position) + EVENT_HEAD, length, &mut bytes)?;
        Some(bytes)
    }

    /// Writes a pad at a position that is not visible to readers yet.
    pub(super) fn write_pad(&self, position: u64, size: u64) -> Option<()> {
        let record: &RecordHead = self.map.at(self.offset(position))?;
        record.size.store(u32::try_from(size).ok()?, Ordering::Relaxed);
        record.kind.store(KIND_PAD, Ordering::Relaxed);
        Some(())
    }

    /// Writes an event at a position that is not visible to readers yet.
    pub(super) fn write(&self, position: u64, draft: &Draft<'_>) -> Option<()> {
        let event: &EventHead = self.map.at(self.offset(position))?;
        let length = |part: usize| u32::try_from(part).ok();
        event.record.size.store(u32::try_from(draft.size()).ok()?, Ordering::Relaxed);
        event.record.kind.store(KIND_EVENT, Ordering::Relaxed);
        event.position.store(position, Ordering::Relaxed);
        event.id.store(draft.id, Ordering::Relaxed);
        event.before.store(draft.before, Ordering::Relaxed);
        event.published_us.store(draft.published_us, Ordering::Relaxed);
        event.topic.store(draft.cell, Ordering::Relaxed);
        event.topic_len.store(length(draft.topic.len())?, Ordering::Relaxed);
        event.name_len.store(length(draft.name.len())?, Ordering::Relaxed);
        event.data_len.store(length(draft.data.len())?, Ordering::Relaxed);
        let mut at = self.offset(position) + EVENT_HEAD;
        for part in [draft.topic.as_bytes(), draft.name.as_bytes(), draft.data] {
            self.map.write(at, part)?;
            at += part.len() as u64;
        }
        Some(())
    }
}
