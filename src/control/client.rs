//! Connects to a master's control socket, sends one request and receives the replies.
//!
//! Every wait has a limit ([`ControlEndpoint::timeout`]), because the kernel accepts connections even for a master that
//! is stopped or has hung. Ctrl-C ends only the client; the master completes the command.

use std::io::{self, BufRead as _, BufReader, ErrorKind, Read as _, Write as _};
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::sockopt::PeerCredentials;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, getsockopt, socket};
use nix::unistd::Pid;

use super::wire::{self, ControlReply, ControlRequest, MAX_REPLY, MasterStatus};
use crate::sys;

/// Time between attempts to connect to a socket whose queue is full.
const RETRY_INTERVAL: Duration = Duration::from_millis(50);

/// The control socket of a master, and the time limit for its replies.
#[derive(Clone, Debug)]
pub(crate) struct ControlEndpoint {
    pub(crate) socket: PathBuf,
    /// How long the master may be silent; `None` means no limit.
    pub(crate) timeout: Option<Duration>,
}

/// A connection on which one request was sent.
pub(crate) struct Connection {
    stream: BufReader<UnixStream>,
    /// The part of the next reply that has been received.
    unfinished: Vec<u8>,
    /// The path of the socket, for messages.
    at: String,
    timeout: Option<Duration>,
}

impl Connection {
    /// Connects to the master at `endpoint`, and sends the request.
    ///
    /// # Errors
    /// Returns a message for the operator if there is no master, or if the master does not accept the connection.
    pub(crate) fn ask(endpoint: &ControlEndpoint, request: &ControlRequest) -> Result<Self, String> {
        let ControlEndpoint { socket, timeout } = endpoint;
        let at = socket.display().to_string();
        let stream = match reach(socket, *timeout) {
            Ok(Some(stream)) => stream,
            Ok(None) => {
                let after = shown(*timeout);
                return Err(format!(
                    "the master at {at} has not accepted a connection for {after}, and its queue is full: it is stopped or \
                     has hung (see its log; wait longer with --timeout)"
                ));
            }
            Err(error) => return Err(explain(&error, &at)),
        };
        let limited = stream.set_read_timeout(*timeout).and_then(|()| stream.set_write_timeout(*timeout));
        limited.map_err(|error| explain(&error, &at))?;
        // A master that refuses the client closes the connection without reading the request. The write then fails, but
        // the master's reply can still be read.
        let _ = (&stream).write_all(&wire::line(request));
        Ok(Self { stream: BufReader::new(stream), unfinished: Vec::new(), at, timeout: *timeout })
    }

    /// Returns the master's pid, if the master is in this pid namespace.
    pub(crate) fn master(&self) -> Option<Pid> {
        let peer = getsockopt(self.stream.get_ref(), PeerCredentials).ok()?;
        (peer.pid() > 0).then(|| Pid::from_raw(peer.pid()))
    }

    /// Returns the next reply.
    ///
    /// # Errors
    /// Returns a message for the operator if the connection is lost, the reply is invalid, or the master does not reply in time.
    pub(crate) fn next(&mut self) -> Result<ControlReply, String> {
        self.next_in_time()?.ok_or_else(|| self.silence())
    }

    /// Returns the next reply, or `None` after a timeout. In that case, the part that has been received is kept.
    ///
    /// # Errors
    /// Returns a message for the operator if the connection is lost, or the reply is invalid.
    pub(crate) fn next_in_time(&mut self) -> Result<Option<ControlReply>, String> {
        let room = MAX_REPLY.saturating_sub(self.unfinished.len() as u64);
        match self.stream.by_ref().take(room).read_until(b'\n', &mut self.unfinished) {
            Ok(_) => {
                let line = std::mem::take(&mut self.unfinished);
                self.parse(&line).map(Some)
            }
            Err(error) if is_timeout(&error) => Ok(None),
            Err(error) => Err(format!("lost the connection to the master at {}: {error}", self.at)),
        }
    }

    /// Returns the message for the operator if the master does not reply.
    pub(crate) fn silence(&self) -> String {
        let (at, after) = (&self.at, shown(self.timeout));
        match self.master() {
            Some(pid) if self.is_stopped() => {
                format!("the master at {at} is stopped, and does not answer (continue it: kill -CONT {pid})")
            }
            Some(pid) => format!(
                "the master at {at} has not answered for {after}: it has hung, or the machine is overloaded (see its log, and ps -o \
                 pid,stat,wchan,cmd -p {pid}; wait longer with --timeout)"
            ),
            None => format!(
                "the master at {at} has not answered for {after}: it is stopped or has hung (see its log; wait longer with --timeout)"
            ),
        }
    }

    /// Whether a signal or a debugger has stopped the master.
    pub(crate) fn is_stopped(&self) -> bool {
        let stat = self.master().and_then(|pid| std::fs::read_to_string(format!("/proc/{pid}/stat")).ok());
        let state = stat.as_deref().and_then(|stat| stat.rsplit_once(')')?.1.trim_start().chars().next());
        matches!(state, Some('T' | 't'))
    }

    fn parse(&self, line: &[u8]) -> Result<ControlReply, String> {
        let Some(line) = line.strip_suffix(b"\n") else {
            return Err(format!(
                "the master at {} closed the connection before it reported the outcome (see its log)",
                self.at
            ));
        };
        serde_json::from_slice(line)
            .map_err(|error| format!("unexpected response from the master at {}: {error}", self.at))
    }

    /// Returns when the master has closed the connection. After a stop request, that is when the master has exited.
    ///
    /// # Errors
    /// Returns a message for the operator if the master does not close the connection in time.
    pub(crate) fn wait_for_close(mut self) -> Result<(), String> {
        match io::copy(&mut self.stream, &mut io::sink()) {
            Err(error) if is_timeout(&error) => {
                Err(format!("the master reported that it has stopped, but: {}", self.silence()))
            }
            Ok(_) | Err(_) => Ok(()),
        }
    }

    /// Receives the outcome, with a descriptor.
    ///
    /// # Errors
    /// Fails as [`Connection::next`] does, or with the master's reason if the master refuses the request.
    pub(crate) fn descriptor(self) -> Result<OwnedFd, String> {
        let mut line = vec![0; 4096];
        let received = sys::receive_with_descriptor(self.stream.get_ref().as_fd(), &mut line);
        let (count, fd) = received.map_err(|error| {
            if is_timeout(&error) {
                self.silence()
            } else {
                format!("lost the connection to the master at {}: {error}", self.at)
            }
        })?;
        match (self.parse(&line[..count])?, fd) {
            (ControlReply::Done { .. }, Some(fd)) => Ok(fd),
            (ControlReply::Failed { text }, _) => Err(text),
            (ControlReply::Progress { .. } | ControlReply::Status { .. } | ControlReply::Done { .. }, _) => {
                Err(format!("the master at {} sent no descriptor", self.at))
            }
        }
    }
}

/// Returns the status of the master at `endpoint`.
///
/// # Errors
/// Returns a message for the operator if there is no reply, or the master refuses.
pub(crate) fn status(endpoint: &ControlEndpoint) -> Result<MasterStatus, String> {
    match Connection::ask(endpoint, &ControlRequest::Status)?.next()? {
        ControlReply::Status { status } => Ok(status),
        ControlReply::Failed { text } => Err(text),
        ControlReply::Progress { .. } | ControlReply::Done { .. } => {
            Err("unexpected response from the master".to_owned())
        }
    }
}

/// Connects to the socket. Returns `None` if the socket's queue stays full for `timeout`. A blocking connect(2) would
/// wait forever.
fn reach(path: &Path, timeout: Option<Duration>) -> io::Result<Option<UnixStream>> {
    let deadline = timeout.map(|timeout| Instant::now() + timeout);
    let address = UnixAddr::new(path)?;
    loop {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let ours = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
        match connect(ours.as_raw_fd(), &address) {
            Ok(()) => {
                let stream = UnixStream::from(ours);
                stream.set_nonblocking(false)?;
                return Ok(Some(stream));
            }
            Err(Errno::EAGAIN) if deadline.is_some_and(|deadline| Instant::now() >= deadline) => return Ok(None),
            Err(Errno::EAGAIN) => std::thread::sleep(RETRY_INTERVAL),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut)
}

fn shown(timeout: Option<Duration>) -> String {
    timeout.map_or_else(|| "ever".to_owned(), |timeout| format!("{timeout:?}"))
}

fn explain(error: &io::Error, at: &str) -> String {
    match error.kind() {
        ErrorKind::NotFound => format!(
            "no master at {at}: no such socket (start one with --control {at}, or name another socket with --control)"
        ),
        ErrorKind::ConnectionRefused => {
            format!("no master at {at}: the process that created this socket is gone (start it again)")
        }
        ErrorKind::PermissionDenied => {
            format!(
                "cannot connect to the master at {at}: permission denied (run as root, or as the user of the master)"
            )
        }
        _ => format!("cannot connect to the master at {at}: {error} (name its socket with --control)"),
    }
}
