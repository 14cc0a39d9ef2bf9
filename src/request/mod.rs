//! Holds the state of a request in progress that the protocols, the service and the request body
//! share.

pub(crate) mod activity;
pub(crate) mod body_wait;
pub(crate) mod buffered;
pub(crate) mod outlasting;
pub(crate) mod queue_time;
pub(crate) mod shared_block;
