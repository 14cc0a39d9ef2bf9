//! How a worker notices that it must leave, that it hangs, and that a request is slow.

pub(crate) mod drain;
pub(crate) mod slow;
pub(crate) mod watchdog;
