//! Waits for a word in shared memory to change, with futex(2) across processes.
#![expect(unsafe_code, reason = "the fence around futex(2), which libc does not wrap")]

use std::ptr;
use std::sync::atomic::AtomicU32;
use std::time::Duration;

/// Sleeps until the word is woken, `longest` has passed, or a signal arrives. Returns immediately if the word differs from `seen`.
pub(crate) fn wait(word: &AtomicU32, seen: u32, longest: Duration) {
    let timeout = libc::timespec {
        tv_sec: libc::time_t::try_from(longest.as_secs()).unwrap_or(libc::time_t::MAX),
        tv_nsec: longest.subsec_nanos().into(),
    };
    // SAFETY: the word is a live atomic and the timeout a live value; the kernel only reads both.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAIT, seen, &raw const timeout) };
}

/// Wakes up to `most` sleepers.
pub(crate) fn wake(word: &AtomicU32, most: i32) {
    let none = ptr::null::<libc::timespec>();
    // SAFETY: the kernel uses the address of a live atomic as a key, and accesses no memory.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, most, none) };
}
