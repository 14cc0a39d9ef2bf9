//! Implements the protocols as pure functions between bytes and their meaning: no I/O, no clock, no
//! tokio.
//!
//! - [`fastcgi`]: records and streams, of the server and of the client. [`params`]: their name-value
//!   pairs. [`role`]: the role of a request, for the application.
//! - [`scgi`]: the netstring, and the body after it.
//! - [`cgi`]: CGI variables and the head of a response, in both directions.
//! - [`host`]: valid values of `Host`. [`grammar`]: numbers, lists and percent-encoding, which
//!   several protocols use.
//! - [`query`]: the pairs of a query. [`sendfile`]: the headers that select a file for the server to send.
//!   [`topics`]: lists of topics of events.
//! - [`proxy`]: the header of the PROXY protocol. [`forwarded`]: the client as reported in HTTP headers.
//!
//! hyper implements HTTP, so there is no module for it here.

#![cfg_attr(not(test), deny(clippy::indexing_slicing))]

pub(crate) mod cgi;
pub(crate) mod fastcgi;
pub(crate) mod forwarded;
pub(crate) mod grammar;
pub(crate) mod host;
pub(crate) mod http_gateway;
pub(crate) mod params;
pub(crate) mod proxy;
pub(crate) mod query;
pub(crate) mod ready_response;
pub(crate) mod role;
pub(crate) mod scgi;
pub(crate) mod sendfile;
pub(crate) mod topics;
