//! Forkyard's cache, copying and in place, with and without tags.

use forkyard_shm::{Cache, StoreOptions};

use crate::error::Error;
use crate::forkyard;
use crate::get::data::Shape;
use crate::get::measure::Store;
use crate::sample::Key;

/// The segments, which are created before the fork.
#[derive(Debug)]
pub(crate) struct Segments {
    pub(crate) plain: Cache,
    pub(crate) tagged: Cache,
}

impl Segments {
    /// Creates segments that are large enough to evict nothing.
    pub(crate) fn new(shape: Shape) -> Result<Segments, Error> {
        let bytes = shape.bytes() + u64::from(shape.keys) * 256;
        // Small segments get twice the size of their content, because stores must not cause evictions, and the mixed workload stores
        // continuously.
        let bytes = if bytes < (512 << 20) { bytes * 2 } else { bytes + bytes / 4 };
        Ok(Segments { plain: forkyard::open(bytes)?, tagged: forkyard::open(bytes)? })
    }
}

/// The tags of stored pages: a fixed number of tags per page, chosen from 1000 tags.
#[derive(Debug)]
struct Tagging {
    options: Vec<StoreOptions>,
}

impl Tagging {
    const VARIANTS: u32 = 256;

    fn new(tags: u32) -> Tagging {
        let tag = |variant, n| format!("section:{}", (variant * 31 + n * 277) % 1000);
        let options = |variant| StoreOptions::new().tags((0..tags).map(|n| tag(variant, n)));
        Tagging { options: (0..Self::VARIANTS).map(options).collect() }
    }

    fn of(&self, index: u32) -> &StoreOptions {
        &self.options[(index % Self::VARIANTS) as usize]
    }
}

/// Copies the value.
#[derive(Debug)]
pub(crate) struct Copying {
    cache: Cache,
    tagging: Tagging,
    found: Vec<u8>,
}

impl Copying {
    pub(crate) fn new(cache: Cache, tags: u32) -> Copying {
        Copying { cache, tagging: Tagging::new(tags), found: Vec::new() }
    }
}

impl Store for Copying {
    #[inline]
    fn get(&mut self, key: &Key, seen: impl FnOnce(&[u8])) -> Result<bool, Error> {
        let found = forkyard::get_into(&self.cache, key, &mut self.found);
        if found {
            seen(&self.found);
        }
        Ok(found)
    }

    #[inline]
    fn set(&mut self, index: u32, key: &Key, value: &[u8]) -> Result<(), Error> {
        forkyard::set(&self.cache, key, value, self.tagging.of(index))
    }
}

/// Reads the value in place.
#[derive(Debug)]
pub(crate) struct Pinning {
    cache: Cache,
    tagging: Tagging,
}

impl Pinning {
    pub(crate) fn new(cache: Cache) -> Pinning {
        Pinning { cache, tagging: Tagging::new(0) }
    }
}

impl Store for Pinning {
    #[inline]
    fn get(&mut self, key: &Key, seen: impl FnOnce(&[u8])) -> Result<bool, Error> {
        let Some(value) = forkyard::pin(&self.cache, key) else { return Ok(false) };
        seen(&value);
        Ok(true)
    }

    #[inline]
    fn set(&mut self, index: u32, key: &Key, value: &[u8]) -> Result<(), Error> {
        forkyard::set(&self.cache, key, value, self.tagging.of(index))
    }
}
