//! Wraps the application in limits, panic handling, the health check, and the records of each request.

pub(crate) mod access_log;
pub(crate) mod health;
pub(crate) mod max_requests;
pub(crate) mod request_guard;
pub(crate) mod serve;
