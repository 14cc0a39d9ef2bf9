//! The protocol by which a topic is told of its latest event, and readers learn of it.
//!
//! The position is told first: who sees an id finds that event, or later ones, at the position that he reads next. The other
//! way round he would take the event for one that is gone.
//!
//! May not: wait, or know what lies at a position.

use super::sync::{AtomicU64, Ordering};
use crate::crash;

/// By whoever has the log's lock.
pub(crate) fn tell(last_id: &AtomicU64, last_at: &AtomicU64, (id, at): (u64, u64)) {
    last_at.store(at, Ordering::Release);
    crash::point("link: position stored");
    last_id.store(id, Ordering::Release);
    crash::point("link: id stored");
}

/// The id of the latest event, and the position of that one or of a later one.
pub(crate) fn told(last_id: &AtomicU64, last_at: &AtomicU64) -> (u64, u64) {
    (last_id.load(Ordering::Acquire), last_at.load(Ordering::Acquire))
}
