//! Records what a page depends on while it is being rendered.
//!
//! Each fragment *lends* three things to the page: its tags, the hash of its key, and its expiry. Because of the tags and the hash, a purge
//! of the fragment also purges the page (a key counts as a tag of its own page). Because of the expiry, the page does not outlive the
//! fragment. If that page is itself a fragment of another page, it lends everything that it has inherited.
//!
//! Must not change the cache, except by rendering fragments on request.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::entry::Key;
use super::freshness::Freshness;
use super::lookup::{Lookup, Tags};
use super::options::StoreOptions;
use super::refused::StoreError;
use super::render::{Cached, Request};
use super::tags::PurgeSnapshot;
use super::value::CacheValue;
use crate::cache::{Cache, Rendering, earlier, expiry};

/// Records which fragments of the cache, and which tags, a page depends on while it is being rendered.
///
/// [`Cache::get_or_render`] passes one to the rendering closure. Code that renders without `get_or_render` must create
/// the recorder *before* it begins:
///
/// ```
/// # let segment = forkyard_shm::Segment::create(&forkyard_shm::Plan { cache_bytes: 1 << 20, ..Default::default() })?;
/// # let cache = segment.cache();
/// # use forkyard_shm::StoreOptions;
/// cache.set("menu", "<ul>...</ul>", &StoreOptions::new().tags(["sections"]))?;
///
/// let recorder = cache.recorder();
/// let mut page = recorder.get("menu").unwrap_or_default();
/// recorder.tag("news"); // what is read now shows the news
/// page.extend(b"<h1>News</h1>");
/// cache.set_recorded("/news", page, &StoreOptions::new(), &recorder)?;
///
/// cache.purge_tag("sections"); // or purge("menu"), or purge_tag("news")
/// assert_eq!(cache.get("/news"), None);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// The page is not stored if anything it depends on was purged after the recorder was created. Two things are not recorded. First, the
/// prefixes of a fragment's key are not recorded, so [`Cache::purge_prefix`] purges pages only by their own keys. Second, the absence of a
/// fragment is not recorded, so a page rendered without a fragment remains valid when that fragment is stored.
///
/// Clones record for the same page, and can be sent to other threads.
#[derive(Clone, Debug)]
pub struct Recorder {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    cache: Cache,
    /// The hashes of the nested pages that are being rendered, from the outermost page to this one. Each page waits for the next.
    pages: Vec<u64>,
    snapshot: PurgeSnapshot,
    began: Instant,
    loan: Mutex<Loan>,
}

/// What fragments lend to a page.
#[derive(Clone, Debug, Default)]
pub(crate) struct Loan {
    pub(crate) tags: BTreeSet<u64>,
    /// 0 means never.
    pub(crate) until_ms: u64,
}

impl Loan {
    fn add(&mut self, tags: impl IntoIterator<Item = u64>, until_ms: u64) {
        self.tags.extend(tags);
        self.until_ms = earlier(self.until_ms, until_ms);
    }
}

impl Cache {
    /// Starts recording what a page depends on, as of now.
    pub fn recorder(&self) -> Recorder {
        Recorder::new(self, Vec::new())
    }

    /// Stores a page like [`set`](Cache::set), with the recorded tags in addition to those in `options`. The page expires no later than any
    /// of its fragments.
    ///
    /// # Errors
    /// Fails if there is no cache, if the page is too large, or if a process does not release the lock of the page's shard.
    ///
    /// # Panics
    /// Panics if the recorder belongs to the cache of another segment, where its tags have no meaning.
    pub fn set_recorded(
        &self,
        key: impl AsRef<[u8]>,
        value: impl AsRef<[u8]>,
        options: &StoreOptions,
        recorder: &Recorder,
    ) -> Result<(), StoreError> {
        assert_eq!(self.segment.seed, recorder.shared.cache.segment.seed, "a recorder of another cache");
        let lent: Vec<u64> = recorder.loan().tags.iter().copied().collect();
        let rendering = Rendering { lent: &lent, ..recorder.rendering() };
        self.store(key.as_ref(), value.as_ref(), options, &rendering, self.segment.now_ms())
    }
}

impl Recorder {
    /// Creates the recorder of a page. `pages` contains the hashes of the pages that wait for this page, followed by
    /// its own hash.
    pub(crate) fn new(cache: &Cache, pages: Vec<u64>) -> Recorder {
        let (snapshot, began) = (cache.clock(), Instant::now());
        Recorder { shared: Arc::new(Shared { cache: cache.clone(), pages, snapshot, began, loan: Mutex::default() }) }
    }

    /// Returns the page stored under `key`, like [`Cache::get`], and records it as a fragment of the page being
    /// rendered.
    pub fn get(&self, key: impl AsRef<[u8]>) -> Option<Vec<u8>> {
        let cache = &self.shared.cache;
        let key = cache.key(key.as_ref());
        let fresh = |freshness, _: &_| freshness == Freshness::Fresh;
        let (page, tries): (Option<Lookup<Vec<u8>>>, _) =
            cache.lookup(key, cache.segment.now_ms(), Tags::Wanted, fresh);
        cache.count_look(cache.shard_of(key.hash), tries, page.is_some());
        let page = page?;
        self.borrow(key, page.tags, page.times.expires_ms);
        Some(page.value)
    }

    /// Records that the page being rendered depends on this tag.
    pub fn tag(&self, tag: &str) {
        let tag = self.shared.cache.tag(tag);
        self.loan().add([tag], 0);
    }

    /// Like [`Cache::get_or_render`], for a fragment of the page being rendered. The fragment may come from the cache
    /// or be rendered.
    ///
    /// If a fragment is served stale, the page expires immediately. Callers that are already waiting for the page receive it, but no later
    /// caller does, unless the page itself may be served stale.
    ///
    /// # Errors
    /// Returns the error from `render` if there is no page that can be served instead.
    pub fn get_or_render<V: CacheValue, E>(
        &self,
        key: impl AsRef<[u8]>,
        options: &StoreOptions,
        render: impl FnOnce(Recorder) -> Result<V, E>,
    ) -> Result<Cached<V>, E> {
        Request::new(&self.shared.cache, key.as_ref(), options, Some(self)).run(render)
    }

    /// Like [`get_or_render`](Self::get_or_render), without blocking the thread: see [`Cache::get_or_render_async`].
    ///
    /// # Errors
    /// Returns the error from `render` if there is no page that can be served instead.
    pub async fn get_or_render_async<V: CacheValue, E, F: Future<Output = Result<V, E>>>(
        &self,
        key: impl AsRef<[u8]>,
        options: &StoreOptions,
        render: impl FnOnce(Recorder) -> F,
    ) -> Result<Cached<V>, E> {
        Request::new(&self.shared.cache, key.as_ref(), options, Some(self)).run_async(render).await
    }

    /// Adds what a fragment lends.
    pub(crate) fn borrow(&self, key: Key<'_>, tags: impl IntoIterator<Item = u64>, until_ms: u64) {
        self.loan().add(tags.into_iter().chain([key.hash]), until_ms);
    }

    /// Adds what a newly rendered fragment lends, as if the fragment had been stored now with these options.
    pub(crate) fn borrow_rendered(&self, key: Key<'_>, options: &StoreOptions, loan: Loan) {
        let cache = &self.shared.cache;
        let tags = options.tags.iter().map(|tag| cache.tag(tag)).chain(loan.tags);
        self.borrow(key, tags, earlier(loan.until_ms, expiry(options.ttl, cache.segment.now_ms())));
    }

    /// Returns everything that has been lent so far.
    pub(crate) fn loan(&self) -> MutexGuard<'_, Loan> {
        self.shared.loan.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the parameters for storing the page, except the tags.
    pub(crate) fn rendering(&self) -> Rendering<'static> {
        let cost_ms = u32::try_from(self.shared.began.elapsed().as_millis()).unwrap_or(u32::MAX);
        let (until_ms, snapshot) = (self.loan().until_ms, Some(self.shared.snapshot));
        Rendering { until_ms, cost_ms: cost_ms.max(1), snapshot, ..Rendering::default() }
    }

    pub(crate) fn pages(&self) -> &[u64] {
        &self.shared.pages
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::{Plan, Segment};

    fn cache() -> Cache {
        Segment::create(&Plan { cache_bytes: 1 << 20, ..Plan::default() }).unwrap().cache()
    }

    /// Stores the fragment "inner" with the tag "deep", "outer" composed from it, and "page" composed from "outer".
    fn store_pages(cache: &Cache) {
        cache.set("inner", "1", &StoreOptions::new().tags(["deep"])).unwrap();
        let recorder = cache.recorder();
        let inner = recorder.get("inner").unwrap();
        cache.set_recorded("outer", inner, &StoreOptions::new().tags(["shallow"]), &recorder).unwrap();
        let recorder = cache.recorder();
        let outer = recorder.get("outer").unwrap();
        assert_eq!(recorder.get("none"), None);
        recorder.tag("own");
        cache.set_recorded("page", outer, &StoreOptions::new(), &recorder).unwrap();
        assert_eq!(cache.get("page").unwrap(), b"1");
    }

    #[test]
    fn what_purges_a_fragment_purges_what_is_made_of_it() {
        let cache = cache();
        let purges: [fn(&Cache); 6] = [
            |cache| assert!(cache.purge("inner")),
            |cache| cache.purge_tag("deep"),
            |cache| assert!(cache.purge("outer")),
            |cache| cache.purge_tag("shallow"),
            |cache| cache.purge_tag("own"),
            Cache::clear,
        ];
        for purge in purges {
            store_pages(&cache);
            purge(&cache);
            assert_eq!(cache.get("page"), None);
        }
        store_pages(&cache);
        cache.purge("none");
        cache.purge_tag("inner");
        assert!(cache.get("page").is_some(), "neither what was missing nor a tag of a key's name is lent");
        // A new fragment under the same key does not make the page valid again.
        cache.purge("inner");
        cache.set("inner", "2", &StoreOptions::new()).unwrap();
        assert_eq!((cache.get("page"), cache.get("outer")), (None, None));
    }

    #[test]
    fn a_purge_after_the_recorder_was_made_is_noticed() {
        let cache = cache();
        cache.set("inner", "1", &StoreOptions::new().tags(["deep"])).unwrap();
        for before in [true, false] {
            let recorder = cache.recorder();
            let found_before = if before { recorder.get("inner") } else { None };
            cache.purge_tag("deep");
            cache.set("inner", "2", &StoreOptions::new().tags(["deep"])).unwrap();
            let inner = found_before.or_else(|| recorder.get("inner")).unwrap();
            cache.set_recorded("page", &inner, &StoreOptions::new(), &recorder).unwrap();
            // The fragment found after the purge is valid, but the recorder was created before the purge and cannot determine that.
            assert_eq!(cache.get("page"), None);
        }
    }

    #[test]
    fn no_page_outlives_the_time_of_its_fragments() {
        let cache = cache();
        let ends = |key: &str| {
            let key = cache.key(key.as_bytes());
            cache.lookup::<Vec<u8>>(key, 0, Tags::Unwanted, |_, _| true).0.unwrap().times.expires_ms
        };
        let seconds = |seconds| StoreOptions::new().ttl(Duration::from_secs(seconds));
        cache.set("long", "", &seconds(500)).unwrap();
        cache.set("short", "", &seconds(100)).unwrap();
        cache.set("endless", "", &StoreOptions::new()).unwrap();
        for (fragments, options, same_as) in [
            (vec!["long", "short", "endless"], seconds(300), "short"),
            (vec!["long"], StoreOptions::new(), "long"),
            (vec!["endless"], StoreOptions::new(), "endless"),
        ] {
            let recorder = cache.recorder();
            assert!(fragments.iter().all(|fragment| recorder.get(fragment).is_some()));
            cache.set_recorded("page", "", &options, &recorder).unwrap();
            assert_eq!(ends("page"), ends(same_as));
        }
        let recorder = cache.recorder();
        recorder.get("long").unwrap();
        cache.set_recorded("page", "", &seconds(300), &recorder).unwrap();
        assert!(ends("page") < ends("long") && ends("page") > ends("short"), "its own time, if that is shorter");
    }

    #[test]
    #[should_panic(expected = "a recorder of another cache")]
    fn a_recorder_of_another_cache_is_a_mistake() {
        let _ = cache().set_recorded("page", "", &StoreOptions::new(), &cache().recorder());
    }

    #[test]
    fn without_a_cache_there_is_nothing_to_record() {
        let cache = Segment::create(&Plan { rows: 1, ..Plan::default() }).unwrap().cache();
        let recorder = cache.recorder();
        recorder.tag("t");
        assert_eq!(recorder.get("k"), None);
        assert_eq!(cache.set_recorded("k", "v", &StoreOptions::new(), &recorder), Err(StoreError::Off));
    }
}
