//! The kill storm: readers and writers of small segments are killed and stopped at random instants, thousands of times.
//!
//! Each value identifies its key and shows whether it is intact. No process may wait long for a page or hang, and no byte of memory may be
//! lost. FORKYARD_KILLS=n sets the total number of kills, and FORKYARD_SCALE=n a percentage of the default.
#![expect(
    unsafe_code,
    clippy::print_stdout,
    reason = "the test shares memory with forked children, and prints its own report"
)]

mod common;

use std::collections::VecDeque;
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use common::{SMALL, adds_up, is_whole, leave, name, page, segment, spawn};
use forkyard_shm::{Cache, Pinned, Stats, StoreError, StoreOptions};
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::Pid;

const KILLS: u64 = 20_000;
const CHILDREN: usize = 5;
const TAGS: u32 = 64;
/// Maximum duration of a lookup.
const SLOWEST_GET: Duration = Duration::from_secs(20);
/// Maximum time that a child may make no progress.
const STUCK: Duration = Duration::from_secs(60);
/// Number of words of a torn page that are reported.
const TORN_WORDS: usize = 8192;
/// Exit code of a child that has found a torn page.
const TORN: i32 = 77;
/// The operations in which a child checks a page.
const CHECKS: [&str; 5] = ["get", "get_into", "pin", "pin before its release", "list"];
/// Exit code of a child whose page was rejected for no reason.
const REFUSED: i32 = 78;

fn main() {
    common::run(&[
        ("in_one_shard", |seed| storm(seed, SMALL, 300, 90)),
        ("in_two_shards", |seed| storm(seed, 24 << 20, 12_000, 7)),
        ("in_four_shards", |seed| storm(seed, 36 << 20, 18_000, 3)),
    ]);
}

/// The reports of the children, in memory that outlives the children.
#[repr(C)]
#[derive(Debug)]
struct Report {
    slowest_get_ns: AtomicU64,
    hits: AtomicU64,
    stored: AtomicU64,
    busy: AtomicU64,
    pinned: AtomicU64,
    /// The error that a child has found: the check, the key, and the length of the page.
    torn: [AtomicU64; 3],
    /// The beginning of the torn page.
    torn_page: [AtomicU64; TORN_WORDS],
    slots: [Slot; CHILDREN],
}

#[repr(C, align(64))]
#[derive(Debug)]
struct Slot {
    /// Start of the current lookup, in nanoseconds. 0 if there is none.
    since_ns: AtomicU64,
    acts: AtomicU64,
}

impl Report {
    fn shared() -> &'static Report {
        let len = NonZeroUsize::new(size_of::<Report>()).expect("not empty");
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping, to which nothing else refers.
        let memory = unsafe { mmap_anonymous(None, len, access, MapFlags::MAP_SHARED) }.expect("mmap");
        // SAFETY: as long as a report, aligned to a page, zeroed, atomics only, and never unmapped.
        unsafe { memory.cast::<Report>().as_ref() }
    }
}

impl Report {
    /// Describes the error that a child has found. The places where the page changes from one version to another show how the page was
    /// torn.
    fn torn(&self) -> String {
        let [which, key, len] = [0, 1, 2].map(|at: usize| self.torn[at].load(Ordering::Relaxed));
        let words = usize::try_from(len.div_ceil(8)).expect("the length of a page").min(TORN_WORDS);
        let page: Vec<u64> = self.torn_page[..words].iter().map(|word| word.load(Ordering::Relaxed)).collect();
        let mut runs: Vec<(usize, u64, usize)> = Vec::new();
        for (at, &word) in page.iter().enumerate() {
            match runs.last_mut() {
                Some((_, last, count)) if *last == word => *count += 1,
                _ => runs.push((at * 8, word, 1)),
            }
        }
        runs.truncate(64);
        let runs: Vec<String> = runs.iter().map(|(at, word, count)| format!("{at}: {word:016x} x{count}")).collect();
        let which = CHECKS[usize::try_from(which).expect("the index of a check")];
        format!("{which}, key {key}, {len} bytes:\n  {}", runs.join("\n  "))
    }
}

fn now_ns() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).expect("the clock can be read");
    u64::try_from(now.tv_sec() * 1_000_000_000 + now.tv_nsec()).expect("the monotonic clock is not negative")
}

fn count(word: &AtomicU64) {
    word.fetch_add(1, Ordering::Relaxed);
}

// ---- children ----

/// A child that reads and writes until it is killed.
struct Worker<'a> {
    cache: &'a Cache,
    report: &'a Report,
    slot: &'a Slot,
    random: fastrand::Rng,
    keys: u32,
    buffer: Vec<u8>,
    pins: VecDeque<(u32, Pinned)>,
}

impl Worker<'_> {
    /// Chooses a key. Half of all requests are for the same tenth of the keys.
    fn key(&mut self) -> u32 {
        let most = if self.random.bool() { self.keys } else { self.keys / 10 };
        self.random.u32(..most)
    }

    fn act(&mut self) {
        let key = self.key();
        match self.random.u32(..50_000) {
            0..17_000 => self.timed(|worker| {
                let bytes = worker.cache.get(name(key));
                worker.check("get", key, bytes.as_deref());
            }),
            17_000..22_000 => self.timed(|worker| {
                let mut buffer = std::mem::take(&mut worker.buffer);
                let found = worker.cache.get_into(name(key), &mut buffer);
                worker.check("get_into", key, found.then_some(&buffer));
                worker.buffer = buffer;
            }),
            22_000..27_000 => self.pin(key),
            27_000..48_000 => self.store(key),
            48_000..49_500 => drop(self.cache.purge(name(key))),
            49_500..49_600 => self.cache.purge_tag(&self.random.u32(..TAGS).to_string()),
            49_600..49_605 => self.cache.purge_prefix(format!("/page/{}", self.random.u32(10..100))),
            49_605..49_700 => self.list(),
            49_700..49_999 => self.cache.sweep(),
            _ => self.cache.clear(),
        }
        count(&self.slot.acts);
    }

    /// Runs a lookup, and measures its duration.
    fn timed(&mut self, lookup: impl FnOnce(&mut Self)) {
        let since = now_ns();
        self.slot.since_ns.store(since, Ordering::Relaxed);
        lookup(self);
        self.report.slowest_get_ns.fetch_max(now_ns() - since, Ordering::Relaxed);
        self.slot.since_ns.store(0, Ordering::Relaxed);
    }

    fn check(&self, which: &'static str, key: u32, bytes: Option<&[u8]>) {
        match bytes {
            Some(bytes) if is_whole(key, bytes) => count(&self.report.hits),
            Some(bytes) => self.report_torn(which, key, bytes),
            None => {}
        }
    }

    fn report_torn(&self, which: &'static str, key: u32, bytes: &[u8]) {
        let which = CHECKS.iter().position(|check| *check == which).expect("the check is in the list");
        let values = [which as u64, key.into(), bytes.len() as u64];
        self.report.torn.iter().zip(values).for_each(|(word, value)| word.store(value, Ordering::Relaxed));
        for (word, bytes) in self.report.torn_page.iter().zip(bytes.chunks(8)) {
            let mut value = [0; 8];
            value[..bytes.len()].copy_from_slice(bytes);
            word.store(u64::from_le_bytes(value), Ordering::Relaxed);
        }
        leave(TORN)
    }

    /// Pins a page for a while, and checks the page again before the pin is released.
    fn pin(&mut self, key: u32) {
        self.timed(|worker| {
            if let Some(pin) = worker.cache.pin(name(key)) {
                worker.check("pin", key, Some(&pin.to_vec()));
                count(&worker.report.pinned);
                worker.pins.push_back((key, pin));
            }
        });
        if self.pins.len() > 8
            && let Some((key, pin)) = self.pins.pop_front()
        {
            self.check("pin before its release", key, Some(&pin.to_vec()));
        }
    }

    fn store(&mut self, key: u32) {
        let most = if self.random.u32(..10) == 0 { 60_000 } else { 3000 };
        let bytes = page(key, self.random.u64(..), self.random.usize(..most));
        let mut options = StoreOptions::new().tags([(key % TAGS).to_string()]).as_of(self.cache.clock());
        if self.random.u32(..10) == 0 {
            options = options.ttl(Duration::from_millis(self.random.u64(1..100)));
        }
        match self.cache.set(name(key), bytes, &options) {
            Ok(()) => count(&self.report.stored),
            Err(StoreError::Busy) => count(&self.report.busy),
            Err(StoreError::TooLarge { limit }) if limit < 60_100 => {}
            Err(_) => leave(REFUSED),
        }
    }

    fn list(&mut self) {
        let listed = self.cache.list("/page/1", 100);
        if listed.iter().any(|page| !page.key.starts_with(b"/page/1")) {
            self.report_torn("list", 0, &[]);
        }
        self.cache.distribution();
    }
}

// ---- the killer ----

struct Storm<'a> {
    cache: &'a Cache,
    report: &'a Report,
    random: fastrand::Rng,
    keys: u32,
    children: Vec<Pid>,
    /// For each child, its progress and the time at which the progress last changed.
    seen: Vec<(u64, Instant)>,
}

impl Storm<'_> {
    fn start(&mut self, at: usize) -> Pid {
        let seed = self.random.u64(..);
        let (cache, report, keys) = (self.cache, self.report, self.keys);
        let slot = &report.slots[at];
        slot.since_ns.store(0, Ordering::Relaxed);
        let child = spawn(move |_| {
            let random = fastrand::Rng::with_seed(seed);
            let mut worker = Worker { cache, report, slot, random, keys, buffer: Vec::new(), pins: VecDeque::new() };
            loop {
                worker.act();
            }
        });
        child.pid
    }

    /// Kills a child at a random instant, sometimes after stopping it. Returns false if the child was only stopped.
    fn strike(&mut self) -> bool {
        sleep(Duration::from_micros(self.random.u64(..800)));
        let at = self.random.usize(..CHILDREN);
        let pid = self.children[at];
        if self.random.u32(..20) == 0 {
            kill(pid, Signal::SIGSTOP).expect("kill");
            sleep(Duration::from_micros(self.random.u64(..3000)));
            if self.random.bool() {
                kill(pid, Signal::SIGCONT).expect("kill");
                return false;
            }
        }
        self.end(at);
        self.children[at] = self.start(at);
        self.seen[at] = (0, Instant::now());
        true
    }

    fn end(&mut self, at: usize) {
        let pid = self.children[at];
        kill(pid, Signal::SIGKILL).expect("kill");
        match waitpid(pid, None).expect("waitpid") {
            WaitStatus::Signaled(_, Signal::SIGKILL, _) => {}
            WaitStatus::Exited(_, TORN) => {
                panic!("a child read a torn page or the page of another key: {}", self.report.torn())
            }
            WaitStatus::Exited(_, REFUSED) => panic!("a child's page was rejected for no reason"),
            other => panic!("a child failed: {other:?}"),
        }
    }

    /// Checks that no child waits long for a page, and that no child hangs.
    fn watch(&mut self) {
        for (slot, seen) in self.report.slots.iter().zip(&mut self.seen) {
            let since = slot.since_ns.load(Ordering::Relaxed);
            let waits = Duration::from_nanos(if since == 0 { 0 } else { now_ns().saturating_sub(since) });
            assert!(waits < SLOWEST_GET, "a lookup has taken {waits:?} so far");
            let acts = slot.acts.load(Ordering::Relaxed);
            if acts != seen.0 {
                *seen = (acts, Instant::now());
            }
            assert!(seen.1.elapsed() < STUCK, "a child has made no progress for {STUCK:?}");
        }
        let slowest = Duration::from_nanos(self.report.slowest_get_ns.load(Ordering::Relaxed));
        assert!(slowest < SLOWEST_GET, "a lookup took {slowest:?}");
    }
}

fn storm(seed: u64, cache_bytes: u64, keys: u32, percent: u64) {
    let cache = segment(cache_bytes).cache();
    let report = Report::shared();
    let random = fastrand::Rng::with_seed(seed);
    let mut storm = Storm { cache: &cache, report, random, keys, children: Vec::new(), seen: Vec::new() };
    for at in 0..CHILDREN {
        let child = storm.start(at);
        storm.children.push(child);
        storm.seen.push((0, Instant::now()));
    }
    let began = Instant::now();
    let kills = KILLS * common::number("FORKYARD_SCALE").unwrap_or(100) / 100;
    let goal = common::number("FORKYARD_KILLS").unwrap_or(kills) * percent / 100;
    let (mut kills, mut stops) = (0, 0);
    let has_evicted = || {
        let stats = cache.stats();
        stats.evicted_small + stats.evicted_main > 0
    };
    while kills < goal || !has_evicted() {
        common::not_longer_than(STUCK * 3);
        if storm.strike() {
            kills += 1
        } else {
            stops += 1
        }
        storm.watch();
        if (kills + stops) % 200 == 0 {
            // The children continue during the audit, and one of them may be stopped while it holds a lock.
            let audit = cache.audit();
            assert!(
                audit.as_ref().is_err_and(|why| why.contains("could not be locked")) || audit == Ok(()),
                "{audit:?}"
            );
        }
    }
    (0..CHILDREN).for_each(|at| storm.end(at));
    let took = began.elapsed();
    let stats = after(&cache);
    let get = |word: &AtomicU64| word.load(Ordering::Relaxed);
    println!(
        "  {kills} kills and {stops} stops in {took:?}: slowest get {:?}",
        Duration::from_nanos(get(&report.slowest_get_ns))
    );
    println!(
        "  {} hits, {} pinned, {} stored, {} busy; {} dead owners, {} timeouts, {} retries, {} promoted, {} reprieved",
        get(&report.hits),
        get(&report.pinned),
        get(&report.stored),
        get(&report.busy),
        stats.lock_recoveries,
        stats.lock_timeouts,
        stats.retries,
        stats.promoted,
        stats.reprieved
    );
    assert!(get(&report.hits) > 0 && get(&report.stored) > 0);
    let (used, fresh) = (fill_up(&cache), fill_up(&segment(cache_bytes).cache()));
    println!("  filled up, {used} of {} bytes are live, {fresh} in a new segment", stats.capacity);
    assert!(used >= stats.capacity * 85 / 100, "{used} live bytes of {}", stats.capacity);
    assert!(used.abs_diff(fresh) <= fresh / 50, "{used} live bytes, where a new segment has {fresh}");
}

/// Checks that dead children have left no locks or pins behind.
fn after(cache: &Cache) -> Stats {
    assert_eq!(cache.audit(), Ok(()));
    // The sweep runs at most once per second, and a child may just have run it.
    let since = Instant::now();
    while cache.pins_set() > 0 && since.elapsed() < STUCK {
        cache.sweep();
        sleep(Duration::from_millis(10));
    }
    assert_eq!((cache.pins_set(), cache.locks_held()), (0, 0));
    assert_eq!(cache.audit(), Ok(()));
    let stats = cache.stats();
    assert_eq!(adds_up(&stats), Ok(()));
    stats
}

/// Stores pages of 1 KiB until the cache has been filled a few times. Returns the number of live bytes. Each page is requested once,
/// because pages without requests do not reach the main ring when it is full, and dead pages there stay until the sweep.
fn fill_up(cache: &Cache) -> u64 {
    let pages = u32::try_from(cache.stats().capacity / 1024 * 3).expect("a small cache");
    for key in 1_000_000..1_000_000 + pages {
        assert_eq!(cache.set(name(key), page(key, 1, 1004), &StoreOptions::new()), Ok(()));
        assert!(cache.get(name(key)).is_some_and(|bytes| is_whole(key, &bytes)));
    }
    assert_eq!(cache.audit(), Ok(()));
    assert_eq!(adds_up(&cache.stats()), Ok(()));
    cache.stats().live_bytes
}
