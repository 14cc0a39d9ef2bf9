//! Counters that several processes share.

use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use forkyard_shm::{CacheStatus, Cached};
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous};
use nix::time::{ClockId, clock_gettime};
use xxhash_rust::xxh3::xxh3_64;

#[derive(Clone, Copy)]
pub(crate) struct Counts {
    pub(crate) rendering: &'static AtomicU64,
    pub(crate) served: &'static AtomicU64,
    pub(crate) stale: &'static AtomicU64,
    /// Hash of the page. 0 while no process has received the page.
    pub(crate) page: &'static AtomicU64,
    /// Times in microseconds: of the event, of the takeover, and of the last delivery of the page.
    pub(crate) when: [&'static AtomicU64; 3],
    pub(crate) go: &'static AtomicU64,
}

impl Counts {
    /// Creates the counters, with value 0, in memory that children share.
    pub(crate) fn new() -> Counts {
        let len = NonZeroUsize::new(4096).expect("not 0");
        let (access, flags) = (ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_SHARED);
        // SAFETY: a new mapping, at an address that the kernel chooses. The mapping is never removed.
        let memory = unsafe { mmap_anonymous(None, len, access, flags) }.expect("memory").cast::<[AtomicU64; 8]>();
        // SAFETY: the mapping is larger than the counters, aligned to a page, zeroed, and never unmapped.
        let [rendering, served, stale, page, a, b, c, go] = unsafe { memory.as_ref() };
        Counts { rendering, served, stale, page, when: [a, b, c], go }
    }

    /// Counts a request that received the page. Checks that all requests receive the same page.
    pub(crate) fn serve(&self, answer: &Cached) {
        let hash = xxh3_64(&answer.value);
        let first = self.page.compare_exchange(0, hash, Ordering::SeqCst, Ordering::SeqCst);
        assert!(first.is_ok() || first == Err(hash), "the requests received different pages");
        let counter = if answer.source == CacheStatus::Stale { self.stale } else { self.served };
        counter.fetch_add(1, Ordering::SeqCst);
        self.note(2);
    }

    /// Records the time.
    pub(crate) fn note(&self, event: usize) {
        let now = clock_gettime(ClockId::CLOCK_MONOTONIC).expect("clock");
        let micros = now.tv_sec() * 1_000_000 + now.tv_nsec() / 1000;
        self.when[event].fetch_max(u64::try_from(micros).expect("positive"), Ordering::SeqCst);
    }

    /// Returns the microseconds from the event to the takeover, and to the last delivery of the page.
    pub(crate) fn delays(&self) -> [u64; 2] {
        let [event, takeover, end] = self.when.map(|when| when.load(Ordering::SeqCst));
        [takeover.saturating_sub(event), end.saturating_sub(event)]
    }
}

/// Returns the value of a counter.
pub(crate) fn load(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::SeqCst)
}

/// Checks a condition repeatedly until it holds.
pub(crate) fn until(so: impl Fn() -> bool) {
    while !so() {
        std::thread::sleep(Duration::from_micros(200));
    }
}
