//! Selects the headers of requests and responses that a gateway forwards over HTTP (RFC 9110, section 7.6).
//!
//! - Headers that concern one connection are removed, and so are those that `Connection` names, except `Host` and
//!   `Content-Length`. If the client accepts trailers, so does the gateway: `TE: trailers` (RFC 9110, section 10.1.4).
//! - `Expect` is removed, because the gateway has received the whole body. `Proxy` is removed, because a client must not
//!   be able to set the variable `HTTP_PROXY` of an application behind WSGI, Rack or PSGI ("httpoxy", CVE-2016-5385).
//! - Forwarding headers, in any spelling, are replaced by those that describe the client as this server sees it.

use std::fmt::Write as _;
use std::net::IpAddr;

use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::request::Parts;

use super::cgi::{ClientInfo, is_of_one_connection};
use super::forwarded;
use super::grammar::elements;

/// Sent if the client has not named a host. HTTP/1.1 requires one.
const NO_HOST: HeaderValue = HeaderValue::from_static("localhost");

/// Returns the headers of a request for an app process. `length` is the length of the request's body, if it has one. If
/// `upgrades`, the request offers the protocol in its `Upgrade`.
pub(crate) fn request_headers(request: &Parts, client: &ClientInfo, length: Option<u64>, upgrades: bool) -> HeaderMap {
    let mut headers = end_to_end(&request.headers);
    for name in [header::EXPECT, header::CONTENT_LENGTH, HeaderName::from_static("proxy")] {
        headers.remove(name);
    }
    if let Some(length) = length {
        headers.insert(header::CONTENT_LENGTH, length.into());
    }
    if upgrades && let Some(protocol) = request.headers.get(header::UPGRADE) {
        headers.insert(header::UPGRADE, protocol.clone());
        headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
    } else if elements(&request.headers, header::TE).any(|coding| coding.eq_ignore_ascii_case(b"trailers")) {
        headers.insert(header::TE, HeaderValue::from_static("trailers"));
        headers.insert(header::CONNECTION, HeaderValue::from_static("te"));
    }
    let authority = request.uri.authority().and_then(|authority| HeaderValue::from_str(authority.as_str()).ok());
    let host = authority.or_else(|| headers.get(header::HOST).cloned());
    headers.insert(header::HOST, host.clone().unwrap_or(NO_HOST));
    forwarded::remove(&mut headers, None);
    describe_client(&mut headers, client, host);
    headers
}

/// Returns the headers of a response for the client. `Upgrade` is kept if the response switches protocols.
pub(crate) fn response_headers(from_app: &HeaderMap, switches: bool) -> HeaderMap {
    let mut headers = end_to_end(from_app);
    if from_app.contains_key(header::TRANSFER_ENCODING) {
        headers.remove(header::CONTENT_LENGTH); // RFC 9112, section 6.3
    }
    if switches && let Some(protocol) = from_app.get(header::UPGRADE) {
        headers.insert(header::UPGRADE, protocol.clone());
    }
    // It announces the trailers of this response, although a server must not send it in general.
    for names in from_app.get_all(header::TRAILER) {
        headers.append(header::TRAILER, names.clone());
    }
    headers
}

/// Returns the trailers of a response for the client, without fields that concern the framing or the connection.
pub(crate) fn response_trailers(from_app: &HeaderMap) -> HeaderMap {
    let mut trailers = end_to_end(from_app);
    trailers.remove(header::HOST);
    trailers.remove(header::CONTENT_LENGTH);
    trailers
}

fn end_to_end(headers: &HeaderMap) -> HeaderMap {
    let named: Vec<&[u8]> = elements(headers, header::CONNECTION).collect();
    let is_kept = |name: &HeaderName| {
        let is_named = || named.iter().any(|other| other.eq_ignore_ascii_case(name.as_str().as_bytes()));
        matches!(*name, header::HOST | header::CONTENT_LENGTH) || !is_of_one_connection(name) && !is_named()
    };
    let kept = headers.iter().filter(|(name, _)| is_kept(name));
    let mut copy = HeaderMap::with_capacity(headers.keys_len() + 8);
    for (name, value) in kept {
        copy.append(name, value.clone());
    }
    copy
}

fn describe_client(headers: &mut HeaderMap, client: &ClientInfo, host: Option<HeaderValue>) {
    let scheme = if client.is_https { "https" } else { "http" };
    headers.insert("x-forwarded-proto", HeaderValue::from_static(scheme));
    let address = client.address.map(|address| address.ip().to_canonical());
    if let Some(address) = address
        && let Ok(value) = HeaderValue::try_from(address.to_string())
    {
        headers.insert("x-forwarded-for", value.clone());
        headers.insert("x-real-ip", value);
    }
    if let Ok(value) = HeaderValue::from_bytes(&forwarded_element(address, scheme, host.as_ref())) {
        headers.insert(header::FORWARDED, value);
    }
    if let Some(host) = host {
        headers.insert("x-forwarded-host", host);
    }
}

/// Returns the value of `Forwarded` (RFC 7239, section 4).
fn forwarded_element(address: Option<IpAddr>, scheme: &str, host: Option<&HeaderValue>) -> Vec<u8> {
    let mut element = match address {
        Some(IpAddr::V4(address)) => format!("for={address}"),
        Some(IpAddr::V6(address)) => format!("for=\"[{address}]\""),
        None => "for=unknown".to_owned(),
    };
    let _ = write!(element, ";proto={scheme}"); // a string cannot fail
    let mut element = element.into_bytes();
    if let Some(host) = host {
        element.extend_from_slice(b";host=\"");
        for &byte in host.as_bytes() {
            if matches!(byte, b'"' | b'\\') {
                element.push(b'\\');
            }
            element.push(byte);
        }
        element.push(b'"');
    }
    element
}

#[cfg(test)]
mod tests {
    use http::Request;

    use super::*;

    fn sent(pairs: &[(&'static str, &'static str)], client: &str, length: Option<u64>, upgrades: bool) -> Vec<String> {
        let mut request = Request::builder().uri("/");
        for (name, value) in pairs {
            request = request.header(*name, *value);
        }
        let (parts, ()) = request.body(()).unwrap().into_parts();
        let client = ClientInfo::of_http(client.parse().ok(), true);
        let headers = request_headers(&parts, &client, length, upgrades);
        let mut lines: Vec<_> =
            headers.iter().map(|(name, value)| format!("{name}: {}", value.to_str().unwrap())).collect();
        lines.sort();
        lines
    }

    #[test]
    fn a_client_cannot_forge_where_it_is_in_any_spelling() {
        let forged = [
            ("host", "a.example"),
            ("x-forwarded-for", "1.1.1.1"),
            ("x_forwarded_for", "1.1.1.1"),
            ("x-real-ip", "1.1.1.1"),
            ("forwarded", "for=1.1.1.1"),
            ("x-forwarded-proto", "http"),
            ("proxy", "http://evil"),
        ];
        let expected = [
            "forwarded: for=192.0.2.7;proto=https;host=\"a.example\"",
            "host: a.example",
            "x-forwarded-for: 192.0.2.7",
            "x-forwarded-host: a.example",
            "x-forwarded-proto: https",
            "x-real-ip: 192.0.2.7",
        ];
        assert_eq!(sent(&forged, "192.0.2.7:1234", None, false), expected);
    }

    #[test]
    fn addresses_have_the_form_of_rfc_7239() {
        let forwarded = |client| sent(&[("host", "h")], client, None, false).swap_remove(0);
        assert_eq!(forwarded("[2001:db8::1]:5"), "forwarded: for=\"[2001:db8::1]\";proto=https;host=\"h\"");
        assert_eq!(forwarded("[::ffff:192.0.2.7]:5"), "forwarded: for=192.0.2.7;proto=https;host=\"h\"");
        assert_eq!(forwarded("unix"), "forwarded: for=unknown;proto=https;host=\"h\"");
    }

    #[test]
    fn headers_of_the_connection_stay_on_it() {
        let pairs = [
            ("connection", "keep-alive, X-Mine, host, content-length"),
            ("x-mine", "1"),
            ("keep-alive", "timeout=5"),
            ("te", "trailers"),
            ("transfer-encoding", "chunked"),
            ("upgrade", "websocket"),
            ("expect", "100-continue"),
            ("content-length", "99"),
            ("x-other", "2"),
        ];
        let own = |lines: Vec<String>| -> Vec<String> {
            lines.into_iter().filter(|line| !line.contains("forwarded")).collect()
        };
        let expected = ["connection: te", "content-length: 5", "host: localhost", "te: trailers", "x-other: 2"];
        assert_eq!(own(sent(&pairs, "unix", Some(5), false)), expected);
        let expected = ["connection: upgrade", "host: localhost", "upgrade: websocket", "x-other: 2"];
        assert_eq!(own(sent(&pairs, "unix", None, true)), expected);
    }

    #[test]
    fn trailers_are_announced_and_cannot_change_the_framing() {
        let pairs = [("trailer", "x-sum"), ("x-sum", "1"), ("content-length", "5"), ("connection", "x"), ("x", "1")];
        let headers: HeaderMap = pairs
            .into_iter()
            .map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value)))
            .collect();
        assert_eq!(response_headers(&headers, false)[header::TRAILER], "x-sum");
        assert_eq!(response_trailers(&headers).keys().collect::<Vec<_>>(), ["x-sum"]);
    }

    #[test]
    fn a_response_keeps_its_length_only_without_chunks() {
        let pairs = [("content-length", "5"), ("upgrade", "h2c"), ("connection", "close, x"), ("x", "1"), ("y", "2")];
        let mut headers: HeaderMap = pairs
            .into_iter()
            .map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value)))
            .collect();
        let names = |headers: &HeaderMap, switches| -> Vec<String> {
            response_headers(headers, switches).keys().map(ToString::to_string).collect()
        };
        assert_eq!(names(&headers, false), ["content-length", "y"]);
        assert_eq!(names(&headers, true), ["content-length", "y", "upgrade"]);
        headers.insert("transfer-encoding", HeaderValue::from_static("chunked"));
        assert_eq!(names(&headers, false), ["y"]);
    }
}
