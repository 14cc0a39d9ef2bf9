//! Parses header fields. Section numbers refer to RFC 9110 unless RFC 9111 is named.
//!
//! Names are compared in lower case, as [`Page::header`](super::Page::header) stores them.

use super::Header;

/// The default weight (12.4.2), in thousandths.
const FULL_WEIGHT: u16 = 1000;
/// Fields that describe the exact bytes of the body.
const OF_THESE_BYTES: [&[u8]; 6] =
    [b"content-encoding", b"content-range", b"content-md5", b"digest", b"content-digest", b"repr-digest"];
/// Types whose bytes are already compressed, in addition to images, audio and video.
const COMPRESSED_TYPES: [&[u8]; 16] = [
    b"application/gzip",
    b"application/x-gzip",
    b"application/zip",
    b"application/zstd",
    b"application/java-archive",
    b"application/vnd.rar",
    b"application/x-7z-compressed",
    b"application/x-brotli",
    b"application/x-bzip2",
    b"application/x-compress",
    b"application/x-rar-compressed",
    b"application/x-xz",
    b"application/font-woff",
    b"application/font-woff2",
    b"font/woff",
    b"font/woff2",
];

/// Returns the values of all fields with this name.
pub(super) fn values<'h>(headers: &'h [Header], name: &'h [u8]) -> impl Iterator<Item = &'h [u8]> {
    headers.iter().filter(move |(known, _)| known == name).map(|(_, value)| value.as_slice())
}

/// Returns the elements of a list (5.6.1), from all fields with this name.
///
/// A list is also split at commas inside quoted strings. This is safe for the uses in this file, because no element of the list is lost; at
/// worst, there are additional elements.
pub(super) fn elements<'h>(headers: &'h [Header], name: &'h [u8]) -> impl Iterator<Item = &'h [u8]> {
    values(headers, name).flat_map(split)
}

fn split(list: &[u8]) -> impl Iterator<Item = &[u8]> {
    list.split(|&byte| byte == b',').map(<[u8]>::trim_ascii).filter(|element| !element.is_empty())
}

/// Whether `Cache-Control` contains this directive, with or without an argument (RFC 9111 5.2).
pub(super) fn has_directive(headers: &[Header], directive: &[u8]) -> bool {
    elements(headers, b"cache-control").any(|element| {
        let name = element.split(|&byte| byte == b'=').next().unwrap_or(element);
        name.trim_ascii_end().eq_ignore_ascii_case(directive)
    })
}

/// Whether a list contains this element, or `*`.
pub(super) fn lists(headers: &[Header], name: &[u8], wanted: &[u8]) -> bool {
    elements(headers, name).any(|element| element == b"*" || element.eq_ignore_ascii_case(wanted))
}

/// Whether the body must not or should not be compressed.
pub(super) fn forbid_coding(headers: &[Header]) -> bool {
    headers.iter().any(|(name, _)| OF_THESE_BYTES.contains(&name.as_slice()))
        || has_directive(headers, b"no-transform")
        || values(headers, b"content-type").any(is_compressed)
}

/// Whether bytes of this type are already compressed.
fn is_compressed(content_type: &[u8]) -> bool {
    let media_type = content_type.split(|&byte| byte == b';').next().unwrap_or(content_type);
    let media_type = media_type.trim_ascii().to_ascii_lowercase();
    match media_type.split(|&byte| byte == b'/').next() {
        Some(b"image") => media_type != b"image/svg+xml",
        Some(b"audio" | b"video") => true,
        _ => {
            COMPRESSED_TYPES.contains(&media_type.as_slice())
                || media_type.ends_with(b"+zip")
                || media_type.ends_with(b"+gzip")
                || media_type.starts_with(b"application/vnd.openxmlformats-officedocument.")
                || media_type.starts_with(b"application/vnd.oasis.opendocument.")
        }
    }
}

/// Returns the names listed in `Connection`. The fields with these names apply to one connection only (7.6.1).
pub(super) fn connection_options(headers: &[Header]) -> Vec<Vec<u8>> {
    elements(headers, b"connection").map(<[u8]>::to_ascii_lowercase).collect()
}

/// Whether a field belongs to a connection or a single message rather than to a page (7.6.1, RFC 9111 3.1). This includes `Content-Length`,
/// because it differs between the encodings of the body.
pub(super) fn is_passing(name: &[u8], connection_options: &[Vec<u8>]) -> bool {
    matches!(
        name,
        b"connection" | b"content-length" | b"keep-alive" | b"te" | b"trailer" | b"transfer-encoding" | b"upgrade"
    ) || name.starts_with(b"proxy-")
        || connection_options.iter().any(|option| option == name)
}

/// Whether HTTP allows a stored name and value (5.1, 5.5), so that no header can terminate the header section.
pub(super) fn is_sound((name, value): &Header) -> bool {
    let in_name = |&byte: &u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"!#$%&'*+-.^_`|~".contains(&byte);
    let in_value = |&byte: &u8| byte == b'\t' || byte >= b' ' && byte != 0x7f;
    !name.is_empty() && name.iter().all(in_name) && value.iter().all(in_value)
}

/// Whether a client with this `Accept-Encoding` accepts gzip, with a weight that is not lower than the weight of identity (12.5.3).
pub(super) fn accepts_gzip(accept_encoding: &[u8]) -> bool {
    let (mut gzip, mut identity, mut others) = (None, None, None);
    for element in split(accept_encoding) {
        let mut parts = element.split(|&byte| byte == b';').map(<[u8]>::trim_ascii);
        let coding = parts.next().unwrap_or_default().to_ascii_lowercase();
        let known: &mut Option<u16> = match coding.as_slice() {
            b"gzip" | b"x-gzip" => &mut gzip, // equivalent (8.4.1.3)
            b"identity" => &mut identity,
            b"*" => &mut others,
            _ => continue,
        };
        let weight = parts.find_map(weight).unwrap_or(FULL_WEIGHT);
        // If a coding is listed twice, the lower weight applies, because it is never incorrect to send the plain body.
        *known = Some(known.map_or(weight, |known| known.min(weight)));
    }
    let gzip = gzip.or(others).unwrap_or(0);
    gzip > 0 && gzip >= identity.unwrap_or(0)
}

/// Returns the weight in `q=0.5`, in thousandths. Returns 0 if the weight is invalid, and `None` for a different parameter.
fn weight(parameter: &[u8]) -> Option<u16> {
    let (b'q' | b'Q', rest) = parameter.split_first()? else { return None };
    let value = rest.trim_ascii_start().strip_prefix(b"=")?.trim_ascii_start();
    let (&whole, rest) = value.split_first().unwrap_or((&b'0', &[]));
    let digits = rest.strip_prefix(b".").unwrap_or(rest);
    let is_number = (digits.is_empty() || digits.len() < rest.len()) && digits.iter().all(u8::is_ascii_digit);
    Some(match whole {
        b'1' if is_number && digits.iter().all(|&digit| digit == b'0') => FULL_WEIGHT,
        b'0' if is_number => {
            let thousandths = digits.iter().chain(b"000").take(3);
            thousandths.fold(0, |sum, digit| sum * 10 + u16::from(digit - b'0'))
        }
        _ => 0,
    })
}

/// Returns the text between the quotes of the entity tag at the start of `text` (8.8.3), weak or strong, and the rest of
/// `text`.
fn leading_tag(text: &[u8]) -> Option<(&[u8], &[u8])> {
    let quoted = text.strip_prefix(b"W/").unwrap_or(text).strip_prefix(b"\"")?;
    let end = quoted.iter().position(|&byte| byte <= b' ' || byte == b'"' || byte == 0x7f)?;
    let (tag, rest) = quoted.split_at_checked(end)?;
    Some((tag, rest.strip_prefix(b"\"")?))
}

/// Returns the text between the quotes of a field that consists of a single entity tag.
pub(super) fn tag(field: &[u8]) -> Option<&[u8]> {
    leading_tag(field.trim_ascii()).filter(|(_, rest)| rest.is_empty()).map(|(tag, _)| tag)
}

/// Whether an `If-None-Match` contains this tag, by weak comparison (13.1.2, 8.8.3.2). Tags may contain commas.
pub(super) fn names_tag(if_none_match: &[u8], wanted: &[u8]) -> bool {
    if if_none_match.trim_ascii() == b"*" {
        return true;
    }
    let mut rest = if_none_match;
    loop {
        while let Some((b',' | b' ' | b'\t', after)) = rest.split_first() {
            rest = after;
        }
        match leading_tag(rest) {
            Some((tag, _)) if tag == wanted => return true,
            Some((_, after)) => rest = after,
            None => return false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&str, &str)]) -> Vec<Header> {
        pairs.iter().map(|(name, value)| (name.as_bytes().to_vec(), value.as_bytes().to_vec())).collect()
    }

    #[test]
    fn gzip_goes_to_whom_it_is_acceptable() {
        for accepted in [
            "gzip",
            "GZIP",
            "x-gzip",
            "br, gzip;q=0.5",
            "br;q=1.0,gzip ; Q=0.001",
            "gzip;q=1.000",
            "*",
            "br, *;q=0.1",
            "identity;q=0.5, gzip",
            "identity, gzip",
            "*;q=0, gzip",
            ", gzip,,",
            "gzip;level=9",
            "identity;q=0, *",
        ] {
            assert!(accepts_gzip(accepted.as_bytes()), "{accepted:?}");
        }
        for refused in [
            "",
            "br",
            "identity",
            "gzip;q=0",
            "gzip;q=0.000",
            "x-gzip;q=0",
            "gzip;q=0, *",
            "*;q=0",
            "gzip; q = 0",
            "gzip;level=9;q=0",
            "gzip;q=0.5, identity",
            "gzip;q=nonsense",
            "gzip;q=2",
            "gzip;q=1.5",
            "gzip;q=",
            "gzip;q=05",
            "gzip, gzip;q=0",
            "gzipped",
            "br;q=1;gzip",
        ] {
            assert!(!accepts_gzip(refused.as_bytes()), "{refused:?}");
        }
    }

    #[test]
    fn weights_have_three_digits() {
        let cases = [("q=0.25", 250), ("q=0.9999", 999), ("Q=1", 1000), ("q=1.", 1000), ("q=0.", 0), ("q=0.x", 0)];
        for (text, expected) in cases {
            assert_eq!(weight(text.as_bytes()), Some(expected), "{text}");
        }
        assert_eq!((weight(b"level=9"), weight(b"quality=1"), weight(b"")), (None, None, None));
    }

    #[test]
    fn tags_are_compared_weakly_and_may_hold_commas() {
        for (list, found) in [
            (r#""a""#, true),
            (r#"W/"a""#, true),
            ("*", true),
            (" * ", true),
            (r#""b", "a""#, true),
            (r#""b" ,,W/"a","c""#, true),
            (r#""x, "a""#, false), // "x, " is not a tag: it contains a space
            (r#""b,c", "a""#, true),
            (r#""A""#, false),
            (r#"w/"a""#, false),
            ("a", false),
            (r#""b", a, "a""#, false),
            (r#""a"#, false),
            ("", false),
            (r#""b", *"#, false),
        ] {
            assert_eq!(names_tag(list.as_bytes(), b"a"), found, "{list}");
        }
        assert!(names_tag(br#""b,c""#, b"b,c"));
        assert_eq!((tag(br#" "a" "#), tag(br#"W/"""#)), (Some(&b"a"[..]), Some(&b""[..])));
        assert_eq!(tag(b"\"a b\""), None, "a tag holds no space");
        assert_eq!((tag(b"a"), tag(br#""a" "b""#), tag(br#""a"#)), (None, None, None));
    }

    #[test]
    fn fields_of_one_connection_do_not_last() {
        let options = connection_options(&headers(&[("connection", "close, X-Hop"), ("connection", "x-other")]));
        for name in [
            "connection",
            "keep-alive",
            "proxy-authenticate",
            "proxy-connection",
            "te",
            "trailer",
            "transfer-encoding",
            "upgrade",
            "content-length",
            "x-hop",
            "x-other",
        ] {
            assert!(is_passing(name.as_bytes(), &options), "{name}");
        }
        assert!(!is_passing(b"content-type", &options) && !is_passing(b"x-hop-2", &options));
        assert!(!is_passing(b"x-hop", &[]));
    }

    #[test]
    fn directives_have_arguments_and_capitals() {
        let control = headers(&[("cache-control", r#"max-age=5, Private="x, y""#), ("cache-control", "no-store")]);
        assert!(has_directive(&control, b"private") && has_directive(&control, b"no-store"));
        assert!(!has_directive(&control, b"no-cache") && !has_directive(&control, b"max"));
        let quoted = headers(&[("cache-control", r#"x="private""#)]);
        assert!(!has_directive(&quoted, b"private"));
    }

    #[test]
    fn compressed_types_are_known() {
        for yes in ["image/png", "Video/MP4", "audio/ogg; codecs=opus", "application/ZIP", "font/woff2", "a/epub+zip"] {
            assert!(is_compressed(yes.as_bytes()), "{yes}");
        }
        for no in ["image/svg+xml; charset=utf-8", "text/html", "application/json", "imagery/x", "", "font/ttf"] {
            assert!(!is_compressed(no.as_bytes()), "{no}");
        }
    }

    #[test]
    fn a_header_cannot_end_the_head() {
        for (name, value) in [("x", "a\r\nset-cookie: b"), ("x", "\0"), ("x:y", "a"), ("", "a"), ("X", "a"), ("ä", "a")]
        {
            assert!(!is_sound(&(name.into(), value.into())), "{name}: {value}");
        }
        assert!(is_sound(&("x-1_~".into(), "\t \u{e4}".into())) && is_sound(&("x".into(), "".into())));
    }
}
