//! A page read in place.

use std::fmt;
use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::cache::copy_value;
use crate::fork;
use crate::index::Ring;
use crate::layout::PINS;
use crate::pin;
use crate::read::Sight;
use crate::segment::Inner;

/// A page of the cache, in place: its bytes stay what they are until this is dropped, also if the page is purged or replaced
/// meanwhile.
///
/// To be written with plain `write`, not by ways of the kernel that read the memory later (`MSG_ZEROCOPY`, `vmsplice`).
/// A child of fork that inherits this sees it empty, as it is the parent that pins.
pub struct Pinned {
    bytes: Kept,
}

enum Kept {
    Here { inner: Arc<Inner>, generation: u32, member: u32, cell: usize, at: u64, len: u64 },
    Copy(Vec<u8>),
}

impl Pinned {
    /// Pins what was found; `None` if it is gone already. A copy, if no pin is to be had.
    pub(crate) fn new(inner: &Arc<Inner>, shard: u64, sight: &Sight<'_>) -> Option<Pinned> {
        let generation = fork::generation();
        let Some((member, cell)) = inner.member().and_then(|me| Some((me, take_cell(&me.head.pins_taken)?))) else {
            let mut copy = Vec::new();
            copy_value(sight, &mut copy)?;
            return Some(Pinned { bytes: Kept::Copy(copy) });
        };
        let (entry, place) = (sight.entry, sight.place);
        // From here on the cell is given back by `drop`.
        let (at, len) = (entry.value_at(), entry.value_len);
        let inner = Arc::clone(inner);
        let pinned = Pinned { bytes: Kept::Here { inner, generation, member: member.number, cell, at, len } };
        let word = pin::word(shard, place.ring == Ring::Main, place.position);
        let floor = sight.floor();
        let words = member.head.pins.get(cell)?;
        crate::crash::point("pin: cell taken");
        pin::set(&words.place, &words.size, word, entry.size, place.position, floor).then_some(pinned)
    }
}

/// Takes one of a process's own cells.
fn take_cell(taken: &AtomicU64) -> Option<usize> {
    let mut seen = taken.load(Ordering::Relaxed);
    loop {
        let free = seen.trailing_ones() as usize;
        if free >= PINS {
            return None;
        }
        match taken.compare_exchange_weak(seen, seen | 1 << free, Ordering::AcqRel, Ordering::Relaxed) {
            Ok(_) => return Some(free),
            Err(now) => seen = now,
        }
    }
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
        let Kept::Here { inner, generation, member, cell, .. } = &self.bytes else { return };
        if *generation != fork::generation() {
            return;
        }
        if let Some(member) = inner.member().filter(|me| me.number == *member) {
            if let Some(words) = member.head.pins.get(*cell) {
                words.free();
            }
            member.head.pins_taken.fetch_and(!(1 << cell), Ordering::AcqRel);
        }
    }
}

impl fmt::Debug for Pinned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let in_place = matches!(self.bytes, Kept::Here { .. });
        f.debug_struct("Pinned").field("len", &self.len()).field("in_place", &in_place).finish()
    }
}
