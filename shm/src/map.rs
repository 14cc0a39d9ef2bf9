//! The mapping: every access to shared bytes goes through here.
//!
//! Raw pointers never leave this file. What leaves it are references to [`Plain`] types, which consist of atomics only,
//! and copies of byte ranges. Every offset is checked against the length that was mapped, never against a length
//! found in the segment, so a segment full of nonsense yields `None`, not an access out of bounds.
//!
//! May not: know what the bytes mean, take locks, or resize the mapping.
#![expect(unsafe_code, reason = "the fence around the mapped memory")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicU64, Ordering};

use memmap2::{MmapOptions, MmapRaw};

/// A type that may be viewed in place in memory that other processes write.
///
/// # Safety
/// The type is `repr(C)`, every byte of it lies inside an `UnsafeCell` (an atomic, or the lock), and every bit pattern
/// is a valid value, so that a reference stays sound whatever another process stores there.
pub(crate) unsafe trait Plain {}

// SAFETY: one atomic word, valid for every bit pattern.
unsafe impl Plain for AtomicU64 {}

/// A shared mapping of a whole segment; unmapped on drop.
#[derive(Debug)]
pub(crate) struct Map {
    raw: MmapRaw,
}

impl Map {
    /// Maps the first `len` bytes of `fd`, shared and writable.
    ///
    /// The caller has made sure that the file is at least that long and sealed against shrinking;
    /// otherwise touching it could raise SIGBUS (which is no memory error, but kills the process).
    pub(crate) fn new(fd: BorrowedFd<'_>, len: u64) -> io::Result<Map> {
        let len = usize::try_from(len).map_err(|_| io::ErrorKind::OutOfMemory)?;
        Ok(Map { raw: MmapOptions::new().len(len).map_raw(fd.as_raw_fd())? })
    }

    /// The `T` at `offset`, if it lies inside the mapping and is aligned.
    pub(crate) fn at<T: Plain>(&self, offset: u64) -> Option<&T> {
        self.slice(offset, 1)?.first()
    }

    /// `count` values of `T` from `offset` on, if all lie inside the mapping and are aligned.
    pub(crate) fn slice<T: Plain>(&self, offset: u64, count: u64) -> Option<&[T]> {
        let bytes = count.checked_mul(size_of::<T>() as u64)?;
        let start = self.range(offset, bytes)?.cast::<T>();
        if !start.is_aligned() {
            return None;
        }
        let count = usize::try_from(count).ok()?;
        // SAFETY: `range` checked that the bytes lie inside the mapping, which lives as long as `self`; the pointer is
        // aligned; `T: Plain` accepts any bytes and allows them to change, by us or by another process, at any time.
        Some(unsafe { std::slice::from_raw_parts(start.cast_const(), count) })
    }

    /// Copies `bytes` to `offset`.
    pub(crate) fn write(&self, offset: u64, bytes: &[u8]) -> Option<()> {
        let to = self.range(offset, bytes.len() as u64)?;
        // SAFETY: the target lies inside the mapping and `bytes`, a Rust slice, does not. No reference to the target
        // can be harmed: only `Plain` ones exist. The caller holds the shard's lock, so no well-behaved process
        // touches the range meanwhile; an ill-behaved one can spoil the bytes copied, nothing else.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
        Some(())
    }

    /// Appends the `len` bytes at `offset` to `out`, which must have the room already: this never allocates.
    pub(crate) fn read(&self, offset: u64, len: u64, out: &mut Vec<u8>) -> Option<()> {
        let from = self.range(offset, len)?;
        let len = usize::try_from(len).ok()?;
        let spare = out.spare_capacity_mut();
        if spare.len() < len {
            return None;
        }
        // SAFETY: the source lies inside the mapping, the target is private memory with room for `len` bytes. Under
        // the shard's lock no well-behaved process writes the source; a byte from an ill-behaved one is still a byte.
        unsafe { std::ptr::copy_nonoverlapping(from.cast_const(), spare.as_mut_ptr().cast::<u8>(), len) };
        let filled = out.len() + len;
        // SAFETY: the `len` bytes after the old length were written just above, and the capacity was checked.
        unsafe { out.set_len(filled) };
        Some(())
    }

    /// Moves `len` bytes from one place in the mapping to another; the two may overlap.
    pub(crate) fn shift(&self, from: u64, to: u64, len: u64) -> Option<()> {
        let from = self.range(from, len)?;
        let to = self.range(to, len)?;
        let len = usize::try_from(len).ok()?;
        // SAFETY: both ranges lie inside the mapping; `copy` allows overlap; as to other processes see `write`.
        unsafe { std::ptr::copy(from.cast_const(), to, len) };
        Some(())
    }

    /// Whether the bytes at `offset`, which must be a multiple of 8, are `bytes`.
    ///
    /// Compares by words: the last one is masked, so up to 7 bytes behind the range must be mapped too.
    pub(crate) fn equals(&self, offset: u64, bytes: &[u8]) -> Option<bool> {
        let words = self.slice::<AtomicU64>(offset, (bytes.len() as u64).div_ceil(8))?;
        for (word, chunk) in words.iter().zip(bytes.chunks(8)) {
            let found = word.load(Ordering::Relaxed).to_ne_bytes();
            if !found.starts_with(chunk) {
                return Some(false);
            }
        }
        Some(true)
    }

    /// The start of `len` bytes at `offset`, if they lie inside the mapping.
    fn range(&self, offset: u64, len: u64) -> Option<*mut u8> {
        let end = offset.checked_add(len)?;
        if end > self.raw.len() as u64 {
            return None;
        }
        let offset = usize::try_from(offset).ok()?;
        // SAFETY: `offset <= end <= len of the mapping`, so the result stays within it or one past its end.
        Some(unsafe { self.raw.as_mut_ptr().add(offset) })
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::os::fd::AsFd;

    use nix::sys::memfd::{MFdFlags, memfd_create};

    use super::*;

    pub(crate) fn scratch(len: u64) -> Map {
        let fd = memfd_create(c"scratch", MFdFlags::MFD_CLOEXEC).unwrap();
        nix::unistd::ftruncate(&fd, i64::try_from(len).unwrap()).unwrap();
        Map::new(fd.as_fd(), len).unwrap()
    }

    #[test]
    fn refuses_what_lies_outside_or_askew() {
        let map = scratch(4096);
        assert!(map.at::<AtomicU64>(4088).is_some());
        for offset in [4089, 4090, 4096, 1, 4, u64::MAX, u64::MAX - 7] {
            assert!(map.at::<AtomicU64>(offset).is_none(), "offset {offset}");
        }
        assert!(map.slice::<AtomicU64>(0, 512).is_some());
        assert!(map.slice::<AtomicU64>(0, 513).is_none());
        assert!(map.slice::<AtomicU64>(8, u64::MAX).is_none());
        assert!(map.write(4090, b"1234567").is_none());
        assert!(map.shift(0, 4000, 97).is_none());
        assert!(map.equals(4, b"x").is_none());
        assert!(map.read(0, 8, &mut Vec::new()).is_none(), "no room in the target");
        assert!(map.read(4090, 7, &mut Vec::with_capacity(64)).is_none());
    }

    #[test]
    fn copies_in_out_and_along() {
        let map = scratch(4096);
        map.write(16, b"hello, world").unwrap();
        assert_eq!(map.equals(16, b"hello, world"), Some(true));
        assert_eq!(map.equals(16, b"hello, worle"), Some(false));
        assert_eq!(map.equals(16, b"hello, w"), Some(true));
        assert_eq!(map.equals(16, b""), Some(true));
        map.shift(16, 21, 12).unwrap();
        let mut out = Vec::with_capacity(64);
        map.read(16, 17, &mut out).unwrap();
        assert_eq!(out, b"hellohello, world");
    }
}
