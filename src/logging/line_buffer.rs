//! Lines of the access log that are not written yet, in memory that a worker shares with its heir: if the worker is killed,
//! the heir writes them.
//!
//! One thread of the worker has it while the worker lives, and the heir afterwards. A worker that is killed between the
//! write of its lines and the store that says so leaves them to be written a second time.
//!
//! May not: lock, or be read by anybody but those two.
#![expect(unsafe_code, reason = "memory shared with another process")]

use std::cell::UnsafeCell;
use std::io;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Bytes that it holds.
pub(crate) const ROOM: usize = 64 << 10;

#[repr(C)]
struct Region {
    length: AtomicUsize,
    /// What of it was written. More than `length` is nothing.
    written: AtomicUsize,
    bytes: UnsafeCell<[u8; ROOM]>,
}

/// The buffer. Copies are the same one.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LineBuffer {
    region: NonNull<Region>,
}

// SAFETY: it is handed from the thread that makes it to the one that uses it. The memory lives for ever.
unsafe impl Send for LineBuffer {}

impl LineBuffer {
    /// Makes one, which children of this process share. It lives until the last of them is gone.
    ///
    /// # Errors
    /// What `mmap(2)` says.
    pub(crate) fn create() -> io::Result<Self> {
        let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_ANONYMOUS);
        // SAFETY: a new mapping at an address of the kernel's choice.
        let region = unsafe { libc::mmap(std::ptr::null_mut(), size_of::<Region>(), protection, flags, -1, 0) };
        if region == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // All zeroes, which is a valid `Region`, page-aligned, and never unmapped.
        let region = NonNull::new(region.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { region })
    }

    /// Takes a line in. False if there is no room for it.
    pub(crate) fn push(&self, line: &[u8]) -> bool {
        let length = self.length();
        if line.len() > ROOM - length {
            return false;
        }
        let bytes = self.region().bytes.get().cast::<u8>();
        // SAFETY: `length` is at most ROOM, so the place is within the array.
        let place = unsafe { bytes.add(length) };
        // SAFETY: the place has room for the line, as checked, and nobody else reads or writes there now.
        unsafe { std::ptr::copy_nonoverlapping(line.as_ptr(), place, line.len()) };
        // After the bytes: a line that a killed worker had not finished is none.
        self.region().length.store(length + line.len(), Ordering::Release);
        true
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.written() == self.length()
    }

    /// Has lines written, and forgets as many bytes of them as `write` returns. Room for others is made when all are written.
    pub(crate) fn write_out(&self, write: impl FnOnce(&[u8]) -> usize) {
        let (length, written) = (self.length(), self.written());
        let bytes = self.region().bytes.get().cast::<u8>();
        // SAFETY: `written` is at most `length`, which is within the array.
        let first = unsafe { bytes.add(written) };
        // SAFETY: within the array, of which every byte is valid, and nobody writes there while `write` runs: the worker has
        // one thread for it, and is dead when the heir is here.
        let count = write(unsafe { std::slice::from_raw_parts(first, length - written) });
        if count >= length - written {
            // In this order: nothing is written twice if the worker is killed in between.
            self.region().length.store(0, Ordering::Release);
            self.region().written.store(0, Ordering::Release);
        } else {
            self.region().written.store(written + count, Ordering::Release);
        }
    }

    /// Forgets what waits, and returns how many lines that were.
    pub(crate) fn forget(&self) -> usize {
        let mut lines = 0;
        self.write_out(|bytes| {
            lines = bytes.iter().filter(|&&byte| byte == b'\n').count();
            bytes.len()
        });
        lines
    }

    /// However much was scribbled over it, within the bounds.
    fn length(&self) -> usize {
        self.region().length.load(Ordering::Acquire).min(ROOM)
    }

    fn written(&self) -> usize {
        self.region().written.load(Ordering::Acquire).min(self.length())
    }

    fn region(&self) -> &Region {
        // SAFETY: the mapping is as large as a `Region` and lives for ever; it is an atomic and a cell.
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
