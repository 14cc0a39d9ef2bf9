//! Records which request each thread of this worker is running. The records are read by signal handlers, by the thread
//! that looks for slow requests, and by the master, which can read the worker's row in the scoreboard even after the
//! worker has been killed.
//!
//! Must not lock or allocate: this code is in the path of every request.

use std::cell::Cell;
use std::sync::OnceLock;

use forkyard_shm::{Before, EventLoopBeat, ThreadSlot};
use nix::unistd::gettid;

/// The maximum number of registered threads: the event loop's thread, and the maximum of `--threads`.
const MAX_THREADS: usize = 1025;

/// The threads that have taken a slot, indexed by the number of the slot.
static REGISTERED: [OnceLock<(i32, ThreadSlot<'static>)>; MAX_THREADS] = [const { OnceLock::new() }; MAX_THREADS];
/// The row that contains the thread slots.
static BEAT: OnceLock<EventLoopBeat> = OnceLock::new();

thread_local! {
    /// Has no destructor and is initialized at compile time, because a signal handler may read it.
    static THREAD_SLOT: Cell<Option<ThreadSlot<'static>>> = const { Cell::new(None) };
}

/// Sets the row in which requests are recorded. Called once, in a new worker.
pub(crate) fn note_in(beat: EventLoopBeat) {
    let _ = BEAT.set(beat);
}

/// Registers this thread, which runs requests until the process ends.
pub(crate) fn register_thread() {
    let (None, Some(beat)) = (THREAD_SLOT.get(), BEAT.get()) else { return };
    let thread = gettid().as_raw();
    let free = REGISTERED.iter().enumerate().filter(|(_, taken)| taken.get().is_none());
    let take = |(number, place): (usize, &OnceLock<_>)| {
        let slot = beat.thread_slot(number)?;
        place.set((thread, slot)).ok().map(|()| slot)
    };
    THREAD_SLOT.set(free.filter_map(take).next());
}

/// Returns the cell of the request that this thread is running.
pub(crate) fn current() -> Option<usize> {
    THREAD_SLOT.get()?.cell()
}

/// Returns the thread that is running the request in `cell`.
pub(crate) fn thread_of(cell: usize) -> Option<i32> {
    taken().find(|(_, slot)| slot.cell() == Some(cell)).map(|(thread, _)| thread)
}

/// Records that this thread runs the request in `cell` while `work` runs.
pub(crate) fn enter<T>(cell: Option<usize>, work: impl FnOnce() -> T) -> T {
    let Some(slot) = THREAD_SLOT.get() else { return work() };
    // The previous request is restored even if `work` panics.
    let _return = Return { slot, before: slot.switch_to(cell) };
    work()
}

/// Changes this thread's request from here on, within [`enter`].
pub(crate) fn switch_to(cell: Option<usize>) {
    if let Some(slot) = THREAD_SLOT.get() {
        slot.switch_to(cell);
    }
}

/// Prepares for the reuse of `cell` by another request. Threads that are still running the previous request keep a copy
/// of its text.
pub(crate) fn forget(cell: usize) {
    taken().for_each(|(_, slot)| slot.keep_text_of(cell));
}

/// Records that this process is about to die because of this thread: stores the thread's request in the scoreboard, or
/// the fact that the thread has no request. Async-signal-safe.
pub(crate) fn accuse() {
    match (THREAD_SLOT.get(), BEAT.get()) {
        (Some(slot), _) => slot.accuse(),
        (None, Some(beat)) => beat.accuse_no_request(),
        (None, None) => {}
    }
}

fn taken() -> impl Iterator<Item = (i32, ThreadSlot<'static>)> {
    REGISTERED.iter().map_while(|taken| taken.get().copied())
}

struct Return {
    slot: ThreadSlot<'static>,
    before: Before,
}

impl Drop for Return {
    fn drop(&mut self) {
        self.slot.return_to(self.before);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_is_found_by_the_request_that_it_runs() {
        let plan = forkyard_shm::Plan { rows: 1, ..forkyard_shm::Plan::default() };
        let scoreboard = forkyard_shm::Segment::create(&plan).unwrap().scoreboard();
        let row = scoreboard.claim(0, 1, 1).unwrap();
        let requests: Vec<_> = (0..100).map(|number| row.begin("GET", &format!("/{number}"))).collect();
        let [first, second] = [3, 90].map(|number: usize| requests[number].cell());
        let running = || scoreboard.read(0).unwrap().running;
        note_in(row.event_loop_beat());
        let on_its_thread = || {
            assert_eq!(enter(Some(first), current), None, "this thread is not registered yet");
            register_thread();
            register_thread();
            assert_eq!(current(), None);
            enter(Some(first), || {
                assert_eq!((current(), thread_of(first)), (Some(first), Some(gettid().as_raw())));
                enter(Some(second), || {
                    assert_eq!((current(), thread_of(first)), (Some(second), None));
                    assert_eq!(running(), ["GET /90"]);
                });
                let panicked = std::panic::catch_unwind(|| enter(None, || panic!("intended")));
                assert!(panicked.is_err() && current() == Some(first));
            });
            assert_eq!((current(), thread_of(first)), (None, None));
            enter(None, || {
                switch_to(Some(first));
                assert_eq!(current(), Some(first));
                forget(first);
                assert_eq!((current(), running()), (None, vec!["GET /3".to_owned()]));
            });
            assert_eq!(running(), [""; 0]);
        };
        std::thread::scope(|scope| scope.spawn(on_its_thread).join().unwrap());
    }
}
