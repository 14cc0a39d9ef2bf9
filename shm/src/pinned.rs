//! A page read in place.

use std::fmt;
use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::cache::copy_value;
use crate::index::Ring;
use crate::pin::Pin;
use crate::read::Sight;
use crate::segment::Inner;
use crate::{crash, fork, pin};

/// A page of the cache, in place: its bytes stay what they are until this is dropped, also if the page is purged or replaced
/// meanwhile.
///
/// To be written with plain `write`, not by ways of the kernel that read the memory later (`MSG_ZEROCOPY`, `vmsplice`).
/// A child of fork that inherits this sees it empty, as it is the parent that pins.
pub struct Pinned {
    bytes: Kept,
}

enum Kept {
    Here { inner: Arc<Inner>, generation: u32, cell: u64, at: u64, len: u64 },
    Copy(Vec<u8>),
}

impl Pinned {
    /// Pins what was found; `None` if it is gone already. A copy, if no pin is to be had.
    pub(crate) fn new(inner: &Arc<Inner>, sight: &Sight<'_, '_>) -> Option<Pinned> {
        let (entry, place) = (&sight.entry, sight.place);
        let pin = Pin {
            shard: sight.shard.number,
            main: place.ring == Ring::Main,
            position: place.position,
            size: entry.size,
        };
        let Some((number, cell)) = inner.member().and_then(|me| take_cell(&me.head.pins, pin)) else {
            let mut copy = Vec::new();
            copy_value(sight, &mut copy)?;
            return Some(Pinned { bytes: Kept::Copy(copy) });
        };
        crash::point("pin: set");
        if !pin::holds(cell, place.position, sight.floor()) {
            return None;
        }
        crash::point("pin: holds");
        // The length was read before, but the entry held until now, so it is true.
        let (at, len) = (entry.value_at(), entry.value_len);
        Some(Pinned {
            bytes: Kept::Here { inner: Arc::clone(inner), generation: fork::generation(), cell: number, at, len },
        })
    }
}

/// Pins by one of a process's own cells.
fn take_cell(cells: &[AtomicU64], pin: Pin) -> Option<(u64, &AtomicU64)> {
    let mut cells = (0..).zip(cells);
    cells.find(|(_, cell)| cell.load(Ordering::Relaxed) == 0 && pin::set(cell, pin))
}

impl Deref for Pinned {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match &self.bytes {
            Kept::Copy(bytes) => bytes,
            Kept::Here { inner, generation, at, len, .. } if *generation == fork::generation() => {
                inner.map.pinned(*at, *len).unwrap_or_default()
            }
            Kept::Here { .. } => &[],
        }
    }
}

impl AsRef<[u8]> for Pinned {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let Kept::Here { inner, generation, cell, .. } = &self.bytes else { return };
        if *generation == fork::generation()
            && let Some(member) = inner.member()
            && let Some(cell) = usize::try_from(*cell).ok().and_then(|cell| member.head.pins.get(cell))
        {
            pin::free(cell);
        }
    }
}

impl fmt::Debug for Pinned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let in_place = matches!(self.bytes, Kept::Here { .. });
        f.debug_struct("Pinned").field("len", &self.len()).field("in_place", &in_place).finish()
    }
}
