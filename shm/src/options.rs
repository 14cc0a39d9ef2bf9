//! What a page is stored with.

use std::time::Duration;

use crate::tags::Clock;

/// How long a page is good, what it depends on, and how it is made anew.
///
/// ```
/// # use std::time::Duration;
/// # let segment = forkyard_shm::Segment::create(&forkyard_shm::Plan { cache_bytes: 1 << 20, ..Default::default() })?;
/// # let cache = segment.cache();
/// use forkyard_shm::Options;
///
/// let clock = cache.clock(); // before anything is read that the page shows
/// let page = "rendered from the database";
/// let options = Options::new().ttl(Duration::from_secs(60)).tags(["news", "user:7"]).as_of(clock);
/// cache.set("/news", page, &options)?;
/// cache.purge_tag("user:7");
/// assert_eq!(cache.get("/news"), None);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct Options {
    pub(crate) ttl: Option<Duration>,
    pub(crate) stale: Duration,
    pub(crate) stale_if_error: Duration,
    pub(crate) tags: Vec<String>,
    pub(crate) as_of: Option<Clock>,
    pub(crate) early: Option<f64>,
    pub(crate) deadline: Duration,
    pub(crate) patience: Duration,
}

impl Default for Options {
    fn default() -> Options {
        Options {
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

impl Options {
    /// No time limit, no tags, never stale.
    pub fn new() -> Options {
        Options::default()
    }

    /// The page is good for this long.
    #[must_use]
    pub fn ttl(mut self, ttl: Duration) -> Options {
        self.ttl = Some(ttl);
        self
    }

    /// For this long after that, [`Cache::get_or_render`](crate::Cache::get_or_render) still serves the page while one
    /// process renders it anew (stale-while-revalidate, RFC 5861 §3).
    #[must_use]
    pub fn stale(mut self, stale: Duration) -> Options {
        self.stale = stale;
        self
    }

    /// For this long after its time, the page is served if it cannot be rendered anew (stale-if-error, RFC 5861 §4).
    #[must_use]
    pub fn stale_if_error(mut self, stale: Duration) -> Options {
        self.stale_if_error = stale;
        self
    }

    /// The page is out of date as soon as one of these tags is purged. As many as fit into an entry, 8 bytes each.
    #[must_use]
    pub fn tags<T: Into<String>>(mut self, tags: impl IntoIterator<Item = T>) -> Options {
        self.tags = tags.into_iter().map(Into::into).collect();
        self
    }

    /// The page shows the world as it was at this time of [`Cache::clock`](crate::Cache::clock). Without it, that of
    /// the store is taken, and a purge during rendering goes unnoticed. `get_or_render` sees to it by itself.
    #[must_use]
    pub fn as_of(mut self, clock: Clock) -> Options {
        self.as_of = Some(clock);
        self
    }

    /// Now and then renders a page anew shortly *before* its time, the likelier the nearer that is and the longer rendering
    /// takes, so that a popular page never runs out (XFetch; Vattani and others, VLDB 2015). `beta` is 1 as a rule; more
    /// is earlier.
    #[must_use]
    pub fn early(mut self, beta: f64) -> Options {
        self.early = Some(beta);
        self
    }

    /// When a process has been rendering for this long, another one may begin. 30 s unless said otherwise.
    #[must_use]
    pub fn deadline(mut self, deadline: Duration) -> Options {
        self.deadline = deadline;
        self
    }

    /// One who has waited this long for somebody else's rendering renders for itself. 10 s unless said otherwise.
    #[must_use]
    pub fn patience(mut self, patience: Duration) -> Options {
        self.patience = patience;
        self
    }
}
