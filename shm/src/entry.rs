//! Records and entries as bytes: how they are written, and what is checked before one is believed.
//!
//! Whatever is read here may have been left half done by a process that died, or spoilt by one that did not. What
//! comes out, an [`Entry`], lies wholly between tail and head, and its parts lie wholly inside it.
//!
//! May not: change the shard's own words; only bytes beyond the head are written.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::layout::{ENTRY_HEAD, EntryHead, GRAIN, KIND_DEAD, KIND_LIVE, KIND_MASK, KIND_PAD, RecordHead, VISITED};
use crate::map::Map;
use crate::ring::{Corrupt, LockedShard};

/// What is looked for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Key<'a> {
    pub(crate) bytes: &'a [u8],
    pub(crate) hash: u64,
}

/// A live entry whose words have been checked.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Entry<'a> {
    pub(crate) words: &'a EntryHead,
    /// Offset in the segment.
    pub(crate) at: u64,
    pub(crate) size: u64,
    tag_count: u64,
    pub(crate) key_len: u64,
    pub(crate) value_len: u64,
}

/// A record of any kind.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Record {
    pub(crate) kind: u32,
    pub(crate) visited: bool,
    pub(crate) size: u64,
}

/// An entry to be stored.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NewEntry<'a> {
    pub(crate) key: Key<'a>,
    pub(crate) value: &'a [u8],
    pub(crate) tags: &'a [u64],
    pub(crate) snapshot: u64,
    pub(crate) expires_ms: u64,
}

impl NewEntry<'_> {
    /// The bytes its record takes, or `None` if that is more than `limit`.
    pub(crate) fn size(&self, limit: u64) -> Option<u64> {
        let tags = (self.tags.len() as u64).checked_mul(8)?;
        let key = (self.key.bytes.len() as u64).checked_next_multiple_of(8)?;
        let sum = ENTRY_HEAD.checked_add(tags)?.checked_add(key)?.checked_add(self.value.len() as u64)?;
        sum.checked_next_multiple_of(GRAIN).filter(|&size| size <= limit)
    }
}

impl<'a> LockedShard<'a> {
    /// Writes an entry beyond the head, where nobody looks yet.
    pub(crate) fn write_entry(&self, position: u64, new: &NewEntry<'_>, size: u64) -> Result<&'a EntryHead, Corrupt> {
        let at = self.offset(position);
        let words: &EntryHead = self.shard.map.at(at).ok_or(Corrupt)?;
        let length = |len: usize| u32::try_from(len).map_err(|_| Corrupt);
        words.record.size.store(u32::try_from(size).map_err(|_| Corrupt)?, Ordering::Relaxed);
        words.record.flags.store(KIND_LIVE, Ordering::Relaxed);
        words.hash.store(new.key.hash, Ordering::Relaxed);
        words.next.store(0, Ordering::Relaxed);
        words.position.store(position, Ordering::Relaxed);
        words.expires_ms.store(new.expires_ms, Ordering::Relaxed);
        words.snapshot.store(new.snapshot, Ordering::Relaxed);
        words.key_len.store(length(new.key.bytes.len())?, Ordering::Relaxed);
        words.tag_count.store(length(new.tags.len())?, Ordering::Relaxed);
        words.value_len.store(new.value.len() as u64, Ordering::Relaxed);

        let tags_at = at + ENTRY_HEAD;
        let tags: &[AtomicU64] = self.shard.map.slice(tags_at, new.tags.len() as u64).ok_or(Corrupt)?;
        for (slot, &tag) in tags.iter().zip(new.tags) {
            slot.store(tag, Ordering::Relaxed);
        }
        let key_at = tags_at + 8 * new.tags.len() as u64;
        self.shard.map.write(key_at, new.key.bytes).ok_or(Corrupt)?;
        let value_at = key_at + (new.key.bytes.len() as u64).next_multiple_of(8);
        self.shard.map.write(value_at, new.value).ok_or(Corrupt)?;
        Ok(words)
    }

    /// Tail and head, if they can be true.
    pub(crate) fn bounds(&self) -> Result<(u64, u64), Corrupt> {
        let tail = self.shard.head.tail.load(Ordering::Relaxed);
        let head = self.shard.head.head.load(Ordering::Relaxed);
        let sane = tail <= head
            && head - tail <= self.shard.ring_len
            && tail >= self.shard.ring_len
            && head < u64::MAX / 2
            && tail.is_multiple_of(GRAIN)
            && head.is_multiple_of(GRAIN);
        if sane { Ok((tail, head)) } else { Err(Corrupt) }
    }

    /// The record at a position, which must lie between tail and head.
    pub(crate) fn record(&self, position: u64) -> Result<Record, Corrupt> {
        let (tail, head) = self.bounds()?;
        if position < tail || position >= head || !position.is_multiple_of(GRAIN) {
            return Err(Corrupt);
        }
        let words: &RecordHead = self.shard.map.at(self.offset(position)).ok_or(Corrupt)?;
        let flags = words.flags.load(Ordering::Relaxed);
        let size = u64::from(words.size.load(Ordering::Relaxed));
        let kind = flags & KIND_MASK;
        let fits = size >= GRAIN
            && size.is_multiple_of(GRAIN)
            && size <= head - position
            && size <= self.shard.ring_len - position % self.shard.ring_len;
        if !fits || !matches!(kind, KIND_LIVE | KIND_DEAD | KIND_PAD) {
            return Err(Corrupt);
        }
        Ok(Record { kind, visited: flags & VISITED != 0, size })
    }

    /// The live entry at a position, which must lie between tail and head.
    pub(crate) fn entry(&self, position: u64) -> Result<Entry<'a>, Corrupt> {
        let record = self.record(position)?;
        if record.kind != KIND_LIVE || record.size < ENTRY_HEAD {
            return Err(Corrupt);
        }
        let at = self.offset(position);
        let words: &EntryHead = self.shard.map.at(at).ok_or(Corrupt)?;
        let entry = Entry {
            words,
            at,
            size: record.size,
            tag_count: u64::from(words.tag_count.load(Ordering::Relaxed)),
            key_len: u64::from(words.key_len.load(Ordering::Relaxed)),
            value_len: words.value_len.load(Ordering::Relaxed),
        };
        let end = (entry.value_at() - at).checked_add(entry.value_len).ok_or(Corrupt)?;
        if end > entry.size || words.position.load(Ordering::Relaxed) != position {
            return Err(Corrupt);
        }
        Ok(entry)
    }

    pub(crate) fn bucket(&self, hash: u64) -> Result<&'a AtomicU64, Corrupt> {
        let mask = (self.shard.buckets.len() as u64).wrapping_sub(1);
        let index = usize::try_from(hash & mask).map_err(|_| Corrupt)?;
        self.shard.buckets.get(index).ok_or(Corrupt)
    }

    /// The key's bytes, appended to `out`.
    pub(crate) fn copy_key(&self, entry: &Entry<'_>, out: &mut Vec<u8>) -> Result<(), Corrupt> {
        self.shard.map.read(entry.key_at(), entry.key_len, out).ok_or(Corrupt)
    }

    /// More entries than this cannot be in the ring.
    pub(crate) fn most_entries(&self) -> u64 {
        self.shard.ring_len / ENTRY_HEAD
    }

    /// What is left of the ring at `head` if `size` bytes do not fit there.
    pub(crate) fn pad_before(&self, head: u64, size: u64) -> u64 {
        let left = self.shard.ring_len - head % self.shard.ring_len;
        if left < size { left } else { 0 }
    }

    pub(crate) fn offset(&self, position: u64) -> u64 {
        self.shard.ring_at + position % self.shard.ring_len
    }
}

impl<'a> Entry<'a> {
    pub(crate) fn key_at(&self) -> u64 {
        self.at + ENTRY_HEAD + 8 * self.tag_count
    }

    pub(crate) fn value_at(&self) -> u64 {
        self.key_at() + self.key_len.next_multiple_of(8)
    }

    pub(crate) fn tags(&self, map: &'a Map) -> Result<&'a [AtomicU64], Corrupt> {
        map.slice(self.at + ENTRY_HEAD, self.tag_count).ok_or(Corrupt)
    }
}
