//! What a worker holds in memory of what clients have sent: all connections together, and how much that may be
//! (`--max-buffered`).
//!
//! Of each connection are counted the bytes that came since nothing was under way on it, less those of bodies that the application has taken: what is
//! in buffers of ours, of hyper's, or in requests that are being served. That is an estimate from above. Small requests that came as a whole are not
//! counted: nearly all are, and a connection holds no more than [`SMALL`] bytes of one.
//!
//! No I/O, no clock.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed};

/// What is not counted of a connection: less than this, in one read. (More than this is read of a connection at first only in several reads.)
pub(crate) const SMALL: usize = 4 << 10;
/// More than this is not counted of one connection.
const MAX_COUNT: u32 = 1 << 30;
/// Of a connection of which a body is being read, no more than this is in memory, whatever the protocol adds to the body.
const MAX_WITHOUT_BODY: u32 = 2 << 20;

/// The sum over all connections of this process.
static SUM: AtomicU64 = AtomicU64::new(0);
/// How much that may be; 0 is any number.
static LIMIT: AtomicU64 = AtomicU64::new(0);

/// Sets the limit. Called once, in a new worker.
pub(crate) fn set_limit(bytes: u64) {
    LIMIT.store(bytes, Relaxed);
}

/// What is held beyond the limit, or beyond a share of it, in eighths.
fn excess(eighths: u64) -> u64 {
    match LIMIT.load(Relaxed) {
        0 => 0,
        limit => SUM.load(Relaxed).saturating_sub(limit / 8 * eighths),
    }
}

/// Whether there is no room for more.
pub(crate) fn is_full() -> bool {
    excess(8) > 0
}

/// Whether bodies should take less room than they might.
pub(crate) fn is_tight() -> bool {
    excess(4) > 0
}

/// So many bytes should be given free, so that there is room again.
pub(crate) fn too_much() -> u64 {
    if is_full() { excess(6) } else { 0 }
}

/// Bytes of one connection. Dropped, they are given free.
#[derive(Debug, Default)]
pub(crate) struct Held {
    bytes: AtomicU32,
    /// What comes is not kept: it is carried to the application as fast as that takes it.
    is_over: AtomicBool,
}

impl Held {
    pub(crate) fn bytes(&self) -> u32 {
        self.bytes.load(Relaxed)
    }

    pub(crate) fn add(&self, bytes: usize) {
        // Who takes of a body at this moment can but make it less.
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX).min(MAX_COUNT.saturating_sub(self.bytes()));
        if !self.is_over.load(Relaxed) {
            self.bytes.fetch_add(bytes, Relaxed);
            SUM.fetch_add(bytes.into(), Relaxed);
        }
    }

    /// From now on nothing is counted.
    pub(crate) fn stop(&self) {
        self.is_over.store(true, Relaxed);
        self.clear();
    }

    /// So many bytes of a body were taken by the application.
    pub(crate) fn taken(&self, bytes: usize) {
        if self.bytes() > 0 {
            self.reduce(|held| held.saturating_sub(u32::try_from(bytes).unwrap_or(u32::MAX)).min(MAX_WITHOUT_BODY));
        }
    }

    /// One of so many requests is over.
    pub(crate) fn one_of(&self, requests: u32) {
        if self.bytes() > 0 {
            self.reduce(|held| held - held / requests.max(1));
        }
    }

    /// All is given free.
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
