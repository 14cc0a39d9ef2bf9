//! The options with which a page is stored.

use std::time::Duration;

use super::tags::PurgeSnapshot;

/// How long a page is valid, which tags it depends on, and how it is rendered again.
///
/// ```
/// # use std::time::Duration;
/// # let segment = forkyard_shm::Segment::create(&forkyard_shm::Plan { cache_bytes: 1 << 20, ..Default::default() })?;
/// # let cache = segment.cache();
/// use forkyard_shm::StoreOptions;
///
/// let clock = cache.clock(); // before anything is read that the page shows
/// let page = "rendered from the database";
/// let options = StoreOptions::new().ttl(Duration::from_secs(60)).tags(["news", "user:7"]).as_of(clock);
/// cache.set("/news", page, &options)?;
/// cache.purge_tag("user:7");
/// assert_eq!(cache.get("/news"), None);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct StoreOptions {
    pub(crate) ttl: Option<Duration>,
    pub(crate) stale: Duration,
    pub(crate) stale_if_error: Duration,
    pub(crate) tags: Vec<String>,
    pub(crate) as_of: Option<PurgeSnapshot>,
    pub(crate) early: Option<f64>,
    pub(crate) deadline: Duration,
    pub(crate) patience: Duration,
}

impl Default for StoreOptions {
    fn default() -> StoreOptions {
        StoreOptions {
            ttl: None,
            stale: Duration::ZERO,
            stale_if_error: Duration::ZERO,
            tags: Vec::new(),
            as_of: None,
            early: None,
            deadline: Duration::from_secs(30),
            patience: Duration::from_secs(10),
        }
    }
}

impl StoreOptions {
    /// Creates options with no time to live, no tags, and no stale period.
    pub fn new() -> StoreOptions {
        StoreOptions::default()
    }

    /// Sets the time to live, which is how long the page is fresh.
    #[must_use]
    pub fn ttl(mut self, ttl: Duration) -> StoreOptions {
        self.ttl = Some(ttl);
        self
    }

    /// Sets how long after its time to live [`Cache::get_or_render`](crate::Cache::get_or_render) still serves the page while one process
    /// is rendering it again (stale-while-revalidate, RFC 5861 §3).
    #[must_use]
    pub fn stale(mut self, stale: Duration) -> StoreOptions {
        self.stale = stale;
        self
    }

    /// Sets how long after its time to live the page is served if rendering it again fails (stale-if-error, RFC 5861
    /// §4).
    #[must_use]
    pub fn stale_if_error(mut self, stale: Duration) -> StoreOptions {
        self.stale_if_error = stale;
        self
    }

    /// Sets the page's tags. The page is invalidated when any of its tags is purged. The number of tags is limited by the size of an entry,
    /// in which each tag takes 8 bytes.
    #[must_use]
    pub fn tags<T: Into<String>>(mut self, tags: impl IntoIterator<Item = T>) -> StoreOptions {
        self.tags = tags.into_iter().map(Into::into).collect();
        self
    }

    /// Declares that the page shows the data as they were at this time on [`Cache::clock`](crate::Cache::clock).
    ///
    /// Without this option, the page is treated as rendered when it is stored, and a purge during rendering is not detected.
    /// `get_or_render` sets this time itself.
    #[must_use]
    pub fn as_of(mut self, clock: PurgeSnapshot) -> StoreOptions {
        self.as_of = Some(clock);
        self
    }

    /// Makes requests occasionally render a page again shortly *before* it expires, so that a popular page never expires (XFetch; Vattani
    /// et al., VLDB 2015).
    ///
    /// A request is more likely to render the page the closer the expiry is and the longer the rendering takes. `beta` is usually 1; with
    /// larger values, rendering starts earlier.
    #[must_use]
    pub fn early(mut self, beta: f64) -> StoreOptions {
        self.early = Some(beta);
        self
    }

    /// Sets the rendering deadline (30 s by default). When a process has been rendering for this long, another process may start to render.
    #[must_use]
    pub fn deadline(mut self, deadline: Duration) -> StoreOptions {
        self.deadline = deadline;
        self
    }

    /// Sets how long a caller waits for a page that another process is rendering before the caller renders the page itself (10 s by
    /// default).
    #[must_use]
    pub fn patience(mut self, patience: Duration) -> StoreOptions {
        self.patience = patience;
        self
    }
}
