//! Implements the signal handler that aborts startup (see `abort.rs`).
#![expect(unsafe_code, reason = "a signal's action, and the system calls that it makes")]

use std::io;
use std::sync::atomic::{AtomicPtr, Ordering};
use std::time::Duration;

use super::abort::{AbortSteps, Leftover};
use crate::logging::line::{NO_TIME, stamp};
use crate::sys::exit_now;

/// Null outside of `preload`. [`AbortHandler`] stores, removes and frees it.
static ABORT_STEPS: AtomicPtr<AbortSteps> = AtomicPtr::new(std::ptr::null_mut());

/// While this value exists, the signals of [`abort_start_on`] terminate this process.
#[derive(Debug)]
pub(crate) struct AbortHandler(());

impl AbortHandler {
    /// Enables the handler. Must be called with signals blocked, and the value must be dropped with signals blocked.
    pub(crate) fn arm(steps: AbortSteps) -> Self {
        ABORT_STEPS.store(Box::into_raw(Box::new(steps)), Ordering::SeqCst);
        Self(())
    }
}

impl Drop for AbortHandler {
    fn drop(&mut self) {
        let steps = ABORT_STEPS.swap(std::ptr::null_mut(), Ordering::SeqCst);
        if !steps.is_null() {
            // SAFETY: the pointer comes from `Box::into_raw` in `arm`. No signal handler is using the pointer: signals
            // are blocked in this thread, and a handler in another thread that `preload` started would have ended the
            // process.
            drop(unsafe { Box::from_raw(steps) });
        }
    }
}

/// Registers a handler that terminates this process on `signal` while an [`AbortHandler`] exists, and otherwise does
/// nothing.
///
/// # Errors
/// Returns the error from `sigaction(2)`.
pub(crate) fn abort_start_on(signal: i32) -> io::Result<signal_hook::SigId> {
    let action = move || {
        let steps = ABORT_STEPS.load(Ordering::SeqCst);
        // SAFETY: the pointer is null, or stored by `arm` and freed only with signals blocked.
        if let Some(steps) = unsafe { steps.as_ref() } {
            end_start(signal, steps);
        }
    };
    // SAFETY: the action calls only `end_start`, which makes async-signal-safe calls, does not panic and takes no lock.
    unsafe { signal_hook::low_level::register(signal, action) }
}

/// Removes the files that were created during startup, and terminates the process. Async-signal-safe: system calls and
/// prepared memory only.
fn end_start(signal: i32, steps: &AbortSteps) {
    // SAFETY: getpid(2) is always sound.
    if unsafe { libc::getpid() } != steps.pid {
        // This process is a child that `preload` forked and that has not called exec.
        let _ = signal_hook::low_level::emulate_default_handler(signal);
        return;
    }
    for Leftover { path, file } in &steps.leftovers {
        // SAFETY: all zeroes is a valid stat.
        let mut found: libc::stat = unsafe { std::mem::zeroed() };
        // SAFETY: `path` ends with a null byte, and `found` is a valid place for a stat.
        let is_there = unsafe { libc::lstat(path.as_ptr(), &raw mut found) } == 0;
        match file {
            // SAFETY: `path` ends with a null byte.
            Some(file) if is_there && (found.st_dev, found.st_ino) == *file => unsafe {
                libc::unlink(path.as_ptr());
            },
            Some(_) => {}
            // SAFETY: `path` ends with a null byte. rmdir(2) fails if the directory is not empty.
            None => unsafe {
                libc::rmdir(path.as_ptr());
            },
        }
    }
    let mut line = [0; 512];
    if let Some(line) = line.get_mut(..steps.line.len()) {
        line.copy_from_slice(&steps.line);
        // SAFETY: all zeroes is a valid timespec.
        let mut now: libc::timespec = unsafe { std::mem::zeroed() };
        // SAFETY: `now` is a valid place for a timespec.
        unsafe { libc::clock_gettime(libc::CLOCK_REALTIME, &raw mut now) };
        let seconds = Duration::from_secs(u64::try_from(now.tv_sec).unwrap_or(0));
        let since_1970 = seconds + Duration::from_nanos(u64::try_from(now.tv_nsec).unwrap_or(0));
        let time = line.get_mut(steps.time_at..).and_then(|rest| rest.get_mut(..NO_TIME.len()));
        stamp(since_1970, time.unwrap_or_default());
        // SAFETY: `line` is valid for its length; write(2) takes any descriptor. The write is not retried, because the
        // exit must not wait.
        unsafe { libc::write(steps.log, line.as_ptr().cast(), line.len()) };
    }
    exit_now(0);
}
