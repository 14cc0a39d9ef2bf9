//! The protocol of a pin: how a process says that it reads an entry in place.
//!
//! The reader writes the entry's place into a cell of its own, *then* looks whether the entry is still above the floor.
//! Whoever makes room raises the floor, *then* looks for pins. With a full fence between the two steps on both
//! sides, one of them sees the other: either the reader finds the floor too high and lets go, or the pin is found.
//!
//! ```text
//! 0 = free | position / 32, 52 bits | ring 1 bit | shard 4 bits | size class 7 bits
//! ```
//! The cell names the process by where it lies, so that whoever buries a dead member frees its pins. The size class is a
//! quarter of an octave, rounded up: an entry that is jumped over may seem up to a fifth larger than it is.

use super::sync::{AtomicU64, Ordering, fence_after_swap};

pub(crate) const RING_SHIFT: u32 = 52;
const SHARD_SHIFT: u32 = 53;
const CLASS_SHIFT: u32 = 57;
pub(crate) const GRAIN: u64 = 32;
/// The smallest size told apart from smaller ones.
pub(crate) const SMALLEST: u64 = 64;

/// What a cell says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Pin {
    pub(crate) shard: u64,
    pub(crate) main: bool,
    pub(crate) position: u64,
    /// The entry's size, or a little more.
    pub(crate) size: u64,
}

impl Pin {
    fn word(self) -> u64 {
        let ring = u64::from(self.main) << RING_SHIFT;
        class(self.size) << CLASS_SHIFT | self.shard << SHARD_SHIFT | ring | (self.position / GRAIN)
    }
}

/// Pins, if the cell is free: whether it was.
pub(crate) fn set(cell: &AtomicU64, pin: Pin) -> bool {
    let set = cell.compare_exchange(0, pin.word(), Ordering::SeqCst, Ordering::Relaxed).is_ok();
    fence_after_swap();
    set
}

/// Whether the entry that was just pinned is still above its ring's floor, and so will stay what it is; if not, lets go.
pub(crate) fn holds(cell: &AtomicU64, position: u64, floor: &AtomicU64) -> bool {
    let holds = floor.load(Ordering::SeqCst) <= position;
    if !holds {
        free(cell);
    }
    holds
}

/// Lets go.
pub(crate) fn free(cell: &AtomicU64) {
    cell.store(0, Ordering::Release);
}

/// What a cell says, if it pins anything. To be asked after the floor was raised and a full fence.
pub(crate) fn get(cell: &AtomicU64) -> Option<Pin> {
    let word = cell.load(Ordering::Acquire);
    (word != 0).then_some(Pin {
        shard: word >> SHARD_SHIFT & 15,
        main: word >> RING_SHIFT & 1 != 0,
        position: (word & ((1 << RING_SHIFT) - 1)) * GRAIN,
        size: size_of_class(word >> CLASS_SHIFT),
    })
}

/// The least class whose size is not below `size`.
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
