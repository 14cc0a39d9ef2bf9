//! The request that proves the readiness of an app process (`--ready-path`).
//!
//! The request has the form in which a gateway would forward it. Over HTTP, it is of version 1.0, so that the connection
//! ends with the response, and no response with a status below 200 precedes it. The master sends the request
//! (`master/pool/ready_check.rs`).

use bytes::{Bytes, BytesMut};
use http::{Method, Request, header};

use super::scripts::{self, ScriptRoot};
use crate::config::Config;
use crate::config::gateway::Backend;
use crate::protocol::cgi::ClientInfo;
use crate::protocol::cgi::variables::{ServerAddress, request_variables};
use crate::protocol::fastcgi::client::{self, ParamsWriter};
use crate::protocol::ready_response::REQUEST_ID;
use crate::protocol::scgi;

const HOST: &str = "localhost";
const USER_AGENT: &str = "forkyard-ready";

/// Returns the bytes of a GET request for `path`.
///
/// # Errors
/// Returns a message for the operator if the path selects no script below `--root`.
pub(crate) fn encode(config: &Config, path: &str) -> Result<Bytes, String> {
    if config.backend() == Backend::Http {
        let text = format!(
            "GET {path} HTTP/1.0\r\nHost: {HOST}\r\nUser-Agent: {USER_AGENT}\r\nAccept: */*\r\nConnection: close\r\n\r\n"
        );
        return Ok(Bytes::from(text));
    }
    let request = Request::builder().method(Method::GET).uri(path).header(header::HOST, HOST);
    let request = request.header(header::USER_AGENT, USER_AGENT).body(());
    let (parts, ()) = request.map_err(|error| format!("--ready-path {path}: {error}"))?.into_parts();
    let root = config.gateway.as_ref().map(|gateway| ScriptRoot::open(&gateway.scripts)).transpose()?.flatten();
    let script = root.as_ref().map(|root| {
        root.find(parts.uri.path()).ok_or_else(|| format!("--ready-path {path} names no script below --root"))
    });
    let script = script.transpose()?;
    let path_info = scripts::path_info(parts.uri.path());
    let paths = scripts::paths(root.as_ref().zip(script.as_deref()), path_info.as_deref());
    let (client, server) = (ClientInfo::of_http(None, false), ServerAddress { name: None, port: 80, address: None });
    let variables =
        |pair: &mut dyn FnMut(&[u8], &[u8])| request_variables(&parts, &client, &server, &paths, None, pair);
    let mut bytes = BytesMut::with_capacity(1024);
    match config.backend() {
        Backend::Scgi => scgi::client::request(&mut bytes, 0, variables),
        Backend::Fastcgi | Backend::Http | Backend::Cgi => {
            client::begin_request(&mut bytes, REQUEST_ID, false);
            let mut params = ParamsWriter::new(&mut bytes, REQUEST_ID);
            variables(&mut |name, value| params.pair(name, value));
            params.end();
            client::stdin_end(&mut bytes, REQUEST_ID);
        }
    }
    Ok(bytes.freeze())
}
