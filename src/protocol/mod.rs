//! The protocols, as pure functions from bytes to meaning and back: no I/O, no clock, no tokio.
//!
//! - [`fastcgi`] knows records and streams; [`params`] the pairs in them.
//! - [`scgi`] knows the netstring and the body behind it.
//! - [`cgi`] knows what a CGI variable means to an `http::Request`, and how a response head is written.
//!
//! HTTP is hyper's; there is no file for it here.

#![cfg_attr(not(test), deny(clippy::indexing_slicing))]

pub(crate) mod cgi;
pub(crate) mod fastcgi;
pub(crate) mod params;
pub(crate) mod scgi;
