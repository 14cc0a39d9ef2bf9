//! Taking leases, holding them, and sleeping until one ends: what `lease.rs` decides, done in a segment.
//!
//! Whoever sleeps looks after the one it waits for: it wakes up now and then to ask the kernel whether the holder is
//! dead, and if so, frees what it held. The more threads of a process wait, the longer each sleeps, so that all together
//! ask about as often as one. (Not the more wait in the segment: who is killed while it waits stays counted there.)
//!
//! A child of fork that inherits a lease leaves it alone: it is the parent's.
//!
//! May not: render, or look at pages.

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

/// How long one sleeps at the most, for each thread of its process that does; half of that on average.
const POLL_INTERVAL_MS: u64 = 4;
/// The longest nap, however many wait.
const MAX_POLL_INTERVAL_MS: u64 = 500;

/// How many threads of this process wait, with its generation in the high half: a child's threads do not.
static WAITING: AtomicU64 = AtomicU64::new(0);

/// What came of a try to get a lease.
#[derive(Debug)]
pub(crate) enum Claimed {
    Mine(Lease),
    Held(Ticket),
    /// There is none to be had: the cell is taken for another key, or this process is no member.
    None,
}

/// A lease that is held: given back when this is dropped, whatever the reason.
#[derive(Debug)]
pub(crate) struct Lease {
    inner: Arc<SharedMemory>,
    hash: u64,
    word: u64,
    generation: u32,
}

/// Somebody else's lease, as it was seen: what to wait for.
#[derive(Debug)]
pub(crate) struct Ticket {
    pub(crate) inner: Arc<SharedMemory>,
    hash: u64,
    word: u64,
    turn: u32,
    pub(crate) holder: u32,
    /// There is no use in waiting for longer.
    until_ms: u64,
}

impl SharedMemory {
    /// The lease of the key with this hash, which it shares with others.
    pub(crate) fn lease_cell(&self, hash: u64) -> Option<&LeaseCell> {
        let cells = self.lease_cells();
        cells.get(usize::try_from(hash & (cells.len() as u64).saturating_sub(1)).ok()?)
    }

    /// Tries to take a lease for `deadline_ms`. The turn must have been read before the page was last looked for.
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
    /// The word in shared memory, and what it says as long as the lease is held.
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
    /// Waits no longer than this.
    pub(crate) fn until(mut self, until_ms: u64) -> Ticket {
        self.until_ms = self.until_ms.min(until_ms);
        self
    }

    /// Whether there is still something to wait for.
    pub(crate) fn is_valid(&self) -> bool {
        let same =
            |cell: &LeaseCell| lease::is_held(&cell.word, self.word) && cell.turn.load(Ordering::Acquire) == self.turn;
        self.inner.lease_cell(self.hash).is_some_and(same) && self.inner.now_ms() < self.until_ms
    }

    /// Sleeps until the lease ends, for a nap at the most, and then sees whether its holder lives.
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

/// Counts the threads of this process that wait; how many there are then.
fn count_waiting(change: i32) -> u32 {
    let ours = u64::from(fork::generation()) << 32;
    let count =
        |seen: u64| if seen & !0xffff_ffff == ours { u32::try_from(seen & 0xffff_ffff).unwrap_or(0) } else { 0 };
    let counted = |seen: u64| Some(ours | u64::from(count(seen).saturating_add_signed(change)));
    let before = WAITING.fetch_update(Ordering::Relaxed, Ordering::Relaxed, counted).unwrap_or_default();
    count(before).saturating_add_signed(change)
}

thread_local! {
    /// The pages that this thread is rendering, each with the generation of the process that began.
    static RENDERED_HERE: RefCell<Vec<(u32, u64)>> = const { RefCell::new(Vec::new()) };
}

/// As long as this exists, its thread renders a page. One that asks for the same page must not wait for itself.
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
