//! Parses a FastCGI response: STDOUT records with a CGI header and the body, then END_REQUEST.

use super::head::{CgiHead, Collector, parse_cgi};
use super::{End, Malformed, take};
use crate::request::REQUEST_ID;

const VERSION: u8 = 1;
const END_REQUEST: u8 = 3;
const STDOUT: u8 = 6;
const STDERR: u8 = 7;

const HEADER_LEN: usize = 8;
/// Length of END_REQUEST: four bytes of application status, one byte of protocol status, and three reserved bytes.
const END_LEN: usize = 8;
const REQUEST_COMPLETE: u8 = 0;

/// Parses the records. `stdout` parses the content of STDOUT records.
#[derive(Debug, Default)]
pub(crate) struct Reader {
    at: At,
    header: Fixed<HEADER_LEN>,
    end_body: Fixed<END_LEN>,
    stdout: Stdout,
}

/// The part of a record to which the next byte belongs.
#[derive(Debug, Default, Clone, Copy)]
enum At {
    #[default]
    Header,
    Content {
        kind: Kind,
        left: usize,
        padding: usize,
    },
    Padding {
        kind: Kind,
        left: usize,
    },
    Behind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Stdout,
    Stderr,
    End,
}

/// Collects a block of fixed length.
#[derive(Debug)]
struct Fixed<const N: usize> {
    bytes: [u8; N],
    filled: usize,
}

#[derive(Debug, Default)]
struct Stdout {
    head: Collector,
    found: Option<CgiHead>,
    body_len: u64,
    closed: bool,
}

impl Reader {
    pub(super) fn reset(&mut self) {
        self.at = At::Header;
        self.header.filled = 0;
        self.end_body.filled = 0;
        self.stdout.reset();
    }

    pub(super) fn feed(&mut self, mut bytes: &[u8], body: &mut impl FnMut(&[u8])) -> Result<Option<End>, Malformed> {
        while !bytes.is_empty() {
            match self.at {
                At::Header => {
                    if let Some(header) = self.header.fill(&mut bytes) {
                        self.at = self.record(header)?;
                    }
                }
                At::Content { kind, left, padding } => {
                    let content = take(&mut bytes, left);
                    match kind {
                        Kind::Stdout => self.stdout.feed(content, body)?,
                        Kind::Stderr => {}
                        Kind::End => {
                            self.end_body.fill(&mut &*content);
                        }
                    }
                    self.at = match left - content.len() {
                        0 => At::Padding { kind, left: padding },
                        left => At::Content { kind, left, padding },
                    };
                }
                At::Padding { kind, left } => self.at = At::Padding { kind, left: left - take(&mut bytes, left).len() },
                At::Behind => return Err(Malformed::new("bytes behind END_REQUEST")),
            }
            if let At::Padding { kind, left: 0 } = self.at {
                self.at = if kind == Kind::End { At::Behind } else { At::Header };
            }
        }
        match self.at {
            At::Behind => self.end().map(Some),
            At::Header | At::Content { .. } | At::Padding { .. } => Ok(None),
        }
    }

    /// Returns the state after a record header.
    fn record(&mut self, header: [u8; HEADER_LEN]) -> Result<At, Malformed> {
        let [version, kind, id_high, id_low, length_high, length_low, padding, _reserved] = header;
        let id = u16::from_be_bytes([id_high, id_low]);
        let left = usize::from(u16::from_be_bytes([length_high, length_low]));
        let padding = usize::from(padding);
        if version != VERSION {
            return Err(Malformed::new(format!("a record of version {version}")));
        }
        if id != REQUEST_ID {
            return Err(Malformed::new(format!("a record of type {kind} for request id {id}")));
        }
        let kind = match kind {
            STDOUT if self.stdout.closed => {
                return Err(Malformed::new("a STDOUT record behind the end of stdout"));
            }
            STDOUT => Kind::Stdout,
            STDERR => Kind::Stderr,
            END_REQUEST if left != END_LEN => {
                return Err(Malformed::new(format!("END_REQUEST of {left} bytes")));
            }
            END_REQUEST => Kind::End,
            _ => return Err(Malformed::new(format!("a record of type {kind}"))),
        };
        self.stdout.closed |= kind == Kind::Stdout && left == 0;
        Ok(match left {
            0 => At::Padding { kind, left: padding },
            _ => At::Content { kind, left, padding },
        })
    }

    fn end(&self) -> Result<End, Malformed> {
        let [_, _, _, _, protocol_status, ..] = self.end_body.bytes;
        if protocol_status != REQUEST_COMPLETE {
            return Ok(End { refused: Some(protocol_status), status: 0, keep: true });
        }
        let head = self.stdout.found.ok_or_else(|| Malformed::new("END_REQUEST before the end of the CGI header"))?;
        if let Some(length) = head.length.filter(|&length| length != self.stdout.body_len) {
            return Err(Malformed::new(format!(
                "a body of {} bytes, Content-Length says {length}",
                self.stdout.body_len
            )));
        }
        Ok(End { refused: None, status: head.status, keep: true })
    }
}

impl Stdout {
    fn reset(&mut self) {
        self.head.clear();
        self.found = None;
        self.body_len = 0;
        self.closed = false;
    }

    fn feed(&mut self, mut bytes: &[u8], body: &mut impl FnMut(&[u8])) -> Result<(), Malformed> {
        if self.found.is_none() {
            self.found = self.head.collect(&mut bytes, parse_cgi)?;
        }
        if !bytes.is_empty() {
            self.body_len += bytes.len() as u64;
            body(bytes);
        }
        Ok(())
    }
}

impl<const N: usize> Fixed<N> {
    /// Returns the block when it is full, and starts a new block.
    fn fill(&mut self, bytes: &mut &[u8]) -> Option<[u8; N]> {
        let part = take(bytes, N - self.filled);
        let free = self.bytes.iter_mut().skip(self.filled);
        free.zip(part).for_each(|(to, from)| *to = *from);
        self.filled += part.len();
        if self.filled < N {
            return None;
        }
        self.filled = 0;
        Some(self.bytes)
    }
}

impl<const N: usize> Default for Fixed<N> {
    fn default() -> Self {
        Self { bytes: [0; N], filled: 0 }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::tests::read_split;
    use super::*;
    use crate::target::Protocol;

    fn record(kind: u8, content: &[u8], padding: u8) -> Vec<u8> {
        let length = u16::try_from(content.len()).unwrap().to_be_bytes();
        let mut bytes = vec![VERSION, kind, 0, 1, length[0], length[1], padding, 0];
        bytes.extend_from_slice(content);
        bytes.extend(std::iter::repeat_n(0xee, usize::from(padding)));
        bytes
    }

    fn end(protocol_status: u8) -> Vec<u8> {
        record(END_REQUEST, &[0, 0, 0, 0, protocol_status, 0, 0, 0], 0)
    }

    /// Returns a whole response with this stdout.
    pub(in super::super) fn response(stdout: &[u8]) -> Vec<u8> {
        [record(STDOUT, stdout, 3), record(STDOUT, &[], 0), end(0)].concat()
    }

    /// Returns the status and the body of a complete response.
    fn good(bytes: &[u8]) -> (u16, Vec<u8>) {
        let result = read_split(Protocol::Fastcgi, bytes);
        let end = result.end.expect("not malformed").expect("complete");
        assert_eq!((end.refused, end.keep), (None, true));
        (end.status, result.body)
    }

    fn malformed(bytes: &[u8]) -> String {
        read_split(Protocol::Fastcgi, bytes).end.expect_err("malformed").0
    }

    #[test]
    fn one_stdout_record() {
        assert_eq!(good(&response(b"Content-Type: text/plain\r\n\r\nhello")), (200, b"hello".into()));
        assert_eq!(good(&response(b"Status: 404 Not Found\n\ngone")), (404, b"gone".into()));
        assert_eq!(good(&response(b"Location: /x\r\n\r\n")), (302, vec![]));
        assert_eq!(good(&response(b"Content-type: text/html\r\nContent-Length: 2\r\n\r\nab")), (200, b"ab".into()));
    }

    #[test]
    fn many_records_with_stderr_between() {
        let bytes = [
            record(STDOUT, b"Content-Ty", 255),
            record(STDERR, b"a warning", 1),
            record(STDOUT, b"pe: text/plain\r\n\r", 0),
            record(STDOUT, b"\nhel", 7),
            record(STDOUT, b"lo", 0),
            record(STDERR, b"", 0),
            end(0),
        ];
        assert_eq!(good(&bytes.concat()), (200, b"hello".into()));
    }

    #[test]
    fn a_full_record() {
        let mut stdout = b"Content-Type: a/b\r\n\r\n".to_vec();
        stdout.resize(65_535, b'x');
        let bytes = [record(STDOUT, &stdout, 255), end(0)].concat();
        let mut reader = Reader::default();
        let mut seen = 0;
        let end = reader.feed(&bytes, &mut |part| seen += part.len()).unwrap();
        assert_eq!((end.unwrap().status, seen), (200, 65_535 - 21));
    }

    #[test]
    fn a_truncated_response_is_not_complete() {
        let bytes = response(b"Content-Type: text/plain\r\n\r\nhello");
        for length in 0..bytes.len() {
            assert_eq!(read_split(Protocol::Fastcgi, &bytes[..length]).end, Ok(None), "{length} bytes");
        }
    }

    #[test]
    fn a_refused_request_is_complete_but_not_successful() {
        let end = read_split(Protocol::Fastcgi, &end(2)).end.unwrap().unwrap();
        assert_eq!(end.refused, Some(2));
    }

    #[test]
    fn malformed_responses() {
        let good = response(b"Content-Type: text/plain\r\n\r\nhello");
        let changed = |at: usize, byte: u8| {
            let mut bytes = good.clone();
            bytes[at] = byte;
            malformed(&bytes)
        };
        assert_eq!(changed(0, 2), "a record of version 2");
        assert_eq!(changed(1, 10), "a record of type 10");
        assert_eq!(changed(3, 2), "a record of type 6 for request id 2");
        assert_eq!(changed(3, 0), "a record of type 6 for request id 0");
        assert_eq!(malformed(&[good.clone(), vec![1]].concat()), "bytes behind END_REQUEST");
        assert_eq!(malformed(&record(END_REQUEST, &[0; 4], 0)), "END_REQUEST of 4 bytes");
        assert_eq!(malformed(&end(0)), "END_REQUEST before the end of the CGI header");
        let twice = [record(STDOUT, b"", 0), record(STDOUT, b"Content-Type: a/b\n\n", 0)].concat();
        assert_eq!(malformed(&twice), "a STDOUT record behind the end of stdout");
    }

    #[test]
    fn malformed_cgi_headers() {
        for stdout in [
            b"HTTP/1.1 200 OK\r\n\r\n".as_slice(),
            b"X-Only: this\r\n\r\n",
            b"\r\nhello",
            b"Status: OK\r\n\r\n",
            b"Status: 20\r\n\r\n",
            b"Status: 200\r\nContent-Length: 4\r\n\r\nhello",
            b"Status: 200\r\nContent-Length: 6\r\n\r\nhello",
            b"Status: 200\r\nContent-Length: -5\r\n\r\nhello",
            b"Status: 200\r\nContent-Length: 5\r\nContent-Length: 4\r\n\r\nhello",
        ] {
            malformed(&response(stdout));
        }
    }

    #[test]
    fn a_head_without_end_is_bounded() {
        let line = record(STDOUT, &[b"X-Line: ".as_slice(), &[b'x'; 8000]].concat(), 0);
        let mut reader = Reader::default();
        let fed: Result<Vec<_>, _> = (0..100).map(|_| reader.feed(&line, &mut |_| ())).collect();
        assert_eq!(fed, Err(Malformed("a head of more than 32768 bytes".into())));
    }
}
