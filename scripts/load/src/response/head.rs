//! Collects and parses the header block of a CGI or HTTP response.

use httparse::{EMPTY_HEADER, Header, Status};

use super::{Malformed, take};

/// Maximum length of a head, chunk line or trailer.
const LIMIT: usize = 32 * 1024;

/// Maximum number of header lines in one head.
pub(super) const MAX_HEADERS: usize = 100;

/// Collects bytes that can be parsed only when they are complete.
#[derive(Debug, Default)]
pub(super) struct Collector(Vec<u8>);

impl Collector {
    /// Takes bytes from the front of `bytes` until `parse` succeeds. `parse` returns the number of bytes that it has parsed. If
    /// these bytes arrive together, they are not copied.
    pub(super) fn collect<T>(
        &mut self,
        bytes: &mut &[u8],
        parse: impl Fn(&[u8]) -> Result<Status<(usize, T)>, Malformed>,
    ) -> Result<Option<T>, Malformed> {
        let known = self.0.len();
        let parsed = if known == 0 {
            parse(bytes)?
        } else {
            self.0.extend_from_slice(&bytes[..bytes.len().min(LIMIT + 1 - known)]);
            parse(&self.0)?
        };
        match parsed {
            Status::Complete((used, value)) if used <= LIMIT => {
                take(bytes, used - known);
                self.0.clear();
                Ok(Some(value))
            }
            Status::Partial if known + bytes.len() <= LIMIT => {
                if known == 0 {
                    self.0.extend_from_slice(bytes);
                }
                *bytes = &[];
                Ok(None)
            }
            Status::Complete(_) | Status::Partial => Err(Malformed::new(format!("a head of more than {LIMIT} bytes"))),
        }
    }

    pub(super) fn clear(&mut self) {
        self.0.clear();
    }
}

/// The header of a CGI response.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct CgiHead {
    pub(super) status: u16,
    pub(super) length: Option<u64>,
}

pub(super) fn parse_cgi(bytes: &[u8]) -> Result<Status<(usize, CgiHead)>, Malformed> {
    let mut lines = [EMPTY_HEADER; MAX_HEADERS];
    let parsed =
        httparse::parse_headers(bytes, &mut lines).map_err(|error| Malformed::new(format!("CGI header: {error}")))?;
    let Status::Complete((used, lines)) = parsed else {
        return Ok(Status::Partial);
    };
    let status = match value(lines, "Status") {
        Some(text) => parse_status(text)?,
        None if value(lines, "Location").is_some() => 302,
        None if value(lines, "Content-Type").is_some() => 200,
        None => {
            return Err(Malformed::new("a CGI header without Status, Content-Type and Location"));
        }
    };
    let length = content_length(lines)?;
    Ok(Status::Complete((used, CgiHead { status, length })))
}

/// Returns the value of the first header with this name.
pub(super) fn value<'a>(lines: &[Header<'a>], name: &str) -> Option<&'a [u8]> {
    lines.iter().find(|line| line.name.eq_ignore_ascii_case(name)).map(|line| line.value)
}

/// Returns whether `token` occurs in the comma-separated list that all headers with this name form.
pub(super) fn has_token(lines: &[Header<'_>], name: &str, token: &str) -> bool {
    lines
        .iter()
        .filter(|line| line.name.eq_ignore_ascii_case(name))
        .flat_map(|line| line.value.split(|&byte| byte == b','))
        .any(|item| item.trim_ascii().eq_ignore_ascii_case(token.as_bytes()))
}

/// Returns `Content-Length`, which may be repeated only with the same value.
pub(super) fn content_length(lines: &[Header<'_>]) -> Result<Option<u64>, Malformed> {
    let mut found = None;
    for line in lines.iter().filter(|line| line.name.eq_ignore_ascii_case("Content-Length")) {
        let length = digits(line.value).ok_or_else(|| Malformed::new("Content-Length is not a number"))?;
        if found.is_some_and(|other| other != length) {
            return Err(Malformed::new("two different Content-Lengths"));
        }
        found = Some(length);
    }
    Ok(found)
}

/// Parses a status such as `200 OK` or `200`.
fn parse_status(text: &[u8]) -> Result<u16, Malformed> {
    let code = text.split(|&byte| byte == b' ').next().unwrap_or_default();
    digits(code)
        .and_then(|number| u16::try_from(number).ok())
        .filter(|status| (100..1000).contains(status))
        .ok_or_else(|| Malformed::new("Status is not a number of three digits"))
}

/// Parses a number that consists of digits only, without a sign or a space.
fn digits(text: &[u8]) -> Option<u64> {
    let text = std::str::from_utf8(text).ok()?;
    if !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    text.parse().ok()
}
