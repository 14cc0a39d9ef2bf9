//! Checks the FastCGI decoder with arbitrary input.

use bytes::{Buf as _, BytesMut};

use super::Pieces;
use crate::protocol::fastcgi::{FastCgiDecoder, FastCgiError, FastCgiEvent, Fault, HEADER, RequestId};
use crate::protocol::role::Role;

/// A small limit, so that short inputs reach it.
const MAX_PARAMS: usize = 256;
const MAX_REQUESTS: usize = 3;

/// Decodes arbitrary bytes twice: as a whole, and in pieces.
///
/// # Panics
/// Panics if the requests, bodies, replies or errors of the two runs differ, if events are in an invalid order, if a
/// reply does not consist of records, or if the decoder holds more than the limits allow.
pub fn fastcgi(data: &[u8]) {
    let whole = Connection::receive(data, None);
    let cut = Connection::receive(data, Some(Pieces::of(data)));
    assert_eq!(whole, cut, "at once, and in pieces");
}

/// The events of one run, in two parts that are cheap to compare: the kind and length of each event, and the content of
/// all events. Adjacent pieces of a stream are joined.
#[derive(Debug, Default, PartialEq, Eq)]
struct Transcript {
    lines: Vec<Line>,
    content: Vec<u8>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Line {
    id: RequestId,
    what: What,
    length: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum What {
    Request { keep_connection: bool, role: Role },
    Name,
    Value,
    BadRequest { keep_connection: bool, fault: Fault },
    Stdin,
    StdinEnd,
    Data,
    DataEnd,
    Abort,
    Reply { then_close: bool },
    Finished { whole: bool },
    Failed(FastCgiError),
    Over { is_idle: bool },
}

impl Transcript {
    fn note(&mut self, id: RequestId, what: What, content: &[u8]) {
        self.content.extend_from_slice(content);
        match self.lines.last_mut() {
            Some(last) if matches!(what, What::Stdin | What::Data) && (last.id, last.what) == (id, what) => {
                last.length += content.len();
            }
            _ => self.lines.push(Line { id, what, length: content.len() }),
        }
    }
}

/// A request that has begun and is not finished, according to the events.
#[derive(Clone, Copy, Debug)]
struct Exchange {
    id: RequestId,
    stdin: bool,
    data: bool,
    /// Whether the request was refused or aborted. No further event is allowed then.
    over: bool,
}

struct Connection {
    decoder: FastCgiDecoder,
    input: BytesMut,
    exchanges: Vec<Exchange>,
    /// The request that has no body according to the decoder. The end of its body must be the next event.
    bodiless: Option<RequestId>,
    transcript: Transcript,
}

impl Connection {
    fn receive(data: &[u8], pieces: Option<Pieces>) -> Transcript {
        let mut connection = Self {
            decoder: FastCgiDecoder::new(MAX_PARAMS, MAX_REQUESTS),
            input: BytesMut::new(),
            exchanges: Vec::with_capacity(MAX_REQUESTS),
            bodiless: None,
            transcript: Transcript { lines: Vec::with_capacity(32), content: Vec::with_capacity(data.len()) },
        };
        let ended = connection.run(data, pieces);
        match ended {
            Err(error) => connection.transcript.note(0, What::Failed(error), b""),
            Ok(()) => {
                let is_idle = connection.decoder.is_idle();
                connection.transcript.note(0, What::Over { is_idle }, &connection.input);
            }
        }
        connection.transcript
    }

    fn run(&mut self, mut data: &[u8], mut pieces: Option<Pieces>) -> Result<(), FastCgiError> {
        while !data.is_empty() {
            let piece = match &mut pieces {
                Some(pieces) => pieces.cut(&mut data),
                None => std::mem::take(&mut data),
            };
            self.input.extend_from_slice(piece);
            while let Some(event) = self.decoder.decode(&mut self.input)? {
                self.take(event);
                self.check_limits();
            }
            self.check_limits();
            // The decoder waits for complete records of only two types, one of which has 16 bytes.
            let get_values = self.input.get(1) == Some(&9);
            let longest = HEADER + if get_values { usize::from(u16::MAX) } else { 8 };
            assert!(self.input.len() < longest, "{} bytes are left", self.input.len());
        }
        Ok(())
    }

    fn check_limits(&self) {
        let (requests, params) = self.decoder.held();
        assert!(requests <= MAX_REQUESTS && params <= requests * MAX_PARAMS, "{params} bytes of {requests} requests");
    }

    fn take(&mut self, event: FastCgiEvent) {
        if let Some(id) = self.bodiless.take() {
            assert_eq!(event, FastCgiEvent::StdinEnd { id }, "the request has no body");
        }
        match event {
            FastCgiEvent::Request { id, keep_connection, role, params } => {
                self.transcript.note(id, What::Request { keep_connection, role }, b"");
                for (name, value) in params.iter() {
                    self.transcript.note(id, What::Name, name);
                    self.transcript.note(id, What::Value, value);
                }
                self.begin(Exchange { id, stdin: true, data: role == Role::Filter, over: false });
                match self.answers_early(id) {
                    true => self.finish(id),
                    false => self.bodiless = self.decoder.body_is_empty(id, &self.input).then_some(id),
                }
            }
            FastCgiEvent::BadRequest { id, keep_connection, fault } => {
                self.transcript.note(id, What::BadRequest { keep_connection, fault }, b"");
                self.begin(Exchange { id, stdin: false, data: false, over: true });
                self.finish_unless_slow(id);
            }
            FastCgiEvent::Stdin { id, bytes } => {
                assert!(!bytes.is_empty() && self.open(id).stdin, "{id}");
                match self.answers_at_body(id) {
                    // How much of the request has been received at this point depends on the pieces.
                    true => self.finish(id),
                    false => self.transcript.note(id, What::Stdin, &bytes),
                }
            }
            FastCgiEvent::StdinEnd { id } => {
                assert!(std::mem::take(&mut self.open(id).stdin), "{id} ends twice");
                self.transcript.note(id, What::StdinEnd, b"");
                if !self.open(id).data || self.answers_before_the_file(id) {
                    self.finish_unless_slow(id);
                }
            }
            FastCgiEvent::Data { id, bytes } => {
                assert!(!bytes.is_empty() && self.open(id).data, "{id}");
                self.transcript.note(id, What::Data, &bytes);
            }
            FastCgiEvent::DataEnd { id } => {
                assert!(std::mem::take(&mut self.open(id).data), "{id} ends twice");
                self.transcript.note(id, What::DataEnd, b"");
                if !self.open(id).stdin {
                    self.finish_unless_slow(id);
                }
            }
            FastCgiEvent::Abort { id } => {
                let exchange = self.open(id);
                (exchange.stdin, exchange.data, exchange.over) = (false, false, true);
                self.transcript.note(id, What::Abort, b"");
                self.finish_unless_slow(id);
            }
            FastCgiEvent::Reply { bytes, then_close } => {
                check_records(&bytes);
                self.transcript.note(0, What::Reply { then_close }, &bytes);
            }
        }
    }

    // The request id selects the behaviour of the application.

    fn answers_early(&self, id: RequestId) -> bool {
        id % 8 == 2
    }

    fn answers_at_body(&self, id: RequestId) -> bool {
        id % 8 == 3
    }

    fn answers_before_the_file(&self, id: RequestId) -> bool {
        id % 8 == 5
    }

    fn finish_unless_slow(&mut self, id: RequestId) {
        if id % 8 != 4 {
            self.finish(id);
        }
    }

    fn begin(&mut self, exchange: Exchange) {
        assert!(exchange.id != 0 && self.exchanges.iter().all(|other| other.id != exchange.id), "{exchange:?} twice");
        self.exchanges.push(exchange);
    }

    fn open(&mut self, id: RequestId) -> &mut Exchange {
        match self.exchanges.iter_mut().find(|exchange| exchange.id == id && !exchange.over) {
            Some(exchange) => exchange,
            None => panic!("something comes for {id}, which is not there"),
        }
    }

    fn finish(&mut self, id: RequestId) {
        let Some(at) = self.exchanges.iter().position(|exchange| exchange.id == id) else {
            panic!("{id} is not there")
        };
        let exchange = self.exchanges.swap_remove(at);
        let whole = self.decoder.finish(id);
        assert_eq!(whole, !exchange.stdin && !exchange.data && !exchange.over, "{exchange:?}");
        self.transcript.note(id, What::Finished { whole }, b"");
    }
}

/// Checks that a reply of the decoder consists of whole records of the three allowed types.
fn check_records(mut bytes: &[u8]) {
    assert!(bytes.len() <= 128, "a reply does not grow with what was asked");
    while bytes.has_remaining() {
        let (header, rest) = bytes.split_at(HEADER);
        let (id, length) =
            (u16::from_be_bytes([header[2], header[3]]), usize::from(header[4]) << 8 | usize::from(header[5]));
        let is_good = match header[1] {
            3 => id != 0 && length == 8,
            10 => id == 0,
            11 => id == 0 && length == 8,
            _ => false,
        };
        assert!(header[0] == 1 && is_good && header[6] == 0, "{header:?}");
        bytes = &rest[length..];
    }
}
