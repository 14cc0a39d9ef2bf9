//! An SCGI client that is based on the specification and shares no code with the server's codec.

use std::io::{self, Write as _};
use std::net::Shutdown;

use super::fastcgi::Stream;
use super::{connect_tcp, connect_unix, read_all};

pub struct Client {
    pub stream: Box<dyn Stream>,
    shutdown: Box<dyn Fn() -> io::Result<()> + Send>,
}

/// The response, parsed as CGI output.
#[derive(Debug)]
pub struct Response {
    pub head: String,
    pub body: Vec<u8>,
}

impl Response {
    pub fn parse(bytes: &[u8]) -> Self {
        let end = bytes.windows(4).position(|four| four == b"\r\n\r\n").expect("the response has a head");
        Self { head: String::from_utf8_lossy(&bytes[..end]).into_owned(), body: bytes[end + 4..].to_vec() }
    }

    pub fn status(&self) -> u16 {
        let status = self.head.strip_prefix("Status: ").and_then(|rest| rest.get(..3));
        status.and_then(|status| status.parse().ok()).expect("the head begins with a status")
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

impl Client {
    /// Connects to `address`, in the form used by the startup banner: `scgi:unix:/path` or `scgi:HOST:PORT`.
    pub fn connect(address: &str) -> io::Result<Self> {
        let address = address.strip_prefix("scgi:").unwrap_or(address);
        Ok(if let Some(path) = address.strip_prefix("unix:") {
            let stream = connect_unix(path)?;
            let other = stream.try_clone()?;
            Self { stream: Box::new(stream), shutdown: Box::new(move || other.shutdown(Shutdown::Write)) }
        } else {
            let stream = connect_tcp(address)?;
            let other = stream.try_clone()?;
            Self { stream: Box::new(stream), shutdown: Box::new(move || other.shutdown(Shutdown::Write)) }
        })
    }

    /// Shuts down the sending direction.
    pub fn end_writing(&self) -> io::Result<()> {
        (self.shutdown)()
    }

    /// Sends a whole request, and reads its response.
    pub fn request(mut self, method: &str, target: &str, body: &[u8]) -> io::Result<Response> {
        self.stream.write_all(&request(method, target, body))?;
        self.response()
    }

    /// Reads to the end of the stream.
    pub fn response(&mut self) -> io::Result<Response> {
        let mut bytes = Vec::new();
        let outcome = read_all(&mut self.stream, &mut bytes);
        let told = |error: io::Error| io::Error::new(error.kind(), format!("{error}, after {} bytes", bytes.len()));
        outcome.map_err(told)?;
        Ok(Response::parse(&bytes))
    }
}

pub fn netstring(pairs: &[(&str, &str)]) -> Vec<u8> {
    let strings: String = pairs.iter().map(|(name, value)| format!("{name}\0{value}\0")).collect();
    format!("{}:{strings},", strings.len()).into_bytes()
}

/// Returns a request without its body, as nginx sends it.
pub fn head(method: &str, target: &str, length: &str) -> Vec<u8> {
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    netstring(&[
        ("CONTENT_LENGTH", length),
        ("REQUEST_METHOD", method),
        ("REQUEST_URI", target),
        ("QUERY_STRING", query),
        ("CONTENT_TYPE", ""),
        ("DOCUMENT_URI", path),
        ("SCGI", "1"),
        ("SERVER_PROTOCOL", "HTTP/1.1"),
        ("REMOTE_ADDR", "127.0.0.1"),
        ("REMOTE_PORT", "4711"),
        ("HTTP_HOST", "localhost"),
    ])
}

pub fn request(method: &str, target: &str, body: &[u8]) -> Vec<u8> {
    [&head(method, target, &body.len().to_string())[..], body].concat()
}
