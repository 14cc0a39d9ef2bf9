//! The protocol of a lock in shared memory, which is one word that contains its owner.
//!
//! ```text
//! 0 = free | bits 0..16 owner (member + 1) | bit 30 the last owner died holding it | bit 31 a process waits
//! ```
//! A robust pthread mutex would provide the same with the kernel's help, but it keeps pointers of the C library in shared memory. A process
//! that overwrites these pointers crashes the holder of the lock, and no model checker can run the mutex. With the lock in this file, an
//! overwritten word usually names a member that does not exist, and such a member counts as dead. If it happens to name a live member,
//! other processes cannot take the lock until that member exits.
//!
//! Only the kernel can determine whether an owner is dead: see `memory/members.rs`. A process that finds a dead owner marks the owner's
//! locks with [`mark_dead`]. The next process that takes such a lock receives [`Taken::FromTheDead`] and repairs what the lock protects.
//!
//! Must not wait, make system calls, or depend on what the lock protects.

use super::sync::{AtomicU32, Ordering};

const OWNER: u32 = 0xffff;
const DIED: u32 = 1 << 30;
const WAITED_FOR: u32 = 1 << 31;

/// The result of an attempt to take a lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Taken {
    /// This process holds the lock.
    Free,
    /// This process holds the lock, and the last owner died while holding it.
    FromTheDead,
    /// This member holds the lock. Wait for the word to change.
    No { owner: u32, word: u32 },
}

/// Makes one attempt to take the lock. With `waiting`, a later release of the lock wakes a waiting process; `waiting` must be set after a
/// wait, because other processes may still be waiting.
pub(crate) fn take(lock: &AtomicU32, me: u32, waiting: bool) -> Taken {
    let mine = (me + 1) & OWNER | if waiting { WAITED_FOR } else { 0 };
    let mut seen = lock.load(Ordering::Relaxed);
    while seen & OWNER == 0 {
        let kept = seen & WAITED_FOR;
        match lock.compare_exchange_weak(seen, mine | kept, Ordering::Acquire, Ordering::Relaxed) {
            Ok(_) if seen & DIED != 0 => return Taken::FromTheDead,
            Ok(_) => return Taken::Free,
            Err(now) => seen = now,
        }
    }
    Taken::No { owner: (seen & OWNER) - 1, word: seen }
}

/// Requests to be woken when the lock is released. Returns the word to wait on, or `None` if the lock no longer contains `word`.
pub(crate) fn announce(lock: &AtomicU32, word: u32) -> Option<u32> {
    if word & WAITED_FOR != 0 {
        return Some(word);
    }
    let announced = word | WAITED_FOR;
    lock.compare_exchange(word, announced, Ordering::Relaxed, Ordering::Relaxed).ok().map(|_| announced)
}

/// Releases a lock that the caller owns. Returns whether a process must be woken.
pub(crate) fn release(lock: &AtomicU32) -> bool {
    lock.swap(0, Ordering::Release) & WAITED_FOR != 0
}

/// Frees a lock if this dead member holds it. Returns whether a process must be woken.
pub(crate) fn mark_dead(lock: &AtomicU32, member: u32) -> bool {
    // An overwritten word may name a member number that no process can have.
    let owner = member.wrapping_add(1) & OWNER;
    let mut seen = lock.load(Ordering::Relaxed);
    while owner != 0 && seen & OWNER == owner {
        match lock.compare_exchange_weak(seen, DIED, Ordering::AcqRel, Ordering::Relaxed) {
            Ok(_) => return seen & WAITED_FOR != 0,
            Err(now) => seen = now,
        }
    }
    false
}

/// Frees a lock that can no longer have an owner. If it was held, the next process that takes it receives [`Taken::FromTheDead`].
pub(crate) fn bequeath(lock: &AtomicU32) {
    let left = if lock.load(Ordering::Relaxed) & (OWNER | DIED) == 0 { 0 } else { DIED };
    lock.store(left, Ordering::Release);
}
