//! The errors that abort a benchmark before it prints a table.

use std::{fmt, io};

use forkyard_shm::{PublishError, SegmentError, StoreError};
use nix::errno::Errno;

#[derive(Debug)]
pub(crate) enum Error {
    /// Forkyard's segment could not be created.
    Segment(SegmentError),
    /// Forkyard rejected a value that it must store.
    StoreError(StoreError),
    /// The event log rejected an event.
    NotPublished(PublishError),
    /// LMDB failed.
    Lmdb(heed::Error),
    /// A competitor's program is not installed.
    NoProgram { program: &'static str, package: &'static str },
    /// A server or a script failed. `what` is its output.
    Program { program: &'static str, what: String },
    /// A store returned a value that differs from the stored one.
    WrongValue { key: String },
    /// A forked process failed with this message.
    Worker(String),
    /// A system call or I/O failed.
    System { what: &'static str, source: io::Error },
    /// No name contains this pattern.
    NoSuchName { pattern: String, names: String },
    /// The table could not be written.
    Output(io::Error),
}

impl Error {
    /// Returns a function for `map_err` that adds the name of the failed operation.
    pub(crate) fn system<E: Into<io::Error>>(what: &'static str) -> impl Fn(E) -> Error {
        move |source| Error::System { what, source: source.into() }
    }

    /// Like [`Error::system`], for calls that return an errno.
    pub(crate) fn errno(what: &'static str) -> impl Fn(Errno) -> Error {
        Error::system(what)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Segment(source) => write!(f, "cannot make a segment: {source}"),
            Self::StoreError(source) => write!(f, "forkyard refused a value: {source}"),
            Self::NotPublished(source) => write!(f, "{source}"),
            Self::Lmdb(source) => write!(f, "LMDB failed: {source}"),
            Self::NoProgram { program, package } => write!(
                f,
                "{program} is not installed: install Debian's package {package}, or omit the servers with --no-servers"
            ),
            Self::Program { program, what } => write!(f, "{program} does not do what it should: {what}"),
            Self::WrongValue { key } => write!(f, "the value of {key} is not the one that was stored"),
            Self::Worker(what) => write!(f, "a forked process failed: {what}"),
            Self::System { what, source } => write!(f, "{what} failed: {source}"),
            Self::NoSuchName { pattern, names } => {
                write!(f, "no name has {pattern:?} in it (given with --only); there are: {names}")
            }
            Self::Output(source) => write!(f, "cannot write the result: {source}"),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Segment(source) => Some(source),
            Self::StoreError(source) => Some(source),
            Self::NotPublished(source) => Some(source),
            Self::Lmdb(source) => Some(source),
            Self::System { source, .. } | Self::Output(source) => Some(source),
            Self::NoProgram { .. }
            | Self::Program { .. }
            | Self::WrongValue { .. }
            | Self::Worker(_)
            | Self::NoSuchName { .. } => None,
        }
    }
}
