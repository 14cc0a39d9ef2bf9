//! Decodes the header of the PROXY protocol, versions 1 and 2 (HAProxy's `proxy-protocol.txt`): the
//! load balancer in front reports the peer of a connection in the connection's first bytes.
//!
//! The caller decides whether to trust the header. Section numbers refer to that text.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// Maximum length of a version 1 header, CRLF included (2.1).
const LONGEST_V1: usize = 107;
/// Maximum length of a version 2 header, a limit of this implementation: section 2.2 would allow 64 KiB. Addresses take up to
/// 232 bytes; the rest is for extensions (TLVs).
const LONGEST_V2: usize = 4096;
const START_V1: &[u8] = b"PROXY ";
const START_V2: &[u8; 12] = b"\r\n\r\n\0\r\nQUIT\n";
/// The TLV that describes TLS (2.2.6).
const TYPE_SSL: u8 = 0x20;
/// The flag in [`TYPE_SSL`] for a client that uses TLS.
const CLIENT_SSL: u8 = 1;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    /// Length of the header in bytes.
    pub(crate) length: usize,
    pub(crate) source: Source,
    /// Whether the client uses TLS on its connection to the sender.
    pub(crate) is_tls: bool,
}

/// The source of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// The peer of the connection itself: in a health check (LOCAL), or if the sender has no other information
    /// (UNKNOWN, UNSPEC).
    Itself,
    Inet(SocketAddr),
    /// A Unix socket on the sender's machine.
    Unix,
}

/// The first bytes of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Opening {
    Header(Header),
    /// Possibly the beginning of a header.
    Incomplete,
    /// Not a header.
    Other,
}

/// Why a header is malformed. The sender is at fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ProxyError {
    TooLong,
    Malformed,
    Unknown,
}

impl fmt::Display for ProxyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::TooLong => "the PROXY header is too long",
            Self::Malformed => "the PROXY header is malformed",
            Self::Unknown => "the PROXY header has an unknown version, command or family",
        })
    }
}

impl std::error::Error for ProxyError {}

/// Decodes the first bytes of a connection.
///
/// # Errors
/// Returns [`ProxyError`] if the bytes begin like a header but are not a valid one.
pub(crate) fn decode(bytes: &[u8]) -> Result<Opening, ProxyError> {
    if bytes.starts_with(START_V1) {
        return version_1(bytes);
    }
    if let Some(rest) = bytes.strip_prefix(START_V2) {
        return version_2(rest);
    }
    let begins = START_V1.starts_with(bytes) || START_V2.starts_with(bytes);
    Ok(if begins { Opening::Incomplete } else { Opening::Other })
}

fn version_1(bytes: &[u8]) -> Result<Opening, ProxyError> {
    let window = bytes.get(..LONGEST_V1).unwrap_or(bytes);
    let Some(end) = window.windows(2).position(|pair| pair == b"\r\n") else {
        return if bytes.len() < LONGEST_V1 { Ok(Opening::Incomplete) } else { Err(ProxyError::TooLong) };
    };
    let line = window.get(START_V1.len()..end).ok_or(ProxyError::Malformed)?;
    let line = std::str::from_utf8(line).map_err(|_| ProxyError::Malformed)?;
    let source = match line.split(' ').collect::<Vec<_>>()[..] {
        ["UNKNOWN", ..] => Source::Itself,
        ["TCP4", source, destination, port, to_port] => {
            destination.parse::<Ipv4Addr>().map_err(|_| ProxyError::Malformed)?;
            text_port(to_port)?;
            Source::Inet((source.parse::<Ipv4Addr>().map_err(|_| ProxyError::Malformed)?, text_port(port)?).into())
        }
        ["TCP6", source, destination, port, to_port] => {
            destination.parse::<Ipv6Addr>().map_err(|_| ProxyError::Malformed)?;
            text_port(to_port)?;
            Source::Inet((source.parse::<Ipv6Addr>().map_err(|_| ProxyError::Malformed)?, text_port(port)?).into())
        }
        _ => return Err(ProxyError::Malformed),
    };
    Ok(Opening::Header(Header { length: end + 2, source, is_tls: false }))
}

/// Parses a port in decimal, without a sign or leading zeros.
fn text_port(text: &str) -> Result<u16, ProxyError> {
    let port = text.parse().map_err(|_| ProxyError::Malformed)?;
    if text.starts_with('+') || (text.len() > 1 && text.starts_with('0')) {
        return Err(ProxyError::Malformed);
    }
    Ok(port)
}

/// Decodes a version 2 header. `rest` is the part after the signature.
fn version_2(rest: &[u8]) -> Result<Opening, ProxyError> {
    // An invalid first byte is reported without waiting for the remaining bytes.
    if rest.first().is_some_and(|first| !matches!(first, 0x20 | 0x21)) {
        return Err(ProxyError::Unknown);
    }
    let Some((&[command, family, high, low], rest)) = rest.split_first_chunk() else { return Ok(Opening::Incomplete) };
    let announced = usize::from(u16::from_be_bytes([high, low]));
    let length = START_V2.len() + 4 + announced;
    if length > LONGEST_V2 {
        return Err(ProxyError::TooLong);
    }
    let Some(rest) = rest.get(..announced) else { return Ok(Opening::Incomplete) };
    if command == 0x20 {
        // LOCAL: the remainder of the header must be skipped.
        return Ok(Opening::Header(Header { length, source: Source::Itself, is_tls: false }));
    }
    // The address block: source, destination and, for internet addresses, their ports.
    let (source, additions) = match family {
        0x00 => return Ok(Opening::Header(Header { length, source: Source::Itself, is_tls: false })),
        0x11 => {
            let (block, additions) = rest.split_first_chunk::<12>().ok_or(ProxyError::Malformed)?;
            let [a, b, c, d, _, _, _, _, high, low, _, _] = *block;
            let address = IpAddr::V4(Ipv4Addr::new(a, b, c, d));
            (Source::Inet((address, u16::from_be_bytes([high, low])).into()), additions)
        }
        0x21 => {
            let (block, additions) = rest.split_first_chunk::<36>().ok_or(ProxyError::Malformed)?;
            let (address, others) = block.split_first_chunk::<16>().ok_or(ProxyError::Malformed)?;
            let (_, ports) = others.split_first_chunk::<16>().ok_or(ProxyError::Malformed)?;
            let (port, _) = ports.split_first_chunk::<2>().ok_or(ProxyError::Malformed)?;
            (Source::Inet((Ipv6Addr::from(*address), u16::from_be_bytes(*port)).into()), additions)
        }
        0x31 => (Source::Unix, rest.get(216..).ok_or(ProxyError::Malformed)?),
        _ => return Err(ProxyError::Unknown),
    };
    Ok(Opening::Header(Header { length, source, is_tls: tells_tls(additions)? }))
}

/// Reads the TLVs (2.2) to find out whether the client uses TLS. A CRC-32C checksum is not verified, because TCP has
/// already protected the data.
fn tells_tls(mut rest: &[u8]) -> Result<bool, ProxyError> {
    let mut is_tls = false;
    while let Some((&[kind, high, low], tail)) = rest.split_first_chunk() {
        let length = usize::from(u16::from_be_bytes([high, low]));
        let value = tail.get(..length).ok_or(ProxyError::Malformed)?;
        if kind == TYPE_SSL {
            is_tls = value.first().ok_or(ProxyError::Malformed)? & CLIENT_SSL != 0;
        }
        rest = tail.get(length..).ok_or(ProxyError::Malformed)?;
    }
    if rest.is_empty() { Ok(is_tls) } else { Err(ProxyError::Malformed) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn v2(command: u8, family: u8, block: &[u8]) -> Vec<u8> {
        let length = u16::try_from(block.len()).unwrap().to_be_bytes();
        [&START_V2[..], &[command, family], &length, block].concat()
    }

    const V4: [u8; 12] = [192, 0, 2, 7, 192, 0, 2, 1, 0x12, 0x67, 0, 80];

    fn header(bytes: &[u8], source: Source, is_tls: bool) -> Opening {
        Opening::Header(Header { length: bytes.len(), source, is_tls })
    }

    fn good() -> Vec<(Vec<u8>, Source, bool)> {
        let inet = |text: &str| Source::Inet(text.parse().unwrap());
        let v6: Ipv6Addr = "2001:db8::7".parse().unwrap();
        let block_v6 = [&v6.octets()[..], &[0; 16], &[0x12, 0x67, 0, 80]].concat();
        let ssl = [&V4[..], &[0x01, 0, 2, b'h', b'2'], &[TYPE_SSL, 0, 5, 1, 0, 0, 0, 0]].concat();
        let no_ssl = [&V4[..], &[TYPE_SSL, 0, 5, 2, 0, 0, 0, 0]].concat();
        let bad_checksum = [&V4[..], &[0x03, 0, 4, 1, 2, 3, 4]].concat();
        vec![
            (b"PROXY TCP4 192.0.2.7 192.0.2.1 4711 80\r\n".to_vec(), inet("192.0.2.7:4711"), false),
            (b"PROXY TCP6 2001:db8::7 ::1 4711 80\r\n".to_vec(), inet("[2001:db8::7]:4711"), false),
            (b"PROXY UNKNOWN\r\n".to_vec(), Source::Itself, false),
            (b"PROXY UNKNOWN ffff::1 what ever\r\n".to_vec(), Source::Itself, false),
            (v2(0x21, 0x11, &V4), inet("192.0.2.7:4711"), false),
            (v2(0x21, 0x21, &block_v6), inet("[2001:db8::7]:4711"), false),
            (v2(0x21, 0x31, &[b'x'; 216]), Source::Unix, false),
            (v2(0x21, 0x00, b"ignored"), Source::Itself, false),
            (v2(0x20, 0x11, &V4), Source::Itself, false),
            (v2(0x20, 0xff, b""), Source::Itself, false),
            (v2(0x21, 0x11, &ssl), inet("192.0.2.7:4711"), true),
            (v2(0x21, 0x11, &no_ssl), inet("192.0.2.7:4711"), false),
            (v2(0x21, 0x11, &bad_checksum), inet("192.0.2.7:4711"), false),
        ]
    }

    #[test]
    fn a_header_is_read_wherever_it_is_cut() {
        for (bytes, source, is_tls) in good() {
            for cut in 0..bytes.len() {
                assert_eq!(decode(&bytes[..cut]), Ok(Opening::Incomplete), "{bytes:?} cut at {cut}");
            }
            let whole = header(&bytes, source, is_tls);
            assert_eq!(decode(&bytes), Ok(whole), "{bytes:?}");
            let followed = [&bytes[..], b"GET / HTTP/1.1\r\n"].concat();
            assert_eq!(decode(&followed), Ok(whole), "{bytes:?}");
        }
    }

    #[test]
    fn anything_else_is_left_alone() {
        for other in [&b"GET / HTTP/1.1"[..], b"PRI * HTTP/2.0", b"POST /", b"PROXYING", b"\x01\x01\0\x01", b"\r\nGET"]
        {
            assert_eq!(decode(other), Ok(Opening::Other), "{other:?}");
        }
    }

    #[test]
    fn a_header_that_makes_no_sense_is_an_error() {
        for line in [
            "PROXY \r\n",
            "PROXY TCP5 192.0.2.7 192.0.2.1 4711 80\r\n",
            "PROXY TCP4 192.0.2.7 192.0.2.1 4711\r\n",
            "PROXY TCP4 192.0.2.7 192.0.2.1 4711 80 \r\n",
            "PROXY TCP4  192.0.2.7 192.0.2.1 4711 80\r\n",
            "PROXY TCP4 192.0.2.7 192.0.2.1 04711 80\r\n",
            "PROXY TCP4 192.0.2.7 192.0.2.1 +4711 80\r\n",
            "PROXY TCP4 192.0.2.7 192.0.2.1 65536 80\r\n",
            "PROXY TCP4 192.0.2.7 nowhere 4711 80\r\n",
            "PROXY TCP4 192.0.2.07 192.0.2.1 4711 80\r\n",
            "PROXY TCP4 2001:db8::7 ::1 4711 80\r\n",
            "PROXY TCP6 192.0.2.7 192.0.2.1 4711 80\r\n",
            "PROXY tcp4 192.0.2.7 192.0.2.1 4711 80\r\n",
        ] {
            assert_eq!(decode(line.as_bytes()), Err(ProxyError::Malformed), "{line:?}");
        }
        for (command, family) in [(0x11, 0x11), (0x22, 0x11), (0x21, 0x12), (0x21, 0x41), (0x21, 0x01)] {
            assert_eq!(decode(&v2(command, family, &[0; 216])), Err(ProxyError::Unknown), "{command:x} {family:x}");
        }
        for (family, size) in [(0x11, 11), (0x21, 35), (0x31, 215)] {
            assert_eq!(decode(&v2(0x21, family, &vec![0; size])), Err(ProxyError::Malformed), "{family:x}");
        }
        for additions in [&[0x01_u8][..], &[0x01, 0], &[0x01, 0, 2, b'h'], &[TYPE_SSL, 0, 0]] {
            assert_eq!(
                decode(&v2(0x21, 0x11, &[&V4[..], additions].concat())),
                Err(ProxyError::Malformed),
                "{additions:?}"
            );
        }
    }

    #[test]
    fn a_header_that_does_not_end_is_not_waited_for() {
        let line = format!("PROXY UNKNOWN {}", "x".repeat(LONGEST_V1));
        for length in [LONGEST_V1, line.len()] {
            assert_eq!(decode(&line.as_bytes()[..length]), Err(ProxyError::TooLong));
        }
        let longest = format!("PROXY UNKNOWN {}\r\n", "x".repeat(LONGEST_V1 - 16));
        assert_eq!(decode(longest.as_bytes()), Ok(header(longest.as_bytes(), Source::Itself, false)));
        let ended_late = format!("PROXY UNKNOWN {}\r\n", "x".repeat(LONGEST_V1 - 15));
        assert_eq!(decode(ended_late.as_bytes()), Err(ProxyError::TooLong));

        let largest = [&V4[..], &[0xEE, 0x0F, 0xE1], &[0; 4096 - 16 - 12 - 3]].concat();
        let inet = Source::Inet("192.0.2.7:4711".parse().unwrap());
        let bytes = v2(0x21, 0x11, &largest);
        assert_eq!(decode(&bytes), Ok(header(&bytes, inet, false)));
        assert_eq!(
            decode(&v2(0x21, 0x11, &[0; 65535])[..16]),
            Err(ProxyError::TooLong),
            "no more than the length is needed"
        );
    }
}
