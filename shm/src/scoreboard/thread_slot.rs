//! Thread slots record the request that each thread of a process is running. Other processes can read thread slots even
//! after the process has been killed with SIGKILL.
//!
//! A thread holds its thread slot for its lifetime. The slot's word contains the cell of the request that the thread is running. If the
//! request's text is not in the row, the text is copied into the thread slot. Threads for which a row has no thread slot use private
//! memory, which only the crash handler reads.
//!
//! Must not lock, allocate or make a system call, because every request passes through this code, and signal handlers run it.

use std::sync::atomic::Ordering;

use super::EventLoopBeat;
use super::surplus::Surplus;
use crate::memory::layout::{CELLS, RowCells, THREADS, ThreadCells};

/// Value of a thread slot's word that means that the slot contains the text of a request that no longer has a cell.
pub(super) const NO_CELL: u64 = u64::MAX;

/// Value of the culprit's stamp in a row that means that the culprit is known.
pub(super) const CULPRIT_KNOWN: u64 = 1;
/// Value of the culprit's stamp in a row that means that the thread was processing no request.
pub(super) const NO_REQUEST: u64 = 2;

/// The request that one thread of a row's process is running. Cheap to copy.
#[derive(Clone, Copy, Debug)]
pub struct ThreadSlot<'a> {
    row: &'a RowCells,
    epoch: u64,
    cells: &'a ThreadCells,
    surplus: &'a Surplus,
}

/// The request that a thread was running: see [`ThreadSlot::switch_to`].
#[derive(Clone, Copy, Debug)]
pub struct Before(u64);

impl EventLoopBeat {
    /// Returns the thread slot with this number, which one thread claims for itself. Returns `None` if there is no such thread slot, or if
    /// another process has claimed the row.
    pub fn thread_slot(&self, number: usize) -> Option<ThreadSlot<'_>> {
        let row = self.row()?;
        let cells = match row.threads.get(number) {
            Some(cells) => cells,
            None => self.surplus.thread_slot(number - THREADS)?,
        };
        let taken = u32::try_from(number + 1).unwrap_or(u32::MAX);
        row.registered_threads.fetch_max(taken, Ordering::Relaxed);
        Some(ThreadSlot { row, epoch: self.epoch, cells, surplus: &self.surplus })
    }

    /// Records that this process is about to die because of a thread that has no thread slot. Async-signal-safe.
    pub fn accuse_no_request(&self) {
        self.row().inspect(|row| row.culprit.stamp_ms.store(NO_REQUEST, Ordering::Release));
    }
}

impl ThreadSlot<'_> {
    /// Records that the thread is now running the request in this cell, or no request. Returns what it was running before.
    pub fn switch_to(&self, cell: Option<usize>) -> Before {
        let before = self.cells.current.load(Ordering::Relaxed);
        self.sit(cell.map_or(0, |cell| cell as u64 + 1));
        Before(before)
    }

    /// Records that the thread resumes what it was running before.
    pub fn return_to(&self, Before(word): Before) {
        self.sit(word);
    }

    fn sit(&self, word: u64) {
        if self.row.epoch.load(Ordering::Relaxed) != self.epoch {
            return;
        }
        if word > CELLS as u64 && word != NO_CELL {
            self.put_text_of(word);
        }
        self.cells.current.store(word, Ordering::Release);
    }

    /// Copies the text of a request that is not in the row.
    #[cold]
    fn put_text_of(&self, word: u64) {
        let number = usize::try_from(word).unwrap_or(0).checked_sub(CELLS + 1);
        if let Some(cell) = number.and_then(|number| self.surplus.cell(number)) {
            self.cells.current.store(0, Ordering::Release); // the current text belongs to another request
            self.cells.text.copy_from(&cell.text);
        }
    }

    /// Returns the cell of the request that the thread is running.
    pub fn cell(&self) -> Option<usize> {
        let word = self.cells.current.load(Ordering::Relaxed);
        usize::try_from(word).ok().filter(|_| word != NO_CELL)?.checked_sub(1)
    }

    /// Prepares for the reuse of this cell by a different request. If the thread is still running the request in the cell, the slot keeps a
    /// copy of the request's text.
    pub fn keep_text_of(&self, cell: usize) {
        let word = cell as u64 + 1;
        if self.row.epoch.load(Ordering::Relaxed) != self.epoch || self.cells.current.load(Ordering::Relaxed) != word {
            return;
        }
        if let Some(cell) = self.row.cells.get(cell) {
            self.cells.text.copy_from(&cell.text);
        }
        let _ = self.cells.current.compare_exchange(word, NO_CELL, Ordering::Release, Ordering::Relaxed);
    }

    /// Records that this process is about to die because of this thread. Stores the request that the thread is running, or its absence, as
    /// the culprit. Async-signal-safe.
    pub fn accuse(&self) {
        let word = self.cells.current.load(Ordering::Relaxed);
        if self.row.epoch.load(Ordering::Relaxed) != self.epoch {
            return;
        }
        if let Some(cell) = word.checked_sub(1) {
            let shown = usize::try_from(cell).ok().and_then(|cell| self.row.cells.get(cell));
            self.row.culprit.text.copy_from(shown.map_or(&self.cells.text, |cell| &cell.text));
        }
        let found = if word == 0 { NO_REQUEST } else { CULPRIT_KNOWN };
        self.row.culprit.stamp_ms.store(found, Ordering::Release);
    }
}

impl ThreadCells {
    /// Returns the request that the thread in this thread slot of `row` is running.
    pub(super) fn read(&self, row: &RowCells) -> Option<String> {
        let word = self.current.load(Ordering::Acquire);
        let shown = usize::try_from(word.checked_sub(1)?).ok().and_then(|cell| row.cells.get(cell));
        Some(shown.map_or(&self.text, |cell| &cell.text).read())
    }
}
