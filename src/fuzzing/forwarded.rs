//! Checks that headers forged by a client cannot override the headers that proxies write.

use std::net::{IpAddr, Ipv4Addr};

use http::header::{self, HeaderMap, HeaderName, HeaderValue};

use super::Dice;
use crate::protocol::forwarded::{ForwardedClient, ForwardingHeaders, client, remove};

const PROXY: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 0, 1));

/// Reads the bytes as headers sent by a client. The proxy then appends its own headers, and only these may take effect.
/// For an untrusted peer, none of the headers may remain.
///
/// # Panics
/// Panics if a check fails.
pub fn forwarded(data: &[u8]) {
    let mut dice = Dice(data);
    let (family, chain, same_line, sparse) = (dice.coin(2), dice.coin(3), dice.coin(2), dice.coin(4));
    let mut headers = HeaderMap::new();
    for line in dice.0.split(|&byte| byte == b'\n').take(8) {
        let Some((&which, value)) = line.split_first() else { continue };
        let name = match which % 5 {
            0 => header::FORWARDED,
            1 => HeaderName::from_static("x-forwarded-for"),
            2 => HeaderName::from_static("x-forwarded-proto"),
            3 => HeaderName::from_static("x-forwarded-host"),
            _ => HeaderName::from_static("x-real-ip"),
        };
        if let Ok(value) = HeaderValue::from_bytes(value) {
            headers.append(name, value);
        }
    }
    let family = if family { ForwardingHeaders::X } else { ForwardingHeaders::Rfc7239 };
    let is_trusted = |address| address == PROXY;
    let said = client(&headers, family, is_trusted);
    assert!(said.host.is_none_or(|host| host.as_bytes().len() <= data.len()));

    // Header name, element that the proxy appends, and element that a second proxy behind the first appends.
    let words: &[(&'static str, &str, &str)] = match family {
        ForwardingHeaders::X => &[
            ("x-forwarded-for", "192.0.2.7", "10.0.0.1"),
            ("x-forwarded-proto", "https", "http"),
            ("x-forwarded-host", "good.example", "inner.example"),
        ],
        // Each element of a `Forwarded` header describes one hop: a parameter that is missing in one element is not
        // taken from another.
        ForwardingHeaders::Rfc7239 if sparse => {
            &[("forwarded", "for=192.0.2.7", "for=10.0.0.1;proto=http;host=inner.example")]
        }
        ForwardingHeaders::Rfc7239 => &[(
            "forwarded",
            "for=192.0.2.7;proto=https;host=good.example",
            "for=10.0.0.1;proto=http;host=inner.example",
        )],
    };
    for &(name, first, second) in words {
        append(&mut headers, name, first, same_line);
        if chain {
            append(&mut headers, name, second, same_line);
        }
    }
    let says_all = family == ForwardingHeaders::X || !sparse;
    let expected = ForwardedClient {
        address: Some(Some(([192, 0, 2, 7], 0).into())),
        is_https: says_all.then_some(true),
        host: says_all.then(|| HeaderValue::from_static("good.example")),
    };
    assert_eq!(client(&headers, family, is_trusted), expected, "a client moved the proxy's word: {headers:?}");

    let mut others = headers.clone();
    remove(&mut others, Some(family));
    assert_eq!(client(&others, family, is_trusted), expected, "what the proxy wrote stays");
    remove(&mut headers, None);
    assert!(headers.is_empty(), "nothing of it is a client's to say: {headers:?}");
}

/// Appends an element as proxies do: to the last line with that name, or in a new line.
fn append(headers: &mut HeaderMap, name: &'static str, element: &str, same_line: bool) {
    let name = HeaderName::from_static(name);
    if same_line && let Some(last) = headers.get_all(&name).iter().next_back() {
        let joined = HeaderValue::from_bytes(&[last.as_bytes(), b", ", element.as_bytes()].concat());
        let Ok(joined) = joined else { panic!("two good values joined are a good value") };
        let mut all: Vec<_> = headers.get_all(&name).iter().cloned().collect();
        all.pop();
        headers.remove(&name);
        for value in all.into_iter().chain([joined]) {
            headers.append(name.clone(), value);
        }
        return;
    }
    let Ok(element) = HeaderValue::from_str(element) else { panic!("{element} is a good value") };
    headers.append(name, element);
}
