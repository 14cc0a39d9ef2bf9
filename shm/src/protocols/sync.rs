//! The atomics that the protocols in shared memory are written with, in one place: the model tests
//! (`tests/protocols.rs`) compile those files against loom's instead.

pub(crate) use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

/// A full fence, where one is needed after an atomic read-modify-write with `SeqCst`: that is one already. (The model does
/// not take it for one, and has a fence here.)
#[inline(always)]
pub(crate) fn fence_after_swap() {}
