//! Tests in which processes are killed and stopped while they use a segment.
#![expect(unsafe_code, reason = "the tests fork")]

mod common;

use std::io::{Read, Write};
use std::time::{Duration, Instant};

use common::{Child, SMALL, adds_up, assert_well, fill, is_whole, name, page, present, say_ready, segment, spawn};
use forkyard_shm::{Cache, Segment, State, StoreError, StoreOptions};
use nix::sys::signal::{Signal, kill, raise};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, alarm, fork, pause};

const KEYS: u32 = 300;
/// Number of entries that one process can pin at a time.
const PINS: u32 = 32;

fn main() {
    common::run(&[
        ("a_child_attaches_by_descriptor", a_child_attaches_by_descriptor),
        (
            "a_process_killed_while_it_holds_the_lock_loses_nothing",
            a_process_killed_while_it_holds_the_lock_loses_nothing,
        ),
        (
            "a_process_stopped_while_it_holds_the_lock_stalls_no_reader",
            a_process_stopped_while_it_holds_the_lock_stalls_no_reader,
        ),
        ("a_stopped_holder_causes_one_wait", a_stopped_holder_causes_one_wait),
        ("the_pins_of_a_dead_reader_are_freed", the_pins_of_a_dead_reader_are_freed),
        ("a_pinned_page_never_changes", a_pinned_page_never_changes),
        ("a_surviving_child_does_not_keep_its_parents_lock", a_surviving_child_does_not_keep_its_parents_lock),
    ]);
}

fn a_child_attaches_by_descriptor(_seed: u64) {
    let segment = segment(1 << 20);
    let inherited = segment.fd().try_clone_to_owned().expect("dup");
    let mut child = spawn(|mut pipe| {
        let attached = Segment::attach(inherited).expect("attach");
        attached.cache().set("from the child", "hello", &StoreOptions::new()).expect("stored");
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
    assert_eq!(row.serving[0].what, "GET /not done", "the request of a dead process can be read");
}

fn a_process_killed_while_it_holds_the_lock_loses_nothing(_seed: u64) {
    let cache = segment(16 << 20).cache();
    fill(&cache, KEYS, 500);
    // Each death is detected by the next child that needs the lock of the dead process. The death of the last child is detected by this
    // process.
    for _ in 0..11 {
        let mut child = spawn(|mut pipe| {
            let _held = cache.hold(name(0)).expect("lock");
            say_ready(&mut pipe);
            pause();
        });
        child.await_ready();
        child.kill();
    }
    assert_eq!(present(&cache, KEYS).len(), KEYS as usize, "readers need no lock");
    assert_eq!(cache.stats().lock_recoveries, 10);
    let stats = assert_well(&cache, KEYS);
    assert_eq!((stats.shards, stats.lost, stats.lock_recoveries, stats.lock_timeouts), (2, 0, 11, 0));
    assert_eq!(cache.locks_held(), 0);
}

/// Returns a child that is stopped while it holds the lock of key 0's shard.
fn stopped_holder(cache: &Cache) -> Child {
    let child = spawn(|_| {
        let _held = cache.hold(name(0)).expect("lock");
        raise(Signal::SIGSTOP).expect("raise");
    });
    let status = waitpid(child.pid, Some(WaitPidFlag::WUNTRACED));
    assert_eq!(status, Ok(WaitStatus::Stopped(child.pid, Signal::SIGSTOP)));
    child
}

fn a_process_stopped_while_it_holds_the_lock_stalls_no_reader(_seed: u64) {
    let cache = segment(16 << 20).cache();
    fill(&cache, KEYS, 500);
    let child = stopped_holder(&cache);
    let stopped = cache.shard_index(name(0));
    let (held, others): (Vec<u32>, Vec<u32>) = (0..KEYS).partition(|&key| cache.shard_index(name(key)) == stopped);
    assert!(held.len() > 1 && others.len() > 1);

    assert_eq!(present(&cache, KEYS).len(), KEYS as usize, "all shards can be read");
    assert_eq!(cache.stats().lock_timeouts, 0);
    for key in &others {
        assert_eq!(cache.set(name(*key), page(*key, 2, 300), &StoreOptions::new()), Ok(()));
    }
    for key in &held {
        assert_eq!(cache.set(name(*key), page(*key, 2, 300), &StoreOptions::new()), Err(StoreError::Busy));
        assert_eq!(cache.get(name(*key)), Some(page(*key, 1, 500)));
    }
    assert_eq!(cache.stats().lock_timeouts, held.len() as u64);
    assert!(cache.audit().is_err_and(|why| why.contains("could not be locked")));
    assert!(!cache.purge(name(0)));
    assert_eq!(cache.get(name(0)), None, "the key is purged even though the shard is locked");
    cache.sweep();

    kill(child.pid, Signal::SIGCONT).expect("kill");
    child.join();
    assert_eq!(present(&cache, KEYS).len(), KEYS as usize - 1, "no other key is lost");
    let stats = assert_well(&cache, KEYS);
    assert_eq!((stats.lost, stats.lock_recoveries), (0, 0));
}

fn a_stopped_holder_causes_one_wait(_seed: u64) {
    let cache = segment(16 << 20).cache();
    let child = stopped_holder(&cache);
    assert_eq!(cache.set(name(0), "x", &StoreOptions::new()), Err(StoreError::Busy));
    let since = Instant::now();
    for _ in 0..1000 {
        assert_eq!(cache.set(name(0), "x", &StoreOptions::new()), Err(StoreError::Busy));
    }
    assert!(since.elapsed() < Duration::from_secs(10), "each lock attempt waits for 20 ms: {:?}", since.elapsed());
    assert_eq!(cache.stats().lock_timeouts, 1001);
    // A process that is killed while it is stopped is considered dead.
    child.kill();
    assert_eq!(cache.set(name(0), "x", &StoreOptions::new()), Ok(()));
    let stats = assert_well(&cache, KEYS);
    assert_eq!((stats.lock_timeouts, stats.lock_recoveries), (1001, 1));
}

/// Stores enough data for this many laps around the rings. Every store must succeed.
fn lap(cache: &Cache, laps: u64) {
    let rounds = laps * cache.stats().capacity / (u64::from(KEYS) * 2000);
    for round in 0..=rounds {
        for key in 1000..1000 + KEYS {
            assert_eq!(cache.set(name(key), page(key, round, 2000), &StoreOptions::new()), Ok(()), "round {round}");
        }
    }
}

fn the_pins_of_a_dead_reader_are_freed(_seed: u64) {
    let cache = segment(SMALL).cache();
    // The pins of a dead process cause at most one detour.
    for round in 0..20 {
        fill(&cache, PINS, 2000);
        let mut child = spawn(|mut pipe| {
            let pins: Vec<_> = (0..PINS).filter_map(|key| cache.pin(name(key))).collect();
            say_ready(&mut pipe);
            pause();
            drop(pins);
        });
        child.await_ready();
        let pinned = cache.pins_set();
        assert!(if round == 0 { pinned == PINS as usize } else { pinned > 3 }, "{pinned} pins");
        child.kill();
        lap(&cache, 3);
        assert_eq!(cache.pins_set(), 0, "a writer encountered the pins");
        assert_eq!(adds_up(&cache.stats()), Ok(()));
    }
    assert_well(&cache, KEYS);
    // The sweep also finds the pins of a dead process.
    fill(&cache, 1, 2000);
    let mut child = spawn(|mut pipe| {
        let _pin = cache.pin(name(0)).expect("hit");
        say_ready(&mut pipe);
        pause();
    });
    child.await_ready();
    child.kill();
    assert_eq!(cache.pins_set(), 1);
    cache.sweep();
    assert_eq!(cache.pins_set(), 0);
}

fn a_pinned_page_never_changes(_seed: u64) {
    let cache = segment(SMALL).cache();
    fill(&cache, 8, 3000);
    let mut child = spawn(|mut pipe| {
        let pins: Vec<_> = (0..8).map(|key| cache.pin(name(key)).expect("hit")).collect();
        say_ready(&mut pipe);
        // The child runs for at least 2000 rounds, and until the parent stores "enough".
        let mut rounds = 0;
        while rounds < 2000 || cache.get("enough").is_none() {
            rounds += 1;
            for (key, pin) in (0..).zip(&pins) {
                let bytes = pin.to_vec();
                assert!(is_whole(key, &bytes) && bytes == page(key, 1, 3000), "pinned page {key} has changed");
            }
        }
    });
    child.await_ready();
    assert_eq!(cache.pins_set(), 8);
    // The reader stays alive, so the writers must skip its pins.
    for _ in 0..10 {
        lap(&cache, 3);
        assert_eq!(cache.pins_set(), 8);
        assert_eq!(cache.audit(), Ok(()));
    }
    cache.set("enough", "", &StoreOptions::new()).expect("stored");
    child.join();
    assert_eq!(adds_up(&cache.stats()), Ok(()));
    cache.sweep();
    assert_eq!(cache.pins_set(), 0);
    assert_well(&cache, KEYS);
}

fn a_surviving_child_does_not_keep_its_parents_lock(_seed: u64) {
    let cache = segment(SMALL).cache();
    fill(&cache, 8, 100);
    let mut parent = spawn(|mut pipe| {
        let _held = cache.hold(name(0)).expect("lock");
        let pin = cache.pin(name(1)).expect("hit");
        // SAFETY: this process is single-threaded.
        match unsafe { fork() }.expect("fork") {
            ForkResult::Parent { .. } => pause(),
            ForkResult::Child => {
                assert!(pin.is_empty(), "the child has no pins, because the parent set them");
                alarm::set(600); // in case the test does not kill this process
                pipe.write_all(&std::process::id().to_le_bytes()).expect("the test is waiting for the pid");
                pause();
            }
        }
    });
    let mut pid = [0; 4];
    parent.ready.read_exact(&mut pid).expect("the grandchild has started");
    // The grandchild holds the mapping, and all descriptors of its parent except one.
    assert_eq!(cache.set(name(2), "x", &StoreOptions::new()), Err(StoreError::Busy));
    parent.kill();
    assert_eq!(cache.set(name(2), "x", &StoreOptions::new()), Ok(()));
    assert_eq!((cache.stats().lock_recoveries, cache.pins_set(), cache.locks_held()), (1, 0, 0));
    kill(Pid::from_raw(i32::from_le_bytes(pid)), Signal::SIGKILL).expect("the grandchild is still running");
    assert_well(&cache, KEYS);
}
