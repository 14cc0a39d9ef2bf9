//! Lists the pages of the cache by prefix, and counts them by age and size.

use std::sync::atomic::Ordering;
use std::time::Duration;

use super::entry::Entry;
use super::freshness::{Freshness, Moment};
use super::index::Place;
use super::shard::Shard;
use crate::cache::Cache;

/// A page, as listed by [`Cache::list`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct EntryInfo {
    /// The key.
    pub key: Vec<u8>,
    /// Length of the value in bytes.
    pub len: u64,
    /// Time since the page was stored.
    pub age: Duration,
    /// Time until the page expires; `None` if it never expires.
    pub left: Option<Duration>,
    /// Whether the page has expired, but may be served while it is being rendered again, or if rendering fails.
    pub stale: bool,
    /// Number of tags.
    pub tags: u64,
}

/// The number of pages by age and by size.
///
/// `ages[n]` is the number of pages that were stored less than 2ⁿ seconds ago and are not in a lower class. `sizes[n]` is the number of
/// pages whose value is shorter than 2ⁿ bytes and that are not in a lower class. The last class contains all remaining pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Distribution {
    /// Number of pages by age.
    pub ages: [u64; 32],
    /// Number of pages by size.
    pub sizes: [u64; 32],
}

impl Cache {
    /// Lists up to `most` pages whose keys begin with `prefix`, in no particular order. Takes no lock, so pages that are stored or removed
    /// during the call may be missing.
    pub fn list(&self, prefix: impl AsRef<[u8]>, most: usize) -> Vec<EntryInfo> {
        let prefix = prefix.as_ref();
        let now_ms = self.segment.now_ms();
        let list = |entry: &Entry<'_>, freshness, holds: &dyn Fn() -> bool| {
            if !entry.key_starts_with(prefix) || !holds() {
                return None;
            }
            let mut key = Vec::with_capacity(entry.key_len());
            entry.copy_key(&mut key)?;
            let times = entry.times();
            let left = times.expires_ms.saturating_sub(now_ms);
            Some(EntryInfo {
                key,
                len: entry.value_len,
                age: Duration::from_millis(now_ms.saturating_sub(times.stored_ms)),
                left: (times.expires_ms != 0).then_some(Duration::from_millis(left)),
                stale: freshness != Freshness::Fresh,
                tags: entry.tag_count,
            })
        };
        self.survey(now_ms, list).take(most).collect()
    }

    /// Counts the pages by age and size.
    pub fn distribution(&self) -> Distribution {
        let now_ms = self.segment.now_ms();
        let mut distribution = Distribution::default();
        let measure = |entry: &Entry<'_>, _, _: &dyn Fn() -> bool| {
            Some((entry.words.stored_ms.load(Ordering::Relaxed), entry.value_len))
        };
        for (stored_ms, len) in self.survey(now_ms, measure) {
            distribution.ages[class(now_ms.saturating_sub(stored_ms) / 1000)] += 1;
            distribution.sizes[class(len)] += 1;
        }
        distribution
    }

    /// Calls `look` for every entry that is still valid. A result is used only if the entry was not overwritten during the call.
    fn survey<R>(
        &self,
        now_ms: u64,
        look: impl Fn(&Entry<'_>, Freshness, &dyn Fn() -> bool) -> Option<R>,
    ) -> impl Iterator<Item = R> {
        let check = self.check(Moment::At(now_ms));
        let largest = self.segment.geometry.max_record;
        let places = self.shards().flat_map(|shard| places(shard).map(move |place| (shard, place)));
        places.filter_map(move |(shard, place)| {
            let holds = || shard.holds(place);
            let entry = shard.bytes(place.ring).entry(place.position).filter(|entry| entry.size <= largest)?;
            let freshness = check.as_ref()?.freshness_of(&entry);
            let result = look(&entry, freshness, &holds);
            result.filter(|_| freshness.keeps() && holds())
        })
    }
}

/// Returns the locations stored in all slots of a shard.
fn places(shard: Shard<'_>) -> impl Iterator<Item = Place> {
    let slots = (0..shard.index.len()).filter_map(move |number| shard.index.slot(number));
    slots.filter_map(|slot| Place::of(slot.word.load(Ordering::Acquire)))
}

/// Returns the smallest `n` with `value < 2ⁿ`, or the last class.
fn class(value: u64) -> usize {
    usize::try_from(u64::BITS - value.leading_zeros()).unwrap_or(31).min(31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_are_powers_of_two() {
        assert_eq!([0, 1, 2, 3, 4, 1023, 1024].map(class), [0, 1, 2, 2, 3, 10, 11]);
        assert_eq!(class(u64::MAX), 31);
    }
}
