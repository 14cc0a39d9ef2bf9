//! The headers with which an application selects a file that the server sends: `X-Sendfile` and `X-Accel-Redirect`.
//!
//! Some frameworks read from request headers which of the two they may send, and how paths are mapped
//! (`X-Sendfile-Type`, `X-Accel-Mapping`). A client that sends these headers can make such an application name other
//! files (CVE-2025-61780, CVE-2026-7381). [`remove`] and [`without`] therefore remove them from requests.

use http::HeaderMap;
use http::header::{HeaderName, HeaderValue};

use super::params::Params;

const SENDFILE: HeaderName = HeaderName::from_static("x-sendfile");
const ACCEL_REDIRECT: HeaderName = HeaderName::from_static("x-accel-redirect");

/// The file that an application has selected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Selection {
    /// `X-Sendfile`: a path in the file system. It is not decoded.
    Path(HeaderValue),
    /// `X-Accel-Redirect`: a URL.
    Url(HeaderValue),
}

impl Selection {
    /// Returns the name of the header.
    pub(crate) fn header(&self) -> &'static str {
        match self {
            Self::Path(_) => "X-Sendfile",
            Self::Url(_) => "X-Accel-Redirect",
        }
    }

    pub(crate) fn value(&self) -> &[u8] {
        match self {
            Self::Path(value) | Self::Url(value) => value.as_bytes(),
        }
    }
}

/// Removes the headers from a response, and returns what they select. An empty value selects nothing. If a header occurs
/// more than once, its last value applies, as with nginx.
pub(crate) fn take(headers: &mut HeaderMap) -> Option<Selection> {
    let last = |headers: &HeaderMap, name: &HeaderName| headers.get_all(name).iter().next_back().cloned();
    let is_set = |value: &HeaderValue| !value.is_empty();
    let path = last(headers, &SENDFILE).filter(is_set).map(Selection::Path);
    let selection = path.or_else(|| last(headers, &ACCEL_REDIRECT).filter(is_set).map(Selection::Url));
    headers.remove(&SENDFILE);
    headers.remove(&ACCEL_REDIRECT);
    selection
}

/// Removes the headers of a request that could influence which file an application selects.
pub(crate) fn remove(headers: &mut HeaderMap) {
    let names: Vec<HeaderName> = headers.keys().filter(|name| influences(name.as_str().as_bytes())).cloned().collect();
    for name in names {
        headers.remove(name);
    }
}

/// Like [`remove`], for CGI variables. Returns `None` if there is nothing to remove.
pub(crate) fn without(params: &Params) -> Option<Params> {
    let is_removed = |name: &[u8]| name.strip_prefix(b"HTTP_").is_some_and(influences);
    let any = params.iter().any(|(name, _)| is_removed(name));
    any.then(|| Params::from_pairs(params.iter().filter(|(name, _)| !is_removed(name))))
}

/// Whether a header has one of these names, in any spelling that an application may treat as the same.
fn influences(name: &[u8]) -> bool {
    let plain = |byte: u8| if byte.is_ascii_alphanumeric() { byte.to_ascii_lowercase() } else { b'-' };
    let begins =
        |with: &[u8]| name.len() >= with.len() && name.iter().map(|&byte| plain(byte)).zip(with).all(|(a, b)| a == *b);
    begins(b"x-sendfile") || begins(b"x-accel-")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&str, &str)]) -> HeaderMap {
        let pair = |&(name, value): &(&str, &str)| {
            (HeaderName::from_bytes(name.as_bytes()).unwrap(), HeaderValue::from_str(value).unwrap())
        };
        let mut headers = HeaderMap::new();
        for (name, value) in pairs.iter().map(pair) {
            headers.append(name, value);
        }
        headers
    }

    #[test]
    fn a_selection_is_removed_from_the_response() {
        let path = |text: &str| Some(Selection::Path(HeaderValue::from_str(text).unwrap()));
        let url = |text: &str| Some(Selection::Url(HeaderValue::from_str(text).unwrap()));
        for (pairs, expected) in [
            (&[][..], None),
            (&[("x-sendfile", "")], None),
            (&[("x-sendfile", "/a")], path("/a")),
            (&[("x-accel-redirect", "/b")], url("/b")),
            (&[("x-accel-redirect", "/b"), ("x-sendfile", "/a")], path("/a")),
            (&[("x-sendfile", ""), ("x-accel-redirect", "/b")], url("/b")),
            (&[("x-sendfile", "/a"), ("x-sendfile", "/c")], path("/c")),
        ] {
            let mut headers = headers(&[pairs, &[("x-other", "1")]].concat());
            assert_eq!(take(&mut headers), expected, "{pairs:?}");
            assert_eq!(headers.len(), 1);
        }
    }

    #[test]
    fn a_client_cannot_influence_the_selection_in_any_spelling() {
        let mut sent = headers(&[
            ("x-sendfile-type", "1"),
            ("X_Sendfile_Type", "1"),
            ("x.accel.mapping", "1"),
            ("X-Accel-Redirect", "1"),
            ("x-sendfile", "1"),
            ("x-accelerate", "1"),
            ("x-send", "1"),
        ]);
        remove(&mut sent);
        let mut names: Vec<_> = sent.keys().map(HeaderName::as_str).collect();
        names.sort_unstable();
        assert_eq!(names, ["x-accelerate", "x-send"]);
        let pairs: [(&[u8], &[u8]); 4] = [
            (b"HTTP_X_SENDFILE_TYPE", b"1"),
            (b"HTTP_x-accel-mapping", b"1"),
            (b"X_SENDFILE_TYPE", b"2"),
            (b"HTTP_HOST", b"3"),
        ];
        let left = without(&Params::from_pairs(pairs)).unwrap();
        assert_eq!(left.iter().map(|(_, value)| value).collect::<Vec<_>>(), [b"2", b"3"]);
        assert_eq!(without(&left), None);
    }
}
