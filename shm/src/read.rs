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

use std::sync::atomic::{Ordering, fence};

use crate::entry::{Entry, Key};
use crate::index::{Place, Slot};
use crate::judge::{Judge, Verdict};
use crate::shard::Shard;

/// A lookup is begun again when the entry was overwritten meanwhile, so many times at most.
const TRIES: usize = 4;

/// An entry found without a lock: every word of it may have changed by now, until [`Sight::holds`] says otherwise.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sight<'a> {
    pub(crate) slot: Slot<'a>,
    pub(crate) place: Place,
    pub(crate) entry: Entry<'a>,
    pub(crate) verdict: Verdict,
    shard: Shard<'a>,
}

/// What a lookup came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Looked<R> {
    /// There was an entry, which held while it was looked at.
    At(R),
    Nothing,
}

impl<'a> Shard<'a> {
    /// Looks a key up and has `use_it` take what it wants from the entry. What that returns counts if the entry held until
    /// then; it may run several times.
    pub(crate) fn look<R>(
        &self,
        key: Key<'_>,
        judge: &Judge<'_>,
        mut use_it: impl FnMut(&Sight<'a>) -> Option<R>,
    ) -> (Looked<R>, usize) {
        for tries in 0..TRIES {
            match self.sight(key, judge) {
                Ok(None) => return (Looked::Nothing, tries),
                Ok(Some(sight)) => {
                    if let Some(result) = use_it(&sight)
                        && sight.holds()
                    {
                        return (Looked::At(result), tries);
                    }
                }
                Err(Passed) => {}
            }
        }
        (Looked::Nothing, TRIES)
    }

    /// The entry of a key, which held when its words were read.
    fn sight(&self, key: Key<'_>, judge: &Judge<'_>) -> Result<Option<Sight<'a>>, Passed> {
        let mut passed = false;
        for (slot, word) in self.index.matches(key.hash) {
            let Some(place) = Place::of(word) else { continue };
            if place.position < self.floor(place.ring).load(Ordering::Acquire) {
                // Nothing is stored here any more, or it was moved while we looked.
                passed |= slot.word.load(Ordering::Acquire) != word;
                continue;
            }
            let found = self.bytes(place.ring).entry(place.position);
            let largest = self.inner.geometry.max_record;
            let is_it = found.filter(|entry| entry.size <= largest && entry.is_for(key));
            let sight = is_it.map(|entry| {
                let verdict = judge.verdict(&entry);
                Sight { slot, place, entry, verdict, shard: *self }
            });
            if !self.holds(place) {
                passed = true;
            } else if sight.is_some() {
                return Ok(sight);
            }
        }
        if passed { Err(Passed) } else { Ok(None) }
    }

    /// Whether what was read at a place so far is what was written there.
    fn holds(&self, place: Place) -> bool {
        // The reads before this one happened before it, so a floor that is still below means that nobody wrote then.
        fence(Ordering::Acquire);
        self.floor(place.ring).load(Ordering::Acquire) <= place.position
    }
}

/// The floor passed over what was being looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Passed;

impl Sight<'_> {
    /// Whether all that was read of the entry so far is true.
    pub(crate) fn holds(&self) -> bool {
        self.shard.holds(self.place)
    }
}

impl<'a> Sight<'a> {
    /// The floor that the entry has to stay above.
    pub(crate) fn floor(&self) -> &'a std::sync::atomic::AtomicU64 {
        self.shard.floor(self.place.ring)
    }
}
