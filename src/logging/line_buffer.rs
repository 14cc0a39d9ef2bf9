//! Buffers lines of the access log in memory that a worker shares with its heir. If the worker is killed, the heir
//! writes the buffered lines.
//!
//! One thread of the worker uses the buffer while the worker is alive, and the heir uses it afterwards. If a worker is
//! killed between the write of its lines and the store that records this write, the lines are written twice.
//!
//! The code must not lock. No other process may read the buffer.
#![expect(unsafe_code, reason = "memory shared with another process")]

use std::cell::UnsafeCell;
use std::io;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicUsize, Ordering};

/// The capacity in bytes.
pub(crate) const ROOM: usize = 64 << 10;

#[repr(C)]
struct Region {
    length: AtomicUsize,
    /// The number of bytes that have been written. A value above `length` is treated as `length`.
    written: AtomicUsize,
    bytes: UnsafeCell<[u8; ROOM]>,
}

/// The buffer. Copies refer to the same buffer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LineBuffer {
    region: NonNull<Region>,
}

// SAFETY: the buffer is passed from the thread that creates it to the thread that uses it. Its memory is never freed.
unsafe impl Send for LineBuffer {}

impl LineBuffer {
    /// Creates a buffer that children of this process share. The buffer exists until the last of these processes has exited.
    ///
    /// # Errors
    /// Returns the error from `mmap(2)`.
    pub(crate) fn create() -> io::Result<Self> {
        let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_ANONYMOUS);
        // SAFETY: a new mapping at an address that the kernel chooses.
        let region = unsafe { libc::mmap(std::ptr::null_mut(), size_of::<Region>(), protection, flags, -1, 0) };
        if region == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // The mapping is zeroed, page-aligned, and never unmapped. All zeroes are a valid `Region`.
        let region = NonNull::new(region.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { region })
    }

    /// Adds a line. Returns false if there is no space for the line.
    pub(crate) fn push(&self, line: &[u8]) -> bool {
        let length = self.length();
        if line.len() > ROOM - length {
            return false;
        }
        let bytes = self.region().bytes.get().cast::<u8>();
        // SAFETY: `length` is at most ROOM, so the result is within the array.
        let place = unsafe { bytes.add(length) };
        // SAFETY: the check above has shown that there is space for the line, and no other code accesses this space
        // now.
        unsafe { std::ptr::copy_nonoverlapping(line.as_ptr(), place, line.len()) };
        // The length is stored after the bytes, so a line that a killed worker had not completed is not part of the
        // buffer.
        self.region().length.store(length + line.len(), Ordering::Release);
        true
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.written() == self.length()
    }

    /// Passes the lines to `write`, and drops as many bytes as `write` returns. Space for new lines becomes available
    /// when all lines are written.
    pub(crate) fn write_out(&self, write: impl FnOnce(&[u8]) -> usize) {
        let (length, written) = (self.length(), self.written());
        let bytes = self.region().bytes.get().cast::<u8>();
        // SAFETY: `written` is at most `length`, which is within the array.
        let first = unsafe { bytes.add(written) };
        // SAFETY: the range is within the array, in which every byte is valid. No code writes to it while `write` runs,
        // because only one thread of the worker uses the buffer, and the worker is dead when the heir uses it.
        let count = write(unsafe { std::slice::from_raw_parts(first, length - written) });
        if count >= length - written {
            // With this order of the two stores, no line is written twice if the worker is killed between them.
            self.region().length.store(0, Ordering::Release);
            self.region().written.store(0, Ordering::Release);
        } else {
            self.region().written.store(written + count, Ordering::Release);
        }
    }

    /// Drops the buffered bytes, and returns the number of lines in them.
    pub(crate) fn forget(&self) -> usize {
        let mut lines = 0;
        self.write_out(|bytes| {
            lines = bytes.iter().filter(|&&byte| byte == b'\n').count();
            bytes.len()
        });
        lines
    }

    /// Returns the number of buffered bytes. The result is limited to the capacity, even if another process has
    /// overwritten the length.
    fn length(&self) -> usize {
        self.region().length.load(Ordering::Acquire).min(ROOM)
    }

    fn written(&self) -> usize {
        self.region().written.load(Ordering::Acquire).min(self.length())
    }

    fn region(&self) -> &Region {
        // SAFETY: the mapping is as large as a `Region` and is never unmapped; it consists of atomics and a cell.
        unsafe { self.region.as_ref() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_come_out_as_they_went_in_and_none_is_half() {
        let buffer = LineBuffer::create().unwrap();
        let line = [b'x'; 1000];
        let mut pushed = 0;
        while buffer.push(&line) {
            pushed += 1;
        }
        assert_eq!(pushed, ROOM / 1000);
        buffer.write_out(|bytes| {
            assert_eq!(bytes, vec![b'x'; pushed * 1000]);
            2000
        });
        assert!(!buffer.is_empty() && !buffer.push(&line), "there is room when all are written");
        buffer.write_out(|bytes| {
            assert_eq!(bytes.len(), (pushed - 2) * 1000);
            bytes.len()
        });
        assert!(buffer.is_empty() && buffer.push(b"again\n"));
        assert_eq!((buffer.forget(), buffer.is_empty()), (1, true));
    }
}
