//! Name-value pairs (FastCGI specification 1.0, section 3.4): the parameters of a request, which are CGI variables,
//! and the values that GET_VALUES asks for.

use std::fmt;

use bytes::Bytes;

/// The parameters of a request: CGI variables, in the order in which they came, as the bytes that came.
#[derive(Clone, PartialEq, Eq)]
pub struct Params {
    /// Name-value pairs, known to be whole.
    raw: Bytes,
}

impl Params {
    /// Reads name-value pairs (3.4). `None` if one reaches beyond the end.
    pub(crate) fn parse(raw: Bytes) -> Option<Self> {
        let mut rest: &[u8] = &raw;
        while !rest.is_empty() {
            (_, rest) = take_pair(rest)?;
        }
        Some(Self { raw })
    }

    /// The value of the variable `name`; of several, the last, as PHP has it.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&[u8]> {
        self.iter().filter(|(other, _)| *other == name.as_bytes()).last().map(|(_, value)| value)
    }

    /// All names and values, in the order in which they came.
    pub fn iter(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        let mut rest: &[u8] = &self.raw;
        std::iter::from_fn(move || {
            let (pair, after) = take_pair(rest)?;
            rest = after;
            Some(pair)
        })
    }

    /// A name or value of [`Params::iter`], sharing the memory of the parameters.
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

/// Reads a pair, and returns what is behind it. `None` if there is none, or not all of it.
#[inline]
fn take_pair(mut rest: &[u8]) -> Option<(Pair<'_>, &[u8])> {
    let name = take_length(&mut rest)?;
    let value = take_length(&mut rest)?;
    let (name, rest) = rest.split_at_checked(name)?;
    let (value, rest) = rest.split_at_checked(value)?;
    Some(((name, value), rest))
}

/// Reads a length of one byte, or of four with the highest bit set. Both are legal for a short one.
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
}
