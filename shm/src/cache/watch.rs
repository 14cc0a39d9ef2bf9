//! Lets a future wait for another process: a thread checks about every millisecond whether the lease has ended.
//!
//! Each process has one such thread. It starts when a future waits and there is no thread yet, and exits when no future has been waiting
//! for a while. It compares a few words, wakes the wakers of leases that have ended, and checks with a system call whether the holders are
//! alive. It does not depend on an executor.
//!
//! After a fork, the child has neither the thread nor a usable lock. Each fork generation (`memory/fork.rs`) therefore has its own watch,
//! and never uses its parent's watch.
//!
//! Must not hold the lock of a watch while it wakes or drops a waker, or while it cleans up after a member, because these operations may
//! call back into this file.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use nix::sys::signal::SigSet;

use super::claim::Ticket;
use crate::memory::SharedMemory;
use crate::memory::fork;

/// Time between two checks.
const INTERVAL: Duration = Duration::from_millis(1);
/// Number of checks without a waiting future after which the thread exits.
const IDLE_LOOKS: u32 = 100;
/// Maximum depth of nested forks in which futures can wait.
const GENERATIONS: usize = 64;

static WATCHES: [Mutex<Watch>; GENERATIONS] = [const { Mutex::new(Watch::new()) }; GENERATIONS];

/// The waiting futures of one process.
#[derive(Debug)]
struct Watch {
    /// Whether the thread exists.
    runs: bool,
    next: u64,
    waiting: BTreeMap<u64, Waiting>,
}

#[derive(Debug)]
struct Waiting {
    ticket: Ticket,
    waker: Waker,
}

/// No thread can wake the future, because the thread could not be started or there were too many forks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Unwatched;

/// A future that waits until a lease ends or the time limit of its ticket passes.
#[derive(Debug)]
pub(crate) struct Change {
    state: State,
}

#[derive(Debug)]
enum State {
    New(Ticket),
    Waits { generation: u32, number: u64 },
    Over,
}

impl Watch {
    const fn new() -> Watch {
        Watch { runs: false, next: 0, waiting: BTreeMap::new() }
    }

    /// Returns the watch of this process, or `None` after too many forks.
    fn of(generation: u32) -> Option<MutexGuard<'static, Watch>> {
        let watch = WATCHES.get(usize::try_from(generation).ok()?.checked_sub(1)?)?;
        Some(watch.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Removes and returns the entries whose lease has ended.
    fn take_changed(&mut self) -> Vec<Waiting> {
        let changed: Vec<u64> =
            self.waiting.iter().filter(|(_, waiting)| !waiting.ticket.is_valid()).map(|(&number, _)| number).collect();
        changed.iter().filter_map(|number| self.waiting.remove(number)).collect()
    }

    /// Returns the members whose leases are being waited for, without duplicates.
    fn holders(&self) -> Vec<(Arc<SharedMemory>, u32)> {
        let mut holders: Vec<(Arc<SharedMemory>, u32)> = Vec::new();
        for Waiting { ticket, .. } in self.waiting.values() {
            let known = |(inner, holder): &(Arc<SharedMemory>, u32)| {
                Arc::ptr_eq(inner, &ticket.inner) && *holder == ticket.holder
            };
            if !holders.iter().any(known) {
                holders.push((Arc::clone(&ticket.inner), ticket.holder));
            }
        }
        holders
    }
}

impl Change {
    pub(crate) fn of(ticket: Ticket) -> Change {
        Change { state: State::New(ticket) }
    }
}

impl Future for Change {
    type Output = Result<(), Unwatched>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let waker = context.waker().clone();
        match std::mem::replace(&mut self.state, State::Over) {
            State::New(ticket) => {
                if !ticket.is_valid() {
                    return Poll::Ready(Ok(()));
                }
                let generation = fork::generation();
                let Some(number) = wait(generation, Waiting { ticket, waker }) else {
                    return Poll::Ready(Err(Unwatched));
                };
                self.state = State::Waits { generation, number };
                Poll::Pending
            }
            State::Waits { generation, number } => {
                if generation != fork::generation() || !replace_waker(generation, number, waker) {
                    return Poll::Ready(Ok(()));
                }
                self.state = State::Waits { generation, number };
                Poll::Pending
            }
            State::Over => Poll::Ready(Ok(())),
        }
    }
}

impl Drop for Change {
    fn drop(&mut self) {
        if let State::Waits { generation, number } = self.state
            && generation == fork::generation()
        {
            let waiting = Watch::of(generation).and_then(|mut watch| watch.waiting.remove(&number));
            drop(waiting); // the lock has been released
        }
    }
}

/// Adds a waiting future, and starts the thread if necessary.
fn wait(generation: u32, waiting: Waiting) -> Option<u64> {
    let mut watch = Watch::of(generation)?;
    let number = watch.next;
    watch.next += 1;
    watch.waiting.insert(number, waiting);
    if !watch.runs {
        let thread = std::thread::Builder::new().name(String::from("forkyard-watch"));
        watch.runs = thread.spawn(move || run(generation)).is_ok();
    }
    if watch.runs {
        return Some(number);
    }
    let waiting = watch.waiting.remove(&number);
    drop(watch);
    drop(waiting);
    None
}

/// Replaces the waker of a waiting future. Returns `false` if the future is no longer waiting.
fn replace_waker(generation: u32, number: u64, mut waker: Waker) -> bool {
    let Some(mut watch) = Watch::of(generation) else { return false };
    let waits = watch.waiting.get_mut(&number);
    let is_there = waits.is_some();
    if let Some(waiting) = waits {
        std::mem::swap(&mut waiting.waker, &mut waker);
    }
    drop(watch);
    drop(waker);
    is_there
}

/// Runs the main loop of the thread.
fn run(generation: u32) {
    // Signals must be delivered to the program's own threads.
    let _ = SigSet::all().thread_block();
    let mut idle = 0;
    loop {
        let Some(mut watch) = Watch::of(generation) else { return };
        let (changed, holders) = (watch.take_changed(), watch.holders());
        idle = if changed.is_empty() && watch.waiting.is_empty() { idle + 1 } else { 0 };
        if idle > IDLE_LOOKS {
            watch.runs = false;
            return;
        }
        drop(watch);
        for Waiting { ticket, waker } in changed {
            drop(ticket);
            // A panic in one executor must not prevent the other wake-ups.
            let _ = catch_unwind(AssertUnwindSafe(|| waker.wake()));
        }
        for (inner, holder) in holders {
            inner.release_if_dead(holder);
        }
        std::thread::sleep(INTERVAL);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::task::Wake;

    use super::*;
    use crate::cache::claim::Claimed;
    use crate::{Plan, Segment};

    #[derive(Default)]
    struct Wakes(AtomicU32);

    impl Wake for Wakes {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    /// Takes the lease of a key, and starts waiting for it.
    fn held_and_waited_for(segment: &Segment, key: u64, deadline_ms: u64) -> (crate::cache::claim::Lease, Change) {
        let inner = &segment.cache().segment;
        let turn = inner.lease_cell(key).unwrap().turn.load(Ordering::SeqCst);
        let claim = || inner.claim_lease(key, turn, inner.now_ms(), deadline_ms);
        match (claim(), claim()) {
            (Claimed::Mine(lease), Claimed::Held(ticket)) => (lease, Change::of(ticket)),
            other => panic!("{other:?}"),
        }
    }

    fn segment() -> Segment {
        Segment::create(&Plan { cache_bytes: 256 * 1024, ..Plan::default() }).unwrap()
    }

    fn poll(change: &mut Change, wakes: &Arc<Wakes>) -> Poll<Result<(), Unwatched>> {
        Pin::new(change).poll(&mut Context::from_waker(&Waker::from(Arc::clone(wakes))))
    }

    fn await_wake(wakes: &Wakes) {
        while wakes.0.load(Ordering::SeqCst) == 0 {
            std::thread::yield_now();
        }
    }

    #[test]
    fn the_end_of_a_lease_wakes_who_waits_for_it_and_nobody_else() {
        let segment = segment();
        let (lease, mut change) = held_and_waited_for(&segment, 1, 1 << 20);
        let (_other_lease, mut other_change) = held_and_waited_for(&segment, 2, 1 << 20);
        let (first, wakes, other) = (Arc::default(), Arc::default(), Arc::default());
        assert_eq!(poll(&mut change, &first), Poll::Pending);
        assert_eq!(poll(&mut change, &wakes), Poll::Pending);
        assert_eq!(poll(&mut other_change, &other), Poll::Pending);
        drop(lease);
        await_wake(&wakes);
        assert_eq!(poll(&mut change, &wakes), Poll::Ready(Ok(())));
        assert_eq!(poll(&mut other_change, &other), Poll::Pending);
        let woken = |wakes: &Arc<Wakes>| wakes.0.load(Ordering::SeqCst);
        assert_eq!((woken(&first), woken(&wakes), woken(&other)), (0, 1, 0), "the last waker, once");
    }

    #[test]
    fn a_deadline_wakes_too() {
        let segment = segment();
        let (_lease, mut change) = held_and_waited_for(&segment, 1, 20);
        let wakes = Arc::default();
        assert_eq!(poll(&mut change, &wakes), Poll::Pending);
        await_wake(&wakes);
        assert_eq!(poll(&mut change, &wakes), Poll::Ready(Ok(())));
    }

    #[test]
    fn what_is_dropped_is_not_waited_for() {
        let segment = segment();
        let (_lease, mut change) = held_and_waited_for(&segment, 1, 1 << 20);
        let wakes = Arc::default();
        assert_eq!(poll(&mut change, &wakes), Poll::Pending);
        let State::Waits { generation, number } = change.state else { panic!("{change:?}") };
        drop(change);
        assert!(!Watch::of(generation).unwrap().waiting.contains_key(&number));
        // The future held the only other waker, which is dropped with it.
        assert_eq!(Arc::strong_count(&wakes), 1);
    }

    #[test]
    fn after_too_many_forks_nobody_watches() {
        let last = u32::try_from(GENERATIONS).unwrap();
        assert!(Watch::of(last).is_some() && Watch::of(last + 1).is_none() && Watch::of(0).is_none());
    }
}
