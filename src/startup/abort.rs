//! The end of a start: a signal that ends the server while the application's `preload` runs has it end at once.
//!
//! `preload` is the application's code, on the one thread there is, and takes as long as it takes: nobody could look at a flag
//! meanwhile. So the signal's action itself removes the files that the start has made, and ends the process. All that it uses is made
//! before: the action makes async-signal-safe system calls only.
//!
//! Outside of `preload` a start lasts for moments. Signals are blocked then, or remembered, and heard of when it is over.

use std::ffi::CString;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use log::Level;

use crate::logging::{self, line};
use crate::sys;

/// A file that goes with the server.
#[derive(Debug)]
pub(crate) struct Leftover {
    pub(crate) path: CString,
    /// Device and inode, so that no other one is removed. `None` for a folder, which is removed if it is empty.
    pub(crate) file: Option<(u64, u64)>,
}

impl Leftover {
    /// `None` for a path that no system call takes.
    pub(crate) fn file(path: &Path, file: (u64, u64)) -> Option<Self> {
        Some(Self { path: absolute(path)?, file: Some(file) })
    }

    pub(crate) fn directory(path: &Path) -> Option<Self> {
        Some(Self { path: absolute(path)?, file: None })
    }
}

/// Whatever becomes of the working directory.
fn absolute(path: &Path) -> Option<CString> {
    CString::new(std::path::absolute(path).ok()?.as_os_str().as_bytes()).ok()
}

/// What is to be done when a signal ends the start.
#[derive(Debug)]
pub(crate) struct AbortSteps {
    /// Removed in this order.
    pub(crate) leftovers: Vec<Leftover>,
    /// The line of the log, with room for the time at this place; empty if none is wanted.
    pub(crate) line: Vec<u8>,
    pub(crate) time_at: usize,
    pub(crate) log: i32,
    /// A process that was forked meanwhile is not meant.
    pub(crate) pid: i32,
}

impl AbortSteps {
    pub(crate) fn new(leftovers: Vec<Leftover>) -> Self {
        let line = if log::log_enabled!(Level::Info) {
            logging::line_with(line::NO_TIME, Level::Info, "asked to stop during preload: the start is aborted")
        } else {
            Vec::new()
        };
        let time_at = line.windows(line::NO_TIME.len()).position(|part| part == line::NO_TIME.as_bytes()).unwrap_or(0);
        let pid = std::process::id().cast_signed();
        Self { leftovers, line, time_at, log: logging::descriptor(), pid }
    }
}

/// Runs `preload` with signals let through: TERM, INT and QUIT end the process, if `leftovers` are given. They are blocked again when
/// it returns.
pub(crate) fn interruptible<T>(leftovers: Option<Vec<Leftover>>, preload: impl FnOnce() -> T) -> T {
    let armed = leftovers.map(|leftovers| super::abort_signal::AbortHandler::arm(AbortSteps::new(leftovers)));
    sys::unblock_signals();
    let loaded = preload();
    sys::block_signals();
    drop(armed);
    loaded
}
