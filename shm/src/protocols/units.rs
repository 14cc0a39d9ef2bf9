//! The protocol with which gateways claim the units of app processes. (A unit is the right to have one request in an app process.)
//!
//! ```text
//! door     bits 0..2 state (0 closed, 1 open, 2 draining) | bits 32..64 epoch             written: master
//! unit     40 bits stamp_us | 12 bits tag | 12 bits owner (gateway + 1; 0 = free)         written: all, by compare and swap
//! waiting  40 bits arrival_us of the oldest request | 24 bits number of requests          written: its gateway
//! ```
//! The epoch is the number of times that the door has been opened: once for each app process in a slot. The tag of a unit consists of the
//! low bits of the epoch for which the unit was claimed or freed. The stamp is the time of the last change, wrapped after 12 days. A unit is
//! one word, so claiming it and freeing it are atomic.
//!
//! Three pairs of operations each need a full fence between their two steps, on both sides:
//!
//! | one side | the other side | therefore |
//! |---|---|---|
//! | a gateway claims a unit, then reads the door ([`take`]) | the master changes the door, then reads the units ([`drain`], [`busy`]) | either the gateway gives the unit back, or the master finds the unit claimed |
//! | a process frees a unit ([`free`], [`free_from_dead`]) or opens the door ([`open`]), then reads the waiting rows ([`longest_waiting`]) | a gateway stores its waiting row ([`set_waiting`]), then tries to claim a unit | either the gateway finds the unit, or the process finds that the gateway waits |
//! | the same | a gateway clears its waiting row, then looks for free units | either the process does not select the gateway, or the gateway finds the unit, and wakes another gateway for it |
//!
//! [`open`] gives the units the new tag before it opens the door. A claim or a release that began earlier, for the previous app process,
//! expects a word with the previous tag. Its compare-and-swap operation therefore fails, and the successor's units are not affected.
//!
//! Must not wait, make system calls, or read a clock.

use super::sync::{AtomicU64, Ordering, fence, fence_after_swap};

const EPOCH_SHIFT: u32 = 32;
const STATE_MASK: u64 = 3;
const OPEN: u64 = 1;
const DRAINING: u64 = 2;

const TAG_SHIFT: u32 = 12;
const STAMP_SHIFT: u32 = 24;
const OWNER_MASK: u64 = (1 << TAG_SHIFT) - 1;
const TAG_MASK: u64 = 0xfff;
const STAMP_MASK: u64 = (1 << 40) - 1;
/// Maximum number of gateways, because a unit has 12 bits for its owner, and 0 means that there is none.
pub(crate) const MAX_GATEWAYS: u32 = 4095;
/// Maximum number of waiting requests that a row can contain. Larger numbers are stored as this number.
pub(crate) const MAX_WAITING: u32 = (1 << STAMP_SHIFT) - 1;
/// How far a stamp may be ahead of the time to which it is compared, in microseconds. Processes read the clock before they read a stamp.
const SLACK_US: u64 = 1_000_000;

/// The state of an app process's door, in its slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Door {
    /// There is no app process.
    Closed,
    /// Gateways may claim the units.
    Open,
    /// Gateways must not claim any more units, but may still hold some.
    Draining,
}

/// The result of an attempt to take a unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Taken {
    /// The gateway holds the unit; the word is needed to free it.
    Mine(u64),
    /// Another process has changed the unit.
    Lost,
    /// The door had changed, so the unit was given back. The master may have found the unit claimed, and must be woken.
    GivenBack,
}

/// Returns the state of a door. An unknown state counts as closed.
pub(crate) fn state(door: u64) -> Door {
    match door & STATE_MASK {
        OPEN => Door::Open,
        DRAINING => Door::Draining,
        _ => Door::Closed,
    }
}

pub(crate) fn epoch(door: u64) -> u32 {
    // The upper half of a word fits.
    u32::try_from(door >> EPOCH_SHIFT).unwrap_or(0)
}

/// Closes a door. The units keep their owners.
pub(crate) fn close(door: &AtomicU64) {
    door.store(door.load(Ordering::SeqCst) & !STATE_MASK, Ordering::SeqCst);
}

/// Frees the first `usable` units for a new app process, then opens the door. Returns the new epoch. The other units have no owner, and
/// have the tag of the previous epoch, so that no gateway can claim them. The door must be closed. The caller must look for a waiting gateway
/// afterwards.
pub(crate) fn open(door: &AtomicU64, units: &[AtomicU64], usable: usize, now_us: u64) -> u32 {
    let epoch = epoch(door.load(Ordering::SeqCst)).wrapping_add(1);
    for (number, unit) in units.iter().enumerate() {
        let of = if number < usable { epoch } else { epoch.wrapping_sub(1) };
        unit.store(stamped(now_us) | tag(of), Ordering::SeqCst);
    }
    door.store(u64::from(epoch) << EPOCH_SHIFT | OPEN, Ordering::SeqCst);
    fence(Ordering::SeqCst);
    epoch
}

/// Changes an open door to draining. The caller must read the units afterwards ([`busy`]).
pub(crate) fn drain(door: &AtomicU64) {
    let seen = door.load(Ordering::SeqCst);
    if state(seen) == Door::Open {
        door.store(seen & !STATE_MASK | DRAINING, Ordering::SeqCst);
    }
    fence(Ordering::SeqCst);
}

/// Returns the number of units that have an owner.
pub(crate) fn busy(units: &[AtomicU64]) -> u32 {
    let owned = units.iter().filter(|unit| owner(unit.load(Ordering::SeqCst)).is_some());
    u32::try_from(owned.count()).unwrap_or(u32::MAX)
}

/// Whether a gateway may try to take a unit, given the words of the door and of the unit. The door must have been read first.
pub(crate) fn is_free(door: u64, unit: u64) -> bool {
    state(door) == Door::Open && unit & OWNER_MASK == 0 && unit & TAG_MASK << TAG_SHIFT == tag(epoch(door))
}

/// Tries to take a unit that [`is_free`], given the words that were read.
pub(crate) fn take(
    (door, seen_door): (&AtomicU64, u64),
    (unit, seen_unit): (&AtomicU64, u64),
    gateway: u32,
    now_us: u64,
) -> Taken {
    let mine = stamped(now_us) | seen_unit & TAG_MASK << TAG_SHIFT | (u64::from(gateway) + 1) & OWNER_MASK;
    if unit.compare_exchange(seen_unit, mine, Ordering::SeqCst, Ordering::Relaxed).is_err() {
        return Taken::Lost;
    }
    fence_after_swap();
    if door.load(Ordering::SeqCst) == seen_door {
        return Taken::Mine(mine);
    }
    free(unit, mine, now_us);
    Taken::GivenBack
}

/// Frees a unit. Returns false if the unit is no longer held, because a new app process has been started in the slot. The caller must read
/// the door and look for a waiting gateway afterwards.
pub(crate) fn free(unit: &AtomicU64, mine: u64, now_us: u64) -> bool {
    let free = stamped(now_us) | mine & TAG_MASK << TAG_SHIFT;
    let freed = unit.compare_exchange(mine, free, Ordering::SeqCst, Ordering::Relaxed).is_ok();
    fence_after_swap();
    freed
}

/// Frees a unit if this dead gateway holds it. Returns whether the gateway held the unit. The caller must look for a waiting gateway
/// afterwards.
pub(crate) fn free_from_dead(unit: &AtomicU64, gateway: u32, now_us: u64) -> bool {
    let seen = unit.load(Ordering::SeqCst);
    owner(seen) == Some(gateway) && free(unit, seen, now_us)
}

/// Returns the gateway that holds a unit.
pub(crate) fn owner(unit: u64) -> Option<u32> {
    u32::try_from(unit & OWNER_MASK).ok()?.checked_sub(1)
}

/// Returns the time since a unit or a waiting row was last changed, or since a row's oldest request arrived, in microseconds.
pub(crate) fn age_us(word: u64, now_us: u64) -> u64 {
    let ahead = now_us.wrapping_add(SLACK_US).wrapping_sub(word >> STAMP_SHIFT) & STAMP_MASK;
    ahead.saturating_sub(SLACK_US)
}

/// Stores the number of requests that wait in a gateway, and the arrival of the oldest. If there are any, the gateway must then try to claim
/// a unit before it sleeps. Returns whether the gateway has stopped waiting: it must then look for free units, and wake another
/// gateway for them.
pub(crate) fn set_waiting(row: &AtomicU64, requests: u32, oldest_us: u64) -> bool {
    let word = if requests == 0 { 0 } else { stamped(oldest_us) | u64::from(requests.min(MAX_WAITING)) };
    let before = row.swap(word, Ordering::SeqCst);
    fence(Ordering::SeqCst);
    before != 0 && word == 0
}

/// Returns the number of requests that wait in a gateway.
pub(crate) fn waiting(row: u64) -> u32 {
    u32::try_from(row & u64::from(MAX_WAITING)).unwrap_or(0)
}

/// Returns the gateway whose oldest request has waited longest. Must be called after one of the functions that require it.
pub(crate) fn longest_waiting<'a>(rows: impl Iterator<Item = (u32, &'a AtomicU64)>, now_us: u64) -> Option<u32> {
    let words = rows.map(|(gateway, row)| (gateway, row.load(Ordering::SeqCst)));
    let waiting = words.filter(|&(_, word)| waiting(word) > 0);
    waiting.max_by_key(|&(_, word)| age_us(word, now_us)).map(|(gateway, _)| gateway)
}

fn stamped(now_us: u64) -> u64 {
    (now_us & STAMP_MASK) << STAMP_SHIFT
}

fn tag(epoch: u32) -> u64 {
    (u64::from(epoch) & TAG_MASK) << TAG_SHIFT
}
