//! Derives the key of a request for the quarantine. The master counts deaths by this key, and workers refuse requests
//! by it, so both derive it with this code. No I/O.
//!
//! The key is derived from the text in the scoreboard, such as "GET /path?query". This text is truncated to 112 bytes.

use crate::config::failures::QuarantineBy;

/// This many consecutive hexadecimal digits are an id if at least one of them is a decimal digit.
const MIN_ID: usize = 8;

/// The key of a request, at two levels of precision.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct RequestKey {
    /// Method and path: `GET /users/17`.
    pub(crate) path: String,
    /// Pattern that is the same for all requests that differ only in numbers and ids: `GET /users/*`. `None` with
    /// [`QuarantineBy::Path`].
    pub(crate) pattern: Option<String>,
}

impl RequestKey {
    pub(crate) fn of(what: &str, by: QuarantineBy) -> Self {
        let path = what.split(['?', '#']).next().unwrap_or_default().trim_end().to_owned();
        let pattern = match by {
            QuarantineBy::Path => None,
            QuarantineBy::Pattern => {
                let segments = path.split('/').map(|segment| if is_id(segment) { "*" } else { segment });
                Some(segments.collect::<Vec<_>>().join("/"))
            }
        };
        Self { path, pattern }
    }

    /// Returns the keys by which the request may be refused.
    pub(crate) fn keys(&self) -> impl Iterator<Item = &str> {
        std::iter::once(self.path.as_str()).chain(self.pattern.as_deref())
    }
}

/// Whether a path segment is a number, or a long hexadecimal number, possibly with hyphens as in a UUID.
fn is_id(segment: &str) -> bool {
    let digits = || segment.bytes().filter(|byte| *byte != b'-');
    let is_number = !segment.is_empty() && segment.bytes().all(|byte| byte.is_ascii_digit());
    let is_hex = digits().count() >= MIN_ID
        && digits().all(|byte| byte.is_ascii_hexdigit())
        && digits().any(|byte| byte.is_ascii_digit());
    is_number || is_hex
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pattern_has_no_numbers_or_ids_and_no_key_has_a_query() {
        for (what, path, pattern) in [
            ("GET /", "GET /", "GET /"),
            ("GET /users/17?tab=2", "GET /users/17", "GET /users/*"),
            ("GET /users/17/posts/3/", "GET /users/17/posts/3/", "GET /users/*/posts/*/"),
            ("PUT /o/3f2504e0-4f89-11d3-9a0c-0305e82c3301", "PUT /o/3f2504e0-4f89-11d3-9a0c-0305e82c3301", "PUT /o/*"),
            ("GET /o/DEADBEEF01", "GET /o/DEADBEEF01", "GET /o/*"),
            ("GET /facade/defaced", "GET /facade/defaced", "GET /facade/defaced"),
            ("GET /v2/page-17", "GET /v2/page-17", "GET /v2/page-17"),
            ("GET /a#b", "GET /a", "GET /a"),
            ("", "", ""),
        ] {
            let key = RequestKey::of(what, QuarantineBy::Pattern);
            assert_eq!((key.path.as_str(), key.pattern.as_deref()), (path, Some(pattern)), "{what}");
            assert_eq!(key.keys().collect::<Vec<_>>(), [path, pattern]);
            assert_eq!(RequestKey::of(what, QuarantineBy::Path).keys().collect::<Vec<_>>(), [path]);
        }
    }
}
