//! The shard lock: a robust, process-shared mutex whose waits are bounded.
//!
//! A process may die at any instruction while holding it. The kernel then marks the mutex, and the next one to take it
//! learns of the death ([`Guard::owner_died`]); nobody waits for a dead process, and no third party has to clean up.
//! A process may also be *stopped* while holding it. That is no death, so waiting is bounded: [`PATIENCE`], then the
//! caller does without the cache.
//!
//! The wait is try, spin, yield, then short sleeps, instead of a timed lock: `pthread_mutex_timedlock` counts on the
//! wall clock, which may jump, and the monotonic variant is not to be had everywhere.
//!
//! May not: know what the lock protects.
#![expect(unsafe_code, reason = "the fence around the pthread mutex")]

use std::cell::UnsafeCell;
use std::io;
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::time::{Duration, Instant};

use crossbeam::utils::Backoff;

use crate::map::Plain;

/// The longest wait for a lock.
pub(crate) const PATIENCE: Duration = Duration::from_millis(20);

/// The first sleep between two tries; doubled each time up to [`LONGEST_NAP`].
const FIRST_NAP: Duration = Duration::from_micros(20);
const LONGEST_NAP: Duration = Duration::from_micros(640);

/// A mutex inside the segment. All-zero bytes are not yet a lock: see [`RobustMutex::init`].
#[repr(C, align(64))]
#[derive(Debug)]
pub(crate) struct RobustMutex {
    raw: UnsafeCell<[u64; 8]>,
}

const _: () = assert!(size_of::<libc::pthread_mutex_t>() <= 64);
const _: () = assert!(align_of::<libc::pthread_mutex_t>() <= 64);

// SAFETY: the only field is an `UnsafeCell` of integers, so any bytes may be looked at as one. What the C library makes
// of the bytes is another matter: a held robust mutex is linked into a list of its owner through pointers kept in it.
// That is sound while every process goes through this file, *also* if it dies at any point; a process that scribbles
// over the lock itself can crash the one holding it. The crate documentation says so under "Whom this trusts".
unsafe impl Plain for RobustMutex {}
// SAFETY: a pthread mutex is made to be used by several threads; the bytes are touched by the C library only.
unsafe impl Sync for RobustMutex {}

/// How hard to try.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wait {
    /// Take it if it is free.
    Never,
    /// Wait up to [`PATIENCE`].
    Bounded,
}

/// The lock was not to be had: held for too long by somebody, or its memory is spoilt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NotLocked;

/// The held lock; dropping it unlocks. Stays on the thread that took it.
#[derive(Debug)]
pub(crate) struct Guard<'a> {
    lock: &'a RobustMutex,
    /// The previous owner died while holding the lock.
    pub(crate) owner_died: bool,
    not_send: PhantomData<*const ()>,
}

impl RobustMutex {
    /// Makes the lock usable. Only for the creator of a segment, before any other process can see it.
    pub(crate) fn init(&self) -> io::Result<()> {
        let mut attributes = MaybeUninit::<libc::pthread_mutexattr_t>::uninit();
        let attributes = attributes.as_mut_ptr();
        // SAFETY: the pointer is to memory for one attributes object, which this call initialises.
        checked(unsafe { libc::pthread_mutexattr_init(attributes) })?;
        // SAFETY: `attributes` was initialised above.
        let shared = checked(unsafe { libc::pthread_mutexattr_setpshared(attributes, libc::PTHREAD_PROCESS_SHARED) });
        // SAFETY: as above.
        let robust = checked(unsafe { libc::pthread_mutexattr_setrobust(attributes, libc::PTHREAD_MUTEX_ROBUST) });
        // SAFETY: the memory is big and aligned enough (asserted above), and, as the caller promises, nobody uses it.
        let made = checked(unsafe { libc::pthread_mutex_init(self.raw(), attributes) });
        // SAFETY: initialised above, and not used afterwards.
        let freed = checked(unsafe { libc::pthread_mutexattr_destroy(attributes) });
        shared.and(robust).and(made).and(freed)
    }

    /// Takes the lock, waiting as long as `wait` says.
    pub(crate) fn lock(&self, wait: Wait) -> Result<Guard<'_>, NotLocked> {
        let backoff = Backoff::new();
        let mut deadline = None;
        let mut nap = FIRST_NAP;
        loop {
            if let Some(guard) = self.attempt()? {
                return Ok(guard);
            }
            if wait == Wait::Never {
                return Err(NotLocked);
            }
            if !backoff.is_completed() {
                backoff.snooze();
                continue;
            }
            let now = Instant::now();
            if now >= *deadline.get_or_insert(now + PATIENCE) {
                return Err(NotLocked);
            }
            std::thread::sleep(nap);
            nap = LONGEST_NAP.min(nap * 2);
        }
    }

    /// One try: `None` if somebody holds the lock.
    fn attempt(&self) -> Result<Option<Guard<'_>>, NotLocked> {
        // SAFETY: the creator initialised the mutex before anybody could attach, and the mapping outlives `self`.
        let owner_died = match unsafe { libc::pthread_mutex_trylock(self.raw()) } {
            0 => false,
            libc::EOWNERDEAD => true,
            libc::EBUSY => return Ok(None),
            _ => return Err(NotLocked),
        };
        let guard = Guard { lock: self, owner_died, not_send: PhantomData };
        if owner_died {
            // Done at once, before any repair: should we die too, the kernel marks the mutex again, and what needs
            // repair is told by the shard's own `dirty` word, not by the mutex.
            // SAFETY: this thread has just acquired the mutex in the "owner died" state.
            checked(unsafe { libc::pthread_mutex_consistent(self.raw()) }).map_err(|_| NotLocked)?;
        }
        Ok(Some(guard))
    }

    fn raw(&self) -> *mut libc::pthread_mutex_t {
        self.raw.get().cast()
    }
}

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        // SAFETY: a guard exists only on the thread that acquired the mutex (it is not `Send`), and unlocks it once.
        unsafe { libc::pthread_mutex_unlock(self.lock.raw()) };
    }
}

/// Turns the error number that pthread functions return into a `Result`.
fn checked(errno: libc::c_int) -> io::Result<()> {
    if errno == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(errno)) }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;
    use crate::map::tests::scratch;

    #[test]
    fn excludes_and_gives_up() {
        let map = scratch(4096);
        let lock = map.at::<RobustMutex>(0).unwrap();
        lock.init().unwrap();
        let held = lock.lock(Wait::Bounded).unwrap();
        assert!(!held.owner_died);
        std::thread::scope(|scope| {
            let other = scope.spawn(|| (lock.lock(Wait::Never).err(), lock.lock(Wait::Bounded).err()));
            assert_eq!(other.join().unwrap(), (Some(NotLocked), Some(NotLocked)));
        });
        drop(held);
        assert!(lock.lock(Wait::Never).is_ok());
    }

    #[test]
    fn tells_of_a_dead_owner_once() {
        let map = scratch(4096);
        let lock = map.at::<RobustMutex>(64).unwrap();
        lock.init().unwrap();
        // To the kernel a thread that ends with the lock held is what a killed process is.
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let _ = std::mem::ManuallyDrop::new(lock.lock(Wait::Bounded).unwrap());
            });
        });
        // The scope returns when the closure is done; the thread itself may need a moment more to be gone.
        let guard = loop {
            if let Ok(guard) = lock.lock(Wait::Bounded) {
                break guard;
            }
        };
        assert!(guard.owner_died);
        drop(guard);
        assert!(!lock.lock(Wait::Never).unwrap().owner_died);
    }

    #[test]
    fn serialises_threads() {
        let map = scratch(4096);
        let lock = map.at::<RobustMutex>(0).unwrap();
        lock.init().unwrap();
        let count = map.at::<AtomicU64>(512).unwrap();
        let taken: u64 = std::thread::scope(|scope| {
            let run = || (0..20_000).filter(|_| bump(lock, count)).count() as u64;
            let others = [scope.spawn(run), scope.spawn(run), scope.spawn(run)];
            others.map(|thread| thread.join().unwrap()).iter().sum()
        });
        assert_eq!(count.load(Ordering::Relaxed), taken);
        assert!(taken > 0);
    }

    /// Adds one in two steps, so that a lock that does not exclude loses some.
    fn bump(lock: &RobustMutex, count: &AtomicU64) -> bool {
        let Ok(_guard) = lock.lock(Wait::Bounded) else { return false };
        let seen = count.load(Ordering::Relaxed);
        std::hint::spin_loop();
        count.store(seen + 1, Ordering::Relaxed);
        true
    }
}
