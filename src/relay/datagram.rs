//! Parses a datagram from the publish socket: the topic, the event's name and the event's data. The topic and the name
//! each end in a line feed.
//!
//! No I/O.

use std::fmt;

use crate::app::events::name;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Datagram<'a> {
    pub(super) topic: &'a str,
    /// The event's name, which may be empty.
    pub(super) name: &'a str,
    /// The remainder of the datagram: arbitrary bytes.
    pub(super) data: &'a [u8],
}

/// Why a datagram is invalid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Malformed {
    /// The datagram contains fewer than two line feeds.
    Lines,
    Topic,
    /// The name is invalid; a phrase whose subject is the name.
    Name(&'static str),
}

impl fmt::Display for Malformed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Lines => f.write_str("it has fewer than two line feeds (which separate TOPIC, NAME and DATA)"),
            Self::Topic => f.write_str("its topic is not UTF-8"),
            Self::Name(why) => write!(f, "its name {why}"),
        }
    }
}

impl<'a> Datagram<'a> {
    /// Splits a datagram into its parts.
    ///
    /// # Errors
    /// Returns [`Malformed`] if the datagram is invalid. (The log validates the topic.)
    pub(super) fn parse(bytes: &'a [u8]) -> Result<Self, Malformed> {
        let mut parts = bytes.splitn(3, |&byte| byte == b'\n');
        let (Some(topic), Some(name), Some(data)) = (parts.next(), parts.next(), parts.next()) else {
            return Err(Malformed::Lines);
        };
        let topic = std::str::from_utf8(topic).map_err(|_| Malformed::Topic)?;
        let name = std::str::from_utf8(name).map_err(|_| Malformed::Name("is not UTF-8"))?;
        name::fault(name).map_or(Ok(Self { topic, name, data }), |why| Err(Malformed::Name(why)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_lines_and_the_rest() {
        let parsed = |topic, name, data| Ok(Datagram { topic, name, data });
        assert_eq!(Datagram::parse(b"news\n\nit rains"), parsed("news", "", b"it rains"));
        assert_eq!(Datagram::parse(b"news\nweather\n"), parsed("news", "weather", b""));
        assert_eq!(Datagram::parse(b"a\nb\nc\nd\n\0\xff"), parsed("a", "b", b"c\nd\n\0\xff"));
        assert_eq!(Datagram::parse("\u{fc}\n\u{e9}\n\r\n".as_bytes()), parsed("\u{fc}", "\u{e9}", b"\r\n"));
        assert_eq!(Datagram::parse(b"\n\n"), parsed("", "", b""), "the log refuses that topic");
    }

    #[test]
    fn what_is_none_is_told_why() {
        for (bytes, why) in [
            (&b""[..], Malformed::Lines),
            (b"news", Malformed::Lines),
            (b"news\nit rains", Malformed::Lines),
            (b"\xff\n\nx", Malformed::Topic),
            (b"news\n\xff\nx", Malformed::Name("is not UTF-8")),
            (b"news\nweather\r\nx", Malformed::Name("contains control characters")),
            (b"news\nwea\0ther\nx", Malformed::Name("contains control characters")),
            (b"news\ngap\nx", Malformed::Name("is reserved for notices of missed events")),
        ] {
            assert_eq!(Datagram::parse(bytes), Err(why), "{}", bytes.escape_ascii());
        }
    }

    #[test]
    fn no_bytes_make_it_panic_and_what_it_takes_is_all_there() {
        let mut random = fastrand::Rng::with_seed(11);
        for _ in 0..20_000 {
            let bytes: Vec<u8> =
                (0..random.usize(..12)).map(|_| *random.choice(b"\n\n\na\xc3\xa9\r\0").unwrap()).collect();
            if let Ok(Datagram { topic, name, data }) = Datagram::parse(&bytes) {
                assert_eq!([topic.as_bytes(), name.as_bytes(), data].join(&b'\n'), bytes);
            }
        }
    }
}
