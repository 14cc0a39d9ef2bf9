//! The foundation of the cache, the event log and the scoreboard: the mapping, its layout, waiting for locks, and the member processes.

pub(crate) mod clock;
pub(crate) mod error;
pub(crate) mod fork;
pub(crate) mod futex;
pub(crate) mod geometry;
pub(crate) mod layout;
pub(crate) mod lost_pages;
pub(crate) mod map;
pub(crate) mod members;
pub(crate) mod memory_limit;
pub(crate) mod wait;

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use self::clock::monotonic_ms;
use self::geometry::Geometry;
use self::layout::SegmentHead;
use self::map::Map;
use self::members::Membership;

/// A mapped segment, shared by all handles in this process. `geometry` is a private copy that is never read from the segment again.
#[derive(Debug)]
pub(crate) struct SharedMemory {
    pub(crate) map: Map,
    pub(crate) geometry: Geometry,
    pub(crate) seed: u64,
    /// Offset that is added to the monotonic clock, so that the segment's clock continues when a file is reopened.
    pub(crate) time_base: u64,
    pub(crate) membership: Membership,
    pub(crate) fd: OwnedFd,
    /// The lock of the file, if the segment is in a file and this process opened it.
    pub(crate) file: Option<Arc<File>>,
}

impl SharedMemory {
    /// Returns the milliseconds of the segment's clock, never 0. The clock continues when a file is reopened.
    pub(crate) fn now_ms(&self) -> u64 {
        self.time_base.wrapping_add(monotonic_ms())
    }

    pub(crate) fn header(&self) -> Option<&SegmentHead> {
        self.map.at(0)
    }
}
