//! Purges by prefix. A purge takes effect for all readers immediately, although removing the affected pages takes a while.
//!
//! The table contains the latest purges, each with its prefix and its time on the tag clock (`tags.rs`). A page is purged if its key begins
//! with a prefix whose purge is later than the time at which the rendering of the page began. A purge is published by a single store, which
//! sets its time. The purger then scans the index, removes the affected pages, and marks the purge as *swept*. A swept purge still rejects
//! pages whose rendering began before the purge, until its cell is reused. The *floor* is the time of the latest purge whose cell was
//! reused. A page whose rendering began before the floor is not stored, whatever its key.
//!
//! If the purger is killed before it stores the time, the purge has not taken effect. If it is killed while sweeping, the purge remains
//! in effect, and the next sweep of the cache removes the remaining pages. If no cell is free or swept, the whole cache is cleared
//! instead.
//!
//! Must not lock a shard.

use std::sync::atomic::{AtomicU64, Ordering};

use super::entry::Entry;
use super::tags::TagClock;
use crate::crash;
use crate::memory::SharedMemory;
use crate::memory::layout::{PREFIX_WORDS, PREFIXES, PrefixCell, SegmentHead};
use crate::memory::wait;

/// Maximum length of a prefix in bytes. A longer prefix is truncated, and thus purges more pages than requested.
pub(crate) const LONGEST: usize = PREFIX_WORDS * 8;

/// The table of one segment.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Prefixes<'a> {
    inner: &'a SharedMemory,
    header: &'a SegmentHead,
    cells: &'a [PrefixCell],
}

/// A published purge.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Purge {
    cell: usize,
    pub(crate) clock: u64,
    prefix: Prefix,
}

impl Purge {
    pub(crate) fn prefix(&self) -> &[u8] {
        self.prefix.bytes()
    }
}

/// A key prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Prefix {
    bytes: [u8; LONGEST],
    len: usize,
}

impl Prefix {
    pub(crate) fn new(prefix: &[u8]) -> Prefix {
        let len = prefix.len().min(LONGEST);
        let mut bytes = [0; LONGEST];
        bytes[..len].copy_from_slice(&prefix[..len]);
        Prefix { bytes, len }
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes[..self.len.min(LONGEST)]
    }
}

impl<'a> Prefixes<'a> {
    pub(crate) fn of(inner: &'a SharedMemory) -> Option<Prefixes<'a>> {
        let cells = inner.map.slice(inner.geometry.prefixes_at, PREFIXES as u64)?;
        Some(Prefixes { inner, header: inner.header()?, cells })
    }

    /// Publishes a purge. Returns `None` if no cell can be used, because all purges are still being swept or because a process does not
    /// release the table's lock.
    pub(crate) fn announce(self, prefix: &[u8], clock: TagClock<'_>) -> Option<Purge> {
        // A cell that a dead process left partly written is invalid and will be reused, so no repair is needed.
        self.inner.take_lock(&self.header.prefix_lock, false)?;
        let purge = self.announce_locked(prefix, clock);
        wait::release(&self.header.prefix_lock);
        purge
    }

    fn announce_locked(self, prefix: &[u8], clock: TagClock<'_>) -> Option<Purge> {
        let usable = |&(_, cell): &(usize, &PrefixCell)| {
            cell.clock.load(Ordering::Acquire) == 0 || cell.swept.load(Ordering::Acquire) != 0
        };
        let oldest = |&(_, cell): &(usize, &PrefixCell)| cell.clock.load(Ordering::Acquire);
        let (at, cell) = self.cells.iter().enumerate().filter(usable).min_by_key(oldest)?;
        let prefix = Prefix::new(prefix);
        self.header.prefix_floor.fetch_max(cell.clock.load(Ordering::Acquire), Ordering::SeqCst);
        crash::point("prefix: floor raised");
        cell.clock.store(0, Ordering::SeqCst);
        for (word, bytes) in cell.text.iter().zip(prefix.bytes.chunks_exact(8)) {
            let mut whole = [0; 8];
            whole.copy_from_slice(bytes);
            word.store(u64::from_le_bytes(whole), Ordering::Release);
        }
        cell.length.store(u32::try_from(prefix.len).unwrap_or(0), Ordering::Release);
        cell.swept.store(0, Ordering::Release);
        crash::point("prefix: text written");
        let time = clock.tick();
        // `prefix_clock` may be raised early, because it only shows readers whether a search is worthwhile. The purge is published when the
        // time is stored in its cell.
        self.header.prefix_clock.fetch_max(time, Ordering::SeqCst);
        crash::point("prefix: about to be published");
        cell.clock.store(time, Ordering::SeqCst);
        crash::point("prefix: published");
        Some(Purge { cell: at, clock: time, prefix })
    }

    /// Marks a purge as swept: all affected pages have been removed.
    pub(crate) fn swept(self, purge: &Purge) {
        if let Some(cell) = self.cells.get(purge.cell)
            && cell.clock.load(Ordering::Acquire) == purge.clock
        {
            cell.swept.store(1, Ordering::Release);
        }
    }

    /// Returns the purges whose sweep has not finished.
    pub(crate) fn unswept(self) -> impl Iterator<Item = Purge> {
        let unswept = self.cells.iter().enumerate().filter(|(_, cell)| cell.swept.load(Ordering::Acquire) == 0);
        unswept.filter_map(|(at, cell)| read(at, cell))
    }

    /// Whether an entry's key was purged by prefix after `snapshot`.
    pub(crate) fn purged_entry(self, entry: &Entry<'_>, snapshot: u64) -> bool {
        if self.header.prefix_clock.load(Ordering::SeqCst) <= snapshot {
            return false;
        }
        self.since(snapshot).any(|purge| entry.key_starts_with(purge.prefix.bytes()))
    }

    /// Whether a page that is about to be stored under `key`, and whose rendering began at `snapshot`, is out of date.
    pub(crate) fn purged_key(self, key: &[u8], snapshot: u64) -> bool {
        // The floor must be read last. It is raised before a purge is removed from its cell, so a purge that was missed in the cells is
        // detected here.
        self.since(snapshot).any(|purge| key.starts_with(purge.prefix.bytes()))
            || self.header.prefix_floor.load(Ordering::SeqCst) > snapshot
    }

    fn since(self, snapshot: u64) -> impl Iterator<Item = Purge> {
        self.cells
            .iter()
            .enumerate()
            .filter_map(|(at, cell)| read(at, cell))
            .filter(move |purge| purge.clock > snapshot)
    }
}

/// Reads a cell. Returns `None` if it is empty or is being written.
fn read(at: usize, cell: &PrefixCell) -> Option<Purge> {
    let clock = cell.clock.load(Ordering::Acquire);
    if clock == 0 {
        return None;
    }
    let mut bytes = [0; LONGEST];
    for (chunk, word) in bytes.chunks_exact_mut(8).zip(&cell.text) {
        chunk.copy_from_slice(&AtomicU64::load(word, Ordering::Acquire).to_le_bytes());
    }
    let len = usize::try_from(cell.length.load(Ordering::Acquire)).unwrap_or(LONGEST).min(LONGEST);
    let purge = Purge { cell: at, clock, prefix: Prefix { bytes, len } };
    (cell.clock.load(Ordering::Acquire) == clock).then_some(purge)
}
