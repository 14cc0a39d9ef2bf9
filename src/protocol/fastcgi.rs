//! FastCGI 1.0: bytes to events, replies to bytes. Section numbers are those of the FastCGI specification.
//!
//! ```text
//!              bytes                       Event                              reply
//!   peer ───────────────▶ Decoder::decode ─────────▶ worker::fastcgi ─────▶ stdout_header, end_request ──▶ peer
//! ```
//!
//! The [`Decoder`] keeps what must be remembered between records: which request ids are in use and in which
//! stream they are, and the parameters that have come so far. It copies a body never, and parameters only when
//! they are spread over several records. However the same bytes are cut into pieces, the same requests,
//! bodies and replies come out.
//!
//! Whose fault it is: what the specification gives a reply for is an [`Event`] that carries the reply; what
//! leaves us unable to tell where the next record begins, or contradicts what is going on, is an [`Error`], and
//! the connection is to be closed.

use std::fmt;

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};

use super::params::Params;

/// The id of a request on its connection, never 0.
pub(crate) type RequestId = u16;

/// The size of a record's header (3.3).
pub(crate) const HEADER: usize = 8;
/// The largest content of a record that is a multiple of 8, so that it needs no padding.
pub(crate) const LARGEST_CONTENT: usize = 65_528;

const VERSION: u8 = 1;
const BEGIN_REQUEST: u8 = 1;
const ABORT_REQUEST: u8 = 2;
const END_REQUEST: u8 = 3;
const PARAMS: u8 = 4;
const STDIN: u8 = 5;
const STDOUT: u8 = 6;
const GET_VALUES: u8 = 9;
const GET_VALUES_RESULT: u8 = 10;
const UNKNOWN_TYPE: u8 = 11;
const RESPONDER: u16 = 1;
const KEEP_CONN: u8 = 1;

/// The protocol status of END_REQUEST (5.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Status {
    Complete = 0,
    CannotMultiplex = 1,
    UnknownRole = 3,
}

/// What came in.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// A request whose parameters are complete. Its body follows as [`Event::Stdin`].
    Request { id: RequestId, keep_connection: bool, params: Params },
    /// A request that cannot be served because its parameters are too long or make no sense. What else
    /// belongs to it is skipped; it wants an answer.
    BadRequest { id: RequestId, keep_connection: bool, fault: Fault },
    /// A piece of a request's body, never empty.
    Stdin { id: RequestId, bytes: Bytes },
    /// The end of a request's body.
    StdinEnd { id: RequestId },
    /// The peer wants nothing more of this request (5.4).
    Abort { id: RequestId },
    /// An answer that the decoder knows by itself, to be sent as it is. `then_close` if the peer had not
    /// asked to keep the connection.
    Reply { bytes: Bytes, then_close: bool },
}

/// What is wrong with a request that is otherwise well framed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The parameters exceed the limit.
    ParamsTooLong,
    /// A name or value reaches beyond the end of the parameters.
    ParamsMalformed,
}

/// The peer broke the protocol in a way that has no reply: the connection is to be closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Error {
    /// A record of a version other than 1.
    Version(u8),
    /// A BEGIN_REQUEST whose body is not 8 bytes.
    BeginLength(u16),
    /// A BEGIN_REQUEST for a request that is not over.
    BeginTwice(RequestId),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Version(version) => write!(f, "a record of version {version}, which is not FastCGI 1"),
            Self::BeginLength(length) => write!(f, "a BEGIN_REQUEST of {length} bytes, which must have 8"),
            Self::BeginTwice(id) => write!(f, "a BEGIN_REQUEST for request {id}, which is being served"),
        }
    }
}

impl std::error::Error for Error {}

/// The header of a record (3.3).
#[derive(Clone, Copy, Debug)]
struct Record {
    kind: u8,
    id: RequestId,
    content: u16,
    padding: u8,
}

impl Record {
    fn read(bytes: &[u8]) -> Option<Result<Self, Error>> {
        let &[version, kind, id_high, id_low, length_high, length_low, padding, _] = bytes.first_chunk::<HEADER>()?;
        if version != VERSION {
            return Some(Err(Error::Version(version)));
        }
        let id = u16::from_be_bytes([id_high, id_low]);
        let content = u16::from_be_bytes([length_high, length_low]);
        Some(Ok(Self { kind, id, content, padding }))
    }
}

/// Where the decoder is in the bytes.
#[derive(Clone, Copy, Debug)]
enum Place {
    /// Before a record's header.
    Header,
    /// In the content of a record whose stream flows through piece by piece.
    Content { kind: u8, id: RequestId, left: u16, padding: u8 },
    /// In what is of no interest.
    Skip { left: u32 },
}

/// A request that the peer has begun.
#[derive(Debug)]
struct Open {
    id: RequestId,
    keep_connection: bool,
    phase: Phase,
}

#[derive(Debug)]
enum Phase {
    Params(BytesMut),
    Stdin,
    /// Its body has ended.
    Done,
    /// What comes for it interests nobody.
    Skipped,
}

/// Turns what one connection sends into events.
#[derive(Debug)]
pub(crate) struct Decoder {
    max_params: usize,
    max_requests: usize,
    place: Place,
    open: Vec<Open>,
}

impl Decoder {
    /// `max_params` bytes of parameters per request, `max_requests` requests at a time.
    pub(crate) fn new(max_params: usize, max_requests: usize) -> Self {
        Self { max_params, max_requests, place: Place::Header, open: Vec::new() }
    }

    /// Takes the next event out of `input`, and the bytes that it was made of. `None` if there are too few.
    ///
    /// # Errors
    /// [`Error`]: the peer broke the protocol.
    pub(crate) fn decode(&mut self, input: &mut BytesMut) -> Result<Option<Event>, Error> {
        loop {
            match self.place {
                Place::Header => {
                    let Some(record) = Record::read(input) else { return Ok(None) };
                    match self.record(record?, input)? {
                        Progress::Event(event) => return Ok(Some(event)),
                        Progress::Continue => {}
                        Progress::Starved => return Ok(None),
                    }
                }
                Place::Content { kind, id, left, padding } => {
                    if input.is_empty() {
                        return Ok(None);
                    }
                    let take = usize::from(left).min(input.len());
                    let bytes = input.split_to(take);
                    let left = left - u16::try_from(take).unwrap_or(left);
                    self.place = if left == 0 {
                        Place::Skip { left: padding.into() }
                    } else {
                        Place::Content { kind, id, left, padding }
                    };
                    if let Some(event) = self.content(kind, id, bytes) {
                        return Ok(Some(event));
                    }
                }
                Place::Skip { left } => {
                    let take = input.len().min(usize::try_from(left).unwrap_or(usize::MAX));
                    input.advance(take);
                    let left = left - u32::try_from(take).unwrap_or(left);
                    self.place = if left == 0 { Place::Header } else { Place::Skip { left } };
                    if left > 0 {
                        return Ok(None);
                    }
                }
            }
        }
    }

    /// The request is over: we have sent its END_REQUEST. What still comes for it is ignored (3.3: "inactive").
    /// True if nothing more can come, because its body has ended.
    pub(crate) fn finish(&mut self, id: RequestId) -> bool {
        let whole = self.find(id).is_some_and(|open| matches!(open.phase, Phase::Done));
        self.open.retain(|open| open.id != id);
        whole
    }

    /// Whether the next record in `input`, the rest of what has been read, says that this request has no body.
    pub(crate) fn body_is_empty(&self, id: RequestId, input: &[u8]) -> bool {
        let padding = match self.place {
            Place::Header => 0,
            Place::Skip { left } => left as usize,
            Place::Content { .. } => return false,
        };
        let [high, low] = id.to_be_bytes();
        input.get(padding..).is_some_and(|rest| rest.starts_with(&[VERSION, STDIN, high, low, 0, 0]))
    }

    /// Whether nothing has begun that is not over.
    pub(crate) fn is_idle(&self) -> bool {
        self.open.is_empty() && matches!(self.place, Place::Header | Place::Skip { .. })
    }

    fn find(&mut self, id: RequestId) -> Option<&mut Open> {
        self.open.iter_mut().find(|open| open.id == id)
    }

    /// Starts on a record whose header stands at the front of `input`.
    fn record(&mut self, record: Record, input: &mut BytesMut) -> Result<Progress, Error> {
        let Record { kind, id, content, padding } = record;
        let whole = HEADER + usize::from(content);
        match kind {
            PARAMS | STDIN if id != 0 => {
                input.advance(HEADER);
                if content == 0 {
                    self.place = Place::Skip { left: padding.into() };
                    return Ok(self.end_of_stream(kind, id).map_or(Progress::Continue, Progress::Event));
                }
                let wanted = self.find(id).is_some_and(|open| match open.phase {
                    Phase::Params(_) => kind == PARAMS,
                    Phase::Stdin => kind == STDIN,
                    Phase::Done | Phase::Skipped => false,
                });
                self.place = if wanted {
                    Place::Content { kind, id, left: content, padding }
                } else {
                    Place::Skip { left: u32::from(content) + u32::from(padding) }
                };
                Ok(Progress::Continue)
            }
            BEGIN_REQUEST if id != 0 => {
                if content != 8 {
                    return Err(Error::BeginLength(content));
                }
                let Some(body) = input.get(HEADER..whole) else { return Ok(Progress::Starved) };
                let body: [u8; 8] = body.try_into().map_err(|_| Error::BeginLength(content))?;
                input.advance(whole);
                self.place = Place::Skip { left: padding.into() };
                self.begin(id, body)
            }
            ABORT_REQUEST if id != 0 => {
                input.advance(HEADER);
                self.place = Place::Skip { left: u32::from(content) + u32::from(padding) };
                Ok(self.abort(id))
            }
            GET_VALUES if id == 0 => {
                let Some(body) = input.get(HEADER..whole) else { return Ok(Progress::Starved) };
                let bytes = self.values(body);
                input.advance(whole);
                self.place = Place::Skip { left: padding.into() };
                Ok(Progress::Event(Event::Reply { bytes, then_close: false }))
            }
            kind => {
                input.advance(HEADER);
                self.place = Place::Skip { left: u32::from(content) + u32::from(padding) };
                // An unknown management record has an answer (4.2); an application record of a type that is
                // not for us (an output stream, say) has none, and the request goes on.
                Ok(if id == 0 { Progress::Event(unknown_type(kind)) } else { Progress::Continue })
            }
        }
    }

    fn begin(&mut self, id: RequestId, body: [u8; 8]) -> Result<Progress, Error> {
        let [role_high, role_low, flags, ..] = body;
        if self.find(id).is_some() {
            return Err(Error::BeginTwice(id));
        }
        let keep_connection = flags & KEEP_CONN != 0;
        let refuse = |status| {
            let mut bytes = BytesMut::new();
            end_request(&mut bytes, id, 0, status);
            Progress::Event(Event::Reply { bytes: bytes.freeze(), then_close: !keep_connection })
        };
        if u16::from_be_bytes([role_high, role_low]) != RESPONDER {
            return Ok(refuse(Status::UnknownRole));
        }
        if self.open.len() >= self.max_requests {
            return Ok(refuse(Status::CannotMultiplex));
        }
        self.open.push(Open { id, keep_connection, phase: Phase::Params(BytesMut::new()) });
        Ok(Progress::Continue)
    }

    fn abort(&mut self, id: RequestId) -> Progress {
        let Some(open) = self.find(id) else { return Progress::Continue };
        if let Phase::Params(_) = open.phase {
            // Nobody has heard of it yet: it ends here.
            let then_close = !open.keep_connection;
            self.finish(id);
            let mut bytes = BytesMut::new();
            end_request(&mut bytes, id, 0, Status::Complete);
            return Progress::Event(Event::Reply { bytes: bytes.freeze(), then_close });
        }
        if let Phase::Skipped = open.phase {
            return Progress::Continue; // it is being answered, or was aborted before
        }
        open.phase = Phase::Skipped;
        Progress::Event(Event::Abort { id })
    }

    fn content(&mut self, kind: u8, id: RequestId, bytes: BytesMut) -> Option<Event> {
        let max_params = self.max_params;
        let open = self.find(id)?; // none: the request ended in the middle of the record
        match &mut open.phase {
            Phase::Params(params) if kind == PARAMS => {
                if params.len() + bytes.len() > max_params {
                    return Some(open.refuse(Fault::ParamsTooLong));
                }
                if params.is_empty() {
                    *params = bytes; // all of them at once, as a rule: no copy
                } else {
                    params.unsplit(bytes);
                }
                None
            }
            Phase::Stdin if kind == STDIN => Some(Event::Stdin { id, bytes: bytes.freeze() }),
            Phase::Params(_) | Phase::Stdin | Phase::Done | Phase::Skipped => None,
        }
    }

    fn end_of_stream(&mut self, kind: u8, id: RequestId) -> Option<Event> {
        let open = self.find(id)?;
        match &mut open.phase {
            Phase::Params(params) if kind == PARAMS => {
                let raw = std::mem::take(params).freeze();
                match Params::parse(raw) {
                    Some(params) => {
                        open.phase = Phase::Stdin;
                        Some(Event::Request { id, keep_connection: open.keep_connection, params })
                    }
                    None => Some(open.refuse(Fault::ParamsMalformed)),
                }
            }
            Phase::Stdin if kind == STDIN => {
                open.phase = Phase::Done;
                Some(Event::StdinEnd { id })
            }
            Phase::Params(_) | Phase::Stdin | Phase::Done | Phase::Skipped => None,
        }
    }

    /// The answer to GET_VALUES (4.1): the values that we know of those that were asked for.
    fn values(&self, asked: &[u8]) -> Bytes {
        let mut content = BytesMut::new();
        let asked = Params::parse(Bytes::copy_from_slice(asked));
        for (name, _) in asked.iter().flat_map(Params::iter) {
            let value = match name {
                // As many as the worker takes; no server was seen to use the figure.
                b"FCGI_MAX_CONNS" | b"FCGI_MAX_REQS" => self.max_requests.to_string(),
                b"FCGI_MPXS_CONNS" => String::from(if self.max_requests > 1 { "1" } else { "0" }),
                _ => continue,
            };
            // Each name once, however often it was asked for: the reply must fit its record.
            if !content.windows(name.len()).any(|window| window == name) {
                put_length(&mut content, name.len());
                put_length(&mut content, value.len());
                content.put_slice(name);
                content.put_slice(value.as_bytes());
            }
        }
        let mut reply = BytesMut::with_capacity(HEADER + content.len());
        put_header(&mut reply, GET_VALUES_RESULT, 0, content.len());
        reply.extend_from_slice(&content);
        reply.freeze()
    }
}

impl Open {
    fn refuse(&mut self, fault: Fault) -> Event {
        self.phase = Phase::Skipped;
        Event::BadRequest { id: self.id, keep_connection: self.keep_connection, fault }
    }
}

enum Progress {
    Event(Event),
    Continue,
    Starved,
}

fn put_length(out: &mut BytesMut, length: usize) {
    match u8::try_from(length) {
        Ok(short) if short < 0x80 => out.put_u8(short),
        _ => out.put_u32(u32::try_from(length).unwrap_or(u32::MAX) | 0x8000_0000),
    }
}

fn put_header(out: &mut BytesMut, kind: u8, id: RequestId, content: usize) {
    let content = u16::try_from(content).unwrap_or(u16::MAX);
    out.put_slice(&[VERSION, kind]);
    out.put_u16(id);
    out.put_u16(content);
    out.put_slice(&[0, 0]);
}

/// Writes the header of a STDOUT record with `content` bytes, at most [`LARGEST_CONTENT`].
pub(crate) fn stdout_header(out: &mut BytesMut, id: RequestId, content: usize) {
    debug_assert!(content <= LARGEST_CONTENT, "a record holds less than {content} bytes");
    put_header(out, STDOUT, id, content);
}

/// Writes the end of the STDOUT stream and of the request (5.5).
pub(crate) fn stdout_end(out: &mut BytesMut, id: RequestId, application: u32) {
    put_header(out, STDOUT, id, 0);
    end_request(out, id, application, Status::Complete);
}

/// Writes an END_REQUEST (5.5).
pub(crate) fn end_request(out: &mut BytesMut, id: RequestId, application: u32, status: Status) {
    put_header(out, END_REQUEST, id, 8);
    out.put_u32(application);
    out.put_slice(&[status as u8, 0, 0, 0]);
}

/// UNKNOWN_TYPE (4.2): the answer to a management record that we do not know.
fn unknown_type(kind: u8) -> Event {
    let mut bytes = BytesMut::with_capacity(2 * HEADER);
    put_header(&mut bytes, UNKNOWN_TYPE, 0, 8);
    bytes.put_slice(&[kind, 0, 0, 0, 0, 0, 0, 0]);
    Event::Reply { bytes: bytes.freeze(), then_close: false }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(kind: u8, id: RequestId, content: &[u8], padding: usize) -> Vec<u8> {
        let mut out = BytesMut::new();
        put_header(&mut out, kind, id, content.len());
        out[6] = u8::try_from(padding).unwrap();
        out.extend_from_slice(content);
        out.extend(std::iter::repeat_n(0xEE, padding));
        out.to_vec()
    }

    fn begin(id: RequestId, role: u16, flags: u8) -> Vec<u8> {
        let [high, low] = role.to_be_bytes();
        record(BEGIN_REQUEST, id, &[high, low, flags, 0, 0, 0, 0, 0], 0)
    }

    fn pairs(pairs: &[(&str, &str)]) -> Vec<u8> {
        let mut out = BytesMut::new();
        for (name, value) in pairs {
            put_length(&mut out, name.len());
            put_length(&mut out, value.len());
            out.extend_from_slice(name.as_bytes());
            out.extend_from_slice(value.as_bytes());
        }
        out.to_vec()
    }

    fn request(id: RequestId, params: &[u8], body: &[u8]) -> Vec<u8> {
        [
            begin(id, RESPONDER, KEEP_CONN),
            record(PARAMS, id, params, 3),
            record(PARAMS, id, b"", 5),
            record(STDIN, id, body, 1),
            if body.is_empty() { Vec::new() } else { record(STDIN, id, b"", 0) },
        ]
        .concat()
    }

    /// Feeds `bytes` in pieces of the given sizes, and collects events; adjacent pieces of a body are joined.
    fn decode(bytes: &[u8], mut piece: impl FnMut() -> usize) -> Result<Vec<Event>, Error> {
        let mut decoder = Decoder::new(4096, 4);
        let (mut input, mut events) = (BytesMut::new(), Vec::new());
        let mut rest = bytes;
        while !rest.is_empty() {
            let (now, later) = rest.split_at(piece().clamp(1, rest.len()));
            rest = later;
            input.extend_from_slice(now);
            while let Some(event) = decoder.decode(&mut input)? {
                match (events.last_mut(), event) {
                    (Some(Event::Stdin { id, bytes }), Event::Stdin { id: next, bytes: more }) if *id == next => {
                        *bytes = [bytes.as_ref(), more.as_ref()].concat().into();
                    }
                    (_, event) => events.push(event),
                }
            }
        }
        Ok(events)
    }

    fn whole(bytes: &[u8]) -> Vec<Event> {
        decode(bytes, || usize::MAX).unwrap()
    }

    fn reply_kind(event: &Event) -> u8 {
        match event {
            Event::Reply { bytes, .. } => bytes[1],
            other => panic!("not a reply: {other:?}"),
        }
    }

    #[test]
    fn every_split_of_the_same_bytes_gives_the_same_events() {
        let long = "v".repeat(300);
        let params = pairs(&[("REQUEST_METHOD", "POST"), ("LONG", &long), ("EMPTY", "")]);
        let bytes = [
            record(GET_VALUES, 0, &pairs(&[("FCGI_MPXS_CONNS", ""), ("OTHER", "")]), 7),
            request(1, &params, b"hello body"),
            record(42, 0, b"what", 2),
            record(STDOUT, 1, b"not for us", 0),
            request(1 << 8, &params, b""),
            begin(9, 2, 0),
            record(ABORT_REQUEST, 1, b"", 0),
        ]
        .concat();
        let expected = whole(&bytes);
        assert_eq!(expected.len(), 9, "{expected:?}");
        assert_eq!(decode(&bytes, || 1).unwrap(), expected);
        for seed in 0..500 {
            let mut random = fastrand::Rng::with_seed(seed);
            assert_eq!(decode(&bytes, || random.usize(1..60)).unwrap(), expected, "seed {seed}");
        }
    }

    #[test]
    fn params_split_inside_a_length_are_read_as_one() {
        let params = pairs(&[("A", &"x".repeat(200)), ("B", "2")]);
        let mut bytes = begin(1, RESPONDER, 0);
        for piece in params.chunks(3) {
            bytes.extend(record(PARAMS, 1, piece, 5));
        }
        bytes.extend(record(PARAMS, 1, b"", 0));
        let [Event::Request { params, keep_connection: false, .. }] = &whole(&bytes)[..] else { panic!() };
        assert_eq!(params.get("A"), Some("x".repeat(200).as_bytes()));
        assert_eq!(params.get("B"), Some(&b"2"[..]));
        assert_eq!(params.get("C"), None);
    }

    #[test]
    fn a_length_beyond_the_end_is_the_peers_fault() {
        // The sums of CVE-2025-23016: both lengths near 2^31.
        for params in [&b"\x05\x05short"[..], b"\xff\xff\xff\xff\xff\xff\xff\xffx", b"\x7f", b"\x01\x80\0\0", b"\x80"] {
            let bytes = request(1, params, b"the body is skipped");
            let events = whole(&bytes);
            let fault = Fault::ParamsMalformed;
            assert_eq!(events, [Event::BadRequest { id: 1, keep_connection: true, fault }], "{params:?}");
        }
    }

    #[test]
    fn too_many_params_are_refused_and_skipped_and_the_connection_goes_on() {
        let piece = record(PARAMS, 1, &[b'a'; 3000], 0);
        let bytes = [begin(1, RESPONDER, KEEP_CONN), piece.clone(), piece.clone(), piece, record(PARAMS, 1, b"", 0)];
        let bytes = [bytes.concat(), request(2, &pairs(&[("A", "1")]), b"")].concat();
        let events = decode(&bytes, || 700).unwrap();
        assert!(matches!(events[0], Event::BadRequest { id: 1, fault: Fault::ParamsTooLong, .. }), "{events:?}");
        assert!(matches!(events[1], Event::Request { id: 2, .. }), "{events:?}");
    }

    #[test]
    fn records_of_a_request_that_is_over_are_ignored() {
        let mut decoder = Decoder::new(4096, 4);
        let mut input = BytesMut::from(&[begin(1, RESPONDER, 1), record(PARAMS, 1, b"", 0)].concat()[..]);
        assert!(matches!(decoder.decode(&mut input), Ok(Some(Event::Request { .. }))));
        input.extend_from_slice(&record(STDIN, 1, b"0123456789", 2)[..12]);
        assert!(matches!(decoder.decode(&mut input), Ok(Some(Event::Stdin { .. }))));
        assert!(!decoder.finish(1)); // answered before its body was read
        input.extend_from_slice(&record(STDIN, 1, b"0123456789", 2)[12..]);
        input.extend_from_slice(&record(STDIN, 1, b"more", 0));
        input.extend_from_slice(&record(STDIN, 1, b"", 0));
        input.extend_from_slice(&record(ABORT_REQUEST, 1, b"", 0));
        assert_eq!(decoder.decode(&mut input), Ok(None));
        assert!(input.is_empty() && decoder.is_idle());
    }

    #[test]
    fn management_records_get_the_replies_that_the_specification_names() {
        let values = pairs(&[("FCGI_MAX_REQS", ""), ("FCGI_MAX_REQS", ""), ("X", "")]);
        let events = whole(&record(GET_VALUES, 0, &values, 0));
        let [Event::Reply { bytes, then_close: false }] = &events[..] else { panic!("{events:?}") };
        assert_eq!(bytes[..], record(GET_VALUES_RESULT, 0, &pairs(&[("FCGI_MAX_REQS", "4")]), 0)[..]);

        // A BEGIN_REQUEST with id 0 is a management record of a type that does not exist.
        for bytes in [record(42, 0, b"abc", 3), begin(0, RESPONDER, 1)] {
            let events = whole(&bytes);
            assert_eq!(events.iter().map(reply_kind).collect::<Vec<_>>(), [UNKNOWN_TYPE]);
        }
    }

    #[test]
    fn a_role_or_a_request_too_many_is_refused() {
        let events = whole(&begin(7, 2, KEEP_CONN));
        let [Event::Reply { bytes, then_close: false }] = &events[..] else { panic!("{events:?}") };
        assert_eq!((bytes[1], bytes[3], bytes[12]), (END_REQUEST, 7, Status::UnknownRole as u8));

        let bytes: Vec<u8> = (1..=5).flat_map(|id| begin(id, RESPONDER, 0)).collect();
        let events = whole(&bytes);
        let [Event::Reply { bytes, then_close: true }] = &events[..] else { panic!("{events:?}") };
        assert_eq!((bytes[3], bytes[12]), (5, Status::CannotMultiplex as u8));
    }

    #[test]
    fn an_abort_before_the_params_are_complete_ends_the_request() {
        let bytes = [begin(3, RESPONDER, KEEP_CONN), record(ABORT_REQUEST, 3, b"", 0), begin(3, RESPONDER, 0)].concat();
        let events = whole(&bytes);
        assert_eq!(events.iter().map(reply_kind).collect::<Vec<_>>(), [END_REQUEST]);
    }

    #[test]
    fn a_second_abort_is_ignored() {
        let abort = record(ABORT_REQUEST, 1, b"", 0);
        let bytes = [request(1, &pairs(&[("A", "1")]), b""), abort.clone(), abort].concat();
        let events = whole(&bytes);
        assert_eq!(events.iter().filter(|event| matches!(event, Event::Abort { .. })).count(), 1, "{events:?}");
    }

    #[test]
    fn what_has_no_reply_closes_the_connection() {
        let mut version = begin(1, RESPONDER, 0);
        version[0] = 2;
        assert_eq!(decode(&version, || 1), Err(Error::Version(2)));
        assert_eq!(decode(&record(BEGIN_REQUEST, 1, &[0; 4], 0), || 1), Err(Error::BeginLength(4)));
        let twice = [begin(1, RESPONDER, 0), begin(1, RESPONDER, 0)].concat();
        assert_eq!(decode(&twice, || 3), Err(Error::BeginTwice(1)));
    }

    #[test]
    fn records_before_a_begin_cost_nothing() {
        let bytes = [record(STDIN, 5, &[0; 60_000], 0), record(PARAMS, 5, &[0; 60_000], 255)].concat();
        assert_eq!(whole(&bytes), []);
    }

    #[test]
    fn a_record_of_the_greatest_length_with_the_greatest_padding_is_one_record() {
        let mut decoder = Decoder::new(1 << 20, 4);
        let value = "v".repeat(65_535 - 6);
        let params = pairs(&[("N", &value)]);
        assert_eq!(params.len(), 65_535);
        let bytes = [begin(1, RESPONDER, 1), record(PARAMS, 1, &params, 255), record(PARAMS, 1, b"", 255)].concat();
        let mut input = BytesMut::from(&bytes[..]);
        let Ok(Some(Event::Request { params, .. })) = decoder.decode(&mut input) else { panic!() };
        assert_eq!(params.get("N").map(<[u8]>::len), Some(value.len()));
        assert_eq!(decoder.decode(&mut input), Ok(None));
        assert!(input.is_empty());
    }

    #[test]
    fn arbitrary_bytes_do_no_harm_however_they_are_cut() {
        for seed in 0..2000 {
            let mut random = fastrand::Rng::with_seed(seed);
            let mut bytes = Vec::new();
            for _ in 0..random.usize(1..20) {
                let content: Vec<u8> = (0..random.usize(0..40)).map(|_| random.u8(..)).collect();
                let (id, padding) = (random.u16(0..3), random.usize(0..9));
                bytes.extend(match random.u8(0..4) {
                    0 => begin(id, random.u16(1..3), random.u8(0..2)),
                    _ => record(random.u8(0..13), id, &content, padding),
                });
            }
            if random.bool() {
                let at = random.usize(0..bytes.len());
                bytes[at] = random.u8(..);
            }
            let once = decode(&bytes, || usize::MAX);
            let pieces = decode(&bytes, || random.usize(1..9));
            // Where the bytes end in an error, what came before it is the same all the same.
            assert_eq!(once, pieces, "seed {seed}");
        }
    }
}
