//! Provides the listening sockets and their queues, and hands connections over between processes.

pub(crate) mod app_channel;
pub(crate) mod app_endpoint;
pub(crate) mod control_listener;
pub(crate) mod handover;
pub(crate) mod listen;
pub(crate) mod private_socket;
pub(crate) mod publish_socket;
pub(crate) mod queue_depth;
pub(crate) mod unix_diagnosis;
