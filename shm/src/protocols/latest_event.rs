//! The protocol by which a topic's latest event is stored in its cell and readers look it up.
//!
//! The position is stored first. A reader that reads an id therefore finds that event, or a later one, at the position that it reads next.
//! In the reverse order, the reader would conclude that the event had been evicted.
//!
//! Must not wait, or depend on what lies at a position.

use super::sync::{AtomicU64, Ordering};
use crate::crash;

/// Stores a topic's latest event. The caller must hold the log's lock.
pub(crate) fn store(last_id: &AtomicU64, last_at: &AtomicU64, (id, at): (u64, u64)) {
    last_at.store(at, Ordering::Release);
    crash::point("link: position stored");
    last_id.store(id, Ordering::Release);
    crash::point("link: id stored");
}

/// Returns the id of the latest event, and the position of that event or of a later one.
pub(crate) fn load(last_id: &AtomicU64, last_at: &AtomicU64) -> (u64, u64) {
    (last_id.load(Ordering::Acquire), last_at.load(Ordering::Acquire))
}
