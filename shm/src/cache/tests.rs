//! Tests of the cache: unit tests, random histories against a plain model, and corrupted memory.

use std::cell::Cell;
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::TestRunner;

use super::*;
use crate::protocols::pin;
use crate::{Plan, Segment, Stats};

const SMALL: u64 = 256 * 1024;

fn cache(cache_bytes: u64) -> Cache {
    Segment::create(&Plan { cache_bytes, rows: 1, ..Plan::default() }).unwrap().cache()
}

fn get_at(cache: &Cache, key: &[u8], now_ms: u64) -> Option<Vec<u8>> {
    let mut value = b"what was there before".to_vec();
    let found = cache.get_at(key, Moment::At(now_ms), &mut value);
    assert!(found || value.is_empty());
    found.then_some(value)
}

fn set_at(cache: &Cache, key: &[u8], value: &[u8], options: &StoreOptions, now_ms: u64) -> Result<(), StoreError> {
    cache.store(key, value, options, &Rendering::default(), now_ms)
}

fn evictions(stats: &Stats) -> u64 {
    stats.evicted_small + stats.evicted_main + stats.evicted_index
}

/// Prints the seed when the test that owns it fails.
struct Seed(u64);

impl Seed {
    fn new() -> Seed {
        let given = std::env::var("FORKYARD_SEED").ok().and_then(|text| text.parse().ok());
        Seed(given.unwrap_or_else(|| fastrand::u64(..)))
    }
}

impl Drop for Seed {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("run again with FORKYARD_SEED={}", self.0);
        }
    }
}

#[test]
fn stores_answers_replaces_and_purges() {
    let cache = cache(SMALL);
    let plain = StoreOptions::new();
    assert_eq!(cache.get("a"), None);
    cache.set("a", "one", &plain).unwrap();
    cache.set("b", "", &plain).unwrap();
    cache.set("", b"empty key", &plain).unwrap();
    assert_eq!(cache.get("a").unwrap(), b"one");
    assert_eq!(cache.get("b").unwrap(), b"");
    assert_eq!(cache.get("").unwrap(), b"empty key");
    assert_eq!(cache.get("a\0"), None, "keys are compared whole");
    cache.set("a", "two", &plain).unwrap();
    assert_eq!(cache.get("a").unwrap(), b"two");
    assert!(cache.purge("a"));
    assert!(!cache.purge("a"));
    assert_eq!(cache.get("a"), None);
    cache.audit().unwrap();
    let stats = cache.stats();
    assert_eq!((stats.hits, stats.misses, stats.stores, stats.purged), (4, 3, 4, 1));
    assert_eq!((stats.entries, stats.shards, stats.lost), (2, 1, 0));
    assert_eq!(
        (stats.used_bytes + stats.free_bytes, stats.live_bytes + stats.wasted_bytes),
        (stats.capacity, stats.used_bytes)
    );
    assert!(stats.wasted_bytes > 0);
}

#[test]
fn threads_that_count_at_the_same_instant_lose_no_count_but_hits() {
    const EACH: u64 = 50_000;
    let cache = cache(SMALL);
    let seen = [Seen::Stale, Seen::Miss, Seen::Wait, Seen::Render];
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| (0..EACH).for_each(|_| seen.iter().for_each(|&seen| cache.count(0, 0, seen))));
        }
    });
    let stats = cache.stats();
    assert_eq!([stats.stale_hits, stats.misses, stats.lease_waits, stats.renders], [4 * EACH; 4]);
}

#[test]
fn large_values_come_back_whole_and_larger_ones_are_refused() {
    let cache = cache(1 << 20);
    let limit = usize::try_from(cache.max_entry()).unwrap();
    for key in ["1", "1234567", "12345678"] {
        let value: Vec<u8> = (0..limit - key.len()).map(|n| u8::try_from(n % 251).unwrap()).collect();
        cache.set(key, &value, &StoreOptions::new()).unwrap();
        assert!(cache.get(key).unwrap() == value);
        let more = [&value[..], b"x"].concat();
        let refused = cache.set(key, more, &StoreOptions::new());
        assert_eq!(refused, Err(StoreError::TooLarge { limit: cache.max_entry() }));
    }
    let many = StoreOptions::new().tags((0..100_000).map(|n| n.to_string()));
    assert!(matches!(cache.set("k", "v", &many), Err(StoreError::TooLarge { .. })));
    assert_eq!(cache.stats().refused, 4);
    cache.audit().unwrap();
}

#[test]
fn without_a_cache_everything_misses() {
    let cache = cache(0);
    assert_eq!(cache.set("k", "v", &StoreOptions::new()), Err(StoreError::Off));
    assert_eq!(cache.get("k"), None);
    assert!(!cache.purge("k"));
    cache.purge_tag("t");
    cache.clear();
    assert_eq!(cache.clock(), PurgeSnapshot(0));
    assert_eq!(cache.stats(), Stats::default());
    assert_eq!(cache.max_entry(), 0);
    cache.audit().unwrap();
}

#[test]
fn pages_expire() {
    let cache = cache(SMALL);
    let options = StoreOptions::new().ttl(Duration::from_millis(500));
    set_at(&cache, b"k", b"v", &options, 1000).unwrap();
    assert!(get_at(&cache, b"k", 1499).is_some());
    assert_eq!(get_at(&cache, b"k", 1500), None);
    set_at(&cache, b"k", b"v", &StoreOptions::new().ttl(Duration::MAX), u64::MAX - 1).unwrap();
    assert!(get_at(&cache, b"k", u64::MAX - 1).is_some());
    set_at(&cache, b"k", b"v", &StoreOptions::new().ttl(Duration::ZERO), 1000).unwrap();
    assert_eq!(get_at(&cache, b"k", 1001), None);
    cache.audit().unwrap();
}

#[test]
fn a_page_rendered_while_its_tag_was_purged_is_not_served() {
    let cache = cache(SMALL);
    let before = cache.clock();
    cache.purge_tag("news");
    cache.set("page", "old", &StoreOptions::new().tags(["user", "news"]).as_of(before)).unwrap();
    assert_eq!(cache.get("page"), None);
    cache.set("other", "fine", &StoreOptions::new().tags(["user"]).as_of(before)).unwrap();
    assert!(cache.get("other").is_some());
    cache.set("page", "new", &StoreOptions::new().tags(["news"]).as_of(cache.clock())).unwrap();
    assert_eq!(cache.get("page").unwrap(), b"new");

    let before = cache.clock();
    cache.purge("page");
    cache.set("page", "old", &StoreOptions::new().as_of(before)).unwrap();
    assert_eq!(cache.get("page"), None, "the same goes for purging the key");

    let before = cache.clock();
    cache.clear();
    cache.set("page", "old", &StoreOptions::new().as_of(before)).unwrap();
    assert_eq!(cache.get("page"), None, "and for clearing");
    cache.set("page", "newest", &StoreOptions::new()).unwrap();
    assert!(cache.get("page").is_some());

    cache.set("page", "from the future", &StoreOptions::new().tags(["t"]).as_of(PurgeSnapshot(u64::MAX))).unwrap();
    cache.purge_tag("t");
    assert_eq!(cache.get("page"), None, "a clock of another segment gives no eternal life");
    cache.audit().unwrap();
}

#[test]
fn clear_empties_and_the_cache_goes_on() {
    let cache = cache(16 << 20);
    for n in 0..500 {
        cache.set(format!("k{n}"), "v", &StoreOptions::new()).unwrap();
    }
    assert_eq!(cache.stats().shards, 2);
    cache.clear();
    let stats = cache.stats();
    assert_eq!((stats.entries, stats.live_bytes, stats.free_bytes), (0, 0, stats.capacity));
    assert!((0..500).all(|n| cache.get(format!("k{n}")).is_none()));
    cache.audit().unwrap();
    assert!((0..500).all(|n| cache.set(format!("k{n}"), "w", &StoreOptions::new()).is_ok()));
    assert!((0..500).all(|n| cache.get(format!("k{n}")).is_some()));
    cache.audit().unwrap();
}

#[test]
fn what_is_asked_for_outlives_what_is_not() {
    let cache = cache(SMALL);
    let page = [7; 1000];
    cache.set("popular", page, &StoreOptions::new()).unwrap();
    for n in 0..2000 {
        assert!(cache.get("popular").is_some(), "evicted before page {n}");
        cache.set(format!("one hit wonder {n}"), page, &StoreOptions::new()).unwrap();
    }
    let stats = cache.stats();
    assert!(evictions(&stats) > 1500, "{stats:?}");
    assert!(stats.live_bytes > 0, "{stats:?}");
    cache.audit().unwrap();
}

#[test]
fn nothing_is_lost_before_the_memory_is_full() {
    let cache = cache(8 << 20);
    // With 5000 keys, both buckets of some key would be full in one run out of a hundred, because each run hashes with a new seed.
    for n in 0..3000 {
        cache.set(format!("k{n}"), n.to_string(), &StoreOptions::new()).unwrap();
    }
    for n in 0..3000 {
        assert_eq!(cache.get(format!("k{n}")), Some(n.to_string().into_bytes()));
    }
    assert_eq!(evictions(&cache.stats()), 0);
    cache.audit().unwrap();
}

/// The content of a cache with infinite memory.
#[derive(Default)]
struct Model {
    pages: HashMap<u8, ModelPage>,
    clock: u64,
    cleared: u64,
    key_purged: HashMap<u8, u64>,
    tag_purged: HashMap<u8, u64>,
}

struct ModelPage {
    value: Vec<u8>,
    tags: Vec<u8>,
    rendered: u64,
    expires_ms: u64,
}

impl Model {
    fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    fn fresh(&self, key: u8, now_ms: u64) -> Option<&ModelPage> {
        let page = self.pages.get(&key)?;
        let purged = |map: &HashMap<u8, u64>, of: &u8| map.get(of).is_some_and(|&time| time > page.rendered);
        let out = now_ms >= page.expires_ms
            || self.cleared > page.rendered
            || purged(&self.key_purged, &key)
            || page.tags.iter().any(|tag| purged(&self.tag_purged, tag));
        (!out).then_some(page)
    }
}

/// An operation that is applied to the cache and to the model.
#[derive(Clone, Debug)]
enum Act {
    Get(u8),
    Set {
        key: u8,
        len: usize,
        tags: Vec<u8>,
        ttl_ms: u64,
        as_of_earlier: bool,
    },
    Purge(u8),
    PurgeTag(u8),
    Clear,
    /// From now on, "earlier" refers to the current clock.
    LookAtClock,
    Sweep,
    Audit,
    Wait(u64),
}

fn act() -> impl Strategy<Value = Act> {
    // Low bytes are more likely, so some keys are requested more often.
    let key = || (any::<u8>(), any::<u8>()).prop_map(|(one, other)| one & other);
    let tags = vec(0_u8..20, 0..4);
    let set = (key(), 0_usize..20_000, tags, 1_u64..2000, any::<bool>())
        .prop_map(|(key, len, tags, ttl_ms, as_of_earlier)| Act::Set { key, len, tags, ttl_ms, as_of_earlier });
    prop_oneof![
        550 => key().prop_map(Act::Get),
        350 => set,
        30 => key().prop_map(Act::Purge),
        30 => (0_u8..20).prop_map(Act::PurgeTag),
        2 => Just(Act::Clear),
        18 => Just(Act::LookAtClock),
        5 => Just(Act::Sweep),
        5 => Just(Act::Audit),
        10 => (0_u64..500).prop_map(Act::Wait),
    ]
}

/// Runs one history. Returns the number of lookups of pages that are in the model, and how many of these were hits.
fn history(acts: &[Act]) -> (u32, u32) {
    let cache = cache(SMALL);
    let mut model = Model::default();
    let (mut now_ms, mut due, mut hits) = (1000, 0, 0);
    let mut earlier = (cache.clock(), 0);
    for (step, act) in (0_u64..).zip(acts) {
        match act {
            Act::Get(key) => {
                let found = get_at(&cache, &[*key], now_ms);
                let expected = model.fresh(*key, now_ms).map(|page| &page.value);
                due += u32::from(expected.is_some());
                hits += u32::from(found.is_some());
                assert!(found.is_none() || found.as_ref() == expected, "step {step}: wrong or stale value of {key}");
            }
            Act::Set { key, len, tags, ttl_ms, as_of_earlier } => {
                let value = step.to_le_bytes().into_iter().cycle().take(*len).collect::<Vec<u8>>();
                let (clock, rendered) = if *as_of_earlier { earlier } else { (cache.clock(), model.clock) };
                let options = StoreOptions::new().tags(tags.iter().map(u8::to_string)).as_of(clock);
                let options = options.ttl(Duration::from_millis(*ttl_ms));
                set_at(&cache, &[*key], &value, &options, now_ms).unwrap();
                let page = ModelPage { value, tags: tags.clone(), rendered, expires_ms: now_ms + ttl_ms };
                model.pages.insert(*key, page);
            }
            Act::Purge(key) => {
                let had = model.fresh(*key, now_ms).is_some();
                assert!(!cache.purge_at(&[*key], now_ms) || had, "step {step}: purged {key}, which was not there");
                let time = model.tick();
                model.key_purged.insert(*key, time);
            }
            Act::PurgeTag(tag) => {
                cache.purge_tag(&tag.to_string());
                let time = model.tick();
                model.tag_purged.insert(*tag, time);
            }
            Act::Clear => {
                cache.clear();
                model.cleared = model.tick();
            }
            Act::LookAtClock => earlier = (cache.clock(), model.clock),
            Act::Sweep => cache.sweep_now(1, now_ms),
            Act::Audit => cache.audit().unwrap(),
            Act::Wait(ms) => now_ms += ms,
        }
    }
    cache.audit().unwrap();
    assert_eq!(cache.stats().lost, 0);
    (due, hits)
}

#[test]
fn histories_agree_with_a_plain_model() {
    let (due, hits) = (Cell::new(0), Cell::new(0));
    let config = ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() };
    let outcome = TestRunner::new(config).run(&vec(act(), 1..2500), |acts| {
        let (more_due, more_hits) = history(&acts);
        due.set(due.get() + more_due);
        hits.set(hits.get() + more_hits);
        Ok(())
    });
    outcome.unwrap();
    let (due, hits) = (due.get(), hits.get());
    assert!(hits * 10 > due * 3, "misses are allowed, but so many? {hits} of {due}");
}

/// The sizes resemble those of real pages: from 100 bytes to 256 KiB, half of them below 8 KiB.
#[test]
fn most_of_the_segment_is_pages() {
    let mut random = fastrand::Rng::with_seed(7);
    let cache = cache(64 << 20);
    let mut live = Vec::new();
    for n in 0..20_000_u32 {
        // The sum of several uniform numbers is about normally distributed, so the size is about log-normal.
        let normal = (0..12).map(|_| random.f64()).sum::<f64>() - 6.0;
        let size = (8192.0 * (1.3 * normal).exp()).clamp(100.0, 262_144.0);
        let page = vec![b'x'; format!("{size:.0}").parse().unwrap()];
        cache.set(format!("https://example.org/a/page/{n}"), page, &StoreOptions::new()).unwrap();
        if n > 5000 && n % 1000 == 0 {
            let values: u64 = cache.list("", usize::MAX).iter().map(|page| page.len).sum();
            live.push(values * 100 / cache.segment.geometry.total);
        }
    }
    assert!(live.iter().all(|&percent| percent >= 85), "percent of the segment, over time: {live:?}");
    cache.audit().unwrap();
}

/// Stops the other threads of a test, even if the test fails.
struct Finish<'a>(&'a AtomicBool);

impl Drop for Finish<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// Runs renderers, a purging writer and readers concurrently. After a purge has returned, no reader may receive an older page.
#[test]
fn no_page_from_before_a_purge_is_served_after_it() {
    let cache = cache(SMALL);
    let (truth, floor, done) = (AtomicU64::new(0), AtomicU64::new(0), AtomicBool::new(false));
    let render = || {
        while !done.load(Ordering::SeqCst) {
            let clock = cache.clock();
            let seen = truth.load(Ordering::SeqCst);
            let options = StoreOptions::new().tags(["t"]).as_of(clock);
            let _ = cache.set("tagged", seen.to_le_bytes(), &options);
            let _ = cache.set("plain", seen.to_le_bytes(), &StoreOptions::new().as_of(clock));
        }
    };
    let read = |key: &str| {
        let least = floor.load(Ordering::SeqCst);
        if let Some(page) = cache.get(key) {
            let shown = u64::from_le_bytes(page.try_into().unwrap());
            assert!(shown >= least, "{key}: {shown} served after {least} was purged");
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(render);
        scope.spawn(render);
        let reader = scope.spawn(|| {
            while !done.load(Ordering::SeqCst) {
                read("tagged");
                read("plain");
            }
        });
        let finish = Finish(&done);
        for round in 1..=5000 {
            truth.store(round, Ordering::SeqCst);
            cache.purge_tag("t");
            cache.purge("plain");
            floor.store(round, Ordering::SeqCst);
            read("tagged");
            read("plain");
        }
        drop(finish);
        reader.join().unwrap();
    });
    cache.audit().unwrap();
}

#[test]
fn a_purge_by_prefix_concerns_what_is_there_and_what_is_being_rendered() {
    let cache = cache(SMALL);
    let before = cache.clock();
    for key in ["/news/1", "/news/2", "/new", "/user/1"] {
        cache.set(key, key, &StoreOptions::new()).unwrap();
    }
    cache.purge_prefix("/news/");
    let found = |key: &str| cache.get(key).is_some();
    assert_eq!(["/news/1", "/news/2", "/new", "/user/1"].map(found), [false, false, true, true]);
    assert_eq!((cache.stats().purged, cache.stats().entries), (2, 2));
    cache.set("/news/1", "old", &StoreOptions::new().as_of(before)).unwrap();
    assert!(!found("/news/1"), "rendered before");
    cache.set("/news/1", "new", &StoreOptions::new()).unwrap();
    assert!(found("/news/1"));
    // Enough further purges to push the first one out of the table; a page rendered before it is still rejected.
    (0..40).for_each(|n| cache.purge_prefix(format!("/other/{n}/")));
    cache.set("/news/2", "old", &StoreOptions::new().as_of(before)).unwrap();
    assert!(!found("/news/2") && found("/news/1") && found("/user/1"));
    // A purge that was announced but not finished is in effect, and the sweep finishes it.
    let prefixes = Prefixes::of(&cache.segment).unwrap();
    prefixes.announce(b"/user/", cache.tag_clock().unwrap()).unwrap();
    assert!(!found("/user/1") && prefixes.unswept().count() == 1);
    cache.sweep_now(1, cache.segment.now_ms());
    assert_eq!((prefixes.unswept().count(), cache.stats().entries), (0, 2));
    cache.purge_prefix("");
    assert_eq!(cache.stats().entries, 0);
    cache.audit().unwrap();
}

#[test]
fn the_sweep_reclaims_what_is_over_without_pressure() {
    let cache = cache(SMALL);
    let page = [1; 1000];
    for n in 0..100 {
        let options = StoreOptions::new().ttl(Duration::from_millis(if n < 80 { 100 } else { 1_000_000 }));
        set_at(&cache, format!("k{n}").as_bytes(), &page, &options, 1000).unwrap();
    }
    let before = cache.stats();
    cache.sweep_now(1, 1099);
    assert_eq!((cache.stats().expired, cache.stats().entries), (0, 100));
    (0..20).for_each(|_| cache.sweep_now(1, 1100));
    let after = cache.stats();
    assert_eq!((after.expired, after.entries), (80, 20), "{after:?}");
    assert!(after.used_bytes < before.used_bytes / 2, "{after:?}");
    cache.audit().unwrap();
}

/// Whatever the segment contains, there must be no panic, endless loop or out-of-bounds access, and the cache must work again afterwards.
#[test]
fn nonsense_in_the_segment_costs_the_cache_only() {
    let seed = Seed::new();
    let mut random = fastrand::Rng::with_seed(seed.0);
    let cache = cache(SMALL);
    let (start, shard, len) =
        (cache.segment.geometry.members_at, cache.segment.geometry.shard_at(0), cache.segment.geometry.total);
    for _ in 0..400 {
        for n in 0..60 {
            let _ = cache.set([n], vec![n; random.usize(..3000)], &StoreOptions::new().tags(["t"]));
        }
        for _ in 0..random.u32(1..40) {
            // Overwrites, with equal probability, a word in a shard's head or any word after the scoreboard, including locks and members.
            let at = if random.bool() { random.u64(start..len - 8) } else { shard + random.u64(..512) } / 8 * 8;
            let noise = if random.bool() { random.u64(..) } else { random.u64(..len * 2) };
            cache.segment.map.write(at, &noise.to_le_bytes()).unwrap();
        }
        let _ = (cache.audit(), cache.stats(), cache.list("", 100), cache.distribution());
        for n in 0..60 {
            let _ = cache.get([n]);
            let _ = cache.pin([n]);
            let _ = cache.purge([random.u8(..60)]);
            let _ = cache.set([n], vec![n; random.usize(..3000)], &StoreOptions::new());
        }
        cache.sweep_now(1, cache.segment.now_ms());
        // Whatever else the memory contains, an emptied shard is consistent, unless a lock or a pin names this process as its holder.
        cache.shard(0).unwrap().head.lock.store(0, Ordering::Relaxed);
        let me = cache.segment.member().unwrap().head;
        me.pins.iter().for_each(|pin| pin.store(0, Ordering::Relaxed));
        cache
            .with_shard_at(0, |shard| {
                Err::<(), _>({
                    shard.lose();
                    Corrupt
                })
            })
            .unwrap_err();
        cache.audit().unwrap();
        cache.set("k", "v", &StoreOptions::new()).unwrap();
    }
    assert!(cache.stats().lost > 0);
}

/// A reader sets a pin before it can detect that its entry is gone. The position may then be in the middle of another entry.
#[test]
fn a_pin_in_the_middle_of_a_pinned_entry_does_not_shorten_it() {
    for into in [32, 192, 1024, 1984] {
        let cache = cache(SMALL);
        let page = vec![7; 2000];
        cache.set("page", &page, &StoreOptions::new()).unwrap();
        let pinned = cache.pin("page").unwrap();
        let cells = &cache.segment.member().unwrap().head.pins;
        let pin = cells.iter().find_map(pin::get).unwrap();
        let of_late_reader = cells.last().unwrap();
        assert!(pin::set(of_late_reader, pin::Pin { position: pin.position + into, size: 64, ..pin }));
        for n in 0..2000_u32 {
            let _ = cache.set(n.to_le_bytes(), [1; 500], &StoreOptions::new());
        }
        assert!(pinned.to_vec() == page, "overwritten from {into}");
        pin::free(of_late_reader);
        drop(pinned);
        cache.audit().unwrap();
    }
}
