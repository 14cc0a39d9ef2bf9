//! The CGI runner: an app process that starts a CGI program once for each request (`--backend cgi`).
//!
//! The runner is a fork of the master. It accepts the gateways' connections on its private socket, over FastCGI, so that
//! supervision, claims, the queue, privileges, time limits and the quarantine are those of every app process.
//!
//! ```text
//!   gateway ──FastCGI──▶ runner ──fork, exec──▶ program      body: standard input; variables: environment
//!           ◀───────────        ◀── pipes ─────              response: standard output; messages: standard error
//! ```
//!
//! - One request at a time. The request ends when the program has exited: output of processes that it has left behind is
//!   discarded.
//! - **A program that is terminated by a signal takes its runner with it.** The runner sends itself the same signal, so
//!   the master and the gateway observe the death of an app process: the request is repeated if its method is idempotent,
//!   or answered with 502, and it counts towards the quarantine.
//! - The exit status of a program that has written a response does not change the response, as in other web servers.
//! - A program does not outlive its runner: it is in the runner's process group, which the master kills, and the kernel
//!   kills it when the runner dies.
//! - The runner has one thread and blocks, except where it waits for the pipes of a program (`exchange.rs`).

mod environment;
mod exchange;

use std::io::{self, Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;

use bytes::BytesMut;

use self::environment::Environment;
use self::exchange::Exchange;
use crate::config::Program;
use crate::privileges::Privileges;
use crate::protocol::fastcgi::{FastCgiDecoder, FastCgiEvent, RequestId};
use crate::protocol::params::Params;

/// Size of a read from a gateway.
const READ_SIZE: usize = 64 << 10;

/// A runner. The process has the privileges and the environment of the program.
#[derive(Debug)]
pub(crate) struct CgiRunner {
    pub(crate) listener: OwnedFd,
    pub(crate) program: Program,
    pub(crate) privileges: Arc<Privileges>,
    /// Maximum number of bytes of a request's variables.
    pub(crate) max_params: usize,
}

impl CgiRunner {
    /// Serves requests until a signal ends the process. Returns the exit status if it cannot continue.
    pub(crate) fn serve(self) -> u8 {
        let Self { listener, program, privileges, max_params } = self;
        let service = Service { program, privileges, environment: Environment::of_this_process() };
        let listener = UnixListener::from(listener);
        loop {
            let served = match listener.accept() {
                Ok((stream, _)) => Connection::new(&service, stream, max_params).serve(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(()),
                Err(error) => {
                    complain(&format_args!("cannot accept a connection: {error}"));
                    return 1;
                }
            };
            if let Err(error) = served {
                complain(&format_args!("a connection to a gateway was closed: {error}"));
            }
        }
    }
}

/// Writes a line to standard error, which the master logs.
pub(crate) fn complain(line: &dyn std::fmt::Display) {
    let _ = writeln!(io::stderr(), "{line}"); // fails if the master has died
}

/// What all requests have in common.
#[derive(Debug)]
struct Service {
    program: Program,
    privileges: Arc<Privileges>,
    environment: Environment,
}

/// A connection to a gateway, which may carry several requests, one after the other.
struct Connection<'a> {
    service: &'a Service,
    stream: UnixStream,
    decoder: FastCgiDecoder,
    input: BytesMut,
    buffer: Vec<u8>,
}

impl<'a> Connection<'a> {
    fn new(service: &'a Service, stream: UnixStream, max_params: usize) -> Self {
        let decoder = FastCgiDecoder::new(max_params, 1);
        Self { service, stream, decoder, input: BytesMut::new(), buffer: vec![0; READ_SIZE] }
    }

    fn serve(mut self) -> io::Result<()> {
        loop {
            let event = match self.decoded()? {
                Some(event) => event,
                None if self.read()? => continue,
                None => return Ok(()),
            };
            match event {
                FastCgiEvent::Request { id, keep_connection, params, .. } => {
                    self.run(id, &params)?;
                    self.decoder.finish(id);
                    if !keep_connection {
                        return Ok(());
                    }
                }
                FastCgiEvent::Reply { bytes, then_close } => {
                    self.stream.write_all(&bytes)?;
                    if then_close {
                        return Ok(());
                    }
                }
                FastCgiEvent::BadRequest { .. } => {
                    return Err(io::Error::other("the variables of a request are malformed or too long"));
                }
                FastCgiEvent::Stdin { .. }
                | FastCgiEvent::StdinEnd { .. }
                | FastCgiEvent::Data { .. }
                | FastCgiEvent::DataEnd { .. }
                | FastCgiEvent::Abort { .. } => {}
            }
        }
    }

    fn run(&mut self, id: RequestId, params: &Params) -> io::Result<()> {
        let mut exchange = Exchange::begin(self, id, params)?;
        let outcome = exchange.run();
        exchange.end(outcome)
    }

    /// Returns the next event in the bytes that have been read.
    fn decoded(&mut self) -> io::Result<Option<FastCgiEvent>> {
        self.decoder.decode(&mut self.input).map_err(io::Error::other)
    }

    /// Waits for bytes. Returns false at the end of the connection.
    fn read(&mut self) -> io::Result<bool> {
        loop {
            match self.stream.read(&mut self.buffer) {
                Ok(count) => {
                    self.input.extend_from_slice(self.buffer.get(..count).unwrap_or_default());
                    return Ok(count > 0);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}
