//! Accepts connections, reads requests and writes responses in each protocol, and closes connections.

pub(crate) mod accept;
pub(crate) mod acl;
pub(crate) mod cgi;
pub(crate) mod fastcgi;
pub(crate) mod http;
pub(crate) mod linger;
pub(crate) mod outbox;
pub(crate) mod per_client_limit;
pub(crate) mod preface;
pub(crate) mod reclaim;
pub(crate) mod refusals;
pub(crate) mod reply;
pub(crate) mod scgi;
pub(crate) mod socket;
pub(crate) mod stop_listening;
pub(crate) mod throttle;
pub(crate) mod under_way;
