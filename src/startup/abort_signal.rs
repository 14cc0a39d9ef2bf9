//! The action of a signal that ends a start: see `abort.rs`.
#![expect(unsafe_code, reason = "a signal's action, and the system calls that it makes")]

use std::io;
use std::sync::atomic::{AtomicPtr, Ordering};
use std::time::Duration;

use super::abort::{AbortSteps, Leftover};
use crate::logging::line::{NO_TIME, stamp};
use crate::sys::exit_now;

/// What a signal that ends the start has to do: null outside of `preload`. Whoever has stored it removes it again, and
/// frees it.
static ABORT_STEPS: AtomicPtr<AbortSteps> = AtomicPtr::new(std::ptr::null_mut());

/// While it lives, the signals of [`abort_start_on`] end this process.
#[derive(Debug)]
pub(crate) struct AbortHandler(());

impl AbortHandler {
    /// To be called with signals blocked, as it is to be dropped.
    pub(crate) fn arm(steps: AbortSteps) -> Self {
        ABORT_STEPS.store(Box::into_raw(Box::new(steps)), Ordering::SeqCst);
        Self(())
    }
}

impl Drop for AbortHandler {
    fn drop(&mut self) {
        let steps = ABORT_STEPS.swap(std::ptr::null_mut(), Ordering::SeqCst);
        if !steps.is_null() {
            // SAFETY: `arm` made it, and took it apart from its box. No action uses it: signals are blocked in this thread, and
            // another one of `preload`'s that ran one would end the process.
            drop(unsafe { Box::from_raw(steps) });
        }
    }
}

/// Has `signal` end this process while an [`AbortHandler`] lives. It does nothing otherwise.
///
/// # Errors
/// What `sigaction(2)` says.
pub(crate) fn abort_start_on(signal: i32) -> io::Result<signal_hook::SigId> {
    let action = move || {
        let steps = ABORT_STEPS.load(Ordering::SeqCst);
        // SAFETY: it is null, or what `arm` has stored and nobody frees before signals are blocked.
        if let Some(steps) = unsafe { steps.as_ref() } {
            end_start(signal, steps);
        }
    };
    // SAFETY: the action calls `end_start`, of which that holds: async-signal-safe calls, no panic, no lock.
    unsafe { signal_hook::low_level::register(signal, action) }
}

/// Removes what the start has made, and ends the process. Async-signal-safe: system calls and memory that is there.
fn end_start(signal: i32, steps: &AbortSteps) {
    // SAFETY: getpid(2) is always sound.
    if unsafe { libc::getpid() } != steps.pid {
        // A child of `preload`'s, which has not become its own program yet.
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
            // SAFETY: as above. It fails if something is in there.
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
        // SAFETY: `line` is valid for its length; write(2) takes any descriptor. Once: nobody is to be waited for.
        unsafe { libc::write(steps.log, line.as_ptr().cast(), line.len()) };
    }
    exit_now(0);
}
