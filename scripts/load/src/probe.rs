//! Sends one request before the run, to check that the server is running, and to obtain the body for comparison.

use std::time::Duration;

use nix::errno::Errno;

use crate::check::{Expectation, Seen};
use crate::error::Error;
use crate::options::Options;
use crate::request::request;
use crate::response::{End, Response};
use crate::socket::Socket;
use crate::tally::{Fault, Kind};
use crate::target::{Peer, Protocol};

/// Maximum length of the body that is stored for comparison.
const LIMIT: usize = 256 << 20;

/// Sends one request on a new connection, and returns the body. A wrong response is an error.
pub(crate) fn probe(peer: &Peer, options: &Options, sent: Option<&[u8]>) -> Result<Vec<u8>, Error> {
    let socket = connect(peer, options.timeout).map_err(Error::Probe)?;
    let expectation = Expectation { body: None, length: options.expect_body_len };
    let mut seen = Seen::default();
    let mut body = Vec::new();
    let end = exchange(&socket, options.connect.protocol, &request(options, sent, false), |part| {
        seen.pass(part, &expectation);
        let room = LIMIT.saturating_sub(body.len());
        body.extend_from_slice(&part[..part.len().min(room)]);
    });
    end.and_then(|end| expectation.judge(&end, &seen)).map_err(Error::Probe)?;
    if body.len() as u64 != seen.length && !options.any_body {
        return Err(Error::LargeBody { limit: LIMIT });
    }
    Ok(body)
}

/// Opens a connection on which each call blocks for up to `timeout`.
pub(crate) fn connect(peer: &Peer, timeout: Duration) -> Result<Socket, Fault> {
    Socket::open_blocking(peer, timeout).map_err(|error| fault(Kind::Connect, error))
}

/// Sends a request and waits for the end of its response.
pub(crate) fn exchange(
    socket: &Socket,
    protocol: Protocol,
    request: &[u8],
    mut body: impl FnMut(&[u8]),
) -> Result<End, Fault> {
    send_all(socket, request)?;
    let mut response = Response::new(protocol);
    let mut buffer = vec![0; 64 * 1024];
    let mut if_closed = Kind::Dropped;
    loop {
        let received = socket.receive(&mut buffer).map_err(|error| fault(if_closed, error))?;
        if received == 0 {
            return response.closed().ok_or_else(|| Fault::new(if_closed, "the server closed the connection"));
        }
        if_closed = Kind::Cut;
        match response.feed(&buffer[..received], &mut body) {
            Ok(Some(end)) => return Ok(end),
            Ok(None) => {}
            Err(malformed) => return Err(Fault::new(Kind::Malformed, malformed.0)),
        }
    }
}

/// Sends a whole request on a blocking connection.
pub(crate) fn send_all(socket: &Socket, request: &[u8]) -> Result<(), Fault> {
    let mut sent = 0;
    while sent < request.len() {
        sent += socket.send(&request[sent..]).map_err(|error| fault(Kind::Dropped, error))?;
    }
    Ok(())
}

fn fault(kind: Kind, error: Errno) -> Fault {
    match error {
        Errno::EAGAIN if kind != Kind::Connect => Fault::new(Kind::Timeout, "no complete response in time"),
        _ => Fault::new(kind, error.desc()),
    }
}
