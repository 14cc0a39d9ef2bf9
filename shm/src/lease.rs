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
//! May not: wait, make system calls, or know what is rendered.

use crate::sync::{AtomicU64, Ordering};

const MEMBER_SHIFT: u32 = 32;
const TAG_SHIFT: u32 = 47;
const MEMBER_MASK: u64 = 0x7fff;

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

/// Tries to take the lease of the key with this hash, until `deadline_ms`.
pub(crate) fn take(cell: &AtomicU64, hash: u64, member: u32, now_ms: u64, deadline_ms: u64) -> Claim {
    let tag = hash >> TAG_SHIFT;
    let mine = tag << TAG_SHIFT | (u64::from(member) + 1 & MEMBER_MASK) << MEMBER_SHIFT | low(deadline_ms);
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
    // The clock's low half wraps after 49 days, so what counts is which of the two is ahead by less than half of that.
    let behind = low(now_ms).wrapping_sub(low(word)) & low(u64::MAX);
    behind < 1 << 31
}

fn member_of(word: u64) -> u32 {
    // A word without a member is not made by this file: it names one that is not there.
    let number = (word >> MEMBER_SHIFT & MEMBER_MASK).wrapping_sub(1);
    u32::try_from(number).unwrap_or(u32::MAX)
}

fn low(word: u64) -> u64 {
    word & 0xffff_ffff
}
