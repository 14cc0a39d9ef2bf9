//! The protocol of a pin: how a process says that it reads an entry in place.
//!
//! The reader writes the entry's place into a cell of its own, *then* looks whether the entry is still above the floor.
//! Whoever makes room raises the floor, *then* looks for pins. With a full fence between the two steps on both
//! sides, one of them sees the other: either the reader finds the floor too high and lets go, or the pin is found.
//!
//! ```text
//! place 0 = free | position / 32, 52 bits | ring 1 bit | shard 11 bits
//! ```
//! The cell names the process by where it lies, so that whoever buries a dead member frees its pins.

use crate::sync::{AtomicU64, Ordering, fence};

const RING_SHIFT: u32 = 52;
const SHARD_SHIFT: u32 = 53;
const GRAIN: u64 = 32;
/// A cell that changes while it is read is read again, so many times.
const READS: u32 = 4;

/// What a cell says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Pin {
    pub(crate) place: u64,
    pub(crate) position: u64,
    pub(crate) size: u64,
}

/// The word for a place.
pub(crate) fn word(shard: u64, main: bool, position: u64) -> u64 {
    shard << SHARD_SHIFT | u64::from(main) << RING_SHIFT | position / GRAIN
}

/// Pins, if the entry is still above the floor afterwards.
pub(crate) fn set(place: &AtomicU64, size: &AtomicU64, word: u64, bytes: u64, position: u64, floor: &AtomicU64) -> bool {
    size.store(bytes, Ordering::Relaxed);
    place.store(word, Ordering::Release);
    fence(Ordering::SeqCst);
    let valid = floor.load(Ordering::Acquire) <= position;
    if !valid {
        place.store(0, Ordering::Release);
    }
    valid
}

/// What a cell says, if it pins anything. One that keeps changing is being set, and is read as it is at last.
pub(crate) fn get(place: &AtomicU64, size: &AtomicU64) -> Option<Pin> {
    let mut seen = place.load(Ordering::Acquire);
    let mut bytes = size.load(Ordering::Acquire);
    for _ in 0..READS {
        let now = place.load(Ordering::Acquire);
        if now == seen {
            break;
        }
        seen = now;
        bytes = size.load(Ordering::Acquire);
    }
    let position = (seen & ((1 << RING_SHIFT) - 1)) * GRAIN;
    (seen != 0).then_some(Pin { place: seen & !((1 << RING_SHIFT) - 1), position, size: bytes })
}
