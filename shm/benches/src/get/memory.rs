//! Stores in the memory of the process: the baseline for the cost of a lookup, and two Rust crates.

use std::collections::HashMap;
use std::sync::Arc;

use moka::sync::Cache as Moka;
use quick_cache::sync::Cache as Quick;

use crate::error::Error;
use crate::get::measure::Store;
use crate::sample::Key;

type Bytes = Box<[u8]>;

/// The hash table of the standard library, which copies the value: the baseline for any cache that copies.
#[derive(Debug, Default)]
pub(crate) struct Limit {
    values: HashMap<Bytes, Bytes>,
    found: Vec<u8>,
}

impl Store for Limit {
    #[inline]
    fn get(&mut self, key: &Key, seen: impl FnOnce(&[u8])) -> Result<bool, Error> {
        let Some(value) = self.values.get(key.as_slice()) else { return Ok(false) };
        self.found.clear();
        self.found.extend_from_slice(value);
        seen(&self.found);
        Ok(true)
    }

    #[inline]
    fn set(&mut self, _: u32, key: &Key, value: &[u8]) -> Result<(), Error> {
        match self.values.get_mut(key.as_slice()) {
            Some(old) if old.len() == value.len() => old.copy_from_slice(value),
            Some(old) => *old = value.into(),
            None => drop(self.values.insert(key.as_slice().into(), value.into())),
        }
        Ok(())
    }
}

/// A map with reference-counted values.
pub(crate) trait Shared {
    fn get(&self, key: &[u8]) -> Option<Arc<[u8]>>;
    fn insert(&self, key: Bytes, value: Arc<[u8]>);
}

impl Shared for Moka<Bytes, Arc<[u8]>> {
    #[inline]
    fn get(&self, key: &[u8]) -> Option<Arc<[u8]>> {
        Moka::get(self, key)
    }

    #[inline]
    fn insert(&self, key: Bytes, value: Arc<[u8]>) {
        Moka::insert(self, key, value);
    }
}

impl Shared for Quick<Bytes, Arc<[u8]>> {
    #[inline]
    fn get(&self, key: &[u8]) -> Option<Arc<[u8]>> {
        Quick::get(self, key)
    }

    #[inline]
    fn insert(&self, key: Bytes, value: Arc<[u8]>) {
        Quick::insert(self, key, value);
    }
}

/// In this benchmark, the capacity of both crates is a number of entries. It is twice the number of stored entries, so that the crates
/// evict nothing.
const ROOM: usize = 2;

pub(crate) fn moka(keys: u32) -> Arc<Moka<Bytes, Arc<[u8]>>> {
    Arc::new(Moka::new(ROOM as u64 * u64::from(keys)))
}

pub(crate) fn quick(keys: u32) -> Arc<Quick<Bytes, Arc<[u8]>>> {
    Arc::new(Quick::new(ROOM * keys as usize))
}

/// Returns the value in place, held by a reference count.
#[derive(Debug)]
pub(crate) struct InPlace<C>(pub(crate) Arc<C>);

impl<C: Shared> Store for InPlace<C> {
    #[inline]
    fn get(&mut self, key: &Key, seen: impl FnOnce(&[u8])) -> Result<bool, Error> {
        let Some(value) = self.0.get(key) else { return Ok(false) };
        seen(&value);
        Ok(true)
    }

    #[inline]
    fn set(&mut self, _: u32, key: &Key, value: &[u8]) -> Result<(), Error> {
        self.0.insert(key.as_slice().into(), value.into());
        Ok(())
    }
}

/// Like [`InPlace`], but copies the value.
#[derive(Debug)]
pub(crate) struct Copying<C> {
    pub(crate) cache: Arc<C>,
    pub(crate) found: Vec<u8>,
}

impl<C: Shared> Store for Copying<C> {
    #[inline]
    fn get(&mut self, key: &Key, seen: impl FnOnce(&[u8])) -> Result<bool, Error> {
        let Some(value) = self.cache.get(key) else { return Ok(false) };
        self.found.clear();
        self.found.extend_from_slice(&value);
        seen(&self.found);
        Ok(true)
    }

    #[inline]
    fn set(&mut self, _: u32, key: &Key, value: &[u8]) -> Result<(), Error> {
        self.cache.insert(key.as_slice().into(), value.into());
        Ok(())
    }
}
