//! Checks CGI variables as requests, and response heads in CGI form.

use bytes::{Bytes, BytesMut};
use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::{Request, StatusCode};

use super::Dice;
use crate::protocol::cgi::{self, ClientInfo};
use crate::protocol::params::Params;

/// Reads the bytes as variables (strings that each end in a NUL), and creates a request from them.
///
/// # Panics
/// Panics if the request has a header that a client must not set, an invalid header, or a different path
/// or length than the variables.
pub fn cgi_request(data: &[u8]) {
    // With one or two NULs appended, any sequence of bytes consists of pairs.
    let mut raw = Vec::with_capacity(data.len() + 2);
    raw.extend_from_slice(data);
    raw.push(0);
    if raw.iter().filter(|&&byte| byte == 0).count() % 2 == 1 {
        raw.push(0);
    }
    let Some(params) = Params::from_strings(Bytes::from(raw)) else { panic!("an even number of strings is refused") };
    let said = params.clone();
    let Ok(request) = cgi::request(params, |length| length) else { return };

    let headers = request.headers();
    let length = headers.get_all(header::CONTENT_LENGTH).iter().map(HeaderValue::as_bytes);
    let expected = announced(&said).map(|length| length.to_string());
    assert_eq!(*request.body(), announced(&said));
    assert!(length.eq(expected.iter().map(String::as_bytes)), "one length at most: that of the body");
    assert!(!headers.contains_key("proxy") && !headers.contains_key(header::TRANSFER_ENCODING));
    for (name, value) in headers {
        assert!(is_field(value.as_bytes()), "{name}: {value:?}");
    }
    assert!(said.iter().eq(request.extensions().get::<ClientInfo>().iter().flat_map(|origin| origin.params.iter())));
    assert_eq!(said.get("REQUEST_METHOD"), Some(request.method().as_str().as_bytes()));
    check_headers(&said, headers);
    check_uri(&said, &request);
}

/// Returns the length of the body: the last CONTENT_LENGTH that is a number or empty.
fn announced(said: &Params) -> Option<u64> {
    let values = said.iter().filter(|(name, _)| *name == b"CONTENT_LENGTH").map(|(_, value)| value);
    let last = values.filter(|value| value.iter().all(u8::is_ascii_digit)).last()?;
    std::str::from_utf8(last).ok()?.parse().ok()
}

/// Checks that each header comes from a variable, with the value of that variable.
fn check_headers(said: &Params, headers: &HeaderMap) {
    let is = |variable: &[u8], name: &[u8]| {
        let dashed = |byte: u8| if byte == b'_' { b'-' } else { byte.to_ascii_lowercase() };
        variable.iter().map(|&byte| dashed(byte)).eq(name.iter().copied())
    };
    for (name, value) in headers.iter().filter(|(name, _)| *name != header::CONTENT_LENGTH) {
        let name = name.as_str().as_bytes();
        let mut variables = said.iter().filter(|(_, other)| *other == value.as_bytes());
        assert!(
            variables.any(|(variable, _)| match variable.strip_prefix(b"HTTP_") {
                Some(variable) => is(variable, name),
                None => variable == b"CONTENT_TYPE" && name == b"content-type",
            }),
            "nobody said {value:?}"
        );
    }
}

/// Checks that the URI is REQUEST_URI or, if that is missing, contains the path from the other variables.
fn check_uri(said: &Params, request: &Request<Option<u64>>) {
    let uri = request.uri().to_string();
    assert!(uri.bytes().all(|byte| byte > b' ' && byte != 0x7f), "{uri:?}");
    let of = |name| said.get(name).unwrap_or_default();
    match of("REQUEST_URI") {
        b"" => {
            let path = [of("SCRIPT_NAME"), of("PATH_INFO")].concat();
            let slash: &[u8] = if path.starts_with(b"/") { b"" } else { b"/" };
            assert_eq!(decoded(request.uri().path().as_bytes()), [slash, &path].concat());
        }
        // An absolute URI may be written differently; a fragment is not sent to a server.
        original if original.starts_with(b"/") && !original.contains(&b'#') => {
            assert_eq!(decoded(uri.as_bytes()), decoded(original));
        }
        _ => {}
    }
}

/// Decodes valid percent-encoding.
fn decoded(mut text: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(text.len());
    let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
    while let Some((&byte, rest)) = text.split_first() {
        let encoded = match *rest {
            [high, low, ..] if byte == b'%' => digit(high).zip(digit(low)),
            _ => None,
        };
        plain.push(encoded.map_or(byte, |(high, low)| high << 4 | low));
        text = if encoded.is_some() { &rest[2..] } else { rest };
    }
    plain
}

/// Whether these bytes can be a header's value (RFC 9110, section 5.5).
fn is_field(value: &[u8]) -> bool {
    value.iter().all(|&byte| byte == b'\t' || byte >= b' ' && byte != 0x7f)
}

/// Headers that a web server handles in a special way, or that are left out.
const SPECIAL: [&str; 17] = [
    "status",
    "location",
    "content-length",
    "content-type",
    "connection",
    "transfer-encoding",
    "upgrade",
    "keep-alive",
    "proxy-connection",
    "te",
    "trailer",
    "set-cookie",
    "variable-user",
    "variable-",
    "x-sendfile",
    "variable-status",
    "x-status",
];

/// Writes the head of a response chosen by the bytes, and reads it like a web server.
///
/// # Panics
/// Panics if a line is broken, if there is not exactly one status, or if the headers differ from the
/// input.
pub fn cgi_response(data: &[u8]) {
    let mut dice = Dice(data);
    let Ok(status) = StatusCode::from_u16(100 + u16::from(dice.byte()) * 7 / 2) else { return };
    let length = dice.coin(2).then(|| u64::from(dice.byte()) << (dice.byte() % 57));
    let mut headers = HeaderMap::new();
    while !dice.is_empty() {
        let name = match dice.below(SPECIAL.len() * 2) {
            special if special < SPECIAL.len() => Ok(HeaderName::from_static(SPECIAL[special])),
            _ => HeaderName::from_bytes(dice.bytes()),
        };
        let value = HeaderValue::from_bytes(dice.bytes());
        if let (Ok(name), Ok(value)) = (name, value) {
            headers.append(name, value);
        }
    }
    let mut out = BytesMut::from(&b"before"[..]);
    cgi::response_head(&mut out, status, &headers, length);
    let Some(head) = out.strip_prefix(b"before") else { panic!("what was there is gone") };

    let mut rest = head;
    let location = headers.get(header::LOCATION);
    if let Some(location) = location {
        assert_eq!(line(&mut rest), Some((&b"location"[..], location.as_bytes())), "it stands before the status");
    }
    let Some((name, value)) = line(&mut rest) else { panic!("no line at all") };
    let (code, reason) = value.split_at(3);
    assert!(name == b"Status" && code == status.as_str().as_bytes() && reason.len() > 1 && reason[0] == b' ');
    let of_no_body = |name: &HeaderName| status == StatusCode::NO_CONTENT && *name == header::CONTENT_LENGTH;
    let kept = |name: &HeaderName| {
        !["status", "location"].contains(&name.as_str()) && !is_of_connection(name, &headers) && !of_no_body(name)
    };
    for (name, value) in headers.iter().filter(|(name, _)| kept(name)) {
        let read = line(&mut rest);
        assert!(
            read.is_some_and(|(other, bytes)| other.eq_ignore_ascii_case(name.as_ref()) && bytes == value.as_bytes()),
            "{name}: {value:?} became {read:?}"
        );
        if name.as_str().starts_with("variable-") {
            let is_variable = |(other, _): (&[u8], _)| !other["variable-".len()..].iter().any(u8::is_ascii_lowercase);
            assert!(read.is_some_and(is_variable), "a variable is written in capitals");
        }
    }
    if let Some(length) = length.filter(|_| !headers.contains_key(header::CONTENT_LENGTH)) {
        assert_eq!(line(&mut rest), Some((&b"content-length"[..], length.to_string().as_bytes())));
    }
    assert_eq!(rest, b"\r\n", "an empty line, and no more");
}

/// Whether a header concerns a single connection: by its definition, or a Connection header names it
/// (RFC 9110, section 7.6.1).
fn is_of_connection(name: &HeaderName, headers: &HeaderMap) -> bool {
    const KNOWN: [&str; 7] =
        ["connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade"];
    let named = || {
        let mut options =
            headers.get_all(header::CONNECTION).iter().flat_map(|value| value.as_bytes().split(|&b| b == b','));
        options.any(|option| option.trim_ascii().eq_ignore_ascii_case(name.as_str().as_bytes()))
    };
    KNOWN.contains(&name.as_str()) || named()
}

/// Takes a line from a head. Returns the name and the value, or `None` at the empty line.
fn line<'a>(rest: &mut &'a [u8]) -> Option<(&'a [u8], &'a [u8])> {
    let Some(end) = rest.iter().position(|&byte| byte == b'\n') else { panic!("no line ends in {rest:?}") };
    let (line, after) = rest.split_at(end + 1);
    let line = line.strip_suffix(b"\r\n").unwrap_or(line);
    if line.is_empty() {
        return None;
    }
    *rest = after;
    let Some(colon) = line.iter().position(|&byte| byte == b':') else { panic!("no header in {line:?}") };
    let (name, value) = line.split_at(colon);
    let is_token = |byte: &u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(byte);
    assert!(!name.is_empty() && name.iter().all(is_token), "no name: {name:?}");
    let Some(value) = value.strip_prefix(b": ") else { panic!("no space in {line:?}") };
    assert!(is_field(value), "no value: {value:?}");
    Some((name, value))
}
