//! Looks up the entry of a key with its freshness, times and tags, for rendering and for pages composed of fragments.
//!
//! Must not count lookups, or decide what is served.

use std::sync::atomic::Ordering;

use super::entry::{Key, Times};
use super::freshness::{Freshness, Moment};
use super::read::Sight;
use super::value::{CacheValue, copy_parts};
use crate::cache::Cache;

/// A copy of an entry.
#[derive(Debug)]
pub(crate) struct Lookup<V> {
    pub(crate) value: V,
    pub(crate) freshness: Freshness,
    pub(crate) times: Times,
    /// Empty unless requested.
    pub(crate) tags: Vec<u64>,
}

/// Whether the caller needs the entry's tags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tags {
    Wanted,
    Unwanted,
}

impl Cache {
    /// Returns the entry stored under a key, if `wanted` accepts it, and the number of times that the lookup was repeated.
    pub(crate) fn lookup<V: CacheValue>(
        &self,
        key: Key<'_>,
        now_ms: u64,
        tags: Tags,
        wanted: impl Fn(Freshness, &Times) -> bool,
    ) -> (Option<Lookup<V>>, usize) {
        let Some(check) = self.check(Moment::At(now_ms)) else { return (None, 0) };
        let Some(shard) = self.shard(self.shard_of(key.hash)) else { return (None, 0) };
        let (found, tries) = shard.look(key, &check, |sight| {
            let times = sight.entry.times();
            if !wanted(sight.freshness, &times) {
                return Some(None);
            }
            let (meta, value) = copy_parts(sight)?;
            let tags = if tags == Tags::Wanted { copy_tags(sight)? } else { Vec::new() };
            sight.slot.visit();
            Some(Some((meta, value, sight.freshness, times, tags)))
        });
        let lookup = found.flatten().and_then(|(meta, value, freshness, times, tags)| {
            Some(Lookup { value: V::from_parts(&meta, value)?, freshness, times, tags })
        });
        (lookup, tries)
    }
}

fn copy_tags(sight: &Sight<'_, '_>) -> Option<Vec<u64>> {
    // The number of tags must be verified before it is used for an allocation.
    let tags = sight.entry.tags();
    sight.holds().then(|| tags.iter().map(|tag| tag.load(Ordering::Relaxed)).collect())
}
