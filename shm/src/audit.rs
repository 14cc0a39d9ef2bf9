//! Checks a shard against itself: for tests, and after a death that makes one doubt the memory.
//!
//! Walks the log from tail to head and then every chain, and compares what it finds with what the shard claims. As
//! each live entry is found in exactly one chain, its own, and the totals agree, no entry is lost or counted twice.
//!
//! May not: change anything.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::layout::{KIND_LIVE, KIND_PAD};
use crate::ring::{Corrupt, LockedShard};

/// What the walk along the log adds up to.
#[derive(Debug, Default, PartialEq, Eq)]
struct Sums {
    live_bytes: u64,
    dead_bytes: u64,
    entries: u64,
}

/// Checks one shard; `hash_of` is the hash that keys were stored under.
pub(crate) fn audit(shard: &LockedShard<'_>, hash_of: impl Fn(&[u8]) -> u64) -> Result<(), String> {
    let head = shard.shard.head;
    if head.dirty.load(Ordering::Relaxed) != 0 {
        return Err("is marked as being changed though its lock was free".to_owned());
    }
    let (tail, end) = shard.bounds().map_err(|Corrupt| "has a head and tail that cannot be".to_owned())?;
    let found = walk_log(shard, tail, end, hash_of)?;
    let value = |word: &AtomicU64| word.load(Ordering::Relaxed);
    let claimed = Sums {
        live_bytes: value(&head.live_bytes),
        dead_bytes: value(&head.dead_bytes),
        entries: value(&head.entries),
    };
    if found != claimed {
        return Err(format!("claims {claimed:?}, but has {found:?}"));
    }
    if found.live_bytes + found.dead_bytes != end - tail {
        return Err(format!("has {found:?} between {tail} and {end}"));
    }
    let chained = walk_chains(shard, tail, end)?;
    if chained != found.entries {
        return Err(format!("has {} live entries, but {chained} in its chains", found.entries));
    }
    Ok(())
}

fn walk_log(shard: &LockedShard<'_>, tail: u64, end: u64, hash_of: impl Fn(&[u8]) -> u64) -> Result<Sums, String> {
    let mut sums = Sums::default();
    let mut position = tail;
    let mut key = Vec::new();
    while position < end {
        let broken = |Corrupt| format!("has a broken record at {position}");
        let record = shard.record(position).map_err(broken)?;
        if record.kind == KIND_LIVE {
            let entry = shard.entry(position).map_err(broken)?;
            key.clear();
            key.reserve(usize::try_from(entry.key_len).unwrap_or(0));
            shard.copy_key(&entry, &mut key).map_err(broken)?;
            if hash_of(&key) != entry.words.hash.load(Ordering::Relaxed) {
                return Err(format!("has an entry at {position} whose key is not the one it was stored under"));
            }
            sums.live_bytes += record.size;
            sums.entries += 1;
        } else {
            sums.dead_bytes += record.size;
        }
        position += record.size;
        let at_end_of_ring = position.is_multiple_of(shard.shard.ring_len);
        if record.kind == KIND_PAD && !at_end_of_ring {
            return Err(format!("has a pad that ends at {position}, which is not the end of the ring"));
        }
    }
    Ok(sums)
}

fn walk_chains(shard: &LockedShard<'_>, tail: u64, end: u64) -> Result<u64, String> {
    let mut total = 0;
    let mut hashes = Vec::new();
    for (index, bucket) in shard.shard.buckets.iter().enumerate() {
        hashes.clear();
        let mut below = end;
        let mut position = bucket.load(Ordering::Relaxed);
        while position >= tail {
            let broken = |Corrupt| format!("has a chain {index} with a broken link to {position}");
            if position >= below {
                return Err(format!("has a chain {index} that runs from {below} to {position}"));
            }
            let entry = shard.entry(position).map_err(broken)?;
            let hash = entry.words.hash.load(Ordering::Relaxed);
            if !std::ptr::eq(shard.bucket(hash).map_err(broken)?, bucket) {
                return Err(format!("has an entry at {position} in chain {index}, where it does not belong"));
            }
            if hashes.contains(&hash) {
                return Err(format!("has two entries for the key of the one at {position}"));
            }
            hashes.push(hash);
            total += 1;
            below = position;
            position = entry.words.next.load(Ordering::Relaxed);
        }
    }
    Ok(total)
}
