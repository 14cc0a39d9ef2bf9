//! Scenes: a state of the cache, and an operation on the cache during which a process will be killed.
//!
//! After the kill, each key has its value from before or after the operation. The scene determines whether the key may also be missing, and
//! whether the key may change without the other keys. In each case, other processes must be able to continue from the resulting state.

use std::convert::Infallible;
use std::time::{Duration, Instant};

use forkyard_shm::crash::die_at;
use forkyard_shm::{Cache, Pinned, Segment, Stats, StoreError, StoreOptions, crash};
use nix::unistd::pause;

use super::image::{Image, Slate};
use super::{SMALL, adds_up, fill, name, page, say_ready, segment, spawn};

const KEYS: u32 = 640;
/// Number of keys in scenes in which the size does not matter.
const FEW: u32 = 20;
/// Page size. A few hundred pages of this size fill the cache.
const LEN: usize = 400;
const PINS: u32 = 4;

#[derive(Debug)]
pub struct Scene {
    pub name: &'static str,
    pub prepare: fn() -> Stage,
    pub act: fn(&Cache),
    pub rule: Rule,
    /// Whether the operation begins with the process becoming a member.
    pub claims: bool,
}

/// A segment that is ready for the operation, and the pages that the parent pins in it.
#[derive(Debug)]
pub struct Stage {
    pub segment: Segment,
    pub pins: Vec<Pinned>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// A key that the operation changes has the old page or the new page.
    OldOrNew,
    /// A changed key may also be missing temporarily.
    Gaps,
    /// Any key may be missing, because the effect of the operation depends on the process that performs it.
    Misses,
    /// A changed key has the old page or the new page, and all changed keys change at the same instant.
    AtOnce,
    /// The shard is abandoned.
    Lost,
}

const PLAIN: Scene = Scene { name: "", prepare: few, act: |_| (), rule: Rule::OldOrNew, claims: false };

pub const SCENES: [Scene; 21] = [
    Scene { name: "get, as a new member", act: |cache| drop(cache.get(name(3))), claims: true, ..PLAIN },
    Scene { name: "set", act: |cache| set(cache, FEW), ..PLAIN },
    Scene { name: "replace", act: |cache| set(cache, 3), ..PLAIN },
    Scene { name: "evict", prepare: evicting, act: set_new, rule: Rule::Gaps, ..PLAIN },
    Scene { name: "pad", prepare: padding, act: set_new, rule: Rule::Gaps, ..PLAIN },
    Scene { name: "promote", prepare: promoting, act: set_new, rule: Rule::Gaps, ..PLAIN },
    Scene { name: "reprieve", prepare: reprieving, act: set_new, rule: Rule::Gaps, ..PLAIN },
    Scene { name: "jump over pins", prepare: pinned, act: set_new, rule: Rule::Misses, ..PLAIN },
    Scene { name: "purge", act: |cache| assert!(cache.purge(name(3))), ..PLAIN },
    Scene { name: "purge a tag", act: |cache| cache.purge_tag("1"), rule: Rule::AtOnce, ..PLAIN },
    Scene { name: "purge a prefix", act: purge_tens, rule: Rule::AtOnce, ..PLAIN },
    Scene { name: "sweep for another", prepare: half_purged, act: Cache::sweep, ..PLAIN },
    Scene { name: "clear", act: Cache::clear, rule: Rule::AtOnce, ..PLAIN },
    Scene { name: "pin and let go", act: |cache| drop(cache.pin(name(3))), ..PLAIN },
    Scene { name: "sweep", prepare: outdated, act: Cache::sweep, ..PLAIN },
    Scene { name: "tidy", prepare: untidy, act: Cache::sweep, ..PLAIN },
    Scene { name: "recover", prepare: half_stored, act: |cache| set(cache, 5), ..PLAIN },
    Scene { name: "recover a clear", prepare: half_cleared, act: |cache| set(cache, 5), ..PLAIN },
    Scene { name: "bury", prepare: dead_reader, act: Cache::sweep, ..PLAIN },
    Scene { name: "render", act: render, ..PLAIN },
    Scene { name: "give a shard up", prepare: spoilt, act: set_anyhow, rule: Rule::Lost, ..PLAIN },
];

fn store(cache: &Cache, key: u32) -> Result<(), StoreError> {
    let options = StoreOptions::new().tags([(key % 3).to_string()]);
    cache.set(name(key), page(key, 2, 40), &options)
}

fn set(cache: &Cache, key: u32) {
    store(cache, key).expect("stored");
}

/// Renders one page, under its lease.
fn render(cache: &Cache) {
    let served = cache.get_or_render(name(FEW), &StoreOptions::new(), |_| Ok::<_, Infallible>(page(FEW, 2, 40)));
    assert!(served.is_ok());
}

/// Stores key 3. The first process that finds a shard inconsistent gets an error, which is ignored.
fn set_anyhow(cache: &Cache) {
    let _ = store(cache, 3);
}

fn set_new(cache: &Cache) {
    cache.set(name(KEYS - 1), page(KEYS - 1, 2, LEN), &StoreOptions::new()).expect("stored");
}

/// Purges all keys whose number begins with 1.
fn purge_tens(cache: &Cache) {
    cache.purge_prefix("/page/1");
}

// ---- states ----

fn few() -> Stage {
    let segment = segment(SMALL);
    let cache = segment.cache();
    for key in 0..FEW {
        let options = StoreOptions::new().tags([(key % 3).to_string()]);
        cache.set(name(key), page(key, 1, 40), &options).expect("stored");
    }
    Stage { segment, pins: Vec::new() }
}

/// The effect of an operation, determined on a copy.
struct Probe {
    before: Stats,
    after: Stats,
    marks: Vec<&'static str>,
    pins_left: usize,
}

/// Returns a full cache in which the operation has the `wanted` effect. `each` is called after each page that is stored to fill the cache.
fn full(each: impl Fn(&Segment, u32) -> Vec<Pinned>, act: fn(&Cache), wanted: fn(&Probe) -> bool) -> Stage {
    let segment = segment(SMALL);
    let cache = segment.cache();
    let slate = Slate::for_images_like(&Image::of(&segment));
    let mut pins = Vec::new();
    fill(&cache, KEYS - 1, LEN);
    for key in (0..KEYS - 1).cycle().take(4000) {
        cache.set(name(key), page(key, 1, LEN), &StoreOptions::new()).expect("stored");
        pins.extend(each(&segment, key));
        let copy = slate.pour(&Image::of(&segment)).cache();
        let before = copy.stats();
        let marks = marks(&copy, act);
        if wanted(&Probe { before, after: copy.stats(), marks, pins_left: copy.pins_set() }) {
            return Stage { segment, pins };
        }
    }
    panic!("no such state was reached, after {:?}", cache.stats());
}

fn leave_alone(_: &Segment, _: u32) -> Vec<Pinned> {
    Vec::new()
}

fn ask_for_all(segment: &Segment, _: u32) -> Vec<Pinned> {
    (0..KEYS).for_each(|key| drop(segment.cache().get(name(key))));
    Vec::new()
}

fn evicting() -> Stage {
    full(leave_alone, set_new, |probe| probe.after.evicted_small > probe.before.evicted_small)
}

fn padding() -> Stage {
    full(leave_alone, set_new, |probe| probe.marks.contains(&"pad: written"))
}

fn promoting() -> Stage {
    full(ask_for_all, set_new, |Probe { before, after, .. }| {
        after.promoted > before.promoted && after.reprieved == before.reprieved
    })
}

fn reprieving() -> Stage {
    full(ask_for_all, set_new, |Probe { before, after, .. }| {
        after.promoted > before.promoted && (2..12).contains(&(after.reprieved - before.reprieved))
    })
}

/// Returns a state in which the next store encounters four adjacent pins, and skips them.
fn pinned() -> Stage {
    // A member other than the parent sets the pins. The parent could not, because in a copy it registers as a member again and marks its
    // former membership dead.
    let each = |segment: &Segment, key: u32| {
        let reader = Segment::attach(segment.fd().try_clone_to_owned().expect("dup")).expect("attach").cache();
        // Keys that were not in the cache before are in the small ring, like the key that the operation stores.
        let new = if key == 0 && segment.cache().pins_set() == 0 { KEYS..KEYS + PINS } else { 0..0 };
        let pinned = new.map(|key| {
            reader.set(name(key), page(key, 1, LEN), &StoreOptions::new()).expect("stored");
            reader.pin(name(key)).expect("hit")
        });
        pinned.collect()
    };
    full(each, set_new, |probe| probe.pins_left == 0 && probe.marks.contains(&"pad: written"))
}

fn outdated() -> Stage {
    let stage = few();
    let cache = stage.segment.cache();
    let options = StoreOptions::new().ttl(Duration::from_millis(1));
    for key in FEW..FEW + 4 {
        cache.set(name(key), page(key, 1, 40), &options).expect("stored");
    }
    while (FEW..FEW + 4).any(|key| cache.get(name(key)).is_some()) {}
    cache.purge_tag("2");
    stage
}

fn untidy() -> Stage {
    let each = |segment: &Segment, key| {
        segment.cache().purge(name(key / 2 * 7 % KEYS));
        Vec::new()
    };
    full(each, Cache::sweep, |Probe { before, after, .. }| (2..30).contains(&(after.reprieved - before.reprieved)))
}

/// Returns the state after a process has died in the operation, directly after the mark.
fn died_in(act: fn(&Cache), mark: &str) -> Stage {
    let stage = few();
    let image = Image::of(&stage.segment);
    let at = marks(&Slate::for_images_like(&image).pour(&image).cache(), act).iter().position(|&name| name == mark);
    let at = at.expect("the operation passes the mark") as u64;
    let cache = stage.segment.cache();
    let child = spawn(|_| {
        die_at(at);
        act(&cache);
    });
    assert!(!child.ended());
    stage
}

/// Returns the marks that an operation passes.
pub fn marks(cache: &Cache, act: fn(&Cache)) -> Vec<&'static str> {
    die_at(u64::MAX - 1);
    act(cache);
    let marks = crash::points_passed();
    die_at(u64::MAX);
    marks
}

fn half_stored() -> Stage {
    died_in(|cache| set(cache, 3), "slot: book 1")
}

fn half_purged() -> Stage {
    died_in(purge_tens, "prefix: published")
}

fn half_cleared() -> Stage {
    died_in(Cache::clear, "empty: floor raised")
}

/// Returns the state after the death of a process that held a lock and was reading in place.
fn dead_reader() -> Stage {
    let stage = few();
    let cache = stage.segment.cache();
    let mut child = spawn(|mut pipe| {
        let _pins: Vec<_> = (0..FEW).map(|key| cache.pin(name(key)).expect("hit")).collect();
        let _held = cache.hold(name(0)).expect("lock");
        say_ready(&mut pipe);
        pause();
    });
    child.await_ready();
    child.kill();
    stage
}

/// Returns a state in which the slot of key 3 points to invalid data.
fn spoilt() -> Stage {
    let stage = few();
    let mut image = Image::of(&stage.segment);
    image.spoil(name(3).as_bytes());
    Stage { segment: Slate::for_images_like(&image).pour(&image), pins: Vec::new() }
}

// ---- invariants ----

/// The values of all keys before and after an operation.
#[derive(Debug)]
pub struct Known {
    before: Vec<Option<Vec<u8>>>,
    after: Vec<Option<Vec<u8>>>,
    names: Vec<String>,
    rule: Rule,
    act: fn(&Cache),
    /// Number of shards that were abandoned before the operation.
    lost: u64,
}

fn pages(cache: &Cache) -> Vec<Option<Vec<u8>>> {
    (0..KEYS).map(|key| cache.get(name(key))).collect()
}

impl Known {
    pub fn of(scene: &Scene, image: &Image, slate: &Slate) -> Known {
        let copy = slate.pour(image).cache();
        let (before, lost) = (pages(&copy), copy.stats().lost);
        let copy = slate.pour(image).cache();
        (scene.act)(&copy);
        if scene.rule == Rule::Lost {
            (scene.act)(&copy); // the first call emptied the shard, so this call succeeds
        }
        let names = (0..KEYS).map(name).collect();
        Known { before, after: pages(&copy), names, rule: scene.rule, act: scene.act, lost }
    }

    /// Checks that the operation may leave this state behind, and that processes can continue from it.
    pub fn verify(&self, cache: &Cache) -> Result<(), String> {
        self.check(cache).map_err(|why| format!("before anything is repaired: {why}"))?;
        if self.rule == Rule::Lost {
            (self.act)(cache); // detects the inconsistent shard if no process has detected it yet
        }
        cache.audit()?;
        self.check(cache).map_err(|why| format!("after the repair: {why}"))?;
        cache.sweep_all();
        self.check(cache).map_err(|why| format!("after the sweep: {why}"))?;
        cache.audit()?;
        let (locks, pins) = (cache.locks_held(), cache.pins_set());
        if (locks, pins) != (0, 0) {
            return Err(format!("the dead hold {locks} locks and {pins} pins"));
        }
        self.add_up(cache)?;
        self.render_again(cache)?;
        self.go_on(cache)?;
        cache.audit()?;
        self.add_up(cache)
    }

    fn check(&self, cache: &Cache) -> Result<(), String> {
        let (mut some_old, mut some_new) = (None, None);
        let mut value = Vec::with_capacity(LEN * 2);
        for (name, (before, after)) in self.names.iter().zip(self.before.iter().zip(&self.after)) {
            let now = cache.get_into(name, &mut value).then_some(&value);
            let missing = now.is_none() && matches!(self.rule, Rule::Gaps | Rule::Misses | Rule::Lost);
            if before == after {
                if now != before.as_ref() && !(missing && self.rule == Rule::Misses) {
                    return Err(format!("{name}, which does not change, holds {now:?}"));
                }
            } else if now == before.as_ref() {
                some_old = Some(name);
            } else if now == after.as_ref() {
                some_new = Some(name);
            } else if !missing {
                return Err(format!("{name} holds {now:?}, neither {before:?} nor {after:?}"));
            }
        }
        match (self.rule, some_old, some_new) {
            (Rule::AtOnce, Some(old), Some(new)) => Err(format!("{new} has changed and {old} has not")),
            _ => Ok(()),
        }
    }

    fn add_up(&self, cache: &Cache) -> Result<(), String> {
        let mut stats = cache.stats();
        let given_up = stats.lost - self.lost;
        if given_up > if self.rule == Rule::Lost { 2 } else { 0 } {
            return Err(format!("the shard was abandoned {given_up} times"));
        }
        stats.lost = 0;
        adds_up(&stats)
    }

    /// Checks that a process that renders does not wait for the dead process.
    fn render_again(&self, cache: &Cache) -> Result<(), String> {
        cache.purge(name(FEW));
        let begun = Instant::now();
        render(cache);
        // If the lease were not released, this would take the full wait of ten seconds.
        if begun.elapsed() < Duration::from_secs(5) {
            Ok(())
        } else {
            Err("a lease of the dead was not passed on".into())
        }
    }

    /// Checks that all memory of the rings can be used again.
    fn go_on(&self, cache: &Cache) -> Result<(), String> {
        let bytes = [7; 8000];
        let pages = 2 * cache.stats().capacity / 8000;
        let mut value = Vec::with_capacity(bytes.len());
        for key in 0..pages {
            let mut store = || {
                let stored = cache.set(key.to_le_bytes(), bytes, &StoreOptions::new());
                (stored, cache.get_into(key.to_le_bytes(), &mut value) && value == bytes)
            };
            // A purge whose process died between its steps applies to the page that is stored next. The store of this page finishes the
            // purge.
            let (stored, found) = match store() {
                (Ok(()), false) => store(),
                other => other,
            };
            if stored.is_err() || !found {
                return Err(format!("page {key} could not be stored: {stored:?}"));
            }
        }
        let live = cache.stats().live_bytes;
        if live > cache.stats().capacity / 2 { Ok(()) } else { Err(format!("only {live} bytes can be live")) }
    }
}
