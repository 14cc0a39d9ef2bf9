//! The mapping, through which all accesses to shared bytes go.
//!
//! Raw pointers never leave this file. Its functions return references to [`Plain`] types (types that consist of atomics only) and copies
//! of byte ranges. Every offset is checked against the length that was mapped, never against a length read from the segment. A corrupted
//! segment therefore yields `None` instead of an out-of-bounds access.
//!
//! Must not interpret the bytes, take locks, or resize the mapping.
#![expect(unsafe_code, reason = "the fence around the mapped memory")]

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd};
#[cfg(not(all(target_arch = "x86_64", not(miri))))]
use std::sync::atomic::AtomicU8;
use std::sync::atomic::{AtomicU64, Ordering};

use super::lost_pages::Guarded;

/// A type that may be viewed in place in memory that other processes write to.
///
/// # Safety
/// The type must be `repr(C)`, every byte of it must lie inside an `UnsafeCell` (an atomic), and every bit pattern must be
/// a valid value, so that a reference stays sound whatever another process stores there.
pub(crate) unsafe trait Plain {}

// SAFETY: an atomic word, for which every bit pattern is valid.
unsafe impl Plain for AtomicU64 {}

/// A shared mapping of a whole segment; unmapped on drop.
#[derive(Debug)]
pub(crate) struct Map {
    /// The table entry for a file that may be truncated. Declared before the memory, because fields are dropped in declaration order.
    guarded: Option<Guarded>,
    memory: Memory,
}

#[cfg(not(miri))]
type Memory = memmap2::MmapRaw;

/// Miri does not support shared mappings, so under Miri a segment is private memory.
#[cfg(miri)]
#[derive(Debug)]
struct Memory {
    bytes: *mut u8,
    layout: std::alloc::Layout,
}

#[cfg(miri)]
mod heap {
    use super::Memory;

    // SAFETY: the memory is accessed only through atomics and the copy functions in this file.
    unsafe impl Send for Memory {}
    // SAFETY: the memory is accessed only through atomics and the copy functions in this file.
    unsafe impl Sync for Memory {}

    impl Memory {
        pub(crate) fn new(len: usize) -> Memory {
            let layout = std::alloc::Layout::from_size_align(len, 4096).unwrap();
            // SAFETY: the length is not 0.
            Memory { bytes: unsafe { std::alloc::alloc_zeroed(layout) }, layout }
        }
        pub(crate) fn len(&self) -> usize {
            self.layout.size()
        }
        pub(crate) fn as_mut_ptr(&self) -> *mut u8 {
            self.bytes
        }
    }

    impl Drop for Memory {
        fn drop(&mut self) {
            // SAFETY: the memory was allocated with the same layout.
            unsafe { std::alloc::dealloc(self.bytes, self.layout) }
        }
    }
}

impl Map {
    /// Maps the first `len` bytes of `fd`, shared and writable.
    ///
    /// The caller must have checked that the file is at least that long. If the file is not sealed and is truncated later, its pages are
    /// [lost](Map::is_lost).
    #[cfg(not(miri))]
    pub(crate) fn new(fd: BorrowedFd<'_>, len: u64) -> io::Result<Map> {
        let len = usize::try_from(len).map_err(|_| io::ErrorKind::OutOfMemory)?;
        let memory = memmap2::MmapOptions::new().len(len).map_raw(fd.as_raw_fd())?;
        let guarded = Guarded::new(fd, memory.as_mut_ptr(), len)?;
        Ok(Map { guarded, memory })
    }

    /// Allocates private memory instead of mapping the file.
    #[cfg(miri)]
    pub(crate) fn new(_: BorrowedFd<'_>, len: u64) -> io::Result<Map> {
        Ok(Map { guarded: None, memory: Memory::new(usize::try_from(len).map_err(|_| io::ErrorKind::OutOfMemory)?) })
    }

    /// Whether the file has been truncated and a process in this chain of forks has accessed the lost part. If so, the
    /// memory must no longer be used: reads may return zeroes, and writes may be visible to this process only.
    #[inline]
    pub(crate) fn is_lost(&self) -> bool {
        self.guarded.as_ref().is_some_and(Guarded::is_lost)
    }

    /// Like [`is_lost`](Map::is_lost), but also marks the memory as lost if `is_short` returns true. `is_short` is not called for a
    /// sealed file.
    pub(crate) fn is_lost_if(&self, is_short: impl FnOnce() -> bool) -> bool {
        self.guarded.as_ref().is_some_and(|guarded| {
            if !guarded.is_lost() && is_short() {
                guarded.lose();
            }
            guarded.is_lost()
        })
    }

    /// Requests huge pages, and maps all pages now instead of during requests. Failures are harmless.
    #[cfg(not(miri))]
    pub(crate) fn warm(&self) {
        let _ = self.memory.advise(memmap2::Advice::HugePage);
        let _ = self.memory.advise(memmap2::Advice::PopulateWrite);
    }

    #[cfg(miri)]
    pub(crate) fn warm(&self) {}

    /// Writes a file's mapping back to disk.
    #[cfg(not(miri))]
    pub(crate) fn flush(&self) -> io::Result<()> {
        self.memory.flush()
    }

    #[cfg(miri)]
    pub(crate) fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    /// Writes the first page of a file's mapping back to disk.
    #[cfg(not(miri))]
    pub(crate) fn flush_start(&self) -> io::Result<()> {
        self.memory.flush_range(0, 4096.min(self.memory.len()))
    }

    #[cfg(miri)]
    pub(crate) fn flush_start(&self) -> io::Result<()> {
        Ok(())
    }

    /// Returns the `T` at `offset`, if it lies inside the mapping and is aligned.
    pub(crate) fn at<T: Plain>(&self, offset: u64) -> Option<&T> {
        self.slice(offset, 1)?.first()
    }

    /// Returns `count` values of type `T` starting at `offset`, if all of them lie inside the mapping and are aligned.
    pub(crate) fn slice<T: Plain>(&self, offset: u64, count: u64) -> Option<&[T]> {
        let bytes = count.checked_mul(size_of::<T>() as u64)?;
        let start = self.range(offset, bytes)?.cast::<T>();
        if !start.is_aligned() {
            return None;
        }
        let count = usize::try_from(count).ok()?;
        // SAFETY: `range` checked that the bytes lie inside the mapping, which lives as long as `self`. The pointer is
        // aligned. `T: Plain` accepts any bytes and allows this or another process to change them at any time.
        Some(unsafe { std::slice::from_raw_parts(start.cast_const(), count) })
    }

    /// Copies `bytes` to `offset`.
    pub(crate) fn write(&self, offset: u64, bytes: &[u8]) -> Option<()> {
        let to = self.range(offset, bytes.len() as u64)?;
        // SAFETY: the target lies inside the mapping, and `bytes`, a Rust slice, does not. There are two kinds of references into the
        // target. References to `Plain` types tolerate writes. For slices of pinned ranges, the caller of `pinned` is responsible. Another
        // process may read or write the target at the same time, which `copy` permits.
        unsafe { copy(Side::Private(bytes.as_ptr()), Side::Shared(to), bytes.len()) };
        Some(())
    }

    /// Appends the `len` bytes at `offset` to `out`, which must have enough capacity. Never allocates.
    ///
    /// Another process may write to these bytes at the same time. The copy may then be a mixture of old and new bytes, which the caller
    /// must detect and discard.
    pub(crate) fn read(&self, offset: u64, len: u64, out: &mut Vec<u8>) -> Option<()> {
        let from = self.range(offset, len)?;
        let len = usize::try_from(len).ok()?;
        let spare = out.spare_capacity_mut();
        if spare.len() < len {
            return None;
        }
        // SAFETY: the source lies inside the mapping; the target is private memory with room for `len` bytes.
        unsafe { copy(Side::Shared(from.cast_const()), Side::Private(spare.as_mut_ptr().cast::<u8>()), len) };
        let filled = out.len() + len;
        // SAFETY: the `len` bytes after the old length have just been written, and the capacity was checked.
        unsafe { out.set_len(filled) };
        Some(())
    }

    /// Copies `len` bytes from one offset in the mapping to another. Returns `None` if a range is not inside the mapping, or if the two
    /// ranges overlap.
    pub(crate) fn shift(&self, from: u64, to: u64, len: u64) -> Option<()> {
        let apart = from.checked_add(len)? <= to || to.checked_add(len)? <= from;
        let from = self.range(from, len)?;
        let to = self.range(to, len)?;
        let len = usize::try_from(len).ok()?;
        if !apart {
            return None;
        }
        // SAFETY: both ranges lie inside the mapping and do not overlap; for concurrent writes by other processes, see
        // `write`.
        unsafe { copy(Side::Shared(from.cast_const()), Side::Shared(to), len) };
        Some(())
    }

    /// Fills `out` with the bytes at `offset`. For concurrent writes by other processes, see [`Map::read`].
    pub(crate) fn read_into(&self, offset: u64, out: &mut [u8]) -> Option<()> {
        let from = self.range(offset, out.len() as u64)?;
        // SAFETY: the source lies inside the mapping, and the target is private memory.
        unsafe { copy(Side::Shared(from.cast_const()), Side::Private(out.as_mut_ptr()), out.len()) };
        Some(())
    }

    /// Has the kernel write the `len` bytes at `offset` to a file or socket, without a copy in this process. Returns the number of bytes
    /// written, or `None` if the bytes do not lie inside the mapping.
    pub(crate) fn write_to(&self, offset: u64, len: u64, file: BorrowedFd<'_>) -> Option<io::Result<usize>> {
        let start = self.range(offset, len)?;
        let len = usize::try_from(len).ok()?;
        // SAFETY: the bytes lie inside the mapping, which outlives the call. The kernel allows them to change while it reads
        // them.
        let written = unsafe { libc::write(file.as_raw_fd(), start.cast_const().cast(), len) };
        Some(usize::try_from(written).map_err(|_| io::Error::last_os_error()))
    }

    /// Returns the bytes of a pinned entry, in place.
    ///
    /// # Safety
    /// No process may write to the bytes while the result exists. The caller must hold a pin on the entry that contains them, and must have
    /// found the entry valid after setting the pin. From then until the pin is removed, no member of the segment that follows the protocol
    /// writes to these bytes. The caller is responsible for ensuring that all processes that map the segment follow the protocol.
    pub(crate) unsafe fn pinned(&self, offset: u64, len: u64) -> Option<&[u8]> {
        let start = self.range(offset, len)?;
        let len = usize::try_from(len).ok()?;
        // SAFETY: the bytes lie inside the mapping, which lives as long as `self`, and do not change, as the caller guarantees.
        Some(unsafe { std::slice::from_raw_parts(start.cast_const(), len) })
    }

    /// Whether the bytes at `offset`, which must be a multiple of 8, equal `bytes`.
    ///
    /// Compares word by word. The last word is masked, so up to 7 bytes after the range must be mapped too.
    #[inline]
    pub(crate) fn equals(&self, offset: u64, bytes: &[u8]) -> Option<bool> {
        let words = self.slice::<AtomicU64>(offset, (bytes.len() as u64).div_ceil(8))?;
        let (whole, rest) = bytes.as_chunks();
        // There is no branch for each word, because the words are nearly always all equal.
        let mut difference = 0;
        for (word, chunk) in words.iter().zip(whole) {
            difference |= word.load(Ordering::Relaxed) ^ u64::from_ne_bytes(*chunk);
        }
        let Some(last) = words.get(whole.len()).map(|word| word.load(Ordering::Relaxed)) else {
            return Some(difference == 0);
        };
        // The last eight bytes, if the range is that long, without the bytes that have already been compared.
        let rest_is_it = match bytes.last_chunk() {
            Some(&tail) => {
                let unused = 8 * (8 - rest.len());
                u64::from_le_bytes(tail) >> unused == u64::from_le(last) << unused >> unused
            }
            None => last.to_ne_bytes().starts_with(rest),
        };
        Some(difference == 0 && rest_is_it)
    }

    /// Returns a pointer to the `len` bytes at `offset`, if they lie inside the mapping.
    fn range(&self, offset: u64, len: u64) -> Option<*mut u8> {
        let end = offset.checked_add(len)?;
        if end > self.memory.len() as u64 {
            return None;
        }
        let offset = usize::try_from(offset).ok()?;
        // SAFETY: `offset <= end <= len of the mapping`, so the result stays within it or one past its end.
        Some(unsafe { self.memory.as_mut_ptr().add(offset) })
    }
}

/// One side of a copy: shared memory, or private memory.
#[derive(Clone, Copy, Debug)]
enum Side<P> {
    Shared(P),
    Private(P),
}

impl<P> Side<P> {
    fn pointer(self) -> P {
        match self {
            Side::Shared(pointer) | Side::Private(pointer) => pointer,
        }
    }
}

/// Copies bytes that another process may change at the same time.
///
/// To the compiler, the copy is a few opaque instructions rather than a read of Rust memory. A race with another process or thread
/// therefore yields a mixture of old and new bytes, but no undefined behaviour. The copy is about as fast as `memcpy`. Small pages
/// are copied by a loop, because the string instruction is slow to start and does not overlap with other instructions.
///
/// # Safety
/// `len` bytes must be readable at `from` and writable at `to`, and the two ranges must not overlap.
#[cfg(all(target_arch = "x86_64", not(miri)))]
unsafe fn copy(from: Side<*const u8>, to: Side<*mut u8>, len: usize) {
    let (from, to) = (from.pointer(), to.pointer());
    if (BLOCK..=LOOPED).contains(&len) && std::is_x86_feature_detected!("avx2") {
        // SAFETY: the caller guarantees the ranges; there is at least one block, and the CPU has AVX2.
        unsafe { copy_blocks(from, to, len) };
    } else {
        // SAFETY: the caller guarantees the ranges; the direction flag is clear by the ABI.
        unsafe {
            std::arch::asm!(
                "rep movsb",
                inout("rcx") len => _,
                inout("rdi") to => _,
                inout("rsi") from => _,
                options(nostack, preserves_flags),
            );
        }
    }
}

#[cfg(all(target_arch = "x86_64", not(miri)))]
const BLOCK: usize = 128;
/// Maximum length in bytes for which the loop is faster than the string instruction.
#[cfg(all(target_arch = "x86_64", not(miri)))]
const LOOPED: usize = 4096;

/// Copies blocks of 128 bytes. The last block may overlap the one before it.
///
/// # Safety
/// The requirements of `copy` apply. In addition, `len` must be at least one block, and the CPU must have AVX2.
#[cfg(all(target_arch = "x86_64", not(miri)))]
#[target_feature(enable = "avx2")]
unsafe fn copy_blocks(from: *const u8, to: *mut u8, len: usize) {
    // SAFETY: copies whole blocks before the last one, then the last one. All of them lie inside the two ranges.
    unsafe {
        std::arch::asm!(
            "2:",
            "vmovdqu {a}, [{from} + {at}]",
            "vmovdqu {b}, [{from} + {at} + 32]",
            "vmovdqu {c}, [{from} + {at} + 64]",
            "vmovdqu {d}, [{from} + {at} + 96]",
            "vmovdqu [{to} + {at}], {a}",
            "vmovdqu [{to} + {at} + 32], {b}",
            "vmovdqu [{to} + {at} + 64], {c}",
            "vmovdqu [{to} + {at} + 96], {d}",
            "add {at}, 128",
            "cmp {at}, {last}",
            "jb 2b",
            "vmovdqu {a}, [{from} + {last}]",
            "vmovdqu {b}, [{from} + {last} + 32]",
            "vmovdqu {c}, [{from} + {last} + 64]",
            "vmovdqu {d}, [{from} + {last} + 96]",
            "vmovdqu [{to} + {last}], {a}",
            "vmovdqu [{to} + {last} + 32], {b}",
            "vmovdqu [{to} + {last} + 64], {c}",
            "vmovdqu [{to} + {last} + 96], {d}",
            "vzeroupper",
            a = out(ymm_reg) _,
            b = out(ymm_reg) _,
            c = out(ymm_reg) _,
            d = out(ymm_reg) _,
            from = in(reg) from,
            to = in(reg) to,
            last = in(reg) len - BLOCK,
            at = inout(reg) 0_usize => _,
            options(nostack),
        );
    }
}

/// Copies bytes without the string instruction: word by word where both sides are aligned, otherwise byte by byte, and atomically on the
/// shared sides.
///
/// # Safety
/// `len` bytes must be readable at `from` and writable at `to`, and the two ranges must not overlap.
#[cfg(not(all(target_arch = "x86_64", not(miri))))]
unsafe fn copy(from: Side<*const u8>, to: Side<*mut u8>, len: usize) {
    let word = size_of::<u64>();
    let aligned = from.pointer().cast::<u64>().is_aligned() && to.pointer().cast::<u64>().is_aligned();
    let whole = if aligned { len / word * word } else { 0 };
    for at in (0..whole).step_by(word) {
        // SAFETY: the word lies inside the source, and is aligned.
        let value = match from {
            Side::Shared(from) => unsafe { (*from.add(at).cast::<AtomicU64>()).load(Ordering::Relaxed) },
            Side::Private(from) => unsafe { from.add(at).cast::<u64>().read() },
        };
        // SAFETY: the word lies inside the target, and is aligned.
        match to {
            Side::Shared(to) => unsafe { (*to.add(at).cast::<AtomicU64>()).store(value, Ordering::Relaxed) },
            Side::Private(to) => unsafe { to.add(at).cast::<u64>().write(value) },
        }
    }
    for at in whole..len {
        // SAFETY: the byte lies inside the source.
        let value = match from {
            Side::Shared(from) => unsafe { (*from.add(at).cast::<AtomicU8>()).load(Ordering::Relaxed) },
            Side::Private(from) => unsafe { from.add(at).read() },
        };
        // SAFETY: the byte lies inside the target.
        match to {
            Side::Shared(to) => unsafe { (*to.add(at).cast::<AtomicU8>()).store(value, Ordering::Relaxed) },
            Side::Private(to) => unsafe { to.add(at).write(value) },
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::os::fd::AsFd;

    use nix::sys::memfd::{MFdFlags, memfd_create};

    use super::*;

    pub(crate) fn scratch(len: u64) -> Map {
        if cfg!(miri) {
            return Map::new(std::io::stdin().as_fd(), len).unwrap();
        }
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
    fn compares_any_length_whole() {
        let map = scratch(4096);
        let bytes: Vec<u8> = (1..100).collect();
        for len in 0..60 {
            map.write(64, &bytes).unwrap();
            assert_eq!(map.equals(64, &bytes[..len]), Some(true), "{len}");
            for at in 0..len {
                let mut other = bytes.clone();
                other[at] ^= 0x80;
                assert_eq!(map.equals(64, &other[..len]), Some(false), "byte {at} of {len}");
            }
        }
    }

    #[test]
    fn copies_any_length_whole() {
        let map = scratch(3 << 14);
        let bytes: Vec<u8> = (0..9000_u32).map(|n| u8::try_from(n * 7 % 251).unwrap()).collect();
        for len in (0..700).chain([1023, 1024, 4095, 4096, 4097, 4100, 9000]) {
            let at = 7 + len % 33;
            map.write(0, &vec![0xee; 10_000]).unwrap();
            map.write(at as u64, &bytes[..len]).unwrap();
            let mut out = Vec::with_capacity(at + len + 1);
            map.read(0, (at + len + 1) as u64, &mut out).unwrap();
            assert!(out[at..][..len] == bytes[..len], "{len} bytes");
            assert!(out[..at].iter().chain(out.last()).all(|&byte| byte == 0xee), "nothing beside {len} bytes");
        }
    }

    #[test]
    fn copies_in_out_and_along() {
        let map = scratch(4096);
        map.write(16, b"hello, world").unwrap();
        assert_eq!(map.equals(16, b"hello, world"), Some(true));
        assert_eq!(map.equals(16, b"hello, worle"), Some(false));
        assert_eq!(map.equals(16, b"hello, w"), Some(true));
        assert_eq!(map.equals(16, b""), Some(true));
        map.shift(16, 40, 12).unwrap();
        assert_eq!(map.shift(16, 21, 12), None, "they overlap");
        let mut out = Vec::with_capacity(64);
        map.read(40, 12, &mut out).unwrap();
        assert_eq!(out, b"hello, world");
    }
}
