//! Why there is no table.

use std::{fmt, io};

use forkyard_shm::{Refused, SegmentError};

/// Why there is no table.
#[derive(Debug)]
pub(crate) enum Error {
    /// Forkyard's segment could not be made.
    Segment(SegmentError),
    /// Forkyard did not take a value that it should.
    Refused(Refused),
    /// Nothing has a name that contains this.
    NoSuchName(String),
    /// The table could not be written.
    Output(io::Error),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Segment(source) => write!(f, "cannot make a segment: {source}"),
            Self::Refused(source) => write!(f, "forkyard refused a value: {source}"),
            Self::NoSuchName(pattern) => write!(f, "nothing has a name with {pattern:?} in it (given with --only)"),
            Self::Output(source) => write!(f, "cannot write the result: {source}"),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Segment(source) => Some(source),
            Self::Refused(source) => Some(source),
            Self::Output(source) => Some(source),
            Self::NoSuchName(_) => None,
        }
    }
}
