//! Renders a page once, while other callers wait for it: [`Cache::get_or_render`].
//!
//! ```text
//!            fresh -------------------------------------> served        (early: the caller that gets the lease renders)
//! look  --   stale -- lease held already ---------------> served stale
//!    ^       else  -- lease held already -- wait --.
//!    |                                             |     (ended, holder dead, deadline passed, patience over)
//!    '---------------------------------------------'
//!            else  -- the lease is free -- look again -- render -- store -- release it
//! ```
//! [`Request::step`] makes the decisions for blocking and asynchronous callers alike; only the way of waiting differs. A lease is released
//! when its holder stores the page, fails, panics, or is dropped while rendering. If the holder dies, a waiting caller releases the lease
//! (`claim.rs`, `watch.rs`). If no lease can be taken because its cell is in use for another key, the page is rendered without a lease. The
//! time that a caller spends waiting is limited.
//!
//! Must not withhold a rendered page from its caller because of a failure of the cache.

use std::cell::Cell;
use std::future::poll_fn;
use std::pin::pin;
use std::sync::atomic::Ordering;

use super::claim::{Claimed, Here, Lease, Ticket};
use super::early;
use super::entry::{Key, Times};
use super::freshness::Freshness;
use super::lookup::{Lookup, Tags};
use super::options::StoreOptions;
use super::recorder::{Loan, Recorder};
use super::refused::StoreError;
use super::value::CacheValue;
use super::watch::Change;
use crate::cache::{Cache, Rendering, Seen, millis};
use crate::crash;
use crate::memory::layout::LeaseCell;
use crate::protocols::lease;

/// Time in milliseconds after a page was refused during which callers do not wait for the page's lease, because the page would be refused
/// again.
const PASS_MS: u64 = 10_000;
/// Like [`PASS_MS`], for a page that was refused because its shard was busy.
const PASS_BUSY_MS: u64 = 1000;

/// The result of [`Cache::get_or_render`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cached<V = Vec<u8>> {
    /// The page: bytes, or a [`Page`](crate::Page).
    pub value: V,
    /// Where the page came from.
    pub source: CacheStatus,
}

/// Where a page came from, for logs and response headers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CacheStatus {
    /// From the cache, within its time to live. A page that the caller waited for is also reported as fresh.
    Fresh,
    /// From the cache, after its time to live: the page is being rendered again, or rendering failed.
    Stale,
    /// Rendered for this call.
    Rendered,
}

impl Cache {
    /// Returns the page stored under `key`, or renders and stores it *once*, however many callers in however many processes request it. The
    /// other callers wait for the caller that is rendering, or receive a stale page if [that is allowed](StoreOptions::stale).
    ///
    /// ```
    /// # use std::time::Duration;
    /// # let segment = forkyard_shm::Segment::create(&forkyard_shm::Plan { cache_bytes: 1 << 20, ..Default::default() })?;
    /// # let cache = segment.cache();
    /// # fn headlines() -> std::io::Result<Vec<u8>> { Ok(vec![]) }
    /// use forkyard_shm::StoreOptions;
    ///
    /// let options = StoreOptions::new().ttl(Duration::from_secs(60)).stale(Duration::from_secs(10)).tags(["news"]);
    /// let answer = cache.get_or_render("/news", &options, |recorder| {
    ///     let menu = recorder.get_or_render("menu", &StoreOptions::new(), |_| Ok::<_, std::io::Error>(b"...".into()))?;
    ///     Ok::<_, std::io::Error>([menu.value, headlines()?].concat())
    /// })?;
    /// println!("{} bytes, {:?}", answer.value.len(), answer.source);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// If the process that is rendering dies, or if `render` fails, panics or takes longer than [`StoreOptions::deadline`], another waiting
    /// caller renders immediately. A page that is finished too late does not replace a newer one. A page that was purged while it was being
    /// rendered is not stored, but it is returned to the caller that rendered it. The same applies to a page that cannot be stored.
    ///
    /// Blocks the calling thread for up to [`StoreOptions::patience`] and then renders the page itself. In asynchronous code, use
    /// [`get_or_render_async`](Cache::get_or_render_async).
    ///
    /// # Errors
    /// Returns the error from `render` if there is no page that [can be served instead](StoreOptions::stale_if_error). Each caller receives
    /// its own error, because the next waiting caller tries again.
    pub fn get_or_render<V: CacheValue, E>(
        &self,
        key: impl AsRef<[u8]>,
        options: &StoreOptions,
        render: impl FnOnce(Recorder) -> Result<V, E>,
    ) -> Result<Cached<V>, E> {
        Request::new(self, key.as_ref(), options, None).run(render)
    }

    /// Like [`get_or_render`](Cache::get_or_render), without blocking the thread. Works on any executor.
    ///
    /// If the future is dropped while it is rendering, another waiting caller renders immediately. Each process has one thread for waiting.
    /// This thread checks about every millisecond whether the leases have ended. The thread exists only while a future is waiting.
    ///
    /// # Errors
    /// Returns the error from `render` if there is no page that [can be served instead](StoreOptions::stale_if_error). Each caller receives
    /// its own error, because the next waiting caller tries again.
    pub async fn get_or_render_async<V: CacheValue, E, F: Future<Output = Result<V, E>>>(
        &self,
        key: impl AsRef<[u8]>,
        options: &StoreOptions,
        render: impl FnOnce(Recorder) -> F,
    ) -> Result<Cached<V>, E> {
        Request::new(self, key.as_ref(), options, None).run_async(render).await
    }
}

/// A call that requests a page.
#[derive(Debug)]
pub(crate) struct Request<'a> {
    cache: &'a Cache,
    key: Key<'a>,
    options: &'a StoreOptions,
    /// The recorder of the enclosing page, if the requested page is a fragment.
    within: Option<&'a Recorder>,
    began_ms: u64,
    waited: bool,
    /// Whether no thread can wake this future when the lease ends.
    cannot_wait: bool,
    /// Number of repeated lookups that have not been counted yet.
    retries: Cell<usize>,
}

/// The next step of a request.
#[derive(Debug)]
enum Step<V> {
    Serve(Lookup<V>),
    Wait(Ticket),
    Render(Option<Lease>),
}

/// A page that is being rendered.
#[derive(Debug)]
struct Work {
    lease: Option<Lease>,
    recorder: Recorder,
}

impl<'a> Request<'a> {
    pub(crate) fn new(
        cache: &'a Cache,
        key: &'a [u8],
        options: &'a StoreOptions,
        within: Option<&'a Recorder>,
    ) -> Request<'a> {
        let (key, began_ms) = (cache.key(key), cache.segment.now_ms());
        Request { cache, key, options, within, began_ms, waited: false, cannot_wait: false, retries: Cell::new(0) }
    }

    pub(crate) fn run<V: CacheValue, E>(
        mut self,
        render: impl FnOnce(Recorder) -> Result<V, E>,
    ) -> Result<Cached<V>, E> {
        loop {
            match self.step() {
                Step::Serve(page) => return Ok(self.serve(page)),
                Step::Wait(ticket) => ticket.wait_here(),
                Step::Render(lease) => {
                    let work = self.begin(lease);
                    let recorder = work.recorder.clone();
                    let result = {
                        let _here = Here::new(self.key.hash);
                        render(recorder)
                    };
                    return self.finish(work, result);
                }
            }
        }
    }

    pub(crate) async fn run_async<V: CacheValue, E, F: Future<Output = Result<V, E>>>(
        mut self,
        render: impl FnOnce(Recorder) -> F,
    ) -> Result<Cached<V>, E> {
        let lease = loop {
            match self.step() {
                Step::Serve(page) => return Ok(self.serve(page)),
                Step::Wait(ticket) => self.cannot_wait = Change::of(ticket).await.is_err(),
                Step::Render(lease) => break lease,
            }
        };
        let work = self.begin(lease);
        let (recorder, hash) = (work.recorder.clone(), self.key.hash);
        let result = {
            let future = {
                let _here = Here::new(hash);
                render(recorder)
            };
            let mut rendering = pin!(future);
            poll_fn(|context| {
                // The future may be polled on a different thread each time.
                let _here = Here::new(hash);
                rendering.as_mut().poll(context)
            })
            .await
        };
        self.finish(work, result)
    }

    fn step<V: CacheValue>(&mut self) -> Step<V> {
        let now_ms = self.cache.segment.now_ms();
        let Some(cell) = self.cache.segment.lease_cell(self.key.hash) else { return Step::Render(None) };
        // Read before the lookup. If a page is stored after the lookup, `turn` changes when the lease of that page ends, and the wait
        // therefore ends.
        let turn = cell.turn.load(Ordering::Acquire);
        match self.look(now_ms) {
            Some(page) if self.is_good(page.freshness, &page.times) && !self.is_early(&page, now_ms) => {
                Step::Serve(page)
            }
            found => self.try_for_lease(cell, turn, now_ms, found),
        }
    }

    /// Tries to take the lease, because there is no page or the page should be rendered again.
    fn try_for_lease<V: CacheValue>(
        &mut self,
        cell: &LeaseCell,
        turn: u32,
        now_ms: u64,
        found: Option<Lookup<V>>,
    ) -> Step<V> {
        let deadline_ms = millis(self.options.deadline);
        match (self.cache.segment.claim_lease(self.key.hash, turn, now_ms, deadline_ms), found) {
            (Claimed::Mine(lease), found) => self.look_again(lease, found),
            (Claimed::Held(_) | Claimed::None, Some(page)) => Step::Serve(page),
            (Claimed::Held(ticket), None) => {
                let passes = lease::passes(&cell.pass, self.key.hash, now_ms);
                self.wait(ticket, now_ms, passes)
            }
            (Claimed::None, None) => Step::Render(None),
        }
    }

    /// Looks the page up again. This process now holds the lease, but another process may have held it and stored the page since the first
    /// lookup.
    fn look_again<V: CacheValue>(&self, lease: Lease, found: Option<Lookup<V>>) -> Step<V> {
        let now_ms = self.cache.segment.now_ms();
        let page = self.look(now_ms).filter(|page: &Lookup<V>| {
            let new = found.is_none_or(|found| found.times != page.times);
            new && self.is_good(page.freshness, &page.times) && !self.is_early(page, now_ms)
        });
        page.map_or(Step::Render(Some(lease)), Step::Serve)
    }

    fn wait<V>(&mut self, ticket: Ticket, now_ms: u64, passes: bool) -> Step<V> {
        let patient_until_ms = self.began_ms.saturating_add(millis(self.options.patience));
        if passes || self.cannot_wait || now_ms >= patient_until_ms || self.is_our_own() {
            return Step::Render(None);
        }
        if !self.waited {
            self.waited = true;
            self.count(Seen::Wait);
        }
        Step::Wait(ticket.until(patient_until_ms))
    }

    /// Whether this caller is already rendering the page, and would therefore wait for itself.
    fn is_our_own(&self) -> bool {
        let hash = self.key.hash;
        self.within.is_some_and(|recorder| recorder.pages().contains(&hash)) || Here::renders(hash)
    }

    /// Returns the page, if it can be served now.
    fn look<V: CacheValue>(&self, now_ms: u64) -> Option<Lookup<V>> {
        self.look_for(now_ms, |freshness, times| freshness == Freshness::Stale || self.is_good(freshness, times))
    }

    fn look_for<V: CacheValue>(&self, now_ms: u64, wanted: impl Fn(Freshness, &Times) -> bool) -> Option<Lookup<V>> {
        let tags = if self.within.is_some() { Tags::Wanted } else { Tags::Unwanted };
        let (page, retries) = self.cache.lookup(self.key, now_ms, tags, wanted);
        self.retries.set(self.retries.get() + retries);
        page
    }

    /// Whether a page can be served as fresh.
    fn is_good(&self, freshness: Freshness, times: &Times) -> bool {
        match freshness {
            Freshness::Fresh => true,
            // The page was rendered while this caller was waiting, but expired before the caller woke up.
            Freshness::Stale | Freshness::OnError | Freshness::Expired => {
                self.waited && times.stored_ms >= self.began_ms
            }
            Freshness::Purged => false,
        }
    }

    fn is_early<V>(&self, page: &Lookup<V>, now_ms: u64) -> bool {
        page.freshness == Freshness::Fresh
            && self.options.early.is_some_and(|beta| early::is_early(&page.times, now_ms, beta, early::random))
    }

    fn serve<V>(&self, page: Lookup<V>) -> Cached<V> {
        let good = self.is_good(page.freshness, &page.times);
        self.count(if good { Seen::Hit } else { Seen::Stale });
        if let Some(recorder) = self.within {
            recorder.borrow(self.key, page.tags, page.times.expires_ms);
        }
        Cached { value: page.value, source: if good { CacheStatus::Fresh } else { CacheStatus::Stale } }
    }

    fn begin(&self, lease: Option<Lease>) -> Work {
        let above = self.within.map(Recorder::pages).unwrap_or_default();
        let recorder = Recorder::new(self.cache, [above, &[self.key.hash]].concat());
        Work { lease, recorder }
    }

    fn finish<V: CacheValue, E>(&self, work: Work, result: Result<V, E>) -> Result<Cached<V>, E> {
        match result {
            Ok(value) => {
                self.count(Seen::Miss);
                self.count(Seen::Render);
                let loan = work.recorder.loan().clone();
                self.store(work, &loan, &value);
                if let Some(recorder) = self.within {
                    recorder.borrow_rendered(self.key, self.options, loan);
                }
                Ok(Cached { value, source: CacheStatus::Rendered })
            }
            Err(error) => {
                // The lease is released now, so that waiting callers do not have to wait for the lookup below.
                drop(work);
                let page = self.look_for(self.cache.segment.now_ms(), |freshness, _| freshness.keeps());
                page.map(|page| self.serve(page)).ok_or(error).inspect_err(|_| self.count(Seen::Miss))
            }
        }
    }

    fn store(&self, work: Work, loan: &Loan, value: &impl CacheValue) {
        let lent: Vec<u64> = loan.tags.iter().copied().collect();
        let lease = work.lease.as_ref().and_then(Lease::word);
        let (meta, body) = value.parts();
        let rendering = Rendering { meta: &meta, lent: &lent, lease, ..work.recorder.rendering() };
        crash::point("render: about to store");
        let now_ms = self.cache.segment.now_ms();
        let may = value.may_be_kept();
        let stored = may.and_then(|()| self.cache.store(self.key.bytes, body, self.options, &rendering, now_ms));
        crash::point("render: stored");
        let pass_ms = match stored {
            Ok(()) | Err(StoreError::Off) => return,
            Err(StoreError::TooLarge { .. } | StoreError::NotStorable(_)) => PASS_MS,
            Err(StoreError::Busy) => PASS_BUSY_MS,
        };
        if let Some(cell) = self.cache.segment.lease_cell(self.key.hash) {
            lease::set_pass(&cell.pass, self.key.hash, now_ms.saturating_add(pass_ms));
        }
    }

    fn count(&self, seen: Seen) {
        self.cache.count(self.cache.shard_of(self.key.hash), self.retries.take(), seen);
    }
}

#[cfg(test)]
mod tests;
