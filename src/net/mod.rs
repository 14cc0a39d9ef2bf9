//! Sockets: listeners, their queues, and connections that pass from one process to another.

pub(crate) mod handover;
pub(crate) mod listen;
pub(crate) mod publish_socket;
pub(crate) mod queue_depth;
