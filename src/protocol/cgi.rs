//! Converts between CGI variables (RFC 3875) and `http`. The server's half parses a request's head from parameters and
//! writes a response's head in CGI form. The gateway's half writes a request's variables ([`variables`]) and parses a
//! response's head ([`parse_response`]).
//!
//! Section numbers refer to RFC 3875. FastCGI, SCGI and CGI use both halves. The web server in front implements
//! HTTP, and this module does not undo the web server's decisions: `REQUEST_URI` is used as received, and no variable
//! is trusted beyond its meaning in CGI.

pub(crate) mod parse_response;
mod response;
pub(crate) mod variables;

use std::fmt;
use std::net::{IpAddr, SocketAddr};

use bytes::{BufMut as _, Bytes, BytesMut};
use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::uri::PathAndQuery;
use http::{Method, Request, StatusCode, Uri, Version};

pub(crate) use self::response::{has_no_body, is_of_one_connection, response_head};
use super::grammar::parse_digits;
use super::host::is_host;
use super::params::Params;

/// The client that a request came from: an extension of each request.
///
/// Over HTTP, this value describes the peer of the connection. Over FastCGI, SCGI and CGI, it contains what the web
/// server reports (`REMOTE_ADDR`, `REMOTE_PORT`, `HTTPS`, `REQUEST_SCHEME`). If the address of that client is in
/// `--trust`, the client is a proxy, and the value contains what this proxy reports about its own client. The host that
/// the client asked for is always in the request's `Host` header.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ClientInfo {
    /// The client's address. `None` if the client is on a Unix socket, or if the web server does not report an address.
    /// The port is 0 if only the address is known.
    pub address: Option<SocketAddr>,
    /// Whether the client used HTTPS, as far as is known.
    pub is_https: bool,
    /// The CGI variables of the request, as sent by the web server; empty over HTTP.
    pub params: Params,
    /// Whether the address is missing because the client is on a Unix socket, on this machine or on the load balancer's
    /// machine.
    pub(crate) over_unix: bool,
}

impl ClientInfo {
    /// Describes the client of a request without CGI variables. Without an address, the client is on a Unix socket.
    pub(crate) fn of_http(address: Option<SocketAddr>, is_https: bool) -> Self {
        Self { address, is_https, params: Params::default(), over_unix: address.is_none() }
    }
}

/// Why the head of a request is invalid. The web server or another peer is at fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CgiError {
    Method,
    Connect,
    Uri,
    Header,
    Host,
    Variable,
    Length,
}

impl CgiError {
    /// Returns the status of the response.
    pub(crate) fn status(self) -> StatusCode {
        match self {
            Self::Connect => StatusCode::NOT_IMPLEMENTED,
            Self::Method | Self::Uri | Self::Header | Self::Host | Self::Variable | Self::Length => {
                StatusCode::BAD_REQUEST
            }
        }
    }
}

impl fmt::Display for CgiError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Method => "REQUEST_METHOD is missing or invalid",
            Self::Connect => "CONNECT, which only proxies support",
            Self::Uri => "REQUEST_URI, or SCRIPT_NAME with PATH_INFO, is not a valid URI",
            Self::Header => "a header has an invalid value, or there are too many headers",
            Self::Host => "HTTP_HOST is not a valid host, or occurs more than once",
            Self::Variable => "a CGI variable contains a CR, LF or NUL",
            Self::Length => "CONTENT_LENGTH is not a number, is too large, or occurs twice with different values",
        })
    }
}

impl std::error::Error for CgiError {}

/// Maximum number of header names in a request. A `HeaderMap` has space for one and a half times as many, so this
/// server and the application can insert further headers. Inserting into a full map panics.
const MAX_NAMES: usize = 16_384;

/// The CGI variables of a request that this module needs, collected in one pass.
#[derive(Default)]
struct Variables<'a> {
    method: &'a [u8],
    request_uri: &'a [u8],
    script_name: &'a [u8],
    path_info: &'a [u8],
    query: &'a [u8],
    address: Option<IpAddr>,
    port: u16,
    is_https: bool,
    version: Version,
    length: Option<u64>,
}

/// Creates a request from `params`, which become one of its extensions. `body` creates the request's body from the
/// announced length, if any.
///
/// # Errors
/// Returns [`CgiError`] if the method, the URI or a header is missing or invalid, or if two lengths differ.
pub(crate) fn request<B>(params: Params, body: impl FnOnce(Option<u64>) -> B) -> Result<Request<B>, CgiError> {
    let mut variables = Variables::default();
    let mut headers = HeaderMap::with_capacity(12);
    let mut has_host = false;
    for (name, value) in params.iter() {
        let name = match name.strip_prefix(b"HTTP_") {
            Some(name) => header_name(name),
            None => variables.take(name, value)?.then_some(header::CONTENT_TYPE),
        };
        if let Some(name) = name {
            if name == header::HOST && (std::mem::replace(&mut has_host, true) || !is_host(value)) {
                return Err(CgiError::Host);
            }
            let value = HeaderValue::from_maybe_shared(params.share(value)).map_err(|_| CgiError::Header)?;
            headers.try_append(name, value).map_err(|_| CgiError::Header)?;
        }
    }
    if headers.keys_len() > MAX_NAMES {
        return Err(CgiError::Header);
    }
    let method = Method::from_bytes(variables.method).map_err(|_| CgiError::Method)?;
    if method == Method::CONNECT {
        return Err(CgiError::Connect);
    }
    let uri = match variables.request_uri {
        b"" => rebuilt_uri(variables.script_name, variables.path_info, variables.query)?,
        uri => request_uri(params.share(uri))?,
    };
    let address = variables.address.map(|address| SocketAddr::new(address, variables.port));
    if let Some(length) = variables.length {
        headers.insert(header::CONTENT_LENGTH, length.into());
    }
    let mut request = Request::new(body(variables.length));
    *request.method_mut() = method;
    *request.uri_mut() = uri;
    *request.version_mut() = variables.version;
    *request.headers_mut() = headers;
    let is_https = variables.is_https;
    request.extensions_mut().insert(ClientInfo { address, is_https, params, over_unix: false });
    Ok(request)
}

impl<'a> Variables<'a> {
    /// Takes a variable without an `HTTP_` prefix. Returns true for `CONTENT_TYPE`, which is a header of the client
    /// even without the prefix.
    #[inline]
    fn take(&mut self, name: &[u8], value: &'a [u8]) -> Result<bool, CgiError> {
        if has_control(value) && !may_have_control(name, value) {
            return Err(CgiError::Variable);
        }
        // The first letter is matched first, because most variables are none of these.
        match name.first() {
            Some(b'R') => match name {
                b"REQUEST_METHOD" => self.method = value,
                b"REQUEST_URI" => self.request_uri = value,
                b"REQUEST_SCHEME" => self.is_https |= value.eq_ignore_ascii_case(b"https"),
                b"REMOTE_ADDR" => self.address = parse_address(value),
                b"REMOTE_PORT" => self.port = parse_digits(value).and_then(|port| port.try_into().ok()).unwrap_or(0),
                _ => {}
            },
            Some(b'C') => match name {
                b"CONTENT_LENGTH" => self.length(value)?,
                b"CONTENT_TYPE" => return Ok(!value.is_empty()),
                _ => {}
            },
            Some(b'S') => match name {
                b"SCRIPT_NAME" => self.script_name = value,
                b"SERVER_PROTOCOL" => self.version = version(value),
                _ => {}
            },
            Some(b'P') if name == b"PATH_INFO" => self.path_info = value,
            Some(b'Q') if name == b"QUERY_STRING" => self.query = value,
            // All web servers use HTTPS; REQUEST_SCHEME is specific to nginx. If the client uses plain HTTP, the web
            // server omits HTTPS or sets it to a value such as `off`.
            Some(b'H') if name == b"HTTPS" => self.is_https |= value.eq_ignore_ascii_case(b"on") || value == b"1",
            _ => {}
        }
        Ok(false)
    }

    /// Takes a CONTENT_LENGTH. Web servers send an empty value if there is no body (4.1.2). An empty value cancels an
    /// earlier one, so that an nginx configuration can override an included configuration. `-1` is ignored: lighttpd
    /// sends it if the length of the body is unknown and the body ends with the stream. Any other value that does not
    /// consist of digits is rejected, and so are two different lengths.
    fn length(&mut self, value: &[u8]) -> Result<(), CgiError> {
        match value {
            b"" => self.length = None,
            b"-1" => {}
            digits => {
                let length = parse_digits(digits).ok_or(CgiError::Length)?;
                if self.length.replace(length).is_some_and(|other| other != length) {
                    return Err(CgiError::Length);
                }
            }
        }
        Ok(())
    }
}

/// Whether a variable that is not a header may have this value. The value contains a control character. RFC 3875 does
/// not allow CR, LF or NUL in the variables that it defines, except in a decoded path: `/a%0Ab` results in an LF in
/// SCRIPT_NAME or PATH_INFO. Variables that RFC 3875 does not define belong to the web server; some of them contain
/// certificates of many lines.
#[cold]
fn may_have_control(name: &[u8], value: &[u8]) -> bool {
    match name {
        b"SCRIPT_NAME" | b"PATH_INFO" | b"PATH_TRANSLATED" => !value.contains(&b'\0'),
        b"AUTH_TYPE" | b"CONTENT_LENGTH" | b"CONTENT_TYPE" | b"GATEWAY_INTERFACE" | b"HTTPS" | b"QUERY_STRING"
        | b"REMOTE_ADDR" | b"REMOTE_HOST" | b"REMOTE_IDENT" | b"REMOTE_PORT" | b"REMOTE_USER" | b"REQUEST_METHOD"
        | b"REQUEST_SCHEME" | b"REQUEST_URI" | b"SERVER_NAME" | b"SERVER_PORT" | b"SERVER_PROTOCOL"
        | b"SERVER_SOFTWARE" => !value.iter().any(|byte| b"\r\n\0".contains(byte)),
        _ => true,
    }
}

/// Whether a byte is below 0x20. Checks eight bytes at a time, because every variable of every
/// request is checked.
#[inline]
fn has_control(bytes: &[u8]) -> bool {
    const LOW: u64 = 0x0101_0101_0101_0101;
    // Subtracting 0x20 sets the high bit of a byte below 0x20, and of a byte whose high bit was
    // already set.
    let below = |word: u64| word.wrapping_sub(LOW * 0x20) & !word & (LOW * 0x80);
    // The last word overlaps the word before it. If there are fewer than eight bytes, the two halves overlap instead.
    let found = match (bytes.last_chunk(), bytes.first_chunk(), bytes.last_chunk()) {
        (Some(&last), ..) => {
            let words = bytes.as_chunks().0.iter();
            words.fold(below(u64::from_ne_bytes(last)), |found, &word| found | below(u64::from_ne_bytes(word)))
        }
        (None, Some(&first), Some(&last)) => {
            below(u64::from(u32::from_ne_bytes(first)) << 32 | u64::from(u32::from_ne_bytes(last)))
        }
        _ => return bytes.iter().any(|&byte| byte < 0x20),
    };
    found != 0
}

fn parse_address(value: &[u8]) -> Option<IpAddr> {
    std::str::from_utf8(value).ok()?.parse().ok()
}

/// Converts `USER_AGENT` to the header `user-agent` (4.1.18). Returns `None` for a name that no
/// header can have.
fn header_name(variable: &[u8]) -> Option<HeaderName> {
    Some(match variable {
        b"HOST" => header::HOST,
        b"COOKIE" => header::COOKIE,
        b"ACCEPT" => header::ACCEPT,
        b"REFERER" => header::REFERER,
        b"USER_AGENT" => header::USER_AGENT,
        b"CONNECTION" => header::CONNECTION,
        b"CACHE_CONTROL" => header::CACHE_CONTROL,
        b"ACCEPT_ENCODING" => header::ACCEPT_ENCODING,
        b"ACCEPT_LANGUAGE" => header::ACCEPT_LANGUAGE,
        _ => {
            let mut name = [0; 128];
            let name = name.get_mut(..variable.len())?;
            for (to, &from) in name.iter_mut().zip(variable) {
                *to = if from == b'_' { b'-' } else { from.to_ascii_lowercase() };
            }
            return HeaderName::from_bytes(name).ok().filter(|name| {
                // All four are left out in any spelling of the variable.
                !is_never_a_variable(name)
            });
        }
    })
}

/// Whether a header must not have a variable with the prefix `HTTP_`. The first three would contradict the variables
/// without the prefix, or announce chunks that the web server has already decoded. A client must not be able to set
/// `Proxy` ("httpoxy", CVE-2016-5385).
fn is_never_a_variable(name: &HeaderName) -> bool {
    matches!(*name, header::CONTENT_LENGTH | header::CONTENT_TYPE | header::TRANSFER_ENCODING) || name == "proxy"
}

fn version(protocol: &[u8]) -> Version {
    match protocol {
        b"HTTP/1.0" => Version::HTTP_10,
        b"HTTP/2.0" | b"HTTP/2" => Version::HTTP_2,
        b"HTTP/3.0" | b"HTTP/3" => Version::HTTP_3,
        _ => Version::HTTP_11,
    }
}

/// Parses the URI as the web server forwarded it. Bytes that clients send although a URI must not contain them are
/// percent-encoded.
fn request_uri(uri: Bytes) -> Result<Uri, CgiError> {
    let uri = Uri::from_maybe_shared(uri.clone()).or_else(|_| {
        let mut encoded = BytesMut::with_capacity(uri.len() + 16);
        percent_encode(&mut encoded, &uri, |byte| byte > b' ' && byte < 0x7f && !b"\"<>\\^`{|}#".contains(&byte));
        Uri::from_maybe_shared(encoded.freeze()).map_err(|_| CgiError::Uri)
    })?;
    if uri.authority().is_none() {
        return Ok(uri);
    }
    // A client may send an absolute URI to a server. A host alone is only sent to proxies.
    if uri.scheme().is_none() || !uri.authority().is_none_or(|authority| is_host(authority.as_str().as_bytes())) {
        return Err(CgiError::Uri);
    }
    Ok(uri.into_parts().path_and_query.unwrap_or_else(|| PathAndQuery::from_static("/")).into())
}

/// Builds the URI from the decoded path, for web servers that do not forward the URI.
fn rebuilt_uri(script_name: &[u8], path_info: &[u8], query: &[u8]) -> Result<Uri, CgiError> {
    let mut uri = BytesMut::with_capacity(script_name.len() + path_info.len() + query.len() + 16);
    let path = if script_name.is_empty() { path_info } else { script_name };
    if !path.starts_with(b"/") {
        uri.put_u8(b'/');
    }
    let in_path = |byte: u8| byte.is_ascii_alphanumeric() || b"/-._~!$&'()*+,;=:@".contains(&byte);
    percent_encode(&mut uri, script_name, in_path);
    percent_encode(&mut uri, path_info, in_path);
    if !query.is_empty() {
        uri.put_u8(b'?');
        uri.put_slice(query);
    }
    request_uri(uri.freeze())
}

fn percent_encode(out: &mut BytesMut, bytes: &[u8], plain: impl Fn(u8) -> bool) {
    const HEX: [u8; 16] = *b"0123456789ABCDEF";
    for &byte in bytes {
        if plain(byte) {
            out.put_u8(byte);
        } else {
            let digit = |nibble: u8| HEX.get(usize::from(nibble)).copied().unwrap_or(b'0');
            out.put_slice(&[b'%', digit(byte >> 4), digit(byte & 15)]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn params(pairs: &[(&str, &str)]) -> Params {
        let mut raw = Vec::new();
        for (name, value) in pairs {
            let length = |text: &str| (u32::try_from(text.len()).unwrap() | 0x8000_0000).to_be_bytes();
            raw.extend([&length(name)[..], &length(value), name.as_bytes(), value.as_bytes()].concat());
        }
        Params::parse(raw.into()).unwrap()
    }

    fn made(pairs: &[(&str, &str)]) -> Result<Request<Option<u64>>, CgiError> {
        request(params(pairs), |length| length)
    }

    #[test]
    fn what_nginx_sends_becomes_a_request() {
        let request = made(&[
            ("QUERY_STRING", "a=1"),
            ("REQUEST_METHOD", "POST"),
            ("CONTENT_TYPE", "text/plain"),
            ("CONTENT_LENGTH", "12"),
            ("SCRIPT_NAME", "/a b"),
            ("REQUEST_URI", "/a%20b?a=1"),
            ("SERVER_PROTOCOL", "HTTP/2.0"),
            ("REMOTE_ADDR", "192.0.2.7"),
            ("REMOTE_PORT", "4711"),
            ("HTTP_X_TWO_WORDS", "yes"),
            ("HTTP_COOKIE", "a=b"),
            ("HTTP_PROXY", "http://evil"),
        ])
        .unwrap();
        assert_eq!((request.method(), request.uri().to_string()), (&Method::POST, "/a%20b?a=1".to_owned()));
        assert_eq!((request.version(), *request.body()), (Version::HTTP_2, Some(12)));
        assert_eq!(request.headers()["x-two-words"], "yes");
        assert_eq!(request.headers()["content-type"], "text/plain");
        assert!(!request.headers().contains_key("proxy"));
        let origin: &ClientInfo = request.extensions().get().unwrap();
        assert_eq!(origin.address, Some("192.0.2.7:4711".parse().unwrap()));
        assert_eq!(origin.params.get("SCRIPT_NAME"), Some(&b"/a b"[..]));
    }

    /// Found by fuzzing: a former version left out only names in capitals.
    #[test]
    fn headers_that_are_not_a_clients_to_say_are_left_out_however_they_are_written() {
        for name in ["HTTP_PROXY", "HTTP_Proxy", "HTTP_CONTENT-LENGTH", "HTTP_content_type", "HTTP_TRANSFER_ENCODiNG"] {
            let request = made(&[("REQUEST_METHOD", "GET"), (name, "5")]).unwrap();
            assert!(request.headers().is_empty(), "{name}");
        }
    }

    /// A full map panics when a header is inserted: this happened with the length after 24 576
    /// other headers.
    #[test]
    fn a_map_of_headers_is_never_so_full_that_none_can_be_inserted() {
        let names: Vec<String> = (0..33_000).map(|number| format!("HTTP_X{number}")).collect();
        for (count, fits) in [(MAX_NAMES, true), (MAX_NAMES + 1, false), (24_576, false), (33_000, false)] {
            let mut pairs = vec![("REQUEST_METHOD", "PUT"), ("CONTENT_LENGTH", "1")];
            pairs.extend(names[..count].iter().map(|name| (name.as_str(), "")));
            let made = made(&pairs).map(|request| request.headers().keys_len());
            assert_eq!(made, if fits { Ok(MAX_NAMES + 1) } else { Err(CgiError::Header) });
        }
    }

    #[test]
    fn without_a_request_uri_the_path_is_encoded_again() {
        let request = made(&[
            ("REQUEST_METHOD", "GET"),
            ("SCRIPT_NAME", "/ä x"),
            ("PATH_INFO", "/100%?"),
            ("QUERY_STRING", "q=1"),
        ]);
        assert_eq!(request.unwrap().uri(), "/%C3%A4%20x/100%25%3F?q=1");
        assert_eq!(made(&[("REQUEST_METHOD", "GET")]).unwrap().uri(), "/");
        assert_eq!(made(&[("REQUEST_METHOD", "GET"), ("PATH_INFO", "/p")]).unwrap().uri(), "/p");
    }

    #[test]
    fn a_uri_is_a_path() {
        let uri =
            |uri| made(&[("REQUEST_METHOD", "GET"), ("REQUEST_URI", uri)]).map(|request| request.uri().to_string());
        for (sent, path) in [("/a?b", "/a?b"), ("http://host:80/a?b", "/a?b"), ("http://host", "/"), ("*", "*")] {
            assert_eq!(uri(sent).unwrap(), path, "{sent}");
        }
        for sent in ["host:80", "host", "http://host:99999/", "http://user@host/"] {
            assert_eq!(uri(sent).unwrap_err(), CgiError::Uri, "{sent}");
        }
    }

    #[test]
    fn bytes_that_a_uri_may_not_have_are_encoded() {
        let request = made(&[("REQUEST_METHOD", "GET"), ("REQUEST_URI", "/caf\u{e9}?q=<a b>")]).unwrap();
        assert_eq!(request.uri(), "/caf%C3%A9?q=%3Ca%20b%3E");
    }

    #[test]
    fn a_head_that_makes_no_sense_is_refused() {
        assert_eq!(made(&[("REQUEST_URI", "/")]).unwrap_err(), CgiError::Method);
        assert_eq!(made(&[("REQUEST_METHOD", "")]).unwrap_err(), CgiError::Method);
        assert_eq!(made(&[("REQUEST_METHOD", "GE T")]).unwrap_err(), CgiError::Method);
        for value in ["a\r\nb: c", "a\n", "a\rb", "a\0b"] {
            assert_eq!(
                made(&[("REQUEST_METHOD", "GET"), ("HTTP_X", value)]).unwrap_err(),
                CgiError::Header,
                "{value:?}"
            );
            assert_eq!(made(&[("REQUEST_METHOD", "PUT"), ("CONTENT_TYPE", value)]).unwrap_err(), CgiError::Variable);
        }
        assert_eq!(made(&[("REQUEST_METHOD", "CONNECT"), ("REQUEST_URI", "x:80")]).unwrap_err(), CgiError::Connect);
    }

    #[test]
    fn a_control_character_is_found_wherever_it_stands() {
        for length in 0..40 {
            for other in [b' ', b'a', 0x7f, 0x80, 0x9f, 0xa0, 0xff] {
                let mut bytes = vec![other; length];
                assert!(!has_control(&bytes), "{length} times {other:#x}");
                for at in 0..length {
                    for control in 0..0x20 {
                        bytes[at] = control;
                        assert!(has_control(&bytes), "{control:#x} at {at} of {length}");
                    }
                    bytes[at] = other;
                }
            }
        }
    }

    #[test]
    fn variables_have_no_cr_lf_or_nul_but_for_decoded_paths_and_what_the_server_adds() {
        let with = |name: &str, value: &str| made(&[("REQUEST_METHOD", "GET"), (name, value)]).map(drop);
        for byte in ["\r", "\n", "\0"] {
            let value = format!("/a{byte}b");
            for name in ["REQUEST_URI", "QUERY_STRING", "REMOTE_ADDR", "REMOTE_USER", "SERVER_NAME", "SERVER_PROTOCOL"]
            {
                assert_eq!(with(name, &value), Err(CgiError::Variable), "{name} {value:?}");
                assert_eq!(with(name, "/a\tb\x7f").err().filter(|error| *error == CgiError::Variable), None, "{name}");
            }
            for name in ["SCRIPT_NAME", "PATH_INFO", "PATH_TRANSLATED"] {
                let expected = if byte == "\0" { Err(CgiError::Variable) } else { Ok(()) };
                assert_eq!(with(name, &value), expected, "{name} {value:?}");
            }
            assert_eq!(with("SSL_CLIENT_CERT", &value), Ok(()));
        }
    }

    #[test]
    fn there_is_one_host_at_most_and_it_is_one() {
        let hosts = |hosts: &[&str]| {
            let hosts = hosts.iter().map(|host| ("HTTP_HOST", *host));
            made(&[("REQUEST_METHOD", "GET")].into_iter().chain(hosts).collect::<Vec<_>>()).map(drop)
        };
        for valid in [&[][..], &[""], &["a:80"], &["[::1]:"]] {
            assert_eq!(hosts(valid), Ok(()), "{valid:?}");
        }
        for invalid in [&["a:b"][..], &["a b"], &["a", "a"]] {
            assert_eq!(hosts(invalid), Err(CgiError::Host), "{invalid:?}");
        }
    }

    #[test]
    fn two_lengths_that_differ_are_refused() {
        let length = |lengths: &[&str]| {
            let lengths = lengths.iter().map(|length| ("CONTENT_LENGTH", *length));
            let request = made(&[("REQUEST_METHOD", "POST")].into_iter().chain(lengths).collect::<Vec<_>>())?;
            assert_eq!(request.headers().get_all("content-length").iter().count(), request.body().iter().count());
            Ok(*request.body())
        };
        assert_eq!(length(&["5", "6"]), Err(CgiError::Length));
        assert_eq!(length(&["99999999999999999999999"]), Err(CgiError::Length));
        assert_eq!(length(&["5", "5"]), Ok(Some(5)));
        assert_eq!(length(&["5", "05"]), Ok(Some(5)));
        assert_eq!(length(&["5", ""]), Ok(None));
        assert_eq!(length(&["", "5"]), Ok(Some(5)));
    }

    /// CVE-2019-11043: php-fpm computed the start of PATH_INFO from the lengths of other
    /// parameters, and a line feed in the path made nginx send an empty PATH_INFO.
    #[test]
    fn no_parameter_is_measured_by_another() {
        let common = [("REQUEST_METHOD", "GET"), ("SCRIPT_NAME", "/index.php/a\nb"), ("PATH_INFO", "")];
        assert_eq!(made(&common).unwrap().uri(), "/index.php/a%0Ab");
        let long = "/PHP/".repeat(5000);
        let uri = made(&[("REQUEST_METHOD", "GET"), ("REQUEST_URI", "/a%0ab"), ("PATH_TRANSLATED", &long)]);
        assert_eq!(uri.unwrap().uri(), "/a%0ab");
    }

    #[test]
    fn of_a_parameter_that_is_said_twice_the_last_counts() {
        let twice = made(&[("REQUEST_METHOD", "GET"), ("REQUEST_METHOD", "PUT")]).unwrap();
        assert_eq!(twice.method(), Method::PUT);
        assert_eq!(twice.extensions().get::<ClientInfo>().unwrap().params.get("REQUEST_METHOD"), Some(&b"PUT"[..]));
    }

    #[test]
    fn a_length_is_digits_or_is_not_known() {
        let with = |length| made(&[("REQUEST_METHOD", "GET"), ("CONTENT_LENGTH", length)]);
        for length in ["", "-1"] {
            let request = with(length).unwrap();
            assert!(request.headers().is_empty() && request.body().is_none(), "{length}");
        }
        for length in ["12x", "-2", "+5", " 5", "5 ", "5, 5", "0x5", "18446744073709551616"] {
            assert_eq!(with(length).unwrap_err(), CgiError::Length, "{length:?}");
        }
    }

    #[test]
    fn the_scheme_is_in_either_of_two_variables() {
        for (name, value, is_https) in [
            ("HTTPS", "on", true),
            ("HTTPS", "On", true),
            ("HTTPS", "1", true),
            ("HTTPS", "off", false),
            ("HTTPS", "", false),
            ("REQUEST_SCHEME", "https", true),
            ("REQUEST_SCHEME", "http", false),
        ] {
            let request = made(&[("REQUEST_METHOD", "GET"), (name, value)]).unwrap();
            assert_eq!(request.extensions().get::<ClientInfo>().unwrap().is_https, is_https, "{name}={value}");
        }
    }
}
