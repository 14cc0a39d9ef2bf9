//! One shard: an index, two rings of entries, and the lock for writers.
//!
//! Readers need no lock; their code is in `read.rs`. A writer holds the shard's lock and orders its stores so that the shard is consistent
//! after every single store. It is consistent both for readers and, if the writer dies, for the next owner of the lock:
//!
//! - A new entry's bytes are written beyond the ring's head, where no reader looks. Raising the head makes the bytes part of the log, where
//!   they have no effect until a slot leads to them.
//! - Storing a slot's word ([`LockedShard::change_slot`]) publishes, moves or removes an entry. The accounting of live bytes and entries
//!   (`books`) is updated after that store. An *intent* is written before both, so that the next owner of the lock can complete the update.
//! - Bytes are free when the ring's floor is above them. A reader checks the floor after it has copied an entry, so the floor is raised
//!   before any byte is overwritten (`eviction.rs`).
//!
//! Nothing that is read from shared memory is trusted: each position, size and link is checked, and each loop is bounded. An inconsistency
//! is reported as [`Corrupt`], and the shard is then emptied.
//!
//! While the lock is held, this code must not wait for another lock, allocate, or make a system call.

use std::sync::atomic::{AtomicU64, Ordering, fence};

use super::entry::{Bytes, Entry, Key, NewEntry};
use super::freshness::{Freshness, FreshnessCheck};
use super::ghosts;
use super::index::{Index, Place, Ring, Slot};
use crate::crash::{self, Recovery};
use crate::memory::SharedMemory;
use crate::memory::layout::{BUCKET_BYTES, Counters, GRAIN, GhostBucket, SHARD_HEAD, ShardHead};
use crate::memory::wait;

/// Upper bound for positions. A slot has 52 bits for a position, in units of 32 bytes.
const LAST_POSITION: u64 = 1 << 56;
/// Maximum number of suspects recorded while a shard is locked.
const SUSPECTS: usize = 8;

/// The shard is inconsistent and has to be emptied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Corrupt;

/// The lock could not be taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NotLocked;

/// A reference to a shard. It is cheap to create and holds no lock.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shard<'a> {
    pub(crate) inner: &'a SharedMemory,
    pub(crate) number: u64,
    pub(crate) head: &'a ShardHead,
    pub(crate) index: Index<'a>,
    at: u64,
}

/// A shard whose lock is held. The lock is released on drop.
#[derive(Debug)]
pub(crate) struct LockedShard<'a> {
    pub(crate) shard: Shard<'a>,
    /// Members that may be dead and whose pins were in the way.
    suspects: [Option<u32>; SUSPECTS],
}

/// The accounting: the number of live bytes and entries in each ring.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Books {
    pub(crate) bytes: [u64; 2],
    pub(crate) entries: [u64; 2],
}

/// The result of storing an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stored {
    Yes,
    /// Pinned entries leave no room for the entry.
    NoRoom,
}

/// An entry, and the slot that leads to it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LocatedEntry<'a> {
    pub(crate) slot: Slot<'a>,
    pub(crate) place: Place,
    pub(crate) entry: Entry<'a>,
}

const ARMED_SLOT: u64 = 1;
const ARMED_EMPTY: u64 = 2;
const ARMED_LOSE: u64 = 3;

impl<'a> Shard<'a> {
    /// Returns the shard with this number, or `None` if the segment has no such shard.
    pub(crate) fn of(inner: &'a SharedMemory, number: u64) -> Option<Shard<'a>> {
        let geometry = &inner.geometry;
        if number >= geometry.shards {
            return None;
        }
        let at = geometry.shard_at(number);
        let index = Index { buckets: inner.map.slice(at + SHARD_HEAD, geometry.buckets)? };
        Some(Shard { inner, number, head: inner.map.at(at)?, index, at })
    }

    pub(crate) fn floor(&self, ring: Ring) -> &'a AtomicU64 {
        ring.of(&self.head.floors)
    }

    pub(crate) fn bytes(&self, ring: Ring) -> Bytes<'a> {
        let geometry = &self.inner.geometry;
        Bytes { map: &self.inner.map, at: self.at + ring.of(&geometry.ring_at), len: *ring.of(&geometry.ring_len) }
    }

    pub(crate) fn ghosts(&self) -> &'a [GhostBucket] {
        let geometry = &self.inner.geometry;
        let ghosts_at = self.at + SHARD_HEAD + geometry.buckets * BUCKET_BYTES;
        self.inner.map.slice(ghosts_at, geometry.ghosts).unwrap_or_default()
    }

    pub(crate) fn counters(&self) -> &'a Counters {
        &self.head.counters
    }

    /// Reads the accounting. Without the lock, the values may be slightly inconsistent with each other.
    pub(crate) fn books(&self) -> Books {
        let [a, b, c, d] = &self.head.books;
        let value = |word: &AtomicU64| word.load(Ordering::Relaxed);
        Books { bytes: [value(a), value(b)], entries: [value(c), value(d)] }
    }

    /// Takes the lock, and repairs what a dead owner may have left.
    ///
    /// After a timeout, callers fail immediately until the lock has been taken again, so that a stopped process delays a single request
    /// rather than every request.
    pub(crate) fn lock(self) -> Result<LockedShard<'a>, NotLocked> {
        let suspect = self.head.suspect.load(Ordering::Relaxed) != 0;
        let Some(from_the_dead) = self.inner.take_lock(&self.head.lock, suspect) else {
            self.head.suspect.store(1, Ordering::Relaxed);
            add(&self.counters().lock_timeouts, 1);
            return Err(NotLocked);
        };
        if self.head.suspect.load(Ordering::Relaxed) != 0 {
            self.head.suspect.store(0, Ordering::Relaxed);
        }
        let mut locked = LockedShard { shard: self, suspects: [None; SUSPECTS] };
        if from_the_dead {
            add(&self.counters().lock_recoveries, 1);
            locked.repair();
        }
        Ok(locked)
    }
}

impl Drop for LockedShard<'_> {
    fn drop(&mut self) {
        crash::point("lock: about to be released");
        wait::release(&self.shard.head.lock);
        for suspect in self.suspects.iter().flatten() {
            self.shard.inner.release_if_dead(*suspect);
        }
    }
}

impl<'a> LockedShard<'a> {
    /// Finishes the operation during which the last owner died.
    fn repair(&mut self) {
        let head = self.shard.head;
        let intent = &head.intent;
        let armed = intent.armed.load(Ordering::Acquire);
        let slot = self.shard.index.slot(intent.slot.load(Ordering::Relaxed));
        let stored = slot.is_some_and(|slot| slot.word.load(Ordering::Relaxed) == intent.new.load(Ordering::Relaxed));
        if armed == ARMED_SLOT && stored && !crash::skips(Recovery::Books) {
            for (word, then) in head.books.iter().zip(&intent.books) {
                word.store(then.load(Ordering::Relaxed), Ordering::Relaxed);
            }
        }
        if armed == ARMED_EMPTY && !crash::skips(Recovery::Empty) {
            self.finish_emptying();
        }
        crash::point("repair: done, still armed");
        if armed == ARMED_LOSE || Ring::BOTH.iter().any(|&ring| self.bounds(ring).is_err()) {
            self.lose();
        }
        intent.armed.store(0, Ordering::Release);
    }

    /// Stores a slot's word, and then the new accounting.
    pub(crate) fn change_slot(&mut self, slot: Slot<'_>, new: u64, books: Books) {
        let head = self.shard.head;
        let intent = &head.intent;
        let [a, b] = books.bytes;
        let [c, d] = books.entries;
        // The previous intent must be disarmed before this one is written.
        fence(Ordering::Release);
        for (word, value) in intent.books.iter().zip([a, b, c, d]) {
            word.store(value, Ordering::Relaxed);
        }
        intent.slot.store(slot.number, Ordering::Relaxed);
        intent.new.store(new, Ordering::Relaxed);
        intent.armed.store(ARMED_SLOT, Ordering::Release);
        crash::point("slot: intent armed");
        // The repair relies on the order of these stores: armed, slot, accounting.
        fence(Ordering::AcqRel);
        slot.word.store(new, Ordering::Release);
        crash::point("slot: stored");
        fence(Ordering::AcqRel);
        for (at, (word, value)) in head.books.iter().zip([a, b, c, d]).enumerate() {
            word.store(value, Ordering::Release);
            crash::point(["slot: book 1", "slot: book 2", "slot: book 3", "slot: book 4"][at % 4]);
        }
        intent.armed.store(0, Ordering::Release);
        crash::point("slot: disarmed");
    }

    /// Empties the shard with a few stores. They suffice, because a slot whose position is below the floor is free.
    pub(crate) fn empty(&mut self) {
        self.shard.head.intent.armed.store(ARMED_EMPTY, Ordering::Release);
        crash::point("empty: armed");
        fence(Ordering::AcqRel);
        self.finish_emptying();
        self.shard.head.intent.armed.store(0, Ordering::Release);
    }

    fn finish_emptying(&mut self) {
        let head = self.shard.head;
        for (floor, ring) in head.floors.iter().zip(&head.rings) {
            floor.store(ring.head.load(Ordering::Relaxed), Ordering::Release);
            crash::point("empty: floor raised");
        }
        for word in &head.books {
            word.store(0, Ordering::Release);
            crash::point("empty: book cleared");
        }
    }

    /// Empties the shard, whatever its state, and counts the loss.
    pub(crate) fn lose(&mut self) {
        let head = self.shard.head;
        head.intent.armed.store(ARMED_LOSE, Ordering::Release);
        crash::point("lose: armed");
        fence(Ordering::AcqRel);
        for bucket in self.shard.index.buckets {
            bucket.slots.iter().for_each(|slot| slot.store(0, Ordering::Relaxed));
        }
        crash::point("lose: index cleared");
        let restarts = head.restarts.fetch_add(1, Ordering::Relaxed).wrapping_add(1);
        for (at, (ring, floor)) in head.rings.iter().zip(&head.floors).enumerate() {
            // Positions must not be reused while a reader may access them.
            let known = ring.head.load(Ordering::Relaxed).max(floor.load(Ordering::Relaxed));
            let base = if known < LAST_POSITION / 2 { known } else { restarts << 40 & (LAST_POSITION / 4 - 1) };
            // The head advances by whole laps, so that it stays outside pinned entries.
            let laps = (1_u64 << 40).next_multiple_of(self.shard.inner.geometry.ring_len[at].max(GRAIN));
            let start = base.next_multiple_of(GRAIN) + laps;
            floor.store(start, Ordering::Relaxed);
            ring.head.store(start, Ordering::Relaxed);
            ring.clear_to.store(start, Ordering::Relaxed);
        }
        head.books.iter().for_each(|word| word.store(0, Ordering::Relaxed));
        crash::point("lose: books cleared");
        add(&head.counters.lost, 1);
        head.intent.armed.store(0, Ordering::Release);
        fence(Ordering::SeqCst);
    }

    /// Returns the floor and the head of a ring, if they are plausible.
    pub(crate) fn bounds(&self, ring: Ring) -> Result<(u64, u64), Corrupt> {
        let floor = self.shard.floor(ring).load(Ordering::Relaxed);
        let head = ring.of(&self.shard.head.rings).head.load(Ordering::Relaxed);
        let len = self.shard.bytes(ring).len;
        let sane = floor <= head
            && head - floor <= len
            && floor >= GRAIN
            && head < LAST_POSITION
            && floor.is_multiple_of(GRAIN)
            && head.is_multiple_of(GRAIN);
        if sane { Ok((floor, head)) } else { Err(Corrupt) }
    }

    /// Returns the entry stored under a key, valid or not.
    pub(crate) fn find(&self, key: Key<'_>) -> Result<Option<LocatedEntry<'a>>, Corrupt> {
        let found = self.shard.index.find(key.hash, |slot, word| match self.follow(slot, word) {
            Ok(found) => found.filter(|found| found.entry.is_for(key)).map(Ok),
            Err(corrupt) => Some(Err(corrupt)),
        });
        found.transpose()
    }

    /// Returns the entry that a slot leads to, or `None` if its position is below the floor.
    pub(crate) fn follow(&self, slot: Slot<'a>, word: u64) -> Result<Option<LocatedEntry<'a>>, Corrupt> {
        let Some(place) = Place::of(word) else { return Ok(None) };
        let (floor, head) = self.bounds(place.ring)?;
        if place.position < floor {
            return Ok(None);
        }
        let entry = self.shard.bytes(place.ring).entry(place.position).ok_or(Corrupt)?;
        if place.position >= head || entry.size > head - place.position {
            return Err(Corrupt);
        }
        Ok(Some(LocatedEntry { slot, place, entry }))
    }

    /// Returns the slot that leads to an entry, if any.
    pub(crate) fn slot_of(&self, entry: &Entry<'_>, place: Place) -> Option<Slot<'a>> {
        let word = place.word(entry.hash());
        let mut candidates = self.shard.index.candidates(entry.hash());
        candidates.find(|slot| slot.word.load(Ordering::Relaxed) == word)
    }

    /// Stores an entry of `size` bytes, replacing the entry stored under its key.
    pub(crate) fn insert(
        &mut self,
        new: &NewEntry<'_>,
        size: u64,
        check: &FreshnessCheck<'_>,
    ) -> Result<Stored, Corrupt> {
        let mut ring = self.ring_for(new.key, size)?;
        let mut position = self.place(ring, size, check)?;
        if position.is_none() && ring == Ring::Small {
            // A few readers can pin the entire small ring.
            ring = Ring::Main;
            position = self.place(ring, size, check)?;
        }
        let Some(position) = position else { return Ok(Stored::NoRoom) };
        self.shard.bytes(ring).write_entry(position, new, size).ok_or(Corrupt)?;
        crash::point("insert: bytes written");
        self.raise_head(ring, position + size);
        crash::point("insert: head raised");

        let mut books = self.shard.books();
        // The slot is looked up only now, because making room may have moved or evicted the old entry.
        let slot = match self.find(new.key)? {
            Some(old) => {
                books.subtract(old.place.ring, old.entry.size)?;
                add(&self.shard.counters().replaced, 1);
                old.slot
            }
            None => self.slot_for(new.key.hash, &mut books)?,
        };
        slot.visits.store(0, Ordering::Relaxed);
        books.add(ring, size);
        self.change_slot(slot, Place { ring, position }.word(new.key.hash), books);
        add(&self.shard.counters().stores, 1);
        Ok(Stored::Yes)
    }

    /// Removes an entry.
    pub(crate) fn remove(&mut self, found: &LocatedEntry<'_>) -> Result<(), Corrupt> {
        let mut books = self.shard.books();
        books.subtract(found.place.ring, found.entry.size)?;
        self.change_slot(found.slot, 0, books);
        Ok(())
    }

    /// Counts an entry that is dropped, by its freshness and ring.
    pub(crate) fn count_drop(&self, freshness: Freshness, ring: Ring) {
        let counters = self.shard.counters();
        let counter = match (freshness, ring) {
            (Freshness::Expired, _) => &counters.expired,
            (Freshness::Purged, _) => &counters.purged,
            (Freshness::Fresh | Freshness::Stale | Freshness::OnError, Ring::Small) => &counters.evicted_small,
            (Freshness::Fresh | Freshness::Stale | Freshness::OnError, Ring::Main) => &counters.evicted_main,
        };
        add(counter, 1);
    }

    pub(crate) fn raise_head(&mut self, ring: Ring, head: u64) {
        ring.of(&self.shard.head.rings).head.store(head, Ordering::Release);
    }

    pub(crate) fn suspect(&mut self, member: u32) {
        if !self.suspects.contains(&Some(member))
            && let Some(free) = self.suspects.iter_mut().find(|suspect| suspect.is_none())
        {
            *free = Some(member);
        }
    }

    /// Selects the ring for a new entry, as in S3-FIFO: an entry that was requested before, or was recently evicted from the small ring, is
    /// placed in the main ring, and any other entry in the small ring.
    fn ring_for(&self, key: Key<'_>, size: u64) -> Result<Ring, Corrupt> {
        if size > self.shard.bytes(Ring::Small).len / 2 {
            return Ok(Ring::Main);
        }
        let wanted = match self.find(key)? {
            Some(old) => old.place.ring == Ring::Main || old.slot.visits.load(Ordering::Relaxed) > 0,
            None => {
                let [_, main] = self.shard.books().entries;
                let seen = ghosts::contains(self.shard.ghosts(), &self.shard.head.ghost_seq, key.hash, main);
                add(&self.shard.counters().ghost_hits, u64::from(seen));
                seen
            }
        };
        Ok(if wanted { Ring::Main } else { Ring::Small })
    }

    /// Returns a slot for a new key: a free slot if there is one, otherwise the slot of the entry with the fewest visits.
    fn slot_for(&mut self, hash: u64, books: &mut Books) -> Result<Slot<'a>, Corrupt> {
        let mut least: Option<(u8, LocatedEntry<'a>)> = None;
        for slot in self.shard.index.candidates(hash) {
            let Some(found) = self.follow(slot, slot.word.load(Ordering::Relaxed))? else { return Ok(slot) };
            let visits = slot.visits.load(Ordering::Relaxed);
            if least.is_none_or(|(fewest, _)| visits < fewest) {
                least = Some((visits, found));
            }
        }
        let (_, found) = least.ok_or(Corrupt)?;
        books.subtract(found.place.ring, found.entry.size)?;
        add(&self.shard.counters().evicted_index, 1);
        Ok(found.slot)
    }
}

impl Books {
    pub(crate) fn add(&mut self, ring: Ring, size: u64) {
        let at = usize::from(ring == Ring::Main);
        self.bytes[at] = self.bytes[at].saturating_add(size);
        self.entries[at] = self.entries[at].saturating_add(1);
    }

    pub(crate) fn subtract(&mut self, ring: Ring, size: u64) -> Result<(), Corrupt> {
        let at = usize::from(ring == Ring::Main);
        self.bytes[at] = self.bytes[at].checked_sub(size).ok_or(Corrupt)?;
        self.entries[at] = self.entries[at].checked_sub(1).ok_or(Corrupt)?;
        Ok(())
    }
}

/// Adds to a word that is changed only under the lock, or that may be slightly inexact.
pub(crate) fn add(word: &AtomicU64, amount: u64) {
    if amount > 0 {
        word.fetch_add(amount, Ordering::Relaxed);
    }
}
