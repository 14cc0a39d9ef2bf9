//! Our own cache as the benchmarks use it: the one file that depends on what it offers.

use std::ops::Deref;

use forkyard_shm::{Cache, Plan, Segment, StoreError, StoreOptions};

use crate::error::Error;

/// A cache of a segment of its own; all its overhead is within `cache_bytes`. The segment lives as long as the cache.
pub(crate) fn open(cache_bytes: u64) -> Result<Cache, Error> {
    let segment = Segment::create(&Plan { cache_bytes, rows: 4, ..Plan::default() }).map_err(Error::Segment)?;
    Ok(segment.cache())
}

/// A lookup that puts the value into `into`, in place of what is there.
#[inline]
pub(crate) fn get_into(cache: &Cache, key: &[u8], into: &mut Vec<u8>) -> bool {
    cache.get_into(key, into)
}

/// A lookup that gives the value where it lies.
#[inline]
#[expect(unsafe_code, reason = "the other caches lend slices too")]
pub(crate) fn pin(cache: &Cache, key: &[u8]) -> Option<impl Deref<Target = [u8]>> {
    // SAFETY: the processes of a benchmark are this program alone, which writes to the segment by its functions only.
    Some(unsafe { cache.pin(key)?.into_slice() })
}

/// Stores a value, unless others are at it right now: a cache may forget.
#[inline]
pub(crate) fn set(cache: &Cache, key: &[u8], value: &[u8], options: &StoreOptions) -> Result<(), Error> {
    match cache.set(key, value, options) {
        Ok(()) | Err(StoreError::Busy) => Ok(()),
        Err(refused) => Err(Error::StoreError(refused)),
    }
}
