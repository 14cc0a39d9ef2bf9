//! Parses a response. Takes bytes, passes the body to a callback, and returns the response's properties when the response is
//! complete.
//!
//! The parser performs no I/O, and its memory is bounded: only the head is stored. The result does not depend on how the bytes
//! are split. The caller checks the status and the body.

mod fastcgi;
mod head;
mod http;

use crate::target::Protocol;

/// A complete response.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct End {
    /// FastCGI's `protocolStatus`, if it is not zero. A nonzero value means that the request was not served.
    pub(crate) refused: Option<u8>,
    pub(crate) status: u16,
    /// Whether the server keeps the connection open.
    pub(crate) keep: bool,
}

/// A violation of the protocol, after which the connection cannot be used.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Malformed(pub(crate) String);

/// Reads one response at a time.
#[derive(Debug)]
pub(crate) enum Response {
    Fastcgi(fastcgi::Reader),
    Http(http::Reader),
}

impl Response {
    pub(crate) fn new(protocol: Protocol) -> Self {
        match protocol {
            Protocol::Fastcgi => Self::Fastcgi(fastcgi::Reader::default()),
            Protocol::Http => Self::Http(http::Reader::default()),
        }
    }

    /// Prepares for the next response.
    pub(crate) fn reset(&mut self) {
        match self {
            Self::Fastcgi(reader) => reader.reset(),
            Self::Http(reader) => reader.reset(),
        }
    }

    /// Parses the next bytes of the connection. Bytes after the end of the response are malformed, because no further request
    /// was sent.
    pub(crate) fn feed(&mut self, bytes: &[u8], body: &mut impl FnMut(&[u8])) -> Result<Option<End>, Malformed> {
        match self {
            Self::Fastcgi(reader) => reader.feed(bytes, body),
            Self::Http(reader) => reader.feed(bytes, body),
        }
    }

    /// Returns the end of a response whose connection the server has closed, or `None` if the response is incomplete.
    pub(crate) fn closed(&mut self) -> Option<End> {
        match self {
            Self::Fastcgi(_) => None,
            Self::Http(reader) => reader.closed(),
        }
    }
}

impl Malformed {
    fn new(what: impl Into<String>) -> Self {
        Self(what.into())
    }
}

/// Removes up to `wanted` bytes from the front of `bytes`.
fn take<'a>(bytes: &mut &'a [u8], wanted: usize) -> &'a [u8] {
    let (taken, rest) = bytes.split_at(wanted.min(bytes.len()));
    *bytes = rest;
    taken
}

/// Like `take`, but decrements the remaining length, which is a 64-bit number.
fn take_counted<'a>(bytes: &mut &'a [u8], left: &mut u64) -> &'a [u8] {
    let taken = take(bytes, usize::try_from(*left).unwrap_or(usize::MAX));
    *left -= taken.len() as u64;
    taken
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The result of parsing some bytes and then closing the connection: the body, and either the end of the response
    /// (`None` if the response is incomplete) or the violation of the protocol.
    #[derive(Debug, PartialEq, Eq)]
    pub(super) struct Read {
        pub(super) body: Vec<u8>,
        pub(super) end: Result<Option<End>, Malformed>,
    }

    /// Parses the parts one by one, then closes the connection.
    fn read<'a>(protocol: Protocol, pieces: impl IntoIterator<Item = &'a [u8]>) -> Read {
        let mut response = Response::new(protocol);
        let mut body = Vec::new();
        let mut end = Ok(None);
        for piece in pieces {
            match response.feed(piece, &mut |bytes| body.extend_from_slice(bytes)) {
                Ok(None) => {}
                Ok(found) => end = Ok(found),
                Err(malformed) => {
                    return Read { body: Vec::new(), end: Err(malformed) };
                }
            }
        }
        if end == Ok(None) {
            end = Ok(response.closed());
        }
        Read { body, end }
    }

    /// Parses the bytes whole, byte by byte, split in two at every position, and split at random. All results must agree.
    pub(super) fn read_split(protocol: Protocol, bytes: &[u8]) -> Read {
        let whole = read(protocol, [bytes]);
        assert_eq!(read(protocol, bytes.chunks(1)), whole, "byte by byte");
        for at in 0..=bytes.len() {
            let (first, second) = bytes.split_at(at);
            assert_eq!(read(protocol, [first, second]), whole, "split at {at}");
        }
        let seed = fastrand::u64(..);
        let mut random = fastrand::Rng::with_seed(seed);
        for _ in 0..50 {
            let mut pieces = Vec::new();
            let mut rest = bytes;
            while !rest.is_empty() {
                pieces.push(take(&mut rest, random.usize(0..40)));
            }
            assert_eq!(read(protocol, pieces), whole, "seed {seed}");
        }
        whole
    }

    #[test]
    fn random_bytes_never_panic_and_do_not_depend_on_their_split() {
        let seed = fastrand::u64(..);
        println!("seed {seed}");
        let mut random = fastrand::Rng::with_seed(seed);
        let samples: [(Protocol, Vec<u8>); 3] = [
            (Protocol::Http, b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n".to_vec()),
            (Protocol::Http, b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello".to_vec()),
            (Protocol::Fastcgi, fastcgi::tests::response(b"Content-Type: text/plain\r\n\r\nhello")),
        ];
        for _ in 0..300 {
            let (protocol, mut bytes) = random.choice(&samples).expect("there are samples").clone();
            for _ in 0..random.usize(0..4) {
                let at = random.usize(0..bytes.len());
                bytes[at] = random.choice(*b"\r\n:0159 a\0\x01\x03\x06\xff").expect("not empty");
            }
            let result = read_split(protocol, &bytes);
            assert!(result.body.len() <= bytes.len());
        }
    }
}
