//! A connection to a master's control socket: one request, and the answers to it.
//!
//! May not: wait for longer than the master takes. A command that takes time is ended with Ctrl-C, and goes on.

use std::io::{self, BufRead as _, BufReader, ErrorKind, Read as _, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use nix::sys::socket::getsockopt;
use nix::sys::socket::sockopt::PeerCredentials;
use nix::unistd::Pid;

use super::wire::{self, Answer, LONGEST_ANSWER, Request, Status};
use crate::sys;

/// A connection on which one request was sent.
pub(crate) struct Connection {
    stream: BufReader<UnixStream>,
    /// Where that is, for messages.
    at: String,
}

impl Connection {
    /// Asks the master at `path`.
    ///
    /// # Errors
    /// A sentence, if nobody is there who answers.
    pub(crate) fn ask(path: &Path, request: &Request) -> Result<Self, String> {
        let at = path.display().to_string();
        let stream = UnixStream::connect(path).map_err(|error| explain(&error, &at))?;
        // A master that refuses us closes without reading: what it says is still there to be read.
        let _ = (&stream).write_all(&wire::line(request));
        Ok(Self { stream: BufReader::new(stream), at })
    }

    /// Its pid, if it is to be seen from here.
    pub(crate) fn master(&self) -> Option<Pid> {
        let peer = getsockopt(self.stream.get_ref(), PeerCredentials).ok()?;
        (peer.pid() > 0).then(|| Pid::from_raw(peer.pid()))
    }

    /// The next answer.
    ///
    /// # Errors
    /// A sentence, if the master is gone, or it makes no sense.
    pub(crate) fn next(&mut self) -> Result<Answer, String> {
        let mut line = Vec::new();
        let read = self.stream.by_ref().take(LONGEST_ANSWER).read_until(b'\n', &mut line);
        read.map_err(|error| format!("the master at {} broke off: {error}", self.at))?;
        self.parse(&line)
    }

    fn parse(&self, line: &[u8]) -> Result<Answer, String> {
        let Some(line) = line.strip_suffix(b"\n") else {
            return Err(format!("the master at {} broke off before it said what came of it (see its log)", self.at));
        };
        serde_json::from_slice(line)
            .map_err(|error| format!("the master at {} answers what makes no sense here: {error}", self.at))
    }

    /// Returns when the master has closed the connection: at its end, if it was told to stop.
    pub(crate) fn wait_for_close(mut self) {
        let _ = io::copy(&mut self.stream, &mut io::sink());
    }

    /// The outcome together with a descriptor.
    ///
    /// # Errors
    /// As for [`Connection::next`], or what the master says against it.
    pub(crate) fn descriptor(self) -> Result<OwnedFd, String> {
        let mut line = vec![0; 4096];
        let received = sys::receive_with_descriptor(self.stream.get_ref().as_fd(), &mut line);
        let (count, fd) = received.map_err(|error| format!("the master at {} broke off: {error}", self.at))?;
        match (self.parse(&line[..count])?, fd) {
            (Answer::Done { .. }, Some(fd)) => Ok(fd),
            (Answer::Failed { text }, _) => Err(text),
            (Answer::Progress { .. } | Answer::Status { .. } | Answer::Done { .. }, _) => {
                Err(format!("the master at {} gave no descriptor", self.at))
            }
        }
    }
}

/// How things are at the master at `path`.
///
/// # Errors
/// A sentence for the operator.
pub(crate) fn status(path: &Path) -> Result<Status, String> {
    match Connection::ask(path, &Request::Status)?.next()? {
        Answer::Status { status } => Ok(status),
        Answer::Failed { text } => Err(text),
        Answer::Progress { .. } | Answer::Done { .. } => Err("the master answers something else".to_owned()),
    }
}

fn explain(error: &io::Error, at: &str) -> String {
    match error.kind() {
        ErrorKind::NotFound => format!(
            "no master is at {at}: no such socket (start one with --control {at}, or name another socket with --control)"
        ),
        ErrorKind::ConnectionRefused => {
            format!("no master is at {at}: the one that made this socket is gone (start it again)")
        }
        ErrorKind::PermissionDenied => {
            format!("cannot ask the master at {at}: permission denied (run as root, or as the user of the master)")
        }
        _ => format!("cannot ask the master at {at}: {error} (name its socket with --control)"),
    }
}
