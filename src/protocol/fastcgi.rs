//! Implements the server's half of FastCGI 1.0: decodes bytes to events, and encodes replies. [`client`] implements the
//! other half. Section numbers refer to the FastCGI specification.
//!
//! ```text
//!              bytes                              FastCgiEvent                              reply
//!   peer ───────────────▶ FastCgiDecoder::decode ──────────────▶ worker::fastcgi ─────▶ stdout_header, end_request ──▶ peer
//! ```
//!
//! The [`FastCgiDecoder`] keeps the state between records: the request ids in use, the current stream of each request,
//! and the parameters received so far. It never copies a body, and copies parameters only if they span several records.
//! The same bytes always result in the same requests, bodies and replies, however they are split into chunks.
//!
//! If the peer makes an error for which the specification defines a reply, the decoder returns a [`FastCgiEvent`] with
//! the reply. If the start of the next record cannot be determined, or a record contradicts the state of its request,
//! the decoder returns a [`FastCgiError`], and the connection must be closed.

pub(crate) mod client;

use std::fmt;

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};

use super::params::{Params, put_length};
use super::role::Role;

/// Identifies a request on its connection; never 0.
pub(crate) type RequestId = u16;

/// The size of a record's header (3.3).
pub(crate) const HEADER: usize = 8;
/// The largest content of a record that is a multiple of 8, so that it needs no padding.
pub(crate) const MAX_CONTENT: usize = 65_528;

const VERSION: u8 = 1;
const BEGIN_REQUEST: u8 = 1;
const ABORT_REQUEST: u8 = 2;
const END_REQUEST: u8 = 3;
const PARAMS: u8 = 4;
const STDIN: u8 = 5;
const STDOUT: u8 = 6;
const STDERR: u8 = 7;
const DATA: u8 = 8;
const GET_VALUES: u8 = 9;
const GET_VALUES_RESULT: u8 = 10;
const UNKNOWN_TYPE: u8 = 11;
const KEEP_CONN: u8 = 1;

/// The protocol status of END_REQUEST (5.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum FastCgiStatus {
    Complete = 0,
    CannotMultiplex = 1,
    UnknownRole = 3,
}

/// A decoded event.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum FastCgiEvent {
    /// A request whose parameters are complete. Its body follows as [`FastCgiEvent::Stdin`], and a filter's file as
    /// [`FastCgiEvent::Data`].
    Request { id: RequestId, keep_connection: bool, role: Role, params: Params },
    /// A request that cannot be served because its parameters are too long or malformed. The remaining records of the
    /// request are skipped. The request must be answered.
    BadRequest { id: RequestId, keep_connection: bool, fault: Fault },
    /// A chunk of a request's body, never empty.
    Stdin { id: RequestId, bytes: Bytes },
    /// The end of a request's body.
    StdinEnd { id: RequestId },
    /// A chunk of the file for a filter, never empty.
    Data { id: RequestId, bytes: Bytes },
    /// The end of the file for a filter.
    DataEnd { id: RequestId },
    /// The peer has aborted this request (5.4).
    Abort { id: RequestId },
    /// A reply from the decoder itself, to be sent unchanged. `then_close` is true if the peer did not ask to keep the
    /// connection.
    Reply { bytes: Bytes, then_close: bool },
}

/// The fault of a request whose records are well formed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The parameters exceed the limit.
    ParamsTooLong,
    /// A name or value reaches beyond the end of the parameters.
    ParamsMalformed,
}

/// A violation of the protocol for which there is no reply: the connection must be closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FastCgiError {
    /// A record of a version other than 1.
    Version(u8),
    /// A BEGIN_REQUEST whose body is not 8 bytes.
    BeginLength(u16),
    /// A BEGIN_REQUEST for a request that is not finished.
    BeginTwice(RequestId),
}

impl fmt::Display for FastCgiError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Version(version) => write!(f, "a record of version {version}, which is not FastCGI 1"),
            Self::BeginLength(length) => write!(f, "a BEGIN_REQUEST of {length} bytes instead of 8"),
            Self::BeginTwice(id) => write!(f, "a BEGIN_REQUEST for request {id}, which has already begun"),
        }
    }
}

impl std::error::Error for FastCgiError {}

/// The header of a record (3.3).
#[derive(Clone, Copy, Debug)]
struct Record {
    kind: u8,
    id: RequestId,
    content: u16,
    padding: u8,
}

impl Record {
    /// Reads a header. Returns `None` if it is incomplete, and the version as an error if it is not 1.
    fn read(bytes: &[u8]) -> Option<Result<Self, u8>> {
        let &[version, kind, id_high, id_low, length_high, length_low, padding, _] = bytes.first_chunk::<HEADER>()?;
        if version != VERSION {
            return Some(Err(version));
        }
        let id = u16::from_be_bytes([id_high, id_low]);
        let content = u16::from_be_bytes([length_high, length_low]);
        Some(Ok(Self { kind, id, content, padding }))
    }
}

/// The decoder's position in the input.
#[derive(Clone, Copy, Debug)]
enum Place {
    /// Before a record's header.
    Header,
    /// In the content of a record that is passed on in chunks.
    Content { kind: u8, id: RequestId, left: u16, padding: u8 },
    /// In bytes that are ignored.
    Skip { left: u32 },
}

/// A request that the peer has begun.
#[derive(Debug)]
struct Open {
    id: RequestId,
    keep_connection: bool,
    role: Role,
    phase: Phase,
}

#[derive(Debug)]
enum Phase {
    Params(BytesMut),
    /// Which streams are still open. A filter's file comes after the body (6.4), but the decoder also accepts
    /// interleaved streams.
    Streams {
        stdin: bool,
        data: bool,
    },
    /// All further input for the request is ignored.
    Skipped,
}

/// Decodes the input of one connection into events.
#[derive(Debug)]
pub(crate) struct FastCgiDecoder {
    max_params: usize,
    max_requests: usize,
    place: Place,
    open: Vec<Open>,
    /// Whether a request's parameters share memory with the other bytes of the same read.
    shares: bool,
}

impl FastCgiDecoder {
    /// Accepts `max_params` bytes of parameters per request, and `max_requests` concurrent requests.
    pub(crate) fn new(max_params: usize, max_requests: usize) -> Self {
        Self { max_params, max_requests, place: Place::Header, open: Vec::new(), shares: false }
    }

    /// Removes the bytes of the next event from `input` and returns the event. Returns `None` if more bytes are needed.
    ///
    /// # Errors
    /// Returns [`FastCgiError`] if the peer violated the protocol.
    pub(crate) fn decode(&mut self, input: &mut BytesMut) -> Result<Option<FastCgiEvent>, FastCgiError> {
        loop {
            match self.place {
                Place::Header => {
                    let Some(record) = Record::read(input) else { return Ok(None) };
                    match self.record(record.map_err(FastCgiError::Version)?, input)? {
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

    /// Copies partly received parameters if they share memory with the remaining bytes of a read. Called before a
    /// connection waits, so that it does not keep that memory.
    pub(crate) fn unshare(&mut self) {
        if std::mem::take(&mut self.shares) {
            for open in &mut self.open {
                if let Phase::Params(params) = &mut open.phase {
                    *params = BytesMut::from(&params[..]);
                }
            }
        }
    }

    /// Ends a request after its END_REQUEST was sent. Further input for it is ignored (3.3: "inactive"). Returns true
    /// if no further input for the request can arrive, because its streams have ended.
    pub(crate) fn finish(&mut self, id: RequestId) -> bool {
        let whole =
            self.find(id).is_some_and(|open| matches!(open.phase, Phase::Streams { stdin: false, data: false }));
        self.open.retain(|open| open.id != id);
        whole
    }

    /// Whether the next record in `input`, the unprocessed part of a read, shows that this request has no body.
    pub(crate) fn body_is_empty(&self, id: RequestId, input: &[u8]) -> bool {
        let padding = match self.place {
            Place::Header => 0,
            Place::Skip { left } => left as usize,
            Place::Content { .. } => return false,
        };
        let [high, low] = id.to_be_bytes();
        input.get(padding..).is_some_and(|rest| rest.starts_with(&[VERSION, STDIN, high, low, 0, 0]))
    }

    /// Whether no request is open and no record is incomplete.
    pub(crate) fn is_idle(&self) -> bool {
        self.open.is_empty() && matches!(self.place, Place::Header | Place::Skip { left: 0 })
    }

    /// Whether the next byte begins a record, and no request's parameters are incomplete.
    pub(crate) fn is_between_records(&self) -> bool {
        matches!(self.place, Place::Header | Place::Skip { left: 0 }) && self.assembled().next().is_none()
    }

    /// Returns the requests with incomplete parameters: for each, its id, and whether to keep the connection.
    pub(crate) fn assembled(&self) -> impl Iterator<Item = (RequestId, bool)> {
        let open = self.open.iter().filter(|open| matches!(open.phase, Phase::Params(_)));
        open.map(|open| (open.id, open.keep_connection))
    }

    /// Returns the number of open requests, and of parameter bytes held for them.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn held(&self) -> (usize, usize) {
        let params = self.open.iter().map(|open| match &open.phase {
            Phase::Params(params) => params.len(),
            Phase::Streams { .. } | Phase::Skipped => 0,
        });
        (self.open.len(), params.sum())
    }

    fn find(&mut self, id: RequestId) -> Option<&mut Open> {
        self.open.iter_mut().find(|open| open.id == id)
    }

    /// Begins to process a record whose header is at the front of `input`.
    fn record(&mut self, record: Record, input: &mut BytesMut) -> Result<Progress, FastCgiError> {
        let Record { kind, id, content, padding } = record;
        let whole = HEADER + usize::from(content);
        match kind {
            PARAMS | STDIN | DATA if id != 0 => {
                input.advance(HEADER);
                if content == 0 {
                    self.place = Place::Skip { left: padding.into() };
                    return Ok(self.end_of_stream(kind, id).map_or(Progress::Continue, Progress::Event));
                }
                let wanted = self.find(id).is_some_and(|open| match open.phase {
                    Phase::Params(_) => kind == PARAMS,
                    Phase::Streams { stdin, data } => kind == STDIN && stdin || kind == DATA && data,
                    Phase::Skipped => false,
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
                    return Err(FastCgiError::BeginLength(content));
                }
                let Some(body) = input.get(HEADER..whole) else { return Ok(Progress::Starved) };
                let body: [u8; 8] = body.try_into().map_err(|_| FastCgiError::BeginLength(content))?;
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
                Ok(Progress::Event(FastCgiEvent::Reply { bytes, then_close: false }))
            }
            kind => {
                input.advance(HEADER);
                self.place = Place::Skip { left: u32::from(content) + u32::from(padding) };
                // An unknown management record is answered (4.2), unless it is a reply itself: two peers that reply to
                // replies would never stop. An application record of an unexpected type (an output stream, for example)
                // is not answered, and the request continues.
                let answered = id == 0 && !matches!(kind, GET_VALUES_RESULT | UNKNOWN_TYPE);
                Ok(if answered { Progress::Event(unknown_type(kind)) } else { Progress::Continue })
            }
        }
    }

    fn begin(&mut self, id: RequestId, body: [u8; 8]) -> Result<Progress, FastCgiError> {
        let [role_high, role_low, flags, ..] = body;
        if self.find(id).is_some() {
            return Err(FastCgiError::BeginTwice(id));
        }
        let keep_connection = flags & KEEP_CONN != 0;
        let refuse = |status| {
            let mut bytes = BytesMut::new();
            end_request(&mut bytes, id, 0, status);
            Progress::Event(FastCgiEvent::Reply { bytes: bytes.freeze(), then_close: !keep_connection })
        };
        let Some(role) = Role::read(u16::from_be_bytes([role_high, role_low])) else {
            return Ok(refuse(FastCgiStatus::UnknownRole));
        };
        if self.open.len() >= self.max_requests {
            return Ok(refuse(FastCgiStatus::CannotMultiplex));
        }
        self.open.push(Open { id, keep_connection, role, phase: Phase::Params(BytesMut::new()) });
        Ok(Progress::Continue)
    }

    fn abort(&mut self, id: RequestId) -> Progress {
        let Some(open) = self.find(id) else { return Progress::Continue };
        if let Phase::Params(_) = open.phase {
            // The application has not received the request, so the request ends here.
            let then_close = !open.keep_connection;
            self.finish(id);
            let mut bytes = BytesMut::new();
            end_request(&mut bytes, id, 0, FastCgiStatus::Complete);
            return Progress::Event(FastCgiEvent::Reply { bytes: bytes.freeze(), then_close });
        }
        if let Phase::Skipped = open.phase {
            return Progress::Continue; // the request is being answered, or was aborted before
        }
        open.phase = Phase::Skipped;
        Progress::Event(FastCgiEvent::Abort { id })
    }

    fn content(&mut self, kind: u8, id: RequestId, bytes: BytesMut) -> Option<FastCgiEvent> {
        let max_params = self.max_params;
        let open = self.find(id)?; // None if the request ended in the middle of the record
        match &mut open.phase {
            Phase::Params(params) if kind == PARAMS => {
                if params.len() + bytes.len() > max_params {
                    return Some(open.refuse(Fault::ParamsTooLong));
                }
                if params.is_empty() {
                    *params = bytes; // usually all parameters at once: no copy
                    self.shares = true;
                } else {
                    params.unsplit(bytes);
                }
                None
            }
            Phase::Streams { stdin: true, .. } if kind == STDIN => {
                Some(FastCgiEvent::Stdin { id, bytes: bytes.freeze() })
            }
            Phase::Streams { data: true, .. } if kind == DATA => Some(FastCgiEvent::Data { id, bytes: bytes.freeze() }),
            Phase::Params(_) | Phase::Streams { .. } | Phase::Skipped => None,
        }
    }

    fn end_of_stream(&mut self, kind: u8, id: RequestId) -> Option<FastCgiEvent> {
        let open = self.find(id)?;
        match &mut open.phase {
            Phase::Params(params) if kind == PARAMS => {
                let raw = std::mem::take(params).freeze();
                match Params::parse(raw) {
                    Some(params) => {
                        let role = open.role;
                        open.phase = Phase::Streams { stdin: true, data: role == Role::Filter };
                        Some(FastCgiEvent::Request { id, keep_connection: open.keep_connection, role, params })
                    }
                    None => Some(open.refuse(Fault::ParamsMalformed)),
                }
            }
            Phase::Streams { stdin, .. } if kind == STDIN && *stdin => {
                *stdin = false;
                Some(FastCgiEvent::StdinEnd { id })
            }
            Phase::Streams { data, .. } if kind == DATA && *data => {
                *data = false;
                Some(FastCgiEvent::DataEnd { id })
            }
            Phase::Params(_) | Phase::Streams { .. } | Phase::Skipped => None,
        }
    }

    /// Returns the reply to GET_VALUES (4.1): those of the requested values that this server supports.
    fn values(&self, asked: &[u8]) -> Bytes {
        let mut content = BytesMut::new();
        let asked = Params::parse(Bytes::copy_from_slice(asked));
        for (name, _) in asked.iter().flat_map(Params::iter) {
            let value = match name {
                // The number of requests that the worker accepts. No web server is known to use
                // this value.
                b"FCGI_MAX_CONNS" | b"FCGI_MAX_REQS" => self.max_requests.to_string(),
                b"FCGI_MPXS_CONNS" => String::from(if self.max_requests > 1 { "1" } else { "0" }),
                _ => continue,
            };
            // Each name is included only once, however often it was requested, because the reply must fit into one
            // record.
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
    fn refuse(&mut self, fault: Fault) -> FastCgiEvent {
        self.phase = Phase::Skipped;
        FastCgiEvent::BadRequest { id: self.id, keep_connection: self.keep_connection, fault }
    }
}

enum Progress {
    Event(FastCgiEvent),
    Continue,
    Starved,
}

fn put_header(out: &mut BytesMut, kind: u8, id: RequestId, content: usize) {
    out.put_slice(&header(kind, id, u16::try_from(content).unwrap_or(u16::MAX)));
}

/// Returns the header of a record without padding.
fn header(kind: u8, id: RequestId, content: u16) -> [u8; HEADER] {
    let ([id_high, id_low], [high, low]) = (id.to_be_bytes(), content.to_be_bytes());
    [VERSION, kind, id_high, id_low, high, low, 0, 0]
}

/// Writes the header of a STDOUT record with `content` bytes, at most [`MAX_CONTENT`].
pub(crate) fn stdout_header(out: &mut BytesMut, id: RequestId, content: usize) {
    debug_assert!(content <= MAX_CONTENT, "a record holds less than {content} bytes");
    put_header(out, STDOUT, id, content);
}

/// Writes the header of a STDERR record with `content` bytes, at most [`MAX_CONTENT`] and not 0.
pub(crate) fn stderr_header(out: &mut BytesMut, id: RequestId, content: usize) {
    debug_assert!(content > 0 && content <= MAX_CONTENT, "a record does not hold {content} bytes");
    put_header(out, STDERR, id, content);
}

/// Writes the end of the STDOUT stream and of the request (5.5).
pub(crate) fn stdout_end(out: &mut BytesMut, id: RequestId, application: u32) {
    put_header(out, STDOUT, id, 0);
    end_request(out, id, application, FastCgiStatus::Complete);
}

/// Writes an END_REQUEST (5.5).
pub(crate) fn end_request(out: &mut BytesMut, id: RequestId, application: u32, status: FastCgiStatus) {
    put_header(out, END_REQUEST, id, 8);
    out.put_u32(application);
    out.put_slice(&[status as u8, 0, 0, 0]);
}

/// Writes eight bytes that are not a record, because their version is 0: the last bytes of a connection on which a
/// response failed.
///
/// If nginx does not keep the connection, it accepts a close as the end of a response without a length, and it waits
/// for the missing part of a response with a length. After these bytes, nginx treats the response as failed in both
/// cases.
pub(crate) fn break_off(out: &mut BytesMut) {
    out.put_slice(&[0; HEADER]);
}

/// Returns UNKNOWN_TYPE (4.2), the reply to an unknown management record.
fn unknown_type(kind: u8) -> FastCgiEvent {
    let mut bytes = BytesMut::with_capacity(2 * HEADER);
    put_header(&mut bytes, UNKNOWN_TYPE, 0, 8);
    bytes.put_slice(&[kind, 0, 0, 0, 0, 0, 0, 0]);
    FastCgiEvent::Reply { bytes: bytes.freeze(), then_close: false }
}

#[cfg(test)]
#[path = "fastcgi_tests.rs"]
mod tests;
