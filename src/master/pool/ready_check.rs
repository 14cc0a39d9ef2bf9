//! Requests a path from a new app process, which is ready when it answers with a status below 400 (`--ready-path`).
//!
//! ```text
//! connect ─▶ send the request ─▶ read the head ─┬─ status below 400 ─▶ read the rest ─▶ ready
//!    ▲                                          └─ anything else ─▶ wait ─┐
//!    └────────────────────────────────────────────────────────────────────┘
//! ```
//!
//! An attempt has no time limit of its own: another request to a process that is busy would only add to its work. The
//! process is killed after `--start-timeout`. The rest of the response is read, so that the process has finished the
//! request before it gets the first one of a client, but not more than [`MAX_RESPONSE`], and not for longer than
//! [`REST_TIMEOUT`].
//!
//! No call for the connection blocks, and each call reads a bounded number of bytes. The script of the path is looked up
//! when the process is started, which also waits for the disk.

use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv, send};

use super::supervisor::Uptime;
use crate::config::Config;
use crate::config::gateway::Backend;
use crate::net::app_channel::AppChannel;
use crate::protocol::ready_response::StatusDecoder;

/// Time between the end of an attempt and the next one.
const RETRY_INTERVAL: Duration = Duration::from_millis(100);
/// Maximum number of bytes read from one response.
const MAX_RESPONSE: usize = 64 << 10;
/// How long the master waits for the rest of a response whose status is known.
const REST_TIMEOUT: Duration = Duration::from_secs(1);
/// Maximum number of reads in one call.
const MAX_READS: usize = 4;

/// Returns the bytes of the GET request for a path, as a gateway would forward it.
///
/// # Errors
/// Returns a message for the operator if the path selects no script.
pub(crate) type EncodeReadyRequest = fn(&Config, &str) -> Result<Bytes, String>;

/// The request.
#[derive(Debug)]
pub(super) struct ReadyRequest {
    path: String,
    bytes: Bytes,
    backend: Backend,
}

impl ReadyRequest {
    /// Returns the request that proves the readiness of new processes, if `--ready-path` is given.
    ///
    /// # Errors
    /// Returns a message for the operator if the path selects no script.
    pub(super) fn of(config: &Config, encode: EncodeReadyRequest) -> Result<Option<Arc<Self>>, String> {
        let path = config.program.as_ref().and_then(|program| program.ready_path.as_ref());
        let (Some(path), Some(gateway)) = (path, &config.gateway) else { return Ok(None) };
        let bytes = encode(config, path)?;
        Ok(Some(Arc::new(Self { path: path.clone(), bytes, backend: gateway.backend })))
    }
}

/// The attempts to get an answer from one process.
#[derive(Debug)]
pub(super) struct ReadyCheck {
    request: Arc<ReadyRequest>,
    attempt: Option<Attempt>,
    next_at: Uptime,
    /// What became of the last attempt, for the operator.
    last: String,
}

#[derive(Debug)]
struct Attempt {
    connection: OwnedFd,
    unsent: Bytes,
    decoder: StatusDecoder,
    received: usize,
    /// When the rest of the response is no longer waited for.
    rest_until: Option<Uptime>,
}

impl ReadyCheck {
    pub(super) fn new(request: Arc<ReadyRequest>) -> Self {
        Self { request, attempt: None, next_at: Uptime::ZERO, last: String::new() }
    }

    /// Continues the attempt, or begins the next one. Returns true when the process is ready.
    pub(super) fn advance(&mut self, channel: &AppChannel, slot: u32, now: Uptime) -> bool {
        if self.attempt.is_none() && now < self.next_at {
            return false;
        }
        let mut attempt = match self.attempt.take().map_or_else(|| Attempt::begin(&self.request, channel, slot), Ok) {
            Ok(attempt) => attempt,
            Err(error) => return self.failed(format!("cannot connect: {error}"), now),
        };
        match attempt.advance(now) {
            Ok(None) => {
                self.attempt = Some(attempt);
                false
            }
            Ok(Some(status)) if status.as_u16() < 400 => true,
            Ok(Some(status)) => self.failed(format!("status {status}"), now),
            Err(why) => self.failed(why, now),
        }
    }

    fn failed(&mut self, why: String, now: Uptime) -> bool {
        (self.last, self.next_at) = (why, now + RETRY_INTERVAL);
        false
    }

    /// Returns why the process is not ready, for the operator.
    pub(super) fn describe(&self) -> String {
        let path = &self.request.path;
        match self.last.as_str() {
            "" => format!("it has not answered GET {path} (--ready-path)"),
            last => format!("the last answer to GET {path} (--ready-path) was: {last}"),
        }
    }
}

impl Attempt {
    fn begin(request: &ReadyRequest, channel: &AppChannel, slot: u32) -> io::Result<Self> {
        let connection = channel.connect_to(slot)?;
        let decoder = StatusDecoder::new(request.backend == Backend::Fastcgi);
        Ok(Self { connection, unsent: request.bytes.clone(), decoder, received: 0, rest_until: None })
    }

    /// Returns the status when the response is complete, or `None` if the attempt is not over.
    fn advance(&mut self, now: Uptime) -> Result<Option<http::StatusCode>, String> {
        while !self.unsent.is_empty() {
            match send(self.connection.as_raw_fd(), &self.unsent, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL) {
                Ok(sent) => _ = self.unsent.split_to(sent),
                Err(Errno::EAGAIN) => return Ok(None),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(format!("cannot send the request: {}", io::Error::from(errno))),
            }
        }
        for _ in 0..MAX_READS {
            let mut buffer = [0; 4096];
            match recv(self.connection.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT) {
                Ok(0) | Err(Errno::ECONNRESET) => {
                    return self.decoder.status().map(Some).ok_or_else(|| self.decoder.end_of_connection());
                }
                Ok(count) => {
                    self.received += count;
                    self.decoder.feed(&buffer[..count])?;
                    if self.decoder.has_ended() {
                        return self.decoder.status().map(Some).ok_or_else(|| self.decoder.end_of_connection());
                    }
                }
                Err(Errno::EAGAIN) => break,
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(format!("cannot read the response: {}", io::Error::from(errno))),
            }
        }
        let Some(status) = self.decoder.status() else {
            let is_long = self.received > MAX_RESPONSE;
            return if is_long { Err("the response has no status".to_owned()) } else { Ok(None) };
        };
        let rest_until = *self.rest_until.get_or_insert(now + REST_TIMEOUT);
        Ok(Some(status).filter(|_| now >= rest_until || self.received > MAX_RESPONSE))
    }
}
