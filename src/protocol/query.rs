//! Parses the query of a URI into name-value pairs (`application/x-www-form-urlencoded`), and
//! decodes percent-encoding: `%2D` is `-` (RFC 3986, section 6.2.2.2).

use std::borrow::Cow;

/// Returns the pairs in a query, in order. The value of a pair without `=` is empty.
pub(crate) fn pairs(query: &str) -> impl Iterator<Item = (Cow<'_, str>, Cow<'_, str>)> {
    let pairs = query.split('&').filter(|pair| !pair.is_empty());
    pairs.map(|pair| pair.split_once('=').unwrap_or((pair, ""))).map(|(name, value)| (decode(name), decode(value)))
}

/// Decodes one name or value. A percent sign that is not followed by two hexadecimal digits is kept, and invalid UTF-8
/// becomes U+FFFD.
fn decode(text: &str) -> Cow<'_, str> {
    if !text.bytes().any(|byte| matches!(byte, b'%' | b'+')) {
        return Cow::Borrowed(text);
    }
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        let (byte, after) = match (byte, after) {
            (b'%', [high, low, after @ ..]) => match (hex(*high), hex(*low)) {
                (Some(high), Some(low)) => (high << 4 | low, after),
                _ => (b'%', rest.get(1..).unwrap_or_default()),
            },
            (b'+', after) => (b' ', after),
            (byte, after) => (byte, after),
        };
        bytes.push(byte);
        rest = after;
    }
    Cow::Owned(String::from_utf8(bytes).unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned()))
}

fn hex(digit: u8) -> Option<u8> {
    char::from(digit).to_digit(16).and_then(|digit| u8::try_from(digit).ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_values_are_decoded() {
        let query = "lastEventId=EPOCH%2D5&a=%C3%bc+b&&flag&e=&x=1=2&%6c=%&y=%2&z=%zz%&w=%ff";
        let expected = [
            ("lastEventId", "EPOCH-5"),
            ("a", "\u{fc} b"),
            ("flag", ""),
            ("e", ""),
            ("x", "1=2"),
            ("l", "%"),
            ("y", "%2"),
            ("z", "%zz%"),
            ("w", "\u{fffd}"),
        ];
        let pairs: Vec<_> = pairs(query).collect();
        assert_eq!(pairs, expected.map(|(name, value)| (Cow::Borrowed(name), Cow::Borrowed(value))));
        assert_eq!(super::pairs("").count(), 0);
    }

    #[test]
    fn no_text_makes_it_panic() {
        let mut random = fastrand::Rng::with_seed(5);
        for _ in 0..20_000 {
            let text: String = (0..random.usize(..12))
                .map(|_| *random.choice(&['%', '&', '=', '2', 'e', '+', '\u{e9}']).unwrap())
                .collect();
            pairs(&text).for_each(drop);
        }
    }
}
