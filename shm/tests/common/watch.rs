//! A watchdog process that, at the time limit, kills the tests and all processes that they have started.
//!
//! The watchdog is a separate process because the tests fork, and must therefore be single-threaded. The tests write the deadline and the
//! name of the running test to memory that they share with the watchdog.

use std::io::Write as _;
use std::num::NonZeroUsize;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::time::Duration;

use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use nix::time::ClockId;
use nix::unistd::{ForkResult, Pid, fork, getpid, getppid};

use super::{leave, limit, number};

/// Time limit in seconds for all tests of a binary together, unless FORKYARD_TEST_LIMIT sets a different limit.
const LIMIT: u64 = 900;
const LOOK: Duration = Duration::from_millis(100);

#[repr(C)]
#[derive(Debug)]
struct Shared {
    /// Deadline in seconds of the monotonic clock. 0 means no deadline.
    deadline: AtomicU64,
    /// Name of the running test.
    name: [AtomicU8; 128],
}

#[derive(Debug)]
struct Watch {
    /// The process that runs the tests. Its children are not watched individually.
    tests: Pid,
    shared: &'static Shared,
}

static WATCH: OnceLock<Watch> = OnceLock::new();

fn now() -> u64 {
    ClockId::CLOCK_MONOTONIC.now().expect("the clock can be read").tv_sec().cast_unsigned()
}

/// Forks the watchdog process.
pub fn start() {
    let size = NonZeroUsize::new(size_of::<Shared>()).expect("the structure is not empty");
    // SAFETY: a new mapping, to which nothing else refers.
    let memory =
        unsafe { mmap_anonymous(None, size, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_SHARED) };
    // SAFETY: the mapping is large enough, aligned to a page, zeroed (0 is a valid value of each atomic), and never unmapped.
    let shared: &'static Shared = unsafe { memory.expect("mmap").cast().as_ref() };
    let tests = getpid();
    // SAFETY: this process is single-threaded, so the child may run any code.
    if let ForkResult::Child = unsafe { fork() }.expect("fork") {
        set_pdeathsig(Signal::SIGKILL).expect("prctl");
        watch(tests, shared);
    }
    assert!(WATCH.set(Watch { tests, shared }).is_ok(), "the watchdog is started once");
}

fn watch(tests: Pid, shared: &Shared) -> ! {
    let end = now() + number("FORKYARD_TEST_LIMIT").unwrap_or(LIMIT);
    loop {
        std::thread::sleep(LOOK);
        if getppid() != tests {
            leave(0); // the tests exited before the death signal was requested
        }
        let own = shared.deadline.load(Ordering::SeqCst);
        if now() >= end || (own != 0 && now() >= own) {
            break;
        }
    }
    let name: Vec<u8> =
        shared.name.iter().map(|byte| byte.load(Ordering::SeqCst)).take_while(|byte| *byte != 0).collect();
    let mut out = std::io::stderr();
    let _ = writeln!(
        out,
        "\nThe test {} has reached its limit (or all have: FORKYARD_TEST_LIMIT).",
        String::from_utf8_lossy(&name)
    );
    let pid = tests.as_raw().cast_unsigned();
    limit::print_state(&mut out, pid);
    // The watchdog is also a child of the tests, and must exit last.
    let own = getpid().as_raw().cast_unsigned();
    limit::kill_trees_but(&[pid].into(), own);
    leave(1)
}

/// Records the name of the running test. The test may use the remaining time of all tests.
pub fn runs(name: &str) {
    let Some(watch) = WATCH.get() else { return };
    watch.shared.deadline.store(0, Ordering::SeqCst);
    let bytes = name.bytes().take(watch.shared.name.len() - 1).chain([0]);
    bytes.zip(&watch.shared.name).for_each(|(byte, place)| place.store(byte, Ordering::SeqCst));
}

/// Sets a limit for the running test, counted from now. Returns false in a child of the tests, and if there is no watchdog.
pub fn not_longer_than(limit: Duration) -> bool {
    let watch = WATCH.get().filter(|watch| watch.tests == getpid());
    watch.inspect(|watch| watch.shared.deadline.store(now() + limit.as_secs().max(1), Ordering::SeqCst)).is_some()
}
