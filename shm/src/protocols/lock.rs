//! The protocol of a lock in shared memory: one word that contains its owner.
//!
//! ```text
//! 0 = free | bits 0..16 owner (member + 1) | bit 30 the last owner died holding it | bit 31 a process waits
//! ```
//! A robust pthread mutex would do the same with the kernel's help, but it keeps pointers of the C library in shared memory: a process
//! that overwrites them crashes the holder of the lock, and no model checker can run it. Here, an overwritten word names a member that
//! does not exist, which counts as dead; or, by bad luck, a live member, which prevents others from taking the lock until that member
//! exits.
//!
//! Only the kernel can decide whether an owner is dead: see `memory/members.rs`. A process that finds a dead owner marks its locks with
//! [`mark_dead`]. The next process that takes such a lock gets [`Taken::FromTheDead`], and repairs what the lock protects.
//!
//! Must not wait, make system calls, or depend on what is protected.

use super::sync::{AtomicU32, Ordering};

const OWNER: u32 = 0xffff;
const DIED: u32 = 1 << 30;
const WAITED_FOR: u32 = 1 << 31;

/// The result of an attempt to take a lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Taken {
    /// This process holds the lock.
    Free,
    /// This process holds the lock, and the last owner died holding it.
    FromTheDead,
    /// This member holds the lock. Wait for the word to change.
    No { owner: u32, word: u32 },
}

/// Makes one attempt. With `waiting`, releasing the lock wakes a waiting process; must be set after a wait, because others may still
/// wait.
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

/// Requests to be woken when the lock is released. Returns the word to wait on, or `None` if it has changed meanwhile.
pub(crate) fn announce(lock: &AtomicU32, word: u32) -> Option<u32> {
    if word & WAITED_FOR != 0 {
        return Some(word);
    }
    let announced = word | WAITED_FOR;
    lock.compare_exchange(word, announced, Ordering::Relaxed, Ordering::Relaxed).ok().map(|_| announced)
}

/// Releases a lock that the caller owns; returns whether a process must be woken.
pub(crate) fn release(lock: &AtomicU32) -> bool {
    lock.swap(0, Ordering::Release) & WAITED_FOR != 0
}

/// Frees a lock if this dead member holds it; returns whether a process must be woken.
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

/// Frees a lock that can no longer have an owner. If it was held, the next process that takes it gets
/// [`Taken::FromTheDead`].
pub(crate) fn bequeath(lock: &AtomicU32) {
    let left = if lock.load(Ordering::Relaxed) & (OWNER | DIED) == 0 { 0 } else { DIED };
    lock.store(left, Ordering::Release);
}
