//! The protocols in shared memory, written with atomics only and without system calls. `tests/protocols.rs` compiles
//! these files against loom, which explores the possible interleavings of threads.

pub(crate) mod bell;
pub(crate) mod kept;
pub(crate) mod latest_event;
pub(crate) mod lease;
#[cfg(test)]
pub(crate) mod lease_tests;
pub(crate) mod lock;
pub(crate) mod pin;
#[cfg(test)]
pub(crate) mod pin_tests;
pub(crate) mod purge;
pub(crate) mod sync;
pub(crate) mod units;
#[cfg(test)]
pub(crate) mod units_tests;
