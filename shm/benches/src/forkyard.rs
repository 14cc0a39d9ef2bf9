//! Our own cache as the benchmarks use it: the one file that depends on what it offers.

use forkyard_shm::{Cache, Plan, Segment};

use crate::error::Error;

/// A cache of a segment of its own; all its overhead is within `cache_bytes`. Its segment lives as long as it does.
pub(crate) fn open(cache_bytes: u64) -> Result<Cache, Error> {
    let segment = Segment::create(&Plan { cache_bytes, rows: 4 }).map_err(Error::Segment)?;
    Ok(segment.cache())
}

/// Copies the value into `into`, in place of what is there.
pub(crate) fn get_into(cache: &Cache, key: &[u8], into: &mut Vec<u8>) -> bool {
    let Some(value) = cache.get(key) else { return false };
    into.clear();
    into.extend_from_slice(&value);
    true
}
