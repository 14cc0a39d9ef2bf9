//! One request: starts the program, and copies between its pipes and the connection to the gateway until it has exited.
//!
//! - The body is copied at the speed of the program. A program may exit without having read it.
//! - Output waits in the pipe while the gateway does not read from the connection.
//! - If the gateway dies, the program continues, and its output is discarded, as with other app processes.

use std::io::{self, Read, Write as _};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::process::{Child, ChildStderr, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};

use bytes::{Buf as _, Bytes, BytesMut};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::Pid;

use super::{Connection, complain};
use crate::protocol::fastcgi::{FastCgiEvent, RequestId, stderr_header, stdout_end, stdout_header};
use crate::protocol::params::Params;
use crate::sys;

/// Size of a read from the program. Fits into one record.
const READ_SIZE: usize = 32 << 10;
/// A line of standard error is passed on in pieces of this size.
const MAX_LINE: usize = 8 << 10;
/// How often the runner checks whether the program has exited if the kernel cannot report this (before Linux 5.3).
const EXIT_INTERVAL_MS: u16 = 20;
/// Status of a program that could not be executed, as in a shell.
const NOT_EXECUTED: u32 = 127;

pub(super) struct Exchange<'a, 'b> {
    connection: &'a mut Connection<'b>,
    id: RequestId,
    program: Option<Running>,
    /// The part of the body that has been received and not been written.
    pending: Bytes,
    has_whole_body: bool,
    /// The part of the last line of standard error that has not been passed on.
    line: Vec<u8>,
    /// Whether the gateway has closed the connection.
    is_abandoned: bool,
    buffer: Vec<u8>,
}

/// The program.
struct Running {
    child: Child,
    /// Becomes readable when the program has exited.
    exit: Option<OwnedFd>,
    input: Option<ChildStdin>,
    output: Option<ChildStdout>,
    errors: Option<ChildStderr>,
}

/// What [`Exchange::wait`] has found.
#[derive(Default)]
struct Ready {
    connection: bool,
    input: bool,
    output: bool,
    errors: bool,
}

/// What is waited for.
#[derive(Clone, Copy)]
enum Source {
    Connection,
    Input,
    Output,
    Errors,
    Exit,
}

impl<'a, 'b> Exchange<'a, 'b> {
    /// Starts the program.
    ///
    /// # Errors
    /// Fails if a pipe cannot be set up. A program that cannot be executed is reported to the gateway.
    pub(super) fn begin(connection: &'a mut Connection<'b>, id: RequestId, params: &Params) -> io::Result<Self> {
        let service = connection.service;
        let mut command = Command::new(&service.program.path);
        command.arg0(&service.program.name).args(&service.program.arguments);
        service.environment.apply(&mut command, params.iter());
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let started = sys::spawn_in_group(&mut command);
        let mut exchange = Self {
            connection,
            id,
            program: None,
            pending: Bytes::new(),
            has_whole_body: false,
            line: Vec::new(),
            is_abandoned: false,
            buffer: vec![0; READ_SIZE],
        };
        match started {
            Ok(child) => exchange.program = Some(Running::new(child)?),
            Err(error) => exchange.errors(service.privileges.explain_exec(&error, &service.program).as_bytes()),
        }
        Ok(exchange)
    }

    /// Copies until the program has exited. Returns `None` if it was not executed.
    pub(super) fn run(&mut self) -> io::Result<Option<ExitStatus>> {
        loop {
            self.take_body()?;
            let Some(program) = &mut self.program else { return Ok(None) };
            if let Some(status) = program.child.try_wait()? {
                while self.copy_output()? {}
                while self.copy_errors()? {}
                return Ok(Some(status));
            }
            let ready = self.wait()?;
            if ready.connection && !self.connection.read()? {
                (self.is_abandoned, self.has_whole_body) = (true, true);
            }
            if ready.input {
                self.write_body();
            }
            if ready.output {
                self.copy_output()?;
            }
            if ready.errors {
                self.copy_errors()?;
            }
        }
    }

    /// Ends the response. If a signal has terminated the program, ends this process with the same signal.
    pub(super) fn end(mut self, outcome: io::Result<Option<ExitStatus>>) -> io::Result<()> {
        let status = match outcome {
            Ok(status) => status,
            Err(error) => {
                if let Some(Running { child, .. }) = &mut self.program {
                    let _ = child.kill(); // it may have exited
                    child.wait()?;
                }
                return Err(error);
            }
        };
        if let Some(signal) = status.and_then(|status| status.signal()) {
            self.flush_line();
            sys::die_of(signal);
        }
        let status = status.map_or(NOT_EXECUTED, |status| status.code().unwrap_or(0).unsigned_abs());
        if status != 0 && self.program.is_some() {
            self.flush_line();
            self.errors(format!("the CGI program exited with status {status}").as_bytes());
        }
        self.flush_line();
        let mut out = BytesMut::new();
        stdout_end(&mut out, self.id, status);
        self.send(&out);
        if self.is_abandoned { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(()) }
    }

    /// Takes the body from the bytes that have been received, as far as the program can take more.
    fn take_body(&mut self) -> io::Result<()> {
        while self.pending.is_empty() && !self.has_whole_body {
            match self.connection.decoded()? {
                Some(FastCgiEvent::Stdin { bytes, .. }) if self.input().is_some() => self.pending = bytes,
                Some(FastCgiEvent::StdinEnd { .. } | FastCgiEvent::Abort { .. }) => self.has_whole_body = true,
                Some(_) => {} // the program does not read the body
                None => break,
            }
        }
        if self.pending.is_empty() && self.has_whole_body {
            self.close_input();
        }
        Ok(())
    }

    fn input(&self) -> Option<&ChildStdin> {
        self.program.as_ref()?.input.as_ref()
    }

    fn close_input(&mut self) {
        if let Some(program) = &mut self.program {
            program.input = None;
        }
        self.pending.clear();
    }

    fn write_body(&mut self) {
        let Some(mut input) = self.input() else { return };
        match input.write(&self.pending) {
            Ok(count) => self.pending.advance(count),
            Err(error) if is_transient(&error) => {}
            Err(_) => self.close_input(), // the program has closed it
        }
    }

    /// Waits until something can be copied, or the program has exited.
    fn wait(&self) -> io::Result<Ready> {
        let Some(program) = &self.program else { return Ok(Ready::default()) };
        let reads_body = self.pending.is_empty() && !self.has_whole_body;
        let sources = [
            (Source::Connection, reads_body.then(|| self.connection.stream.as_fd()), PollFlags::POLLIN),
            (Source::Input, self.input().filter(|_| !self.pending.is_empty()).map(AsFd::as_fd), PollFlags::POLLOUT),
            (Source::Output, program.output.as_ref().map(AsFd::as_fd), PollFlags::POLLIN),
            (Source::Errors, program.errors.as_ref().map(AsFd::as_fd), PollFlags::POLLIN),
            (Source::Exit, program.exit.as_ref().map(AsFd::as_fd), PollFlags::POLLIN),
        ];
        let sources: Vec<(Source, BorrowedFd<'_>, PollFlags)> =
            sources.into_iter().filter_map(|(source, fd, flags)| Some((source, fd?, flags))).collect();
        let mut watched: Vec<_> = sources.iter().map(|&(_, fd, flags)| PollFd::new(fd, flags)).collect();
        let limit = if program.exit.is_some() { PollTimeout::NONE } else { PollTimeout::from(EXIT_INTERVAL_MS) };
        match poll(&mut watched, limit) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        let mut ready = Ready::default();
        for ((source, ..), watched) in sources.iter().zip(&watched) {
            let is_ready = watched.any().unwrap_or(false);
            match source {
                Source::Connection => ready.connection = is_ready,
                Source::Input => ready.input = is_ready,
                Source::Output => ready.output = is_ready,
                Source::Errors => ready.errors = is_ready,
                Source::Exit => {}
            }
        }
        Ok(ready)
    }

    /// Passes on what the program has written. Returns whether there may be more.
    fn copy_output(&mut self) -> io::Result<bool> {
        let Some(program) = &mut self.program else { return Ok(false) };
        let count = match read(&mut program.output, &mut self.buffer)? {
            Some(count) => count,
            None => return Ok(false),
        };
        let mut out = BytesMut::with_capacity(count + 8);
        stdout_header(&mut out, self.id, count);
        out.extend_from_slice(self.buffer.get(..count).unwrap_or_default());
        self.send(&out);
        Ok(true)
    }

    /// Passes on complete lines of standard error. Returns whether there may be more.
    fn copy_errors(&mut self) -> io::Result<bool> {
        let Some(program) = &mut self.program else { return Ok(false) };
        let count = match read(&mut program.errors, &mut self.buffer)? {
            Some(count) => count,
            None => return Ok(false),
        };
        let bytes = std::mem::take(&mut self.buffer);
        self.errors(bytes.get(..count).unwrap_or_default());
        self.buffer = bytes;
        Ok(true)
    }

    fn errors(&mut self, bytes: &[u8]) {
        self.line.extend_from_slice(bytes);
        let end = self.line.iter().rposition(|&byte| byte == b'\n').map(|at| at + 1);
        let end = end.or((self.line.len() >= MAX_LINE).then_some(self.line.len()));
        if let Some(end) = end {
            let rest = self.line.split_off(end);
            self.flush_line();
            self.line = rest;
        }
    }

    fn flush_line(&mut self) {
        let line = std::mem::take(&mut self.line);
        if line.is_empty() {
            return;
        }
        if self.is_abandoned {
            return complain(&String::from_utf8_lossy(&line).trim_end());
        }
        let mut out = BytesMut::with_capacity(line.len() + 8);
        stderr_header(&mut out, self.id, line.len());
        out.extend_from_slice(&line);
        self.send(&out);
    }

    fn send(&mut self, bytes: &[u8]) {
        if !self.is_abandoned && self.connection.stream.write_all(bytes).is_err() {
            self.is_abandoned = true;
        }
    }
}

impl Running {
    fn new(mut child: Child) -> io::Result<Self> {
        let exit = sys::process_descriptor(Pid::from_raw(child.id().cast_signed())).ok();
        let (input, output, errors) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let program = Self { child, exit, input, output, errors };
        let pipes = [
            program.input.as_ref().map(AsFd::as_fd),
            program.output.as_ref().map(AsFd::as_fd),
            program.errors.as_ref().map(AsFd::as_fd),
        ];
        for pipe in pipes.into_iter().flatten() {
            fcntl(pipe, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?; // the program's ends of the pipes still block
        }
        Ok(program)
    }
}

/// Reads from a pipe, which is closed at its end. Returns `None` if nothing can be read now.
fn read(pipe: &mut Option<impl Read>, buffer: &mut [u8]) -> io::Result<Option<usize>> {
    let Some(open) = pipe else { return Ok(None) };
    match open.read(buffer) {
        Ok(0) => {
            *pipe = None;
            Ok(None)
        }
        Ok(count) => Ok(Some(count)),
        Err(error) if is_transient(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

fn is_transient(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}
