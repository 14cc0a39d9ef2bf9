//! Opens files below a directory, by paths that come from clients and applications.
//!
//! - The directory is opened once. Every lookup begins at its descriptor, with openat2(2) and RESOLVE_BENEATH: neither
//!   `..` nor a symbolic link leads out of the directory, whatever other processes rename meanwhile.
//! - Only regular files are opened for reading. The kind of a file is read from the opened descriptor. O_NONBLOCK keeps a
//!   FIFO from blocking the caller.

use std::ffi::OsStr;
use std::fs::{File, Metadata};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, open, openat2};
use nix::sys::stat::{Mode, SFlag, fstat};

use crate::protocol::grammar::percent_decode;

/// Number of attempts to resolve a path while other processes rename directories (EAGAIN).
const MAX_ATTEMPTS: u32 = 32;

/// A directory, and its absolute path.
#[derive(Debug)]
pub(super) struct Beneath {
    directory: OwnedFd,
    path: Vec<u8>,
}

/// A regular file that is open for reading.
#[derive(Debug)]
pub(super) struct OpenFile {
    pub(super) file: File,
    /// The state of the file when it was opened.
    pub(super) version: Version,
}

/// What changes when the contents of a file are changed in place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Version {
    pub(super) length: u64,
    /// The time of the last modification, in seconds since 1970.
    pub(super) seconds: i64,
    pub(super) nanoseconds: i64,
}

/// Why there is no file to read.
#[derive(Debug)]
pub(super) enum OpenError {
    /// The path names nothing, or something that is neither a file nor a directory.
    NotFound,
    Directory,
    /// A symbolic link leads out of the directory, or links form a cycle.
    Outside,
    /// This process has no permission to read the file.
    Forbidden,
    Failed(io::Error),
}

impl Beneath {
    /// Opens a directory. `flag` names it in errors.
    ///
    /// # Errors
    /// Returns a message for the operator if the directory cannot be opened.
    pub(super) fn open(path: &Path, flag: &str) -> Result<Self, String> {
        let explain = |error: &io::Error| format!("cannot open the directory {}: {error} (see {flag})", path.display());
        let absolute = std::path::absolute(path).map_err(|error| explain(&error))?;
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let directory = open(&absolute, flags, Mode::empty()).map_err(|errno| explain(&errno.into()))?;
        openat2(&directory, ".", how(OFlag::O_PATH)).map_err(|errno| match errno {
            Errno::ENOSYS => format!("{flag} requires openat2(2), which Linux has since version 5.6: {}", errno.desc()),
            errno => explain(&errno.into()),
        })?;
        let mut path = absolute.into_os_string().into_vec();
        while path.last() == Some(&b'/') {
            path.pop();
        }
        Ok(Self { directory, path })
    }

    /// Returns the path of the directory, without a slash at its end.
    pub(super) fn path(&self) -> &[u8] {
        &self.path
    }

    /// Whether this relative path names a regular file.
    pub(super) fn is_file(&self, relative: &[u8]) -> bool {
        let file = self.resolve(relative, OFlag::O_PATH);
        file.and_then(fstat).is_ok_and(|stat| stat.st_mode & SFlag::S_IFMT.bits() == SFlag::S_IFREG.bits())
    }

    /// Opens the regular file with this relative path.
    ///
    /// # Errors
    /// Returns the reason if there is no such file, or if it cannot be opened.
    pub(super) fn open_file(&self, relative: &[u8]) -> Result<OpenFile, OpenError> {
        let flags = OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
        let file = self.resolve(relative, flags).map_err(|errno| match errno {
            Errno::ENOENT | Errno::ENOTDIR | Errno::ENAMETOOLONG | Errno::ENXIO | Errno::ENODEV => OpenError::NotFound,
            Errno::EXDEV | Errno::ELOOP => OpenError::Outside,
            // A directory may be searchable, but not readable.
            Errno::EACCES if self.resolve(relative, OFlag::O_PATH | OFlag::O_DIRECTORY).is_ok() => OpenError::Directory,
            Errno::EACCES | Errno::EPERM => OpenError::Forbidden,
            errno => OpenError::Failed(errno.into()),
        })?;
        let file = File::from(file);
        let metadata = file.metadata().map_err(OpenError::Failed)?;
        match metadata.file_type() {
            kind if kind.is_file() => Ok(OpenFile { file, version: Version::of(&metadata) }),
            kind if kind.is_dir() => Err(OpenError::Directory),
            _ => Err(OpenError::NotFound),
        }
    }

    fn resolve(&self, relative: &[u8], flags: OFlag) -> Result<OwnedFd, Errno> {
        let relative = if relative.is_empty() { b"." } else { relative };
        let path = Path::new(OsStr::from_bytes(relative));
        let mut attempts = (0..MAX_ATTEMPTS).map(|_| openat2(&self.directory, path, how(flags)));
        attempts.find(|outcome| !matches!(outcome, Err(Errno::EAGAIN))).unwrap_or(Err(Errno::EAGAIN))
    }
}

fn how(flags: OFlag) -> OpenHow {
    let resolve = ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_MAGICLINKS;
    OpenHow::new().flags(flags | OFlag::O_CLOEXEC).resolve(resolve)
}

impl Version {
    pub(super) fn of(metadata: &Metadata) -> Self {
        Self { length: metadata.len(), seconds: metadata.mtime(), nanoseconds: metadata.mtime_nsec() }
    }
}

/// Decodes the percent-encoding of a URL path. Returns `None` if the path does not begin with a slash, is malformed, or
/// contains a NUL.
pub(super) fn decode(path: &str) -> Option<Vec<u8>> {
    let decoded = percent_decode(path.as_bytes())?;
    (decoded.first() == Some(&b'/') && !decoded.contains(&0)).then_some(decoded)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    fn outcome(root: &Beneath, path: &[u8]) -> &'static str {
        match root.open_file(path) {
            Ok(_) => "file",
            Err(OpenError::NotFound) => "nothing",
            Err(OpenError::Directory) => "directory",
            Err(OpenError::Outside) => "outside",
            Err(OpenError::Forbidden) => "forbidden",
            Err(OpenError::Failed(_)) => "failed",
        }
    }

    #[test]
    fn only_regular_files_below_the_directory_are_opened() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        fs::create_dir_all(at("www/sub")).unwrap();
        fs::write(at("secret"), "").unwrap();
        fs::write(at("www/a b"), "123").unwrap();
        for (target, name) in [
            ("a b", "inside"),
            ("../a b", "sub/up"),
            ("../secret", "outside"),
            ("/etc/passwd", "absolute"),
            ("loop", "loop"),
            ("/proc/self/fd/0", "magic"),
            ("nothing", "broken"),
        ] {
            symlink(target, at("www").join(name)).unwrap();
        }
        nix::unistd::mkfifo(&at("www/fifo"), Mode::S_IRWXU).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(at("www/socket")).unwrap();
        let root = Beneath::open(&at("www/"), "--static").unwrap();
        for (path, expected) in [
            ("a b", "file"),
            ("./sub/../a b", "file"),
            ("inside", "file"),
            ("sub/up", "file"),
            ("", "directory"),
            ("sub", "directory"),
            ("sub/", "directory"),
            ("a b/", "nothing"),
            ("a b/c", "nothing"),
            ("fifo", "nothing"),
            ("socket", "nothing"),
            ("broken", "nothing"),
            ("outside", "outside"),
            ("absolute", "outside"),
            ("magic", "outside"),
            ("loop", "outside"),
            ("../secret", "outside"),
            ("sub/../../secret", "outside"),
            ("/etc/passwd", "outside"),
        ] {
            assert_eq!(outcome(&root, path.as_bytes()), expected, "{path}");
            assert_eq!(root.is_file(path.as_bytes()), expected == "file", "{path}");
        }
        let long = "x".repeat(300);
        assert_eq!(outcome(&root, long.as_bytes()), "nothing");
        let file = root.open_file(b"a b").unwrap();
        assert_eq!(file.version.length, 3);
        assert_eq!(root.path(), at("www").as_os_str().as_bytes());
    }

    #[test]
    fn a_missing_directory_is_an_error_that_names_the_flag() {
        let error = Beneath::open(Path::new("/nonexistent/forkyard"), "--static").unwrap_err();
        assert!(error.contains("--static") && error.contains("/nonexistent/forkyard"), "{error}");
    }

    #[test]
    fn a_path_is_decoded_once() {
        for (path, expected) in [
            ("/a%20b", Some("/a b")),
            ("/%252e", Some("/%2e")),
            ("/%2e%2E%2f", Some("/../")),
            ("/%00", None),
            ("/%", None),
            ("/%4", None),
            ("/%zz", None),
            ("/%+1", None),
            ("a", None),
            ("", None),
        ] {
            assert_eq!(decode(path).as_deref(), expected.map(str::as_bytes), "{path}");
        }
    }
}
