//! Why there was no run. What goes wrong with single requests during a run is counted in `tally`, not here.

use std::{fmt, io};

use nix::errno::Errno;

use crate::tally::Fault;

/// Why there was no run.
#[derive(Debug)]
pub(crate) enum Error {
    /// The host name of `--connect` has no address.
    Resolve { host: String, source: Option<io::Error> },
    /// The first request, sent alone before the run, was not answered as it should be.
    Probe(Fault),
    /// Not everybody could subscribe.
    Subscribe { ready: u32, of: u32, fault: Fault },
    /// Nothing could be published.
    Publish(Fault),
    /// What a process of `--pids` uses cannot be read.
    Memory { pid: i32, source: io::Error },
    /// The first response's body is larger than what is kept in memory for comparison.
    LargeBody { limit: usize },
    /// A process of `--pids` is not there.
    NoProcess(i32),
    /// A system call that has no reason to fail did.
    System { call: &'static str, source: Errno },
    /// The report could not be written.
    Output(io::Error),
}

impl Error {
    /// For `map_err` after a system call.
    pub(crate) fn system(call: &'static str) -> impl Fn(Errno) -> Self {
        move |source| Self::System { call, source }
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
            Self::LargeBody { limit } => {
                write!(f, "the first body is over {limit} bytes: too large to compare (use --any-body)")
            }
            Self::NoProcess(pid) => write!(f, "no process {pid} (given with --pids)"),
            Self::System { call, source } => write!(f, "{call} failed: {}", source.desc()),
            Self::Output(source) => write!(f, "cannot write the result: {source}"),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Resolve { source: Some(source), .. } | Self::Output(source) | Self::Memory { source, .. } => {
                Some(source)
            }
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
