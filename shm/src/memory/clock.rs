//! Reads a millisecond clock that is the same for all processes on the machine.

use nix::time::{ClockId, clock_gettime};

/// Returns the milliseconds of the coarse monotonic clock, never 0. The clock is read through the vDSO without a system call, in a few
/// nanoseconds. It lags by up to one tick (1 to 10 ms).
pub(crate) fn monotonic_ms() -> u64 {
    let Ok(now) = clock_gettime(ClockId::CLOCK_MONOTONIC_COARSE) else { return 1 };
    let seconds = u64::try_from(now.tv_sec()).unwrap_or(0);
    let nanoseconds = u64::try_from(now.tv_nsec()).unwrap_or(0);
    (seconds * 1000 + nanoseconds / 1_000_000).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_forwards() {
        let first = monotonic_ms();
        assert!(first > 0);
        assert!(monotonic_ms() >= first);
    }
}
