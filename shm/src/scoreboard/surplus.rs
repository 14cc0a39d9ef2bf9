//! Cells in a process's private memory, for the requests for which the process's row has no room.
//!
//! A row contains 16 requests. The texts of all further requests are kept here. No other process reads them, but the crash handler and the
//! threads of this process may read them at any moment. A cell therefore never moves after its creation, and consists of atomics only.

use std::sync::OnceLock;

use crate::memory::layout::{Cell, TEXT_WORDS, Text, ThreadCells};

/// Number of cells in the first chunk; each further chunk is twice as large as the previous one.
const FIRST: usize = 64;
const CHUNKS: usize = 24;
/// Number of thread slots in one chunk.
const THREAD_CHUNK: usize = 64;
const THREAD_CHUNKS: usize = 32;

#[derive(Debug, Default)]
pub(super) struct Surplus {
    cells: [OnceLock<Box<[Cell]>>; CHUNKS],
    threads: [OnceLock<Box<[ThreadCells]>>; THREAD_CHUNKS],
}

impl Surplus {
    /// Returns a cell that was created earlier. Async-signal-safe.
    pub(super) fn cell(&self, number: usize) -> Option<&Cell> {
        let (chunk, index) = place(number);
        self.cells.get(chunk)?.get()?.get(index)
    }

    /// Creates a cell if it does not exist. Returns false if there are too many.
    pub(super) fn make(&self, number: usize) -> bool {
        let (chunk, _) = place(number);
        let Some(chunk_of_cells) = self.cells.get(chunk) else { return false };
        chunk_of_cells.get_or_init(|| (0..FIRST << chunk).map(|_| Cell::default()).collect());
        true
    }

    /// Returns the thread slot of a thread that has none in the row.
    pub(super) fn thread_slot(&self, number: usize) -> Option<&ThreadCells> {
        let chunk = self.threads.get(number / THREAD_CHUNK)?;
        chunk.get_or_init(|| (0..THREAD_CHUNK).map(|_| ThreadCells::default()).collect()).get(number % THREAD_CHUNK)
    }
}

/// Returns the chunk of a cell, and the cell's index in the chunk.
fn place(number: usize) -> (usize, usize) {
    let chunk = (number / FIRST + 1).ilog2();
    (chunk as usize, number + FIRST - (FIRST << chunk))
}

impl Default for Text {
    fn default() -> Self {
        Text { length: Default::default(), words: [const { std::sync::atomic::AtomicU64::new(0) }; TEXT_WORDS] }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_number_has_a_place_of_its_own() {
        let places: Vec<_> = (0..FIRST * 7).map(place).collect();
        let in_order = (0..3).flat_map(|chunk| (0..FIRST << chunk).map(move |index| (chunk, index)));
        assert_eq!(places, in_order.collect::<Vec<_>>());
        let surplus = Surplus::default();
        assert!(surplus.cell(0).is_none() && surplus.cell(usize::MAX / 2).is_none());
        assert!(surplus.make(FIRST) && surplus.cell(FIRST).is_some() && surplus.cell(0).is_none());
        assert!(!surplus.make(FIRST << CHUNKS));
    }
}
