//! Name-value pairs: the parameters of a request, which are CGI variables, as FastCGI (specification 1.0, section 3.4),
//! SCGI and the environment of a CGI program have them; and the values that FastCGI's GET_VALUES asks for.

use std::fmt;
use std::ops::Range;

use bytes::{Bytes, BytesMut};

/// The parameters of a request: CGI variables, in the order in which they came, as the bytes that came.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Params {
    raw: Bytes,
    pairs: Vec<(Span, Span)>,
}

/// A part of [`Params::raw`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Span {
    start: u32,
    end: u32,
}

impl Span {
    fn range(self) -> Range<usize> {
        self.start as usize..self.end as usize
    }
}

impl Params {
    /// Reads name-value pairs (3.4). `None` if one reaches beyond the end.
    pub(crate) fn parse(raw: Bytes) -> Option<Self> {
        let mut pairs = Vec::with_capacity(32);
        let mut rest: &[u8] = &raw;
        let total = u32::try_from(raw.len()).ok()?;
        while !rest.is_empty() {
            let name = take_length(&mut rest)?;
            let value = take_length(&mut rest)?;
            let start = total - u32::try_from(rest.len()).ok()?;
            let middle = start.checked_add(name)?;
            let end = middle.checked_add(value).filter(|&end| end <= total)?;
            pairs.push((Span { start, end: middle }, Span { start: middle, end }));
            rest = raw.get(end as usize..)?;
        }
        Some(Self { raw, pairs })
    }

    /// Reads SCGI's strings, each ended by a NUL: name, value, name, value. `None` if there is an odd number of them,
    /// or the last one has no end.
    pub(crate) fn from_strings(raw: Bytes) -> Option<Self> {
        let mut pairs = Vec::with_capacity(32);
        let (mut name, mut start) = (None, 0);
        for (at, _) in raw.iter().enumerate().filter(|(_, byte)| **byte == 0) {
            let end = u32::try_from(at).ok()?;
            let string = Span { start, end };
            match name.take() {
                None => name = Some(string),
                Some(name) => pairs.push((name, string)),
            }
            start = end.checked_add(1)?;
        }
        (name.is_none() && start as usize == raw.len()).then_some(Self { raw, pairs })
    }

    /// Copies pairs. `None` if they have 4 GiB together.
    pub(crate) fn from_pairs<'a>(pairs: impl IntoIterator<Item = (&'a [u8], &'a [u8])>) -> Option<Self> {
        let mut raw = BytesMut::new();
        let mut append = |bytes: &[u8]| {
            let start = u32::try_from(raw.len()).ok()?;
            raw.extend_from_slice(bytes);
            Some(Span { start, end: u32::try_from(raw.len()).ok()? })
        };
        let pairs: Option<Vec<_>> =
            pairs.into_iter().map(|(name, value)| Some((append(name)?, append(value)?))).collect();
        Some(Self { pairs: pairs?, raw: raw.freeze() })
    }

    /// The value of the variable `name`; of several, the last, as PHP has it.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&[u8]> {
        self.iter().filter(|(other, _)| *other == name.as_bytes()).last().map(|(_, value)| value)
    }

    /// All names and values, in the order in which they came.
    pub fn iter(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        self.pairs.iter().map(|(name, value)| (self.part(*name), self.part(*value)))
    }

    /// As [`Params::iter`], with values that share the memory of the parameters.
    pub(crate) fn iter_shared(&self) -> impl Iterator<Item = (&[u8], Bytes)> {
        self.pairs.iter().map(|(name, value)| (self.part(*name), self.raw.slice(value.range())))
    }

    fn part(&self, span: Span) -> &[u8] {
        self.raw.get(span.range()).unwrap_or_default()
    }
}

impl fmt::Debug for Params {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map()
            .entries(self.iter().map(|(name, value)| (String::from_utf8_lossy(name), String::from_utf8_lossy(value))))
            .finish()
    }
}

/// Reads a length of one byte, or of four with the highest bit set. Both are legal for a short one.
fn take_length(rest: &mut &[u8]) -> Option<u32> {
    let (&first, tail) = rest.split_first()?;
    if first < 0x80 {
        *rest = tail;
        return Some(first.into());
    }
    let (four, tail) = rest.split_first_chunk::<4>()?;
    *rest = tail;
    Some(u32::from_be_bytes(*four) & 0x7fff_ffff)
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

    #[test]
    fn all_three_forms_give_the_same() {
        let pairs = [(&b"A"[..], &b"xy"[..]), (b"B", b"")];
        let expected = Some(pairs.to_vec());
        for params in [
            Params::parse(Bytes::from_static(b"\x01\x02Axy\x01\x00B")),
            Params::from_strings(Bytes::from_static(b"A\0xy\0B\0\0")),
            Params::from_pairs(pairs),
        ] {
            assert_eq!(params.as_ref().map(|params| params.iter().collect()), expected);
        }
        for odd in [&b"A"[..], b"A\0", b"A\0b", b"A\0b\0C\0"] {
            assert_eq!(Params::from_strings(Bytes::from_static(odd)), None, "{odd:?}");
        }
    }
}
