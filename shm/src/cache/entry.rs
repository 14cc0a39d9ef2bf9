//! Serializes entries, and validates them when they are read.
//!
//! The bytes read here may be overwritten concurrently or corrupted by a process that breaks the protocol. All parts of an [`Entry`] are
//! guaranteed to lie within its ring. The reader must check afterwards whether their contents are still valid.
//!
//! Must not take locks. Must not change anything but the bytes of an entry that has not been published yet.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::memory::layout::{ENTRY_HEAD, EntryHead, GRAIN, KIND_ENTRY, KIND_PAD, RecordHead};
use crate::memory::map::Map;

/// A key to look up.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Key<'a> {
    pub(crate) bytes: &'a [u8],
    pub(crate) hash: u64,
}

/// An entry to be stored.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NewEntry<'a> {
    pub(crate) key: Key<'a>,
    pub(crate) meta: &'a [u8],
    pub(crate) value: &'a [u8],
    pub(crate) tags: &'a [u64],
    pub(crate) times: Times,
}

/// When an entry was stored, and how long it is valid. Fields whose names end in `_ms` are in milliseconds; times, unlike durations, are on
/// the segment's clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Times {
    /// The time on the tag clock before the rendering began.
    pub(crate) snapshot: u64,
    pub(crate) stored_ms: u64,
    /// When the entry expires; 0 means never.
    pub(crate) expires_ms: u64,
    /// How long after its expiry the entry may be served while it is being rendered again.
    pub(crate) stale_ms: u32,
    /// How long after its expiry the entry may be served if rendering fails.
    pub(crate) error_ms: u32,
    /// How long the rendering took.
    pub(crate) cost_ms: u32,
}

/// The location of one ring's bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bytes<'a> {
    pub(crate) map: &'a Map,
    pub(crate) at: u64,
    pub(crate) len: u64,
}

/// A record of any kind, as read from a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Record {
    pub(crate) is_entry: bool,
    pub(crate) size: u64,
}

/// An entry whose lengths have been checked.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Entry<'a> {
    pub(crate) words: &'a EntryHead,
    map: &'a Map,
    /// Offset in the segment.
    pub(crate) at: u64,
    pub(crate) size: u64,
    pub(crate) tag_count: u64,
    key_len: u64,
    meta_len: u64,
    pub(crate) value_len: u64,
}

impl NewEntry<'_> {
    /// Returns the size of the entry's record in bytes, or `None` if it exceeds `limit`.
    pub(crate) fn size(&self, limit: u64) -> Option<u64> {
        let tags = (self.tags.len() as u64).checked_mul(8)?;
        let key = (self.key.bytes.len() as u64).checked_next_multiple_of(8)?;
        let meta = (self.meta.len() as u64).checked_next_multiple_of(8)?;
        let head = ENTRY_HEAD.checked_add(tags)?.checked_add(key)?.checked_add(meta)?;
        let sum = head.checked_add(self.value.len() as u64)?;
        sum.checked_next_multiple_of(GRAIN).filter(|&size| size <= limit)
    }
}

impl<'a> Bytes<'a> {
    /// Returns the offset in the segment of a ring position.
    pub(crate) fn offset(self, position: u64) -> u64 {
        self.at + position % self.len.max(1)
    }

    /// Returns the number of bytes left in the ring at `position` if `size` bytes do not fit there, otherwise 0.
    pub(crate) fn pad_before(self, position: u64, size: u64) -> u64 {
        let left = self.left(position);
        if left < size { left } else { 0 }
    }

    fn left(self, position: u64) -> u64 {
        self.len - position % self.len.max(1)
    }

    /// Returns the record at a position, or `None` if the bytes are not a valid record.
    pub(crate) fn record(self, position: u64) -> Option<Record> {
        let words: &RecordHead = self.map.at(self.offset(position))?;
        let size = u64::from(words.size.load(Ordering::Relaxed));
        let is_entry = match words.kind.load(Ordering::Relaxed) {
            KIND_ENTRY => true,
            KIND_PAD => false,
            _ => return None,
        };
        let fits = size >= GRAIN && size.is_multiple_of(GRAIN) && size <= self.left(position);
        fits.then_some(Record { is_entry, size })
    }

    /// Returns the entry at a position, or `None` if the bytes are not a valid entry that was stored with this position.
    #[inline]
    pub(crate) fn entry(self, position: u64) -> Option<Entry<'a>> {
        let into = position % self.len.max(1);
        let at = self.at + into;
        let words: &EntryHead = self.map.at(at)?;
        let entry = Entry {
            words,
            map: self.map,
            at,
            size: u64::from(words.record.size.load(Ordering::Relaxed)),
            tag_count: u64::from(words.tag_count.load(Ordering::Relaxed)),
            key_len: u64::from(words.key_len.load(Ordering::Relaxed)),
            meta_len: u64::from(words.meta_len.load(Ordering::Relaxed)),
            value_len: words.value_len.load(Ordering::Relaxed),
        };
        let room = entry.size.checked_sub(entry.value_at() - at)?;
        let fits = entry.value_len <= room && entry.size <= self.len - into;
        let is_it = words.position.load(Ordering::Relaxed) == position
            && words.record.kind.load(Ordering::Relaxed) == KIND_ENTRY;
        (fits && is_it).then_some(entry)
    }

    /// Writes an entry at a position that is not visible to readers yet.
    pub(crate) fn write_entry(self, position: u64, new: &NewEntry<'_>, size: u64) -> Option<()> {
        let at = self.offset(position);
        let words: &EntryHead = self.map.at(at)?;
        let length = |len: usize| u32::try_from(len).ok();
        words.record.size.store(u32::try_from(size).ok()?, Ordering::Relaxed);
        words.record.kind.store(KIND_ENTRY, Ordering::Relaxed);
        words.hash.store(new.key.hash, Ordering::Relaxed);
        words.position.store(position, Ordering::Relaxed);
        words.snapshot.store(new.times.snapshot, Ordering::Relaxed);
        words.stored_ms.store(new.times.stored_ms, Ordering::Relaxed);
        words.expires_ms.store(new.times.expires_ms, Ordering::Relaxed);
        words.stale_ms.store(new.times.stale_ms, Ordering::Relaxed);
        words.error_ms.store(new.times.error_ms, Ordering::Relaxed);
        words.cost_ms.store(new.times.cost_ms, Ordering::Relaxed);
        words.tag_count.store(length(new.tags.len())?, Ordering::Relaxed);
        words.key_len.store(length(new.key.bytes.len())?, Ordering::Relaxed);
        words.meta_len.store(length(new.meta.len())?, Ordering::Relaxed);
        words.value_len.store(new.value.len() as u64, Ordering::Relaxed);

        let tags_at = at + ENTRY_HEAD;
        let tags: &[AtomicU64] = self.map.slice(tags_at, new.tags.len() as u64)?;
        for (slot, &tag) in tags.iter().zip(new.tags) {
            slot.store(tag, Ordering::Relaxed);
        }
        let key_at = tags_at + 8 * new.tags.len() as u64;
        self.map.write(key_at, new.key.bytes)?;
        let meta_at = key_at + (new.key.bytes.len() as u64).next_multiple_of(8);
        self.map.write(meta_at, new.meta)?;
        let value_at = meta_at + (new.meta.len() as u64).next_multiple_of(8);
        self.map.write(value_at, new.value)
    }

    /// Copies an entry to a position that is not visible to readers yet.
    pub(crate) fn copy_entry(self, from: &Entry<'_>, position: u64) -> Option<()> {
        let to = self.offset(position);
        self.map.shift(from.at, to, from.size)?;
        let words: &EntryHead = self.map.at(to)?;
        words.position.store(position, Ordering::Relaxed);
        Some(())
    }

    /// Writes a pad record.
    pub(crate) fn write_pad(self, position: u64, size: u64) -> Option<()> {
        let words: &RecordHead = self.map.at(self.offset(position))?;
        words.size.store(u32::try_from(size).ok()?, Ordering::Relaxed);
        words.kind.store(KIND_PAD, Ordering::Relaxed);
        Some(())
    }
}

impl<'a> Entry<'a> {
    pub(crate) fn hash(&self) -> u64 {
        self.words.hash.load(Ordering::Relaxed)
    }

    pub(crate) fn times(&self) -> Times {
        Times {
            snapshot: self.words.snapshot.load(Ordering::Relaxed),
            stored_ms: self.words.stored_ms.load(Ordering::Relaxed),
            expires_ms: self.words.expires_ms.load(Ordering::Relaxed),
            stale_ms: self.words.stale_ms.load(Ordering::Relaxed),
            error_ms: self.words.error_ms.load(Ordering::Relaxed),
            cost_ms: self.words.cost_ms.load(Ordering::Relaxed),
        }
    }

    /// Whether the entry is stored under this key.
    #[inline]
    pub(crate) fn is_for(&self, key: Key<'_>) -> bool {
        self.hash() == key.hash
            && self.key_len == key.bytes.len() as u64
            && self.map.equals(self.key_at(), key.bytes) == Some(true)
    }

    pub(crate) fn key_starts_with(&self, prefix: &[u8]) -> bool {
        self.key_len >= prefix.len() as u64 && self.map.equals(self.key_at(), prefix) == Some(true)
    }

    pub(crate) fn tags(&self) -> &'a [AtomicU64] {
        self.map.slice(self.at + ENTRY_HEAD, self.tag_count).unwrap_or_default()
    }

    /// Appends the key to `out`, which must have enough capacity.
    pub(crate) fn copy_key(&self, out: &mut Vec<u8>) -> Option<()> {
        self.map.read(self.key_at(), self.key_len, out)
    }

    pub(crate) fn key_len(&self) -> usize {
        usize::try_from(self.key_len).unwrap_or(usize::MAX)
    }

    /// Appends the metadata to `out`, which must have enough capacity.
    pub(crate) fn copy_meta(&self, out: &mut Vec<u8>) -> Option<()> {
        self.map.read(self.meta_at(), self.meta_len, out)
    }

    pub(crate) fn meta_len(&self) -> usize {
        usize::try_from(self.meta_len).unwrap_or(usize::MAX)
    }

    /// Appends the value to `out`, which must have enough capacity.
    pub(crate) fn copy_value(&self, out: &mut Vec<u8>) -> Option<()> {
        self.map.read(self.value_at(), self.value_len, out)
    }

    fn key_at(&self) -> u64 {
        self.at + ENTRY_HEAD + 8 * self.tag_count
    }

    fn meta_at(&self) -> u64 {
        self.key_at() + self.key_len.next_multiple_of(8)
    }

    pub(crate) fn value_at(&self) -> u64 {
        self.meta_at() + self.meta_len.next_multiple_of(8)
    }
}
