//! The values that can be stored in the cache: bytes, or a page with its status, headers and encoding.

use super::freshness::Freshness;
use super::lookup::Tags;
use super::options::StoreOptions;
use super::page::Page;
use super::read::Sight;
use super::refused::StoreError;
use crate::cache::{Cache, Rendering, copy_value};

/// A value that the cache can store: `Vec<u8>`, or a [`Page`].
pub trait CacheValue: Sized {
    /// Returns the parts that are stored: the metadata and the value.
    #[doc(hidden)]
    fn parts(&self) -> (Vec<u8>, &[u8]);

    /// Restores the value from its stored metadata and bytes. Returns `None` if they are invalid.
    #[doc(hidden)]
    fn from_parts(meta: &[u8], value: Vec<u8>) -> Option<Self>;

    /// Checks whether the value may be stored in a shared cache.
    #[doc(hidden)]
    fn may_be_kept(&self) -> Result<(), StoreError> {
        Ok(())
    }
}

impl CacheValue for Vec<u8> {
    fn parts(&self) -> (Vec<u8>, &[u8]) {
        (Vec::new(), self)
    }

    fn from_parts(_: &[u8], value: Vec<u8>) -> Option<Vec<u8>> {
        Some(value)
    }
}

impl CacheValue for Page {
    fn parts(&self) -> (Vec<u8>, &[u8]) {
        (self.encode_meta(), self.body())
    }

    /// Restores a page. A value that was stored as plain bytes becomes a page without headers.
    fn from_parts(meta: &[u8], value: Vec<u8>) -> Option<Page> {
        if meta.is_empty() { Some(Page::new(value)) } else { Page::decode(meta, value).ok() }
    }

    fn may_be_kept(&self) -> Result<(), StoreError> {
        self.storable().map_err(StoreError::NotStorable)
    }
}

impl Cache {
    /// Returns the page stored under `key` with its status, headers and encoding, if it is neither expired nor purged.
    pub fn get_page(&self, key: impl AsRef<[u8]>) -> Option<Page> {
        let key = self.key(key.as_ref());
        let fresh = |freshness, _: &_| freshness == Freshness::Fresh;
        let (found, tries) = self.lookup(key, self.segment.now_ms(), Tags::Unwanted, fresh);
        self.count_look(self.shard_of(key.hash), tries, found.is_some());
        found.map(|found| found.value)
    }

    /// Stores a page with its status, headers and encoding under `key`, replacing any page stored there: see
    /// [`set`](Cache::set).
    ///
    /// # Errors
    /// Fails if there is no cache, if the page is too large, if a process does not release the lock of the page's shard, or if the page
    /// must not be stored in a shared cache ([`Page::storable`]).
    pub fn set_page(&self, key: impl AsRef<[u8]>, page: &Page, options: &StoreOptions) -> Result<(), StoreError> {
        page.may_be_kept()?;
        let (meta, value) = page.parts();
        let rendering = Rendering { meta: &meta, ..Rendering::default() };
        self.store(key.as_ref(), value, options, &rendering, self.segment.now_ms())
    }
}

/// Copies an entry's metadata and value. Returns `None` if the entry was overwritten during the copy.
pub(crate) fn copy_parts(sight: &Sight<'_, '_>) -> Option<(Vec<u8>, Vec<u8>)> {
    let mut value = Vec::new();
    copy_value(sight, &mut value)?;
    let mut meta = Vec::with_capacity(sight.entry.meta_len());
    sight.entry.copy_meta(&mut meta)?;
    Some((meta, value))
}

#[cfg(test)]
mod tests {
    use crate::{NotStorable, Plan, Segment};

    use super::*;

    #[test]
    fn a_page_comes_back_whole() {
        let cache = Segment::create(&Plan { cache_bytes: 256 * 1024, ..Plan::default() }).unwrap().cache();
        let page = Page::new(vec![b'a'; 20_000]).status(404).header("Content-Type", "text/html").gzip();
        assert!(page.body().len() < 1000);
        cache.set_page("/", &page, &StoreOptions::new()).unwrap();
        assert_eq!(cache.get_page("/").unwrap(), page);
        cache.set("/plain", "text", &StoreOptions::new()).unwrap();
        assert_eq!(cache.get_page("/plain").unwrap(), Page::new("text"));
        assert_eq!((cache.get_page("/none"), cache.stats().hits, cache.stats().misses), (None, 2, 1));
        let private = Page::new("mine").header("Set-Cookie", "id=1");
        let refused = cache.set_page("/", &private, &StoreOptions::new());
        assert_eq!(refused, Err(StoreError::NotStorable(NotStorable::SetCookie)));
        cache.audit().unwrap();
    }
}
