//! Samples the stack of another thread of this process. A signal interrupts the thread, and the signal's handler stores
//! the addresses of the instructions.
//!
//! The signal is SIGURG, because it is ignored if no handler is installed, and because few programs use it.
//!
//! The handler must not allocate, lock or panic.
#![expect(unsafe_code, reason = "a signal handler, which promises to be async-signal-safe")]

use std::sync::atomic::{AtomicI32, AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use std::{io, thread};

use nix::sys::signal::{SaFlags, Signal};
use nix::unistd::{Pid, gettid};

use super::unwind::{self, MAX_FRAMES};
use crate::sys;
use crate::sys::signal_handler::{self, Delivery, HandleSignal};

/// How long to wait for the thread's handler: on a busy machine, the thread may not run immediately.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(1);

/// The thread that is being sampled; 0 when its handler is done.
static ASKED: AtomicI32 = AtomicI32::new(0);
static FRAMES: [AtomicUsize; MAX_FRAMES] = [const { AtomicUsize::new(0) }; MAX_FRAMES];

/// Installs the handler.
///
/// # Errors
/// Returns the error from `sigaction(2)`.
pub(crate) fn install() -> io::Result<()> {
    unwind::initialize();
    signal_handler::set_handler::<Sample>(Signal::SIGURG, SaFlags::SA_ONSTACK | SaFlags::SA_RESTART)
}

/// Returns the addresses of the instructions that a thread is executing, the innermost first; empty if the thread's
/// handler does not run in time. Must be called from one thread only, for one thread at a time.
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
    // A handler that runs too late finds that its thread is no longer being sampled.
    let answered = ASKED.swap(0, Ordering::SeqCst) == 0;
    let frames = FRAMES.iter().map(|frame| frame.load(Ordering::Relaxed)).take_while(|&frame| frame != 0);
    if answered { frames.collect() } else { Vec::new() }
}

struct Sample;

// SAFETY: stores to atomics only, after it has walked the stack.
unsafe impl HandleSignal for Sample {
    fn handle(_: Signal, delivery: &Delivery<'_>) {
        if ASKED.load(Ordering::SeqCst) != gettid().as_raw() {
            return;
        }
        let (instruction, _) = delivery.registers().unwrap_or_default();
        let mut frames = [0; MAX_FRAMES];
        for (to, &from) in FRAMES.iter().zip(unwind::unwind(instruction, &mut frames)) {
            to.store(from, Ordering::Relaxed);
        }
        ASKED.store(0, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;

    use super::*;
    use crate::diagnostics::{code_address, crash};

    #[inline(never)]
    fn spin_on_purpose(stop: &AtomicBool) {
        while !stop.load(Ordering::Relaxed) {
            std::hint::spin_loop();
        }
    }

    #[test]
    fn the_function_of_a_spinning_thread_is_found() {
        install().unwrap();
        let (stop, number) = (AtomicBool::new(false), AtomicI32::new(0));
        thread::scope(|scope| {
            scope.spawn(|| {
                crash::give_stack();
                number.store(gettid().as_raw(), Ordering::SeqCst);
                spin_on_purpose(&stop);
            });
            // Some instructions of the loop belong to no source line, so the sample is retried.
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
