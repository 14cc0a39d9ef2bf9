//! Topics of events as settings and responses name them: lists separated by commas, with percent-encoding. Pure.
//!
//! A topic has 1 to 128 bytes of UTF-8 without control characters. A subscription has 1 to 32 different topics.

use std::fmt;

use super::grammar::percent_decode;

/// Maximum number of topics in one subscription.
pub(crate) const MAX_TOPICS: usize = 32;
/// Maximum number of bytes in a topic.
pub(crate) const MAX_TOPIC: usize = 128;

/// Why a list of topics is invalid.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum TopicsError {
    /// The number of topics is 0 or above the limit.
    Count,
    /// The text is not a topic.
    Topic(String),
    /// The topic occurs twice.
    Repeated(String),
}

impl fmt::Display for TopicsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Count => write!(f, "a subscription has 1 to {MAX_TOPICS} topics"),
            Self::Topic(text) => write!(
                f,
                "{text:?} is not a topic (expected 1 to {MAX_TOPIC} bytes of UTF-8 without control characters)"
            ),
            Self::Repeated(topic) => write!(f, "the topic {topic:?} is given twice"),
        }
    }
}

impl std::error::Error for TopicsError {}

/// Whether a text can be a topic.
pub(crate) fn is_topic(text: &str) -> bool {
    (1..=MAX_TOPIC).contains(&text.len()) && !text.contains(char::is_control)
}

/// Parses a list of topics. Each topic is percent-decoded once, after the list has been split, so an encoded comma is
/// part of a topic. Spaces around a topic are ignored. A list can be split into several values, like that of a header.
///
/// # Errors
/// Fails if a topic is invalid or repeated, or if there are none or too many.
pub(crate) fn parse<'a>(values: impl IntoIterator<Item = &'a [u8]>) -> Result<Vec<String>, TopicsError> {
    let mut topics: Vec<String> = Vec::new();
    let elements = values.into_iter().flat_map(|value| value.split(|&byte| byte == b',')).map(<[u8]>::trim_ascii);
    for element in elements {
        let invalid = || TopicsError::Topic(String::from_utf8_lossy(element).into_owned());
        let decoded = percent_decode(element).and_then(|bytes| String::from_utf8(bytes).ok());
        let topic = decoded.filter(|topic| is_topic(topic)).ok_or_else(invalid)?;
        if topics.contains(&topic) {
            return Err(TopicsError::Repeated(topic));
        }
        if topics.len() == MAX_TOPICS {
            return Err(TopicsError::Count);
        }
        topics.push(topic);
    }
    if topics.is_empty() { Err(TopicsError::Count) } else { Ok(topics) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(values: &[&str]) -> Result<Vec<String>, TopicsError> {
        parse(values.iter().map(|value| value.as_bytes()))
    }

    #[test]
    fn a_list_is_split_before_it_is_decoded() {
        assert_eq!(parsed(&["news"]).unwrap(), ["news"]);
        assert_eq!(parsed(&["news, sport", "wetter-\u{fc}"]).unwrap(), ["news", "sport", "wetter-\u{fc}"]);
        assert_eq!(parsed(&["room-a%2Csecret%20x,%C3%BC,100%25"]).unwrap(), ["room-a,secret x", "\u{fc}", "100%"]);
        assert_eq!(parsed(&["%2541"]).unwrap(), ["%41"], "decoded once");
    }

    #[test]
    fn an_invalid_topic_is_an_error_that_contains_it() {
        for text in ["", " ", "a,", ",a", "a,,b", "a%", "a%2", "a%zz", "%ff", "%0a", "a%00b", &"x".repeat(129)] {
            let error = parsed(&[text]).unwrap_err();
            assert!(matches!(error, TopicsError::Topic(_)), "{text:?}: {error}");
        }
        assert!(parsed(&[&"x".repeat(128)]).is_ok());
        assert_eq!(parsed(&["a", "a"]), Err(TopicsError::Repeated("a".to_owned())));
        assert_eq!(parsed(&[]), Err(TopicsError::Count));
        let list = |count: usize| (0..count).map(|number| number.to_string()).collect::<Vec<_>>().join(",");
        assert_eq!(parsed(&[&list(32)]).unwrap().len(), 32);
        assert_eq!(parsed(&[&list(33)]), Err(TopicsError::Count));
    }

    #[test]
    fn no_bytes_make_it_panic() {
        let mut random = fastrand::Rng::with_seed(7);
        for _ in 0..20_000 {
            let text: Vec<u8> =
                (0..random.usize(..12)).map(|_| *random.choice(b"%,2cf a\n\xc3\xbc{}".as_slice()).unwrap()).collect();
            if let Ok(topics) = parse([text.as_slice()]) {
                assert!(topics.iter().all(|topic| is_topic(topic)), "{topics:?}");
            }
        }
    }
}
