//! A page looked up together with what else is to be known of it: by those who render, and those who make a page of others.
//!
//! May not: count, or decide what is served.

use std::sync::atomic::Ordering;

use crate::cache::{Cache, copy_value};
use crate::entry::{Key, Times};
use crate::judge::Verdict;
use crate::read::{Looked, Sight};

/// A page as it was found.
#[derive(Debug)]
pub(crate) struct Page {
    pub(crate) value: Vec<u8>,
    pub(crate) verdict: Verdict,
    pub(crate) times: Times,
    /// Empty unless asked for.
    pub(crate) tags: Vec<u64>,
}

/// Whether a page's tags are wanted too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tags {
    Wanted,
    Unwanted,
}

impl Cache {
    /// The page of a key, if `wanted` says so, and how often the lookup was begun again.
    pub(crate) fn page(
        &self,
        key: Key<'_>,
        now_ms: u64,
        tags: Tags,
        wanted: impl Fn(Verdict, &Times) -> bool,
    ) -> (Option<Page>, usize) {
        let Some(judge) = self.judge(now_ms) else { return (None, 0) };
        let Some(shard) = self.shard(self.shard_of(key.hash)) else { return (None, 0) };
        let (looked, tries) = shard.look(key, &judge, |sight| {
            let times = sight.entry.times();
            if !wanted(sight.verdict, &times) {
                return Some(None);
            }
            let mut value = Vec::new();
            copy_value(sight, &mut value)?;
            let tags = if tags == Tags::Wanted { copy_tags(sight)? } else { Vec::new() };
            Some(Some((Page { value, verdict: sight.verdict, times, tags }, sight.slot)))
        });
        let page = match looked {
            Looked::At(Some((page, slot))) => {
                slot.visit();
                Some(page)
            }
            Looked::At(None) | Looked::Nothing => None,
        };
        (page, tries)
    }
}

fn copy_tags(sight: &Sight<'_>) -> Option<Vec<u64>> {
    // Their number is worth an allocation only if it is true.
    let tags = sight.entry.tags();
    sight.holds().then(|| tags.iter().map(|tag| tag.load(Ordering::Relaxed)).collect())
}
