//! Remembers ghosts, which are hashes of entries that were evicted from the small ring. An entry that is stored again soon after its
//! eviction is placed directly in the main ring.
//!
//! A ghost is one word: half of the hash, and the sequence number of the eviction. The other half of the hash selects the bucket. A new
//! ghost replaces the oldest ghost in its bucket. A ghost stays valid for as many evictions as the main ring has entries, as in S3-FIFO.
//! Ghosts are hints: an incorrect ghost only leads to a worse choice of the entry to evict.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::memory::layout::GhostBucket;

/// Minimum number of evictions for which a ghost stays valid, even if the main ring is nearly empty.
const FEWEST: u64 = 128;

/// Records that an entry with this hash was evicted.
pub(crate) fn remember(buckets: &[GhostBucket], sequence: &AtomicU64, hash: u64) {
    let now = sequence.load(Ordering::Relaxed).wrapping_add(1) & 0xffff_ffff;
    sequence.store(now, Ordering::Relaxed);
    let Some(bucket) = bucket_of(buckets, hash) else { return };
    let oldest = bucket.ghosts.iter().max_by_key(|ghost| age(ghost.load(Ordering::Relaxed), now));
    if let Some(ghost) = oldest {
        ghost.store(hash >> 32 << 32 | now, Ordering::Relaxed);
    }
}

/// Whether an entry with this hash was among the last `reach` evictions.
pub(crate) fn contains(buckets: &[GhostBucket], sequence: &AtomicU64, hash: u64, reach: u64) -> bool {
    let now = sequence.load(Ordering::Relaxed) & 0xffff_ffff;
    let mut ghosts = bucket_of(buckets, hash).into_iter().flat_map(|bucket| &bucket.ghosts);
    ghosts.any(|ghost| {
        let ghost = ghost.load(Ordering::Relaxed);
        ghost != 0 && ghost >> 32 == hash >> 32 && age(ghost, now) <= reach.max(FEWEST)
    })
}

fn age(ghost: u64, now: u64) -> u64 {
    if ghost == 0 { u64::MAX } else { now.wrapping_sub(ghost) & 0xffff_ffff }
}

fn bucket_of(buckets: &[GhostBucket], hash: u64) -> Option<&GhostBucket> {
    // The number of buckets is a power of two.
    let mask = (buckets.len() as u64).wrapping_sub(1);
    buckets.get(usize::try_from(hash & mask).ok()?)
}
