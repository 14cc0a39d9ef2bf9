//! The atomics that the protocols in shared memory are written with, in one place: the model tests
//! (`tests/protocols.rs`) compile those files against loom's instead.

pub(crate) use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
