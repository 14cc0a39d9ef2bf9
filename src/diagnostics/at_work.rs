//! Which request each thread of this worker is at work on: read by signal handlers, by the thread that looks for slow
//! requests, and in the worker's row of the scoreboard by the master, also when the worker was killed.
//!
//! May not: lock or allocate. What is here is in the path of every request.

use std::cell::Cell;
use std::sync::OnceLock;

use forkyard_shm::{Before, Pulse, Seat};
use nix::unistd::gettid;

/// Threads that can be told apart: the event loop's, and the most that `--threads` allows.
const SEATS: usize = 1025;

/// The threads that have taken a seat, in the order of the seats' numbers.
static SEATED: [OnceLock<(i32, Seat<'static>)>; SEATS] = [const { OnceLock::new() }; SEATS];
/// Where the seats are.
static PULSE: OnceLock<Pulse> = OnceLock::new();

thread_local! {
    /// Without a destructor and made at compile time: a signal handler may read it.
    static SEAT: Cell<Option<Seat<'static>>> = const { Cell::new(None) };
}

/// Has all that is noted here noted in this row. Called once, in a new worker.
pub(crate) fn note_in(pulse: Pulse) {
    let _ = PULSE.set(pulse);
}

/// Takes note of this thread, which runs requests until the process ends.
pub(crate) fn enlist() {
    let (None, Some(pulse)) = (SEAT.get(), PULSE.get()) else { return };
    let thread = gettid().as_raw();
    let free = SEATED.iter().enumerate().filter(|(_, taken)| taken.get().is_none());
    let take = |(number, place): (usize, &OnceLock<_>)| {
        let seat = pulse.seat(number)?;
        place.set((thread, seat)).ok().map(|()| seat)
    };
    SEAT.set(free.filter_map(take).next());
}

/// The cell of the request that this thread is at work on.
pub(crate) fn current() -> Option<usize> {
    SEAT.get()?.cell()
}

/// The thread that is at work on the request in `cell`.
pub(crate) fn thread_of(cell: usize) -> Option<i32> {
    taken().find(|(_, seat)| seat.cell() == Some(cell)).map(|(thread, _)| thread)
}

/// This thread is at work on the request in `cell` while `work` runs.
pub(crate) fn on<T>(cell: Option<usize>, work: impl FnOnce() -> T) -> T {
    let Some(seat) = SEAT.get() else { return work() };
    // Put back also if `work` panics.
    let _return = Return { seat, before: seat.turn_to(cell) };
    work()
}

/// The same from here on, within [`on`].
pub(crate) fn turn_to(cell: Option<usize>) {
    if let Some(seat) = SEAT.get() {
        seat.turn_to(cell);
    }
}

/// What is in `cell` will be another request. The threads that are at work on the one that leaves it keep its text.
pub(crate) fn forget(cell: usize) {
    taken().for_each(|(_, seat)| seat.keep_text_of(cell));
}

/// This process is about to die by what this thread does: notes its request in the scoreboard, or that it has none.
/// Async-signal-safe.
pub(crate) fn accuse() {
    match (SEAT.get(), PULSE.get()) {
        (Some(seat), _) => seat.accuse(),
        (None, Some(pulse)) => pulse.accuse_nobody(),
        (None, None) => {}
    }
}

fn taken() -> impl Iterator<Item = (i32, Seat<'static>)> {
    SEATED.iter().map_while(|taken| taken.get().copied())
}

struct Return {
    seat: Seat<'static>,
    before: Before,
}

impl Drop for Return {
    fn drop(&mut self) {
        self.seat.return_to(self.before);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_is_known_by_its_request_while_it_is_at_work_on_it() {
        let plan = forkyard_shm::Plan { rows: 1, ..forkyard_shm::Plan::default() };
        let scoreboard = forkyard_shm::Segment::create(&plan).unwrap().scoreboard();
        let row = scoreboard.claim(0, 1, 1).unwrap();
        let requests: Vec<_> = (0..100).map(|number| row.begin("GET", &format!("/{number}"))).collect();
        let [first, second] = [3, 90].map(|number: usize| requests[number].cell());
        let running = || scoreboard.read(0).unwrap().running;
        note_in(row.pulse());
        let on_its_thread = || {
            assert_eq!(on(Some(first), current), None, "this thread is not known yet");
            enlist();
            enlist();
            assert_eq!(current(), None);
            on(Some(first), || {
                assert_eq!((current(), thread_of(first)), (Some(first), Some(gettid().as_raw())));
                on(Some(second), || {
                    assert_eq!((current(), thread_of(first)), (Some(second), None));
                    assert_eq!(running(), ["GET /90"]);
                });
                let panicked = std::panic::catch_unwind(|| on(None, || panic!("asked to")));
                assert!(panicked.is_err() && current() == Some(first));
            });
            assert_eq!((current(), thread_of(first)), (None, None));
            on(None, || {
                turn_to(Some(first));
                assert_eq!(current(), Some(first));
                forget(first);
                assert_eq!((current(), running()), (None, vec!["GET /3".to_owned()]));
            });
            assert_eq!(running(), [""; 0]);
        };
        std::thread::scope(|scope| scope.spawn(on_its_thread).join().unwrap());
    }
}
