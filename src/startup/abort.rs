//! Aborts startup: while the application's `preload` is running, a signal that stops the server terminates the process
//! immediately.
//!
//! `preload` is application code, runs on the only thread, and takes any amount of time, so no loop could check a flag.
//! The signal handler itself removes the files that were created during startup, and exits. The handler uses only
//! memory that was prepared before, and async-signal-safe system calls.
//!
//! The other parts of startup are short: signals are blocked or remembered, and handled when startup is complete.

use std::ffi::CString;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use log::Level;

use crate::logging::{self, line};
use crate::sys;

/// A file or directory that is removed when startup is aborted.
#[derive(Debug)]
pub(crate) struct Leftover {
    pub(crate) path: CString,
    /// Device and inode, so that a different file at the same path is not removed. `None` for a directory; a directory
    /// is removed only if it is empty.
    pub(crate) file: Option<(u64, u64)>,
}

impl Leftover {
    /// Returns `None` for a path with a null byte.
    pub(crate) fn file(path: &Path, file: (u64, u64)) -> Option<Self> {
        Some(Self { path: absolute(path)?, file: Some(file) })
    }

    pub(crate) fn directory(path: &Path) -> Option<Self> {
        Some(Self { path: absolute(path)?, file: None })
    }
}

/// Makes the path absolute, so that it stays valid when the working directory changes.
fn absolute(path: &Path) -> Option<CString> {
    CString::new(std::path::absolute(path).ok()?.as_os_str().as_bytes()).ok()
}

/// The steps of the signal handler.
#[derive(Debug)]
pub(crate) struct AbortSteps {
    /// The files and directories to remove, in this order.
    pub(crate) leftovers: Vec<Leftover>,
    /// The log line, with space for the time at `time_at`; empty if nothing is logged.
    pub(crate) line: Vec<u8>,
    pub(crate) time_at: usize,
    pub(crate) log: i32,
    /// Pid of this process. Children that `preload` forks must not run the steps.
    pub(crate) pid: i32,
}

impl AbortSteps {
    pub(crate) fn new(leftovers: Vec<Leftover>) -> Self {
        let line = if log::log_enabled!(Level::Info) {
            logging::line_with(
                line::NO_TIME,
                Level::Info,
                "received a signal to stop during preload: the start is aborted",
            )
        } else {
            Vec::new()
        };
        let time_at = line.windows(line::NO_TIME.len()).position(|part| part == line::NO_TIME.as_bytes()).unwrap_or(0);
        let pid = std::process::id().cast_signed();
        Self { leftovers, line, time_at, log: logging::descriptor(), pid }
    }
}

/// Runs `preload` with signals unblocked. If `leftovers` is `Some`, SIGTERM, SIGINT and SIGQUIT terminate the process.
/// Blocks the signals again when `preload` returns.
pub(crate) fn interruptible<T>(leftovers: Option<Vec<Leftover>>, preload: impl FnOnce() -> T) -> T {
    let armed = leftovers.map(|leftovers| super::abort_signal::AbortHandler::arm(AbortSteps::new(leftovers)));
    sys::unblock_signals();
    let loaded = preload();
    sys::block_signals();
    drop(armed);
    loaded
}
