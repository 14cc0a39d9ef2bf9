//! LMDB in a memory file system, without writes to disk, and with a transaction for each operation. This is a typical setup for a cache
//! that several processes share.
#![expect(unsafe_code, reason = "heed requires the caller to open an environment as LMDB prescribes")]

use std::path::Path;

use heed::types::Bytes;
use heed::{Database, Env, EnvFlags, EnvOpenOptions};

use crate::error::Error;
use crate::get::data::Shape;
use crate::get::measure::Store;
use crate::sample::Key;

/// The handles of one process.
#[derive(Clone, Debug)]
pub(crate) struct Lmdb {
    env: Env,
    values: Database<Bytes, Bytes>,
}

impl Lmdb {
    /// Opens the environment. Must be called once by each process, after the fork.
    pub(crate) fn open(dir: &Path, shape: Shape) -> Result<Lmdb, Error> {
        let pages = u64::from(shape.keys) * (shape.size as u64 + 4096);
        let map_size = usize::try_from(pages + (256 << 20)).unwrap_or(usize::MAX).next_multiple_of(1 << 20);
        let mut options = EnvOpenOptions::new();
        options.map_size(map_size);
        // SAFETY: without syncing, a system crash may corrupt the file, but the file is not used after this run. With a writable map, a
        // stray write by this process could corrupt the file, but all other code in the process is safe Rust.
        unsafe { options.flags(EnvFlags::WRITE_MAP | EnvFlags::NO_SYNC | EnvFlags::NO_META_SYNC) };
        // SAFETY: the directory is new and belongs to this run, and only LMDB changes its files.
        let env = unsafe { options.open(dir) }.map_err(Error::Lmdb)?;
        let mut transaction = env.write_txn().map_err(Error::Lmdb)?;
        let values = env.create_database(&mut transaction, None).map_err(Error::Lmdb)?;
        transaction.commit().map_err(Error::Lmdb)?;
        Ok(Lmdb { env, values })
    }

    fn read(&self, key: &Key, seen: impl FnOnce(&[u8])) -> Result<bool, heed::Error> {
        let transaction = self.env.read_txn()?;
        let value = self.values.get(&transaction, key)?;
        Ok(value.map(seen).is_some())
    }

    fn write(&self, key: &Key, value: &[u8]) -> Result<(), heed::Error> {
        let mut transaction = self.env.write_txn()?;
        self.values.put(&mut transaction, key, value)?;
        transaction.commit()
    }
}

impl Store for Lmdb {
    #[inline]
    fn get(&mut self, key: &Key, seen: impl FnOnce(&[u8])) -> Result<bool, Error> {
        self.read(key, seen).map_err(Error::Lmdb)
    }

    #[inline]
    fn set(&mut self, _: u32, key: &Key, value: &[u8]) -> Result<(), Error> {
        self.write(key, value).map_err(Error::Lmdb)
    }
}

/// Like [`Lmdb`], but copies the value.
#[derive(Debug)]
pub(crate) struct Copying {
    pub(crate) lmdb: Lmdb,
    pub(crate) found: Vec<u8>,
}

impl Store for Copying {
    #[inline]
    fn get(&mut self, key: &Key, seen: impl FnOnce(&[u8])) -> Result<bool, Error> {
        let Copying { lmdb, found } = self;
        let copy = |value: &[u8]| {
            found.clear();
            found.extend_from_slice(value);
        };
        let there = lmdb.read(key, copy).map_err(Error::Lmdb)?;
        if there {
            seen(found);
        }
        Ok(there)
    }

    #[inline]
    fn set(&mut self, index: u32, key: &Key, value: &[u8]) -> Result<(), Error> {
        self.lmdb.set(index, key, value)
    }
}
