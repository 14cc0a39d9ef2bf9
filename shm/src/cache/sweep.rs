//! Sweeps the cache: removes expired entries even if their memory is not needed, and releases what dead processes held.
//!
//! The sweep scans the index like a reader, without a lock, and covers one part of the index at a time. It takes a shard's lock only to
//! remove the entries that it found. Any process may start a sweep at any time, but at most one sweep per second does any work.
//!
//! Must not hold a lock for longer than it takes to remove a batch.

use std::sync::atomic::Ordering;

use super::entry::Entry;
use super::freshness::{Freshness, FreshnessCheck, Moment};
use super::index::{Place, Slot};
use super::prefixes::{Prefixes, Purge};
use super::shard::{Corrupt, LockedShard, Shard};
use crate::cache::Cache;

/// Minimum time between two sweeps, in milliseconds.
const INTERVAL_MS: u64 = 1000;
/// Number of sweeps in which the whole index is examined.
const ROUNDS: u64 = 8;
/// Minimum number of slots examined in one sweep of a shard.
const FEWEST: u64 = 4096;
/// Number of entries removed per acquisition of the lock.
const BATCH: usize = 64;

/// An entry to be removed: the number of its slot, and the word read from the slot.
type Doomed = (u64, u64);

impl Cache {
    /// Removes expired and purged pages, releases what dead processes held, and finishes purges that dead processes began.
    ///
    /// Every process should call this function about once a second. Of the calls within one second, all but one return immediately. The
    /// remaining call examines a part of the cache, and may take a few milliseconds if the cache is large.
    pub fn sweep(&self) {
        let now_ms = self.segment.now_ms();
        let Some(header) = self.segment.header() else { return };
        let due = header.sweep_due.load(Ordering::Relaxed);
        let next = now_ms.saturating_add(INTERVAL_MS);
        if is_due(due, now_ms)
            && header.sweep_due.compare_exchange(due, next, Ordering::AcqRel, Ordering::Relaxed).is_ok()
        {
            self.sweep_now(ROUNDS, now_ms);
        }
    }

    /// Whether [`sweep`](Cache::sweep) would do anything. Very cheap.
    pub fn sweep_is_due(&self) -> bool {
        let due = self.segment.header().map(|header| header.sweep_due.load(Ordering::Relaxed));
        self.segment.geometry.shards > 0 && due.is_some_and(|due| is_due(due, self.segment.now_ms()))
    }

    /// Sweeps one of `rounds` parts of the index.
    pub(crate) fn sweep_now(&self, rounds: u64, now_ms: u64) {
        self.segment.bury_the_dead();
        let Some(prefixes) = Prefixes::of(&self.segment) else { return };
        for purge in prefixes.unswept() {
            self.sweep_prefix(&purge);
        }
        let Some(check) = self.check(Moment::At(now_ms)) else { return };
        for shard in self.shards() {
            let slots = shard.index.len();
            let part = (slots / rounds.max(1)).max(FEWEST).min(slots);
            let from = shard.head.sweep_at.load(Ordering::Relaxed) % slots.max(1);
            self.remove_from(&shard, from, part, |sight| !check.freshness_of(&sight).keeps(), &check);
            shard.head.sweep_at.store(from + part, Ordering::Relaxed);
            let _ = self.with_shard_at(shard.number, |shard| shard.tidy(&check));
        }
    }

    /// Removes the pages affected by a purge by prefix, and marks the purge as swept.
    pub(crate) fn sweep_prefix(&self, purge: &Purge) {
        let Some(check) = self.check(Moment::At(self.segment.now_ms())) else { return };
        for shard in self.shards() {
            let concerns =
                |entry: Entry<'_>| entry.times().snapshot < purge.clock && entry.key_starts_with(purge.prefix());
            // The current holder of the lock may not have detected the purge, so this waits for the lock. Later holders detect the purge.
            if shard.lock().is_err() || !self.remove_from(&shard, 0, shard.index.len(), concerns, &check) {
                return;
            }
        }
        if let Some(prefixes) = Prefixes::of(&self.segment) {
            prefixes.swept(purge);
        }
    }

    /// Removes all `doomed` entries from `count` slots. Returns `false` if the shard could not be locked.
    fn remove_from(
        &self,
        shard: &Shard<'_>,
        from: u64,
        count: u64,
        doomed: impl Fn(Entry<'_>) -> bool,
        check: &FreshnessCheck<'_>,
    ) -> bool {
        let mut batch: Vec<Doomed> = Vec::with_capacity(BATCH);
        let len = shard.index.len();
        for slot in (from..from + count).filter_map(|number| shard.index.slot(number % len.max(1))) {
            if let Some(word) = look(shard, slot, &doomed) {
                batch.push((slot.number, word));
            }
            if batch.len() == BATCH {
                if !self.remove_batch(shard, &batch, check) {
                    return false;
                }
                batch.clear();
            }
        }
        batch.is_empty() || self.remove_batch(shard, &batch, check)
    }

    fn remove_batch(&self, shard: &Shard<'_>, batch: &[Doomed], check: &FreshnessCheck<'_>) -> bool {
        let removed =
            self.with_shard_at(shard.number, |shard| batch.iter().try_for_each(|&doomed| remove(shard, doomed, check)));
        removed.is_ok()
    }
}

/// Whether a sweep is due. A due time that is too far in the future was not written by a sweep, and is ignored.
fn is_due(due: u64, now_ms: u64) -> bool {
    due <= now_ms || due - now_ms > INTERVAL_MS
}

/// Returns the word of a slot, if its entry is doomed.
fn look(shard: &Shard<'_>, slot: Slot<'_>, doomed: impl Fn(Entry<'_>) -> bool) -> Option<u64> {
    let word = slot.word.load(Ordering::Acquire);
    let place = Place::of(word)?;
    if !shard.holds(place) {
        return None;
    }
    let is_doomed = doomed(shard.bytes(place.ring).entry(place.position)?);
    (is_doomed && shard.holds(place)).then_some(word)
}

/// Removes an entry if its slot still has the same word.
fn remove(shard: &mut LockedShard<'_>, (number, word): Doomed, check: &FreshnessCheck<'_>) -> Result<(), Corrupt> {
    let slot = shard.shard.index.slot(number).ok_or(Corrupt)?;
    if slot.word.load(Ordering::Relaxed) != word {
        return Ok(());
    }
    if let Some(found) = shard.follow(slot, word)? {
        let freshness = check.freshness_of(&found.entry);
        shard.remove(&found)?;
        shard.count_drop(if freshness.keeps() { Freshness::Purged } else { freshness }, found.place.ring);
    }
    Ok(())
}
