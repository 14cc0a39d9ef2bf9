//! The request that proves the readiness of an app process (`--ready-path`), and the status of its response.
//!
//! The request has the form in which a gateway would forward it. Over HTTP, it is of version 1.0, so that the connection
//! ends with the response, and no response with a status below 200 precedes it.
//!
//! Bytes only: no I/O and no clock. The master sends the request.

use bytes::{Bytes, BytesMut};
use http::{Method, Request, StatusCode, header};

use super::scripts::{self, ScriptRoot};
use crate::config::Config;
use crate::config::gateway::{Backend, GatewayConfig};
use crate::protocol::cgi::ClientInfo;
use crate::protocol::cgi::parse_response::ResponseHeadParser;
use crate::protocol::cgi::variables::{ScriptPaths, ServerAddress, request_variables};
use crate::protocol::fastcgi::client::{self, ParamsWriter, ResponseDecoder, ResponseEvent};
use crate::protocol::scgi;

/// The only request on a connection.
const REQUEST_ID: u16 = 1;
/// Maximum size of the head of a response.
const MAX_HEAD: usize = 8 << 10;
const HOST: &str = "localhost";
const USER_AGENT: &str = "forkyard-ready";

/// Returns the bytes of a GET request for `path`.
///
/// # Errors
/// Returns a message for the operator if the path selects no script below `--root`.
pub(crate) fn encode(config: &Config, gateway: &GatewayConfig, path: &str) -> Result<Bytes, String> {
    if config.backend() == Backend::Http {
        let text = format!(
            "GET {path} HTTP/1.0\r\nHost: {HOST}\r\nUser-Agent: {USER_AGENT}\r\nAccept: */*\r\nConnection: close\r\n\r\n"
        );
        return Ok(Bytes::from(text));
    }
    let request = Request::builder().method(Method::GET).uri(path).header(header::HOST, HOST);
    let request = request.header(header::USER_AGENT, USER_AGENT).body(());
    let (parts, ()) = request.map_err(|error| format!("--ready-path {path}: {error}"))?.into_parts();
    let root = ScriptRoot::open(&gateway.scripts)?;
    let script = root.as_ref().map(|root| {
        root.find(parts.uri.path()).ok_or_else(|| format!("--ready-path {path} names no script below --root"))
    });
    let script = script.transpose()?;
    let path_info = scripts::path_info(parts.uri.path());
    let paths = match (&root, &script) {
        (Some(root), Some(script)) => ScriptPaths {
            document_root: Some(root.path()),
            script_filename: Some(&script.filename),
            script_name: Some(&script.name),
            path_info: script.path_info.as_deref(),
        },
        _ => ScriptPaths { path_info: path_info.as_deref(), ..ScriptPaths::default() },
    };
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

/// Decodes the response.
#[derive(Debug)]
pub(crate) struct StatusDecoder {
    records: Option<(ResponseDecoder, BytesMut)>,
    head: ResponseHeadParser,
    status: Option<StatusCode>,
    has_ended: bool,
}

impl StatusDecoder {
    pub(crate) fn new(backend: Backend) -> Self {
        let records = match backend {
            Backend::Fastcgi | Backend::Cgi => Some((ResponseDecoder::new(REQUEST_ID), BytesMut::new())),
            Backend::Http | Backend::Scgi => None,
        };
        Self { records, head: ResponseHeadParser::new(MAX_HEAD), status: None, has_ended: false }
    }

    /// Takes the next bytes of the response.
    ///
    /// # Errors
    /// Returns a message for the operator if the response is invalid.
    pub(crate) fn feed(&mut self, bytes: &[u8]) -> Result<(), String> {
        let Some((mut decoder, mut input)) = self.records.take() else {
            return self.feed_head(Bytes::copy_from_slice(bytes));
        };
        input.extend_from_slice(bytes);
        while let Some(event) = decoder.decode(&mut input).map_err(|error| error.to_string())? {
            match event {
                ResponseEvent::Stdout(bytes) => self.feed_head(bytes)?,
                ResponseEvent::Stderr(_) => {}
                ResponseEvent::End { .. } => self.has_ended = true,
            }
        }
        self.records = Some((decoder, input));
        Ok(())
    }

    fn feed_head(&mut self, bytes: Bytes) -> Result<(), String> {
        if self.status.is_none() {
            let head = self.head.feed(bytes).map_err(|error| error.to_string())?;
            self.status = head.map(|(head, _)| head.status);
        }
        Ok(())
    }

    /// Returns the status, once the head of the response is complete.
    pub(crate) fn status(&self) -> Option<StatusCode> {
        self.status
    }

    /// Whether the response is complete before the end of the connection.
    pub(crate) fn has_ended(&self) -> bool {
        self.has_ended
    }

    /// Returns the message for the operator if the connection has ended without a status.
    pub(crate) fn end_of_connection(&self) -> String {
        self.head.finish().to_string()
    }
}

#[cfg(test)]
mod tests {
    use bytes::BufMut as _;

    use super::*;

    fn record(out: &mut BytesMut, kind: u8, content: &[u8]) {
        out.put_slice(&[1, kind, 0, 1, 0, u8::try_from(content.len()).unwrap(), 0, 0]);
        out.put_slice(content);
    }

    #[test]
    fn the_status_is_read_in_any_pieces() {
        let cgi = b"Status: 503 Busy\r\nContent-Type: text/plain\r\n\r\nno";
        let mut fastcgi = BytesMut::new();
        record(&mut fastcgi, 7, b"warning");
        record(&mut fastcgi, 6, &cgi[..20]);
        record(&mut fastcgi, 6, &cgi[20..]);
        record(&mut fastcgi, 3, &[0; 8]);
        for (backend, bytes) in [
            (Backend::Http, &b"HTTP/1.1 503 Busy\r\nServer: x\r\n\r\nno"[..]),
            (Backend::Scgi, cgi),
            (Backend::Fastcgi, &fastcgi),
        ] {
            for size in 1..bytes.len() {
                let mut decoder = StatusDecoder::new(backend);
                bytes.chunks(size).for_each(|piece| decoder.feed(piece).unwrap());
                assert_eq!(decoder.status(), Some(StatusCode::SERVICE_UNAVAILABLE), "{backend}");
                assert_eq!(decoder.has_ended(), backend == Backend::Fastcgi);
            }
        }
    }

    #[test]
    fn an_invalid_response_is_explained() {
        for (backend, bytes) in
            [(Backend::Http, &b"220 mail\r\n\r\n"[..]), (Backend::Fastcgi, b"HTTP/1.1 200 OK\r\n\r\n")]
        {
            let error = StatusDecoder::new(backend).feed(bytes).unwrap_err();
            assert!(!error.is_empty(), "{backend}");
        }
        let mut long = StatusDecoder::new(Backend::Http);
        let error = (0..100).find_map(|_| long.feed(&[b'x'; 100]).err()).unwrap();
        assert!(error.contains("8K"), "{error}");
        assert!(StatusDecoder::new(Backend::Scgi).end_of_connection().contains("without a response"));
    }
}
