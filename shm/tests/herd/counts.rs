//! What several processes count together.

use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use forkyard_shm::{CacheStatus, Cached};
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous};
use nix::time::{ClockId, clock_gettime};
use xxhash_rust::xxh3::xxh3_64;

/// What all processes count together.
#[derive(Clone, Copy)]
pub(crate) struct Counts {
    pub(crate) rendering: &'static AtomicU64,
    pub(crate) served: &'static AtomicU64,
    pub(crate) stale: &'static AtomicU64,
    /// What the page is, by its hash; 0 if nobody got it yet.
    pub(crate) page: &'static AtomicU64,
    /// Microseconds: when something happened, when somebody took over, when the last one had the page.
    pub(crate) when: [&'static AtomicU64; 3],
    pub(crate) go: &'static AtomicU64,
}

impl Counts {
    /// All 0, in memory that children share.
    pub(crate) fn new() -> Counts {
        let len = NonZeroUsize::new(4096).expect("not 0");
        let (access, flags) = (ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_SHARED);
        // SAFETY: a new mapping, at no address in particular, which is never unmapped.
        let memory = unsafe { mmap_anonymous(None, len, access, flags) }.expect("memory").cast::<[AtomicU64; 8]>();
        // SAFETY: it is larger than that, aligned to a page, zeroed, and there for ever.
        let [rendering, served, stale, page, a, b, c, go] = unsafe { memory.as_ref() };
        Counts { rendering, served, stale, page, when: [a, b, c], go }
    }

    /// One request has got its page, the same as all others.
    pub(crate) fn serve(&self, answer: &Cached) {
        let hash = xxh3_64(&answer.value);
        let first = self.page.compare_exchange(0, hash, Ordering::SeqCst, Ordering::SeqCst);
        assert!(first.is_ok() || first == Err(hash), "not all got the same page");
        let counter = if answer.source == CacheStatus::Stale { self.stale } else { self.served };
        counter.fetch_add(1, Ordering::SeqCst);
        self.note(2);
    }

    /// Notes the time.
    pub(crate) fn note(&self, event: usize) {
        let now = clock_gettime(ClockId::CLOCK_MONOTONIC).expect("clock");
        let micros = now.tv_sec() * 1_000_000 + now.tv_nsec() / 1000;
        self.when[event].fetch_max(u64::try_from(micros).expect("positive"), Ordering::SeqCst);
    }

    /// Microseconds from the event to the takeover, and to the last page.
    pub(crate) fn delays(&self) -> [u64; 2] {
        let [event, takeover, end] = self.when.map(|when| when.load(Ordering::SeqCst));
        [takeover.saturating_sub(event), end.saturating_sub(event)]
    }
}

/// What a counter says.
pub(crate) fn load(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::SeqCst)
}

/// Asks the system for a turn now and then until something is so.
pub(crate) fn until(so: impl Fn() -> bool) {
    while !so() {
        std::thread::sleep(Duration::from_micros(200));
    }
}
