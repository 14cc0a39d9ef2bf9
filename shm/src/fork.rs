//! What a child of fork(2) has to forget: it inherits the memory of a process that holds things in its own name.
//!
//! A handler registered with pthread_atfork(3) runs in each child. It counts up [`generation`], by which everything claimed
//! before is known to be the parent's, and closes the descriptors by whose locks the parent is known to live:
//! otherwise a parent would seem to be alive as long as one of its children is.
#![expect(unsafe_code, reason = "pthread_atfork")]

use std::os::fd::{BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};
use std::sync::Once;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, Ordering};

/// Segments that one process may be a member of at the same time.
const MOST: usize = 256;
const NONE: i32 = -1;

static GENERATION: AtomicU32 = AtomicU32::new(1);
static DESCRIPTORS: [AtomicI32; MOST] = [const { AtomicI32::new(NONE) }; MOST];
static REGISTERED: Once = Once::new();
static WORKS: AtomicBool = AtomicBool::new(false);

/// Another number in each process of a line of forks; never 0.
pub(crate) fn generation() -> u32 {
    GENERATION.load(Ordering::Relaxed)
}

/// A descriptor that children do not get. Not closed on drop, but by [`Private::close`], as it does not know whether this
/// is still the process that opened it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Private(pub(crate) u32);

impl Private {
    /// Takes a descriptor over; `None` if there are too many already, or no handler can be registered.
    pub(crate) fn new(fd: OwnedFd) -> Option<Private> {
        REGISTERED.call_once(|| {
            WORKS.store(watch_forks(), Ordering::Relaxed);
        });
        if !WORKS.load(Ordering::Relaxed) {
            return None;
        }
        let raw = fd.into_raw_fd();
        let free = |place: &AtomicI32| place.compare_exchange(NONE, raw, Ordering::AcqRel, Ordering::Relaxed).is_ok();
        let place = DESCRIPTORS.iter().position(free);
        if place.is_none() {
            // SAFETY: taken out of an `OwnedFd` above, and kept nowhere.
            drop(unsafe { OwnedFd::from_raw_fd(raw) });
        }
        place.and_then(|place| u32::try_from(place).ok()).map(Private)
    }

    /// The descriptor, in the process that opened it, and until it is closed.
    pub(crate) fn get<'a>(self) -> Option<BorrowedFd<'a>> {
        let raw = DESCRIPTORS.get(self.0 as usize)?.load(Ordering::Acquire);
        // SAFETY: what is in the list is open, as it is taken from the list before it is closed; the caller (`member.rs`)
        // closes it in `drop` only, when nobody can have borrowed it any more.
        (raw != NONE).then(|| unsafe { BorrowedFd::borrow_raw(raw) })
    }

    /// Closes the descriptor, by the process that opened it.
    pub(crate) fn close(self) {
        let raw = DESCRIPTORS.get(self.0 as usize).map_or(NONE, |place| place.swap(NONE, Ordering::AcqRel));
        if raw != NONE {
            // SAFETY: it was put into the list out of an `OwnedFd`, and this has just taken it from there.
            drop(unsafe { OwnedFd::from_raw_fd(raw) });
        }
    }
}

/// Has every child of fork forget what is its parent's; whether that worked.
#[cfg(not(miri))]
fn watch_forks() -> bool {
    // SAFETY: the handler touches static atomics and calls close(2): all of it async-signal-safe.
    unsafe { libc::pthread_atfork(None, None, Some(in_child)) == 0 }
}

/// Miri knows no fork.
#[cfg(miri)]
fn watch_forks() -> bool {
    let _ = in_child;
    true
}

extern "C" fn in_child() {
    GENERATION.fetch_add(1, Ordering::Relaxed);
    (0..).take(MOST).for_each(|place| Private(place).close());
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use super::*;

    #[test]
    fn keeps_and_closes() {
        let fd = OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        let raw = fd.as_raw_fd();
        let private = Private::new(fd).unwrap();
        assert_eq!(private.get().unwrap().as_raw_fd(), raw);
        private.close();
        assert!(generation() > 0);
    }
}
