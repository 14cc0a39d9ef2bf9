//! The protocol of a lease: the right to render a page, which one process at a time has.
//!
//! ```text
//! 0 = free | bits 0..32 deadline, in ms of the segment's clock, wrapped | 15 bits member + 1 | 17 bits tag of the key
//! ```
//! The whole lease is one word, so it is taken, given back and taken over in one step each. It ends in one of four ways: the
//! holder stores the page or gives up ([`release`]), dies ([`take_from`], by whoever buries it), or lets its deadline
//! pass, upon which the next one may [`take`] it over; the late holder finds that it is [`is_held`] no more, and what
//! it rendered is not stored in the place of something newer.
//!
//! Two keys may share a cell; the tag tells them apart (17 bits besides those that chose the cell). Who finds the cell
//! taken for another key renders without a lease, as one who waited would wait for the wrong page.
//!
//! Who waits counts itself ([`enter`]), then looks whether the lease is still held, and sleeps on the *turn*, which goes up
//! each time a lease ends. Who ends one raises the turn, then looks whether anybody is counted ([`end_turn`]).
//! With a full fence between the two steps on both sides nobody sleeps through the end of what it waits for.
//!
//! A page that cannot be stored has no use for a lease: those who waited would get nothing. So such a key is marked
//! ([`set_pass`]) for a while, in which whoever finds its lease taken does not wait.
//!
//! May not: wait, make system calls, or know what is rendered.

use super::sync::{AtomicU32, AtomicU64, Ordering, fence};

const MEMBER_SHIFT: u32 = 32;
const TAG_SHIFT: u32 = 47;
const MEMBER_MASK: u64 = 0x7fff;
/// The furthest deadline: 18 hours. A word that names a later one is over, and was so long ago, or is nonsense.
pub(crate) const MAX_LEASE_MS: u64 = 1 << 26;

/// What came of a try to take a lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Claim {
    /// It is ours until the deadline; the word is what to give back.
    Mine(u64),
    /// This member renders the page: the word to wait on.
    Held { by: u32, word: u64 },
    /// The cell is taken for another key.
    OtherKey,
}

/// Tries to take the lease of the key with this hash, until `deadline_ms` or [`MAX_LEASE_MS`] from now.
pub(crate) fn take(cell: &AtomicU64, hash: u64, member: u32, now_ms: u64, deadline_ms: u64) -> Claim {
    let tag = hash >> TAG_SHIFT;
    let deadline_ms = deadline_ms.clamp(now_ms.saturating_add(1), now_ms.saturating_add(MAX_LEASE_MS));
    let number = (u64::from(member) + 1) & MEMBER_MASK;
    let mine = tag << TAG_SHIFT | number << MEMBER_SHIFT | low(deadline_ms);
    let mut seen = cell.load(Ordering::Acquire);
    loop {
        let free = seen == 0 || is_over(seen, now_ms);
        if !free && seen >> TAG_SHIFT != tag {
            return Claim::OtherKey;
        }
        if !free {
            return Claim::Held { by: member_of(seen), word: seen };
        }
        match cell.compare_exchange(seen, mine, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => return Claim::Mine(mine),
            Err(now) => seen = now,
        }
    }
}

/// Gives a lease back; whether it was still held.
pub(crate) fn release(cell: &AtomicU64, mine: u64) -> bool {
    cell.compare_exchange(mine, 0, Ordering::AcqRel, Ordering::Relaxed).is_ok()
}

/// Whether a lease is still what it was.
pub(crate) fn is_held(cell: &AtomicU64, word: u64) -> bool {
    cell.load(Ordering::Acquire) == word
}

/// Frees a lease if this member holds it, who is dead; whether it did.
pub(crate) fn take_from(cell: &AtomicU64, member: u32) -> bool {
    let seen = cell.load(Ordering::Acquire);
    seen != 0 && member_of(seen) == member && release(cell, seen)
}

/// Whether a lease's deadline has passed.
pub(crate) fn is_over(word: u64, now_ms: u64) -> bool {
    left_ms(word, now_ms) == 0
}

/// How long a lease has until its deadline.
pub(crate) fn left_ms(word: u64, now_ms: u64) -> u64 {
    // The clock's low half wraps after 49 days, so a deadline long past looks like one far ahead.
    let ahead = low(low(word).wrapping_sub(low(now_ms)));
    if ahead <= MAX_LEASE_MS { ahead } else { 0 }
}

/// One more is about to wait; what to sleep on. To be followed by a look at the lease.
pub(crate) fn enter(waiters: &AtomicU32, turn: &AtomicU32) -> u32 {
    waiters.fetch_add(1, Ordering::AcqRel);
    fence(Ordering::SeqCst);
    turn.load(Ordering::Acquire)
}

/// One waits no more.
pub(crate) fn leave(waiters: &AtomicU32) {
    // Not below 0, should somebody else have written there.
    let one_less = |count: u32| count.checked_sub(1);
    let _ = waiters.fetch_update(Ordering::AcqRel, Ordering::Relaxed, one_less);
}

/// A lease has ended; whether somebody is to be woken.
pub(crate) fn end_turn(turn: &AtomicU32, waiters: &AtomicU32) -> bool {
    turn.fetch_add(1, Ordering::AcqRel);
    fence(Ordering::SeqCst);
    waiters.load(Ordering::Acquire) > 0
}

/// Marks the key with this hash as one that nobody waits for until `until_ms`.
pub(crate) fn set_pass(pass: &AtomicU64, hash: u64, until_ms: u64) {
    let any_member = 1 << MEMBER_SHIFT;
    pass.store(hash >> TAG_SHIFT << TAG_SHIFT | any_member | low(until_ms), Ordering::Release);
}

/// Whether a key is so marked.
pub(crate) fn passes(pass: &AtomicU64, hash: u64, now_ms: u64) -> bool {
    let seen = pass.load(Ordering::Acquire);
    seen != 0 && seen >> TAG_SHIFT == hash >> TAG_SHIFT && !is_over(seen, now_ms)
}

fn member_of(word: u64) -> u32 {
    // A word without a member is not made by this file: it names one that is not there.
    let number = (word >> MEMBER_SHIFT & MEMBER_MASK).wrapping_sub(1);
    u32::try_from(number).unwrap_or(u32::MAX)
}

fn low(word: u64) -> u64 {
    word & 0xffff_ffff
}
