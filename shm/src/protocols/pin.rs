//! The protocol of a pin, with which a process announces that it is reading an entry in place.
//!
//! The reader writes the entry's place into one of its own cells, *then* checks that the entry is still above the floor. A writer that
//! makes room raises the floor, *then* looks for pins. Each of them executes a full fence between its two steps. Therefore, either the
//! reader finds that the floor is above the entry and unpins it, or the writer finds the pin.
//!
//! ```text
//! 0 = free | position / 32, 52 bits | ring 1 bit | shard 4 bits | size class 7 bits
//! ```
//! The position of the cell identifies the process, so a dead member's pins are freed when the member is cleaned up. There are four size
//! classes for each power of two, and sizes are rounded up, so a pinned entry may appear to be up to a quarter larger than it is.

use super::sync::{AtomicU64, Ordering, fence_after_swap};

pub(crate) const RING_SHIFT: u32 = 52;
const SHARD_SHIFT: u32 = 53;
const CLASS_SHIFT: u32 = 57;
pub(crate) const GRAIN: u64 = 32;
/// Size of the smallest class, in bytes. Smaller sizes are rounded up to this size.
pub(crate) const SMALLEST: u64 = 64;

/// The content of a cell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Pin {
    pub(crate) shard: u64,
    pub(crate) main: bool,
    pub(crate) position: u64,
    /// The entry's size, rounded up to its size class.
    pub(crate) size: u64,
}

impl Pin {
    fn word(self) -> u64 {
        let ring = u64::from(self.main) << RING_SHIFT;
        class(self.size) << CLASS_SHIFT | self.shard << SHARD_SHIFT | ring | (self.position / GRAIN)
    }
}

/// Sets the pin if the cell is free. Returns whether it was free.
pub(crate) fn set(cell: &AtomicU64, pin: Pin) -> bool {
    let set = cell.compare_exchange(0, pin.word(), Ordering::SeqCst, Ordering::Relaxed).is_ok();
    fence_after_swap();
    set
}

/// Whether the entry that has just been pinned is still above its ring's floor, and therefore will not change. If not,
/// unpins it.
pub(crate) fn holds(cell: &AtomicU64, position: u64, floor: &AtomicU64) -> bool {
    let holds = floor.load(Ordering::SeqCst) <= position;
    if !holds {
        free(cell);
    }
    holds
}

/// Removes the pin.
pub(crate) fn free(cell: &AtomicU64) {
    cell.store(0, Ordering::Release);
}

/// Returns the content of a cell, if it is set. Must be called after the floor has been raised and after a full fence.
pub(crate) fn get(cell: &AtomicU64) -> Option<Pin> {
    let word = cell.load(Ordering::Acquire);
    (word != 0).then_some(Pin {
        shard: word >> SHARD_SHIFT & 15,
        main: word >> RING_SHIFT & 1 != 0,
        position: (word & ((1 << RING_SHIFT) - 1)) * GRAIN,
        size: size_of_class(word >> CLASS_SHIFT),
    })
}

/// Returns the smallest class whose size is not below `size`.
pub(crate) fn class(size: u64) -> u64 {
    let size = size.max(SMALLEST);
    let octave = size.ilog2();
    let quarter = (size - (1 << octave)).div_ceil((1 << octave) / 4);
    (u64::from(octave - SMALLEST.ilog2()) * 4 + quarter).min(127)
}

pub(crate) fn size_of_class(class: u64) -> u64 {
    let octave = SMALLEST << (class / 4);
    octave + octave / 4 * (class % 4)
}
