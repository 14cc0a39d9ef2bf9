//! The paths that gateways serve as event streams (`--sse`), and the topics of each: parsing and matching. Pure.
//!
//! - A path consists of segments between slashes. A segment is a text or, if it has the form `{name}`, a capture. A
//!   text matches the same bytes only. A capture matches any text of at least one byte.
//! - The segments of a request's path are percent-decoded once, after the path has been split at its slashes. Nothing
//!   else is changed: `/a/` and `//a` are not `/a`.
//! - If several paths match, the one with a text in the first segment in which they differ is chosen. The order of the
//!   flags has no effect.
//! - In a topic, `{name}` is replaced by the capture. The result is never split into several topics.

use std::str::FromStr;

use crate::protocol::grammar::percent_decode;
use crate::protocol::topics::{MAX_TOPIC, MAX_TOPICS, is_topic};

/// All paths of event streams.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct SseRoutes(Vec<SseRoute>);

/// A path and its topics.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SseRoute {
    path: String,
    segments: Vec<Segment>,
    topics: Vec<Vec<Part>>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Segment {
    /// Percent-decoded.
    Text(Vec<u8>),
    Capture,
}

/// A part of a topic.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Part {
    Text(String),
    /// The capture with this number.
    Capture(usize),
}

/// The meaning of a request's path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum SsePath {
    /// The path is not that of an event stream.
    Other,
    /// The captures cannot be part of a topic.
    NoTopic,
    /// An event stream of these topics, which differ.
    Topics(Vec<String>),
}

impl SseRoutes {
    /// # Errors
    /// Returns a message for the operator if two paths match the same requests.
    pub(crate) fn new(mut routes: Vec<SseRoute>) -> Result<Self, String> {
        routes.sort_by_key(SseRoute::captures);
        for (index, route) in routes.iter().enumerate() {
            if let Some(other) = routes[..index].iter().find(|other| other.segments == route.segments) {
                let (first, second) = (&other.path, &route.path);
                return Err(format!(
                    "--sse: '{first}' and '{second}' are the same path (give all topics in one --sse)"
                ));
            }
        }
        Ok(Self(routes))
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Finds the event stream of a request's path.
    pub(crate) fn find(&self, url_path: &str) -> SsePath {
        let Some(path) = url_path.strip_prefix('/').filter(|_| !self.is_empty()) else { return SsePath::Other };
        let count = path.split('/').count();
        if self.0.iter().all(|route| route.segments.len() != count) {
            return SsePath::Other;
        }
        let decoded: Option<Vec<_>> = path.split('/').map(|segment| percent_decode(segment.as_bytes())).collect();
        let Some(segments) = decoded else { return SsePath::Other };
        // The routes are sorted, so the first one is the right one.
        self.0.iter().find_map(|route| route.topics_of(&segments)).unwrap_or(SsePath::Other)
    }
}

impl SseRoute {
    /// Returns which segments are captures. Among the paths that match a request, the least one is chosen.
    fn captures(&self) -> Vec<bool> {
        self.segments.iter().map(|segment| *segment == Segment::Capture).collect()
    }

    /// Returns the topics for these segments, or `None` if they do not match.
    fn topics_of(&self, segments: &[Vec<u8>]) -> Option<SsePath> {
        if segments.len() != self.segments.len() {
            return None;
        }
        let mut captured = Vec::new();
        for (segment, found) in self.segments.iter().zip(segments) {
            match segment {
                Segment::Text(text) if text == found => {}
                Segment::Capture if !found.is_empty() => captured.push(std::str::from_utf8(found)),
                Segment::Text(_) | Segment::Capture => return None,
            }
        }
        let Ok(captured) = captured.into_iter().collect::<Result<Vec<_>, _>>() else { return Some(SsePath::NoTopic) };
        let mut topics: Vec<String> = Vec::new();
        for parts in &self.topics {
            let texts = parts.iter().map(|part| match part {
                Part::Text(text) => text.as_str(),
                Part::Capture(number) => captured.get(*number).copied().unwrap_or_default(),
            });
            let topic: String = texts.collect();
            if !is_topic(&topic) {
                return Some(SsePath::NoTopic);
            }
            if !topics.contains(&topic) {
                topics.push(topic);
            }
        }
        Some(SsePath::Topics(topics))
    }
}

impl FromStr for SseRoute {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let expected = || {
            format!(
                "'{text}' is not an event stream (expected PATH=TOPIC[,TOPIC], as in /rooms/{{room}}=room-{{room}})"
            )
        };
        let fail = |cause: String| format!("'{text}': {cause}");
        let (path, topics) = text.split_once('=').ok_or_else(expected)?;
        let rest = path.strip_prefix('/').filter(|rest| !rest.contains(['?', '#'])).ok_or_else(expected)?;
        let (mut segments, mut names) = (Vec::new(), Vec::new());
        for segment in rest.split('/') {
            segments.push(parse_segment(segment, &mut names).map_err(fail)?);
        }
        let mut parsed: Vec<Vec<Part>> = Vec::new();
        for topic in topics.split(',').map(str::trim) {
            let parts = parse_topic(topic, &names).map_err(fail)?;
            if parsed.contains(&parts) {
                return Err(fail(format!("the topic '{topic}' is given twice")));
            }
            parsed.push(parts);
        }
        if parsed.len() > MAX_TOPICS {
            return Err(fail(format!("an event stream has 1 to {MAX_TOPICS} topics")));
        }
        Ok(Self { path: path.to_owned(), segments, topics: parsed })
    }
}

/// Parses a segment of a path. Adds the name of a capture to `names`.
fn parse_segment<'a>(segment: &'a str, names: &mut Vec<&'a str>) -> Result<Segment, String> {
    if let Some(name) = segment.strip_prefix('{').and_then(|rest| rest.strip_suffix('}')) {
        if name.is_empty() || !name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_') {
            return Err(format!("'{segment}' is not a capture (expected letters, digits and _, as in {{room}})"));
        }
        if names.contains(&name) {
            return Err(format!("the capture '{segment}' is given twice"));
        }
        names.push(name);
        return Ok(Segment::Capture);
    }
    if segment.contains(['{', '}']) {
        return Err(format!("'{segment}' has a capture that is not a whole segment, as in /rooms/{{room}}"));
    }
    let text = percent_decode(segment.as_bytes());
    text.map(Segment::Text).ok_or_else(|| format!("'{segment}' has an invalid percent-encoding (write % as %25)"))
}

/// Parses a topic with the captures of its path.
fn parse_topic(topic: &str, names: &[&str]) -> Result<Vec<Part>, String> {
    let (mut parts, mut rest) = (Vec::new(), topic);
    while let Some((before, after)) = rest.split_once('{') {
        let (name, after) =
            after.split_once('}').ok_or_else(|| format!("the topic '{topic}' has a '{{' without a '}}'"))?;
        let number = names.iter().position(|other| *other == name);
        let number = number.ok_or_else(|| {
            format!("the topic '{topic}' has '{{{name}}}', which is not in the path (add it there as a segment)")
        })?;
        if !before.is_empty() {
            parts.push(Part::Text(before.to_owned()));
        }
        parts.push(Part::Capture(number));
        rest = after;
    }
    if !rest.is_empty() {
        parts.push(Part::Text(rest.to_owned()));
    }
    // The shortest topic: each capture has at least one byte.
    let shortest: String = parts.iter().map(|part| if let Part::Text(text) = part { text } else { "x" }).collect();
    if !is_topic(&shortest) {
        return Err(format!(
            "'{topic}' cannot be a topic (expected 1 to {MAX_TOPIC} bytes without control characters)"
        ));
    }
    Ok(parts)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn routes(texts: &[&str]) -> Result<SseRoutes, String> {
        SseRoutes::new(texts.iter().map(|text| text.parse()).collect::<Result<_, _>>()?)
    }

    fn topics(routes: &SseRoutes, path: &str) -> Option<Vec<String>> {
        match routes.find(path) {
            SsePath::Topics(topics) => Some(topics),
            SsePath::Other => None,
            SsePath::NoTopic => Some(Vec::new()),
        }
    }

    #[test]
    fn a_path_matches_segment_by_segment() {
        let routes = routes(&["/events=news, sport", "/rooms/{room}=room-{room}", "/u/{a}/{b}/x={b}-{a},all"]).unwrap();
        for (path, expected) in [
            ("/events", Some(&["news", "sport"][..])),
            ("/%65vents", Some(&["news", "sport"])),
            ("/events/", None),
            ("//events", None),
            ("/Events", None),
            ("/events%00", None),
            ("/event", None),
            ("/", None),
            ("*", None),
            ("", None),
            ("/rooms/7", Some(&["room-7"])),
            ("/rooms/a,b", Some(&["room-a,b"])),
            ("/rooms/{room}", Some(&["room-{room}"])),
            ("/rooms/%C3%BC%2Fx", Some(&["room-\u{fc}/x"])),
            ("/rooms/%2541", Some(&["room-%41"])),
            ("/rooms/..", Some(&["room-.."])),
            ("/rooms/", None),
            ("/rooms/%", None),
            ("/rooms/7/8", None),
            ("/rooms/%0a", Some(&[])),
            ("/rooms/%ff", Some(&[])),
            ("/u/1/2/x", Some(&["2-1", "all"])),
            ("/u/1/2/y", None),
        ] {
            let expected = expected.map(|topics| topics.iter().map(|topic| (*topic).to_owned()).collect());
            assert_eq!(topics(&routes, path), expected, "{path}");
        }
        let long = format!("/rooms/{}", "x".repeat(123));
        assert_eq!(topics(&routes, &long).unwrap()[0].len(), 128);
        assert_eq!(routes.find(&format!("{long}x")), SsePath::NoTopic);
        assert_eq!(SseRoutes::default().find("/events"), SsePath::Other);
    }

    #[test]
    fn a_text_is_preferred_to_a_capture_in_any_order_of_the_flags() {
        let mut texts = ["/a/{x}=1", "/a/b=2", "/{x}/b=3", "/{x}/{y}=4"];
        for _ in 0..2 {
            let routes = routes(&texts).unwrap();
            for (path, topic) in [("/a/b", "2"), ("/a/c", "1"), ("/c/b", "3"), ("/c/c", "4")] {
                assert_eq!(topics(&routes, path).unwrap(), [topic], "{path}");
            }
            texts.reverse();
        }
    }

    #[test]
    fn topics_that_become_equal_are_subscribed_to_once() {
        let routes = routes(&["/{a}/{b}=t-{a},t-{b}"]).unwrap();
        assert_eq!(topics(&routes, "/x/y").unwrap(), ["t-x", "t-y"]);
        assert_eq!(topics(&routes, "/x/x").unwrap(), ["t-x"]);
    }

    #[test]
    fn a_wrong_setting_is_an_error_that_says_what_is_expected() {
        let long = format!("/a={}", "x".repeat(129));
        let many = format!("/a={}", (0..33).map(|number| number.to_string()).collect::<Vec<_>>().join(","));
        for (text, words) in [
            ("", "expected PATH=TOPIC[,TOPIC]"),
            ("/a", "expected PATH=TOPIC[,TOPIC]"),
            ("a=b", "expected PATH=TOPIC[,TOPIC]"),
            ("/a?b=c", "expected PATH=TOPIC[,TOPIC]"),
            ("/a=", "'' cannot be a topic"),
            ("/a=b,", "'' cannot be a topic"),
            ("/a=b\nc", "cannot be a topic"),
            (&long, "cannot be a topic (expected 1 to 128 bytes"),
            (&many, "1 to 32 topics"),
            ("/a=b,c,b", "'b' is given twice"),
            ("/a/{x}=b-{y}", "'{y}', which is not in the path"),
            ("/a/{x}=b-{x", "'{' without a '}'"),
            ("/a/{x}/{x}=b", "the capture '{x}' is given twice"),
            ("/a/{}=b", "is not a capture"),
            ("/a/{x-y}=b", "is not a capture"),
            ("/a/b{x}=b", "not a whole segment"),
            ("/a%=b", "write % as %25"),
        ] {
            let error = text.parse::<SseRoute>().unwrap_err();
            assert!(error.contains(words), "{text:?}: {error}");
        }
        assert!("/a%3Db=c=d".parse::<SseRoute>().is_ok());
        let error = routes(&["/a/{x}=1", "/b=2", "/a/{y}=3"]).unwrap_err();
        assert!(error.contains("'/a/{x}' and '/a/{y}' are the same path"), "{error}");
    }
}
