//! memcached over a Unix socket, with its text protocol: one request, one reply.

use std::io::Write as _;
use std::path::Path;
use std::process::Command;

use nix::unistd::geteuid;

use crate::error::Error;
use crate::get::data::Shape;
use crate::get::measure::Store;
use crate::get::server::{Program, Server, Wire};
use crate::sample::Key;

const PROGRAM: Program = Program { name: "memcached", package: "memcached" };

/// Starts memcached with one thread for each client process, and with enough memory that it evicts nothing.
pub(crate) fn start(dir: &Path, shape: Shape) -> Result<Server, Error> {
    let socket = dir.join("memcached.sock");
    let megabytes = (shape.bytes() + u64::from(shape.keys) * 256) * 3 / 2 / (1 << 20) + 128;
    let mut command = Command::new(PROGRAM.name);
    command.args(["-U", "0", "-t", "2", "-m", &megabytes.to_string()]).arg("-s").arg(&socket);
    if geteuid().is_root() {
        command.args(["-u", "root"]); // memcached requires this flag when root starts it
    }
    Server::start(PROGRAM, &mut command, &socket)
}

#[derive(Debug)]
pub(crate) struct Memcached {
    wire: Wire,
    request: Vec<u8>,
}

impl Memcached {
    pub(crate) fn connect(socket: &Path, shape: Shape) -> Result<Memcached, Error> {
        Ok(Memcached { wire: Wire::connect(PROGRAM, socket, shape.size + 1024)?, request: Vec::new() })
    }
}

impl Store for Memcached {
    fn get(&mut self, key: &Key, seen: impl FnOnce(&[u8])) -> Result<bool, Error> {
        self.request.clear();
        self.request.extend_from_slice(b"get ");
        self.request.extend_from_slice(key);
        self.request.extend_from_slice(b"\r\n");
        self.wire.send(&self.request)?;
        let (line, start) = self.wire.first_line()?;
        if line == "END" {
            return Ok(false);
        }
        // The line has the form `VALUE key flags length`.
        let length: Option<usize> = line.strip_prefix("VALUE ").and_then(|rest| rest.rsplit(' ').next()?.parse().ok());
        let length = length.ok_or_else(|| PROGRAM.error(format!("the reply to get is {line}")))?;
        let end = start + length + b"\r\nEND\r\n".len();
        seen(&self.wire.up_to(end)?[start..start + length]);
        Ok(true)
    }

    fn set(&mut self, _: u32, key: &Key, value: &[u8]) -> Result<(), Error> {
        self.request.clear();
        self.request.extend_from_slice(b"set ");
        self.request.extend_from_slice(key);
        let _ = write!(self.request, " 0 0 {}\r\n", value.len()); // writing to a vector cannot fail
        self.request.extend_from_slice(value);
        self.request.extend_from_slice(b"\r\n");
        self.wire.send(&self.request)?;
        match self.wire.first_line()? {
            ("STORED", _) => Ok(()),
            (line, _) => Err(PROGRAM.error(format!("the reply to set is {line}"))),
        }
    }
}
