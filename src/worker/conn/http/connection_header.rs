//! Reads and writes `Connection` in HTTP/1 (RFC 9112, section 9). The server determines whether a connection is kept
//! open.

use http::header::{self, HeaderMap, HeaderValue};
use http::{Response, Version};

use crate::protocol::grammar::elements;

const CLOSE: &[u8] = b"close";
const KEEP_ALIVE: &[u8] = b"keep-alive";
const UPGRADE: &[u8] = b"upgrade";

fn has_option(headers: &HeaderMap, option: &[u8]) -> bool {
    elements(headers, header::CONNECTION).any(|other| other.eq_ignore_ascii_case(option))
}

/// Whether an HTTP/1.1 request offers another protocol. A proxy that does not implement `Upgrade` forwards the header, but
/// removes the matching connection option (RFC 9110, section 7.8).
pub(super) fn asks_for_upgrade(headers: &HeaderMap) -> bool {
    headers.contains_key(header::UPGRADE) && has_option(headers, UPGRADE)
}

/// Whether the connection ends after this request.
pub(super) fn request_closes(version: Version, headers: &HeaderMap) -> bool {
    has_option(headers, CLOSE) || version < Version::HTTP_11 && !has_option(headers, KEEP_ALIVE)
}

/// Whether the application requests that the connection end after this response.
pub(super) fn response_closes(headers: &HeaderMap) -> bool {
    has_option(headers, CLOSE)
}

/// Writes `Connection` into the response to a request of this version.
pub(super) fn set_connection<B>(response: &mut Response<B>, version: Version, is_last: bool) {
    if is_last && version < Version::HTTP_11 {
        // Without this version, hyper would add `keep-alive`.
        *response.version_mut() = Version::HTTP_10;
    }
    let headers = response.headers_mut();
    let is_upgrade = headers.contains_key(header::UPGRADE); // RFC 9110, section 7.8
    if !is_upgrade && !headers.contains_key(header::CONNECTION) {
        if is_last {
            headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        return;
    }
    let own = [CLOSE, KEEP_ALIVE, UPGRADE];
    let is_own = |option: &[u8]| own.iter().any(|own| option.eq_ignore_ascii_case(own));
    let mut options: Vec<&[u8]> = elements(headers, header::CONNECTION).filter(|option| !is_own(option)).collect();
    options.extend(is_upgrade.then_some(UPGRADE));
    options.extend(is_last.then_some(CLOSE));
    match HeaderValue::from_bytes(&options.join(&b", "[..])) {
        Ok(value) if !value.is_empty() => _ = headers.insert(header::CONNECTION, value),
        _ => _ = headers.remove(header::CONNECTION),
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderName;

    use super::*;

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        pairs.iter().map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value))).collect()
    }

    #[test]
    fn both_headers_ask_for_an_upgrade() {
        let asks = |pairs| asks_for_upgrade(&headers(pairs));
        assert!(asks(&[("connection", "keep-alive, Upgrade"), ("upgrade", "websocket")]));
        assert!(!asks(&[("connection", "keep-alive"), ("upgrade", "websocket")]), "a proxy did not know it");
        assert!(!asks(&[("connection", "upgrade")]));
    }

    #[test]
    fn close_outdoes_keep_alive_in_a_request() {
        for (options, in_1_0, in_1_1) in [
            (&[][..], true, false),
            (&["keep-alive"], false, false),
            (&["CLOSE"], true, true),
            (&["keep-alive, close"], true, true),
            (&["close", "keep-alive"], true, true),
            (&["x , Keep-Alive"], false, false),
        ] {
            let pairs: Vec<_> = options.iter().map(|&option| ("connection", option)).collect();
            let closes = [Version::HTTP_10, Version::HTTP_11].map(|version| request_closes(version, &headers(&pairs)));
            assert_eq!(closes, [in_1_0, in_1_1], "{options:?}");
        }
    }

    #[test]
    fn the_server_writes_close_and_the_application_the_other_options() {
        for (pairs, kept, last) in [
            (&[][..], None, Some("close")),
            (&[("connection", "keep-alive")], None, Some("close")),
            (&[("connection", "Close")], None, Some("close")),
            (&[("connection", "x-a, close"), ("connection", "x-b")], Some("x-a, x-b"), Some("x-a, x-b, close")),
            (&[("upgrade", "a"), ("connection", "x")], Some("x, upgrade"), Some("x, upgrade, close")),
            (&[("upgrade", "a"), ("connection", "Upgrade")], Some("upgrade"), Some("upgrade, close")),
        ] {
            for (is_last, expected) in [(false, kept), (true, last)] {
                let mut response = Response::new(());
                *response.headers_mut() = headers(pairs);
                set_connection(&mut response, Version::HTTP_11, is_last);
                let mut values = response.headers().get_all("connection").iter();
                assert_eq!(values.next().map(|value| value.to_str().unwrap()), expected, "{pairs:?} {is_last}");
                assert_eq!(values.next(), None);
            }
        }
    }
}
