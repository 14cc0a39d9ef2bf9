//! Connections: accepting them, reading requests and writing responses in each protocol, and closing them.

pub(crate) mod accept;
pub(crate) mod cgi;
pub(crate) mod closing;
pub(crate) mod crowd;
pub(crate) mod door;
pub(crate) mod entry;
pub(crate) mod fastcgi;
pub(crate) mod http;
pub(crate) mod opening;
pub(crate) mod outbox;
pub(crate) mod reclaim;
pub(crate) mod refusals;
pub(crate) mod reply;
pub(crate) mod scgi;
pub(crate) mod socket;
pub(crate) mod throttle;
