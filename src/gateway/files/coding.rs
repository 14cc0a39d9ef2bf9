//! Selects a compressed variant of a file by `Accept-Encoding` (RFC 9110, section 12.5.3; pure).

use http::header::{self, HeaderMap};

use crate::protocol::grammar::elements;

/// A content coding of which a file can have a variant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Coding {
    Brotli,
    Gzip,
}

impl Coding {
    /// All codings, the most effective first.
    pub(super) const ALL: [Self; 2] = [Self::Brotli, Self::Gzip];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Brotli => "br",
            Self::Gzip => "gzip",
        }
    }

    /// Returns the suffix of the variant's name.
    pub(super) fn suffix(self) -> &'static str {
        match self {
            Self::Brotli => ".br",
            Self::Gzip => ".gz",
        }
    }
}

/// Returns the codings that a client accepts, the preferred one first. Empty if it prefers the file itself.
pub(super) fn accepted(headers: &HeaderMap) -> Vec<Coding> {
    let (mut named, mut any, mut identity) = ([None; 2], None, None);
    for element in elements(headers, header::ACCEPT_ENCODING) {
        let (name, weight) = weighted(element);
        let is = |other: &[u8]| name.eq_ignore_ascii_case(other);
        if is(b"br") {
            named[0] = Some(weight);
        } else if is(b"gzip") || is(b"x-gzip") {
            named[1] = Some(weight);
        } else if is(b"*") {
            any = Some(weight);
        } else if is(b"identity") {
            identity = Some(weight);
        }
    }
    let least = identity.unwrap_or(0).max(1);
    let mut accepted: Vec<_> = Coding::ALL.into_iter().zip(named.map(|weight| weight.or(any).unwrap_or(0))).collect();
    accepted.retain(|(_, weight)| *weight >= least);
    accepted.sort_by_key(|(_, weight)| std::cmp::Reverse(*weight)); // stable
    accepted.into_iter().map(|(coding, _)| coding).collect()
}

/// Splits an element into its name and its weight in thousandths. An invalid weight is 0.
fn weighted(element: &[u8]) -> (&[u8], u32) {
    let mut parts = element.split(|&byte| byte == b';').map(<[u8]>::trim_ascii);
    let name = parts.next().unwrap_or_default();
    let weight = parts.find_map(|part| part.strip_prefix(b"q=").or_else(|| part.strip_prefix(b"Q=")));
    (name, weight.map_or(1000, |weight| thousandths(weight).unwrap_or(0)))
}

/// Parses a weight: 0 to 1, with up to three decimal places.
fn thousandths(text: &[u8]) -> Option<u32> {
    let text = std::str::from_utf8(text).ok()?;
    let (whole, decimals) = text.split_once('.').unwrap_or((text, ""));
    let is_digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    if whole.len() != 1 || decimals.len() > 3 || !is_digits(whole) || !is_digits(decimals) {
        return None;
    }
    let weight = format!("{whole}{decimals:0<3}").parse().ok()?;
    (weight <= 1000).then_some(weight)
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    #[test]
    fn the_clients_preference_decides_and_then_the_size() {
        use Coding::{Brotli, Gzip};
        for (header, expected) in [
            ("", &[][..]),
            ("gzip", &[Gzip]),
            ("gzip, deflate, br", &[Brotli, Gzip]),
            ("GZIP;q=1.0, br;q=0.5", &[Gzip, Brotli]),
            ("br;q=0, gzip", &[Gzip]),
            ("gzip;q=0", &[]),
            ("*", &[Brotli, Gzip]),
            ("*;q=0.1, br;q=0", &[Gzip]),
            ("identity, gzip;q=0.5", &[]),
            ("identity;q=0, x-gzip", &[Gzip]),
            ("gzip; q=0.001", &[Gzip]),
            ("gzip;q=2, br;q=abc", &[]),
            ("gzipx, brr", &[]),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(header::ACCEPT_ENCODING, HeaderValue::from_static(header));
            assert_eq!(accepted(&headers), expected, "{header}");
        }
        assert_eq!(accepted(&HeaderMap::new()), []);
    }
}
