//! Reading without a lock.
//!
//! A reader follows a slot to an entry, copies what it wants, and then looks whether the ring's floor is still below the entry.
//! An entry does not change as long as that holds: only what lies below the floor is ever written again. If the
//! floor has passed, what was copied is thrown away and the key is looked up again, as the entry may have been moved;
//! after a few times it counts as a miss.
//!
//! The only stores a reader makes go to its own member cell, and to the visits of a slot, which are a hint.
//!
//! May not: wait, or believe a length before it is checked.

use std::sync::atomic::{AtomicU64, Ordering, fence};

use super::entry::{Entry, Key};
use super::freshness::{Judge, Verdict};
use super::index::{Place, Slot};
use super::shard::Shard;

/// A lookup is begun again when the entry was overwritten meanwhile, so many times at most.
const TRIES: usize = 4;

/// An entry found without a lock: every word of it may have changed by now, until [`Sight::holds`] says otherwise.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sight<'s, 'a> {
    pub(crate) shard: &'s Shard<'a>,
    pub(crate) slot: Slot<'a>,
    pub(crate) place: Place,
    pub(crate) entry: Entry<'a>,
    pub(crate) verdict: Verdict,
}

impl<'a> Shard<'a> {
    /// Looks a key up and has `take` take what it wants from the entry; what that returns counts if the entry held until then.
    /// It may run several times, and returns `None` if it found out by itself that the entry does not hold.
    ///
    /// Also returns how often the entry had to be looked up again.
    #[inline]
    pub(crate) fn look<R>(
        &self,
        key: Key<'_>,
        judge: &Judge<'_>,
        mut take: impl FnMut(&Sight<'_, 'a>) -> Option<R>,
    ) -> (Option<R>, usize) {
        for tries in 0..TRIES {
            let mut passed = false;
            let taken = self.index.find(key.hash, |slot, word| {
                let place = Place::of(word)?;
                if place.position < self.floor(place.ring).load(Ordering::Acquire) {
                    // Nothing is stored here any more, or it was moved while we looked.
                    passed |= slot.word.load(Ordering::Acquire) != word;
                    return None;
                }
                let found = self.bytes(place.ring).entry(place.position);
                let largest = self.inner.geometry.max_record;
                let taken = found.filter(|entry| entry.size <= largest && entry.is_for(key)).and_then(|entry| {
                    let verdict = judge.verdict(&entry);
                    take(&Sight { shard: self, slot, place, entry, verdict })
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

    /// Whether what was read at a place so far is what was written there.
    pub(crate) fn holds(&self, place: Place) -> bool {
        // The reads before this one happened before it, so a floor that is still below means that nobody wrote then.
        fence(Ordering::Acquire);
        self.floor(place.ring).load(Ordering::Acquire) <= place.position && !self.inner.map.is_lost()
    }
}

impl<'a> Sight<'_, 'a> {
    /// Whether all that was read of the entry so far is true.
    pub(crate) fn holds(&self) -> bool {
        self.shard.holds(self.place)
    }

    /// The floor that the entry has to stay above.
    pub(crate) fn floor(&self) -> &'a AtomicU64 {
        self.shard.floor(self.place.ring)
    }
}
