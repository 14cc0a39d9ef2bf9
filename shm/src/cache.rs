//! The page cache: keys to bytes, with a time to live and tags.
//!
//! This file turns keys into shards and entries, and what goes wrong in a shard into a miss or a refusal. It holds at
//! most one shard lock at a time, and allocates nothing while it holds it.
//!
//! May not: know what an entry looks like in memory, or let an error in the cache become an error of a request.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::audit::audit;
use crate::clock::now_ms;
use crate::entry::{Key, NewEntry};
use crate::error::Refused;
use crate::layout::{ENTRY_HEAD, GRAIN};
use crate::lock::NotLocked;
use crate::ring::{Corrupt, Judge, LockedShard, Lookup, Shard, add};
use crate::segment::Inner;
use crate::tags::{Clock, TagClock};

/// Room made for a value before its length is known, so that most lookups take the lock once.
const FIRST_ROOM: usize = 8 * 1024;
/// A lookup gives up when the value outgrew the room made for it so many times.
const LOOKUPS: usize = 4;
/// Tags hash with another seed than keys, so that no key is a tag.
const TAG_SALT: u64 = 0x9e37_79b9_7f4a_7c15;

/// A handle of the page cache; cheap to clone, usable from any thread.
///
/// Nothing here waits longer than some 20 ms, and nothing fails: what cannot be had is a miss, what cannot be kept
/// is refused.
#[derive(Clone, Debug)]
pub struct Cache {
    segment: Arc<Inner>,
}

/// How long a page is good, and what it depends on.
///
/// ```
/// # use std::time::Duration;
/// # let segment = forkyard_shm::Segment::create(&forkyard_shm::Plan { cache_bytes: 1 << 20, rows: 1 })?;
/// # let cache = segment.cache();
/// use forkyard_shm::Options;
///
/// let clock = cache.clock(); // before anything is read that the page shows
/// let page = "rendered from the database";
/// let options = Options::new().ttl(Duration::from_secs(60)).tags(["news", "user:7"]).as_of(clock);
/// cache.set("/news", page, &options)?;
/// cache.purge_tag("user:7");
/// assert_eq!(cache.get("/news"), None);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct Options {
    ttl: Option<Duration>,
    tags: Vec<String>,
    as_of: Option<Clock>,
}

/// What is in the cache, and what happened to it: sums over all shards, read without a lock, so a moment apart.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stats {
    /// Bytes there are for entries.
    pub capacity: u64,
    /// Bytes of entries that can be served, or are out of date and not yet found to be.
    pub live_bytes: u64,
    /// Bytes of replaced, purged and expired entries that wait to be overwritten, and of padding.
    pub dead_bytes: u64,
    /// Bytes not used.
    pub free_bytes: u64,
    /// Entries in `live_bytes`.
    pub entries: u64,
    /// Lookups answered.
    pub hits: u64,
    /// Lookups not answered; those that met a locked shard are in `lock_timeouts` instead.
    pub misses: u64,
    /// Pages stored.
    pub stores: u64,
    /// Good pages dropped to make room.
    pub evictions: u64,
    /// Pages dropped as their time was over.
    pub expirations: u64,
    /// Pages dropped as they, or a tag of theirs, had been purged.
    pub purges: u64,
    /// Pages refused for their size.
    pub refused: u64,
    /// Times a process died with a lock held.
    pub lock_recoveries: u64,
    /// Times a shard had to be emptied: its owner died while changing it, or it contradicted itself.
    pub shards_lost: u64,
    /// Times a lock was not to be had.
    pub lock_timeouts: u64,
    /// Number of shards.
    pub shards: u64,
}

/// Why nothing was done in a shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trouble {
    NotLocked,
    Lost,
}

impl Options {
    /// No time limit, no tags.
    pub fn new() -> Options {
        Options::default()
    }

    /// The page is good for this long.
    #[must_use]
    pub fn ttl(mut self, ttl: Duration) -> Options {
        self.ttl = Some(ttl);
        self
    }

    /// The page is out of date as soon as one of these tags is purged.
    #[must_use]
    pub fn tags<T: Into<String>>(mut self, tags: impl IntoIterator<Item = T>) -> Options {
        self.tags = tags.into_iter().map(Into::into).collect();
        self
    }

    /// The page shows the world as it was at this time of [`Cache::clock`]. Without it, that of the store is taken,
    /// and a purge during rendering goes unnoticed.
    #[must_use]
    pub fn as_of(mut self, clock: Clock) -> Options {
        self.as_of = Some(clock);
        self
    }
}

impl Cache {
    pub(crate) fn new(segment: Arc<Inner>) -> Cache {
        Cache { segment }
    }

    /// The page stored under `key`, if there is one that is neither expired nor purged.
    pub fn get(&self, key: impl AsRef<[u8]>) -> Option<Vec<u8>> {
        self.get_at(key.as_ref(), now_ms())
    }

    /// Stores a page, in place of what was stored under `key`.
    ///
    /// A page that was purged while it was rendered (see [`Options::as_of`]) is not kept; that is no error, as it is what
    /// a purge a moment later would have led to.
    ///
    /// # Errors
    /// If there is no cache, the page is too large, or its shard is locked by a process that does not go on.
    pub fn set(&self, key: impl AsRef<[u8]>, value: impl AsRef<[u8]>, options: &Options) -> Result<(), Refused> {
        self.set_at(key.as_ref(), value.as_ref(), options, now_ms())
    }

    /// Makes the page stored under `key` out of date, and also one that is being rendered now. Whether there was
    /// a good one; `false` too if its shard is locked, in which case the page is purged all the same.
    pub fn purge(&self, key: impl AsRef<[u8]>) -> bool {
        self.purge_at(key.as_ref(), now_ms())
    }

    /// Makes all pages with this tag out of date, and also those that are being rendered now. One step, however many
    /// they are; takes no lock.
    pub fn purge_tag(&self, tag: &str) {
        if let Some(clock) = self.tag_clock() {
            clock.purge(self.tag(tag));
        }
    }

    /// Makes all pages out of date, and also those that are being rendered now.
    pub fn clear(&self) {
        let Some(clock) = self.tag_clock() else { return };
        clock.clear();
        // The pages are gone with that; this gives their memory back, where it can be done.
        for index in 0..self.segment.geometry.shards {
            let _ = self.with_shard_at(index, |shard| shard.clear());
        }
    }

    /// The time on the cache's logical clock, which counts purges: to be read before a page is rendered, and given to
    /// [`Options::as_of`].
    pub fn clock(&self) -> Clock {
        Clock(self.tag_clock().map_or(0, TagClock::now))
    }

    /// Sums of what the shards count.
    pub fn stats(&self) -> Stats {
        let mut stats = Stats { shards: self.segment.geometry.shards, ..Stats::default() };
        for shard in self.shards() {
            stats.add(&shard);
        }
        stats
    }

    /// Locks shard after shard and checks that each is consistent in itself.
    ///
    /// # Errors
    /// Says which shard is not and in what way, or which one could not be locked.
    pub fn audit(&self) -> Result<(), String> {
        for (index, shard) in self.shards().enumerate() {
            let checked = match shard.lock() {
                Ok(locked) => audit(&locked, |key| self.key(key).hash),
                Err(NotLocked) => Err("could not be locked".to_owned()),
            };
            checked.map_err(|why| format!("shard {index} {why}"))?;
        }
        Ok(())
    }

    /// The most that an entry can hold, in bytes: the length of the key and the value, and 8 for each tag. 0 without
    /// a cache.
    pub fn max_entry(&self) -> u64 {
        // The key may need 7 bytes of padding, and the whole is rounded up to a grain.
        self.segment.geometry.max_record.saturating_sub(ENTRY_HEAD + GRAIN)
    }

    fn get_at(&self, key: &[u8], now_ms: u64) -> Option<Vec<u8>> {
        let judge = Judge { now_ms, clock: self.tag_clock()? };
        let key = self.key(key);
        let mut value = Vec::with_capacity(FIRST_ROOM);
        for _ in 0..LOOKUPS {
            match self.with_shard(key.hash, |shard| shard.read(key, judge, &mut value)) {
                Ok(Lookup::Hit) => {
                    value.shrink_to_fit();
                    return Some(value);
                }
                Ok(Lookup::Needs(len)) => value.try_reserve_exact(usize::try_from(len).ok()?).ok()?,
                Ok(Lookup::Miss) | Err(Trouble::NotLocked | Trouble::Lost) => return None,
            }
        }
        None
    }

    fn set_at(&self, key: &[u8], value: &[u8], options: &Options, now_ms: u64) -> Result<(), Refused> {
        let clock = self.tag_clock().ok_or(Refused::Off)?;
        let now = clock.now();
        let key = self.key(key);
        let tags: Vec<u64> = options.tags.iter().map(|tag| self.tag(tag)).collect();
        let new = NewEntry {
            key,
            value,
            tags: &tags,
            snapshot: options.as_of.map_or(now, |Clock(time)| time.min(now)),
            expires_ms: options.ttl.map_or(0, |ttl| expiry(now_ms, ttl)),
        };
        let limit = self.max_entry();
        let length = (key.bytes.len() + value.len()) as u64 + 8 * tags.len() as u64;
        let size = new.size(self.segment.geometry.max_record).filter(|_| length <= limit);
        let Some(size) = size else {
            if let Some(shard) = self.shard(self.shard_of(key.hash)) {
                add(&shard.head.counters.refused, 1);
            }
            return Err(Refused::TooLarge { limit });
        };
        let judge = Judge { now_ms, clock };
        let outdated = !clock.outlived_clear(new.snapshot)
            || !clock.is_current(key.hash, new.snapshot)
            || !tags.iter().all(|&tag| clock.is_current(tag, new.snapshot));
        let done = self.with_shard(key.hash, |shard| {
            if outdated { shard.purge(key, judge).map(drop) } else { shard.insert(&new, size, judge) }
        });
        done.map_err(|trouble| match trouble {
            Trouble::NotLocked | Trouble::Lost => Refused::Busy,
        })
    }

    fn purge_at(&self, key: &[u8], now_ms: u64) -> bool {
        let Some(clock) = self.tag_clock() else { return false };
        let judge = Judge { now_ms, clock };
        let key = self.key(key);
        let was_good = self.with_shard(key.hash, |shard| shard.purge(key, judge)).unwrap_or(false);
        clock.purge(key.hash);
        was_good
    }

    pub(crate) fn tag_clock(&self) -> Option<TagClock<'_>> {
        TagClock::of(&self.segment)
    }

    fn key<'k>(&self, bytes: &'k [u8]) -> Key<'k> {
        Key { bytes, hash: xxh3_64_with_seed(bytes, self.segment.seed) }
    }

    fn tag(&self, tag: &str) -> u64 {
        xxh3_64_with_seed(tag.as_bytes(), self.segment.seed ^ TAG_SALT)
    }

    /// The shard takes the hash's high bits; its buckets take the low ones.
    fn shard_of(&self, hash: u64) -> u64 {
        (hash >> 48) & self.segment.geometry.shards.saturating_sub(1)
    }

    fn shard(&self, index: u64) -> Option<Shard<'_>> {
        Shard::of(&self.segment, index)
    }

    fn shards(&self) -> impl Iterator<Item = Shard<'_>> {
        (0..self.segment.geometry.shards).filter_map(|index| self.shard(index))
    }

    fn with_shard<R>(
        &self,
        hash: u64,
        work: impl FnOnce(&mut LockedShard<'_>) -> Result<R, Corrupt>,
    ) -> Result<R, Trouble> {
        self.with_shard_at(self.shard_of(hash), work)
    }

    /// Runs `work` under a shard's lock. A shard that turns out corrupt is emptied.
    fn with_shard_at<R>(
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
}

/// Holds the lock of a key's shard until it is dropped, as if in the middle of something: for tests of what a death or
/// a stop leads to.
#[cfg(feature = "crash-test")]
#[doc(hidden)]
#[derive(Debug)]
pub struct Held<'a> {
    _shard: LockedShard<'a>,
}

#[cfg(feature = "crash-test")]
impl Cache {
    /// See [`Held`]. With `dirty`, as if in the middle of a change.
    #[doc(hidden)]
    pub fn hold(&self, key: impl AsRef<[u8]>, dirty: bool) -> Option<Held<'_>> {
        let shard = self.shard(self.shard_of(self.key(key.as_ref()).hash))?.lock().ok()?;
        if dirty {
            shard.shard.head.dirty.store(1, Ordering::Release);
        }
        Some(Held { _shard: shard })
    }

    /// Which shard a key belongs to.
    #[doc(hidden)]
    pub fn shard_index(&self, key: impl AsRef<[u8]>) -> u64 {
        self.shard_of(self.key(key.as_ref()).hash)
    }
}

impl Stats {
    fn add(&mut self, shard: &Shard<'_>) {
        let value = |word: &AtomicU64| word.load(Ordering::Relaxed);
        let (head, counters) = (shard.head, &shard.head.counters);
        let (live_bytes, dead_bytes) = (value(&head.live_bytes), value(&head.dead_bytes));
        let used = live_bytes.saturating_add(dead_bytes);
        self.capacity += shard.ring_len;
        self.free_bytes += shard.ring_len.saturating_sub(used);
        for (sum, more) in [
            (&mut self.live_bytes, live_bytes),
            (&mut self.dead_bytes, dead_bytes),
            (&mut self.entries, value(&head.entries)),
            (&mut self.hits, value(&counters.hits)),
            (&mut self.misses, value(&counters.misses)),
            (&mut self.stores, value(&counters.stores)),
            (&mut self.evictions, value(&counters.evictions)),
            (&mut self.expirations, value(&counters.expirations)),
            (&mut self.purges, value(&counters.purges)),
            (&mut self.refused, value(&counters.refused)),
            (&mut self.lock_recoveries, value(&counters.lock_recoveries)),
            (&mut self.shards_lost, value(&counters.shards_lost)),
            (&mut self.lock_timeouts, value(&counters.lock_timeouts)),
        ] {
            *sum = sum.saturating_add(more);
        }
    }
}

/// When a page stored now is over. At least a millisecond away, so that 0 can mean "never".
fn expiry(now_ms: u64, ttl: Duration) -> u64 {
    let ttl_ms = u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX).max(1);
    now_ms.saturating_add(ttl_ms)
}

#[cfg(test)]
#[path = "cache_tests.rs"]
mod tests;
