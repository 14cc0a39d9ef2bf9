//! Processes that are killed, stopped and single-stepped while they use a segment.
//!
//! The main thread is the only one, so that forking is harmless; hence no test harness. Children are awaited by a byte
//! in a pipe or by `waitpid`. A page contains what is needed to see that it is whole and belongs to its key. Run with
//! FORKYARD_SEED=n to repeat a history (the timing of the kills is not repeated), and with a word to run
//! the tests whose names contain it.
#![expect(unsafe_code, reason = "forks")]
#![expect(clippy::print_stdout, reason = "reports like the test harness that it replaces")]

use std::fs::File;
use std::io::{Read, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};

use forkyard_shm::{Cache, Options, Plan, Refused, Segment, State, Stats};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::ptrace;
use nix::sys::signal::{Signal, kill, raise};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork, pause, pipe};
use xxhash_rust::xxh3::xxh3_64;

const KEYS: u32 = 300;
type Test = (&'static str, fn(u64));

const TESTS: [Test; 7] = [
    ("a_child_attaches_by_descriptor", a_child_attaches_by_descriptor),
    ("killed_while_changing_loses_one_shard", killed_while_changing_loses_one_shard),
    ("killed_while_only_holding_loses_nothing", killed_while_only_holding_loses_nothing),
    ("stopped_while_holding_stalls_nobody", stopped_while_holding_stalls_nobody),
    ("killed_at_many_instructions_of_a_store", killed_at_many_instructions_of_a_store),
    ("kill_storm_in_one_shard", kill_storm_in_one_shard),
    ("kill_storm_in_many_shards", kill_storm_in_many_shards),
];

fn main() {
    let wanted: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with('-')).collect();
    let given = std::env::var("FORKYARD_SEED").ok().and_then(|text| text.parse().ok());
    let seed = given.unwrap_or_else(|| fastrand::u64(..));
    println!("seed {seed}");
    for (name, test) in TESTS {
        if wanted.is_empty() || wanted.iter().any(|word| name.contains(word.as_str())) {
            println!("test {name} ...");
            test(seed);
            println!("test {name} ... ok");
        }
    }
}

// ---- Children. ----

struct Child {
    pid: Pid,
    ready: File,
}

/// Forks. The child runs `work` with the writing end of a pipe, and exits with 0 if that returns, with 101 if it panics.
fn spawn(work: impl FnOnce(File)) -> Child {
    let (reader, writer) = pipe().expect("pipe");
    // SAFETY: this process has one thread, so the child may do whatever it likes.
    match unsafe { fork() }.expect("fork") {
        ForkResult::Parent { child } => Child { pid: child, ready: reader.into() },
        ForkResult::Child => {
            drop(reader);
            let outcome = catch_unwind(AssertUnwindSafe(|| {
                set_pdeathsig(Signal::SIGKILL).expect("prctl");
                work(writer.into());
            }));
            // SAFETY: ends the process here, before it returns into what the parent was doing.
            unsafe { libc::_exit(if outcome.is_ok() { 0 } else { 101 }) }
        }
    }
}

impl Child {
    /// Waits until the child has written a byte.
    fn await_ready(&mut self) {
        let mut byte = [0];
        if self.ready.read_exact(&mut byte).is_err() {
            panic!("child ended early: {:?}", waitpid(self.pid, None));
        }
    }

    /// Kills the child, which must not have ended by itself.
    fn kill(self) {
        kill(self.pid, Signal::SIGKILL).expect("kill");
        let status = waitpid(self.pid, None).expect("waitpid");
        assert!(matches!(status, WaitStatus::Signaled(_, Signal::SIGKILL, _)), "child ended by itself: {status:?}");
    }

    fn join(self) {
        assert_eq!(waitpid(self.pid, None), Ok(WaitStatus::Exited(self.pid, 0)));
    }
}

fn say_ready(pipe: &mut File) {
    pipe.write_all(b"!").expect("parent is there");
}

fn segment(cache_bytes: u64) -> Segment {
    Segment::create(&Plan { cache_bytes, rows: 8 }).expect("segment")
}

// ---- Pages that show whether they are whole. ----

/// Key, then bytes that follow from key and version, then a checksum of all that.
fn page(key: u32, version: u64, len: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(len + 20);
    bytes.extend(key.to_le_bytes());
    bytes.extend(version.to_le_bytes());
    let [fill, ..] = version.to_le_bytes();
    bytes.resize(len + 12, fill);
    bytes.extend(xxh3_64(&bytes).to_le_bytes());
    bytes
}

fn assert_whole(key: u32, bytes: &[u8]) {
    let (body, checksum) = bytes.split_last_chunk::<8>().expect("page too short");
    assert_eq!(xxh3_64(body).to_le_bytes(), *checksum, "torn page under key {key}");
    assert!(body.starts_with(&key.to_le_bytes()), "page of another key under key {key}");
}

fn name(key: u32) -> String {
    format!("/page/{key}")
}

/// One random act on the cache.
fn act(cache: &Cache, random: &mut fastrand::Rng) {
    let key = random.u32(..KEYS);
    match random.u32(..1000) {
        0..450 => {
            if let Some(bytes) = cache.get(name(key)) {
                assert_whole(key, &bytes);
            }
        }
        450..940 => {
            let len = if random.u32(..10) == 0 { random.usize(..60_000) } else { random.usize(..3000) };
            let options = Options::new().tags([(key % 7).to_string()]).as_of(cache.clock());
            let stored = cache.set(name(key), page(key, random.u64(..), len), &options);
            assert!(matches!(stored, Ok(()) | Err(Refused::Busy)), "{stored:?}");
        }
        940..990 => drop(cache.purge(name(key))),
        990..999 => cache.purge_tag(&(key % 7).to_string()),
        _ => cache.clear(),
    }
}

fn fill(cache: &Cache, len: usize) {
    for key in 0..KEYS {
        cache.set(name(key), page(key, 1, len), &Options::new()).expect("stored");
    }
}

fn present(cache: &Cache) -> Vec<u32> {
    let found = |key: &u32| cache.get(name(*key)).inspect(|bytes| assert_whole(*key, bytes)).is_some();
    (0..KEYS).filter(found).collect()
}

/// The cache is consistent, stores, and answers.
fn assert_well(cache: &Cache) -> Stats {
    assert_eq!(cache.audit(), Ok(()));
    for key in 0..KEYS {
        let bytes = page(key, 5, 100);
        assert_eq!(cache.set(name(key), &bytes, &Options::new()), Ok(()));
        assert_eq!(cache.get(name(key)), Some(bytes));
    }
    assert_eq!(cache.audit(), Ok(()));
    let stats = cache.stats();
    assert_eq!(stats.live_bytes + stats.dead_bytes + stats.free_bytes, stats.capacity);
    stats
}

// ---- The tests. ----

fn a_child_attaches_by_descriptor(_seed: u64) {
    let segment = segment(1 << 20);
    let inherited = segment.fd().try_clone_to_owned().expect("dup");
    let mut child = spawn(|mut pipe| {
        let attached = Segment::attach(inherited).expect("attach");
        attached.cache().set("from the child", "hello", &Options::new()).expect("stored");
        let row = attached.scoreboard().claim(3, std::process::id(), 9).expect("row");
        row.set_state(State::Ready);
        drop(row.begin("GET", "/done"));
        let _request = row.begin("GET", "/not done");
        say_ready(&mut pipe);
        pause();
    });
    child.await_ready();
    child.kill();
    assert_eq!(segment.cache().get("from the child").expect("hit"), b"hello");
    let row = segment.scoreboard().read(3).expect("row");
    assert_eq!((row.generation, row.state, row.requests, row.in_flight), (9, State::Ready, 1, 1));
    assert_eq!(row.serving[0].what, "GET /not done", "what a dead process was serving can be read");
}

fn killed_while_changing_loses_one_shard(_seed: u64) {
    let cache = segment(16 << 20).cache();
    fill(&cache, 500);
    let victim = cache.shard_index(name(0));
    kill_holder(&cache, true);
    let expected: Vec<u32> = (0..KEYS).filter(|&key| cache.shard_index(name(key)) != victim).collect();
    assert!(expected.len() > KEYS as usize / 2);
    assert_eq!(present(&cache), expected);
    let stats = assert_well(&cache);
    assert_eq!((stats.shards, stats.shards_lost, stats.lock_recoveries), (4, 1, 1));
}

fn killed_while_only_holding_loses_nothing(_seed: u64) {
    let cache = segment(16 << 20).cache();
    fill(&cache, 500);
    for _ in 0..10 {
        kill_holder(&cache, false);
    }
    // The lock of a dead process is found when it is next needed.
    kill_holder(&cache, false);
    assert_eq!(present(&cache).len(), KEYS as usize);
    let stats = assert_well(&cache);
    assert_eq!((stats.shards_lost, stats.lock_recoveries, stats.lock_timeouts), (0, 11, 0));
}

/// Kills a child that certainly holds the lock of key 0's shard.
fn kill_holder(cache: &Cache, dirty: bool) {
    let mut child = spawn(|mut pipe| {
        let _held = cache.hold(name(0), dirty).expect("lock");
        say_ready(&mut pipe);
        pause();
    });
    child.await_ready();
    child.kill();
}

fn stopped_while_holding_stalls_nobody(_seed: u64) {
    let cache = segment(16 << 20).cache();
    fill(&cache, 500);
    let child = spawn(|_| {
        let _held = cache.hold(name(0), false).expect("lock");
        raise(Signal::SIGSTOP).expect("raise");
    });
    let status = waitpid(child.pid, Some(WaitPidFlag::WUNTRACED));
    assert_eq!(status, Ok(WaitStatus::Stopped(child.pid, Signal::SIGSTOP)));

    let stopped = cache.shard_index(name(0));
    let (held, others): (Vec<u32>, Vec<u32>) = (0..KEYS).partition(|&key| cache.shard_index(name(key)) == stopped);
    assert_eq!(present(&cache), others);
    assert_eq!(cache.set(name(0), "x", &Options::new()), Err(Refused::Busy));
    // Were each of these to wait its 20 ms, this test would take minutes.
    for _ in 0..10_000 {
        assert_eq!(cache.get(name(0)), None);
    }
    assert!(cache.stats().lock_timeouts > 10_000);
    assert!(cache.audit().is_err_and(|why| why.contains("could not be locked")));
    assert!(!cache.purge(name(0)));

    kill(child.pid, Signal::SIGCONT).expect("kill");
    child.join();
    assert_eq!(cache.get(name(0)), None, "purged though the shard was locked");
    assert_eq!(present(&cache).len(), KEYS as usize - 1, "nothing else is lost");
    assert!(held.len() > 1);
    let stats = assert_well(&cache);
    assert_eq!((stats.shards_lost, stats.lock_recoveries), (0, 0));
}

/// Kills a child after so many instructions of a store that evicts and replaces, and again after a few more, until it
/// gets to the end of it. Not after each one, as that would take minutes.
fn killed_at_many_instructions_of_a_store(seed: u64) {
    let mut random = fastrand::Rng::with_seed(seed);
    let cache = segment(256 * 1024).cache();
    let (mut kills, mut steps) = (0, 0);
    while killed_after(&cache, steps, false) {
        kills += 1;
        steps += random.u32(1..40);
    }
    println!("  {kills} kills over {steps} instructions");
    // The same for a store that moves entries out of the way, which takes much longer.
    (kills, steps) = (0, 0);
    while killed_after(&cache, steps, true) {
        kills += 1;
        steps += random.u32(1..600);
    }
    let stats = assert_well(&cache);
    println!("  {kills} kills over {steps} instructions");
    println!("  {} dead owners, {} shards emptied", stats.lock_recoveries, stats.shards_lost);
    assert!(stats.shards_lost > 0 && stats.lock_recoveries > stats.shards_lost);
}

/// Kills a child after so many instructions; `false` if it got to the end before. With `visited`, all that could be
/// evicted was asked for.
fn killed_after(cache: &Cache, steps: u32, visited: bool) -> bool {
    fill(cache, 1000);
    if visited {
        present(cache);
    }
    let (entries, lost) = (cache.stats().entries, cache.stats().shards_lost);
    let replaced = page(KEYS - 1, 2, 1500);
    let child = spawn(|_| {
        ptrace::traceme().expect("traceme");
        raise(Signal::SIGSTOP).expect("raise");
        let _ = cache.set(name(KEYS - 1), &replaced, &Options::new());
    });
    waitpid(child.pid, None).expect("waitpid");
    if (0..steps).any(|_| !stepped(child.pid)) {
        return false;
    }
    child.kill();
    assert_eq!(cache.audit(), Ok(()), "killed after {steps} steps");
    let left = present(cache).len() as u64;
    if cache.stats().shards_lost == lost {
        // The store may have replaced one page and evicted those that it needed the room of.
        assert!(left + 4 >= entries, "{left} of {entries} pages left after {steps} steps");
    }
    true
}

/// Lets a traced child execute one instruction; `false` if it ended.
fn stepped(pid: Pid) -> bool {
    ptrace::step(pid, None).expect("step");
    matches!(waitpid(pid, None).expect("waitpid"), WaitStatus::Stopped(_, Signal::SIGTRAP))
}

fn kill_storm_in_one_shard(seed: u64) {
    storm(seed, 256 * 1024, 600);
}

fn kill_storm_in_many_shards(seed: u64) {
    storm(seed, 16 << 20, 400);
}

/// Several children at work on the cache; again and again one is killed and replaced.
fn storm(seed: u64, cache_bytes: u64, kills: u64) {
    let segment = segment(cache_bytes);
    let (cache, board) = (segment.cache(), segment.scoreboard());
    let mut random = fastrand::Rng::with_seed(seed);
    let start = |slot: u32, generation: u64, seed: u64| {
        spawn(|mut pipe| {
            let row = board.claim(slot, std::process::id(), generation).expect("row");
            let mut random = fastrand::Rng::with_seed(seed);
            let mut acts: u32 = 20;
            loop {
                let _request = row.begin("GET", &name(random.u32(..KEYS)));
                act(&cache, &mut random);
                acts = acts.saturating_sub(1);
                if acts == 1 {
                    say_ready(&mut pipe);
                }
            }
        })
    };
    let mut children: Vec<Child> = (0..3).map(|slot| start(slot, 0, random.u64(..))).collect();
    for generation in 1..=kills {
        let slot = random.u32(..3);
        let mut child = children.remove(slot as usize);
        child.await_ready();
        for _ in 0..random.u32(..60) {
            act(&cache, &mut random);
        }
        let pid = child.pid;
        child.kill();
        let row = board.read(slot).expect("row");
        assert_eq!(i32::try_from(row.pid), Ok(pid.as_raw()));
        assert!(row.requests >= 18 && row.in_flight <= 1 && row.serving.len() <= 1, "{row:?}");
        assert!(row.serving.iter().all(|request| request.what.starts_with("GET /page/")), "{row:?}");
        children.insert(slot as usize, start(slot, generation, random.u64(..)));
        if generation % 20 == 0 {
            // The children go on meanwhile, and may keep the lock long enough for one try to fail.
            while let Err(why) = cache.audit() {
                assert!(why.contains("could not be locked"), "{why}");
            }
        }
    }
    children.into_iter().for_each(Child::kill);
    let stats = assert_well(&cache);
    println!(
        "  {kills} kills, {} dead owners, {} shards emptied, {} hits, {} stores, {} evictions, {} lock timeouts",
        stats.lock_recoveries, stats.shards_lost, stats.hits, stats.stores, stats.evictions, stats.lock_timeouts
    );
    assert!(stats.hits > 0 && stats.shards_lost <= stats.lock_recoveries);
}
