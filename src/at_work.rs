//! Which request each thread of this worker is at work on: read by signal handlers, and by the thread that looks for
//! slow requests.
//!
//! May not: lock or allocate. What is here is in the path of every request.

use std::cell::Cell;
use std::sync::atomic::{AtomicI32, AtomicUsize, Ordering};

use nix::unistd::gettid;

/// Threads that can be told apart: the event loop's, and the most that `--threads` allows.
const SEATS: usize = 1025;

/// A thread, and the scoreboard's cell of its request.
struct Seat {
    thread: AtomicI32,
    /// Plus one; 0 is none.
    cell: AtomicUsize,
}

static SEATED: [Seat; SEATS] = [const { Seat { thread: AtomicI32::new(0), cell: AtomicUsize::new(0) } }; SEATS];

thread_local! {
    /// Without a destructor and made at compile time: a signal handler may read it.
    static SEAT: Cell<Option<&'static Seat>> = const { Cell::new(None) };
}

/// Takes note of this thread, which runs requests until the process ends.
pub(crate) fn enlist() {
    let thread = gettid().as_raw();
    let take = |seat: &&Seat| seat.thread.compare_exchange(0, thread, Ordering::Relaxed, Ordering::Relaxed).is_ok();
    if SEAT.get().is_none() {
        SEAT.set(SEATED.iter().find(take));
    }
}

/// The cell of the request that this thread is at work on. Async-signal-safe.
pub(crate) fn current() -> Option<usize> {
    SEAT.get()?.cell.load(Ordering::Relaxed).checked_sub(1)
}

/// The thread that is at work on the request in `cell`.
pub(crate) fn thread_of(cell: usize) -> Option<i32> {
    let of_cell = |seat: &&Seat| seat.cell.load(Ordering::Relaxed) == cell + 1;
    SEATED.iter().take_while(|seat| seat.number() != 0).find(of_cell).map(Seat::number)
}

/// This thread is at work on the request in `cell` while `work` runs.
pub(crate) fn on<T>(cell: Option<usize>, work: impl FnOnce() -> T) -> T {
    let Some(seat) = SEAT.get() else { return work() };
    // Put back also if `work` panics.
    let _before = Before { seat, cell: seat.cell.swap(cell.map_or(0, |cell| cell + 1), Ordering::Relaxed) };
    work()
}

/// The same from here on, within [`on`].
pub(crate) fn turn_to(cell: Option<usize>) {
    if let Some(seat) = SEAT.get() {
        seat.cell.store(cell.map_or(0, |cell| cell + 1), Ordering::Relaxed);
    }
}

/// What is in `cell` will be another request, and the threads that are at work on it are so for nobody.
pub(crate) fn forget(cell: usize) {
    for seat in SEATED.iter().take_while(|seat| seat.number() != 0) {
        let _ = seat.cell.compare_exchange(cell + 1, 0, Ordering::Relaxed, Ordering::Relaxed);
    }
}

struct Before {
    seat: &'static Seat,
    cell: usize,
}

impl Drop for Before {
    fn drop(&mut self) {
        self.seat.cell.store(self.cell, Ordering::Relaxed);
    }
}

impl Seat {
    fn number(&self) -> i32 {
        self.thread.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_is_known_by_its_request_while_it_is_at_work_on_it() {
        std::thread::spawn(|| {
            assert_eq!(on(Some(7000), current), None, "this thread is not known yet");
            enlist();
            enlist();
            assert_eq!(current(), None);
            on(Some(7000), || {
                assert_eq!((current(), thread_of(7000)), (Some(7000), Some(gettid().as_raw())));
                on(Some(7001), || assert_eq!((current(), thread_of(7000)), (Some(7001), None)));
                let panicked = std::panic::catch_unwind(|| on(None, || panic!("asked to")));
                assert!(panicked.is_err() && current() == Some(7000));
            });
            assert_eq!((current(), thread_of(7000)), (None, None));
            on(None, || {
                turn_to(Some(7002));
                assert_eq!(current(), Some(7002));
                forget(7002);
                assert_eq!(current(), None);
            });
        })
        .join()
        .unwrap();
    }
}
