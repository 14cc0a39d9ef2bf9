//! Reads the headers that proxies add to a request: `X-Forwarded-For`, `-Proto` and `-Host`, or
//! `Forwarded` (RFC 7239).
//!
//! Each proxy appends its information, and a client can send anything. The headers are therefore read from the right,
//! where the last proxy wrote, and only as far as the writers are trusted. The client may have forged the elements
//! further to the left.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use http::HeaderMap;
use http::header::{self, HeaderName, HeaderValue};

use super::params::Params;

const X_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const X_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
const X_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");

/// Proxy headers that frameworks are known to trust.
const ALL: [HeaderName; 10] = [
    header::FORWARDED,
    X_FOR,
    X_PROTO,
    X_HOST,
    HeaderName::from_static("x-forwarded-port"),
    HeaderName::from_static("x-forwarded-server"),
    HeaderName::from_static("x-forwarded-prefix"),
    HeaderName::from_static("x-forwarded-scheme"),
    HeaderName::from_static("x-forwarded-ssl"),
    HeaderName::from_static("x-real-ip"),
];

/// The headers that trusted proxies write. The proxies forward the headers of the other family as received from
/// clients.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ForwardingHeaders {
    /// `X-Forwarded-For`, `-Proto`, `-Host`.
    X,
    /// `Forwarded`.
    Rfc7239,
}

/// Information about the client according to the trusted proxies.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct ForwardedClient {
    /// `None` if the proxies do not report the client's address; `Some(None)` if they report the client as unknown, or
    /// hide the address. The port is 0 if they do not report it.
    pub(crate) address: Option<Option<SocketAddr>>,
    pub(crate) is_https: Option<bool>,
    /// The client's `Host`. May be any valid header value.
    pub(crate) host: Option<HeaderValue>,
}

/// Reads the headers of a request from a trusted peer.
pub(crate) fn client(
    headers: &HeaderMap,
    family: ForwardingHeaders,
    is_trusted: impl Fn(IpAddr) -> bool,
) -> ForwardedClient {
    match family {
        ForwardingHeaders::X => client_of_x(headers, is_trusted),
        ForwardingHeaders::Rfc7239 => client_of_rfc7239(headers, is_trusted),
    }
}

/// Removes untrusted headers: all proxy headers or, if the peer is trusted, the headers of the family that the peer
/// does not write.
pub(crate) fn remove(headers: &mut HeaderMap, trusted: Option<ForwardingHeaders>) {
    let names: Vec<HeaderName> =
        headers.keys().filter(|name| is_not_believed(name.as_str().as_bytes(), trusted)).cloned().collect();
    for name in names {
        headers.remove(name);
    }
}

/// Like [`remove`], for CGI variables, which are headers in another spelling. Returns `None` if there is nothing to
/// remove.
pub(crate) fn without(params: &Params, trusted: Option<ForwardingHeaders>) -> Option<Params> {
    let is_theirs = |name: &[u8]| name.strip_prefix(b"HTTP_").is_some_and(|name| is_not_believed(name, trusted));
    let any = params.iter().any(|(name, _)| is_theirs(name));
    any.then(|| Params::from_pairs(params.iter().filter(|(name, _)| !is_theirs(name))))
}

/// Whether this is, in any spelling, a proxy header that the trusted proxies do not write.
fn is_not_believed(name: &[u8], trusted: Option<ForwardingHeaders>) -> bool {
    let plain = |byte: u8| if byte == b'_' { b'-' } else { byte.to_ascii_lowercase() };
    let is = |known: &HeaderName| name.iter().map(|&byte| plain(byte)).eq(known.as_str().bytes());
    ALL.iter().any(|known| {
        let family = if *known == header::FORWARDED { ForwardingHeaders::Rfc7239 } else { ForwardingHeaders::X };
        let is_exact = name == known.as_str().as_bytes() || !name.iter().any(u8::is_ascii_lowercase);
        is(known) && (trusted != Some(family) || !is_exact)
    })
}

fn client_of_x(headers: &HeaderMap, is_trusted: impl Fn(IpAddr) -> bool) -> ForwardedClient {
    let mut client = ForwardedClient::default();
    let mut depth = 0;
    for element in elements(headers, X_FOR) {
        depth += 1;
        let address = node(element);
        client.address = Some(address);
        if !address.is_some_and(|address| is_trusted(address.ip())) {
            break;
        }
    }
    // If the list has fewer than `depth` elements, its first element is used. A trusted proxy nearer to this server has
    // written it.
    let at_depth = |name| elements(headers, name).take(depth.max(1)).last();
    client.is_https = at_depth(X_PROTO).and_then(is_https);
    client.host = at_depth(X_HOST).and_then(|host| HeaderValue::from_bytes(host).ok());
    client
}

fn client_of_rfc7239(headers: &HeaderMap, is_trusted: impl Fn(IpAddr) -> bool) -> ForwardedClient {
    let mut client = ForwardedClient::default();
    for element in elements(headers, header::FORWARDED) {
        client = ForwardedClient::default();
        for pair in FromRight::new(element, b';') {
            let mut sides = pair.splitn(2, |&byte| byte == b'=');
            let (Some(name), Some(value)) = (sides.next(), sides.next()) else { continue };
            let (name, value) = (name.trim_ascii(), unquoted(value.trim_ascii()));
            if name.eq_ignore_ascii_case(b"for") {
                client.address = Some(node(&value));
            } else if name.eq_ignore_ascii_case(b"proto") {
                client.is_https = is_https(&value);
            } else if name.eq_ignore_ascii_case(b"host") {
                client.host = HeaderValue::from_bytes(&value).ok();
            }
        }
        if !client.address.flatten().is_some_and(|address| is_trusted(address.ip())) {
            break;
        }
    }
    client
}

/// Returns the elements of a list header, from last to first; several lines form one list (RFC 9110, section 5.3).
fn elements(headers: &HeaderMap, name: HeaderName) -> impl Iterator<Item = &[u8]> {
    let lines = headers.get_all(name).into_iter().rev();
    lines.flat_map(|line| FromRight::new(line.as_bytes(), b',')).filter(|element| !element.is_empty())
}

fn is_https(scheme: &[u8]) -> Option<bool> {
    let is = |name: &str| scheme.eq_ignore_ascii_case(name.as_bytes());
    match () {
        () if is("https") || is("wss") => Some(true),
        () if is("http") || is("ws") => Some(false),
        () => None,
    }
}

/// Parses an address with or without a port (RFC 7239, section 6, and common variants). `None` for
/// `unknown`, an obfuscated name, and anything else.
fn node(text: &[u8]) -> Option<SocketAddr> {
    let text = std::str::from_utf8(text).ok()?;
    if let Ok(address) = text.parse::<IpAddr>() {
        return Some(SocketAddr::new(address, 0));
    }
    if let Some((address, port)) = text.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        let port = port.strip_prefix(':').and_then(|port| port.parse().ok()).unwrap_or(0);
        return Some(SocketAddr::new(address.parse::<Ipv6Addr>().ok()?.into(), port));
    }
    let (address, port) = text.split_once(':')?;
    // A port may be obfuscated too.
    Some(SocketAddr::new(IpAddr::V4(address.parse().ok()?), port.parse().unwrap_or(0)))
}

/// Returns a token, or the content of a quoted-string (RFC 9110, section 5.6.4).
fn unquoted(value: &[u8]) -> Vec<u8> {
    let Some(inner) = value.strip_prefix(b"\"").and_then(|rest| rest.strip_suffix(b"\"")) else {
        return value.to_vec();
    };
    let mut plain = Vec::with_capacity(inner.len());
    let mut bytes = inner.iter();
    while let Some(&byte) = bytes.next() {
        plain.extend(if byte == b'\\' { bytes.next().copied() } else { Some(byte) });
    }
    plain
}

/// Splits text at separators outside quotes, starting from the right. A proxy appends its element to the client's text,
/// so a quote that the client has left open cannot hide the proxy's element.
struct FromRight<'a> {
    rest: Option<&'a [u8]>,
    separator: u8,
}

impl<'a> FromRight<'a> {
    fn new(text: &'a [u8], separator: u8) -> Self {
        Self { rest: Some(text), separator }
    }
}

impl<'a> Iterator for FromRight<'a> {
    type Item = &'a [u8];

    fn next(&mut self) -> Option<&'a [u8]> {
        let text = self.rest.take()?;
        let mut in_quotes = false;
        for (place, &byte) in text.iter().enumerate().rev() {
            let (before, after) = (text.get(..place)?, text.get(place + 1..)?);
            if byte == b'"' {
                let escapes = before.iter().rev().take_while(|&&byte| byte == b'\\').count();
                in_quotes ^= escapes % 2 == 0;
            } else if byte == self.separator && !in_quotes {
                self.rest = Some(before);
                return Some(after.trim_ascii());
            }
        }
        Some(text.trim_ascii())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(lines: &[(&'static str, &str)]) -> HeaderMap {
        let pair = |(name, value): &(&'static str, &str)| (HeaderName::from_static(name), value.parse().unwrap());
        lines.iter().map(pair).collect()
    }

    /// Whether the address is trusted: the tests trust 10.0.0.0/8.
    fn ten(address: IpAddr) -> bool {
        matches!(address, IpAddr::V4(address) if address.octets()[0] == 10)
    }

    fn x(lines: &[(&'static str, &str)]) -> ForwardedClient {
        client(&headers(lines), ForwardingHeaders::X, ten)
    }

    fn rfc(value: &str) -> ForwardedClient {
        client(&headers(&[("forwarded", value)]), ForwardingHeaders::Rfc7239, ten)
    }

    fn inet(text: &str) -> Option<Option<SocketAddr>> {
        Some(Some(text.parse().unwrap()))
    }

    #[test]
    fn the_client_is_the_first_from_the_right_who_is_not_trusted() {
        for (list, address) in [
            ("192.0.2.7", inet("192.0.2.7:0")),
            ("6.6.6.6, 192.0.2.7", inet("192.0.2.7:0")),
            ("6.6.6.6, 192.0.2.7,10.0.0.2 , 10.0.0.1", inet("192.0.2.7:0")),
            ("10.0.0.3, 10.0.0.2", inet("10.0.0.3:0")),
            ("192.0.2.7:4711", inet("192.0.2.7:4711")),
            ("2001:db8::7", inet("[2001:db8::7]:0")),
            ("[2001:db8::7]:4711", inet("[2001:db8::7]:4711")),
            ("[2001:db8::7]", inet("[2001:db8::7]:0")),
            ("6.6.6.6, unknown", Some(None)),
            ("6.6.6.6, _hidden, 10.0.0.2", Some(None)),
            ("6.6.6.6, ", inet("6.6.6.6:0")),
            ("", None),
        ] {
            assert_eq!(x(&[("x-forwarded-for", list)]).address, address, "{list:?}");
        }
        let two_lines = x(&[("x-forwarded-for", "6.6.6.6"), ("x-forwarded-for", "192.0.2.7, 10.0.0.2")]);
        assert_eq!(two_lines.address, inet("192.0.2.7:0"));
    }

    #[test]
    fn scheme_and_host_are_what_the_same_proxy_said() {
        let made_up = [
            ("x-forwarded-for", "6.6.6.6, 192.0.2.7, 10.0.0.2"),
            ("x-forwarded-proto", "http, https, http"),
            ("x-forwarded-host", "evil, good, inner"),
        ];
        let client = x(&made_up);
        assert_eq!((client.is_https, client.host), (Some(true), Some(HeaderValue::from_static("good"))));
        // A proxy that overwrites the header instead of appending to it.
        let client = x(&[("x-forwarded-for", "192.0.2.7, 10.0.0.2"), ("x-forwarded-proto", "HTTPS")]);
        assert_eq!((client.is_https, client.host), (Some(true), None));
        let client = x(&[("x-forwarded-proto", "http, wss")]);
        assert_eq!((client.address, client.is_https), (None, Some(true)));
        assert_eq!(x(&[("x-forwarded-proto", "gopher")]).is_https, None);
    }

    #[test]
    fn rfc_7239_says_the_same_in_one_header() {
        for (value, address, is_https, host) in [
            ("for=192.0.2.7", inet("192.0.2.7:0"), None, None),
            ("For=\"[2001:db8::7]:4711\";Proto=https", inet("[2001:db8::7]:4711"), Some(true), None),
            ("for=6.6.6.6, for=192.0.2.7;proto=http;host=a, for=10.0.0.2", inet("192.0.2.7:0"), Some(false), Some("a")),
            ("for=unknown;host=\"a:80\"", Some(None), None, Some("a:80")),
            ("for=_gazonk", Some(None), None, None),
            ("for=\"192.0.2.7:_port\"", inet("192.0.2.7:0"), None, None),
            ("proto=https", None, Some(true), None),
            ("by=10.0.0.1;for=192.0.2.7;x=\"a,b;c\"", inet("192.0.2.7:0"), None, None),
            ("for=\"192.0\\.2.7\"", inet("192.0.2.7:0"), None, None),
            ("nonsense", None, None, None),
        ] {
            let host = host.map(HeaderValue::from_static);
            assert_eq!(rfc(value), ForwardedClient { address, is_https, host }, "{value}");
        }
    }

    #[test]
    fn a_quote_left_open_by_a_client_swallows_nothing() {
        for made_up in ["for=\"", "for=\"6.6.6.6, x=\"", "x=\"\\", "for=\"a\\\"", "\"\"\""] {
            let value = format!("{made_up}, for=192.0.2.7;host=\"a\\\"b\"");
            assert_eq!(rfc(&value).address, inet("192.0.2.7:0"), "{value}");
        }
    }

    #[test]
    fn what_is_not_believed_is_removed() {
        let all: HeaderMap = ALL.iter().map(|name| (name.clone(), HeaderValue::from_static("x"))).collect();
        for (trusted, left) in
            [(None, 0), (Some(ForwardingHeaders::X), ALL.len() - 1), (Some(ForwardingHeaders::Rfc7239), 1)]
        {
            let mut headers = all.clone();
            headers.insert(header::HOST, HeaderValue::from_static("a"));
            remove(&mut headers, trusted);
            assert_eq!(headers.len(), left + 1, "{trusted:?}");
        }
    }
}
