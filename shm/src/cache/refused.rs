//! Why a page was not stored.

use super::page::NotStorable;

/// Why the cache did not store a page. The request should not fail for this reason: the rendered page is still served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StoreError {
    /// The segment has no cache.
    Off,
    /// The key, the value and the tags together are larger than an entry can be.
    TooLarge {
        /// Maximum size of an entry in bytes: the length of the key and the value, plus 8 for each tag.
        limit: u64,
    },
    /// A process does not release the lock of the key's shard.
    Busy,
    /// The page must not be stored in a shared cache.
    NotStorable(NotStorable),
}

impl std::fmt::Display for StoreError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Off => f.write_str("page not cached: there is no page cache"),
            Self::TooLarge { limit } => write!(f, "page not cached: larger than the {limit} bytes an entry can have"),
            Self::NotStorable(why) => write!(f, "page not cached: {why}"),
            Self::Busy => f.write_str("page not cached: that part of the cache is busy"),
        }
    }
}

impl std::error::Error for StoreError {}
