//! Detects when a worker must drain, when a client takes too long, and when a request is slow.

pub(crate) mod drain;
pub(crate) mod slow;
pub(crate) mod watchdog;
