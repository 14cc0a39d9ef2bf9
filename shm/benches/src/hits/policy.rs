//! The compared policies: textbook policies that only count bytes, and two real caches.

use std::collections::hash_map::DefaultHasher;
use std::hash::BuildHasherDefault;

use forkyard_shm::StoreOptions;
use moka::sync::Cache as Moka;

use crate::error::Error;
use crate::forkyard;
use crate::hits::queues::{Fifo, Lru, Sieve};
use crate::hits::s3fifo::S3Fifo;
use crate::hits::trace::Request;
use crate::sample::{KEY_LEN, key};

/// A cache with a fixed number of bytes.
pub(crate) trait Cached {
    /// Looks up the object, and stores it if it is missing. Returns whether the object was present.
    fn request(&mut self, request: Request) -> Result<bool, Error>;
}

/// A policy: its name, and a function that creates a cache with a given number of bytes.
pub(crate) struct Policy {
    pub(crate) name: &'static str,
    pub(crate) open: fn(u64) -> Result<Box<dyn Cached>, Error>,
}

pub(crate) const POLICIES: [Policy; 7] = [
    Policy { name: "forkyard", open: |capacity| Ok(Box::new(Forkyard::new(capacity)?)) },
    Policy { name: "LRU", open: |capacity| Ok(Box::new(Lru::new(capacity))) },
    Policy { name: "FIFO", open: |capacity| Ok(Box::new(Fifo::new(capacity))) },
    Policy { name: "SIEVE", open: |capacity| Ok(Box::new(Sieve::new(capacity))) },
    Policy { name: "S3-FIFO, freq ≥ 1", open: |capacity| Ok(Box::new(S3Fifo::<1>::new(capacity))) },
    Policy { name: "S3-FIFO, freq ≥ 2", open: |capacity| Ok(Box::new(S3Fifo::<2>::new(capacity))) },
    Policy { name: "moka", open: |capacity| Ok(Box::new(MokaCache::new(capacity))) },
];

/// Returns the assumed size of an object in a cache that does not report its memory: the value, the key, and an estimate of the overhead.
pub(crate) fn charge(size: u32) -> u64 {
    u64::from(size) + KEY_LEN as u64 + 64
}

struct Forkyard {
    cache: forkyard_shm::Cache,
    options: StoreOptions,
    page: Vec<u8>,
    found: Vec<u8>,
}

impl Forkyard {
    fn new(capacity: u64) -> Result<Forkyard, Error> {
        let cache = forkyard::open(capacity)?;
        Ok(Forkyard { cache, options: StoreOptions::new(), page: vec![b'x'; 256 * 1024], found: Vec::new() })
    }
}

impl Cached for Forkyard {
    fn request(&mut self, Request { object, size }: Request) -> Result<bool, Error> {
        let key = key(object);
        if forkyard::get_into(&self.cache, &key, &mut self.found) {
            assert_eq!(self.found.len(), size as usize, "the size of the page differs from the stored size");
            return Ok(true);
        }
        forkyard::set(&self.cache, &key, &self.page[..size as usize], &self.options)?;
        Ok(false)
    }
}

/// A hasher with the same result in every run.
type NoChance = BuildHasherDefault<DefaultHasher>;

struct MokaCache {
    cache: Moka<u32, u32, NoChance>,
    unseen: u32,
}

impl MokaCache {
    /// Maximum number of buffered lookups. moka buffers lookups and processes the buffer later.
    const MOST_UNSEEN: u32 = 32;

    fn new(capacity: u64) -> MokaCache {
        let weigh = |_: &u32, size: &u32| u32::try_from(charge(*size)).unwrap_or(u32::MAX);
        let builder = Moka::builder().max_capacity(capacity).weigher(weigh);
        MokaCache { cache: builder.build_with_hasher(NoChance::default()), unseen: 0 }
    }
}

impl Cached for MokaCache {
    fn request(&mut self, Request { object, size }: Request) -> Result<bool, Error> {
        let hit = self.cache.get(&object).is_some();
        if !hit {
            self.cache.insert(object, size);
        }
        self.unseen += 1;
        if !hit || self.unseen >= Self::MOST_UNSEEN {
            self.cache.run_pending_tasks();
            self.unseen = 0;
        }
        Ok(hit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_policy_holds_exactly_what_fits() {
        const SIZE: u32 = 1000;
        let capacity: u64 = 4 << 20;
        let most = u32::try_from(capacity / u64::from(SIZE)).unwrap();
        for Policy { name, open } in POLICIES {
            let mut cache = open(capacity).unwrap();
            let mut ask = |object| cache.request(Request { object, size: SIZE }).unwrap();
            assert!(!ask(0) && ask(0), "{name}");
            // Half of the objects fit, and remain in the cache if they were requested again.
            assert!((1..most / 2).all(|object| !ask(object) && ask(object)), "{name}");
            assert!((0..most / 2).all(&mut ask), "{name}");
            // Only a part of three times as many objects fits.
            let _ = (0..most * 3).filter(|&object| ask(object)).count();
            let kept = (0..most * 3).filter(|&object| ask(object)).count();
            assert!(kept <= most as usize, "{name} kept {kept} of {most}");
        }
    }
}
