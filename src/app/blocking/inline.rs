//! Connects blocking functions to the event loop. At the beginning of each iteration of the loop, this module wakes the
//! futures whose responses are ready; at the end of each iteration, it wakes threads of the pool. Between two
//! iterations, it runs inline functions.
//!
//! Passing a request to another thread and the response back costs several times as much as a quick function. A
//! function declared quick by its author ([`super::Blocking::inline`]) therefore runs on the event loop's thread, once
//! its recent runs have been quick. Such a function runs between two iterations of the loop: when inline jobs are
//! waiting, the loop returns, the jobs run, and the loop continues. Within the loop, the function would run inside
//! tokio, where a database client with its own runtime would panic.
//!
//! The loop stands still while an inline job runs. [`InlinePolicy`] limits long pauses even if a function is wrongly
//! declared quick: the function runs inline only after a number of consecutive quick runs; after a single slow run it
//! returns to the threads, and then needs twice as many quick runs.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Waker};
use std::time::Duration;

use super::{Job, pool};

/// A run that takes up to this long is quick. Passing a request to another thread and the response back takes about as
/// long.
const QUICK_RUN: Duration = Duration::from_micros(50);
/// A run that blocks the loop for at least this long moves the function back to the threads.
const SLOW_RUN: Duration = Duration::from_millis(1);
/// Number of consecutive quick runs required before a function runs inline: initially, and at most.
const RUNS_REQUIRED: (u32, u32) = (32, 1 << 20);

/// Recent run times of a function.
#[derive(Debug)]
pub(super) struct InlinePolicy {
    quick_in_a_row: AtomicU32,
    asked_for: AtomicU32,
}

impl Default for InlinePolicy {
    fn default() -> Self {
        Self { quick_in_a_row: AtomicU32::new(0), asked_for: AtomicU32::new(RUNS_REQUIRED.0) }
    }
}

impl InlinePolicy {
    pub(super) fn is_quick(&self) -> bool {
        self.quick_in_a_row.load(Ordering::Relaxed) >= self.asked_for.load(Ordering::Relaxed)
    }

    /// Records a run. Returns true if this run ends inline execution. If two threads record a run at the same time, one
    /// of the runs may be lost; this is harmless because the policy is a heuristic.
    pub(super) fn took(&self, time: Duration) -> bool {
        let row = self.quick_in_a_row.load(Ordering::Relaxed);
        let asked_for = self.asked_for.load(Ordering::Relaxed);
        if time <= QUICK_RUN {
            self.quick_in_a_row.store(row.saturating_add(1), Ordering::Relaxed);
        } else if row < asked_for {
            self.quick_in_a_row.store(0, Ordering::Relaxed);
        } else if time >= SLOW_RUN {
            self.quick_in_a_row.store(0, Ordering::Relaxed);
            self.asked_for.store((asked_for * 2).min(RUNS_REQUIRED.1), Ordering::Relaxed);
            return true;
        }
        false
    }
}

thread_local! {
    static JOBS: RefCell<VecDeque<Arc<dyn Job>>> = const { RefCell::new(VecDeque::new()) };
    /// The notifier of this thread's event loop, if that loop polls [`jobs_wait`].
    static NOTIFIER: RefCell<Option<Arc<EventLoopNotifier>>> = const { RefCell::new(None) };
    /// Wakers collected between two iterations, woken when the loop continues: waking the loop from
    /// outside would cost a system call each time.
    static WAKE_LATER: RefCell<Vec<Waker>> = const { RefCell::new(Vec::new()) };
    static BETWEEN_TURNS: Cell<bool> = const { Cell::new(false) };
    /// Whether jobs were started in this iteration.
    static ENDS_WITH_CALL: Cell<bool> = const { Cell::new(false) };
}

/// Reports finished jobs from the threads to the event loop. The first report wakes the loop. Further reports do not
/// wake it again until it has read all pending reports.
#[derive(Debug)]
pub(super) struct EventLoopNotifier(Mutex<Ended>);

#[derive(Debug)]
struct Ended {
    event_loop: Waker,
    is_woken: bool,
    /// Wakers of the futures whose responses are ready.
    wakers: Vec<Waker>,
    one_is_free: bool,
}

impl EventLoopNotifier {
    /// Returns the notifier of this thread's event loop.
    pub(super) fn of_this_thread() -> Option<Arc<Self>> {
        NOTIFIER.with_borrow(Clone::clone)
    }

    /// Wakes a future whose response is ready: immediately, or when the loop continues.
    pub(super) fn wake(&self, waker: Waker) {
        if BETWEEN_TURNS.get() {
            WAKE_LATER.with_borrow_mut(|wakers| wakers.push(waker));
        } else {
            self.change(|ended| ended.wakers.push(waker));
        }
    }

    /// Reports that a thread is free again after all threads have been occupied.
    pub(super) fn one_is_free(&self) {
        self.change(|ended| ended.one_is_free = true);
    }

    fn change(&self, what: impl FnOnce(&mut Ended)) {
        let mut ended = self.ended();
        what(&mut ended);
        let event_loop = (!std::mem::replace(&mut ended.is_woken, true)).then(|| ended.event_loop.clone());
        drop(ended);
        if let Some(event_loop) = event_loop {
            event_loop.wake();
        }
    }

    fn ended(&self) -> MutexGuard<'_, Ended> {
        // Code under the lock cannot panic.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Delivers the reports at the beginning of an iteration.
    fn look(&self, context: &Context<'_>) {
        let mut ended = self.ended();
        ended.is_woken = false;
        ended.event_loop.clone_from(context.waker());
        let mut wakers = std::mem::take(&mut ended.wakers);
        let one_is_free = std::mem::take(&mut ended.one_is_free);
        drop(ended);
        if one_is_free {
            pool::announce_free();
        }
        wakers.drain(..).for_each(Waker::wake);
        if wakers.capacity() > 0 {
            let mut ended = self.ended();
            if ended.wakers.capacity() == 0 {
                ended.wakers = wakers; // reuse the allocation
            }
        }
    }
}

/// Makes the loop finish its iteration, because the pool's threads are woken at the end of an iteration. Returns false
/// if this thread has no loop that polls [`jobs_wait`].
pub(super) fn ends_later() -> bool {
    NOTIFIER.with_borrow(|notifier| {
        let Some(notifier) = notifier else { return false };
        if !ENDS_WITH_CALL.replace(true) {
            let event_loop = notifier.ended().event_loop.clone();
            event_loop.wake(); // no system call from within the loop
        }
        true
    })
}

/// Schedules the job to run after this iteration. Returns the job as an error if this thread has no loop that polls
/// [`jobs_wait`].
pub(super) fn run_inline(job: Arc<dyn Job>) -> Result<(), Arc<dyn Job>> {
    NOTIFIER.with_borrow(|notifier| match notifier {
        Some(notifier) => {
            let is_first = JOBS.with_borrow_mut(|jobs| {
                jobs.push_back(job);
                jobs.len() == 1
            });
            if is_first {
                let event_loop = notifier.ended().event_loop.clone();
                event_loop.wake();
            }
            Ok(())
        }
        None => Err(job),
    })
}

/// Returns true if the loop must return so that [`run_jobs`] can run. The event loop's main future must poll this
/// function.
pub(crate) fn jobs_wait(context: &Context<'_>) -> bool {
    for waker in WAKE_LATER.take() {
        waker.wake();
    }
    let notifier = NOTIFIER.with_borrow_mut(|notifier| {
        let event_loop = || context.waker().clone();
        let new = || Ended { event_loop: event_loop(), is_woken: false, wakers: Vec::new(), one_is_free: false };
        Arc::clone(notifier.get_or_insert_with(|| Arc::new(EventLoopNotifier(Mutex::new(new())))))
    });
    notifier.look(context);
    if ENDS_WITH_CALL.take() {
        pool::end_turn();
    }
    JOBS.with_borrow(|jobs| !jobs.is_empty())
}

/// Runs the waiting jobs. Must not be called within the loop.
pub(crate) fn run_jobs() {
    BETWEEN_TURNS.set(true);
    for job in JOBS.take() {
        job.run();
    }
    BETWEEN_TURNS.set(false);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_earned_by_a_row_of_quick_runs_and_lost_by_one_slow_one() {
        let policy = InlinePolicy::default();
        let quick = |times| (0..times).for_each(|_| assert!(!policy.took(QUICK_RUN)));
        quick(31);
        assert!(!policy.took(QUICK_RUN * 2));
        quick(31);
        assert!(!policy.is_quick());
        quick(1);
        assert!(policy.is_quick());
        assert!(!policy.took(QUICK_RUN * 2));
        assert!(policy.is_quick(), "a little late is not slow");
        assert!(policy.took(SLOW_RUN) && !policy.is_quick());
        quick(63);
        assert!(!policy.is_quick(), "twice as many are asked for");
        quick(1);
        assert!(policy.is_quick());
    }
}
