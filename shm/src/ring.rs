//! One shard: a log in a ring, and chains of entries that hang from hash buckets.
//!
//! Positions are virtual: they count bytes ever written, never wrap, and are never used twice until the shard is
//! reset. Position `p` lies at `p % ring_len` of the ring; `tail <= p < head` is what makes a reference valid. Chains
//! run from newer to older, so a reference below the tail ends the chain, and evicting is nothing but moving the
//! tail. No record straddles the end of the ring: a pad record fills up what is left there.
//!
//! Whoever changes the shard's words, records or chains sets `dirty` first and resets it last ([`LockedShard::change`]).
//! A process that finds it set when it takes the lock empties the shard. The bytes of a new entry are written beyond
//! `head`, where nobody looks, without `dirty`.
//!
//! Nothing found in shared memory is believed: each position, size and link is checked, each loop is bounded,
//! and what does not fit together is [`Corrupt`].
//!
//! May not: wait for another lock, or make a system call, while this one is held.

use std::sync::atomic::{AtomicU64, Ordering, fence};

use crate::entry::{Entry, Key, NewEntry};
use crate::layout::{EntryHead, GRAIN, KIND_DEAD, KIND_LIVE, KIND_PAD, RecordHead, SHARD_HEAD, ShardHead, VISITED};
use crate::lock::{Guard, NotLocked, Wait};
use crate::map::Map;
use crate::segment::Inner;
use crate::tags::TagClock;

/// Entries that one store moves to the head instead of evicting them, at most.
const REPRIEVES: u32 = 16;
/// Bytes that one store moves, at most.
const REPRIEVE_BYTES: u64 = 256 * 1024;

/// The shard contradicts itself. It has to be emptied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Corrupt;

/// Where a shard lies; cheap to make, holds no lock.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shard<'a> {
    pub(crate) map: &'a Map,
    pub(crate) head: &'a ShardHead,
    pub(crate) buckets: &'a [AtomicU64],
    pub(crate) ring_at: u64,
    pub(crate) ring_len: u64,
}

/// A shard whose lock is held.
#[derive(Debug)]
pub(crate) struct LockedShard<'a> {
    pub(crate) shard: Shard<'a>,
    _guard: Guard<'a>,
}

/// An entry that was found, and the link that leads to it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Found<'a> {
    link: &'a AtomicU64,
    entry: Entry<'a>,
}

/// What becomes of an entry: the time, and the tag clock.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Judge<'a> {
    pub(crate) now_ms: u64,
    pub(crate) clock: TagClock<'a>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Fresh,
    Expired,
    Purged,
}

/// What a lookup found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lookup {
    /// The value is in the buffer.
    Hit,
    Miss,
    /// The value is there, but the buffer lacks room: come again with so many bytes.
    Needs(u64),
}

impl<'a> Shard<'a> {
    /// `None` if the segment has no such shard.
    pub(crate) fn of(segment: &'a Inner, index: u64) -> Option<Shard<'a>> {
        let geometry = &segment.geometry;
        if index >= geometry.shards {
            return None;
        }
        let at = segment.shard_at(index);
        Some(Shard {
            map: &segment.map,
            head: segment.map.at(at)?,
            buckets: segment.map.slice(at + SHARD_HEAD, geometry.buckets)?,
            ring_at: at + SHARD_HEAD + geometry.buckets * 8,
            ring_len: geometry.ring_len,
        })
    }

    /// Takes the lock, and repairs what a dead owner may have left.
    ///
    /// After a timeout nobody waits until somebody got the lock again: a stopped process costs one request the
    /// wait, and not all of them.
    pub(crate) fn lock(self) -> Result<LockedShard<'a>, NotLocked> {
        let suspect = self.head.suspect.load(Ordering::Relaxed) != 0;
        let guard = match self.head.lock.lock(if suspect { Wait::Never } else { Wait::Bounded }) {
            Ok(guard) => guard,
            Err(NotLocked) => {
                self.head.suspect.store(1, Ordering::Relaxed);
                add(&self.head.counters.lock_timeouts, 1);
                return Err(NotLocked);
            }
        };
        if suspect {
            self.head.suspect.store(0, Ordering::Relaxed);
        }
        if guard.owner_died {
            add(&self.head.counters.lock_recoveries, 1);
        }
        let mut locked = LockedShard { shard: self, _guard: guard };
        if self.head.dirty.load(Ordering::Acquire) != 0 {
            locked.lose();
        }
        Ok(locked)
    }
}

impl<'a> LockedShard<'a> {
    /// Makes the shard empty, whatever state it is in, and counts the loss.
    pub(crate) fn lose(&mut self) {
        let head = self.shard.head;
        head.dirty.store(1, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        for bucket in self.shard.buckets {
            bucket.store(0, Ordering::Relaxed);
        }
        self.start_at(self.shard.ring_len);
        add(&head.counters.shards_lost, 1);
        head.dirty.store(0, Ordering::Release);
    }

    /// Empties a shard that is in order: the chains end by themselves as all they refer to is below the tail.
    pub(crate) fn clear(&mut self) -> Result<(), Corrupt> {
        self.change(|shard| {
            let (_, head) = shard.bounds()?;
            shard.start_at(head);
            Ok(())
        })
    }

    fn start_at(&self, position: u64) {
        let head = self.shard.head;
        head.head.store(position, Ordering::Relaxed);
        head.tail.store(position, Ordering::Relaxed);
        head.live_bytes.store(0, Ordering::Relaxed);
        head.dead_bytes.store(0, Ordering::Relaxed);
        head.entries.store(0, Ordering::Relaxed);
    }

    /// Runs `edit` with `dirty` set. If it fails, panics or dies, `dirty` stays, and the shard will be emptied.
    pub(crate) fn change<R>(&mut self, edit: impl FnOnce(&mut Self) -> Result<R, Corrupt>) -> Result<R, Corrupt> {
        let dirty = &self.shard.head.dirty;
        dirty.store(1, Ordering::Relaxed);
        fence(Ordering::SeqCst); // no change overtakes the mark
        let result = edit(self)?;
        dirty.store(0, Ordering::Release); // nor comes after it is gone
        Ok(result)
    }

    /// Copies the value of `key` into `out`, which must be empty. Entries found out of date are dropped.
    pub(crate) fn read(&mut self, key: Key<'_>, judge: Judge<'_>, out: &mut Vec<u8>) -> Result<Lookup, Corrupt> {
        let counters = &self.shard.head.counters;
        let Some(found) = self.find(key)? else {
            add(&counters.misses, 1);
            return Ok(Lookup::Miss);
        };
        let entry = found.entry;
        let verdict = self.judge(&entry, judge)?;
        if verdict != Verdict::Fresh {
            self.count(verdict);
            add(&counters.misses, 1);
            self.change(|shard| shard.remove(found))?;
            return Ok(Lookup::Miss);
        }
        if ((out.capacity() - out.len()) as u64) < entry.value_len {
            return Ok(Lookup::Needs(entry.value_len));
        }
        self.shard.map.read(entry.value_at(), entry.value_len, out).ok_or(Corrupt)?;
        let flags = &entry.words.record.flags;
        let seen = flags.load(Ordering::Relaxed);
        if seen & VISITED == 0 {
            flags.store(seen | VISITED, Ordering::Relaxed);
        }
        add(&counters.hits, 1);
        Ok(Lookup::Hit)
    }

    /// Stores an entry of `size` bytes (see [`NewEntry::size`]; at most half the ring), in place of one with its key.
    pub(crate) fn insert(&mut self, new: &NewEntry<'_>, size: u64, judge: Judge<'_>) -> Result<(), Corrupt> {
        self.change(|shard| shard.make_room(size, judge))?;
        let (_, position) = self.bounds()?;
        let words = self.write_entry(position, new, size)?;
        self.change(|shard| {
            if let Some(old) = shard.find(new.key)? {
                shard.remove(old)?;
            }
            shard.append(position, size)?;
            shard.link(words, position)
        })?;
        add(&self.shard.head.counters.stores, 1);
        Ok(())
    }

    /// Drops the entry of `key`; whether there was one and it was fresh.
    pub(crate) fn purge(&mut self, key: Key<'_>, judge: Judge<'_>) -> Result<bool, Corrupt> {
        let Some(found) = self.find(key)? else { return Ok(false) };
        let verdict = self.judge(&found.entry, judge)?;
        self.change(|shard| shard.remove(found))?;
        self.count(if verdict == Verdict::Fresh { Verdict::Purged } else { verdict });
        Ok(verdict == Verdict::Fresh)
    }

    /// The newest entry with this key. As each store removes the one before, it is also the only one.
    fn find(&self, key: Key<'_>) -> Result<Option<Found<'a>>, Corrupt> {
        let (tail, head) = self.bounds()?;
        let mut link = self.bucket(key.hash)?;
        let mut below = head;
        for _ in 0..=self.most_entries() {
            let position = link.load(Ordering::Relaxed);
            if position < tail {
                return Ok(None);
            }
            if position >= below {
                return Err(Corrupt); // chains run from newer to older: no loops
            }
            let entry = self.entry(position)?;
            if entry.words.hash.load(Ordering::Relaxed) == key.hash
                && entry.key_len == key.bytes.len() as u64
                && self.shard.map.equals(entry.key_at(), key.bytes).ok_or(Corrupt)?
            {
                return Ok(Some(Found { link, entry }));
            }
            link = &entry.words.next;
            below = position;
        }
        Err(Corrupt)
    }

    /// Whether an entry may still be served.
    pub(crate) fn judge(&self, entry: &Entry<'_>, judge: Judge<'_>) -> Result<Verdict, Corrupt> {
        let Judge { now_ms, clock } = judge;
        let expires_ms = entry.words.expires_ms.load(Ordering::Relaxed);
        if expires_ms != 0 && now_ms >= expires_ms {
            return Ok(Verdict::Expired);
        }
        let snapshot = entry.words.snapshot.load(Ordering::Relaxed);
        if snapshot == clock.now() {
            return Ok(Verdict::Fresh); // nothing at all was purged since
        }
        let current = clock.outlived_clear(snapshot)
            && clock.is_current(entry.words.hash.load(Ordering::Relaxed), snapshot)
            && entry.tags(self.shard.map)?.iter().all(|tag| clock.is_current(tag.load(Ordering::Relaxed), snapshot));
        Ok(if current { Verdict::Fresh } else { Verdict::Purged })
    }

    fn count(&self, verdict: Verdict) {
        let counters = &self.shard.head.counters;
        match verdict {
            Verdict::Fresh => add(&counters.evictions, 1),
            Verdict::Expired => add(&counters.expirations, 1),
            Verdict::Purged => add(&counters.purges, 1),
        }
    }

    // ---- What follows changes the shard, and is called inside `change` only. ----

    /// Takes an entry out of its chain and leaves its bytes as dead.
    fn remove(&mut self, found: Found<'_>) -> Result<(), Corrupt> {
        let Found { link, entry } = found;
        link.store(entry.words.next.load(Ordering::Relaxed), Ordering::Relaxed);
        entry.words.record.flags.store(KIND_DEAD, Ordering::Relaxed);
        let head = self.shard.head;
        subtract(&head.entries, 1)?;
        subtract(&head.live_bytes, entry.size)?;
        add(&head.dead_bytes, entry.size);
        Ok(())
    }

    /// Evicts until `size` bytes in one piece are free at the head, and pads up to that piece.
    fn make_room(&mut self, size: u64, judge: Judge<'_>) -> Result<(), Corrupt> {
        let mut reprieves = REPRIEVES;
        let mut reprieve_bytes = REPRIEVE_BYTES;
        for _ in 0..=self.shard.ring_len / GRAIN + u64::from(REPRIEVES) {
            let (tail, head) = self.bounds()?;
            let free = self.shard.ring_len - (head - tail);
            let pad = self.pad_before(head, size);
            if free >= pad + size {
                return self.pad(head, pad);
            }
            let record = self.record(tail)?;
            if record.kind != KIND_LIVE {
                self.shard.head.tail.store(tail + record.size, Ordering::Relaxed);
                subtract(&self.shard.head.dead_bytes, record.size)?;
                continue;
            }
            let entry = self.entry(tail)?;
            let verdict = self.judge(&entry, judge)?;
            let pad = self.pad_before(head, entry.size);
            let spared = record.visited && verdict == Verdict::Fresh && reprieves > 0;
            if spared && entry.size <= reprieve_bytes && pad <= free {
                reprieves -= 1;
                reprieve_bytes -= entry.size;
                self.reprieve(&entry, tail, head, pad)?;
            } else {
                self.drop_tail(&entry, tail)?;
                self.count(verdict);
            }
        }
        Err(Corrupt)
    }

    /// Moves the tail over a live entry.
    fn drop_tail(&mut self, entry: &Entry<'_>, tail: u64) -> Result<(), Corrupt> {
        self.shard.head.tail.store(tail + entry.size, Ordering::Relaxed);
        subtract(&self.shard.head.entries, 1)?;
        subtract(&self.shard.head.live_bytes, entry.size)
    }

    /// Moves the entry at the tail to the head, as a new one that has not been visited.
    ///
    /// Its own bytes count as free from the start, so the two places may overlap; at most `pad` bytes are needed besides.
    fn reprieve(&mut self, entry: &Entry<'_>, tail: u64, head: u64, pad: u64) -> Result<(), Corrupt> {
        self.drop_tail(entry, tail)?;
        self.pad(head, pad)?;
        let position = head + pad;
        let to = self.offset(position);
        self.shard.map.shift(entry.at, to, entry.size).ok_or(Corrupt)?;
        let words: &EntryHead = self.shard.map.at(to).ok_or(Corrupt)?;
        words.record.flags.store(KIND_LIVE, Ordering::Relaxed);
        words.position.store(position, Ordering::Relaxed);
        self.append(position, entry.size)?;
        self.link(words, position)
    }

    /// Writes a pad record of `pad` bytes at the head, if that is not 0.
    fn pad(&mut self, head: u64, pad: u64) -> Result<(), Corrupt> {
        if pad == 0 {
            return Ok(());
        }
        let record: &RecordHead = self.shard.map.at(self.offset(head)).ok_or(Corrupt)?;
        record.size.store(u32::try_from(pad).map_err(|_| Corrupt)?, Ordering::Relaxed);
        record.flags.store(KIND_PAD, Ordering::Relaxed);
        self.shard.head.head.store(head + pad, Ordering::Relaxed);
        add(&self.shard.head.dead_bytes, pad);
        Ok(())
    }

    /// Counts a live record of `size` bytes that lies at the head.
    fn append(&mut self, position: u64, size: u64) -> Result<(), Corrupt> {
        let head = self.shard.head;
        head.head.store(position.checked_add(size).ok_or(Corrupt)?, Ordering::Relaxed);
        add(&head.live_bytes, size);
        add(&head.entries, 1);
        Ok(())
    }

    /// Makes an entry the first of its chain.
    fn link(&mut self, words: &EntryHead, position: u64) -> Result<(), Corrupt> {
        let bucket = self.bucket(words.hash.load(Ordering::Relaxed))?;
        words.next.store(bucket.load(Ordering::Relaxed), Ordering::Relaxed);
        bucket.store(position, Ordering::Relaxed);
        Ok(())
    }
}

/// Adds to a word that is changed under the lock, or may be a little wrong.
pub(crate) fn add(word: &AtomicU64, amount: u64) {
    word.fetch_add(amount, Ordering::Relaxed);
}

fn subtract(word: &AtomicU64, amount: u64) -> Result<(), Corrupt> {
    let left = word.load(Ordering::Relaxed).checked_sub(amount).ok_or(Corrupt)?;
    word.store(left, Ordering::Relaxed);
    Ok(())
}
