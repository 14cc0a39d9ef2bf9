//! Quick functions, run on the event loop's own thread between two of its turns.
//!
//! To pass a request to another thread and its response back costs several times what a quick function does.
//! So a function that has been quick for a while is run right here. Not within the loop, where it would find
//! itself inside tokio (a database client that brings its own runtime would panic there), but between two turns
//! of it: the loop lets go when quick jobs wait, they are run, and it goes on.
//!
//! While such a job runs, the loop stands still. [`Pace`] keeps that rare: a function earns its place by a row
//! of quick runs, loses it by a single slow one, and then needs a row twice as long.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::task::{Context, Waker};
use std::time::Duration;

use super::Job;

/// A run is quick up to this, about what passing it to another thread and back costs.
const QUICK: Duration = Duration::from_micros(50);
/// A run that holds up the loop for longer costs the function its place.
const SLOW: Duration = Duration::from_millis(1);
/// So many quick runs in a row are asked for at first, and at most.
const ROW: (u32, u32) = (32, 1 << 20);

/// How long a function took, of late.
#[derive(Debug)]
pub(super) struct Pace {
    quick_in_a_row: AtomicU32,
    asked_for: AtomicU32,
}

impl Default for Pace {
    fn default() -> Self {
        Self { quick_in_a_row: AtomicU32::new(0), asked_for: AtomicU32::new(ROW.0) }
    }
}

impl Pace {
    pub(super) fn is_quick(&self) -> bool {
        self.quick_in_a_row.load(Ordering::Relaxed) >= self.asked_for.load(Ordering::Relaxed)
    }

    /// Takes note of a run. Two threads that do so at once may lose one: it is a guess anyway.
    pub(super) fn took(&self, time: Duration) {
        let row = self.quick_in_a_row.load(Ordering::Relaxed);
        let asked_for = self.asked_for.load(Ordering::Relaxed);
        if time <= QUICK {
            self.quick_in_a_row.store(row.saturating_add(1), Ordering::Relaxed);
        } else if row < asked_for {
            self.quick_in_a_row.store(0, Ordering::Relaxed);
        } else if time >= SLOW {
            self.quick_in_a_row.store(0, Ordering::Relaxed);
            self.asked_for.store((asked_for * 2).min(ROW.1), Ordering::Relaxed);
        }
    }
}

thread_local! {
    static JOBS: RefCell<VecDeque<Arc<dyn Job>>> = const { RefCell::new(VecDeque::new()) };
    /// The event loop of this thread, if it has one that runs quick jobs.
    static LOOP: RefCell<Option<Waker>> = const { RefCell::new(None) };
    /// Between two turns, wakers are kept until the loop goes on: to wake it from outside is a system call each.
    static WAKE_LATER: RefCell<Vec<Waker>> = const { RefCell::new(Vec::new()) };
    static BETWEEN_TURNS: Cell<bool> = const { Cell::new(false) };
}

/// Has the job run after this turn of the loop. Gives it back if this thread has no loop for that.
pub(super) fn run_after_turn(job: Arc<dyn Job>) -> Result<(), Arc<dyn Job>> {
    LOOP.with_borrow(|waker| match waker {
        Some(waker) => {
            JOBS.with_borrow_mut(|jobs| jobs.push_back(job));
            waker.wake_by_ref();
            Ok(())
        }
        None => Err(job),
    })
}

/// Wakes whoever waits for a response: at once, or when the loop goes on.
pub(super) fn wake(waker: Waker) {
    if BETWEEN_TURNS.get() {
        WAKE_LATER.with_borrow_mut(|wakers| wakers.push(waker));
    } else {
        waker.wake();
    }
}

/// To be polled by the event loop's main future: true if the loop should let go, for [`run_jobs`].
pub(crate) fn jobs_wait(context: &Context<'_>) -> bool {
    for waker in WAKE_LATER.take() {
        waker.wake();
    }
    LOOP.with_borrow_mut(|waker| match waker {
        Some(waker) => waker.clone_from(context.waker()),
        None => *waker = Some(context.waker().clone()),
    });
    JOBS.with_borrow(|jobs| !jobs.is_empty())
}

/// Runs the jobs that wait. Not to be called within the loop.
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
        let pace = Pace::default();
        let quick = |times| (0..times).for_each(|_| pace.took(QUICK));
        quick(31);
        pace.took(QUICK * 2);
        quick(31);
        assert!(!pace.is_quick());
        quick(1);
        assert!(pace.is_quick());
        pace.took(QUICK * 2);
        assert!(pace.is_quick(), "a little late is not slow");
        pace.took(SLOW);
        assert!(!pace.is_quick());
        quick(63);
        assert!(!pace.is_quick(), "twice as many are asked for");
        quick(1);
        assert!(pace.is_quick());
    }
}
