//! Encodes and decodes the id of an SSE event: a subscriber's position in each of its topics. Pure:
//! text to numbers and back.
//!
//! `9f3a61c2-17` is event 17 of a single topic, in the log whose epoch is `9f3a61c2`; `9f3a61c2-17.4` contains the ids
//! of two topics, in the order of the subscription.

use std::fmt;

/// The epoch of a log, and for each topic the id of the last event that the subscriber received.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Cursor {
    pub(super) epoch: u32,
    pub(super) ids: Vec<u64>,
}

impl Cursor {
    /// Parses the text. Returns `None` if this type would not have written the text.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let (epoch, ids) = text.split_once('-')?;
        let is_hex = epoch.len() == 8 && epoch.bytes().all(|byte| byte.is_ascii_hexdigit());
        let epoch = is_hex.then(|| u32::from_str_radix(epoch, 16).ok())??;
        let id = |digits: &str| digits.bytes().all(|byte| byte.is_ascii_digit()).then(|| digits.parse().ok())?;
        Some(Self { epoch, ids: ids.split('.').map(id).collect::<Option<_>>()? })
    }
}

impl fmt::Display for Cursor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:08x}", self.epoch)?;
        for (index, id) in self.ids.iter().enumerate() {
            write!(f, "{}{id}", if index == 0 { '-' } else { '.' })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_is_read_and_nothing_else_is() {
        let one = Cursor { epoch: 0x9f3a, ids: vec![17] };
        let many = Cursor { epoch: u32::MAX, ids: vec![0, 4, u64::MAX] };
        assert_eq!((one.to_string(), many.to_string()), ("00009f3a-17".into(), format!("ffffffff-0.4.{}", u64::MAX)));
        for cursor in [one, many] {
            assert_eq!(Cursor::parse(&cursor.to_string()), Some(cursor));
        }
        let hostile = [
            "",
            "-",
            "17",
            "9f3a61c2",
            "9f3a61c2-",
            "9f3a61c2-1.",
            "9f3a61c2-.1",
            "9f3a61c2--1",
            "9f3a61c2-+1",
            "+f3a61c2-1",
            "9f3a61c21-1",
            "9f3a61c2-1\n",
            "9f3a61c2-18446744073709551616",
            "9f3a61cé-1",
            "earliest",
        ];
        for text in hostile {
            assert_eq!(Cursor::parse(text), None, "{text:?}");
        }
    }
}
