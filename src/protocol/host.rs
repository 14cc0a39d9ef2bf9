//! Validates a `Host` (RFC 9112, section 3.2), for every protocol and for the headers of proxies.

use std::net::Ipv6Addr;

use super::grammar::parse_digits;

/// Whether this is a host with or without a port (RFC 3986, sections 3.2.2 and 3.2.3), or empty, as in a request whose
/// URI has no authority. Neither `userinfo@` nor a port without a host is allowed.
pub(crate) fn is_host(host: &[u8]) -> bool {
    // Nearly all values are a plain name, with or without a port.
    let plain = host.iter().take_while(|byte| is_plain(**byte)).count();
    match host.split_at(plain) {
        (_, []) => true,
        ([], [b'[', rest @ ..]) => {
            let Some(end) = rest.iter().position(|&byte| byte == b']') else { return false };
            let (literal, after) = rest.split_at(end);
            is_ip_literal(literal) && after.get(1..).is_some_and(is_after_name)
        }
        ([], [b':', ..]) => false,
        (_, rest) => is_after_name(after_registered_name(rest)),
    }
}

/// Whether `rest` is empty or a port.
fn is_after_name(rest: &[u8]) -> bool {
    match rest {
        [] => true,
        [b':', port @ ..] => is_port(port),
        _ => false,
    }
}

/// Whether the text is a port: digits, possibly none, up to TCP's highest port.
fn is_port(port: &[u8]) -> bool {
    port.is_empty() || parse_digits(port).is_some_and(|number| number <= u64::from(u16::MAX))
}

/// Whether the text is an IPv6 address, or an address of a future IP version.
fn is_ip_literal(literal: &[u8]) -> bool {
    match literal {
        [b'v' | b'V', future @ ..] => {
            let mut sides = future.splitn(2, |&byte| byte == b'.');
            let (version, address) = (sides.next().unwrap_or_default(), sides.next().unwrap_or_default());
            let is_version = !version.is_empty() && version.iter().all(u8::is_ascii_hexdigit);
            is_version && !address.is_empty() && address.iter().all(|&byte| is_plain(byte) || byte == b':')
        }
        address => std::str::from_utf8(address).is_ok_and(|address| address.parse::<Ipv6Addr>().is_ok()),
    }
}

/// Skips a name or an IPv4 address (plain characters, and percent-encoded others) and returns the
/// rest.
fn after_registered_name(mut name: &[u8]) -> &[u8] {
    loop {
        name = match name {
            [b'%', high, low, rest @ ..] if high.is_ascii_hexdigit() && low.is_ascii_hexdigit() => rest,
            [byte, rest @ ..] if is_plain(*byte) => rest,
            rest => return rest,
        };
    }
}

/// Whether a byte is one of `unreserved` and `sub-delims` of RFC 3986. This is a table lookup, because every byte of
/// every `Host` is checked.
fn is_plain(byte: u8) -> bool {
    /// One bit for each ASCII character.
    const PLAIN: u128 = {
        let (mut bits, mut byte) = (0, 0_u8);
        while byte < 0x80 {
            let is_unreserved = byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~');
            let is_delimiter =
                matches!(byte, b'!' | b'$' | b'&' | b'\'' | b'(' | b')' | b'*' | b'+' | b',' | b';' | b'=');
            if is_unreserved || is_delimiter {
                bits |= 1 << byte;
            }
            byte += 1;
        }
        bits
    };
    PLAIN.checked_shr(u32::from(byte)).is_some_and(|bits| bits & 1 == 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_is_a_name_or_an_address_and_a_port() {
        for host in [
            "",
            "a",
            "a.example",
            "a.example:80",
            "a:",
            "a:0",
            "a:65535",
            "a:00080",
            "a_b",
            "xn--a",
            "%C3%BC.example:8080",
            "a,b;c=d",
            "192.0.2.7:80",
            "[::1]",
            "[::1]:",
            "[2001:db8::7]:4711",
            "[::ffff:192.0.2.7]",
            "[v1.a:b]",
        ] {
            assert!(is_host(host.as_bytes()), "{host:?}");
        }
        for host in [
            ":80",
            ":",
            "a:b",
            "a:99999",
            "a:65536",
            "a:+80",
            "a:-1",
            "a:8 0",
            "a:1:2",
            "::1",
            "[::1",
            "::1]",
            "[]",
            "[x]",
            "[x]:80",
            "[::1]:80:80",
            "[::1]80",
            "[::1]a",
            "[192.0.2.7]",
            "[fe80::1%25lo]",
            "[v.a]",
            "[v1.]",
            "[vg.a]",
            "%zz",
            "a%",
            "a%4",
            "a b",
            "a\tb",
            "a/b",
            "a\\b",
            "user@a",
            "a?b",
            "a#b",
            "<a>",
            "a\"",
            "\u{fc}",
            "a\0",
        ] {
            assert!(!is_host(host.as_bytes()), "{host:?}");
        }
    }
}
