//! Parses the `Range` header (RFC 9110, section 14.2; pure).
//!
//! A header that is invalid, in another unit, or asks for more than the whole file or for more than [`MAX_RANGES`] parts,
//! is ignored: the client receives the whole file. The sum of all parts never exceeds the size of the file, so a small
//! request cannot cause a response of many times the file's size.

use crate::protocol::grammar::parse_digits;

/// Maximum number of parts in a response.
pub(super) const MAX_RANGES: usize = 16;

/// A part of a file that is not empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ByteRange {
    pub(super) start: u64,
    /// The position after the last byte.
    pub(super) end: u64,
}

impl ByteRange {
    pub(super) fn length(self) -> u64 {
        self.end - self.start
    }

    /// Returns the value of `Content-Range`.
    pub(super) fn content_range(self, total: u64) -> String {
        format!("bytes {}-{}/{total}", self.start, self.end - 1)
    }
}

/// What a `Range` header asks for.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Requested {
    /// The header is ignored.
    Whole,
    Ranges(Vec<ByteRange>),
    /// No range overlaps the file.
    Unsatisfiable,
}

/// Parses the value of a `Range` header for a file of this length.
pub(super) fn requested(header: &[u8], total: u64) -> Requested {
    match parse(header, total) {
        // An empty file has no part. Clients that always ask for a range receive the empty file.
        _ if total == 0 => Requested::Whole,
        Some(ranges) if ranges.is_empty() => Requested::Unsatisfiable,
        Some(ranges) => {
            let sum = ranges.iter().try_fold(0_u64, |sum, range| sum.checked_add(range.length()));
            let is_small = sum.is_some_and(|sum| sum <= total) && ranges.len() <= MAX_RANGES;
            if is_small { Requested::Ranges(ranges) } else { Requested::Whole }
        }
        None => Requested::Whole,
    }
}

/// Returns the ranges that overlap the file, or `None` if the header is invalid.
fn parse(header: &[u8], total: u64) -> Option<Vec<ByteRange>> {
    let (unit, set) = header.split_at_checked(header.iter().position(|&byte| byte == b'=')?)?;
    if !unit.eq_ignore_ascii_case(b"bytes") {
        return None;
    }
    let mut ranges = Vec::new();
    let mut is_empty = true;
    for spec in set.get(1..)?.split(|&byte| byte == b',').map(<[u8]>::trim_ascii).filter(|spec| !spec.is_empty()) {
        is_empty = false;
        let (first, last) = spec.split_at_checked(spec.iter().position(|&byte| byte == b'-')?)?;
        let last = last.get(1..)?;
        let range = match (number(first)?, number(last)?) {
            (None, None) => return None,
            (None, Some(length)) => ByteRange { start: total.saturating_sub(length), end: total },
            (Some(first), None) => ByteRange { start: first, end: total },
            (Some(first), Some(last)) if last < first => return None,
            (Some(first), Some(last)) => ByteRange { start: first, end: last.saturating_add(1).min(total) },
        };
        if range.start < range.end {
            ranges.push(range);
        }
    }
    (!is_empty).then_some(ranges)
}

/// Parses an optional number; the outer `None` means that it is invalid. A number that does not fit is beyond every file.
fn number(text: &[u8]) -> Option<Option<u64>> {
    if text.is_empty() {
        return Some(None);
    }
    let is_number = text.iter().all(u8::is_ascii_digit);
    is_number.then(|| Some(parse_digits(text).unwrap_or(u64::MAX)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ranges(header: &str) -> Requested {
        requested(header.as_bytes(), 1000)
    }

    #[test]
    fn ranges_are_cut_at_the_end_of_the_file() {
        for (header, expected) in [
            ("bytes=0-499", &[(0, 500)][..]),
            ("bytes=500-", &[(500, 1000)]),
            ("bytes=-500", &[(500, 1000)]),
            ("bytes=-5000", &[(0, 1000)]),
            ("bytes=999-99999999999999999999999", &[(999, 1000)]),
            ("bytes=0-18446744073709551615", &[(0, 1000)]),
            ("Bytes=0-0,-1", &[(0, 1), (999, 1000)]),
            ("bytes= 0-0 , 2000-, 5-5,", &[(0, 1), (5, 6)]),
            ("bytes=5-6,0-1", &[(5, 7), (0, 2)]),
        ] {
            let expected = expected.iter().map(|&(start, end)| ByteRange { start, end }).collect();
            assert_eq!(ranges(header), Requested::Ranges(expected), "{header}");
        }
    }

    #[test]
    fn ranges_beyond_the_file_cannot_be_satisfied() {
        for header in ["bytes=1000-", "bytes=1000-2000", "bytes=-0", "bytes=99999999999999999999-,5000-"] {
            assert_eq!(ranges(header), Requested::Unsatisfiable, "{header}");
        }
    }

    #[test]
    fn an_invalid_or_expensive_header_is_ignored() {
        let many = format!("bytes={}", "0-0,".repeat(MAX_RANGES + 1));
        for header in [
            "",
            "bytes",
            "bytes=",
            "bytes=,",
            "bytes=-",
            "bytes=a-b",
            "bytes=5-4",
            "bytes=0-1-2",
            "bytes=+1-2",
            "bytes=0x1-2",
            "bytes=1 -2",
            "items=0-1",
            "bytes=0-1,x",
            "bytes=0-999,0-0",
            "bytes=0-,-1000",
            &many,
        ] {
            assert_eq!(ranges(header), Requested::Whole, "{header}");
        }
        assert_eq!(requested(b"bytes=0-0", 0), Requested::Whole);
        assert_eq!(requested(b"bytes=-1", 0), Requested::Whole);
    }
}
