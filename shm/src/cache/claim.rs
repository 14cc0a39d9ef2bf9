//! Takes leases, holds them, and waits for them to end, by applying the decisions in `protocols/lease.rs` to a segment.
//!
//! A waiting thread also monitors the holder of the lease. It wakes up periodically and checks with a system call whether the holder is
//! dead. If so, it releases everything that the holder held. The more threads of a process are waiting, the longer each of them sleeps, so
//! that together they check about as often as a single thread. (The count of waiters in the segment cannot be used for this, because a
//! waiter that is killed is never subtracted from it.)
//!
//! A forked child that inherits a lease does not release it, because the lease belongs to the parent.
//!
//! Must not render, or read pages.

use std::cell::RefCell;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::early;
use crate::crash;
use crate::memory::SharedMemory;
use crate::memory::layout::LeaseCell;
use crate::memory::{fork, futex};
use crate::protocols::lease::{self, Claim};

/// Maximum sleep per waiting thread of the process, in milliseconds. The average sleep is half of it.
const POLL_INTERVAL_MS: u64 = 4;
/// Maximum sleep in milliseconds, regardless of the number of waiting threads.
const MAX_POLL_INTERVAL_MS: u64 = 500;

/// The number of waiting threads of this process. The high half contains the process's fork generation, so that a forked child starts at 0.
static WAITING: AtomicU64 = AtomicU64::new(0);

/// The result of an attempt to take a lease.
#[derive(Debug)]
pub(crate) enum Claimed {
    Mine(Lease),
    Held(Ticket),
    /// No lease can be taken, because the cell is in use for another key or because this process is not a member.
    None,
}

/// A lease that this process holds. It is released on drop.
#[derive(Debug)]
pub(crate) struct Lease {
    inner: Arc<SharedMemory>,
    hash: u64,
    word: u64,
    generation: u32,
}

/// A snapshot of a lease that another process or thread holds, used to wait for its end.
#[derive(Debug)]
pub(crate) struct Ticket {
    pub(crate) inner: Arc<SharedMemory>,
    hash: u64,
    word: u64,
    turn: u32,
    pub(crate) holder: u32,
    /// The deadline of the lease, or the caller's own time limit if that is earlier.
    until_ms: u64,
}

impl SharedMemory {
    /// Returns the lease cell for the key with this hash. Several keys share a cell.
    pub(crate) fn lease_cell(&self, hash: u64) -> Option<&LeaseCell> {
        let cells = self.lease_cells();
        cells.get(usize::try_from(hash & (cells.len() as u64).saturating_sub(1)).ok()?)
    }

    /// Tries to take a lease whose deadline is `deadline_ms` milliseconds after `now_ms`. The caller must have read `turn` before its last
    /// lookup of the page.
    pub(crate) fn claim_lease(self: &Arc<Self>, hash: u64, turn: u32, now_ms: u64, deadline_ms: u64) -> Claimed {
        let (Some(cell), Some(me)) = (self.lease_cell(hash), self.member()) else { return Claimed::None };
        if self.map.is_lost() {
            return Claimed::None;
        }
        match lease::take(&cell.word, hash, me.number, now_ms, now_ms.saturating_add(deadline_ms)) {
            Claim::Mine(word) => {
                let lease = Lease { inner: Arc::clone(self), hash, word, generation: fork::generation() };
                crash::point("lease: taken");
                Claimed::Mine(lease)
            }
            Claim::Held { by: holder, word } => {
                let until_ms = now_ms.saturating_add(lease::left_ms(word, now_ms));
                Claimed::Held(Ticket { inner: Arc::clone(self), hash, word, turn, holder, until_ms })
            }
            Claim::OtherKey => Claimed::None,
        }
    }
}

impl Lease {
    /// Returns the word in shared memory, and its value while the lease is held.
    pub(crate) fn word(&self) -> Option<(&AtomicU64, u64)> {
        Some((&self.inner.lease_cell(self.hash)?.word, self.word))
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if self.generation != fork::generation() {
            return;
        }
        let Some(cell) = self.inner.lease_cell(self.hash) else { return };
        crash::point("lease: about to be released");
        if lease::release(&cell.word, self.word) {
            crash::point("lease: released");
            cell.announce();
            crash::point("lease: announced");
        }
    }
}

impl Ticket {
    /// Sets a time limit for the wait. A later time limit than the current one has no effect.
    pub(crate) fn until(mut self, until_ms: u64) -> Ticket {
        self.until_ms = self.until_ms.min(until_ms);
        self
    }

    /// Whether the lease is still held and the time limit has not been reached.
    pub(crate) fn is_valid(&self) -> bool {
        let same =
            |cell: &LeaseCell| lease::is_held(&cell.word, self.word) && cell.turn.load(Ordering::Acquire) == self.turn;
        self.inner.lease_cell(self.hash).is_some_and(same) && self.inner.now_ms() < self.until_ms
    }

    /// Sleeps until the lease ends, but for at most one interval, and then checks whether the holder of the lease is alive.
    pub(crate) fn wait_here(&self) {
        let Some(cell) = self.inner.lease_cell(self.hash) else { return };
        let turn = lease::enter(&cell.waiters, &cell.turn);
        if turn == self.turn && self.is_valid() {
            let nap = self.nap(count_waiting(1));
            futex::wait(&cell.turn, turn, nap);
            count_waiting(-1);
        }
        lease::leave(&cell.waiters);
        if self.is_valid() {
            self.inner.release_if_dead(self.holder);
        }
    }

    fn nap(&self, waiting: u32) -> Duration {
        let longest = Duration::from_millis((POLL_INTERVAL_MS * u64::from(waiting)).min(MAX_POLL_INTERVAL_MS));
        let left_ms = self.until_ms.saturating_sub(self.inner.now_ms());
        longest.mul_f64(early::random()).min(Duration::from_millis(left_ms))
    }
}

/// Adds `change` to the number of waiting threads of this process, and returns the new number.
fn count_waiting(change: i32) -> u32 {
    let ours = u64::from(fork::generation()) << 32;
    let count =
        |seen: u64| if seen & !0xffff_ffff == ours { u32::try_from(seen & 0xffff_ffff).unwrap_or(0) } else { 0 };
    let counted = |seen: u64| Some(ours | u64::from(count(seen).saturating_add_signed(change)));
    let before = WAITING.fetch_update(Ordering::Relaxed, Ordering::Relaxed, counted).unwrap_or_default();
    count(before).saturating_add_signed(change)
}

thread_local! {
    /// The pages that this thread is rendering, each with the fork generation of the process that started rendering it.
    static RENDERED_HERE: RefCell<Vec<(u32, u64)>> = const { RefCell::new(Vec::new()) };
}

/// While this value exists, its thread is rendering a page, so a request by this thread for the same page must not wait for the lease.
#[derive(Debug)]
pub(crate) struct Here {
    hash: u64,
}

impl Here {
    pub(crate) fn new(hash: u64) -> Here {
        let _ = RENDERED_HERE.try_with(|pages| pages.borrow_mut().push((fork::generation(), hash)));
        Here { hash }
    }

    /// Whether this thread is rendering the page with this hash.
    pub(crate) fn renders(hash: u64) -> bool {
        RENDERED_HERE.try_with(|pages| pages.borrow().contains(&(fork::generation(), hash))).unwrap_or(false)
    }
}

impl Drop for Here {
    fn drop(&mut self) {
        let _ = RENDERED_HERE.try_with(|pages| {
            let mut pages = pages.borrow_mut();
            if let Some(at) = pages.iter().rposition(|&(_, hash)| hash == self.hash) {
                pages.remove(at);
            }
        });
    }
}
