//! The protocol of a lease, which is the right to render a page and is held by one process at a time.
//!
//! ```text
//! 0 = free | bits 0..32 deadline, in ms of the segment's clock, wrapped | 15 bits member + 1 | 17 bits tag of the key
//! ```
//! The whole lease is one word, so taking it, releasing it and taking it over are atomic operations. A lease ends when its holder stores
//! the page or fails ([`release`] in both cases). If the holder dies, the process that cleans up after the holder ends the lease
//! ([`take_from`]). If the deadline passes, another process may take the lease over ([`take`]); the late holder then detects that it no
//! longer holds the lease ([`is_held`]), and its page does not replace a newer one.
//!
//! Two keys may share a cell. The tag distinguishes them (17 bits in addition to those that select the cell). A process that finds the cell
//! taken for a different key renders without a lease, because otherwise it would wait for the wrong page.
//!
//! A waiting process counts itself ([`enter`]), then checks that the lease is still held, and sleeps on the *turn*, a counter of ended
//! leases. A process that ends a lease increments the turn, then checks whether any process is counted as waiting ([`end_turn`]). Each of
//! these two processes executes a full fence between its two steps, so no process sleeps through the end of the lease that it is waiting
//! for.
//!
//! A lease is useless for a page that cannot be stored, because the waiting processes would receive nothing. The key of such a page is
//! marked ([`set_pass`]) for a while. During that time, a process that finds the lease taken does not wait.
//!
//! Must not wait, make system calls, or depend on what is rendered.

use super::sync::{AtomicU32, AtomicU64, Ordering, fence};

const MEMBER_SHIFT: u32 = 32;
const TAG_SHIFT: u32 = 47;
const MEMBER_MASK: u64 = 0x7fff;
/// Maximum time to a deadline, in milliseconds: 18 hours. A word with a later deadline expired long ago, or is invalid.
pub(crate) const MAX_LEASE_MS: u64 = 1 << 26;

/// The result of an attempt to take a lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Claim {
    /// This process holds the lease until the deadline; the word is needed to release it.
    Mine(u64),
    /// This member is rendering the page; wait for the word to change.
    Held { by: u32, word: u64 },
    /// The cell is taken for a different key.
    OtherKey,
}

/// Tries to take the lease of the key with this hash, until `deadline_ms`, but at most for [`MAX_LEASE_MS`].
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

/// Releases a lease. Returns whether it was still held.
pub(crate) fn release(cell: &AtomicU64, mine: u64) -> bool {
    cell.compare_exchange(mine, 0, Ordering::AcqRel, Ordering::Relaxed).is_ok()
}

/// Whether the lease's cell still contains this word.
pub(crate) fn is_held(cell: &AtomicU64, word: u64) -> bool {
    cell.load(Ordering::Acquire) == word
}

/// Releases a lease if this dead member holds it. Returns whether the member held the lease.
pub(crate) fn take_from(cell: &AtomicU64, member: u32) -> bool {
    let seen = cell.load(Ordering::Acquire);
    seen != 0 && member_of(seen) == member && release(cell, seen)
}

/// Whether a lease's deadline has passed.
pub(crate) fn is_over(word: u64, now_ms: u64) -> bool {
    left_ms(word, now_ms) == 0
}

/// Returns the time until a lease's deadline, in milliseconds, or 0 if the deadline has passed.
pub(crate) fn left_ms(word: u64, now_ms: u64) -> u64 {
    // The clock's low half wraps after 49 days, so a deadline that passed long ago looks like a deadline far in the future.
    let ahead = low(low(word).wrapping_sub(low(now_ms)));
    if ahead <= MAX_LEASE_MS { ahead } else { 0 }
}

/// Counts a process that is about to wait, and returns the turn on which it must sleep. The caller must check the lease afterwards.
pub(crate) fn enter(waiters: &AtomicU32, turn: &AtomicU32) -> u32 {
    waiters.fetch_add(1, Ordering::AcqRel);
    fence(Ordering::SeqCst);
    turn.load(Ordering::Acquire)
}

/// Removes a process from the count of waiting processes.
pub(crate) fn leave(waiters: &AtomicU32) {
    // The count does not go below 0, in case another process has overwritten the counter.
    let one_less = |count: u32| count.checked_sub(1);
    let _ = waiters.fetch_update(Ordering::AcqRel, Ordering::Relaxed, one_less);
}

/// Records the end of a lease. Returns whether waiting processes must be woken.
pub(crate) fn end_turn(turn: &AtomicU32, waiters: &AtomicU32) -> bool {
    turn.fetch_add(1, Ordering::AcqRel);
    fence(Ordering::SeqCst);
    waiters.load(Ordering::Acquire) > 0
}

/// Marks the key with this hash. Until `until_ms`, no process waits for its page.
pub(crate) fn set_pass(pass: &AtomicU64, hash: u64, until_ms: u64) {
    let any_member = 1 << MEMBER_SHIFT;
    pass.store(hash >> TAG_SHIFT << TAG_SHIFT | any_member | low(until_ms), Ordering::Release);
}

/// Whether a key is marked by [`set_pass`].
pub(crate) fn passes(pass: &AtomicU64, hash: u64, now_ms: u64) -> bool {
    let seen = pass.load(Ordering::Acquire);
    seen != 0 && seen >> TAG_SHIFT == hash >> TAG_SHIFT && !is_over(seen, now_ms)
}

fn member_of(word: u64) -> u32 {
    // This file never creates a word without a member. Such a word is decoded as a member that does not exist.
    let number = (word >> MEMBER_SHIFT & MEMBER_MASK).wrapping_sub(1);
    u32::try_from(number).unwrap_or(u32::MAX)
}

fn low(word: u64) -> u64 {
    word & 0xffff_ffff
}
