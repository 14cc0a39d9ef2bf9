//! Counts the memory that a worker holds for input from clients, summed over all connections, and compares it with its
//! limit (`--max-buffered`).
//!
//! The count of a connection is the number of bytes received since the connection was last idle, minus the body bytes
//! that the application has taken. These bytes are in this server's buffers, in hyper's buffers, or in requests that
//! are being served. The count is an upper bound. Small requests that arrive in one read are not counted: nearly all
//! requests are small, and a connection holds at most [`SMALL`] bytes of one.
//!
//! No I/O, no clock.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed};

/// A request of fewer bytes than this, received in one read, is not counted. (A larger first request takes several
/// reads.)
pub(crate) const SMALL: usize = 4 << 10;
/// Maximum count for one connection.
const MAX_COUNT: u32 = 1 << 30;
/// A connection whose body is being read holds at most this many bytes, including what the protocol adds to the body.
const MAX_WITHOUT_BODY: u32 = 2 << 20;

/// The sum over all connections of this process.
static SUM: AtomicU64 = AtomicU64::new(0);
/// The limit of the sum; 0 means no limit.
static LIMIT: AtomicU64 = AtomicU64::new(0);

/// Sets the limit. Called once, in a new worker.
pub(crate) fn set_limit(bytes: u64) {
    LIMIT.store(bytes, Relaxed);
}

/// Returns the number of bytes above the limit, or above a fraction of it, in eighths.
fn excess(eighths: u64) -> u64 {
    match LIMIT.load(Relaxed) {
        0 => 0,
        limit => SUM.load(Relaxed).saturating_sub(limit / 8 * eighths),
    }
}

/// Whether the limit is exceeded.
pub(crate) fn is_full() -> bool {
    excess(8) > 0
}

/// Whether memory is so tight that bodies should use less of it than usual.
pub(crate) fn is_tight() -> bool {
    excess(4) > 0
}

/// Returns the number of bytes to free when the limit is exceeded.
pub(crate) fn too_much() -> u64 {
    if is_full() { excess(6) } else { 0 }
}

/// The bytes counted for one connection. Dropping it subtracts them from the sum.
#[derive(Debug, Default)]
pub(crate) struct Held {
    bytes: AtomicU32,
    /// Whether counting has stopped, because input is passed on to the application as fast as the application reads it.
    is_over: AtomicBool,
}

impl Held {
    pub(crate) fn bytes(&self) -> u32 {
        self.bytes.load(Relaxed)
    }

    pub(crate) fn add(&self, bytes: usize) {
        // A concurrent reader of a body can only reduce the count.
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX).min(MAX_COUNT.saturating_sub(self.bytes()));
        if !self.is_over.load(Relaxed) {
            self.bytes.fetch_add(bytes, Relaxed);
            SUM.fetch_add(bytes.into(), Relaxed);
        }
    }

    /// Stops counting for this connection.
    pub(crate) fn stop(&self) {
        self.is_over.store(true, Relaxed);
        self.clear();
    }

    /// Records body bytes that the application has taken.
    pub(crate) fn taken(&self, bytes: usize) {
        if self.bytes() > 0 {
            self.reduce(|held| held.saturating_sub(u32::try_from(bytes).unwrap_or(u32::MAX)).min(MAX_WITHOUT_BODY));
        }
    }

    /// Records that one of `requests` requests is complete.
    pub(crate) fn one_of(&self, requests: u32) {
        if self.bytes() > 0 {
            self.reduce(|held| held - held / requests.max(1));
        }
    }

    pub(crate) fn clear(&self) {
        if self.bytes() > 0 {
            self.reduce(|_| 0);
        }
    }

    fn reduce(&self, to: impl Fn(u32) -> u32) {
        let before = self.bytes.fetch_update(Relaxed, Relaxed, |held| Some(to(held).min(held))).unwrap_or_default();
        SUM.fetch_sub(u64::from(before - to(before).min(before)), Relaxed);
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_connection_holds_is_given_free_with_its_requests() {
        let held = Held::default();
        held.add(1000);
        held.taken(300);
        assert_eq!(held.bytes(), 700);
        held.one_of(2);
        assert_eq!(held.bytes(), 350);
        held.taken(9000);
        assert_eq!(held.bytes(), 0);
        held.add(1 << 30);
        held.taken(1);
        assert_eq!(held.bytes(), MAX_WITHOUT_BODY, "what frames and chunks add does not add up");
        held.one_of(1);
        assert_eq!(held.bytes(), 0);
        (0..9).for_each(|_| held.add(usize::MAX));
        assert_eq!(held.bytes(), MAX_COUNT);
        held.stop();
        held.add(1000);
        assert_eq!(held.bytes(), 0, "what is carried on is not held");
    }
}
