//! The atomics used by the protocols in shared memory. They are defined here so that the model tests
//! (`tests/protocols.rs`) can compile the protocols against loom's atomics instead.

pub(crate) use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

/// A full fence after an atomic read-modify-write with `SeqCst`, which already is one. (The loom model does not treat it as
/// one, and has a real fence here.)
#[inline(always)]
pub(crate) fn fence_after_swap() {}
