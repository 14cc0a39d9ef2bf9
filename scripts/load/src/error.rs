//! Defines the errors that prevent a run. Failures of individual requests during a run are counted in `tally`.

use std::path::{Path, PathBuf};
use std::{fmt, io};

use nix::errno::Errno;

use crate::tally::Fault;

/// The reason why no run took place.
#[derive(Debug)]
pub(crate) enum Error {
    /// The host name in `--connect` has no address.
    Resolve { host: String, source: Option<io::Error> },
    /// The first request, which is sent alone before the run, did not get a correct response.
    Probe(Fault),
    /// Some subscribers could not subscribe.
    Subscribe { ready: u32, of: u32, fault: Fault },
    /// Nothing could be published.
    Publish(Fault),
    /// The CPU time or memory of a process in `--pids` cannot be read.
    Memory { pid: i32, source: io::Error },
    /// The file in `--body-file` cannot be read.
    BodyFile { path: PathBuf, source: io::Error },
    /// The body of the first response is longer than the limit for the body that is stored for comparison.
    LargeBody { limit: usize },
    /// A process in `--pids` does not exist.
    NoProcess(i32),
    /// A system call failed unexpectedly.
    System { call: &'static str, source: Errno },
    /// The report could not be written.
    Output(io::Error),
}

impl Error {
    /// Returns an argument for `map_err` after a system call.
    pub(crate) fn system(call: &'static str) -> impl Fn(Errno) -> Self {
        move |source| Self::System { call, source }
    }

    /// Returns an argument for `map_err` after the file of `--body-file` has been read.
    pub(crate) fn body_file(path: &Path) -> impl Fn(io::Error) -> Self {
        move |source| Self::BodyFile { path: path.to_owned(), source }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Resolve { host, source: Some(source) } => write!(f, "cannot resolve {host}: {source}"),
            Self::Resolve { host, source: None } => {
                write!(f, "cannot resolve {host}: it has no address")
            }
            Self::Probe(fault) => {
                write!(f, "the first request failed, so there was no run: {}: {}", fault.kind.name(), fault.what)
            }
            Self::Subscribe { ready, of, fault } => {
                let (kind, what) = (fault.kind.name(), &fault.what);
                write!(f, "only {ready} of {of} have subscribed and got an event, so there was no run: {kind}: {what}")
            }
            Self::Publish(fault) => {
                write!(f, "cannot publish, so there was no run: {}: {}", fault.kind.name(), fault.what)
            }
            Self::Memory { pid, source } => write!(f, "cannot read /proc/{pid}/smaps_rollup: {source}"),
            Self::BodyFile { path, source } => write!(f, "--body-file: cannot read {}: {source}", path.display()),
            Self::LargeBody { limit } => {
                write!(f, "the first body is over {limit} bytes: too large to compare (use --any-body)")
            }
            Self::NoProcess(pid) => write!(f, "no process {pid} (given with --pids or --part-pids)"),
            Self::System { call, source } => write!(f, "{call} failed: {}", source.desc()),
            Self::Output(source) => write!(f, "cannot write the result: {source}"),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Resolve { source: Some(source), .. }
            | Self::Output(source)
            | Self::BodyFile { source, .. }
            | Self::Memory { source, .. } => Some(source),
            Self::System { source, .. } => Some(source),
            Self::Resolve { source: None, .. }
            | Self::Probe(_)
            | Self::Subscribe { .. }
            | Self::Publish(_)
            | Self::LargeBody { .. }
            | Self::NoProcess(_) => None,
        }
    }
}
