//! The atomics used by the protocols in shared memory, in one place: the model tests
//! (`tests/protocols.rs`) compile those files against loom's atomics instead.

pub(crate) use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

/// A full fence after an atomic read-modify-write with `SeqCst`, which already is one. (The model does not treat it as one, and
/// has a fence here.)
#[inline(always)]
pub(crate) fn fence_after_swap() {}
