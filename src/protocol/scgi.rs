//! Decodes SCGI requests; [`client`] encodes them. "The specification" is Neil Schemenauer's "SCGI: A Simple Common
//! Gateway Interface alternative" of 2008.
//!
//! ```text
//!   24:CONTENT_LENGTH\0 5\0SCGI\0 1\0 … ,hello
//!   │  └ strings: name, value, …      ││ └ the body
//!   │                                 │└ ends the netstring
//!   └ its length                      └ ends each string
//! ```
//!
//! A connection carries one request. The response has CGI form and ends with the stream; `worker/conn/scgi.rs` writes
//! it. The same bytes always result in the same events, however they are split into chunks. Nothing is allocated for a
//! length that was only announced.
//!
//! [`ScgiDecoder::to_come`] returns the minimum distance to the request's last byte, so that a caller
//! can leave that byte in the kernel's queue: see `worker/conn/scgi.rs`.

pub(crate) mod client;

use std::fmt;

use bytes::{Buf as _, Bytes, BytesMut};

use super::grammar::parse_digits;
use super::params::Params;

/// Length of the shortest possible request: the netstring's length, the two required variables, and the comma.
const MIN_LENGTH: usize = b"24:CONTENT_LENGTH\x000\x00SCGI\x001\x00,".len();

/// A decoded event.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum ScgiEvent {
    /// The request's variables. Its body follows, with this length if one was announced.
    Request { params: Params, length: Option<u64> },
    /// A chunk of the body, never empty.
    Body(Bytes),
    /// The body is complete. Not returned if the length of the body was not announced, because the body then ends with
    /// the stream.
    End,
}

/// The peer sent an invalid request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ScgiError {
    /// The variables exceed the limit.
    TooLong,
    /// The input does not begin with the length of a netstring, in digits, and a colon.
    Size,
    /// No comma ends the netstring.
    Comma,
    /// The variables are not an even number of strings, each terminated by a NUL, with non-empty names.
    Strings,
    /// The first variable is not CONTENT_LENGTH, its value is not a number, or there is a second CONTENT_LENGTH.
    Length,
    /// There is no variable `SCGI=1`, or more than one named `SCGI`.
    Version,
}

impl fmt::Display for ScgiError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::TooLong => "variables larger than --max-params",
            Self::Size => "data that is not SCGI: it does not begin with a length and a colon",
            Self::Comma => "a netstring without a comma at its end",
            Self::Strings => "variables that are not pairs of NUL-terminated strings",
            Self::Length => "no valid CONTENT_LENGTH as the first variable, or more than one",
            Self::Version => "no variable SCGI=1 (in nginx, include scgi_params)",
        })
    }
}

impl std::error::Error for ScgiError {}

/// The decoder's position in the input.
#[derive(Debug)]
enum Place {
    /// Before or in the netstring's length.
    Size,
    /// In a netstring of this many bytes.
    Strings(usize),
    /// Before the comma.
    Comma { params: Params, length: Option<u64> },
    /// In a body of which this many bytes are still missing.
    Body(u64),
    /// In a body that ends with the stream.
    Stream,
    /// After the request. Further input is ignored.
    Over,
}

/// Decodes the input of one connection into events.
#[derive(Debug)]
pub(crate) struct ScgiDecoder {
    max_params: usize,
    place: Place,
}

impl ScgiDecoder {
    /// Accepts `max_params` bytes of variables.
    pub(crate) fn new(max_params: usize) -> Self {
        Self { max_params, place: Place::Size }
    }

    /// Removes the bytes of the next event from `input` and returns the event. Returns `None` if more bytes are needed,
    /// or if the request is complete.
    ///
    /// # Errors
    /// Returns [`ScgiError`] if the request is invalid. Further input is ignored.
    pub(crate) fn decode(&mut self, input: &mut BytesMut) -> Result<Option<ScgiEvent>, ScgiError> {
        let event = self.next(input);
        if event.is_err() {
            self.place = Place::Over;
        }
        event
    }

    /// Returns the minimum number of bytes that are missing until the request is complete, after the `waiting` bytes
    /// that have been read but not processed. The result is 1 only if exactly one byte is missing, 0 if the request is
    /// complete, and `None` if the body ends with the stream.
    pub(crate) fn to_come(&self, waiting: usize) -> Option<u64> {
        let to_come = match self.place {
            Place::Size => MIN_LENGTH.saturating_sub(waiting).max(2) as u64,
            Place::Strings(size) => (size + 1).saturating_sub(waiting).max(2) as u64,
            Place::Comma { length: None, .. } | Place::Stream => return None,
            Place::Comma { length: Some(length), .. } => length.saturating_add(1).saturating_sub(waiting as u64),
            Place::Body(left) => left.saturating_sub(waiting as u64),
            Place::Over => 0,
        };
        Some(to_come)
    }

    /// Whether no request that needs a response has arrived.
    pub(crate) fn is_untouched(&self) -> bool {
        matches!(self.place, Place::Size)
    }

    /// Whether the body ends with the stream.
    pub(crate) fn ends_with_the_stream(&self) -> bool {
        matches!(self.place, Place::Stream)
    }

    fn next(&mut self, input: &mut BytesMut) -> Result<Option<ScgiEvent>, ScgiError> {
        loop {
            match &mut self.place {
                Place::Size => match take_size(input, self.max_params)? {
                    Some(size) => self.place = Place::Strings(size),
                    None => return Ok(None),
                },
                Place::Strings(size) => {
                    if input.len() < *size {
                        return Ok(None);
                    }
                    let params = Params::from_strings(input.split_to(*size).freeze()).ok_or(ScgiError::Strings)?;
                    let length = checked(&params)?;
                    self.place = Place::Comma { params, length };
                }
                Place::Comma { params, length } => {
                    match input.first() {
                        None => return Ok(None),
                        Some(b',') => input.advance(1),
                        Some(_) => return Err(ScgiError::Comma),
                    }
                    let (params, length) = (std::mem::take(params), *length);
                    self.place = length.map_or(Place::Stream, Place::Body);
                    return Ok(Some(ScgiEvent::Request { params, length }));
                }
                Place::Body(0) => {
                    self.place = Place::Over;
                    return Ok(Some(ScgiEvent::End));
                }
                Place::Body(left) => {
                    let take = input.len().min(usize::try_from(*left).unwrap_or(usize::MAX));
                    *left -= take as u64;
                    return Ok(piece(input, take));
                }
                Place::Stream => return Ok(piece(input, input.len())),
                Place::Over => {
                    input.clear();
                    return Ok(None);
                }
            }
        }
    }
}

fn piece(input: &mut BytesMut, length: usize) -> Option<ScgiEvent> {
    (length > 0).then(|| ScgiEvent::Body(input.split_to(length).freeze()))
}

/// Takes the length of a netstring and its colon. Returns `None` if these are incomplete.
fn take_size(input: &mut BytesMut, most: usize) -> Result<Option<usize>, ScgiError> {
    let mut size: usize = 0;
    for (at, &byte) in input.iter().enumerate() {
        match byte {
            b':' if at > 0 => {
                input.advance(at + 1);
                return Ok(Some(size));
            }
            // A netstring's length has no leading zeros.
            b'0'..=b'9' if at == 0 || size > 0 => {
                size = size.saturating_mul(10).saturating_add(usize::from(byte - b'0'));
                if size > most {
                    return Err(ScgiError::TooLong);
                }
            }
            _ => return Err(ScgiError::Size),
        }
    }
    Ok(None)
}

/// Checks the variables that the specification requires and returns the length of the body. Other names may occur
/// twice, because web servers pass on repeated headers as repeated variables, although the specification forbids this.
fn checked(params: &Params) -> Result<Option<u64>, ScgiError> {
    let of = |wanted: &'static [u8]| params.iter().filter(move |(name, _)| *name == wanted);
    if params.iter().any(|(name, _)| name.is_empty()) {
        return Err(ScgiError::Strings);
    }
    let Some((b"CONTENT_LENGTH", length)) = params.iter().next() else { return Err(ScgiError::Length) };
    if of(b"CONTENT_LENGTH").count() != 1 {
        return Err(ScgiError::Length);
    }
    let length = match length {
        // lighttpd sends -1 for a chunked body that it forwards as it arrives.
        b"-1" => None,
        digits => Some(parse_digits(digits).ok_or(ScgiError::Length)?),
    };
    let mut versions = of(b"SCGI");
    match (versions.next(), versions.next()) {
        (Some((_, b"1")), None) => Ok(length),
        _ => Err(ScgiError::Version),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn netstring(content: &str) -> Vec<u8> {
        format!("{}:{content},", content.len()).into_bytes()
    }

    fn request(more: &str, body: &str) -> Vec<u8> {
        let mut bytes = netstring(&format!("CONTENT_LENGTH\0{}\0SCGI\x001\0{more}", body.len()));
        bytes.extend(body.as_bytes());
        bytes
    }

    /// Feeds `bytes` in chunks of the given sizes and collects the events; adjacent chunks of a body are joined.
    fn decode(bytes: &[u8], mut piece: impl FnMut() -> usize) -> (Vec<ScgiEvent>, Option<ScgiError>) {
        let mut decoder = ScgiDecoder::new(4096);
        let (mut input, mut events) = (BytesMut::new(), Vec::new());
        let mut rest = bytes;
        while !rest.is_empty() {
            let (now, later) = rest.split_at(piece().clamp(1, rest.len()));
            rest = later;
            input.extend_from_slice(now);
            loop {
                match (events.last_mut(), decoder.decode(&mut input)) {
                    (Some(ScgiEvent::Body(bytes)), Ok(Some(ScgiEvent::Body(more)))) => {
                        *bytes = [bytes.as_ref(), more.as_ref()].concat().into();
                    }
                    (_, Ok(Some(event))) => events.push(event),
                    (_, Ok(None)) => break,
                    (_, Err(error)) => return (events, Some(error)),
                }
            }
        }
        (events, None)
    }

    fn error(bytes: &[u8]) -> ScgiError {
        decode(bytes, || usize::MAX).1.unwrap_or_else(|| panic!("taken: {:?}", String::from_utf8_lossy(bytes)))
    }

    #[test]
    fn the_request_of_the_specification_is_read() {
        let bytes = b"70:CONTENT_LENGTH\x0027\0SCGI\x001\0REQUEST_METHOD\0POST\0REQUEST_URI\0/deepthought\0,\
                      What is the answer to life?";
        let (events, error) = decode(bytes, || usize::MAX);
        let [ScgiEvent::Request { params, length: Some(27) }, ScgiEvent::Body(body), ScgiEvent::End] = &events[..]
        else {
            panic!("{events:?} {error:?}")
        };
        assert_eq!(params.get("REQUEST_URI"), Some(&b"/deepthought"[..]));
        assert_eq!(body, "What is the answer to life?");
        let (events, _) = decode(&request("", ""), || 1);
        assert!(matches!(events[..], [ScgiEvent::Request { length: Some(0), .. }, ScgiEvent::End]), "{events:?}");
        assert_eq!(request("", "").len(), MIN_LENGTH);
    }

    #[test]
    fn every_split_of_the_same_bytes_gives_the_same_events() {
        let long = format!("LONG\0{}\0EMPTY\0\0HTTP_A\x001\0HTTP_A\x002\0", "v".repeat(300));
        let stream = [netstring(&format!("CONTENT_LENGTH\0-1\0{long}SCGI\x001\0")), b"a stream".to_vec()].concat();
        let wrong = [&request(&long, "")[..], b"and what is that"].concat();
        for bytes in [request(&long, "hello body"), stream, wrong, b"12:CONTENT_LEN,".to_vec(), request("A", "")] {
            let expected = decode(&bytes, || usize::MAX);
            assert_eq!(decode(&bytes, || 1), expected);
            for seed in 0..300 {
                let mut random = fastrand::Rng::with_seed(seed);
                assert_eq!(decode(&bytes, || random.usize(1..60)), expected, "seed {seed}");
            }
        }
    }

    #[test]
    fn what_is_to_come_is_never_more_than_comes_and_says_1_before_the_last_byte_alone() {
        for body in ["", "x", "a longer body than that"] {
            let bytes = request("A\0b\0", body);
            for seed in 0..200 {
                let mut random = fastrand::Rng::with_seed(seed);
                let (mut decoder, mut input, mut read) = (ScgiDecoder::new(4096), BytesMut::new(), 0);
                while let Ok(Some(_)) = decoder.decode(&mut input) {}
                loop {
                    let left = bytes.len() - read;
                    let to_come = usize::try_from(decoder.to_come(input.len()).unwrap()).unwrap();
                    assert!(to_come <= left, "seed {seed}: {to_come} of {left}");
                    assert_eq!(to_come == 1, left == 1, "seed {seed}: {to_come} of {left}");
                    if left == 1 {
                        break;
                    }
                    let now = random.usize(1..to_come);
                    input.extend_from_slice(&bytes[read..read + now]);
                    read += now;
                    while let Ok(Some(_)) = decoder.decode(&mut input) {}
                }
            }
        }
        let mut decoder = ScgiDecoder::new(4096);
        let mut input = BytesMut::from(&netstring("CONTENT_LENGTH\0-1\0SCGI\x001\0")[..]);
        assert!(matches!(decoder.decode(&mut input), Ok(Some(ScgiEvent::Request { length: None, .. }))));
        assert!(decoder.to_come(0).is_none() && decoder.ends_with_the_stream());
    }

    #[test]
    fn a_bad_netstring_is_refused_before_its_content_has_come() {
        for bytes in [&b":"[..], b"x", b"-1:", b"+5:", b" 5:", b"05:", b"00:", b"GET / HTTP/1.1\r\n\r\n", b"5;"] {
            assert_eq!(error(bytes), ScgiError::Size, "{bytes:?}");
        }
        for bytes in [&b"4097:"[..], b"99999999999999999999999999999999:", b"5000"] {
            assert_eq!(error(bytes), ScgiError::TooLong, "{bytes:?}");
        }
        let mut no_comma = request("", "");
        no_comma.pop();
        no_comma.push(b'.');
        assert_eq!(error(&no_comma), ScgiError::Comma);
    }

    #[test]
    fn variables_that_the_specification_forbids_are_refused() {
        for (strings, expected) in [
            ("", ScgiError::Length),
            ("SCGI\x001\0", ScgiError::Length),
            ("SCGI\x001\0CONTENT_LENGTH\x000\0", ScgiError::Length),
            ("CONTENT_LENGTH\0\0SCGI\x001\0", ScgiError::Length),
            ("CONTENT_LENGTH\0-2\0SCGI\x001\0", ScgiError::Length),
            ("CONTENT_LENGTH\0+1\0SCGI\x001\0", ScgiError::Length),
            ("CONTENT_LENGTH\x001 \0SCGI\x001\0", ScgiError::Length),
            ("CONTENT_LENGTH\x0099999999999999999999\0SCGI\x001\0", ScgiError::Length),
            ("CONTENT_LENGTH\x000\0SCGI\x001\0CONTENT_LENGTH\x000\0", ScgiError::Length),
            ("CONTENT_LENGTH\x000\0", ScgiError::Version),
            ("CONTENT_LENGTH\x000\0SCGI\x002\0", ScgiError::Version),
            ("CONTENT_LENGTH\x000\0SCGI\x001\0SCGI\x001\0", ScgiError::Version),
            ("CONTENT_LENGTH\x000\0SCGI\x001\0ODD\0", ScgiError::Strings),
            ("CONTENT_LENGTH\x000\0SCGI\x001\0A\0no end", ScgiError::Strings),
            ("CONTENT_LENGTH\x000\0SCGI\x001\0\0no name\0", ScgiError::Strings),
        ] {
            assert_eq!(error(&netstring(strings)), expected, "{strings:?}");
        }
    }

    /// Captured from nginx 1.22, lighttpd 1.4.69 and Apache 2.4.71.
    #[test]
    fn what_web_servers_send_is_taken() {
        for (bytes, target, body) in [
            (&include_bytes!("../../fuzz/seeds/scgi/nginx-get")[..], "/page/5?with=a&query=%26", ""),
            (include_bytes!("../../fuzz/seeds/scgi/nginx-post"), "/echo", "one, two"),
            (include_bytes!("../../fuzz/seeds/scgi/nginx-chunked"), "/echo", "one, two"),
            (include_bytes!("../../fuzz/seeds/scgi/lighttpd-get"), "/page/5?with=a&query=%26", ""),
            (include_bytes!("../../fuzz/seeds/scgi/lighttpd-post"), "/echo", "one, two"),
            (include_bytes!("../../fuzz/seeds/scgi/apache-get"), "/page/5?with=a&query=%26", ""),
            (include_bytes!("../../fuzz/seeds/scgi/apache-post"), "/echo", "one, two"),
        ] {
            let (mut events, error) = decode(bytes, || usize::MAX);
            assert_eq!((error, events.pop()), (None, Some(ScgiEvent::End)), "{target}");
            let came = if body.is_empty() { None } else { events.pop() };
            assert_eq!(came, (!body.is_empty()).then(|| ScgiEvent::Body(Bytes::from_static(body.as_bytes()))));
            let Some(ScgiEvent::Request { params, .. }) = events.pop() else { panic!("{target}") };
            let request = crate::protocol::cgi::request(params, |announced| announced).unwrap();
            assert_eq!(request.uri().to_string(), target);
            assert_eq!(request.body().unwrap_or(0), body.len() as u64);
        }
    }

    #[test]
    fn arbitrary_bytes_do_no_harm_however_they_are_cut() {
        for seed in 0..2000 {
            let mut random = fastrand::Rng::with_seed(seed);
            let mut bytes = request("REQUEST_METHOD\0GET\0", "body");
            for _ in 0..random.usize(1..4) {
                let at = random.usize(0..bytes.len());
                bytes[at] = *random.choice(b"\x00,:0195CONTENT_LENGTHSCGI").unwrap();
            }
            let once = decode(&bytes, || usize::MAX);
            let pieces = decode(&bytes, || random.usize(1..9));
            assert_eq!(once, pieces, "seed {seed}");
        }
    }
}
