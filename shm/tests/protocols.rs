//! Runs the shared-memory protocols under loom, through the possible interleavings of threads and delays of stores.
//!
//! The protocol files are compiled here with loom's atomics, so the checked code is the shipped code. [`Futex`] models sleeping in the
//! kernel. Each protocol has variants with a deliberate error in an ordering or a fence. These variants must fail. Their failure shows that
//! the models cover the critical places.
//!
//! The models are not a proof. The number of preemptions is bounded. Loom (0.7) chooses what to reorder based only on the *last* access to
//! an atomic, so it misses some orderings if several threads read the atomic. Each model is therefore run with its threads in several
//! arrangements; a variant counts as failed if one arrangement fails. Loom treats `SeqCst` loads and stores as acquire and release,
//! although their real ordering is stronger; fences are modeled exactly.

use std::rc::Rc;
use std::sync::Arc;

use loom::cell::UnsafeCell;
use loom::model::Builder;
use loom::sync::Mutex;
use loom::thread;

use crate::sync::{AtomicU32, AtomicU64, Ordering, fence};

/// The names that the protocol files import.
mod sync {
    pub(crate) use loom::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

    pub(crate) fn fence_after_swap() {
        fence(Ordering::SeqCst);
    }
}

/// No process dies in the models.
mod crash {
    pub(crate) fn point(_: &'static str) {}
}

#[path = "../src/protocols/bell.rs"]
mod bell;
#[path = "../src/protocols/kept.rs"]
mod kept;
#[path = "../src/protocols/latest_event.rs"]
mod latest_event;
#[path = "../src/protocols/lease.rs"]
#[expect(dead_code, reason = "deadlines and marks do not concern memory ordering: lease_tests.rs")]
mod lease;
#[path = "../src/protocols/lock.rs"]
#[expect(dead_code, reason = "operations on a file that was just opened do not concern memory ordering")]
mod lock;
#[path = "../src/protocols/pin.rs"]
mod pin;
#[path = "../src/protocols/purge.rs"]
mod purge;
#[path = "../src/protocols/units.rs"]
#[expect(dead_code, reason = "limits and the status do not concern memory ordering: units_tests.rs")]
#[expect(unreachable_pub, reason = "the crate exports the state of a door")]
mod units;

#[path = "protocols/claiming.rs"]
mod claiming;
#[path = "protocols/events.rs"]
mod events;
#[path = "protocols/keeping.rs"]
mod keeping;
#[path = "protocols/purging.rs"]
mod purging;
#[path = "protocols/reading.rs"]
mod reading;

/// The code of one thread in a model.
type Work = Box<dyn FnOnce()>;

/// Several concurrent threads, and the condition that must hold after they have finished.
struct Model {
    threads: Vec<Work>,
    afterwards: Work,
}

/// Runs a model with at most `preemptions` preemptions per execution. The model is recreated for each execution, and runs in several
/// arrangements: with each of the threads as the main thread, and with none of them as the main thread.
fn check(preemptions: usize, model: impl Fn() -> Model + Sync + Send + 'static) {
    let model = Arc::new(model);
    let mut first = 0;
    let mut last = false;
    while !last {
        let threads = Arc::new(std::sync::atomic::AtomicUsize::new(0));
        let (model, count) = (Arc::clone(&model), Arc::clone(&threads));
        let mut builder = Builder::new();
        builder.preemption_bound = Some(preemptions);
        builder.check(move || {
            let Model { mut threads, afterwards } = model();
            count.store(threads.len(), std::sync::atomic::Ordering::Relaxed);
            let main = if first < threads.len() { Some(threads.remove(first)) } else { None };
            let others: Vec<_> = threads.into_iter().map(thread::spawn).collect();
            if let Some(main) = main {
                main();
            }
            others.into_iter().for_each(|other| other.join().expect("the thread does not panic"));
            afterwards();
        });
        last = first == threads.load(std::sync::atomic::Ordering::Relaxed);
        first += 1;
    }
}

/// Returns a thread's operation on the shared state. Loom runs all threads in one thread, so no `Arc` is needed.
fn work<T: 'static>(shared: &Rc<T>, work: impl FnOnce(&T) + 'static) -> Work {
    let shared = Rc::clone(shared);
    Box::new(move || work(&shared))
}

/// Models futex(2), which compares and goes to sleep in one step, as far as wakers can observe.
///
/// No thread really sleeps. When a thread goes to sleep, its id is recorded and the thread finishes. The waking thread then does what the
/// woken thread would do next.
#[derive(Default)]
struct Futex {
    asleep: Mutex<Vec<u32>>,
}

impl Futex {
    /// Returns whether the thread `who` goes to sleep.
    fn wait(&self, word: &AtomicU32, seen: u32, who: u32) -> bool {
        // The kernel also executes a full fence first, but the protocol must not depend on it.
        let mut asleep = self.asleep.lock().expect("no thread has panicked");
        let sleeps = word.load(Ordering::Relaxed) == seen;
        if sleeps {
            asleep.push(who);
        }
        sleeps
    }

    /// Returns the thread that is woken.
    fn wake(&self) -> Option<u32> {
        self.asleep.lock().expect("no thread has panicked").pop()
    }

    fn assert_all_awake(&self) {
        assert_eq!(*self.asleep.lock().expect("no thread has panicked"), [], "slept through its wake-up");
    }
}

// ---- lease.rs ----

const KEY: u64 = 5 << 47;

/// A page that only one thread at a time may render. Loom fails if two threads render it.
#[derive(Default)]
struct Lease {
    word: AtomicU64,
    page: UnsafeCell<u32>,
    turn: AtomicU32,
    waiters: AtomicU32,
    futex: Futex,
}

impl Lease {
    /// Returns a lease that member 0 holds until time 100, and the lease's word.
    fn held() -> (Rc<Lease>, u64) {
        let lease = Rc::new(Lease::default());
        match lease::take(&lease.word, KEY, 0, 1, 100) {
            lease::Claim::Mine(word) => (lease, word),
            other => panic!("the lease was free: {other:?}"),
        }
    }

    /// Renders the page, if the lease is available.
    fn try_to_render(&self, member: u32, now_ms: u64, release: Release) {
        if let lease::Claim::Mine(word) = lease::take(&self.word, KEY, member, now_ms, now_ms + 100) {
            self.page.with_mut(|_| ());
            assert!(release(&self.word, word), "another thread released the lease");
        }
    }
}

type Release = fn(&AtomicU64, u64) -> bool;

/// Models a late holder: one thread holds the lease and is late, and two other threads take the lease over when its deadline has passed.
fn late_release(release: Release) {
    check(3, move || {
        let (lease, late) = Lease::held();
        let others = (1..=2).map(|member| work(&lease, move |lease| lease.try_to_render(member, 100, release)));
        let mut threads: Vec<Work> = others.collect();
        threads.push(work(&lease, move |lease| {
            let _ = release(&lease.word, late);
        }));
        Model { threads, afterwards: Box::new(|| ()) }
    });
}

#[test]
fn a_lease_has_one_holder_and_a_late_holder_does_not_release_it() {
    late_release(lease::release);
}

#[test]
#[should_panic]
fn a_release_without_a_check_frees_the_lease_of_another_holder() {
    late_release(|word, _| {
        word.store(0, Ordering::Release);
        true
    });
}

#[test]
#[should_panic(expected = "Causality violation")]
fn a_relaxed_release_does_not_publish_the_page() {
    late_release(|word, mine| word.compare_exchange(mine, 0, Ordering::Relaxed, Ordering::Relaxed).is_ok());
}

/// Models a dead holder: two threads mark it dead at the same time and request its lease, and a third thread also requests the lease.
fn burial(take_from: fn(&AtomicU64, u32) -> bool) {
    check(3, move || {
        let (lease, _) = Lease::held();
        let burier = move |lease: &Lease| {
            take_from(&lease.word, 0);
            lease.try_to_render(1, 2, lease::release);
        };
        let other = |lease: &Lease| lease.try_to_render(2, 2, lease::release);
        let threads = vec![work(&lease, burier), work(&lease, burier), work(&lease, other)];
        let afterwards = work(&lease, |lease| assert_eq!(lease.word.load(Ordering::Relaxed), 0));
        Model { threads, afterwards }
    });
}

#[test]
fn the_lease_of_a_dead_holder_is_passed_on_once() {
    burial(lease::take_from);
}

#[test]
#[should_panic]
fn marking_dead_without_a_second_check_frees_the_lease_of_a_live_holder() {
    burial(|word, member| {
        let seen = word.load(Ordering::Acquire);
        let theirs = seen >> 32 & 0x7fff == u64::from(member) + 1;
        if theirs {
            word.store(0, Ordering::Release);
        }
        theirs
    });
}

/// The state of a shard.
#[derive(Default)]
struct Shard {
    lock: AtomicU32,
    page: AtomicU32,
}

impl Shard {
    fn store(&self, member: u32, page: u32, is_to_be: impl FnOnce() -> bool) {
        while let lock::Taken::No { .. } = lock::take(&self.lock, member, false) {
            thread::yield_now();
        }
        if is_to_be() {
            self.page.store(page, Ordering::Relaxed);
        }
        lock::release(&self.lock);
    }
}

/// Models a late store: a late thread and its successor store their pages. With `look_first`, the late thread checks that it still has the
/// lease before it takes the lock.
fn late_store(look_first: bool) {
    check(3, move || {
        let (lease, late) = Lease::held();
        let both = Rc::new((lease, Shard::default()));
        let threads = vec![
            work(&both, move |(lease, shard)| {
                let held_before = lease::is_held(&lease.word, late);
                shard.store(0, 1, || if look_first { held_before } else { lease::is_held(&lease.word, late) });
                lease::release(&lease.word, late);
            }),
            work(&both, |(lease, shard)| {
                if let lease::Claim::Mine(word) = lease::take(&lease.word, KEY, 1, 100, 200) {
                    shard.store(1, 2, || lease::is_held(&lease.word, word));
                    lease::release(&lease.word, word);
                }
            }),
        ];
        let afterwards = work(&both, |(_, shard)| {
            assert_eq!(shard.page.load(Ordering::Relaxed), 2, "the late page replaced the newer one");
        });
        Model { threads, afterwards }
    });
}

#[test]
fn a_late_page_never_replaces_a_newer_one() {
    late_store(false);
}

#[test]
#[should_panic(expected = "replaced the newer one")]
fn checking_the_lease_before_taking_the_lock_is_too_early() {
    late_store(true);
}

type Enter = fn(&AtomicU32, &AtomicU32) -> u32;
type EndTurn = fn(&AtomicU32, &AtomicU32) -> bool;

/// Models a thread that waits for the end of a lease.
fn wait_for_the_end(enter: Enter, end_turn: EndTurn) {
    check(4, move || {
        let (lease, word) = Lease::held();
        let threads = vec![
            work(&lease, move |lease| {
                let turn = enter(&lease.waiters, &lease.turn);
                if lease::is_held(&lease.word, word) {
                    lease.futex.wait(&lease.turn, turn, 1);
                }
            }),
            work(&lease, move |lease| {
                lease::release(&lease.word, word);
                if end_turn(&lease.turn, &lease.waiters) {
                    lease.futex.wake();
                }
            }),
        ];
        Model { threads, afterwards: work(&lease, |lease| lease.futex.assert_all_awake()) }
    });
}

#[test]
fn no_thread_sleeps_through_the_end_of_a_lease() {
    wait_for_the_end(lease::enter, lease::end_turn);
}

#[test]
#[should_panic(expected = "slept through")]
fn without_its_fence_the_end_of_a_lease_misses_a_waiting_thread() {
    wait_for_the_end(lease::enter, |turn, waiters| {
        turn.fetch_add(1, Ordering::AcqRel);
        waiters.load(Ordering::Acquire) > 0
    });
}

#[test]
#[should_panic(expected = "slept through")]
fn without_its_fence_a_waiting_thread_reads_an_old_turn() {
    let enter = |waiters: &AtomicU32, turn: &AtomicU32| {
        waiters.fetch_add(1, Ordering::AcqRel);
        turn.load(Ordering::Acquire)
    };
    wait_for_the_end(enter, lease::end_turn);
}

#[test]
#[should_panic(expected = "slept through")]
fn a_thread_counted_after_it_reads_the_turn_is_not_woken() {
    let enter = |waiters: &AtomicU32, turn: &AtomicU32| {
        fence(Ordering::SeqCst);
        let seen = turn.load(Ordering::Acquire);
        waiters.fetch_add(1, Ordering::AcqRel);
        seen
    };
    wait_for_the_end(enter, lease::end_turn);
}

// ---- lock.rs ----

#[derive(Default)]
struct Lock {
    word: AtomicU32,
    inside: UnsafeCell<u32>,
    futex: Futex,
    visits: AtomicU32,
    repairs: AtomicU32,
}

type Unlock = fn(&AtomicU32) -> bool;

impl Lock {
    /// Takes the lock, waiting for it like `shard.rs` but without timeouts, does some work, and releases the lock.
    fn visit(&self, me: u32, mut waiting: bool, unlock: Unlock) {
        loop {
            match lock::take(&self.word, me, waiting) {
                lock::Taken::Free => break,
                lock::Taken::FromTheDead => {
                    self.repairs.fetch_add(1, Ordering::Relaxed);
                    break;
                }
                lock::Taken::No { word, .. } => {
                    waiting = true;
                    if lock::announce(&self.word, word).is_some_and(|seen| self.futex.wait(&self.word, seen, me)) {
                        return;
                    }
                }
            }
        }
        self.inside.with_mut(|_| ());
        self.visits.fetch_add(1, Ordering::Relaxed);
        if unlock(&self.word) {
            self.wake(unlock);
        }
    }

    fn wake(&self, unlock: Unlock) {
        if let Some(who) = self.futex.wake() {
            self.visit(who, true, unlock);
        }
    }

    fn assert_visited(&self, visits: u32, repairs: u32) {
        self.futex.assert_all_awake();
        assert_eq!(self.visits.load(Ordering::Relaxed), visits);
        assert_eq!(self.repairs.load(Ordering::Relaxed), repairs, "one thread repairs what the dead owner left");
    }
}

/// Models several threads that request the lock at the same time.
fn visitors(unlock: Unlock) {
    check(2, move || {
        let lock = Rc::new(Lock::default());
        let threads = (0..3).map(|me| work(&lock, move |lock| lock.visit(me, false, unlock))).collect();
        Model { threads, afterwards: work(&lock, |lock| lock.assert_visited(3, 0)) }
    });
}

#[test]
fn a_lock_has_one_owner_and_a_waiting_thread_is_woken() {
    visitors(lock::release);
}

#[test]
#[should_panic(expected = "slept through")]
fn an_unlock_that_stores_a_value_read_earlier_misses_a_waiting_thread() {
    visitors(|word| {
        let waited_for = word.load(Ordering::Relaxed) & 1 << 31 != 0;
        word.store(0, Ordering::Release);
        waited_for
    });
}

#[test]
#[should_panic(expected = "Causality violation")]
fn a_relaxed_unlock_admits_two_owners() {
    visitors(|word| word.swap(0, Ordering::Relaxed) & 1 << 31 != 0);
}

/// Models a dead owner, whose death is detected twice, while two threads request the lock.
fn dead_owner(mark_dead: fn(&AtomicU32, u32) -> bool) {
    check(2, move || {
        let lock = Rc::new(Lock::default());
        lock::take(&lock.word, 7, false);
        let visitor = |me| move |lock: &Lock| lock.visit(me, false, lock::release);
        let burier = move |lock: &Lock| {
            for _ in 0..2 {
                if mark_dead(&lock.word, 7) {
                    lock.wake(lock::release);
                }
            }
        };
        let threads = vec![work(&lock, visitor(0)), work(&lock, visitor(1)), work(&lock, burier)];
        Model { threads, afterwards: work(&lock, |lock| lock.assert_visited(2, 1)) }
    });
}

#[test]
fn exactly_one_thread_is_notified_of_a_dead_owner() {
    dead_owner(lock::mark_dead);
}

#[test]
#[should_panic]
fn marking_a_lock_without_checking_its_owner_is_wrong() {
    dead_owner(|word, _| word.swap(1 << 30, Ordering::AcqRel) & 1 << 31 != 0);
}

#[test]
#[should_panic(expected = "slept through")]
fn marking_dead_without_waking_leaves_threads_asleep() {
    dead_owner(|word, member| {
        lock::mark_dead(word, member);
        false
    });
}
