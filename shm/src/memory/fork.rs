//! Makes a forked child drop what belongs to its parent. This is necessary because the child inherits the memory of a process that holds
//! locks.
//!
//! A handler registered with pthread_atfork(3) runs in each child. It increments [`generation`], so that everything claimed before the fork
//! is recognized as belonging to the parent. It also closes the descriptors whose locks show that the parent is alive. Otherwise the parent
//! would seem to be alive as long as any of its children.
#![expect(unsafe_code, reason = "pthread_atfork")]

use std::os::fd::{BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, Ordering};

/// Maximum number of segments that one process can be a member of at the same time.
const MOST: usize = 256;
const NONE: i32 = -1;

static GENERATION: AtomicU32 = AtomicU32::new(1);
static DESCRIPTORS: [AtomicI32; MOST] = [const { AtomicI32::new(NONE) }; MOST];
/// Held while a descriptor is opened and listed, while it is unlisted and closed, and during a fork, so that no child has a
/// descriptor that is not in the list.
static LISTING: AtomicBool = AtomicBool::new(false);
/// Whether the thread that forks holds [`LISTING`].
static FORKING: AtomicBool = AtomicBool::new(false);
/// Maximum number of iterations of a spin loop. This many iterations take a few tenths of a second.
const MAX_SPINS: u32 = 10_000_000;
/// The registration of the handlers: not yet attempted, in progress, or its result.
static REGISTERED: AtomicU32 = AtomicU32::new(NOT_YET);

const NOT_YET: u32 = 0;
const UNDER_WAY: u32 = 1;
const WORKS: u32 = 2;
const FAILED: u32 = 3;

/// Returns the fork generation: a number that differs in each process of a chain of forks and is never 0.
#[inline]
pub(crate) fn generation() -> u32 {
    GENERATION.load(Ordering::Relaxed)
}

/// Registers the handlers, once for a process and its children. Called when a segment is created or attached, because the process usually
/// has few threads then.
pub(crate) fn watch() {
    if REGISTERED.compare_exchange(NOT_YET, UNDER_WAY, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
        REGISTERED.store(if register() { WORKS } else { FAILED }, Ordering::Release);
    }
}

/// A descriptor that is closed in forked children. It is closed by [`Private::close`] rather than on drop, because a drop may run in a
/// child of the process that opened it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Private(pub(crate) u32);

impl Private {
    /// Opens a descriptor. Returns `None` if that fails, if there are too many descriptors already, or if the handlers cannot be
    /// registered.
    pub(crate) fn open(open: impl FnOnce() -> Option<OwnedFd>) -> Option<Private> {
        watch();
        if REGISTERED.load(Ordering::Acquire) != WORKS {
            return None;
        }
        begin_listing();
        let private = open().and_then(Private::list);
        end_listing();
        private
    }

    fn list(fd: OwnedFd) -> Option<Private> {
        let raw = fd.into_raw_fd();
        let free = |place: &AtomicI32| place.compare_exchange(NONE, raw, Ordering::AcqRel, Ordering::Relaxed).is_ok();
        let place = DESCRIPTORS.iter().position(free);
        if place.is_none() {
            // SAFETY: taken out of an `OwnedFd` above, and stored nowhere else.
            drop(unsafe { OwnedFd::from_raw_fd(raw) });
        }
        place.and_then(|place| u32::try_from(place).ok()).map(Private)
    }

    /// Returns the descriptor, if this process opened it and has not closed it.
    pub(crate) fn get<'a>(self) -> Option<BorrowedFd<'a>> {
        let raw = DESCRIPTORS.get(self.0 as usize)?.load(Ordering::Acquire);
        // SAFETY: a descriptor in the list is open, because it is removed from the list before it is closed; the caller (`members.rs`)
        // closes it only in `drop`, when no borrow of it can exist any more.
        (raw != NONE).then(|| unsafe { BorrowedFd::borrow_raw(raw) })
    }

    /// Closes the descriptor, if this process opened it.
    pub(crate) fn close(self) {
        begin_listing();
        self.close_listed();
        end_listing();
    }

    fn close_listed(self) {
        let raw = DESCRIPTORS.get(self.0 as usize).map_or(NONE, |place| place.swap(NONE, Ordering::AcqRel));
        if raw != NONE {
            // SAFETY: it was taken from an `OwnedFd` into the list, and has just been removed from the list.
            drop(unsafe { OwnedFd::from_raw_fd(raw) });
        }
    }
}

/// Acquires the list, by spinning, because the list is held for one or two system calls only. The list is private to the process, so its
/// holder cannot die alone.
fn begin_listing() {
    while LISTING.compare_exchange_weak(false, true, Ordering::Acquire, Ordering::Relaxed).is_err() {
        std::hint::spin_loop();
    }
}

fn end_listing() {
    LISTING.store(false, Ordering::Release);
}

/// Registers the fork handlers. Returns whether that succeeded.
#[cfg(not(miri))]
fn register() -> bool {
    // SAFETY: the handlers only access static atomics and call close(2), which is async-signal-safe.
    unsafe { libc::pthread_atfork(Some(before_fork), Some(in_parent), Some(in_child)) == 0 }
}

/// Registers nothing, because Miri does not support fork.
#[cfg(miri)]
fn register() -> bool {
    let _ = (before_fork, in_parent, in_child);
    true
}

extern "C" fn before_fork() {
    // A signal handler may fork while its own thread holds the list, and the fork must not wait forever. The only risk of continuing
    // without the list is a child that keeps a descriptor.
    let free = |_: &u32| {
        std::hint::spin_loop();
        LISTING.compare_exchange_weak(false, true, Ordering::Acquire, Ordering::Relaxed).is_ok()
    };
    FORKING.store((0..MAX_SPINS).any(|turn| free(&turn)), Ordering::Relaxed);
}

extern "C" fn in_parent() {
    if FORKING.swap(false, Ordering::Relaxed) {
        end_listing();
    }
}

extern "C" fn in_child() {
    GENERATION.fetch_add(1, Ordering::Relaxed);
    (0..).take(MOST).for_each(|place| Private(place).close_listed());
    end_listing();
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use super::*;

    #[test]
    fn keeps_and_closes() {
        let fd = OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        let raw = fd.as_raw_fd();
        let private = Private::open(|| Some(fd)).unwrap();
        assert_eq!(private.get().unwrap().as_raw_fd(), raw);
        private.close();
        assert!(generation() > 0);
    }
}
