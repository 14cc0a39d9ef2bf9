//! Writes the access log: one line for each request, when the request ends.
//!
//! Lines are buffered until the buffer is full or a second has passed. One write(2) then appends them to a file that
//! all workers share. A worker without requests needs no timer. If a worker is killed, its heir writes the buffered
//! lines.

use std::cell::{Cell, RefCell};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use http::{HeaderMap, HeaderValue, Method, Request, StatusCode, Uri, Version, header};
use jiff::Timestamp;
use tokio::sync::Notify;

use crate::config::address::Protocol;
use crate::config::logs::AccessFormat;
use crate::logging;
use crate::logging::access::{Exchange, LONGEST, RequestFields};
use crate::logging::files::LogFiles;
use crate::logging::line_buffer::{LineBuffer, ROOM};
use crate::protocol::cgi::ClientInfo;

/// How long a line may stay in the buffer.
const WAIT: Duration = Duration::from_secs(1);
/// Interval between write attempts while the reader of a pipe is slow.
const RETRY_INTERVAL: Duration = Duration::from_millis(100);
/// Why lines for a pipe are lost.
const TOO_SLOW: &str = "its reader is too slow";
/// Logged status of a request whose client disconnected before the response, as in nginx.
const LEFT: u16 = 499;

const _: () = assert!(LONGEST <= ROOM, "each line fits into an empty buffer");

#[derive(Debug)]
pub(crate) struct AccessLog {
    files: Arc<LogFiles>,
    format: AccessFormat,
    buffer: LineBuffer,
    slot: u32,
    generation: u64,
    /// Buffer in which a line is built.
    line: RefCell<Vec<u8>>,
    /// The second in which the last line was written, and its formatted text.
    second: RefCell<(i64, String)>,
    has_lines: Notify,
    /// Lines lost since the last successful write.
    lost: Cell<usize>,
}

impl AccessLog {
    /// Creates the access log. Returns `None` if no access log is configured.
    pub(crate) fn new(
        files: &Arc<LogFiles>,
        buffer: Option<LineBuffer>,
        slot: u32,
        generation: u64,
    ) -> Option<Rc<Self>> {
        let format = files.config().access.as_ref()?.format;
        let files = Arc::clone(files);
        let log = Self {
            files,
            format,
            buffer: buffer?,
            slot,
            generation,
            line: RefCell::default(),
            second: RefCell::default(),
            has_lines: Notify::new(),
            lost: Cell::new(0),
        };
        Some(Rc::new(log))
    }

    /// Flushes the buffer in time, so that no line waits longer than [`WAIT`].
    pub(crate) async fn run(&self) {
        loop {
            self.has_lines.notified().await;
            tokio::time::sleep(WAIT).await;
            self.flush();
            while !self.buffer.is_empty() {
                tokio::time::sleep(RETRY_INTERVAL).await; // gives the reader time
                self.flush();
            }
        }
    }

    /// Writes the buffered lines as far as this is possible without blocking.
    pub(crate) fn flush(&self) {
        if !self.buffer.is_empty() {
            self.buffer.write_out(|lines| self.wrote(lines, self.files.write_access(lines)));
        }
    }

    /// Writes the buffered lines before this worker exits.
    pub(crate) fn finish(&self) {
        if !self.buffer.is_empty() {
            let limit = logging::last_flush_timeout();
            self.buffer.write_out(|lines| self.wrote(lines, self.files.write_access_within(lines, limit)));
            self.lose(self.buffer.forget(), TOO_SLOW);
        }
    }

    /// Handles the outcome of a write. Returns the number of bytes that were written or are counted as lost.
    fn wrote(&self, lines: &[u8], (count, outcome): (usize, io::Result<()>)) -> usize {
        match outcome {
            Ok(()) => {
                let lost = self.lost.take();
                if lost > 0 {
                    log::warn!(slot = self.slot, lost; "the access log can be written again");
                }
                count
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => count,
            Err(error) => {
                let rest = lines.get(count..).unwrap_or_default();
                self.lose(rest.iter().filter(|&&byte| byte == b'\n').count(), &error.to_string());
                lines.len()
            }
        }
    }

    fn lose(&self, lines: usize, why: &str) {
        if lines == 0 {
            return;
        }
        if self.lost.get() == 0 {
            log::error!(slot = self.slot; "cannot write to the access log; its lines are lost: {why} (--access-log)");
        }
        self.lost.set(self.lost.get() + lines);
    }

    fn push(&self, exchange: &Exchange<'_>) {
        let now = Timestamp::now();
        let mut line = self.line.borrow_mut();
        line.clear();
        match self.format {
            AccessFormat::Json => exchange.write_json(&format!("{now:.3}"), &mut line),
            AccessFormat::Combined => {
                let mut second = self.second.borrow_mut();
                if second.0 != now.as_second() || second.1.is_empty() {
                    *second = (now.as_second(), now.strftime("%d/%b/%Y:%H:%M:%S +0000").to_string());
                }
                exchange.write_combined(&second.1, &mut line);
            }
        }
        if self.buffer.is_empty() {
            self.has_lines.notify_one();
        }
        if !self.buffer.push(&line) {
            self.flush();
            if self.buffer.push(&line) {
                self.has_lines.notify_one();
            } else {
                self.lose(1, TOO_SLOW);
            }
        }
    }
}

/// The access log line of a request that is being served. The line is written when this value is dropped.
#[derive(Debug)]
pub(crate) struct AccessLogEntry {
    log: Rc<AccessLog>,
    protocol: Protocol,
    address: Option<IpAddr>,
    user: Option<Vec<u8>>,
    request: Option<LoggedRequest>,
    begun: Instant,
    status: Option<StatusCode>,
    bytes: u64,
}

/// The parts of a request that are logged.
#[derive(Debug)]
struct LoggedRequest {
    method: Method,
    uri: Uri,
    version: Version,
    host: Option<HeaderValue>,
    referer: Option<HeaderValue>,
    user_agent: Option<HeaderValue>,
}

impl AccessLogEntry {
    /// Begins the entry for a request. `request` is `None` if the request could not be read.
    pub(crate) fn begin<B>(log: &Rc<AccessLog>, protocol: Protocol, request: Option<&Request<B>>) -> Box<Self> {
        let origin = request.and_then(|request| request.extensions().get::<ClientInfo>());
        let logged = request.map(|request| LoggedRequest {
            method: request.method().clone(),
            uri: request.uri().clone(),
            version: request.version(),
            host: value(request.headers(), &header::HOST),
            referer: value(request.headers(), &header::REFERER),
            user_agent: value(request.headers(), &header::USER_AGENT),
        });
        Box::new(Self {
            log: Rc::clone(log),
            protocol,
            address: origin.and_then(|origin| origin.address).map(|address| address.ip()),
            user: origin
                .and_then(|origin| origin.params.get("REMOTE_USER"))
                .filter(|user| !user.is_empty())
                .map(<[u8]>::to_vec),
            request: logged,
            begun: Instant::now(),
            status: None,
            bytes: 0,
        })
    }

    /// Begins the entry for a request that could not be read.
    pub(crate) fn of_unread(log: &Rc<AccessLog>, protocol: Protocol, from: Option<SocketAddr>) -> Box<Self> {
        let mut entry = Self::begin::<()>(log, protocol, None);
        entry.address = from.map(|from| from.ip());
        entry
    }

    pub(crate) fn answered(&mut self, status: StatusCode) {
        self.status = Some(status);
    }

    /// Counts bytes of the response body.
    pub(crate) fn sent(&mut self, bytes: usize) {
        self.bytes += bytes as u64;
    }
}

fn value(headers: &HeaderMap, name: &header::HeaderName) -> Option<HeaderValue> {
    headers.get(name).cloned()
}

impl Drop for AccessLogEntry {
    fn drop(&mut self) {
        let request = self.request.as_ref().map(|logged| RequestFields {
            method: &logged.method,
            target: logged.uri.path_and_query().map_or("/", |target| target.as_str()),
            version: logged.version,
            host: logged.host.as_ref(),
            referer: logged.referer.as_ref(),
            user_agent: logged.user_agent.as_ref(),
        });
        self.log.push(&Exchange {
            address: self.address,
            user: self.user.as_deref(),
            request,
            status: self.status.map_or(LEFT, |status| status.as_u16()),
            bytes: self.bytes,
            took: self.begun.elapsed(),
            slot: self.log.slot,
            generation: self.log.generation,
            protocol: self.protocol,
        });
    }
}
