//! Decides whether to render a page again before it expires, so that requests rarely find it expired (XFetch).
//!
//! Each request draws a random number and decides independently. A request is more likely to render the page the closer the expiry is and
//! the longer the rendering takes: it renders if `now - cost * beta * ln(random) >= expiry`. With beta 1, the requests for a popular page
//! taken together start rendering about one rendering time before the expiry (Vattani, Chierichetti, Lowenstein: Optimal Probabilistic
//! Cache Stampede Prevention, VLDB 2015).
//!
//! Must not render.

use std::sync::atomic::{AtomicU64, Ordering};

use nix::time::{ClockId, clock_gettime};
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::entry::Times;

/// Largest possible value of -ln(random). Rendering never starts earlier than this multiple of the cost before the expiry.
const MOST: f64 = 37.0;

/// Whether a fresh page should be rendered again, based on a random number in (0, 1].
pub(crate) fn is_early(times: &Times, now_ms: u64, beta: f64, random: impl FnOnce() -> f64) -> bool {
    if times.expires_ms == 0 {
        return false;
    }
    let left_ms = times.expires_ms.saturating_sub(now_ms) as f64;
    let unit_ms = f64::from(times.cost_ms) * beta;
    // The expiry is nearly always too far away for any random number to matter, so none is drawn.
    unit_ms * MOST >= left_ms && unit_ms * -random().ln() >= left_ms
}

/// Returns a random number in (0, 1], independent of the numbers in other threads and processes. A generator with its own state cannot be
/// used, because all forked children would draw the same numbers.
pub(crate) fn random() -> f64 {
    static DRAWN: AtomicU64 = AtomicU64::new(0);
    let call = DRAWN.fetch_add(1, Ordering::Relaxed) ^ u64::from(std::process::id()) << 32;
    let nanoseconds = clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(0, |now| now.tv_nsec() ^ now.tv_sec() << 30);
    number(nanoseconds, call)
}

fn number(nanoseconds: i64, call: u64) -> f64 {
    let bits = xxh3_64_with_seed(&nanoseconds.to_le_bytes(), call) >> 11;
    (bits + 1) as f64 / (1_u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn times(expires_ms: u64, cost_ms: u32) -> Times {
        Times { snapshot: 0, stored_ms: 0, expires_ms, stale_ms: 0, error_ms: 0, cost_ms }
    }

    #[test]
    fn the_nearer_the_end_the_smaller_a_chance_suffices() {
        let at = |now_ms, random| is_early(&times(1000, 100), now_ms, 1.0, || random);
        let e = (-1.0_f64).exp();
        assert!(!at(899, e) && at(901, e));
        assert!(!at(799, e * e) && at(801, e * e));
        assert!(at(1000, 1.0) && !at(999, 1.0), "who draws 1 waits for the end");
        assert!(!is_early(&times(10_000, 100), 0, 1.0, || unreachable!()), "far from the end nobody draws");
        assert!(!is_early(&times(0, 100), u64::MAX, 1.0, || e), "what never ends is never early");
        assert!(is_early(&times(1000, 100), 801, 2.0, || e) && !is_early(&times(1000, 100), 999, 0.0, || e));
        for beta in [f64::NAN, -1.0] {
            assert!(!is_early(&times(1000, 100), 999, beta, || e));
        }
    }

    #[test]
    fn random_numbers_differ_and_are_in_range() {
        let drawn: Vec<f64> = (0..1000).map(|_| random()).collect();
        assert!(drawn.iter().all(|&number| number > 0.0 && number <= 1.0));
        let mean = drawn.iter().sum::<f64>() / 1000.0;
        assert!((0.4..0.6).contains(&mean), "{mean}");
    }

    #[test]
    fn threads_that_draw_at_the_same_moment_draw_different_numbers() {
        let draw = || (0..1000).map(|_| random().to_bits()).collect::<Vec<_>>();
        let drawn = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(draw)).collect();
            threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect::<std::collections::HashSet<_>>()
        });
        assert_eq!(drawn.len(), 4000);
        let at_once: std::collections::HashSet<_> = (0..1000).map(|call| number(7, call).to_bits()).collect();
        assert_eq!(at_once.len(), 1000, "in one tick of the clock");
    }
}
