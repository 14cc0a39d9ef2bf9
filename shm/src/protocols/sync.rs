//! The atomics used by the protocols in shared memory. They are defined here so that the model tests
//! (`tests/protocols.rs`) can compile the protocols against loom's atomics instead.

pub(crate) use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

/// Does nothing, because an atomic read-modify-write with `SeqCst`, which must precede it, is already a full fence. (The loom model does
/// not treat it as a fence, and has a real fence here.)
#[inline(always)]
pub(crate) fn fence_after_swap() {}
