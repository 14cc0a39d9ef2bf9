//! Implements the client's half of FastCGI 1.0: encodes a request to an application, and decodes its response.
//!
//! ```text
//!             begin_request, params, stdin_*               bytes
//!   gateway ──────────────────────────────▶ application ───────────▶ ResponseDecoder::decode ──▶ ResponseEvent
//! ```
//!
//! A request is written in this order: [`begin_request`], [`params`], any number of [`stdin_header`] with that many
//! bytes of the body, [`stdin_end`]. All functions append to one buffer, so a request without a body is contiguous.
//!
//! A parameter is not divided between two PARAMS records unless it is longer than a record, and no record has padding:
//! php-fpm and others read each record by itself, and lose track of the records after a padded empty one.
//!
//! One connection carries one request at a time. Consecutive requests on a connection must have different ids
//! ([`next_id`]): some applications send a second END_REQUEST (php-src PR 1169), which the decoder of the next request
//! skips because of its id.

use std::fmt;

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};

use super::{
    BEGIN_REQUEST, END_REQUEST, HEADER, KEEP_CONN, MAX_CONTENT, PARAMS, Record, RequestId, STDERR, STDIN, STDOUT,
    header, put_header,
};
use crate::protocol::params::put_length;

/// The number of a responder's role (5.1).
const RESPONDER: u16 = 1;
/// The content of an END_REQUEST (5.5).
const END_CONTENT: usize = 8;

/// Returns the id of the request after the request `id` on the same connection. Ids are never 0.
#[cfg(test)]
pub(crate) fn next_id(id: RequestId) -> RequestId {
    id.checked_add(1).unwrap_or(1)
}

/// Writes a BEGIN_REQUEST for a responder (5.1).
pub(crate) fn begin_request(out: &mut BytesMut, id: RequestId, keep_connection: bool) {
    put_header(out, BEGIN_REQUEST, id, 8);
    out.put_u16(RESPONDER);
    out.put_slice(&[if keep_connection { KEEP_CONN } else { 0 }, 0, 0, 0, 0, 0]);
}

/// Writes all parameters of a request and the end of their stream (5.2).
#[cfg(test)]
pub(crate) fn params<'a>(out: &mut BytesMut, id: RequestId, pairs: impl IntoIterator<Item = (&'a [u8], &'a [u8])>) {
    let mut writer = ParamsWriter::new(out, id);
    for (name, value) in pairs {
        writer.pair(name, value);
    }
    writer.end();
}

/// Writes the parameters of a request one by one. [`ParamsWriter::end`] must be called last.
///
/// A name or value must be shorter than 2 GiB, the longest that the format can express (3.4).
#[derive(Debug)]
#[must_use]
pub(crate) struct ParamsWriter<'a> {
    out: &'a mut BytesMut,
    id: RequestId,
    /// The position of the current record in `out`.
    record: usize,
}

impl<'a> ParamsWriter<'a> {
    pub(crate) fn new(out: &'a mut BytesMut, id: RequestId) -> Self {
        let record = out.len();
        put_header(out, PARAMS, id, 0);
        Self { out, id, record }
    }

    pub(crate) fn pair(&mut self, name: &[u8], value: &[u8]) {
        let size = encoded_length(name) + encoded_length(value);
        if size > self.space() && self.space() < MAX_CONTENT {
            self.next_record();
        }
        // The lengths always fit: either the whole pair does, or the record is empty.
        put_length(self.out, name.len());
        put_length(self.out, value.len());
        for mut part in [name, value] {
            while !part.is_empty() {
                if self.space() == 0 {
                    self.next_record();
                }
                let (now, later) = part.split_at(self.space().min(part.len()));
                self.out.put_slice(now);
                part = later;
            }
        }
    }

    /// Ends the stream with an empty record.
    pub(crate) fn end(mut self) {
        if self.space() < MAX_CONTENT {
            self.next_record();
        }
    }

    /// Returns how many bytes the current record can still hold.
    fn space(&self) -> usize {
        MAX_CONTENT.saturating_sub(self.out.len() - self.record - HEADER)
    }

    fn next_record(&mut self) {
        let content = u16::try_from(self.out.len() - self.record - HEADER).unwrap_or(u16::MAX);
        if let Some(place) = self.out.get_mut(self.record..self.record + HEADER) {
            place.copy_from_slice(&header(PARAMS, self.id, content));
        }
        self.record = self.out.len();
        put_header(self.out, PARAMS, self.id, 0);
    }
}

/// Returns the size of a name or value together with its length (3.4).
fn encoded_length(text: &[u8]) -> usize {
    text.len() + if text.len() < 0x80 { 1 } else { 4 }
}

/// Returns the header of a STDIN record with `length` bytes of the body, which must follow. `length` must not be 0,
/// which would end the body.
pub(crate) fn stdin_header(length: u16, id: RequestId) -> [u8; HEADER] {
    debug_assert!(length > 0, "an empty STDIN record ends the body");
    header(STDIN, id, length)
}

/// Writes the end of the body.
pub(crate) fn stdin_end(out: &mut BytesMut, id: RequestId) {
    put_header(out, STDIN, id, 0);
}

/// A decoded part of a response.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum ResponseEvent {
    /// A chunk of the response in CGI form, never empty.
    Stdout(Bytes),
    /// A chunk of the application's error messages, never empty.
    Stderr(Bytes),
    /// The end of the response (5.5).
    End { app_status: u32, protocol_status: u8 },
}

/// A violation of the protocol by the application: the connection must be closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ResponseError {
    /// A record of a version other than 1.
    Version(u8),
    /// An END_REQUEST whose content is not 8 bytes.
    EndLength(u16),
}

impl fmt::Display for ResponseError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Version(version) => {
                write!(f, "the application sent a record of version {version}, which is not FastCGI 1")
            }
            Self::EndLength(length) => write!(f, "the application sent an END_REQUEST of {length} bytes instead of 8"),
        }
    }
}

impl std::error::Error for ResponseError {}

/// The decoder's position in the input.
#[derive(Clone, Copy, Debug)]
enum Place {
    /// Before a record's header.
    Header,
    /// In the content of an output stream.
    Output { is_stdout: bool, left: u16, padding: u8 },
    /// In bytes that are ignored.
    Skip { left: u32 },
}

/// Decodes the response to one request.
///
/// Records of other requests, management records and records of unknown types are skipped. So is the end of an output
/// stream: the response ends with END_REQUEST only.
#[derive(Debug)]
pub(crate) struct ResponseDecoder {
    id: RequestId,
    place: Place,
    has_ended: bool,
}

impl ResponseDecoder {
    pub(crate) fn new(id: RequestId) -> Self {
        Self { id, place: Place::Header, has_ended: false }
    }

    /// Removes the bytes of the next event from `input` and returns the event. Returns `None` if more bytes are needed,
    /// or after [`ResponseEvent::End`].
    ///
    /// # Errors
    /// Returns [`ResponseError`] if the application violated the protocol.
    pub(crate) fn decode(&mut self, input: &mut BytesMut) -> Result<Option<ResponseEvent>, ResponseError> {
        loop {
            match self.place {
                Place::Header => {
                    let record = if self.has_ended { None } else { Record::read(input) };
                    let Some(record) = record else { return Ok(None) };
                    let record = record.map_err(ResponseError::Version)?;
                    let is_end = record.kind == END_REQUEST && record.id == self.id;
                    if is_end {
                        let Some(end) = read_end(record, input)? else { return Ok(None) };
                        self.has_ended = true;
                        self.skip(input, record.padding.into());
                        return Ok(Some(end));
                    }
                    input.advance(HEADER);
                    self.place = self.after_header(record);
                }
                Place::Output { is_stdout, left, padding } => {
                    if input.is_empty() {
                        return Ok(None);
                    }
                    let bytes = input.split_to(usize::from(left).min(input.len())).freeze();
                    let left = left - u16::try_from(bytes.len()).unwrap_or(left);
                    self.place = if left == 0 {
                        Place::Skip { left: padding.into() }
                    } else {
                        Place::Output { is_stdout, left, padding }
                    };
                    let event = if is_stdout { ResponseEvent::Stdout } else { ResponseEvent::Stderr };
                    return Ok(Some(event(bytes)));
                }
                Place::Skip { left } => {
                    self.skip(input, left);
                    if let Place::Skip { .. } = self.place {
                        return Ok(None);
                    }
                }
            }
        }
    }

    /// Whether the response has ended and nothing follows it: `input` is the rest of what was read. Only then may the
    /// connection carry another request, provided that the whole request was written and asked to keep the connection.
    pub(crate) fn is_clean(&self, input: &[u8]) -> bool {
        self.has_ended && input.is_empty() && matches!(self.place, Place::Header)
    }

    fn after_header(&self, record: Record) -> Place {
        let Record { kind, id, content, padding } = record;
        if id == self.id && matches!(kind, STDOUT | STDERR) && content > 0 {
            Place::Output { is_stdout: kind == STDOUT, left: content, padding }
        } else {
            Place::Skip { left: u32::from(content) + u32::from(padding) }
        }
    }

    fn skip(&mut self, input: &mut BytesMut, left: u32) {
        let take = input.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        input.advance(take);
        let left = left - u32::try_from(take).unwrap_or(left);
        self.place = if left == 0 { Place::Header } else { Place::Skip { left } };
    }
}

/// Removes an END_REQUEST without its padding from `input`. Returns `None` if it is incomplete.
fn read_end(record: Record, input: &mut BytesMut) -> Result<Option<ResponseEvent>, ResponseError> {
    if usize::from(record.content) != END_CONTENT {
        return Err(ResponseError::EndLength(record.content));
    }
    let content = input.get(HEADER..).and_then(<[u8]>::first_chunk::<END_CONTENT>);
    let Some(&[a, b, c, d, protocol_status, ..]) = content else { return Ok(None) };
    input.advance(HEADER + END_CONTENT);
    Ok(Some(ResponseEvent::End { app_status: u32::from_be_bytes([a, b, c, d]), protocol_status }))
}

#[cfg(test)]
mod tests {
    use super::super::{FastCgiDecoder, FastCgiEvent, UNKNOWN_TYPE, end_request, stdout_end, stdout_header};
    use super::*;
    use crate::protocol::role::Role;

    type Pairs = Vec<(Vec<u8>, Vec<u8>)>;

    fn borrowed(pairs: &Pairs) -> impl Iterator<Item = (&[u8], &[u8])> {
        pairs.iter().map(|(name, value)| (&name[..], &value[..]))
    }

    fn encode(id: RequestId, keep_connection: bool, pairs: &Pairs, body: &[u8], piece: usize) -> BytesMut {
        let mut out = BytesMut::new();
        begin_request(&mut out, id, keep_connection);
        params(&mut out, id, borrowed(pairs));
        for chunk in body.chunks(piece) {
            out.extend_from_slice(&stdin_header(u16::try_from(chunk.len()).unwrap(), id));
            out.extend_from_slice(chunk);
        }
        stdin_end(&mut out, id);
        out
    }

    /// Returns what the server half decodes: the pairs, the body, and whether to keep the connection.
    fn serve(mut wire: BytesMut, id: RequestId) -> (Pairs, Vec<u8>, bool) {
        let mut decoder = FastCgiDecoder::new(usize::MAX, 1);
        let (mut pairs, mut body, mut keep, mut has_ended) = (Vec::new(), Vec::new(), None, false);
        while let Some(event) = decoder.decode(&mut wire).unwrap() {
            assert!(!has_ended);
            match event {
                FastCgiEvent::Request { id: other, keep_connection, role: Role::Responder, params } => {
                    assert_eq!(other, id);
                    pairs = params.iter().map(|(name, value)| (name.to_vec(), value.to_vec())).collect();
                    keep = Some(keep_connection);
                }
                FastCgiEvent::Stdin { id: other, bytes } if other == id => body.extend_from_slice(&bytes),
                FastCgiEvent::StdinEnd { id: other } if other == id => has_ended = true,
                other => panic!("{other:?}"),
            }
        }
        assert!(has_ended && wire.is_empty() && decoder.finish(id) && decoder.is_idle());
        (pairs, body, keep.unwrap())
    }

    /// Returns the contents of the PARAMS records.
    fn params_records(mut wire: &[u8]) -> Vec<&[u8]> {
        let mut contents = Vec::new();
        while let Some(record) = Record::read(wire) {
            let record = record.unwrap();
            assert_eq!(record.padding, 0);
            let (content, rest) = wire[HEADER..].split_at(record.content.into());
            wire = rest;
            contents.extend((record.kind == PARAMS).then_some(content));
        }
        assert!(wire.is_empty());
        contents
    }

    #[test]
    fn a_small_request_is_these_bytes() {
        let pairs = vec![(b"A".to_vec(), b"xy".to_vec())];
        let expected = b"\x01\x01\x01\x02\0\x08\0\0\0\x01\x01\0\0\0\0\0\
            \x01\x04\x01\x02\0\x05\0\0\x01\x02Axy\
            \x01\x04\x01\x02\0\0\0\0\x01\x05\x01\x02\0\0\0\0";
        assert_eq!(encode(0x102, true, &pairs, b"", 1), &expected[..]);
        assert_eq!(params_records(&encode(1, false, &Vec::new(), b"", 1)), [b""]);
    }

    #[test]
    fn the_server_half_decodes_the_request_that_was_encoded() {
        for seed in 0..60 {
            let mut random = fastrand::Rng::with_seed(seed);
            let lengths = [0, 1, 127, 128, 300, 8_000, MAX_CONTENT - 9, MAX_CONTENT, 65_536, 200_000];
            let pairs: Pairs = (0..random.usize(0..12))
                .map(|_| {
                    let name = vec![b'N'; lengths[random.usize(0..lengths.len())]];
                    let value = (0..lengths[random.usize(0..lengths.len())]).map(|_| random.u8(..)).collect();
                    (name, value)
                })
                .collect();
            let body: Vec<u8> = (0..lengths[random.usize(0..lengths.len())]).map(|_| random.u8(..)).collect();
            let (id, keep) = (random.u16(1..), random.bool());
            let wire = encode(id, keep, &pairs, &body, random.usize(1..=65_535));
            for content in params_records(&wire) {
                assert!(content.len() <= MAX_CONTENT, "seed {seed}");
            }
            assert!(serve(wire, id) == (pairs, body, keep), "seed {seed}");
        }
    }

    /// php-fpm parses each PARAMS record by itself.
    #[test]
    fn each_record_holds_whole_pairs_if_they_fit() {
        for size in [100, 127, 1_000, 30_000, 32_758, MAX_CONTENT - 9] {
            let pairs: Pairs = (0..20).map(|_| (b"NAME".to_vec(), vec![b'v'; size])).collect();
            let wire = encode(1, false, &pairs, b"", 1);
            let records = params_records(&wire);
            let (end, records) = records.split_last().unwrap();
            assert!(end.is_empty());
            let decoded: Vec<_> = records
                .iter()
                .map(|record| crate::protocol::params::Params::parse(Bytes::copy_from_slice(record)).unwrap())
                .collect();
            assert_eq!(decoded.iter().map(|params| params.iter().count()).sum::<usize>(), 20, "{size}");
            assert!(records.iter().all(|record| !record.is_empty()));
        }
    }

    fn record(kind: u8, id: RequestId, content: &[u8], padding: u8) -> Vec<u8> {
        let mut out = header(kind, id, u16::try_from(content.len()).unwrap()).to_vec();
        out[6] = padding;
        out.extend_from_slice(content);
        out.extend(std::iter::repeat_n(0xEE, padding.into()));
        out
    }

    /// Feeds `wire` in chunks. Returns the events, with adjacent chunks of a stream joined, the rest, and whether the
    /// connection is clean.
    fn decode(wire: &[u8], mut piece: impl FnMut() -> usize) -> (Vec<ResponseEvent>, Option<ResponseError>, bool) {
        let (mut decoder, mut input, mut rest) = (ResponseDecoder::new(7), BytesMut::new(), wire);
        let (mut events, mut error) = (Vec::new(), None);
        while !rest.is_empty() && error.is_none() {
            let (now, later) = rest.split_at(piece().clamp(1, rest.len()));
            rest = later;
            input.extend_from_slice(now);
            loop {
                match decoder.decode(&mut input) {
                    Ok(Some(event)) => join(&mut events, event),
                    Ok(None) => break,
                    Err(fault) => {
                        error = Some(fault);
                        break;
                    }
                }
            }
        }
        (events, error, decoder.is_clean(&input))
    }

    fn join(events: &mut Vec<ResponseEvent>, event: ResponseEvent) {
        match (events.last_mut(), event) {
            (Some(ResponseEvent::Stdout(bytes)), ResponseEvent::Stdout(more))
            | (Some(ResponseEvent::Stderr(bytes)), ResponseEvent::Stderr(more)) => {
                assert!(!more.is_empty());
                *bytes = [bytes.as_ref(), more.as_ref()].concat().into();
            }
            (_, event) => events.push(event),
        }
    }

    /// Returns the result for `wire`, which must not depend on how the bytes are split.
    fn outcome(wire: &[u8]) -> (Vec<ResponseEvent>, Option<ResponseError>, bool) {
        let expected = decode(wire, || usize::MAX);
        assert_eq!(decode(wire, || 1), expected, "in single bytes");
        for seed in 0..100 {
            let mut random = fastrand::Rng::with_seed(seed);
            let longest = random.usize(2..=wire.len().max(2));
            assert_eq!(decode(wire, || random.usize(1..longest)), expected, "seed {seed}");
        }
        expected
    }

    const END: ResponseEvent = ResponseEvent::End { app_status: 0, protocol_status: 0 };

    #[test]
    fn other_records_are_skipped_and_the_streams_passed_on() {
        let wire = [
            record(UNKNOWN_TYPE, 0, &[9; 8], 0),
            record(STDOUT, 7, b"Status: 200\r\n\r\n", 5),
            record(STDERR, 7, b"notice\n", 255),
            record(STDOUT, 8, b"of another request", 1),
            record(END_REQUEST, 8, b"short", 0),
            record(STDOUT, 7, b"body", 0),
            record(STDERR, 7, b"", 3),
            record(42, 7, b"of an unknown type", 6),
            record(STDOUT, 7, b"", 1),
            record(END_REQUEST, 7, &[1, 2, 3, 4, 5, 0, 0, 0], 9),
        ];
        let expected = vec![
            ResponseEvent::Stdout(Bytes::from_static(b"Status: 200\r\n\r\n")),
            ResponseEvent::Stderr(Bytes::from_static(b"notice\n")),
            ResponseEvent::Stdout(Bytes::from_static(b"body")),
            ResponseEvent::End { app_status: 0x0102_0304, protocol_status: 5 },
        ];
        assert_eq!(outcome(&wire.concat()), (expected, None, true));
    }

    #[test]
    fn random_responses_are_the_same_however_they_are_split() {
        for seed in 0..100 {
            let mut random = fastrand::Rng::with_seed(seed);
            let (mut wire, mut expected) = (Vec::new(), Vec::new());
            for _ in 0..random.usize(0..20) {
                let kind = [STDOUT, STDOUT, STDERR, END_REQUEST, 0, 42][random.usize(0..6)];
                let id = if kind == END_REQUEST || random.u8(..4) == 0 { 6 } else { 7 };
                let content: Vec<u8> = (0..random.usize(0..300)).map(|_| random.u8(..)).collect();
                wire.extend(record(kind, id, &content, random.u8(..)));
                let bytes = Bytes::from(content);
                match kind {
                    STDOUT if id == 7 && !bytes.is_empty() => join(&mut expected, ResponseEvent::Stdout(bytes)),
                    STDERR if id == 7 && !bytes.is_empty() => join(&mut expected, ResponseEvent::Stderr(bytes)),
                    _ => {}
                }
            }
            wire.extend(record(END_REQUEST, 7, &[0; 8], random.u8(..)));
            expected.push(END);
            let is_clean = random.bool();
            if !is_clean {
                wire.push(random.u8(..));
            }
            assert_eq!(outcome(&wire), (expected, None, is_clean), "seed {seed}");
        }
    }

    #[test]
    fn the_response_of_the_server_half_is_decoded() {
        let mut wire = BytesMut::new();
        stdout_header(&mut wire, 7, 5);
        wire.extend_from_slice(b"hello");
        stdout_end(&mut wire, 7, 3);
        let end = ResponseEvent::End { app_status: 3, protocol_status: 0 };
        assert_eq!(outcome(&wire), (vec![ResponseEvent::Stdout(Bytes::from_static(b"hello")), end], None, true));
    }

    #[test]
    fn violations_are_errors_and_an_incomplete_response_has_no_end() {
        let mut version = record(STDOUT, 7, b"x", 0);
        version[0] = 2;
        assert_eq!(outcome(&version), (vec![], Some(ResponseError::Version(2)), false));
        for length in [0, 7, 9] {
            let wire = record(END_REQUEST, 7, &vec![0; length], 0);
            let error = ResponseError::EndLength(u16::try_from(length).unwrap());
            assert_eq!(outcome(&wire), (vec![], Some(error), false));
        }
        let wire = [record(STDOUT, 7, b"x", 0), record(END_REQUEST, 7, &[0; 8], 0)].concat();
        for end in 0..wire.len() {
            let (events, error, is_clean) = outcome(&wire[..end]);
            assert!(!events.contains(&END) && error.is_none() && !is_clean, "{end}");
        }
    }

    /// While the padding of END_REQUEST is missing, the connection must not be used again.
    #[test]
    fn a_response_whose_padding_is_missing_has_ended_but_is_not_clean() {
        let wire = record(END_REQUEST, 7, &[0; 8], 4);
        assert_eq!(decode(&wire[..wire.len() - 1], || usize::MAX), (vec![END], None, false));
    }

    /// php-src PR 1169: php-cgi sent two END_REQUEST, and the web server took the second for the next response.
    #[test]
    fn a_second_end_request_does_not_end_the_next_request() {
        let mut input = BytesMut::new();
        end_request(&mut input, 7, 0, super::super::FastCgiStatus::Complete);
        let one = input.clone();
        let mut first = ResponseDecoder::new(7);
        assert_eq!(first.decode(&mut input), Ok(Some(END)));
        assert!(first.is_clean(&input));
        // In the same read, the second one shows that the connection is not clean.
        input.extend_from_slice(&one);
        assert_eq!(first.decode(&mut input), Ok(None));
        assert!(!first.is_clean(&input));
        // If it arrives after the connection was used again, its id is not that of the next request.
        let mut second = ResponseDecoder::new(next_id(7));
        assert_eq!(second.decode(&mut input), Ok(None));
        input.extend_from_slice(&record(END_REQUEST, 8, &[0; 8], 0));
        assert_eq!(second.decode(&mut input), Ok(Some(END)));
        assert!(second.is_clean(&input));
        assert_eq!(next_id(RequestId::MAX), 1);
    }

    #[test]
    fn a_chunk_is_not_copied() {
        let mut input = BytesMut::from(&record(STDOUT, 7, &[b'x'; 4000], 0)[..4000]);
        let place = input[HEADER..].as_ptr();
        let Ok(Some(ResponseEvent::Stdout(bytes))) = ResponseDecoder::new(7).decode(&mut input) else { panic!() };
        assert_eq!((bytes.len(), bytes.as_ptr()), (4000 - HEADER, place));
    }
}
