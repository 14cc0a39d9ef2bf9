//! Parses an HTTP/1.1 response: a head, and a body delimited by Content-Length, by chunks, or by the end of the connection.

use httparse::{EMPTY_HEADER, Status};

use super::head::{Collector, MAX_HEADERS, content_length, has_token};
use super::{End, Malformed, take_counted};

/// Parses one response. Interim responses (1xx) before it are skipped.
#[derive(Debug, Default)]
pub(crate) struct Reader {
    at: At,
    collector: Collector,
    status: u16,
    keep: bool,
}

/// The part of the response to which the next byte belongs.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum At {
    #[default]
    Head,
    Counted(u64),
    UntilClosed,
    ChunkLine,
    Chunk(u64),
    ChunkEnd,
    Trailer,
    Behind,
}

/// The relevant parts of a head.
#[derive(Debug, Clone, Copy)]
struct Head {
    status: u16,
    keep: bool,
    body: At,
}

impl Reader {
    pub(super) fn reset(&mut self) {
        self.at = At::Head;
        self.collector.clear();
    }

    pub(super) fn feed(&mut self, mut bytes: &[u8], body: &mut impl FnMut(&[u8])) -> Result<Option<End>, Malformed> {
        while !bytes.is_empty() {
            self.at = match self.at {
                At::Head => match self.collector.collect(&mut bytes, parse_head)? {
                    Some(head) => self.head(head),
                    None => At::Head,
                },
                At::Counted(mut left) => {
                    body(take_counted(&mut bytes, &mut left));
                    if left == 0 { At::Behind } else { At::Counted(left) }
                }
                At::UntilClosed => {
                    body(std::mem::take(&mut bytes));
                    At::UntilClosed
                }
                At::ChunkLine => match self.collector.collect(&mut bytes, parse_chunk_line)? {
                    Some(0) => At::Trailer,
                    Some(left) => At::Chunk(left),
                    None => At::ChunkLine,
                },
                At::Chunk(mut left) => {
                    body(take_counted(&mut bytes, &mut left));
                    if left == 0 { At::ChunkEnd } else { At::Chunk(left) }
                }
                At::ChunkEnd => match self.collector.collect(&mut bytes, parse_chunk_end)? {
                    Some(()) => At::ChunkLine,
                    None => At::ChunkEnd,
                },
                At::Trailer => match self.collector.collect(&mut bytes, parse_trailer)? {
                    Some(()) => At::Behind,
                    None => At::Trailer,
                },
                At::Behind => return Err(Malformed::new("bytes behind the end of the response")),
            };
        }
        Ok(if self.at == At::Behind { Some(self.end()) } else { None })
    }

    pub(super) fn closed(&mut self) -> Option<End> {
        match self.at {
            At::UntilClosed => Some(self.end()),
            At::Head | At::Counted(_) | At::ChunkLine | At::Chunk(_) | At::ChunkEnd | At::Trailer | At::Behind => None,
        }
    }

    fn head(&mut self, head: Head) -> At {
        self.status = head.status;
        self.keep = head.keep;
        head.body
    }

    fn end(&self) -> End {
        End { refused: None, status: self.status, keep: self.keep && self.at != At::UntilClosed }
    }
}

fn parse_head(bytes: &[u8]) -> Result<Status<(usize, Head)>, Malformed> {
    let mut lines = [EMPTY_HEADER; MAX_HEADERS];
    let mut response = httparse::Response::new(&mut lines);
    let parsed = response.parse(bytes).map_err(|error| Malformed::new(format!("HTTP head: {error}")))?;
    let Status::Complete(used) = parsed else {
        return Ok(Status::Partial);
    };
    let status = response.code.unwrap_or_default();
    let lines = &*response.headers;
    let old = response.version == Some(0);
    let keep =
        if old { has_token(lines, "Connection", "keep-alive") } else { !has_token(lines, "Connection", "close") };
    let chunked = has_token(lines, "Transfer-Encoding", "chunked");
    let body = match (status, content_length(lines)?) {
        (101, _) => {
            return Err(Malformed::new("101 without having been asked to switch protocols"));
        }
        (100..200, _) => At::Head,
        (204 | 304, _) => At::Behind,
        (_, Some(_)) if chunked => {
            return Err(Malformed::new("both Content-Length and Transfer-Encoding"));
        }
        (_, None) if chunked => At::ChunkLine,
        (_, Some(0)) => At::Behind,
        (_, Some(length)) => At::Counted(length),
        (_, None) => At::UntilClosed,
    };
    Ok(Status::Complete((used, Head { status, keep, body })))
}

fn parse_chunk_line(bytes: &[u8]) -> Result<Status<(usize, u64)>, Malformed> {
    let bad = || Malformed::new("a chunk without a valid length");
    if bytes.first().is_some_and(|first| !first.is_ascii_hexdigit()) {
        return Err(bad());
    }
    httparse::parse_chunk_size(bytes).map_err(|_| bad())
}

fn parse_chunk_end(bytes: &[u8]) -> Result<Status<(usize, ())>, Malformed> {
    match bytes {
        [b'\r', b'\n', ..] => Ok(Status::Complete((2, ()))),
        [] | [b'\r'] => Ok(Status::Partial),
        _ => Err(Malformed::new("a chunk longer than its length")),
    }
}

fn parse_trailer(bytes: &[u8]) -> Result<Status<(usize, ())>, Malformed> {
    let mut lines = [EMPTY_HEADER; MAX_HEADERS];
    let parsed =
        httparse::parse_headers(bytes, &mut lines).map_err(|error| Malformed::new(format!("trailer: {error}")))?;
    Ok(match parsed {
        Status::Complete((used, _)) => Status::Complete((used, ())),
        Status::Partial => Status::Partial,
    })
}

#[cfg(test)]
mod tests {
    use super::super::tests::read_split;
    use crate::target::Protocol;

    fn good(bytes: &[u8]) -> (u16, bool, Vec<u8>) {
        let result = read_split(Protocol::Http, bytes);
        let end = result.end.expect("not malformed").expect("complete");
        (end.status, end.keep, result.body)
    }

    #[test]
    fn content_length() {
        assert_eq!(good(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"), (200, true, b"hello".into()));
        assert_eq!(good(b"HTTP/1.1 500\r\ncontent-length:0\r\n\r\n"), (500, true, vec![]));
        assert_eq!(good(b"HTTP/1.1 204 No Content\r\n\r\n"), (204, true, vec![]));
    }

    #[test]
    fn connection() {
        let with = |line: &str| good(format!("{line}\r\nContent-Length: 1\r\n\r\nx").as_bytes()).1;
        assert!(with("HTTP/1.1 200 OK"));
        assert!(!with("HTTP/1.1 200 OK\r\nConnection: Close"));
        assert!(!with("HTTP/1.1 200 OK\r\nConnection: x, close"));
        assert!(!with("HTTP/1.0 200 OK"));
        assert!(with("HTTP/1.0 200 OK\r\nConnection: keep-alive"));
    }

    #[test]
    fn chunks() {
        let head = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
        let with = |body: &str| good(format!("{head}{body}").as_bytes());
        assert_eq!(with("5\r\nhello\r\n0\r\n\r\n"), (200, true, b"hello".into()));
        assert_eq!(with("2;name=value\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n"), (200, true, b"hello".into()));
        assert_eq!(with("00A\r\n0123456789\r\n0\r\nX-Trailer: a\r\nY: b\r\n\r\n"), (200, true, b"0123456789".into()));
    }

    #[test]
    fn interim_responses_are_skipped() {
        let bytes = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";
        assert_eq!(good(bytes), (200, true, b"ok".into()));
    }

    #[test]
    fn the_end_of_the_connection_ends_a_body_without_length() {
        assert_eq!(good(b"HTTP/1.1 200 OK\r\n\r\nhello"), (200, false, b"hello".into()));
    }

    #[test]
    fn a_truncated_response_is_not_complete() {
        for bytes in [
            b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello".as_slice(),
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
        ] {
            for length in 0..bytes.len() {
                assert_eq!(read_split(Protocol::Http, &bytes[..length]).end, Ok(None), "{length} bytes");
            }
        }
    }

    #[test]
    fn malformed() {
        for bytes in [
            "hello, I am no HTTP server at all",
            "HTTP/1.1 2x0 OK\r\n\r\n",
            "HTTP/1.1 101 Switching\r\n\r\n",
            "HTTP/1.1 200 OK\r\nno colon here\r\n\r\n",
            "HTTP/1.1 200 OK\r\nContent-Length: five\r\n\r\nhello",
            "HTTP/1.1 200 OK\r\nContent-Length: +5\r\n\r\nhello",
            "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
            "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\nhello",
            "HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nhello",
            "HTTP/1.1 204 No Content\r\n\r\nhello",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nhello",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n\r\n\r\n",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhello\r\n0\r\n\r\n",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhello",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n11111111111111111\r\n",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nmore",
        ] {
            assert!(read_split(Protocol::Http, bytes.as_bytes()).end.is_err(), "accepted: {bytes}");
        }
    }
}
