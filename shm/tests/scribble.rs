//! A process overwrites the cache with random data while other processes use it.
//!
//! The overwritten data includes locks, members, tags, prefixes, leases, heads, the index and the rings. No process may crash, hang, or
//! loop forever. A returned value may be wrong, but must not come from outside the memory. The scoreboard and the constant part of the
//! header are not overwritten.
#![expect(unsafe_code, clippy::print_stdout, reason = "the test overwrites memory, and prints its own report")]

mod common;

use std::io::{Read, Write};
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use common::{SMALL, name, not_longer_than, page, spawn};
use forkyard_shm::{Cache, Plan, Segment, StoreOptions};
use nix::sys::mman::{MapFlags, ProtFlags, mmap};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitStatus, waitpid};

const TIME: Duration = Duration::from_millis(150);
/// Time after which a child that is still running is considered hung.
const HANGS: Duration = Duration::from_secs(120);
/// Number of rounds. Each round has a new segment, because a segment whose locks appear to be held soon becomes unusable.
const ROUNDS: u32 = 8;
const USERS: usize = 3;
const KEYS: u32 = 200;
/// End of the part of the header that is read only once, when the segment is attached.
const CLOCKS_AT: usize = 128;
const CLOCKS_END: usize = 160;
const SWEEP_AT: usize = 304;
const SWEEP_END: usize = 320;
const HEADER: usize = 4096;

fn main() {
    common::run(&[
        ("invalid_data_in_one_shard", |seed| scribbled(seed, SMALL)),
        ("invalid_data_in_two_shards", |seed| scribbled(seed, 16 << 20)),
    ]);
}

/// Returns all words of a segment.
fn words(segment: &Segment) -> &'static [AtomicU64] {
    let len = NonZeroUsize::new(usize::try_from(segment.len()).expect("the segment is mapped")).expect("not empty");
    let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    // SAFETY: a new mapping, of a file whose size is sealed.
    let memory = unsafe { mmap(None, len, access, MapFlags::MAP_SHARED, segment.fd(), 0) }.expect("mmap");
    // SAFETY: aligned to a page, atomics only, of this length, and never unmapped.
    unsafe { std::slice::from_raw_parts(memory.cast::<AtomicU64>().as_ptr(), len.get() / 8) }
}

/// Returns a word that the code could mistake for a valid word.
fn nonsense(random: &mut fastrand::Rng, words: &[AtomicU64]) -> u64 {
    match random.u32(..8) {
        0 => random.u64(..),
        1 => 0,
        2 => u64::MAX - random.u64(..3),
        3 => 1 << random.u32(..64),
        4 => random.u64(..1 << 20),
        // Another word of the segment, such as a head, a position or a slot, or a value near it.
        5 => words[random.usize(..words.len())].load(Ordering::Relaxed),
        6 => words[random.usize(..words.len())].load(Ordering::Relaxed).wrapping_add(random.u64(..64)),
        _ => u64::from(random.u32(..64)) << 32 | u64::from(random.u32(..64)),
    }
}

/// Overwrites words until the process is killed. Most words belong to a page, where overwriting them has little effect, so this function
/// often chooses more important words.
fn scribble(words: &[AtomicU64], random: &mut fastrand::Rng, pause: u32) -> ! {
    let matter = words.len().min(HEADER / 8 + 8192);
    loop {
        let at = match random.u32(..64) {
            0 => random.usize(CLOCKS_AT / 8..CLOCKS_END / 8),
            1 => random.usize(SWEEP_AT / 8..SWEEP_END / 8),
            2..32 => random.usize(HEADER / 8..matter),
            _ => random.usize(HEADER / 8..words.len()),
        };
        words[at].store(nonsense(random, words), Ordering::Relaxed);
        // Gives the other processes time to make progress.
        (0..random.u32(..pause)).for_each(|_| std::hint::spin_loop());
    }
}

/// Calls all functions of the cache for a fixed time. Returns the number of hits and of stored pages.
fn use_it(cache: &Cache, mut random: fastrand::Rng) -> [u32; 2] {
    let [mut hits, mut stored] = [0; 2];
    let until = Instant::now() + TIME;
    let mut pins = Vec::new();
    while Instant::now() < until {
        let key = random.u32(..KEYS);
        match random.u32(..100) {
            0..30 => hits += u32::from(cache.get(name(key)).is_some()),
            30..40 => pins.extend(cache.pin(name(key))),
            40..80 => {
                let most = if random.u32(..8) == 0 { 40_000 } else { 2000 };
                let options =
                    StoreOptions::new().tags([(key % 7).to_string()]).ttl(Duration::from_millis(random.u64(1..50)));
                let options = if random.bool() { options.as_of(cache.clock()) } else { options };
                stored += u32::from(cache.set(name(key), page(key, 1, random.usize(..most)), &options).is_ok());
            }
            80..85 => drop(cache.purge(name(key))),
            85..88 => cache.purge_tag(&(key % 7).to_string()),
            88..90 => cache.purge_prefix("/page/1"),
            90..92 => drop(cache.list("/page", 1000)),
            92..93 => drop(cache.distribution()),
            93..96 => cache.sweep_all(),
            96..97 => cache.clear(),
            97..99 => drop(cache.stats()),
            _ => drop(cache.audit()),
        }
        if pins.len() > 40 {
            // Every byte of each pin must be readable.
            let sum =
                pins.drain(..).flat_map(|pin| pin.to_vec()).fold(0_u64, |sum, byte| sum.wrapping_add(byte.into()));
            std::hint::black_box(sum);
        }
    }
    [hits, stored]
}

fn scribbled(seed: u64, cache_bytes: u64) {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut sums = [0; 2];
    for round in 0..ROUNDS {
        not_longer_than(HANGS);
        let segment = Segment::create(&Plan { cache_bytes, rows: 0, ..Plan::default() }).expect("segment");
        let (cache, words) = (segment.cache(), words(&segment));
        common::fill(&cache, KEYS, 500);
        let pause = 100 * 4_u32.pow(round % 5);
        let mut vandal = random.fork();
        let vandal = spawn(|_| scribble(words, &mut vandal, pause));
        let users = (0..USERS).map(|_| random.fork()).map(|random| {
            spawn(|mut pipe| {
                let counts = use_it(&cache, random).map(u32::to_le_bytes).concat();
                pipe.write_all(&counts).expect("the parent is running");
            })
        });
        for mut user in users.collect::<Vec<_>>() {
            for sum in &mut sums {
                let mut count = [0; 4];
                user.ready.read_exact(&mut count).expect("a process that used the memory has died");
                *sum += u32::from_le_bytes(count);
            }
            user.join();
        }
        kill(vandal.pid, Signal::SIGKILL).expect("kill");
        assert!(matches!(waitpid(vandal.pid, None), Ok(WaitStatus::Signaled(_, Signal::SIGKILL, _))));
    }
    let [hits, stored] = sums;
    println!("  {hits} hits, {stored} stored");
    assert!(hits > 0 && stored > 100, "the users had too few hits or stores for a valid test");
}
