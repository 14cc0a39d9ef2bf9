//! Code shared by the tests in which processes die: children, pages that show whether they are intact, and a time limit for tests that
//! hang.
//!
//! The test binaries do not use the test harness, because they must be single-threaded for forking to be safe. The tests wait for children
//! by reading a byte from a pipe, or with `waitpid`. No test can hang, because a separate process watches the tests. At the time limit
//! (FORKYARD_TEST_LIMIT seconds, default 900, or an earlier limit set by a test), this process prints the state of the tests and kills
//! them. FORKYARD_SEED=n repeats a history, except for the timing of the kills. With a word as argument, only the tests whose names contain
//! the word are run.
#![allow(dead_code, unreachable_pub, reason = "each test binary uses only a part of this module")]
#![allow(
    unsafe_code,
    clippy::print_stdout,
    reason = "the tests fork, and report like the test harness that they replace"
)]

use std::fs::File;
use std::io::{Read, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use forkyard_shm::{Cache, Plan, Segment, Stats, StoreOptions};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::ptrace;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, alarm, fork, pipe};
use xxhash_rust::xxh3::xxh3_64;

pub mod image;
#[path = "../../../tests/common/limit.rs"]
mod limit;
pub mod scenes;
mod watch;

pub type Test = (&'static str, fn(u64));
/// Size of the smallest cache, which has one shard.
pub const SMALL: u64 = 256 * 1024;

/// Runs the selected tests, or all tests.
pub fn run(tests: &[Test]) {
    let wanted: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with('-')).collect();
    let seed = number("FORKYARD_SEED").unwrap_or_else(|| fastrand::u64(..));
    println!("seed {seed}");
    watch::start();
    for (name, test) in tests {
        if wanted.is_empty() || wanted.iter().any(|word| name.contains(word.as_str())) {
            println!("test {name} ...");
            watch::runs(name);
            test(seed);
            println!("test {name} ... ok");
        }
    }
}

/// Returns a number from the environment.
pub fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|text| text.parse().ok())
}

/// Sets a time limit that applies until the next call. At the limit, the test fails, or a child is killed by SIGALRM. Only this limit ends
/// an endless loop.
pub fn not_longer_than(limit: Duration) {
    if !watch::not_longer_than(limit) {
        alarm::set(u32::try_from(limit.as_secs()).unwrap_or(u32::MAX));
    }
}

// ---- children ----

#[derive(Debug)]
pub struct Child {
    pub pid: Pid,
    pub ready: File,
}

/// Forks. The child runs `work` with the writing end of a pipe. It exits with 0 if `work` returns, and with 101 if `work` panics.
pub fn spawn(work: impl FnOnce(File)) -> Child {
    let (reader, writer) = pipe().expect("pipe");
    // SAFETY: this process is single-threaded, so the child may run any code.
    match unsafe { fork() }.expect("fork") {
        ForkResult::Parent { child } => Child { pid: child, ready: reader.into() },
        ForkResult::Child => {
            drop(reader);
            let outcome = catch_unwind(AssertUnwindSafe(|| {
                set_pdeathsig(Signal::SIGKILL).expect("prctl");
                work(writer.into());
            }));
            leave(if outcome.is_ok() { 0 } else { 101 })
        }
    }
}

/// Terminates a child immediately, before it can return into the code of its parent.
pub fn leave(code: i32) -> ! {
    // SAFETY: ends the process without running other code.
    unsafe { libc::_exit(code) }
}

impl Child {
    /// Waits until the child has written a byte.
    pub fn await_ready(&mut self) {
        let mut byte = [0];
        if self.ready.read_exact(&mut byte).is_err() {
            panic!("the child exited early: {:?}", waitpid(self.pid, None));
        }
    }

    /// Kills the child, which must not have exited on its own.
    pub fn kill(self) {
        kill(self.pid, Signal::SIGKILL).expect("kill");
        let status = waitpid(self.pid, None).expect("waitpid");
        assert!(
            matches!(status, WaitStatus::Signaled(_, Signal::SIGKILL, _)),
            "the child exited on its own: {status:?}"
        );
    }

    /// Waits until the child has terminated. Returns false if the child was killed before it finished.
    pub fn ended(self) -> bool {
        match waitpid(self.pid, None).expect("waitpid") {
            WaitStatus::Exited(_, 0) => true,
            WaitStatus::Signaled(_, Signal::SIGKILL, _) => false,
            other => panic!("the child failed: {other:?}"),
        }
    }

    pub fn join(self) {
        assert_eq!(waitpid(self.pid, None), Ok(WaitStatus::Exited(self.pid, 0)));
    }
}

/// Waits for the stop with which a traced child begins.
pub fn await_stop(pid: Pid) {
    assert!(matches!(waitpid(pid, None), Ok(WaitStatus::Stopped(_, Signal::SIGSTOP))));
}

/// Lets a traced child execute one instruction. Returns false if the child has terminated.
pub fn stepped(pid: Pid) -> bool {
    ptrace::step(pid, None).expect("step");
    match waitpid(pid, None).expect("waitpid") {
        WaitStatus::Stopped(_, Signal::SIGTRAP) => true,
        WaitStatus::Exited(_, 0) => false,
        other => panic!("the child failed: {other:?}"),
    }
}

pub fn say_ready(pipe: &mut File) {
    pipe.write_all(b"!").expect("the parent is running");
}

pub fn segment(cache_bytes: u64) -> Segment {
    Segment::create(&Plan { cache_bytes, rows: 8, ..Plan::default() }).expect("segment")
}

// ---- pages that show whether they are intact ----

/// Returns the key, then bytes derived from key and version, then a checksum of all these bytes: `len` + 20 bytes.
pub fn page(key: u32, version: u64, len: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(len + 20);
    bytes.extend(key.to_le_bytes());
    bytes.extend(version.to_le_bytes());
    let fill = xxh3_64(&bytes).to_le_bytes();
    while bytes.len() < len + 12 {
        bytes.extend(fill);
    }
    bytes.truncate(len + 12);
    bytes.extend(xxh3_64(&bytes).to_le_bytes());
    bytes
}

/// Returns whether a page was made for this key and is intact.
pub fn is_whole(key: u32, bytes: &[u8]) -> bool {
    bytes.split_last_chunk::<8>().is_some_and(|(body, checksum)| {
        xxh3_64(body).to_le_bytes() == *checksum && body.starts_with(&key.to_le_bytes())
    })
}

pub fn name(key: u32) -> String {
    format!("/page/{key}")
}

pub fn fill(cache: &Cache, keys: u32, len: usize) {
    for key in 0..keys {
        cache.set(name(key), page(key, 1, len), &StoreOptions::new()).expect("stored");
    }
}

/// Returns the keys that are in the cache. Checks that their pages are intact.
pub fn present(cache: &Cache, keys: u32) -> Vec<u32> {
    let found = |key: &u32| {
        let bytes = cache.get(name(*key));
        assert!(bytes.as_ref().is_none_or(|bytes| is_whole(*key, bytes)), "torn page under key {key}");
        bytes.is_some()
    };
    (0..keys).filter(found).collect()
}

/// Checks that the cache is consistent, stores pages, and returns the statistics.
pub fn assert_well(cache: &Cache, keys: u32) -> Stats {
    assert_eq!(cache.audit(), Ok(()));
    for key in 0..keys {
        let bytes = page(key, 5, 100);
        assert_eq!(cache.set(name(key), &bytes, &StoreOptions::new()), Ok(()));
        assert_eq!(cache.get(name(key)), Some(bytes));
    }
    assert_eq!(cache.audit(), Ok(()));
    let stats = cache.stats();
    assert_eq!(adds_up(&stats), Ok(()));
    stats
}

/// Checks that no byte is lost: each byte is free or used, each used byte is live or wasted, and no shard has been abandoned.
pub fn adds_up(stats: &Stats) -> Result<(), String> {
    let adds_up = stats.used_bytes + stats.free_bytes == stats.capacity
        && stats.live_bytes + stats.wasted_bytes == stats.used_bytes
        && stats.lost == 0;
    if adds_up { Ok(()) } else { Err(format!("does not add up: {stats:?}")) }
}
