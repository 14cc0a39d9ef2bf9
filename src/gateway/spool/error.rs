//! Why a spool cannot store or return bytes.

use std::error::Error;
use std::fmt;
use std::io;
use std::path::Path;
use std::sync::Arc;

#[derive(Clone, Debug)]
pub(crate) enum SpoolError {
    /// The file system of the temporary file is full (ENOSPC), or a quota (EDQUOT) or a limit on the size of files
    /// (EFBIG) is reached.
    NoSpace(FileError),
    /// The body needs more than `limit` bytes.
    TooLong { limit: u64 },
    /// The temporary files of all bodies together have reached `limit` bytes.
    FilesUsedUp { limit: u64 },
    /// The spool has no file, and its memory is full.
    Unread { limit: u64 },
    /// The temporary file cannot be opened, written or read.
    Io(FileError),
    /// The writer was dropped before the end of the body.
    BrokenOff,
}

/// A failed system call on a temporary file.
#[derive(Clone, Debug)]
pub(crate) struct FileError {
    directory: Arc<Path>,
    action: &'static str,
    source: Arc<io::Error>,
}

impl SpoolError {
    pub(super) fn from_file(directory: &Arc<Path>, action: &'static str, error: io::Error) -> Self {
        let kind = error.kind();
        let error = FileError { directory: Arc::clone(directory), action, source: Arc::new(error) };
        match kind {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => {
                Self::NoSpace(error)
            }
            _ => Self::Io(error),
        }
    }
}

impl fmt::Display for FileError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { directory, action, source } = self;
        write!(f, "cannot {action} a temporary file in {}: {source}", directory.display())
    }
}

impl fmt::Display for SpoolError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoSpace(error) => {
                write!(f, "{error} (free some space, or choose another directory with --temp-dir)")
            }
            Self::TooLong { limit } => {
                write!(f, "the body is longer than {limit} bytes (for a request, see --max-body)")
            }
            Self::FilesUsedUp { limit } => {
                write!(f, "the temporary files of all bodies take {limit} bytes, which is their limit")
            }
            Self::Unread { limit } => write!(f, "the reader is more than {limit} bytes behind"),
            Self::Io(error) => write!(f, "{error} (--temp-dir must name a directory in which files can be created)"),
            Self::BrokenOff => f.write_str("the body broke off before its end"),
        }
    }
}

impl Error for SpoolError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            Self::NoSpace(error) | Self::Io(error) => Some(error.source.as_ref()),
            Self::TooLong { .. } | Self::FilesUsedUp { .. } | Self::Unread { .. } | Self::BrokenOff => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_differs_from_other_errors() {
        let directory = Path::new("/var/tmp").into();
        let error = |code| SpoolError::from_file(&directory, "write", io::Error::from_raw_os_error(code));
        for code in [libc::ENOSPC, libc::EDQUOT, libc::EFBIG] {
            let error = error(code);
            assert!(matches!(error, SpoolError::NoSpace(_)), "{error}");
            assert!(error.to_string().contains("in /var/tmp: ") && error.to_string().contains("--temp-dir"), "{error}");
        }
        for code in [libc::EIO, libc::EMFILE, libc::EACCES, libc::ENOENT] {
            assert!(matches!(error(code), SpoolError::Io(_)), "{code}");
        }
    }
}
