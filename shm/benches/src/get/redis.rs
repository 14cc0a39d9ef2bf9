//! Redis over a Unix socket: one request, one reply.

use std::io::Write as _;
use std::path::Path;
use std::process::Command;

use crate::error::Error;
use crate::get::data::Shape;
use crate::get::measure::Store;
use crate::get::server::{Program, Server, Wire};
use crate::sample::{KEY_LEN, Key};

const PROGRAM: Program = Program { name: "redis-server", package: "redis-server" };

/// Starts Redis without a TCP port and without persistence.
pub(crate) fn start(dir: &Path) -> Result<Server, Error> {
    let socket = dir.join("redis.sock");
    let mut command = Command::new(PROGRAM.name);
    command.args(["--port", "0", "--save", "", "--appendonly", "no", "--daemonize", "no"]);
    command.arg("--dir").arg(dir).arg("--unixsocket").arg(&socket);
    Server::start(PROGRAM, &mut command, &socket)
}

#[derive(Debug)]
pub(crate) struct Redis {
    wire: Wire,
    request: Vec<u8>,
}

impl Redis {
    pub(crate) fn connect(socket: &Path, shape: Shape) -> Result<Redis, Error> {
        Ok(Redis { wire: Wire::connect(PROGRAM, socket, shape.size + 1024)?, request: Vec::new() })
    }
}

// Writing into a vector cannot fail.
impl Store for Redis {
    fn get(&mut self, key: &Key, seen: impl FnOnce(&[u8])) -> Result<bool, Error> {
        self.request.clear();
        let _ = write!(self.request, "*2\r\n$3\r\nGET\r\n${KEY_LEN}\r\n");
        self.request.extend_from_slice(key);
        self.request.extend_from_slice(b"\r\n");
        self.wire.send(&self.request)?;
        let (line, start) = self.wire.first_line()?;
        if line == "$-1" {
            return Ok(false);
        }
        let length: Option<usize> = line.strip_prefix('$').and_then(|digits| digits.parse().ok());
        let length = length.ok_or_else(|| PROGRAM.error(format!("the reply to GET is {line}")))?;
        seen(&self.wire.up_to(start + length + 2)?[start..start + length]);
        Ok(true)
    }

    fn set(&mut self, _: u32, key: &Key, value: &[u8]) -> Result<(), Error> {
        self.request.clear();
        let _ = write!(self.request, "*3\r\n$3\r\nSET\r\n${KEY_LEN}\r\n");
        self.request.extend_from_slice(key);
        let _ = write!(self.request, "\r\n${}\r\n", value.len());
        self.request.extend_from_slice(value);
        self.request.extend_from_slice(b"\r\n");
        self.wire.send(&self.request)?;
        match self.wire.first_line()? {
            ("+OK", _) => Ok(()),
            (line, _) => Err(PROGRAM.error(format!("the reply to SET is {line}"))),
        }
    }
}
