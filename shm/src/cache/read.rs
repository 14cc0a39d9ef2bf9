//! Reads entries without a lock.
//!
//! A reader follows a slot to an entry, copies what it needs, and then checks that the ring's floor is not above the entry. As long as the
//! floor is not above the entry, the entry does not change, because only bytes below the floor are overwritten. If the floor has passed the
//! entry, the copy is discarded and the lookup is repeated, because the entry may have been moved. After a few attempts, the lookup counts
//! as a miss.
//!
//! A reader writes only to its own member cell and to the visits of a slot, which are hints.
//!
//! Must not wait, or use a length before it has been checked.

use std::sync::atomic::{AtomicU64, Ordering, fence};

use super::entry::{Entry, Key};
use super::freshness::{Freshness, FreshnessCheck};
use super::index::{Place, Slot};
use super::shard::Shard;

/// Maximum number of attempts for a lookup whose entry was overwritten while it was read.
const TRIES: usize = 4;

/// An entry that was found without a lock. Any word in it may have changed since it was read, unless [`Sight::holds`] confirms it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sight<'s, 'a> {
    pub(crate) shard: &'s Shard<'a>,
    pub(crate) slot: Slot<'a>,
    pub(crate) place: Place,
    pub(crate) entry: Entry<'a>,
    pub(crate) freshness: Freshness,
}

impl<'a> Shard<'a> {
    /// Looks up a key and passes the entry to `take`. The result of `take` is used only if the entry was not overwritten during the call.
    /// `take` may be called several times, and returns `None` if it detects an overwritten entry itself.
    ///
    /// Also returns the number of times that the lookup was repeated.
    #[inline]
    pub(crate) fn look<R>(
        &self,
        key: Key<'_>,
        check: &FreshnessCheck<'_>,
        mut take: impl FnMut(&Sight<'_, 'a>) -> Option<R>,
    ) -> (Option<R>, usize) {
        for tries in 0..TRIES {
            let mut passed = false;
            let taken = self.index.find(key.hash, |slot, word| {
                let place = Place::of(word)?;
                if place.position < self.floor(place.ring).load(Ordering::Acquire) {
                    // The entry was removed from this slot, or moved during the lookup.
                    passed |= slot.word.load(Ordering::Acquire) != word;
                    return None;
                }
                let found = self.bytes(place.ring).entry(place.position);
                let largest = self.inner.geometry.max_record;
                let taken = found.filter(|entry| entry.size <= largest && entry.is_for(key)).and_then(|entry| {
                    let freshness = check.freshness_of(&entry);
                    take(&Sight { shard: self, slot, place, entry, freshness })
                });
                let holds = self.holds(place);
                passed |= !holds;
                taken.filter(|_| holds)
            });
            if taken.is_some() || !passed {
                return (taken, tries);
            }
        }
        (None, TRIES)
    }

    /// Whether the bytes read so far at a place belong to the entry stored there.
    pub(crate) fn holds(&self, place: Place) -> bool {
        // The reads of the entry happened before this load. If the floor is still not above the place, nothing was written there during the
        // reads.
        fence(Ordering::Acquire);
        self.floor(place.ring).load(Ordering::Acquire) <= place.position && !self.inner.map.is_lost()
    }
}

impl<'a> Sight<'_, 'a> {
    /// Whether everything read so far from the entry is valid.
    pub(crate) fn holds(&self) -> bool {
        self.shard.holds(self.place)
    }

    /// Returns the floor of the entry's ring.
    pub(crate) fn floor(&self) -> &'a AtomicU64 {
        self.shard.floor(self.place.ring)
    }
}
