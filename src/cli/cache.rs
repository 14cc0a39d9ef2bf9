//! The flags for the entries and the file of the page cache.

use std::path::PathBuf;

use clap::Args;

use crate::config::{CacheConfig, parse_size};

/// Flags of both commands that serve. The size has a different default in each.
#[derive(Args, Debug)]
pub(super) struct CacheOptions {
    /// Largest page that the cache stores, as in 4M; 0 for the default
    ///
    /// [default: a 64th of the cache, but at least 1M if the cache has room for it]
    #[arg(long, value_name = "SIZE", env = "FORKYARD_CACHE_MAX_ENTRY", value_parser = parse_size, help_heading = "Cache and events")]
    cache_max_entry: Option<u64>,

    /// Keep the cache in this file, so that its pages survive a restart
    #[arg(long, value_name = "FILE", env = "FORKYARD_CACHE_FILE", help_heading = "Cache and events")]
    cache_file: Option<PathBuf>,
}

impl CacheOptions {
    /// Returns the settings of the cache. If `bytes` is `None`, the size depends on the memory limit.
    pub(super) fn cache(self, bytes: Option<u64>) -> CacheConfig {
        let sized = match bytes {
            Some(bytes) => CacheConfig { bytes, ..CacheConfig::default() },
            None => CacheConfig::sized_for(forkyard_shm::memory_limit()),
        };
        CacheConfig { max_entry: self.cache_max_entry.unwrap_or(0), file: self.cache_file, ..sized }
    }
}
