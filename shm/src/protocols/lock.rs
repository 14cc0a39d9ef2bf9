//! The protocol of the shard lock: one word that names its owner.
//!
//! ```text
//! 0 = free | bits 0..16 owner (member + 1) | bit 30 the last owner died holding it | bit 31 somebody waits
//! ```
//! A robust pthread mutex would do the same with the kernel's help, but keeps pointers of the C library in shared memory: a
//! process that scribbles over them crashes the one that holds the lock, and no model checker can follow it. Here a
//! scribbled word names a member that is not there, which counts as dead, or by bad luck one that lives, which keeps others
//! from taking the lock until that one ends.
//!
//! Whether an owner is dead only the kernel knows: see `member.rs`. Whoever finds a dead one marks its locks with
//! [`mark_dead`]; the next to take such a lock is told, and repairs what the lock protects.
//!
//! May not: wait, make system calls, or know what is protected.

use super::sync::{AtomicU32, Ordering};

const OWNER: u32 = 0xffff;
const DIED: u32 = 1 << 30;
const WAITED_FOR: u32 = 1 << 31;

/// What came of a try to take a lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Taken {
    /// It is ours.
    Free,
    /// It is ours, and the last owner died holding it.
    FromTheDead,
    /// It is this member's. The word is what to wait on until it changes.
    No { owner: u32, word: u32 },
}

/// One try. With `waiting`, the lock's release will wake somebody; to be set by one who waited, and so may not be alone.
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

/// Asks to be woken when a lock is released; what to wait on, or `None` if it has changed meanwhile.
pub(crate) fn announce(lock: &AtomicU32, word: u32) -> Option<u32> {
    if word & WAITED_FOR != 0 {
        return Some(word);
    }
    let announced = word | WAITED_FOR;
    lock.compare_exchange(word, announced, Ordering::Relaxed, Ordering::Relaxed).ok().map(|_| announced)
}

/// Gives a lock back, by its owner; whether somebody is to be woken.
pub(crate) fn release(lock: &AtomicU32) -> bool {
    lock.swap(0, Ordering::Release) & WAITED_FOR != 0
}

/// Frees a lock if this member holds it, who is dead; whether somebody is to be woken.
pub(crate) fn mark_dead(lock: &AtomicU32, member: u32) -> bool {
    // Nobody can be the member that a scribbled word names.
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

/// Frees a lock of which nobody can be the owner any more; whoever takes it next is told if it was held.
pub(crate) fn bequeath(lock: &AtomicU32) {
    let left = if lock.load(Ordering::Relaxed) & (OWNER | DIED) == 0 { 0 } else { DIED };
    lock.store(left, Ordering::Release);
}
