//! What another thread of this process is at, right now: a signal interrupts it, and its handler stores the
//! instructions.
//!
//! The signal is SIGURG: nothing happens if it comes when no handler is installed, and hardly anybody uses it.
//!
//! May not: allocate, lock or panic in the handler.
#![expect(unsafe_code, reason = "a signal handler")]

use std::sync::atomic::{AtomicI32, AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use std::{io, thread};

use libc::{c_int, c_void, siginfo_t};
use nix::unistd::Pid;

use super::crash::{self, MAX_FRAMES};
use crate::sys;

/// A thread that does not run, because the machine is busy, is waited for so long.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(1);

/// The thread that is asked; 0 once it has answered.
static ASKED: AtomicI32 = AtomicI32::new(0);
static FRAMES: [AtomicUsize; MAX_FRAMES] = [const { AtomicUsize::new(0) }; MAX_FRAMES];

/// Installs the handler.
///
/// # Errors
/// What `sigaction(2)` says.
pub(crate) fn install() -> io::Result<()> {
    backtrace::trace(|_| true); // the unwinder sets itself up at its first use
    let flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
    crash::set_action(libc::SIGURG, on_signal as *const () as usize, flags)
}

/// The instructions that a thread is at, the innermost first; none if it does not answer. For one thread alone, which
/// asks one at a time.
pub(crate) fn of(thread: i32) -> Vec<usize> {
    FRAMES.iter().for_each(|frame| frame.store(0, Ordering::Relaxed));
    ASKED.store(thread, Ordering::SeqCst);
    if sys::signal_thread(Pid::this(), thread, libc::SIGURG).is_err() {
        return Vec::new();
    }
    let begun = Instant::now();
    while ASKED.load(Ordering::Acquire) != 0 && begun.elapsed() < ANSWER_TIMEOUT {
        thread::park_timeout(Duration::from_millis(1));
    }
    // One that is late finds that it is not asked any more.
    let answered = ASKED.swap(0, Ordering::SeqCst) == 0;
    let frames = FRAMES.iter().map(|frame| frame.load(Ordering::Relaxed)).take_while(|&frame| frame != 0);
    if answered { frames.collect() } else { Vec::new() }
}

extern "C" fn on_signal(_: c_int, _: *mut siginfo_t, context: *mut c_void) {
    // SAFETY: async-signal-safe, without arguments.
    if ASKED.load(Ordering::SeqCst) != unsafe { libc::gettid() } {
        return;
    }
    // SAFETY: the address of a variable of this thread's own.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: it stays valid as long as the thread lives.
    let before = unsafe { *errno };
    let mut frames = [0; MAX_FRAMES];
    let frames = crash::unwind(crash::instruction(context), &mut frames);
    for (to, &from) in FRAMES.iter().zip(frames) {
        to.store(from, Ordering::Relaxed);
    }
    ASKED.store(0, Ordering::Release);
    // SAFETY: as above.
    unsafe { *errno = before };
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;

    use super::*;
    use crate::diagnostics::code_address;

    #[inline(never)]
    fn spin_on_purpose(stop: &AtomicBool) {
        while !stop.load(Ordering::Relaxed) {
            std::hint::spin_loop();
        }
    }

    #[test]
    fn a_thread_that_spins_tells_where() {
        install().unwrap();
        let (stop, number) = (AtomicBool::new(false), AtomicI32::new(0));
        thread::scope(|scope| {
            scope.spawn(|| {
                crash::give_stack();
                number.store(nix::unistd::gettid().as_raw(), Ordering::SeqCst);
                spin_on_purpose(&stop);
            });
            // Some instructions of the loop belong to no line of the source.
            let deadline = Instant::now() + Duration::from_secs(60);
            let mut named = String::new();
            while !named.contains(".rs:") && Instant::now() < deadline {
                let names = code_address::names_of(of(number.load(Ordering::SeqCst)).into_iter());
                named = names.into_iter().find(|name| name.contains("spin_on_purpose")).unwrap_or(named);
            }
            stop.store(true, Ordering::Relaxed);
            assert!(named.contains("src/diagnostics/stack_sampler.rs:"), "{named}");
        });
        assert_eq!(of(-1), [0_usize; 0], "there is no such thread");
    }
}
