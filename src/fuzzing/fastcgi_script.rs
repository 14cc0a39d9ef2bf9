//! Checks several concurrent requests from a web server that cuts its records as the fuzzer
//! chooses.

use bytes::BytesMut;

use super::{Dice, Pieces};
use crate::protocol::fastcgi::{FastCgiDecoder, FastCgiEvent, Fault, HEADER, MAX_CONTENT, stdout_end, stdout_header};
use crate::protocol::role::Role;

const BEGIN_REQUEST: u8 = 1;
const ABORT_REQUEST: u8 = 2;
const PARAMS: u8 = 4;
const STDIN: u8 = 5;
const DATA: u8 = 8;
const GET_VALUES: u8 = 9;

/// Writes requests as records of all sizes, with padding and with unrelated records in between, and
/// decodes them in pieces. Then writes responses and reads them.
///
/// # Panics
/// Panics if the decoded requests or responses differ from the input.
pub fn fastcgi_script(data: &[u8]) {
    let mut dice = Dice(data);
    let mut servers: Vec<Server<'_>> = Vec::with_capacity(3);
    for number in 1..=1 + dice.below(3) {
        servers.push(Server::new(number, &mut dice));
    }
    // Sometimes the limit is what the first request needs, or one byte less.
    let max_params = match dice.below(4) {
        0 => servers[0].params.len(),
        1 => servers[0].params.len().saturating_sub(1),
        _ => 4096,
    };
    let (wire, replies) = write(&mut servers, &mut dice);
    decode(&wire, &mut servers, max_params, replies);
    for server in &servers {
        respond(server, dice.byte());
    }
}

/// The content of one request, its progress in writing, and its progress in decoding.
struct Server<'a> {
    id: u16,
    role: Role,
    keep_connection: bool,
    pairs: Vec<(&'a [u8], &'a [u8])>,
    params: Vec<u8>,
    stdin: &'a [u8],
    data: &'a [u8],
    /// Number of bytes of the current stream that have been written.
    written: usize,
    next: Next,
    came: Came,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    Begin,
    Params,
    Stdin,
    Data,
    Nothing,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Came {
    request: bool,
    refusal: bool,
    stdin: usize,
    stdin_end: bool,
    data: usize,
    data_end: bool,
}

impl<'a> Server<'a> {
    fn new(number: usize, dice: &mut Dice<'a>) -> Self {
        let role = [Role::Responder, Role::Authorizer, Role::Filter][dice.below(3)];
        // All ids differ, because their remainders modulo 4 differ.
        let id = u16::try_from(number + 4 * dice.below(256) * 63).unwrap_or(1);
        let pairs: Vec<_> = (0..dice.below(8)).map(|_| (dice.bytes(), dice.bytes())).collect();
        let mut params = Vec::with_capacity(256);
        for (name, value) in &pairs {
            for part in [name, value] {
                match u8::try_from(part.len()) {
                    Ok(length) if length < 128 && !dice.coin(16) => params.push(length),
                    _ => params.extend((u32::try_from(part.len()).unwrap_or(0) | 1 << 31).to_be_bytes()),
                }
            }
            params.extend_from_slice(name);
            params.extend_from_slice(value);
        }
        let (stdin, data) = (dice.bytes(), if role == Role::Filter { dice.bytes() } else { b"" });
        let keep_connection = dice.coin(2);
        Self {
            id,
            role,
            keep_connection,
            pairs,
            params,
            stdin,
            data,
            written: 0,
            next: Next::Begin,
            came: Came::default(),
        }
    }

    fn write(&mut self, wire: &mut Vec<u8>, dice: &mut Dice<'_>) {
        let (kind, stream, then) = match self.next {
            Next::Begin => {
                let role = match self.role {
                    Role::Responder => 1,
                    Role::Authorizer => 2,
                    Role::Filter => 3,
                };
                // The decoder must ignore all flags except KEEP_CONN.
                let flags = u8::from(self.keep_connection) | dice.byte() & 0xfe;
                record(wire, BEGIN_REQUEST, self.id, &[0, role, flags, 0, 0, 0, 0, 0], dice);
                self.next = Next::Params;
                return;
            }
            Next::Params => (PARAMS, &self.params[..], Next::Stdin),
            Next::Stdin if self.role == Role::Filter => (STDIN, self.stdin, Next::Data),
            Next::Stdin => (STDIN, self.stdin, Next::Nothing),
            Next::Data => (DATA, self.data, Next::Nothing),
            Next::Nothing => return,
        };
        let rest = &stream[self.written..];
        let length = match dice.byte() {
            0 => rest.len(),
            length => rest.len().min(length.into()),
        };
        record(wire, kind, self.id, &rest[..length], dice);
        self.written += length;
        if length == 0 {
            (self.next, self.written) = (then, 0);
        }
    }

    /// Checks that the whole request was decoded, or refused.
    fn check(&self, max_params: usize) {
        let fits = self.params.len() <= max_params;
        let all = Came {
            request: true,
            refusal: false,
            stdin: self.stdin.len(),
            stdin_end: true,
            data: self.data.len(),
            data_end: self.role == Role::Filter,
        };
        let refused = Came { refusal: true, ..Came::default() };
        assert_eq!(self.came, if fits { all } else { refused }, "request {}", self.id);
    }
}

fn record(wire: &mut Vec<u8>, kind: u8, id: u16, content: &[u8], dice: &mut Dice<'_>) {
    let padding = if dice.coin(4) { dice.byte() } else { 0 };
    let [high, low] = id.to_be_bytes();
    let [content_high, content_low] = u16::try_from(content.len()).unwrap_or(0).to_be_bytes();
    wire.extend_from_slice(&[1, kind, high, low, content_high, content_low, padding, dice.byte()]);
    wire.extend_from_slice(content);
    wire.resize(wire.len() + usize::from(padding), 0xEE);
}

/// Writes all requests, each in order. Returns the bytes, and the number of replies that the unrelated records require.
fn write(servers: &mut [Server<'_>], dice: &mut Dice<'_>) -> (Vec<u8>, usize) {
    let (mut wire, mut replies) = (Vec::with_capacity(1024), 0);
    loop {
        // Records that belong to no request: their ids are divisible by 4, and the ids of requests are not.
        let other = dice.below(16);
        replies += usize::from(matches!(other, 1 | 2));
        match other {
            1 => record(&mut wire, GET_VALUES, 0, b"\x0f\0FCGI_MPXS_CONNS", dice),
            2 => record(&mut wire, 100, 0, b"what", dice),
            3 => record(&mut wire, 42, servers[0].id, b"what", dice),
            4 => record(&mut wire, STDIN, 4, b"late", dice),
            5 => record(&mut wire, PARAMS, 8, b"late", dice),
            6 => record(&mut wire, ABORT_REQUEST, 4, b"", dice),
            _ => {}
        }
        let first = dice.below(servers.len());
        let order = (first..servers.len()).chain(0..first);
        let Some(next) = order.into_iter().find(|&at| servers[at].next != Next::Nothing) else {
            return (wire, replies);
        };
        servers[next].write(&mut wire, dice);
    }
}

fn decode(wire: &[u8], servers: &mut [Server<'_>], max_params: usize, mut replies: usize) {
    let (mut pieces, mut rest) = (Pieces::of(wire), wire);
    let (mut decoder, mut input) = (FastCgiDecoder::new(max_params, servers.len()), BytesMut::new());
    while !rest.is_empty() {
        input.extend_from_slice(pieces.cut(&mut rest));
        loop {
            match decoder.decode(&mut input) {
                Ok(Some(FastCgiEvent::Reply { then_close: false, .. })) => replies -= 1,
                Ok(Some(event)) => came(servers, event),
                Ok(None) => break,
                Err(error) => panic!("{error}"),
            }
        }
    }
    assert_eq!(replies, 0, "replies that did not come");
    for server in servers {
        server.check(max_params);
        assert_eq!(decoder.finish(server.id), server.came.request, "a request that came whole is over");
    }
    assert!(decoder.is_idle() && input.is_empty());
}

fn came(servers: &mut [Server<'_>], event: FastCgiEvent) {
    let (FastCgiEvent::Request { id, .. }
    | FastCgiEvent::BadRequest { id, .. }
    | FastCgiEvent::Stdin { id, .. }
    | FastCgiEvent::StdinEnd { id }
    | FastCgiEvent::Data { id, .. }
    | FastCgiEvent::DataEnd { id }) = event
    else {
        panic!("nobody sent {event:?}")
    };
    let Some(server) = servers.iter_mut().find(|server| server.id == id) else { panic!("nobody has {id}") };
    let came = &mut server.came;
    match event {
        FastCgiEvent::Request { keep_connection, role, params, .. } => {
            assert!(params.iter().eq(server.pairs.iter().copied()), "{params:?}");
            assert_eq!((keep_connection, role), (server.keep_connection, server.role));
            came.request = true;
        }
        FastCgiEvent::BadRequest { keep_connection, fault, .. } => {
            assert_eq!((keep_connection, fault), (server.keep_connection, Fault::ParamsTooLong));
            came.refusal = true;
        }
        FastCgiEvent::Stdin { bytes, .. } => {
            assert!(server.stdin[came.stdin..].starts_with(&bytes) && !came.stdin_end);
            came.stdin += bytes.len();
        }
        FastCgiEvent::StdinEnd { .. } => came.stdin_end = true,
        FastCgiEvent::Data { bytes, .. } => {
            assert!(server.data[came.data..].starts_with(&bytes) && !came.data_end);
            came.data += bytes.len();
        }
        FastCgiEvent::DataEnd { .. } => came.data_end = true,
        FastCgiEvent::Abort { .. } | FastCgiEvent::Reply { .. } => panic!("nobody sent {event:?}"),
    }
}

fn respond(server: &Server<'_>, size: u8) {
    let (content, status) = ((usize::from(size) * 257).min(MAX_CONTENT), u32::from(size) << 20);
    let (mut head, mut end) = (BytesMut::new(), BytesMut::new());
    stdout_header(&mut head, server.id, content);
    stdout_end(&mut end, server.id, status);
    let [high, low] = server.id.to_be_bytes();
    let [content_high, content_low] = u16::try_from(content).unwrap_or(0).to_be_bytes();
    assert_eq!(head[..], [1, 6, high, low, content_high, content_low, 0, 0]);
    assert_eq!(end[..HEADER], [1, 6, high, low, 0, 0, 0, 0], "the end of the stream");
    assert_eq!(end[HEADER..2 * HEADER], [1, 3, high, low, 0, 8, 0, 0], "the end of the request");
    assert_eq!(end[2 * HEADER..], [status.to_be_bytes(), [0; 4]].concat());
}
