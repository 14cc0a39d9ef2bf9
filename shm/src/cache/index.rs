//! The index of a shard: buckets of seven slots. Each slot is one word that contains the location of an entry.
//!
//! A key has two buckets. A new entry is placed in the first bucket unless that bucket is full. Most lookups therefore access a single
//! cache line, which also contains the visits. A slot is changed by a single store, under the shard's lock. Readers load it without the
//! lock.
//!
//! A position identifies a byte in a ring's endless log and is never reused. A slot's word can therefore not refer to a different entry
//! while a reader is using it.
//!
//! Must not read entries.

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use crate::memory::layout::{Bucket, GRAIN, SLOTS};

/// Maximum number of visits that are counted for an entry.
pub(crate) const MAX_VISITS: u8 = 3;

const FINGERPRINT_SHIFT: u32 = 53;
const RING_SHIFT: u32 = 52;
const POSITION_MASK: u64 = (1 << RING_SHIFT) - 1;

/// One of the two rings of a shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ring {
    /// New entries.
    Small,
    /// Entries that have been requested since they were stored.
    Main,
}

/// The location of an entry: the decoded form of a slot's word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) ring: Ring,
    pub(crate) position: u64,
}

/// A slot and its visits.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Slot<'a> {
    pub(crate) number: u64,
    pub(crate) word: &'a AtomicU64,
    pub(crate) visits: &'a AtomicU8,
}

/// All slots of a shard.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Index<'a> {
    pub(crate) buckets: &'a [Bucket],
}

impl Ring {
    pub(crate) const BOTH: [Ring; 2] = [Ring::Small, Ring::Main];

    pub(crate) fn of<T>(self, pair: &[T; 2]) -> &T {
        match self {
            Ring::Small => &pair[0],
            Ring::Main => &pair[1],
        }
    }
}

impl Place {
    /// Returns the word for a slot. The word includes the fingerprint, which consists of some bits of the key's hash.
    pub(crate) fn word(self, hash: u64) -> u64 {
        let ring = match self.ring {
            Ring::Small => 0,
            Ring::Main => 1,
        };
        hash >> FINGERPRINT_SHIFT << FINGERPRINT_SHIFT | ring << RING_SHIFT | (self.position / GRAIN)
    }

    /// Decodes a slot's word. Returns `None` if the slot is free.
    pub(crate) fn of(word: u64) -> Option<Place> {
        let ring = if word >> RING_SHIFT & 1 == 0 { Ring::Small } else { Ring::Main };
        (word != 0).then_some(Place { ring, position: (word & POSITION_MASK) * GRAIN })
    }
}

impl<'a> Index<'a> {
    /// Returns the slots that may hold an entry with this hash, beginning with the slots in its first bucket.
    pub(crate) fn candidates(self, hash: u64) -> impl Iterator<Item = Slot<'a>> {
        [self.first(hash), self.second(hash)]
            .into_iter()
            .flat_map(move |bucket| (0..SLOTS).filter_map(move |at| self.slot_in(bucket, at)))
    }

    /// Calls `visit` for each candidate slot whose fingerprint matches this hash, until `visit` returns `Some`.
    ///
    /// Every lookup runs this function, so it is a simple loop over two cache lines.
    pub(crate) fn find<R>(self, hash: u64, mut visit: impl FnMut(Slot<'a>, u64) -> Option<R>) -> Option<R> {
        let first = self.first(hash);
        self.find_in(first, hash, &mut visit).or_else(|| self.find_in(self.second(hash), hash, &mut visit))
    }

    #[inline]
    fn find_in<R>(self, bucket: usize, hash: u64, visit: &mut impl FnMut(Slot<'a>, u64) -> Option<R>) -> Option<R> {
        let cells = self.buckets.get(bucket)?;
        let words = cells.slots.each_ref().map(|slot| slot.load(Ordering::Acquire));
        // All seven words are compared at once, because the matching slot cannot be predicted, and a mispredicted branch costs more than
        // seven comparisons.
        let matches = words.map(|word| u32::from((word ^ hash) >> FINGERPRINT_SHIFT == 0));
        let mut mask = matches.iter().enumerate().fold(0, |mask, (at, is_match)| mask | is_match << at);
        while mask != 0 {
            let at = mask.trailing_zeros() as usize;
            mask &= mask - 1;
            let slot = Slot {
                number: (bucket * SLOTS + at) as u64,
                word: cells.slots.get(at)?,
                visits: cells.visits.get(at)?,
            };
            // A free slot looks like a slot with fingerprint 0, and does not lead to an entry.
            if let Some(result) = words.get(at).and_then(|&word| visit(slot, word)) {
                return Some(result);
            }
        }
        None
    }

    pub(crate) fn len(self) -> u64 {
        (self.buckets.len() * SLOTS) as u64
    }

    /// Returns the slot with this number.
    pub(crate) fn slot(self, number: u64) -> Option<Slot<'a>> {
        let at = usize::try_from(number % SLOTS as u64).ok()?;
        self.slot_in(usize::try_from(number / SLOTS as u64).ok()?, at)
    }

    fn slot_in(self, bucket: usize, at: usize) -> Option<Slot<'a>> {
        let cells = self.buckets.get(bucket)?;
        let (word, visits) = (cells.slots.get(at)?, cells.visits.get(at)?);
        Some(Slot { number: (bucket * SLOTS + at) as u64, word, visits })
    }

    fn first(self, hash: u64) -> usize {
        scaled(hash, self.buckets.len())
    }

    fn second(self, hash: u64) -> usize {
        let count = self.buckets.len();
        // The high bits, which choose the shard and form the fingerprint, are reused here after mixing.
        let second = scaled((hash ^ hash >> 32).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32, count);
        if second == self.first(hash) { (second + 1) % count.max(1) } else { second }
    }
}

impl Slot<'_> {
    /// Counts a request for the entry. Does not store at the maximum, so that the cache line of a popular page is not invalidated.
    pub(crate) fn visit(self) {
        let visits = self.visits.load(Ordering::Relaxed);
        if visits < MAX_VISITS {
            self.visits.store(visits + 1, Ordering::Relaxed);
        }
    }
}

/// Scales the low half of `hash` to `0..count`.
fn scaled(hash: u64, count: usize) -> usize {
    usize::try_from(((hash & 0xffff_ffff) * count as u64) >> 32).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_survives_its_word() {
        for ring in Ring::BOTH {
            for position in [GRAIN, 4096, GRAIN * POSITION_MASK] {
                let place = Place { ring, position };
                for hash in [0, 1, u64::MAX, 0x1234_5678_9abc_def0] {
                    let word = place.word(hash);
                    assert_eq!(Place::of(word), Some(place));
                    assert_eq!(word >> FINGERPRINT_SHIFT, hash >> FINGERPRINT_SHIFT);
                }
            }
        }
        assert_eq!(Place::of(0), None);
    }
}
