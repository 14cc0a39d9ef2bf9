//! Provides the listening sockets and their queues, and hands connections over between processes.

pub(crate) mod control_listener;
pub(crate) mod handover;
pub(crate) mod listen;
pub(crate) mod publish_socket;
pub(crate) mod queue_depth;
