//! Decides between the possible responses for a file: the whole file, parts of it, 304, 412 or 416 (RFC 9110, sections
//! 13.2.2 and 14.2; pure).

use std::time::{Duration, SystemTime};

use http::Method;
use http::header::{self, HeaderMap, HeaderName, HeaderValue};

use super::coding::Coding;
use super::ranges::{self, ByteRange, Requested};
use crate::gateway::beneath::Version;

/// The first second of the year 10000, which HTTP cannot express.
const END_OF_TIME: u64 = 253_402_300_800;

/// The validators of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Validators {
    /// A strong entity tag, with its quotes.
    pub(super) etag: String,
    /// `None` if HTTP cannot express the time.
    pub(super) last_modified: Option<SystemTime>,
}

impl Validators {
    /// The tag contains the time of the last modification and the length, as nginx's does, and the nanoseconds.
    pub(super) fn of(version: Version, coding: Option<Coding>) -> Self {
        let Version { length, seconds, nanoseconds } = version;
        let suffix = coding.map_or("", Coding::suffix);
        let seconds_since = u64::try_from(seconds).ok().filter(|&seconds| seconds < END_OF_TIME);
        Self {
            etag: format!("\"{seconds:x}.{nanoseconds:x}-{length:x}{suffix}\""),
            last_modified: seconds_since.map(|seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)),
        }
    }

    /// Returns the value of `Last-Modified`.
    pub(super) fn last_modified(&self) -> Option<HeaderValue> {
        HeaderValue::try_from(httpdate::fmt_http_date(self.last_modified?)).ok()
    }
}

/// The response for a file.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Plan {
    Whole,
    Parts(Vec<ByteRange>),
    NotModified,
    PreconditionFailed,
    Unsatisfiable,
}

/// Whether a request contains headers that this module evaluates.
pub(super) fn are_given(headers: &HeaderMap) -> bool {
    let names = [
        header::IF_MATCH,
        header::IF_NONE_MATCH,
        header::IF_MODIFIED_SINCE,
        header::IF_UNMODIFIED_SINCE,
        header::RANGE,
    ];
    names.iter().any(|name| headers.contains_key(name))
}

/// Returns the response to a request for a file of this length. Only GET and HEAD have conditions here.
pub(super) fn plan(method: &Method, headers: &HeaderMap, validators: &Validators, length: u64) -> Plan {
    if !matches!(*method, Method::GET | Method::HEAD) {
        return Plan::Whole;
    }
    let is_given = |name: &HeaderName| headers.contains_key(name);
    if is_given(&header::IF_MATCH) {
        if !lists(headers, &header::IF_MATCH, &validators.etag, Comparison::Strong) {
            return Plan::PreconditionFailed;
        }
    } else if let (Some(limit), Some(modified)) =
        (date(headers, &header::IF_UNMODIFIED_SINCE), validators.last_modified)
        && modified > limit
    {
        return Plan::PreconditionFailed;
    }
    if is_given(&header::IF_NONE_MATCH) {
        if lists(headers, &header::IF_NONE_MATCH, &validators.etag, Comparison::Weak) {
            return Plan::NotModified;
        }
    } else if let (Some(limit), Some(modified)) = (date(headers, &header::IF_MODIFIED_SINCE), validators.last_modified)
        && modified <= limit
    {
        return Plan::NotModified;
    }
    match single(headers, &header::RANGE) {
        // Ranges are defined for GET only (section 14.2).
        Some(range) if *method == Method::GET && is_still_valid(headers, validators) => {
            match ranges::requested(range, length) {
                Requested::Whole => Plan::Whole,
                Requested::Ranges(parts) => Plan::Parts(parts),
                Requested::Unsatisfiable => Plan::Unsatisfiable,
            }
        }
        Some(_) | None => Plan::Whole,
    }
}

/// Whether `If-Range` allows a partial response (section 13.1.5).
fn is_still_valid(headers: &HeaderMap, validators: &Validators) -> bool {
    if !headers.contains_key(header::IF_RANGE) {
        return true;
    }
    match single(headers, &header::IF_RANGE) {
        Some(tag) if tag.starts_with(b"\"") => tag == validators.etag.as_bytes(),
        Some(_) => validators.last_modified.is_some() && date(headers, &header::IF_RANGE) == validators.last_modified,
        None => false,
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Comparison {
    Strong,
    Weak,
}

/// Whether a header lists this entity tag, or is `*`. A tag may contain commas.
fn lists(headers: &HeaderMap, name: &HeaderName, etag: &str, comparison: Comparison) -> bool {
    headers.get_all(name).iter().any(|value| {
        let mut rest = value.as_bytes().trim_ascii();
        if rest == b"*" {
            return true;
        }
        loop {
            while let [b',' | b' ' | b'\t', tail @ ..] = rest {
                rest = tail;
            }
            let opaque = rest.strip_prefix(b"W/");
            let is_weak = opaque.is_some();
            let opaque = opaque.unwrap_or(rest);
            let end = opaque.strip_prefix(b"\"").and_then(|tail| tail.iter().position(|&byte| byte == b'"'));
            let Some((tag, tail)) = end.and_then(|end| opaque.split_at_checked(end + 2)) else { return false };
            if tag == etag.as_bytes() && !(is_weak && comparison == Comparison::Strong) {
                return true;
            }
            rest = tail;
        }
    })
}

/// Returns the value of a header that is given once.
fn single<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a [u8]> {
    let mut values = headers.get_all(name).iter();
    let value = values.next()?.as_bytes().trim_ascii();
    values.next().is_none().then_some(value)
}

/// Returns the date in a header. An invalid date is ignored (section 13.1.3).
fn date(headers: &HeaderMap, name: &HeaderName) -> Option<SystemTime> {
    httpdate::parse_http_date(std::str::from_utf8(single(headers, name)?).ok()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const VERSION: Version = Version { length: 1000, seconds: 784_111_777, nanoseconds: 5 };
    const TAG: &str = "\"2ebc98a1.5-3e8\"";
    const DATE: &str = "Sun, 06 Nov 1994 08:49:37 GMT";
    const BEFORE: &str = "Sun, 06 Nov 1994 08:49:36 GMT";
    const AFTER: &str = "Sunday, 06-Nov-94 08:49:38 GMT"; // the obsolete form of RFC 850

    fn decided(method: Method, pairs: &[(&'static str, &str)]) -> Plan {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(*name, HeaderValue::from_str(value).unwrap());
        }
        plan(&method, &headers, &Validators::of(VERSION, None), VERSION.length)
    }

    fn parts(start: u64, end: u64) -> Plan {
        Plan::Parts(vec![ByteRange { start, end }])
    }

    #[test]
    fn a_file_has_two_validators() {
        let validators = Validators::of(VERSION, None);
        assert_eq!(validators.etag, TAG);
        assert_eq!(validators.last_modified().unwrap(), DATE);
        assert_eq!(Validators::of(VERSION, Some(Coding::Gzip)).etag, "\"2ebc98a1.5-3e8.gz\"");
        for seconds in [-1, i64::MIN, i64::MAX, 253_402_300_800] {
            let validators = Validators::of(Version { seconds, ..VERSION }, None);
            assert_eq!(validators.last_modified(), None, "{seconds}");
            assert!(HeaderValue::try_from(validators.etag).is_ok());
        }
        assert!(Validators::of(Version { seconds: 253_402_300_799, ..VERSION }, None).last_modified().is_some());
    }

    #[test]
    fn a_known_version_is_not_sent_again() {
        let weak = format!("W/{TAG}");
        let list = format!("\"a,b\", {weak} , \"c\"");
        for pairs in [
            &[("if-none-match", TAG)][..],
            &[("if-none-match", &weak)],
            &[("if-none-match", &list)],
            &[("if-none-match", "*")],
            &[("if-none-match", "\"x\""), ("if-none-match", TAG)],
            &[("if-none-match", TAG), ("if-modified-since", BEFORE)],
            &[("if-modified-since", DATE)],
            &[("if-modified-since", AFTER)],
            &[("if-none-match", TAG), ("range", "bytes=0-0")],
        ] {
            assert_eq!(decided(Method::GET, pairs), Plan::NotModified, "{pairs:?}");
            assert_eq!(decided(Method::HEAD, pairs), Plan::NotModified, "{pairs:?}");
            assert_eq!(decided(Method::POST, pairs), Plan::Whole, "{pairs:?}");
        }
        for pairs in [
            &[][..],
            &[("if-none-match", "\"x\"")],
            &[("if-none-match", "x")],
            &[("if-none-match", &TAG[..TAG.len() - 1])],
            &[("if-none-match", "\"x\""), ("if-modified-since", AFTER)],
            &[("if-modified-since", BEFORE)],
            &[("if-modified-since", "yesterday")],
        ] {
            assert_eq!(decided(Method::GET, pairs), Plan::Whole, "{pairs:?}");
        }
    }

    #[test]
    fn a_precondition_can_fail() {
        let weak = format!("W/{TAG}");
        for pairs in [
            &[("if-match", "\"x\"")][..],
            &[("if-match", &weak)],
            &[("if-unmodified-since", BEFORE)],
            &[("if-match", "\"x\""), ("if-none-match", TAG)],
        ] {
            assert_eq!(decided(Method::GET, pairs), Plan::PreconditionFailed, "{pairs:?}");
        }
        for pairs in [
            &[("if-match", TAG)][..],
            &[("if-match", "*")],
            &[("if-match", TAG), ("if-unmodified-since", BEFORE)],
            &[("if-unmodified-since", DATE)],
            &[("if-unmodified-since", "x")],
        ] {
            assert_eq!(decided(Method::GET, pairs), Plan::Whole, "{pairs:?}");
        }
    }

    #[test]
    fn a_range_depends_on_if_range() {
        let weak = format!("W/{TAG}");
        let range = ("range", "bytes=10-19");
        assert_eq!(decided(Method::GET, &[range]), parts(10, 20));
        assert_eq!(decided(Method::GET, &[range, ("if-range", TAG)]), parts(10, 20));
        assert_eq!(decided(Method::GET, &[range, ("if-range", DATE)]), parts(10, 20));
        for if_range in [&weak, "\"x\"", BEFORE, AFTER, "x", ""] {
            assert_eq!(decided(Method::GET, &[range, ("if-range", if_range)]), Plan::Whole, "{if_range}");
        }
        assert_eq!(decided(Method::HEAD, &[range]), Plan::Whole);
        assert_eq!(decided(Method::GET, &[range, range]), Plan::Whole);
        assert_eq!(decided(Method::GET, &[("range", "bytes=1000-")]), Plan::Unsatisfiable);
        assert_eq!(decided(Method::GET, &[("range", "bytes=1000-"), ("if-range", "\"x\"")]), Plan::Whole);
    }
}
