//! The state of a request in progress, which the protocols, the service and the body of the request share.

pub(crate) mod activity;
pub(crate) mod body_wait;
pub(crate) mod buffered;
pub(crate) mod queue_time;
