//! Wraps Forkyard's page cache for the benchmarks. Only this file depends on the API of the cache.

use std::ops::Deref;

use forkyard_shm::{Cache, Plan, Segment, StoreError, StoreOptions};

use crate::error::Error;

/// Opens a cache in its own segment. All overhead is within `cache_bytes`. The segment exists as long as the cache.
pub(crate) fn open(cache_bytes: u64) -> Result<Cache, Error> {
    let segment = Segment::create(&Plan { cache_bytes, rows: 4, ..Plan::default() }).map_err(Error::Segment)?;
    Ok(segment.cache())
}

/// Looks up a key, and replaces the content of `into` with the value.
#[inline]
pub(crate) fn get_into(cache: &Cache, key: &[u8], into: &mut Vec<u8>) -> bool {
    cache.get_into(key, into)
}

/// Looks up a key, and returns the value in place.
#[inline]
#[expect(unsafe_code, reason = "the other caches return slices too")]
pub(crate) fn pin(cache: &Cache, key: &[u8]) -> Option<impl Deref<Target = [u8]>> {
    // SAFETY: the processes of a benchmark all run this program, which writes to the segment only through the segment's functions.
    Some(unsafe { cache.pin(key)?.into_slice() })
}

/// Stores a value. If another process holds the lock, the value is dropped, as a cache may do.
#[inline]
pub(crate) fn set(cache: &Cache, key: &[u8], value: &[u8], options: &StoreOptions) -> Result<(), Error> {
    match cache.set(key, value, options) {
        Ok(()) | Err(StoreError::Busy) => Ok(()),
        Err(refused) => Err(Error::StoreError(refused)),
    }
}
