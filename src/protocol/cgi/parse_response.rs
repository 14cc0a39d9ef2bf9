//! Parses the head of a response in CGI form (RFC 3875, section 6), as an application writes it to its output.
//!
//! - A line ends with LF or CRLF. The head ends with the first empty line. A head has at least one line.
//! - The status is the value of `Status`, or of a first line such as `HTTP/1.1 200 OK`, which some programs write.
//!   Without either, it is 302 if there is a `Location` (a path or a URL), and 200 otherwise. All statuses in a head
//!   must be the same. A 1xx status is rejected, because it is not a response.
//! - Headers are kept in their order, repeated ones included. `Content-Length` is reduced to one value.
//! - Headers that concern one connection are removed: the gateway has its own connection to the client.
//! - A header that continues on a second line is rejected (RFC 9112, section 5.2). Space before the colon is not
//!   allowed. A value may contain bytes above 0x7f.
//!
//! The head takes at most the given number of bytes, including the empty line. The same bytes give the same result,
//! however they are split into chunks. A head that arrives in one chunk is not copied.

use std::fmt;

use bytes::{Bytes, BytesMut};
use http::StatusCode;
use http::header::{self, HeaderMap, HeaderName, HeaderValue};

use super::MAX_NAMES;
use super::response::is_of_one_connection;
use crate::protocol::grammar::{elements, parse_digits};

/// The head of a response.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct ResponseHead {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    /// The value of `Content-Length`, which is also in `headers`.
    pub(crate) content_length: Option<u64>,
}

/// Why the head of a response is invalid. The application is at fault. Lines are counted from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ResponseHeadError {
    Empty,
    Truncated,
    TooLong { max_bytes: usize },
    NoHeaders,
    NotAHeader { line: usize },
    Value { line: usize },
    Folded { line: usize },
    TooManyHeaders,
    Status,
    Informational(StatusCode),
    Length,
}

impl fmt::Display for ResponseHeadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Empty => f.write_str("the application ended without a response"),
            Self::Truncated => f.write_str("the response ended before the empty line after its headers"),
            Self::TooLong { max_bytes } => {
                f.write_str("the response has no empty line after its headers within ")?;
                if max_bytes % 1024 == 0 { write!(f, "{}K", max_bytes / 1024) } else { write!(f, "{max_bytes} bytes") }
            }
            Self::NoHeaders => f.write_str("the response begins with an empty line instead of a header"),
            Self::NotAHeader { line } => {
                write!(f, "line {line} of the response is neither a header nor the empty line before the body")
            }
            Self::Value { line } => write!(f, "the header in line {line} of the response has a control character"),
            Self::Folded { line } => {
                write!(f, "line {line} of the response begins with a space, which is not allowed in headers")
            }
            Self::TooManyHeaders => write!(f, "the response has more than {MAX_NAMES} different headers"),
            Self::Status => f.write_str("the status of the response is not a three-digit number, or there are several"),
            Self::Informational(status) => {
                write!(f, "the response has the status {}, which is not final", status.as_str())
            }
            Self::Length => f.write_str("the Content-Length of the response is not a number, or there are several"),
        }
    }
}

impl std::error::Error for ResponseHeadError {}

/// Collects the head of one response.
#[derive(Debug)]
pub(crate) struct ResponseHeadParser {
    max_bytes: usize,
    /// The incomplete head; at most `max_bytes` long between two calls.
    received: BytesMut,
}

impl ResponseHeadParser {
    /// Accepts a head of up to `max_bytes`.
    pub(crate) fn new(max_bytes: usize) -> Self {
        Self { max_bytes, received: BytesMut::new() }
    }

    /// Takes the next bytes of the response. Once the head is complete, returns it with the first bytes of the body.
    ///
    /// # Errors
    /// Returns [`ResponseHeadError`] if the head is invalid. The parser must not be used any more.
    pub(crate) fn feed(&mut self, chunk: Bytes) -> Result<Option<(ResponseHead, Bytes)>, ResponseHeadError> {
        let scanned = self.received.len();
        if scanned > 0 {
            self.received.extend_from_slice(&chunk);
        }
        let bytes: &[u8] = if scanned == 0 { &chunk } else { &self.received };
        match end_of_head(bytes, scanned) {
            Some(end) if end <= self.max_bytes => {
                let mut body = if scanned == 0 { chunk } else { std::mem::take(&mut self.received).freeze() };
                let head = body.split_to(end);
                Ok(Some((parse(&head)?, body)))
            }
            None if bytes.len() < self.max_bytes => {
                if scanned == 0 {
                    self.received.extend_from_slice(&chunk);
                }
                Ok(None)
            }
            Some(_) | None => Err(ResponseHeadError::TooLong { max_bytes: self.max_bytes }),
        }
    }

    /// Returns the error for a response that ends before its head does.
    pub(crate) fn finish(&self) -> ResponseHeadError {
        if self.received.is_empty() { ResponseHeadError::Empty } else { ResponseHeadError::Truncated }
    }
}

/// Returns the position after the first empty line. The first `scanned` bytes contain no empty line.
fn end_of_head(bytes: &[u8], scanned: usize) -> Option<usize> {
    let mut from = scanned;
    while let Some(at) = bytes.get(from..)?.iter().position(|&byte| byte == b'\n') {
        let end = from + at;
        match bytes.get(..end)? {
            [] | b"\r" | [.., b'\n'] | [.., b'\n', b'\r'] => return Some(end + 1),
            _ => from = end + 1,
        }
    }
    None
}

/// Parses a head that ends with its first empty line.
fn parse(head: &Bytes) -> Result<ResponseHead, ResponseHeadError> {
    let (mut headers, mut status) = (HeaderMap::with_capacity(8), None);
    let lines = head.split(|&byte| byte == b'\n').map(|line| line.strip_suffix(b"\r").unwrap_or(line));
    for (index, text) in lines.take_while(|line| !line.is_empty()).enumerate() {
        let line = index + 1;
        if let Some(rest) = text.strip_prefix(b"HTTP/").filter(|_| line == 1) {
            let after_version = rest.iter().position(|&byte| byte == b' ').and_then(|at| rest.get(at..));
            take_status(&mut status, after_version.unwrap_or_default())?;
            continue;
        }
        if let [b' ' | b'\t', ..] = text {
            return Err(ResponseHeadError::Folded { line });
        }
        let (name, value) = split_header(text).ok_or(ResponseHeadError::NotAHeader { line })?;
        if name.eq_ignore_ascii_case(b"status") {
            take_status(&mut status, value)?;
            continue;
        }
        let name = HeaderName::from_bytes(name).map_err(|_| ResponseHeadError::NotAHeader { line })?;
        let value = HeaderValue::from_maybe_shared(head.slice_ref(value));
        let value = value.map_err(|_| ResponseHeadError::Value { line })?;
        headers.try_append(name, value).map_err(|_| ResponseHeadError::TooManyHeaders)?;
    }
    if headers.is_empty() && status.is_none() {
        return Err(ResponseHeadError::NoHeaders);
    }
    if headers.keys_len() > MAX_NAMES {
        return Err(ResponseHeadError::TooManyHeaders);
    }
    remove_hop_by_hop(&mut headers);
    let content_length = reduce_length(&mut headers)?;
    let inferred = if headers.contains_key(header::LOCATION) { StatusCode::FOUND } else { StatusCode::OK };
    let status = status.unwrap_or(inferred);
    if status.is_informational() {
        return Err(ResponseHeadError::Informational(status));
    }
    Ok(ResponseHead { status, headers, content_length })
}

fn split_header(line: &[u8]) -> Option<(&[u8], &[u8])> {
    let (name, value) = line.split_at_checked(line.iter().position(|&byte| byte == b':')?)?;
    Some((name, trim(value.get(1..)?)))
}

/// Removes spaces and tabs at both ends, and nothing else: any other control character makes a value invalid.
fn trim(mut value: &[u8]) -> &[u8] {
    while let [b' ' | b'\t', rest @ ..] | [rest @ .., b' ' | b'\t'] = value {
        value = rest;
    }
    value
}

/// Takes a status: three digits, optionally followed by a space and the reason, which is ignored.
fn take_status(status: &mut Option<StatusCode>, value: &[u8]) -> Result<(), ResponseHeadError> {
    let Some((digits, [] | [b' ' | b'\t', ..])) = trim(value).split_first_chunk::<3>() else {
        return Err(ResponseHeadError::Status);
    };
    let code = StatusCode::from_bytes(digits).map_err(|_| ResponseHeadError::Status)?;
    if status.replace(code).is_some_and(|other| other != code) {
        return Err(ResponseHeadError::Status);
    }
    Ok(())
}

/// Removes the headers that concern one connection, and those that `Connection` names (RFC 9110, section 7.6.1).
fn remove_hop_by_hop(headers: &mut HeaderMap) {
    let options = elements(headers, header::CONNECTION).filter_map(|option| HeaderName::from_bytes(option).ok());
    let fixed = headers.keys().filter(|name| is_of_one_connection(name)).cloned();
    for name in options.chain(fixed).collect::<Vec<_>>() {
        headers.remove(name);
    }
}

/// Returns the length of the body, and leaves it in the headers only once. A value may be a list whose elements are the
/// same (RFC 9110, section 8.6).
fn reduce_length(headers: &mut HeaderMap) -> Result<Option<u64>, ResponseHeadError> {
    let mut length = None;
    for value in headers.get_all(header::CONTENT_LENGTH) {
        for element in value.as_bytes().split(|&byte| byte == b',') {
            let element = parse_digits(trim(element)).ok_or(ResponseHeadError::Length)?;
            if length.replace(element).is_some_and(|other| other != element) {
                return Err(ResponseHeadError::Length);
            }
        }
    }
    if let Some(length) = length {
        headers.insert(header::CONTENT_LENGTH, length.into());
    }
    Ok(length)
}

#[cfg(test)]
mod tests {
    use super::super::response_head;
    use super::*;

    const MAX: usize = 1024;

    type Outcome = Result<(ResponseHead, Vec<u8>), ResponseHeadError>;

    fn feed(bytes: &[u8], max: usize, mut piece: impl FnMut() -> usize) -> Outcome {
        let (mut parser, mut rest) = (ResponseHeadParser::new(max), bytes);
        while !rest.is_empty() {
            let (now, later) = rest.split_at(piece().clamp(1, rest.len()));
            rest = later;
            if let Some((head, body)) = parser.feed(Bytes::copy_from_slice(now))? {
                return Ok((head, [&body[..], rest].concat()));
            }
        }
        Err(parser.finish())
    }

    /// Returns the result for `bytes`, which must not depend on how they are split.
    fn outcome(bytes: &[u8], max: usize) -> Outcome {
        let expected = feed(bytes, max, || usize::MAX);
        assert_eq!(feed(bytes, max, || 1), expected, "in single bytes");
        for at in 1..bytes.len().min(100) {
            let mut first = true;
            let cut = || if std::mem::take(&mut first) { at } else { usize::MAX };
            assert_eq!(feed(bytes, max, cut), expected, "cut at {at}");
        }
        for seed in 0..20 {
            let mut random = fastrand::Rng::with_seed(seed);
            assert_eq!(feed(bytes, max, || random.usize(1..20)), expected, "seed {seed}");
        }
        expected
    }

    fn head(text: &str) -> Result<ResponseHead, ResponseHeadError> {
        let (head, body) = outcome(&[text.as_bytes(), b"\nbody\n\n"].concat(), MAX)?;
        assert_eq!(body, b"body\n\n");
        Ok(head)
    }

    fn status(text: &str) -> Result<u16, ResponseHeadError> {
        head(text).map(|head| head.status.as_u16())
    }

    #[test]
    fn what_php_writes_is_a_response() {
        let text = "X-Powered-By: PHP/8.2\r\nStatus: 404 Not Found\r\nSet-Cookie: a=1\r\nset-cookie: b=2\r\n\
                    Content-type: text/html; charset=UTF-8\r\ncontent-LENGTH:7\r\nX-Empty:\r\n\r";
        let ResponseHead { status, headers, content_length } = head(text).unwrap();
        assert_eq!((status, content_length), (StatusCode::NOT_FOUND, Some(7)));
        assert_eq!(headers.get_all("set-cookie").iter().collect::<Vec<_>>(), ["a=1", "b=2"]);
        assert_eq!(headers["content-type"], "text/html; charset=UTF-8");
        assert_eq!(headers["x-empty"], "");
        assert_eq!((headers.len(), headers.contains_key("status")), (6, false));
    }

    #[test]
    fn lines_end_with_lf_or_crlf() {
        for text in ["A: 1\nB: 2\n", "A: 1\r\nB: 2\r\n\r", "A: 1\nB: 2\r\n", "A:\t1 \t\r\nB:2\n\r"] {
            let headers = head(text).unwrap().headers;
            let expected = [("a", "1"), ("b", "2")].map(|(name, value)| (HeaderName::from_static(name), value));
            assert_eq!(headers.len(), 2, "{text:?}");
            assert!(expected.iter().all(|(name, value)| headers[name] == *value), "{text:?}");
        }
    }

    #[test]
    fn the_status_is_named_or_inferred() {
        for (text, expected) in [
            ("Status: 404\n", 404),
            ("STATUS:404 Not Found\n", 404),
            ("status: 599\t\n", 599),
            ("A: b\n", 200),
            ("Location: /path\n", 302),
            ("Location: http://host/\nA: b\n", 302),
            ("Location: /\nStatus: 201 Created\n", 201),
            ("Status: 200\nLocation: /\n", 200),
            ("HTTP/1.1 200 OK\nA: b\n", 200),
            ("HTTP/1.0 404\r\n", 404),
            ("HTTP/2 503 Unavailable\nLocation: /\n", 503),
            ("HTTP/1.1 404 Not Found\nStatus: 404\n", 404),
        ] {
            assert_eq!(status(text), Ok(expected), "{text:?}");
        }
        for text in [
            "Status: \n",
            "Status: 20\n",
            "Status: 2000\n",
            "Status: OK\n",
            "Status: 200OK\n",
            "Status: 099\n",
            "Status: +20\n",
            "Status: 200\nStatus: 404\n",
            "HTTP/1.1 200 OK\nStatus: 404\n",
            "HTTP/1.1\n",
            "HTTP/1.1 OK\n",
            "HTTP/1.1 \n",
        ] {
            assert_eq!(status(text), Err(ResponseHeadError::Status), "{text:?}");
        }
        for (text, code) in [("Status: 103 Early Hints\nLink: </a>\n", 103), ("HTTP/1.1 100 Continue\n", 100)] {
            let code = StatusCode::from_u16(code).unwrap();
            assert_eq!(status(text), Err(ResponseHeadError::Informational(code)), "{text:?}");
        }
    }

    #[test]
    fn an_invalid_line_is_named() {
        use ResponseHeadError::{Folded, NoHeaders, NotAHeader, Value};
        for (text, error) in [
            ("A: b\nhello\n", NotAHeader { line: 2 }),
            ("<b>Warning</b>: x\n", NotAHeader { line: 1 }),
            (": b\n", NotAHeader { line: 1 }),
            ("A : b\n", NotAHeader { line: 1 }),
            ("A: b\nHTTP/1.1 200 OK\n", NotAHeader { line: 2 }),
            ("A: b\r\r\n", Value { line: 1 }),
            ("A: b\rc\n", Value { line: 1 }),
            ("A: b\0c\n", Value { line: 1 }),
            ("A: b\x7f\n", Value { line: 1 }),
            ("A: b\n c\n", Folded { line: 2 }),
            ("A: b\n\tc: d\n", Folded { line: 2 }),
            (" A: b\n", Folded { line: 1 }),
            ("", NoHeaders),
            ("\r", NoHeaders),
        ] {
            assert_eq!(outcome(&[text.as_bytes(), b"\nbody"].concat(), MAX).map(drop), Err(error), "{text:?}");
        }
        let (head, _) = outcome(b"A: caf\xe9\tx\n\n", MAX).unwrap();
        assert_eq!(head.headers["a"].as_bytes(), b"caf\xe9\tx");
    }

    #[test]
    fn headers_of_one_connection_are_removed() {
        let text = "Connection: close, X-Mine\nX-Mine: 1\nKeep-Alive: 5\nTransfer-Encoding: chunked\nUpgrade: h2c\n\
                    TE: x\nTrailer: y\nProxy-Connection: z\nConnection: x-second, b@d\nX-Second: 2\nX-Mine: 3\nA: b\n";
        let headers = head(text).unwrap().headers;
        assert_eq!(headers, HeaderMap::from_iter([(HeaderName::from_static("a"), HeaderValue::from_static("b"))]));
    }

    #[test]
    fn the_length_is_one_number() {
        for (text, expected) in [("5\n", 5), ("5\nContent-Length: 05\n", 5), ("5, 5\n", 5), ("0\n", 0)] {
            let head = head(&format!("Content-Length: {text}")).unwrap();
            assert_eq!(head.content_length, Some(expected), "{text:?}");
            let values: Vec<_> = head.headers.get_all("content-length").iter().collect();
            assert_eq!(values, [&expected.to_string()], "{text:?}");
        }
        for text in ["", "x", "-1", "+5", "5 6", "5,", "5, 6", "5\nContent-Length: 6", "18446744073709551616", "0x5"] {
            let head = head(&format!("Content-Length: {text}\n"));
            assert_eq!(head, Err(ResponseHeadError::Length), "{text:?}");
        }
    }

    #[test]
    fn a_head_has_a_limit_and_an_end() {
        let text = b"A: b\r\nC: d\r\n\r\nbody";
        let length = text.len() - 4;
        for max in 0..length {
            assert_eq!(outcome(text, max), Err(ResponseHeadError::TooLong { max_bytes: max }), "{max}");
        }
        assert_eq!(outcome(text, length).map(|(_, body)| body), Ok(b"body".to_vec()));
        assert_eq!(outcome(b"", MAX), Err(ResponseHeadError::Empty));
        for end in 1..length {
            assert_eq!(outcome(&text[..end], MAX), Err(ResponseHeadError::Truncated), "{end}");
        }
        let message = |max_bytes| ResponseHeadError::TooLong { max_bytes }.to_string();
        assert_eq!(message(65_536), "the response has no empty line after its headers within 64K");
        assert_eq!(message(1_000), "the response has no empty line after its headers within 1000 bytes");
    }

    #[test]
    fn a_map_of_headers_is_never_so_full_that_none_can_be_inserted() {
        for (count, fits) in [(MAX_NAMES, true), (MAX_NAMES + 1, false), (40_000, false)] {
            let text: String = (0..count).map(|number| format!("x{number}:\n")).chain(["\n".to_owned()]).collect();
            let parsed = feed(text.as_bytes(), usize::MAX, || usize::MAX).map(|(head, _)| head.headers.len());
            assert_eq!(parsed, if fits { Ok(count) } else { Err(ResponseHeadError::TooManyHeaders) });
        }
    }

    #[test]
    fn a_head_that_response_head_writes_is_parsed_again() {
        for seed in 0..300 {
            let mut random = fastrand::Rng::with_seed(seed);
            let code = StatusCode::from_u16(random.u16(200..600)).unwrap();
            let mut headers = HeaderMap::new();
            for _ in 0..random.usize(0..12) {
                let name = ["location", "set-cookie", "content-type", "x-a", "x-b", "vary"][random.usize(0..6)];
                let value: Vec<u8> = (0..random.usize(0..20)).map(|_| random.u8(b'!'..=0xff)).collect();
                let value = HeaderValue::from_bytes(&value).unwrap_or(HeaderValue::from_static(""));
                if name != "location" || !headers.contains_key(name) {
                    headers.append(name, value);
                }
            }
            let length = random.bool().then(|| random.u64(..));
            let mut out = BytesMut::new();
            response_head(&mut out, code, &headers, length);
            out.extend_from_slice(b"\r\n\nbody");
            if let Some(length) = length {
                headers.insert(header::CONTENT_LENGTH, length.into());
            }
            let (parsed, body) = outcome(&out, 4096).unwrap();
            assert_eq!(parsed, ResponseHead { status: code, headers, content_length: length }, "seed {seed}");
            assert_eq!(body, b"\r\n\nbody");
        }
    }

    #[test]
    fn any_bytes_give_the_same_result_however_they_are_split() {
        let tokens =
            ["A: b\n", "Status: 200", "Content-Length: 5", ",", " ", "HTTP/1.1 ", "\0", "x", "\r", "\n", "\r\n"];
        let mut heads = 0;
        for seed in 0..2000 {
            let mut random = fastrand::Rng::with_seed(seed);
            let text: String = (0..random.usize(0..30)).map(|_| tokens[random.usize(0..tokens.len())]).collect();
            let whole = feed(text.as_bytes(), 40, || usize::MAX);
            assert_eq!(feed(text.as_bytes(), 40, || random.usize(1..4)), whole, "seed {seed}: {text:?}");
            heads += usize::from(whole.is_ok());
        }
        assert!(heads > 20, "{heads}");
    }
}
