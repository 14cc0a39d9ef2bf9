//! Stores name-value pairs: the parameters of a request (CGI variables) and the values of FastCGI's GET_VALUES. The
//! pairs are in the format of FastCGI (specification 1.0, section 3.4), of SCGI, or of the environment of a CGI
//! program.

use std::fmt;

use bytes::{BufMut as _, Bytes, BytesMut};

/// The parameters of a request: CGI variables, in the order and with the bytes in which they were received.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Params {
    /// Complete pairs, already checked.
    raw: Bytes,
    form: Form,
}

/// The encoding of the pairs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Form {
    /// FastCGI: two lengths, followed by the bytes.
    #[default]
    Lengths,
    /// SCGI: two strings, each terminated by a NUL.
    Strings,
}

impl Params {
    /// Parses FastCGI name-value pairs (3.4). Returns `None` if a pair extends beyond the end.
    pub(crate) fn parse(raw: Bytes) -> Option<Self> {
        Self::read(raw, Form::Lengths)
    }

    /// Parses SCGI strings, each terminated by a NUL: name, value, name, value. Returns `None` if the number of strings
    /// is odd, or if the last string is not terminated.
    pub(crate) fn from_strings(raw: Bytes) -> Option<Self> {
        Self::read(raw, Form::Strings)
    }

    fn read(raw: Bytes, form: Form) -> Option<Self> {
        let mut rest: &[u8] = &raw;
        while !rest.is_empty() {
            (_, rest) = take_pair(rest, form)?;
        }
        Some(Self { raw, form })
    }

    pub(crate) fn from_pairs<'a>(pairs: impl IntoIterator<Item = (&'a [u8], &'a [u8])>) -> Self {
        let mut raw = BytesMut::new();
        for (name, value) in pairs {
            put_length(&mut raw, name.len());
            put_length(&mut raw, value.len());
            raw.extend_from_slice(name);
            raw.extend_from_slice(value);
        }
        Self { raw: raw.freeze(), form: Form::Lengths }
    }

    /// Returns the value of the variable `name`. If the variable occurs several times, returns the last value, as PHP
    /// does.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&[u8]> {
        self.iter().filter(|(other, _)| *other == name.as_bytes()).last().map(|(_, value)| value)
    }

    /// Whether there are no parameters.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.raw.is_empty()
    }

    /// Returns all names and values, in the order in which they were received.
    pub fn iter(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        let (mut rest, form): (&[u8], _) = (&self.raw, self.form);
        std::iter::from_fn(move || {
            let (pair, after) = take_pair(rest, form)?;
            rest = after;
            Some(pair)
        })
    }

    /// Returns a name or value of [`Params::iter`], sharing the memory of the parameters.
    pub(crate) fn share(&self, part: &[u8]) -> Bytes {
        self.raw.slice_ref(part)
    }
}

impl fmt::Debug for Params {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map()
            .entries(self.iter().map(|(name, value)| (String::from_utf8_lossy(name), String::from_utf8_lossy(value))))
            .finish()
    }
}

type Pair<'a> = (&'a [u8], &'a [u8]);

/// Reads a pair, and returns it with the remaining bytes. Returns `None` if there is no complete pair.
#[inline]
fn take_pair(mut rest: &[u8], form: Form) -> Option<(Pair<'_>, &[u8])> {
    let (name, value) = match form {
        Form::Lengths => {
            let (name, value) = match rest {
                // Names and values are usually short.
                [name, value, tail @ ..] if (name | value) < 0x80 => {
                    rest = tail;
                    (usize::from(*name), usize::from(*value))
                }
                _ => (take_length(&mut rest)?, take_length(&mut rest)?),
            };
            let (name, tail) = rest.split_at_checked(name)?;
            rest = tail;
            let (value, tail) = rest.split_at_checked(value)?;
            rest = tail;
            (name, value)
        }
        Form::Strings => (take_string(&mut rest)?, take_string(&mut rest)?),
    };
    Some(((name, value), rest))
}

fn take_string<'a>(rest: &mut &'a [u8]) -> Option<&'a [u8]> {
    let end = rest.iter().position(|&byte| byte == 0)?;
    let (string, tail) = rest.split_at_checked(end)?;
    *rest = tail.get(1..)?;
    Some(string)
}

/// Writes a length in the format of [`take_length`].
pub(crate) fn put_length(out: &mut BytesMut, length: usize) {
    match u8::try_from(length) {
        Ok(short) if short < 0x80 => out.put_u8(short),
        _ => out.put_u32(u32::try_from(length).unwrap_or(u32::MAX) | 0x8000_0000),
    }
}

/// Reads a length of one byte, or of four bytes with the highest bit set. Both forms are valid for a short length.
#[inline]
fn take_length(rest: &mut &[u8]) -> Option<usize> {
    let (&first, tail) = rest.split_first()?;
    if first < 0x80 {
        *rest = tail;
        return Some(first.into());
    }
    let (four, tail) = rest.split_first_chunk::<4>()?;
    *rest = tail;
    usize::try_from(u32::from_be_bytes(*four) & 0x7fff_ffff).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_short_length_may_take_four_bytes() {
        let params = b"\x80\0\0\x01\x80\0\0\x02Axy\x01\x80\0\0\0B";
        let params = Params::parse(Bytes::from_static(params)).unwrap();
        assert_eq!(params.iter().collect::<Vec<_>>(), [(&b"A"[..], &b"xy"[..]), (b"B", b"")]);
    }

    /// CVE-2025-23016 (libfcgi) and CVE-2025-40907 (its copy in Perl): the sum of two lengths
    /// wrapped, and a small buffer was allocated for a long name. This implementation allocates
    /// nothing for an announced length.
    #[test]
    fn lengths_beyond_the_end_are_refused_whatever_their_sum() {
        let lengths: [u32; 8] = [0, 1, 2, 3, 0x7fff_fffd, 0x7fff_fffe, 0x7fff_ffff, 0x4000_0000];
        for name in lengths {
            for value in lengths {
                let four = |length: u32| (length | 0x8000_0000).to_be_bytes();
                let params = [&four(name)[..], &four(value), b"ab"].concat();
                // Two bytes are left. If the pair does not use both of them, the remaining bytes would have to be
                // another pair, but they are not.
                let fits = u64::from(name) + u64::from(value) == 2;
                assert_eq!(Params::parse(params.into()).is_some(), fits, "{name} + {value}");
            }
        }
    }

    #[test]
    fn every_beginning_of_some_pairs_is_some_pairs_or_refused() {
        let params = b"\x01\x02Axy\x80\0\0\x01\x00B\x03\x80\0\0\x04ABCdefg";
        let ends: Vec<usize> =
            (0..=params.len()).filter(|&end| Params::parse(Bytes::from_static(&params[..end])).is_some()).collect();
        assert_eq!(ends, [0, 5, 11, params.len()]);
    }

    #[test]
    fn all_three_forms_give_the_same() {
        let pairs = [(&b"A"[..], &b"xy"[..]), (b"B", b"")];
        let expected = Some(pairs.to_vec());
        for params in [
            Params::parse(Bytes::from_static(b"\x01\x02Axy\x01\x00B")),
            Params::from_strings(Bytes::from_static(b"A\0xy\0B\0\0")),
            Some(Params::from_pairs(pairs)),
        ] {
            assert_eq!(params.as_ref().map(|params| params.iter().collect()), expected);
        }
        for odd in [&b"A"[..], b"A\0", b"A\0b", b"A\0b\0C\0"] {
            assert_eq!(Params::from_strings(Bytes::from_static(odd)), None, "{odd:?}");
        }
    }
}
