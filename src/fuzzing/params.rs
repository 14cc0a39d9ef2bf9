//! Checks name-value pairs in both of their formats.

use bytes::Bytes;

use crate::protocol::params::Params;

/// Reads arbitrary bytes as pairs in both formats. If the bytes are accepted, the pairs are written and read again, and
/// must stay the same. If the bytes are rejected, an independent reader must reject them too.
///
/// # Panics
/// Panics if a check fails.
pub fn params(data: &[u8]) {
    let raw = Bytes::copy_from_slice(data);
    let lengths = Params::parse(raw.clone());
    assert_eq!(lengths.is_some(), ends_with_a_pair(data), "read twice");
    if let Some(params) = &lengths {
        check(params);
        let bytes: usize = params.iter().map(|(name, value)| name.len() + value.len() + 2).sum();
        assert!(bytes <= data.len(), "there are no more bytes than came");
    }
    let strings = Params::from_strings(raw);
    let nuls = data.iter().filter(|&&byte| byte == 0).count();
    assert_eq!(strings.is_some(), data.last().is_none_or(|&last| last == 0) && nuls % 2 == 0);
    if let Some(params) = &strings {
        check(params);
        let mut rest = data;
        for part in params.iter().flat_map(|(name, value)| [name, value]) {
            let (string, after) = rest.split_at(part.len());
            assert!(string == part && after.first() == Some(&0), "the strings are those that came");
            rest = &after[1..];
        }
        assert!(rest.is_empty(), "all of them");
    }
}

/// Checks the properties of all pairs, in either format.
fn check(params: &Params) {
    let copy = Params::from_pairs(params.iter());
    assert!(copy.iter().eq(params.iter()), "written and read again");
    let Some((name, value)) = params.iter().last() else { return };
    assert_eq!(params.share(value), value);
    if let Ok(name) = std::str::from_utf8(name) {
        assert_eq!(params.get(name), Some(value), "of several the last");
    }
}

/// Whether the bytes end at the end of a pair. This independent reader of lengths (FastCGI 3.4) counts in 64 bits.
fn ends_with_a_pair(data: &[u8]) -> bool {
    let mut at = 0_u64;
    let end = data.len() as u64;
    let byte = |at: u64| data.get(usize::try_from(at).unwrap_or(usize::MAX)).map(|&byte| u64::from(byte));
    while at < end {
        let mut pair = 0;
        for _ in 0..2 {
            let Some(first) = byte(at) else { return false };
            if first < 128 {
                (at, pair) = (at + 1, pair + first);
                continue;
            }
            let (Some(second), Some(third), Some(fourth)) = (byte(at + 1), byte(at + 2), byte(at + 3)) else {
                return false;
            };
            (at, pair) = (at + 4, pair + ((first - 128) << 24) + (second << 16) + (third << 8) + fourth);
        }
        at += pair;
    }
    at == end
}
