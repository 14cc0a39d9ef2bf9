//! The page cache: keys to bytes, with a time to live and tags.
//!
//! This file maps keys to shards and entries. It turns a failure in a shard into a miss or a refusal. It holds at most one shard lock at a
//! time and does not allocate while it holds one.
//!
//! Must not depend on the memory layout of an entry. Must not let an error in the cache fail a request.

pub(crate) mod audit;
pub(crate) mod claim;
pub(crate) mod early;
pub(crate) mod entry;
pub(crate) mod eviction;
pub(crate) mod freshness;
pub(crate) mod ghosts;
pub(crate) mod index;
pub(crate) mod list;
pub(crate) mod lookup;
pub(crate) mod options;
pub(crate) mod page;
pub(crate) mod pinned;
pub(crate) mod prefixes;
pub(crate) mod read;
pub(crate) mod recorder;
pub(crate) mod refused;
pub(crate) mod render;
pub(crate) mod shard;
pub(crate) mod stats;
pub(crate) mod sweep;
pub(crate) mod tags;
pub(crate) mod value;
pub(crate) mod watch;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use xxhash_rust::xxh3::xxh3_64_with_seed;

use self::entry::{Key, NewEntry, Times};
use self::freshness::{Freshness, FreshnessCheck, Moment};
use self::options::StoreOptions;
use self::pinned::Pinned;
use self::prefixes::Prefixes;
use self::read::Sight;
use self::refused::StoreError;
use self::shard::{Corrupt, LockedShard, NotLocked, Shard, Stored, add};
use self::tags::{PurgeSnapshot, TagClock};
use crate::memory::SharedMemory;
use crate::memory::layout::{ENTRY_HEAD, GRAIN};
use crate::protocols::lease;

/// Salt for the hashes of tags. Tags and keys are hashed with different seeds, so that no key equals a tag.
const TAG_SALT: u64 = 0x9e37_79b9_7f4a_7c15;
/// Upper bound for the padding of key, metadata and value in an entry, in bytes.
const PADDING: u64 = 16 + GRAIN;

/// A handle to the page cache. Cheap to clone, and usable from any thread.
///
/// Reading takes no lock. Storing waits up to about 20 ms for a lock. No failure of the cache is an error for the caller: a page that
/// cannot be read is a miss, and a page that cannot be stored is refused.
#[derive(Clone, Debug)]
pub struct Cache {
    pub(crate) segment: Arc<SharedMemory>,
}

/// Why an operation on a shard failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Trouble {
    NotLocked,
    Lost,
}

/// The parameters for storing a page, in addition to its options.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Rendering<'a> {
    pub(crate) meta: &'a [u8],
    /// Hashes of the tags inherited from fragments.
    pub(crate) lent: &'a [u64],
    /// When the first of the fragments expires; 0 means never.
    pub(crate) until_ms: u64,
    pub(crate) cost_ms: u32,
    /// The time on the tag clock before the rendering began.
    pub(crate) snapshot: Option<PurgeSnapshot>,
    /// A lease's cell and word. The entry is stored only if the cell still contains this word.
    pub(crate) lease: Option<(&'a AtomicU64, u64)>,
}

impl Cache {
    pub(crate) fn new(segment: Arc<SharedMemory>) -> Cache {
        Cache { segment }
    }

    /// Returns the page stored under `key`, if it is neither expired nor purged.
    pub fn get(&self, key: impl AsRef<[u8]>) -> Option<Vec<u8>> {
        let mut value = Vec::new();
        self.get_into(key, &mut value).then_some(value)
    }

    /// Copies the page stored under `key` into `value`, replacing the contents of `value`. Returns whether there was such a page.
    ///
    /// The buffer keeps its capacity, so a caller that reuses it avoids further allocations.
    pub fn get_into(&self, key: impl AsRef<[u8]>, value: &mut Vec<u8>) -> bool {
        self.get_at(key.as_ref(), Moment::Now(&self.segment), value)
    }

    /// Returns the page in place, without a copy. The page stays in place until the result is dropped.
    ///
    /// This is worthwhile for pages of about 16 KiB or more. Hold the result only as long as it takes to send the page, because the cache
    /// cannot reuse the page's memory until then. A process can pin 32 pages at a time; beyond that, this function returns copies.
    pub fn pin(&self, key: impl AsRef<[u8]>) -> Option<Pinned> {
        let key = self.key(key.as_ref());
        let check = self.check(Moment::Now(&self.segment))?;
        let shard = self.shard(self.shard_of(key.hash))?;
        let (pinned, tries) = shard.look(key, &check, |sight| match sight.freshness {
            Freshness::Fresh => {
                let pinned = Pinned::new(&self.segment, sight)?;
                sight.slot.visit();
                Some(Some(pinned))
            }
            Freshness::Stale | Freshness::OnError | Freshness::Expired | Freshness::Purged => Some(None),
        });
        let pinned = pinned.flatten();
        self.count_look(shard.number, tries, pinned.is_some());
        pinned
    }

    /// Stores a page under `key`, replacing any page stored there.
    ///
    /// A page that was purged while it was being rendered (see [`StoreOptions::as_of`]) is not stored. This is not an error, because a
    /// purge a moment later would have had the same effect.
    ///
    /// # Errors
    /// Fails if there is no cache, if the page is too large, or if a process does not release the lock of the page's shard.
    pub fn set(
        &self,
        key: impl AsRef<[u8]>,
        value: impl AsRef<[u8]>,
        options: &StoreOptions,
    ) -> Result<(), StoreError> {
        self.store(key.as_ref(), value.as_ref(), options, &Rendering::default(), self.segment.now_ms())
    }

    /// Invalidates the page stored under `key`, including one that is being rendered.
    ///
    /// Returns whether there was a valid page. Returns `false` if the shard is locked, although the page is purged in that case too.
    pub fn purge(&self, key: impl AsRef<[u8]>) -> bool {
        self.purge_at(key.as_ref(), self.segment.now_ms())
    }

    /// Invalidates all pages with this tag, including those that are being rendered.
    ///
    /// Takes constant time, however many pages carry the tag, and no lock.
    pub fn purge_tag(&self, tag: &str) {
        if let Some(clock) = self.tag_clock() {
            clock.purge(self.tag(tag));
        }
    }

    /// Invalidates all pages whose keys begin with `prefix`, including those that are being rendered.
    ///
    /// The purge takes effect immediately. Removing the affected pages and freeing their memory takes longer. Only the first 112 bytes of
    /// the prefix are significant.
    pub fn purge_prefix(&self, prefix: impl AsRef<[u8]>) {
        let Some((clock, prefixes)) = self.tag_clock().zip(Prefixes::of(&self.segment)) else { return };
        match prefixes.announce(prefix.as_ref(), clock) {
            Some(purge) => self.sweep_prefix(&purge),
            // Too many purges are in progress, or a stopped process holds the table's lock. The purged pages must not be served, so the
            // whole cache is cleared.
            None => self.clear(),
        }
    }

    /// Invalidates all pages, including those that are being rendered.
    pub fn clear(&self) {
        let Some(clock) = self.tag_clock() else { return };
        clock.clear();
        // Advancing the clock invalidates the pages. Emptying the shards only frees their memory, so shards that cannot be locked are
        // skipped.
        for index in 0..self.segment.geometry.shards {
            let _ = self.with_shard_at(index, |shard| {
                shard.empty();
                Ok(())
            });
        }
    }

    /// Returns the time on the cache's logical clock, which counts purges. Read it before rendering a page, and pass it to
    /// [`StoreOptions::as_of`].
    pub fn clock(&self) -> PurgeSnapshot {
        PurgeSnapshot(self.tag_clock().map_or(0, TagClock::now))
    }

    /// Returns the size of the largest entry that the cache can hold, in bytes: the length of the key and the value, plus 8 for each tag.
    /// Returns 0 if there is no cache.
    pub fn max_entry(&self) -> u64 {
        self.segment.geometry.max_record.saturating_sub(ENTRY_HEAD + PADDING)
    }

    pub(crate) fn get_at(&self, key: &[u8], moment: Moment<'_>, value: &mut Vec<u8>) -> bool {
        value.clear();
        let key = self.key(key);
        let Some(check) = self.check(moment) else { return false };
        let Some(shard) = self.shard(self.shard_of(key.hash)) else { return false };
        let (hit, tries) = shard.look(key, &check, |sight| match sight.freshness {
            Freshness::Fresh => {
                copy_value(sight, value)?;
                sight.slot.visit();
                Some(true)
            }
            Freshness::Stale | Freshness::OnError | Freshness::Expired | Freshness::Purged => Some(false),
        });
        let hit = hit == Some(true);
        if !hit {
            value.clear();
        }
        self.count_look(shard.number, tries, hit);
        hit
    }

    pub(crate) fn store(
        &self,
        key: &[u8],
        value: &[u8],
        options: &StoreOptions,
        rendering: &Rendering<'_>,
        now_ms: u64,
    ) -> Result<(), StoreError> {
        let check = self.check(Moment::At(now_ms)).ok_or(StoreError::Off)?;
        let PurgeSnapshot(now) = self.clock();
        let key = self.key(key);
        let mut tags: Vec<u64> = options.tags.iter().map(|tag| self.tag(tag)).collect();
        tags.extend(rendering.lent);
        tags.sort_unstable();
        tags.dedup();
        let new = NewEntry {
            key,
            meta: rendering.meta,
            value,
            tags: &tags,
            times: Times {
                snapshot: options.as_of.or(rendering.snapshot).map_or(now, |PurgeSnapshot(time)| time.min(now)),
                stored_ms: now_ms,
                expires_ms: earlier(expiry(options.ttl, now_ms), rendering.until_ms),
                stale_ms: u32::try_from(millis(options.stale)).unwrap_or(u32::MAX),
                error_ms: u32::try_from(millis(options.stale_if_error)).unwrap_or(u32::MAX),
                cost_ms: rendering.cost_ms,
            },
        };
        let shard = self.shard(self.shard_of(key.hash)).ok_or(StoreError::Off)?;
        let limit = self.max_entry();
        let length = (key.bytes.len() + rendering.meta.len() + value.len()) as u64 + 8 * tags.len() as u64;
        let Some(size) = new.size(self.segment.geometry.max_record).filter(|_| length <= limit) else {
            add(&shard.counters().refused, 1);
            return Err(StoreError::TooLarge { limit });
        };
        let done = self.with_shard_at(shard.number, |shard| {
            // This is checked under the lock, so a process that takes over the lease later also stores its page later.
            if rendering.lease.is_some_and(|(lease, word)| !lease::is_held(lease, word)) {
                return Ok(Stored::Yes);
            }
            // This is checked under the lock, so a purge that is issued later also removes this entry.
            if check.is_outdated(key, &tags, new.times.snapshot) {
                add(&shard.shard.counters().outdated, 1);
                if let Some(clock) = self.tag_clock() {
                    clock.finish(tags.iter().copied().chain([key.hash]));
                }
                // The page is treated as if it had been stored and then purged. A page already stored under the key is removed, even if it
                // was rendered later. Tags that share slots can look purged when they are not, and a lookup after this store must not
                // return a page other than the last one set.
                if let Some(old) = shard.find(key)? {
                    shard.remove(&old)?;
                    shard.count_drop(Freshness::Purged, old.place.ring);
                }
                return Ok(Stored::Yes);
            }
            shard.insert(&new, size, &check)
        });
        match done {
            Ok(Stored::Yes) => Ok(()),
            Ok(Stored::NoRoom) | Err(Trouble::NotLocked | Trouble::Lost) => Err(StoreError::Busy),
        }
    }

    fn purge_at(&self, key: &[u8], now_ms: u64) -> bool {
        let Some(check) = self.check(Moment::At(now_ms)) else { return false };
        let key = self.key(key);
        let was_good = self.with_shard(key.hash, |shard| {
            let Some(found) = shard.find(key)? else { return Ok(false) };
            let good = check.freshness_of(&found.entry) == Freshness::Fresh;
            shard.remove(&found)?;
            shard.count_drop(Freshness::Purged, found.place.ring);
            Ok(good)
        });
        if let Some(clock) = self.tag_clock() {
            clock.purge(key.hash);
        }
        was_good.unwrap_or(false)
    }

    /// Returns the check of entries at `moment`, or `None` if there is no cache or if its file was truncated.
    pub(crate) fn check<'a>(&'a self, moment: Moment<'a>) -> Option<FreshnessCheck<'a>> {
        let is_there = self.segment.geometry.shards > 0 && !self.segment.map.is_lost();
        let header = self.segment.header().filter(|_| is_there)?;
        Some(FreshnessCheck { moment, inner: &self.segment, header })
    }

    pub(crate) fn tag_clock(&self) -> Option<TagClock<'_>> {
        TagClock::of(&self.segment)
    }

    pub(crate) fn key<'k>(&self, bytes: &'k [u8]) -> Key<'k> {
        Key { bytes, hash: xxh3_64_with_seed(bytes, self.segment.seed) }
    }

    pub(crate) fn tag(&self, tag: &str) -> u64 {
        xxh3_64_with_seed(tag.as_bytes(), self.segment.seed ^ TAG_SALT)
    }

    /// Returns the number of the shard for a hash. Four bits below the fingerprint select the shard; the low bits select the buckets.
    pub(crate) fn shard_of(&self, hash: u64) -> u64 {
        (hash >> 49) & self.segment.geometry.shards.saturating_sub(1)
    }

    pub(crate) fn shard(&self, index: u64) -> Option<Shard<'_>> {
        Shard::of(&self.segment, index)
    }

    pub(crate) fn shards(&self) -> impl Iterator<Item = Shard<'_>> {
        (0..self.segment.geometry.shards).filter_map(|index| self.shard(index))
    }

    pub(crate) fn with_shard<R>(
        &self,
        hash: u64,
        work: impl FnOnce(&mut LockedShard<'_>) -> Result<R, Corrupt>,
    ) -> Result<R, Trouble> {
        self.with_shard_at(self.shard_of(hash), work)
    }

    /// Runs `work` under a shard's lock. Empties the shard if it turns out to be corrupt.
    pub(crate) fn with_shard_at<R>(
        &self,
        index: u64,
        work: impl FnOnce(&mut LockedShard<'_>) -> Result<R, Corrupt>,
    ) -> Result<R, Trouble> {
        let shard = self.shard(index).ok_or(Trouble::NotLocked)?;
        let mut locked = shard.lock().map_err(|NotLocked| Trouble::NotLocked)?;
        work(&mut locked).map_err(|Corrupt| {
            locked.lose();
            Trouble::Lost
        })
    }

    #[inline]
    pub(crate) fn count_look(&self, shard: u64, retries: usize, hit: bool) {
        self.count(shard, retries, if hit { Seen::Hit } else { Seen::Miss });
    }

    /// Counts an event in this process's own member cell, which no other process writes to.
    #[inline]
    pub(crate) fn count(&self, shard: u64, retries: usize, seen: Seen) {
        if let Some(tally) = self.segment.tally(shard) {
            let counter = match seen {
                Seen::Hit => &tally.hits,
                Seen::Stale => &tally.stale,
                Seen::Miss => &tally.misses,
                Seen::Wait => &tally.lease_waits,
                Seen::Render => &tally.renders,
            };
            if seen == Seen::Hit {
                // `fetch_add` would stall until the bytes that were just copied are written. If two threads of a process count a hit at the
                // same instant, one count is lost, which is acceptable.
                counter.store(counter.load(Ordering::Relaxed).wrapping_add(1), Ordering::Relaxed);
            } else {
                counter.fetch_add(1, Ordering::Relaxed);
            }
            add(&tally.retries, retries as u64);
        }
    }
}

/// The events that a process counts in its own member cell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Seen {
    Hit,
    Stale,
    Miss,
    Wait,
    Render,
}

/// Copies an entry's value into an empty buffer. Returns `None` if the entry was overwritten during the copy.
pub(crate) fn copy_value(sight: &Sight<'_, '_>, value: &mut Vec<u8>) -> Option<()> {
    let len = usize::try_from(sight.entry.value_len).ok()?;
    value.clear();
    if value.capacity() < len {
        // The length must be verified before it is used for an allocation.
        if !sight.holds() {
            return None;
        }
        value.try_reserve_exact(len).ok()?;
    }
    sight.entry.copy_value(value)
}

/// Returns when a page that is stored now expires; 0 means never.
pub(crate) fn expiry(ttl: Option<Duration>, now_ms: u64) -> u64 {
    ttl.map_or(0, |ttl| now_ms.saturating_add(millis(ttl).max(1)))
}

/// Returns the earlier of two times, where 0 means never.
pub(crate) fn earlier(one: u64, other: u64) -> u64 {
    match (one, other) {
        (0, only) | (only, 0) => only,
        (one, other) => one.min(other),
    }
}

pub(crate) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Holds the lock of a key's shard until it is dropped, like a process in the middle of a store. For tests with killed and stopped
/// processes.
#[cfg(feature = "crash-test")]
#[doc(hidden)]
#[derive(Debug)]
pub struct Held<'a> {
    _shard: LockedShard<'a>,
}

#[cfg(feature = "crash-test")]
impl Cache {
    /// Locks the shard of a key: see [`Held`].
    #[doc(hidden)]
    pub fn hold(&self, key: impl AsRef<[u8]>) -> Option<Held<'_>> {
        Some(Held { _shard: self.shard(self.shard_index(key))?.lock().ok()? })
    }

    /// Sweeps the whole cache, whether or not a sweep is due.
    #[doc(hidden)]
    pub fn sweep_all(&self) {
        self.sweep_now(1, self.segment.now_ms());
    }

    /// Returns the number of locks held by live or dead processes.
    #[doc(hidden)]
    pub fn locks_held(&self) -> usize {
        let locks = self.shards().map(|shard| &shard.head.lock);
        let locks = locks.chain(self.segment.header().map(|header| &header.prefix_lock));
        locks.filter(|lock| lock.load(Ordering::Relaxed) & 0xffff != 0).count()
    }

    /// Returns the number of entries pinned by live or dead processes.
    #[doc(hidden)]
    pub fn pins_set(&self) -> usize {
        let pins = self.segment.member_cells().flat_map(|member| &member.head.pins);
        pins.filter(|pin| pin.load(Ordering::Relaxed) != 0).count()
    }

    /// Returns the number of the shard that a key belongs to.
    #[doc(hidden)]
    pub fn shard_index(&self, key: impl AsRef<[u8]>) -> u64 {
        self.shard_of(self.key(key.as_ref()).hash)
    }
}

#[cfg(test)]
mod tests;
