//! The protocols, as pure functions from bytes to meaning and back: no I/O, no clock, no tokio.
//!
//! - [`fastcgi`] knows records and streams; [`params`] the pairs in them; [`role`] what the
//!   application sees of them.
//! - [`scgi`] knows the netstring and the body behind it.
//! - [`cgi`] knows what a CGI variable means to an `http::Request`, and how a response head is written.
//! - [`host`] knows what a `Host` may be.
//! - [`query`] knows the pairs of a query.
//! - [`proxy`] knows the PROXY protocol's header; [`forwarded`] what HTTP headers say of the client.
//!
//! HTTP is hyper's; there is no file for it here.

#![cfg_attr(not(test), deny(clippy::indexing_slicing))]

pub(crate) mod cgi;
pub(crate) mod fastcgi;
pub(crate) mod forwarded;
pub(crate) mod host;
pub(crate) mod params;
pub(crate) mod proxy;
pub(crate) mod query;
pub(crate) mod role;
pub(crate) mod scgi;
