//! Sends the same request over each protocol, as bytes on a connection, for tests of behaviour that does not depend on
//! the protocol.

use std::io::{Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use super::{Server, awaited, connect_tcp, connect_unix, fastcgi, scgi};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    Http,
    FastCgi,
    Scgi,
}

pub const ALL: [Protocol; 3] = [Protocol::Http, Protocol::FastCgi, Protocol::Scgi];

impl Protocol {
    /// Starts an example that listens for only this protocol, on a port that the kernel chooses.
    pub fn start(self, example: &str, arguments: &[&str]) -> Server {
        let bind = match self {
            Self::Http => "http:127.0.0.1:0",
            Self::FastCgi => "fastcgi:127.0.0.1:0",
            Self::Scgi => "scgi:127.0.0.1:0",
        };
        Server::start(example, &[&["--bind", bind][..], arguments].concat())
    }

    /// Returns a request without its body. Over FastCGI, the head is followed by the header of a record with 65,535 bytes of the body, so
    /// that the next bytes belong to the body in every protocol.
    pub fn head(self, method: &str, target: &str, length: usize) -> Vec<u8> {
        match self {
            Self::Http => {
                let length = if length > 0 { format!("Content-Length: {length}\r\n") } else { String::new() };
                format!("{method} {target} HTTP/1.1\r\nHost: localhost\r\n{length}\r\n").into_bytes()
            }
            Self::FastCgi => {
                let mut bytes = fastcgi::head(1, true, method, target, Some(length)).concat();
                let end = fastcgi::record(fastcgi::STDIN, 1, b"", 0);
                bytes.extend(if length > 0 { vec![1, fastcgi::STDIN, 0, 1, 0xFF, 0xFF, 0, 0] } else { end });
                bytes
            }
            Self::Scgi => scgi::head(method, target, &length.to_string()),
        }
    }
}

/// Connects to `bind`, an address from the banner. The returned Unix stream may contain a TCP socket. This works because reading, writing
/// and timeouts use the same system calls for both.
pub fn connect(bind: &str) -> UnixStream {
    let (_, address) = bind.split_once(':').expect("the address begins with a protocol");
    match address.strip_prefix("unix:") {
        Some(path) => connect_unix(path).unwrap(),
        None => OwnedFd::from(connect_tcp(address.trim_start_matches('/')).unwrap()).into(),
    }
}

/// Sends these bytes, and reads until the status of a response has arrived.
pub fn ask(stream: &mut UnixStream, bytes: &[u8]) -> (u16, Vec<u8>) {
    stream.write_all(bytes).unwrap();
    let mut response = Vec::new();
    loop {
        if let Some(status) = status(&response) {
            return (status, response);
        }
        let mut piece = [0; 4096];
        let count = stream.read(&mut piece).map_err(|error| awaited("the head of a response", error)).unwrap();
        assert!(count > 0, "the connection ended after {:?}", String::from_utf8_lossy(&response));
        response.extend_from_slice(&piece[..count]);
    }
}

/// Returns the status of a response, if its head is complete.
pub fn status(response: &[u8]) -> Option<u16> {
    let text = String::from_utf8_lossy(response);
    let (head, _) = text.split_once("\r\n\r\n")?;
    let status = ["HTTP/1.1 ", "Status: "].iter().find_map(|before| head.split_once(before))?.1;
    status.get(..3)?.parse().ok()
}
