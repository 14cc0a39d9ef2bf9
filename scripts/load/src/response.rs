//! Reads a response: bytes in, the body out to a callback, and at the end what the response was.
//!
//! Pure, and with bounded memory: of a response only its head is kept, the body passes through. However the bytes are
//! cut into pieces, the same bytes give the same result. Whether the status and the body are the wanted
//! ones is the caller's business.

mod fastcgi;
mod head;
mod http;

use crate::target::Protocol;

/// A complete response.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct End {
    /// The protocol's way to say that there is no answer: FastCGI's `protocolStatus` when it is not zero.
    pub(crate) refused: Option<u8>,
    pub(crate) status: u16,
    /// Does the server leave the connection open?
    pub(crate) keep: bool,
}

/// What breaks the protocol. The connection is of no use afterwards.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Malformed(pub(crate) String);

/// The reader of one response at a time.
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

    /// Makes ready for the next response.
    pub(crate) fn reset(&mut self) {
        match self {
            Self::Fastcgi(reader) => reader.reset(),
            Self::Http(reader) => reader.reset(),
        }
    }

    /// Takes the next bytes of the connection. Bytes behind the end of the response are malformed: nobody asked for them.
    pub(crate) fn feed(&mut self, bytes: &[u8], body: &mut impl FnMut(&[u8])) -> Result<Option<End>, Malformed> {
        match self {
            Self::Fastcgi(reader) => reader.feed(bytes, body),
            Self::Http(reader) => reader.feed(bytes, body),
        }
    }

    /// The server has closed the connection. `None`: in the middle of the response.
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

/// Takes up to `wanted` bytes off the front of `bytes`.
fn take<'a>(bytes: &mut &'a [u8], wanted: usize) -> &'a [u8] {
    let (taken, rest) = bytes.split_at(wanted.min(bytes.len()));
    *bytes = rest;
    taken
}

/// As `take`, for a length that counts down in 64 bits.
fn take_counted<'a>(bytes: &mut &'a [u8], left: &mut u64) -> &'a [u8] {
    let taken = take(bytes, usize::try_from(*left).unwrap_or(usize::MAX));
    *left -= taken.len() as u64;
    taken
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What came of some bytes: the body, and the end, the breach, or what closing the connection there means.
    #[derive(Debug, PartialEq, Eq)]
    pub(super) struct Read {
        pub(super) body: Vec<u8>,
        pub(super) end: Result<Option<End>, Malformed>,
    }

    /// Feeds the pieces one by one, then closes the connection.
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

    /// Reads the bytes whole, byte by byte, cut in two at each place, and cut at random; all must agree.
    pub(super) fn read_split(protocol: Protocol, bytes: &[u8]) -> Read {
        let whole = read(protocol, [bytes]);
        assert_eq!(read(protocol, bytes.chunks(1)), whole, "byte by byte");
        for at in 0..=bytes.len() {
            let (first, second) = bytes.split_at(at);
            assert_eq!(read(protocol, [first, second]), whole, "cut at {at}");
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
