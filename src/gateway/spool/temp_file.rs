//! A temporary file without a name.
//!
//! The file system frees the file when its last descriptor is closed, even after `kill -9`. A file system without
//! O_TMPFILE needs a name for a moment; a process that is killed in this moment leaves an empty file behind.
//!
//! The file is written with pwrite(2) and read with pread(2), on the event loop: nearly always, the data stays in the
//! page cache, and moving the call to a thread would cost more than the call. The event loop does block while the
//! kernel throttles writers or reads evicted pages from the disk.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use nix::fcntl::{FallocateFlags, fallocate};

use super::error::SpoolError;

/// Maximum number of bytes in one read.
pub(super) const READ: u64 = 64 << 10;
/// Number of attempts to find a file name that is not in use.
const NAMES: u32 = 8;

#[derive(Debug)]
pub(super) struct TempFile {
    file: File,
    directory: Arc<Path>,
}

impl TempFile {
    pub(super) fn open(directory: &Arc<Path>) -> Result<Self, SpoolError> {
        Self::open_with(directory, open_unnamed)
    }

    fn open_with(directory: &Arc<Path>, unnamed: impl Fn(&Path) -> io::Result<File>) -> Result<Self, SpoolError> {
        let file = match unnamed(directory) {
            // EISDIR is the reply of a kernel or a file system that ignores the flag.
            Err(error)
                if matches!(
                    error.raw_os_error(),
                    Some(libc::EOPNOTSUPP | libc::EISDIR | libc::ENOSYS | libc::EINVAL)
                ) =>
            {
                open_and_unlink(directory)
            }
            other => other,
        };
        let file = file.map_err(|error| SpoolError::from_file(directory, "open", error))?;
        Ok(Self { file, directory: Arc::clone(directory) })
    }

    /// Writes all bytes. If it fails, it may have written some of them.
    pub(super) fn write_at(&self, bytes: &[u8], offset: u64) -> Result<(), SpoolError> {
        self.file.write_all_at(bytes, offset).map_err(|error| SpoolError::from_file(&self.directory, "write to", error))
    }

    /// Reads the first [`READ`] bytes of a range that has been written.
    pub(super) fn read_at(&self, range: Range<u64>) -> Result<Bytes, SpoolError> {
        let length = range.end.saturating_sub(range.start).min(READ);
        let mut buffer = vec![0; usize::try_from(length).unwrap_or_default()];
        match self.file.read_exact_at(&mut buffer, range.start) {
            Ok(()) => Ok(buffer.into()),
            Err(error) => Err(SpoolError::from_file(&self.directory, "read", error)),
        }
    }

    /// Frees the disk space of a range. Returns false if the file system cannot do this.
    pub(super) fn free(&self, range: Range<u64>) -> bool {
        let length = range.end.saturating_sub(range.start);
        let (Ok(start), Ok(length)) = (range.start.try_into(), length.try_into()) else { return false };
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        fallocate(&self.file, flags, start, length).is_ok()
    }
}

/// With O_EXCL, nobody can give the file a name later.
fn open_unnamed(directory: &Path) -> io::Result<File> {
    let flags = libc::O_TMPFILE | libc::O_EXCL;
    OpenOptions::new().read(true).write(true).mode(0o600).custom_flags(flags).open(directory)
}

fn open_and_unlink(directory: &Path) -> io::Result<File> {
    for _ in 0..NAMES {
        let number = getrandom::u64().map_err(io::Error::other)?;
        let path = directory.join(format!(".forkyard-{number:016x}"));
        match OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path) {
            Ok(file) => return fs::remove_file(&path).map(|()| file),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
    }
    Err(io::ErrorKind::AlreadyExists.into())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;

    use super::*;

    fn without_tmpfile(code: i32) -> impl Fn(&Path) -> io::Result<File> {
        move |_| Err(io::Error::from_raw_os_error(code))
    }

    #[test]
    fn a_file_leaves_nothing_in_the_directory_with_and_without_tmpfile() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().into();
        let opened = [
            TempFile::open(&path),
            TempFile::open_with(&path, without_tmpfile(libc::EOPNOTSUPP)),
            TempFile::open_with(&path, without_tmpfile(libc::EISDIR)),
        ];
        for file in opened {
            let file = file.unwrap();
            file.write_at(b"0123456789", 5).unwrap();
            assert_eq!(file.read_at(7..11).unwrap(), "2345");
            let metadata = file.file.metadata().unwrap();
            assert_eq!((metadata.nlink(), metadata.mode() & 0o777), (0, 0o600));
            assert_eq!(fs::read_dir(&path).unwrap().count(), 0);
        }
    }

    #[test]
    fn other_errors_do_not_lead_to_a_second_attempt() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().into();
        let error = TempFile::open_with(&path, without_tmpfile(libc::EMFILE)).unwrap_err();
        assert!(matches!(error, SpoolError::Io(_)), "{error}");
        let error = TempFile::open_with(&path, without_tmpfile(libc::ENOSPC)).unwrap_err();
        assert!(matches!(error, SpoolError::NoSpace(_)), "{error}");
    }

    #[test]
    fn freed_space_is_returned_to_the_file_system() {
        let directory = tempfile::tempdir().unwrap();
        let file = TempFile::open(&directory.path().into()).unwrap();
        file.write_at(&vec![1; 2 << 20], 0).unwrap();
        let blocks = file.file.metadata().unwrap().blocks();
        assert!(file.free(0..1 << 20), "the temporary directory must be on a file system with FALLOC_FL_PUNCH_HOLE");
        assert!(file.file.metadata().unwrap().blocks() <= blocks - (1 << 20) / 512);
        assert!(file.read_at(1 << 20..2 << 20).unwrap().iter().all(|&byte| byte == 1));
    }

    #[test]
    fn a_missing_directory_and_a_short_file_are_errors() {
        let error = TempFile::open(&Path::new("/nonexistent/forkyard").into()).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/forkyard"), "{error}");
        let directory = tempfile::tempdir().unwrap();
        let file = TempFile::open(&directory.path().into()).unwrap();
        file.write_at(b"0123", 0).unwrap();
        assert!(matches!(file.read_at(0..5), Err(SpoolError::Io(_))));
    }
}
