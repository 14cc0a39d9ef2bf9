//! Reads a page in place.
#![expect(unsafe_code, reason = "a slice of shared memory, for those who promise that it does not change")]

use std::fmt;
use std::io;
use std::ops::Deref;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::index::Ring;
use super::read::Sight;
use crate::cache::copy_value;
use crate::crash;
use crate::memory::SharedMemory;
use crate::memory::fork;
use crate::protocols::pin;
use crate::protocols::pin::Pin;

/// A page in the cache that is read in place. Its bytes do not change until this value is dropped, even if the page is purged or replaced,
/// provided that all processes that map the segment follow its protocol.
///
/// Rust cannot enforce this for another process. This type therefore does not lend a `&[u8]`, which would guarantee to the compiler that
/// the bytes do not change. Instead, it copies the bytes, or has the kernel write them from shared memory. If a process misbehaves, the
/// result is a mixture of old and new bytes, and nothing worse. [`Pinned::into_slice`] is for callers that can guarantee the behaviour
/// of all processes.
///
/// In a forked child that inherits this value, it is empty, because the pin belongs to the parent.
pub struct Pinned {
    bytes: Kept,
}

/// A pinned page as a slice: see [`Pinned::into_slice`].
#[derive(Debug)]
pub struct PinnedSlice(Pinned);

enum Kept {
    Here { inner: Arc<SharedMemory>, generation: u32, cell: u64, at: u64, len: u64 },
    Copy(Vec<u8>),
}

impl Pinned {
    /// Pins the entry, or copies it if no pin is available. Returns `None` if the entry has already been overwritten.
    pub(crate) fn new(inner: &Arc<SharedMemory>, sight: &Sight<'_, '_>) -> Option<Pinned> {
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
        // The length was read before the entry was checked, but the entry was still valid at the check, so the length
        // is correct.
        let (at, len) = (entry.value_at(), entry.value_len);
        Some(Pinned {
            bytes: Kept::Here { inner: Arc::clone(inner), generation: fork::generation(), cell: number, at, len },
        })
    }
}

/// Sets the pin in a free cell of this process, and returns the cell.
fn take_cell(cells: &[AtomicU64], pin: Pin) -> Option<(u64, &AtomicU64)> {
    let mut cells = (0..).zip(cells);
    cells.find(|(_, cell)| cell.load(Ordering::Relaxed) == 0 && pin::set(cell, pin))
}

impl Pinned {
    /// Returns the length in bytes.
    pub fn len(&self) -> usize {
        match &self.bytes {
            Kept::Copy(bytes) => bytes.len(),
            Kept::Here { .. } => self.here().map_or(0, |(_, _, len)| usize::try_from(len).unwrap_or(0)),
        }
    }

    /// Whether the page is empty.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Copies bytes into `target`, beginning at offset `from`, until the page or `target` ends. Returns the number of bytes copied.
    pub fn copy_to(&self, from: usize, target: &mut [u8]) -> usize {
        let count = self.len().saturating_sub(from).min(target.len());
        let target = &mut target[..count];
        match (&self.bytes, self.here()) {
            (Kept::Copy(bytes), _) => target.copy_from_slice(&bytes[from..][..count]),
            (Kept::Here { .. }, Some((inner, at, _))) => {
                if inner.map.read_into(at + from as u64, target).is_none() {
                    return 0;
                }
            }
            (Kept::Here { .. }, None) => return 0,
        }
        count
    }

    /// Copies all bytes.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut copy = vec![0; self.len()];
        let count = self.copy_to(0, &mut copy);
        copy.truncate(count);
        copy
    }

    /// Writes the bytes from offset `from` on to a file or a socket with `write(2)`; the kernel reads them in place. Returns the number of
    /// bytes written, which may be fewer than requested.
    ///
    /// # Errors
    /// Returns the error from `write(2)`.
    pub fn write_to(&self, from: usize, file: impl AsFd) -> io::Result<usize> {
        let count = self.len().saturating_sub(from);
        match (&self.bytes, self.here()) {
            (Kept::Copy(bytes), _) => Ok(nix::unistd::write(file, &bytes[bytes.len() - count..])?),
            (Kept::Here { .. }, Some((inner, at, _))) => {
                inner.map.write_to(at + from as u64, count as u64, file.as_fd()).unwrap_or(Ok(0))
            }
            (Kept::Here { .. }, None) => Ok(0),
        }
    }

    /// Returns the bytes as a slice, without a copy, for libraries that accept nothing else (`Bytes::from_owner`, for example).
    ///
    /// # Safety
    /// While the result exists, no process may write to the bytes of this entry. Forkyard's own code never writes to them, in any process,
    /// but a stray write by any process that maps the segment may change them. The bytes must also not be passed to the kernel for deferred
    /// reading (`MSG_ZEROCOPY`, `vmsplice`) that may outlast the result.
    pub unsafe fn into_slice(self) -> PinnedSlice {
        PinnedSlice(self)
    }

    /// Returns the location of the bytes, if they are pinned by this process.
    fn here(&self) -> Option<(&SharedMemory, u64, u64)> {
        match &self.bytes {
            Kept::Here { inner, generation, at, len, .. } if *generation == fork::generation() => {
                Some((inner, *at, *len))
            }
            Kept::Here { .. } | Kept::Copy(_) => None,
        }
    }
}

impl Deref for PinnedSlice {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match (&self.0.bytes, self.0.here()) {
            (Kept::Copy(bytes), _) => bytes,
            // SAFETY: the bytes are pinned as long as `self` exists. The caller of `into_slice` guarantees that nothing else writes to
            // them.
            (Kept::Here { .. }, Some((inner, at, len))) => unsafe { inner.map.pinned(at, len) }.unwrap_or_default(),
            (Kept::Here { .. }, None) => &[],
        }
    }
}

impl AsRef<[u8]> for PinnedSlice {
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
