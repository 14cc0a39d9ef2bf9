//! Starts servers for the run, and implements the I/O over a Unix socket that all clients share.

use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::error::Error;
use crate::get::process::die_with_us;

const START: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(10);

/// A running server, which is killed when dropped.
#[derive(Debug)]
pub(crate) struct Server {
    child: Child,
    pub(crate) socket: PathBuf,
}

/// A program and its Debian package.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Program {
    pub(crate) name: &'static str,
    pub(crate) package: &'static str,
}

impl Program {
    /// Starts the program. Its output goes where `command` directs it.
    pub(crate) fn spawn(self, command: &mut Command) -> Result<Child, Error> {
        die_with_us(command);
        command.spawn().map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => Error::NoProgram { program: self.name, package: self.package },
            _ => Error::Program { program: self.name, what: source.to_string() },
        })
    }

    pub(crate) fn error(self, what: impl Into<String>) -> Error {
        Error::Program { program: self.name, what: what.into() }
    }
}

impl Server {
    /// Starts the program, and waits until it listens on `socket`.
    pub(crate) fn start(program: Program, command: &mut Command, socket: &Path) -> Result<Server, Error> {
        let log = socket.with_extension("log");
        let output = File::create(&log).map_err(Error::system("making a log file"))?;
        let errors = output.try_clone().map_err(Error::system("making a log file"))?;
        let child = program.spawn(command.stdin(Stdio::null()).stdout(output).stderr(errors))?;
        let mut server = Server { child, socket: socket.to_owned() };
        let deadline = Instant::now() + START;
        while UnixStream::connect(socket).is_err() {
            let ended = server.child.try_wait().map_err(Error::system("waiting for a server"))?.is_some();
            if ended || Instant::now() > deadline {
                let said = fs::read_to_string(&log).unwrap_or_default();
                let last: Vec<&str> = said.trim().lines().rev().take(3).collect();
                return Err(program.error(format!("the server does not start: {}", last.join(" / "))));
            }
            std::thread::sleep(POLL);
        }
        Ok(server)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A connection, and the bytes received on it.
#[derive(Debug)]
pub(crate) struct Wire {
    program: Program,
    stream: UnixStream,
    received: Vec<u8>,
    length: usize,
}

impl Wire {
    /// Connects to a server. A reply must not be longer than `longest`.
    pub(crate) fn connect(program: Program, socket: &Path, longest: usize) -> Result<Wire, Error> {
        let stream = UnixStream::connect(socket).map_err(Error::system("connecting to a server"))?;
        Ok(Wire { program, stream, received: vec![0; longest], length: 0 })
    }

    /// Sends a request, and discards the data received earlier.
    pub(crate) fn send(&mut self, request: &[u8]) -> Result<(), Error> {
        self.length = 0;
        self.stream.write_all(request).map_err(|error| self.program.error(format!("it takes no request: {error}")))
    }

    /// Waits for the first line of the reply. Returns the line, and the position of the data after it.
    pub(crate) fn first_line(&mut self) -> Result<(&str, usize), Error> {
        let end = loop {
            let here = self.received[..self.length].windows(2).position(|two| two == b"\r\n");
            match here {
                Some(end) => break end,
                None => self.receive()?,
            }
        };
        let line =
            std::str::from_utf8(&self.received[..end]).map_err(|_| self.program.error("the reply is not text"))?;
        Ok((line, end + 2))
    }

    /// Waits until the reply has `end` bytes.
    pub(crate) fn up_to(&mut self, end: usize) -> Result<&[u8], Error> {
        while self.length < end {
            self.receive()?;
        }
        Ok(&self.received[..end])
    }

    fn receive(&mut self) -> Result<(), Error> {
        let room = &mut self.received[self.length..];
        if room.is_empty() {
            return Err(self.program.error("the reply is too long"));
        }
        match self.stream.read(room) {
            Ok(0) => Err(self.program.error("the server closed the connection")),
            Ok(more) => {
                self.length += more;
                Ok(())
            }
            Err(error) => Err(self.program.error(format!("the server sends no reply: {error}"))),
        }
    }
}
