//! Walks the stack of the thread that a signal has interrupted.
#![expect(unsafe_code, reason = "the unwinder's variant that takes no lock")]

/// Maximum number of functions in a backtrace.
pub(crate) const MAX_FRAMES: usize = 48;

/// Prepares the unwinder, which initializes itself at its first use. The first use must not be in a signal handler.
pub(crate) fn initialize() {
    backtrace::trace(|_| true);
}

/// Returns the addresses of the instructions that this thread is executing, the innermost first, without those of the
/// signal handler. `at` is the address of the interrupted instruction. For a caller, the address is that of its call.
pub(crate) fn unwind(at: usize, frames: &mut [usize; MAX_FRAMES]) -> &[usize] {
    let (mut count, mut begun) = (0, false);
    // SAFETY: the function is unsynchronized only with respect to symbolization, and nothing is symbolized here.
    unsafe {
        backtrace::trace_unsynchronized(|frame| {
            let ip = frame.ip().addr();
            let is_call = begun;
            begun |= ip == at;
            if begun && ip != 0 {
                frames[count] = if is_call { ip - 1 } else { ip };
                count += 1;
            }
            count < MAX_FRAMES
        });
    }
    &frames[..count]
}
