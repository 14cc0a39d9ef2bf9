//! Blocks, restores and sends signals.
#![expect(unsafe_code, reason = "part of the fence: see `sys.rs`")]

use std::io;
use std::time::Duration;

use nix::sys::signal::{SigSet, SigmaskHow, Signal, pthread_sigmask};
use nix::unistd::Pid;

/// Blocks every signal except SIGBUS in this thread, and returns the previous mask. SIGBUS stays unblocked because a
/// shared-memory file may be truncated at any moment, and the kernel kills a process that blocks the signal of its own
/// fault.
pub(crate) fn block_signals() -> SigSet {
    let mut before = SigSet::empty();
    let done = pthread_sigmask(SigmaskHow::SIG_SETMASK, Some(&all_but_sigbus()), Some(&mut before));
    debug_assert!(done.is_ok(), "the arguments of pthread_sigmask are constant and valid");
    before
}

/// Returns the signals that may be blocked: see [`block_signals`].
pub(super) fn all_but_sigbus() -> SigSet {
    let mut all = SigSet::all();
    all.remove(Signal::SIGBUS);
    all
}

/// Returns the name of a signal without `SIG`. Async-signal-safe.
pub(crate) fn short_name(signal: Signal) -> &'static str {
    signal.as_str().trim_start_matches("SIG")
}

/// Restores a mask that [`block_signals`] returned.
pub(crate) fn restore_signals(mask: &SigSet) {
    let done = pthread_sigmask(SigmaskHow::SIG_SETMASK, Some(mask), None);
    debug_assert!(done.is_ok(), "the arguments of pthread_sigmask are constant and valid");
}

/// Sends a signal to one thread of a process.
///
/// # Errors
/// Returns `ESRCH` if that process has no such thread, or another error from `tgkill(2)`.
pub(crate) fn signal_thread(process: Pid, thread: i32, signal: i32) -> io::Result<()> {
    // SAFETY: plain system call with three integers. The kernel checks that the thread belongs to that process.
    let outcome = unsafe { libc::syscall(libc::SYS_tgkill, process.as_raw(), thread, signal) };
    if outcome == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Unblocks all signals.
pub(crate) fn unblock_signals() {
    restore_signals(&SigSet::empty());
}

/// Makes each SIGTERM start the timer of `alarm(2)`. SIGALRM ends this process if it is still running two seconds after
/// `limit`, even if its event loop has hung and there is no master to kill the process.
///
/// # Errors
/// Returns the error from `sigaction(2)`.
pub(crate) fn alarm_on_term(limit: Duration) -> io::Result<()> {
    let seconds = u32::try_from(limit.as_secs()).unwrap_or(u32::MAX).saturating_add(2);
    // SAFETY: `alarm` is async-signal-safe (signal-safety(7)) and accesses no memory of this program.
    let action = move || unsafe {
        libc::alarm(seconds);
    };
    // SAFETY: the action above makes one async-signal-safe call, does not panic and takes no lock.
    unsafe { signal_hook::low_level::register(libc::SIGTERM, action) }.map(|_| ())
}
