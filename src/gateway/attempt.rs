//! One attempt to serve a request: sends the request to a claimed app process, and takes the response. This file has the
//! part that is the same for all protocols; `fastcgi.rs`, `http.rs` and `scgi.rs` have the exchange itself.
//!
//! ```text
//! connect ─▶ send the request ┐
//!            read the response ┴▶ head: answer the client ─▶ body, into a spool ─▶ end: release the process
//! ```
//!
//! The attempt takes the response at the speed of the app process, however slowly the client reads. It does not end with its
//! request (see `own_task.rs`).
//!
//! When the client has left:
//! - An app process that serves one request at a time does not notice, and is not available before it has finished. The
//!   attempt goes on, and the output is discarded.
//! - With HTTP and more than one request at a time, the connection is closed, which cancels the request in the process.
//!   So is the connection of an event stream, which would never end.
//!
//! A response is complete only with the end that its protocol defines. If the connection ends before, the attempt fails,
//! and a response that has begun is broken off.

use std::cell::{Cell, RefCell};
use std::fs;
use std::future::{Future, poll_fn};
use std::io;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;

use ::http::HeaderMap;
use bytes::Bytes;
use nix::errno::Errno;
use nix::unistd::Pid;
use tokio::io::Interest;
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::app_stream::AppStream;
use super::body::GatewayBody;
use super::queue::AppUnit;
use super::spool::{SpoolError, SpoolWriter, spool};
use super::{Shared, fastcgi, http, is_streamed, reason, scgi};
use crate::net::unix_diagnosis::UnixDiagnosis;
use crate::protocol::cgi::parse_response::ResponseHead;
use crate::sys;

/// How long an attempt waits to see whether the app process has died, after its connection has ended. A dying process
/// closes its connections a moment before the kernel reports its death.
const DEATH_TIMEOUT: Duration = Duration::from_millis(50);
/// How long the master may take to turn away the connections that a dead app process has not accepted.
const TURN_AWAY_TIMEOUT: Duration = Duration::from_secs(5);
/// How long an attempt waits for another gateway to close its connection to the app process.
const KEEPER_TIMEOUT: Duration = Duration::from_millis(20);
const KEEPER_INTERVAL: Duration = Duration::from_millis(1);
/// After this time, an attempt watches the app process itself, because a child of the process may hold a copy of the
/// connection, which then does not end with the process.
const WATCH_AFTER: Duration = Duration::from_millis(200);
/// A response of up to this size is held until it is complete, for up to [`HOLD_TIME`]: if its app process dies meanwhile,
/// the client has received nothing, and an idempotent request can be repeated.
pub(super) const HOLD_SIZE: usize = 64 << 10;
/// How long the head of a response is held while the rest arrives.
pub(super) const HOLD_TIME: Duration = Duration::from_millis(100);
/// `PF_EXITING`, from `linux/sched.h`: the process has begun to exit.
const EXITING: u64 = 0x4;

/// A request as it is sent to an app process, the same in each attempt.
#[derive(Debug)]
pub(super) struct Outgoing {
    pub(super) message: Message,
    /// Method and target, for the log.
    pub(super) what: String,
}

#[derive(Debug)]
pub(super) enum Message {
    Fastcgi(fastcgi::Message),
    Http(Box<http::Message>),
    Scgi(scgi::Message),
}

/// The response of an app process.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) head: ResponseHead,
    pub(super) body: GatewayBody,
}

/// Why an attempt failed.
#[derive(Debug)]
pub(super) enum Failure {
    /// The app process has not begun the request, so any request may be repeated.
    NotBegun,
    /// Another gateway, with this slot and pid, keeps a connection to the app process and does not close it. Nothing was
    /// sent.
    Blocked(u32, u32),
    /// The app process has died.
    Died,
    /// The app process lives, but a child of it that served the request has probably died.
    ChildDied,
    /// The app process has ended its kept connection without a byte, and has exited. It may have exited on its own.
    Ended,
    /// The app process has not begun its response in time.
    TimedOut,
    /// The app process has broken the protocol, or has closed the connection without a response.
    Broken(String),
    /// This gateway could not send the request.
    NotSent(io::Error),
}

/// An attempt.
#[derive(Debug)]
pub(super) struct Attempt {
    pub(super) unit: AppUnit,
    pub(super) outgoing: Rc<Outgoing>,
    pub(super) shared: Rc<Shared>,
    /// The connection to the app process.
    connection: RefCell<Option<AppStream>>,
}

impl Attempt {
    pub(super) fn new(unit: AppUnit, outgoing: Rc<Outgoing>, shared: Rc<Shared>) -> Self {
        Self { unit, outgoing, shared, connection: RefCell::default() }
    }

    /// Runs the attempt to its end.
    pub(super) async fn run(self, reply: oneshot::Sender<Result<Answer, Failure>>) {
        let process = (self.unit.slot(), self.unit.pid());
        let response = Response::new(reply, &self.shared, process, &self.outgoing.what);
        let in_use = self.shared.activity.begin(self.unit.slot(), self.unit.pid());
        self.unit.begin_request(&self.outgoing.what);
        let outcome = {
            let (begun, mut exchange) = (Instant::now(), pin!(self.exchange(&response)));
            let quick = tokio::select! {
                biased;
                outcome = exchange.as_mut() => Some(outcome),
                () = response.abandoned() => None,
                () = sleep_until(begun + self.shared.request_timeout.map_or(WATCH_AFTER, |timeout| timeout.min(WATCH_AFTER))) => None,
            };
            match quick {
                Some(outcome) => outcome,
                // Few requests take that long, so the others need no memory for this.
                None => match Box::pin(self.watch(exchange, &response, begun)).await {
                    Some(outcome) => outcome,
                    None => return,
                },
            }
        };
        let failure = match outcome {
            Ok(kept) => {
                drop(in_use);
                if let Some(stream) = kept {
                    self.unit.keep(stream);
                }
                return;
            }
            Err(failure) => failure,
        };
        // With several requests in the process, it is unknown which of them has killed it.
        if let Failure::Died | Failure::Ended = &failure
            && in_use.is_alone()
        {
            self.shared.report_death(self.unit.slot(), self.unit.pid(), &self.outgoing.what);
        }
        response.fail(failure);
    }

    /// Watches the client, the time limit and the app process until the exchange ends. Returns `None` if the attempt ends
    /// before.
    async fn watch(
        &self,
        exchange: Pin<&mut impl Future<Output = Result<Option<AppStream>, Failure>>>,
        response: &Response<'_>,
        begun: Instant,
    ) -> Option<Result<Option<AppStream>, Failure>> {
        tokio::select! {
            biased;
            outcome = exchange => Some(outcome),
            () = self.given_up(response, begun) => None,
            () = self.died(begun) => Some(Err(Failure::Died)),
        }
    }

    /// Sends the request and takes the response. Returns a connection that is kept together with the unit.
    async fn exchange(&self, response: &Response<'_>) -> Result<Option<AppStream>, Failure> {
        match &self.outgoing.message {
            Message::Fastcgi(message) => message.exchange(self, response).await,
            Message::Http(message) => Box::pin(message.exchange(self, response)).await.map(|()| None),
            Message::Scgi(message) => Box::pin(message.exchange(self, response)).await.map(|()| None),
        }
    }

    /// Waits until no other gateway keeps a connection to the app process, which would accept no other one. The other gateway
    /// was woken when the unit was claimed.
    pub(super) async fn await_keeper(&self) -> Result<(), Failure> {
        let begun = Instant::now();
        loop {
            let woken = self.unit.woken();
            let Some((slot, pid)) = self.unit.other_keeper() else { return Ok(()) };
            if begun.elapsed() >= KEEPER_TIMEOUT {
                return Err(Failure::Blocked(slot, pid));
            }
            let _ = timeout(KEEPER_INTERVAL, woken).await;
        }
    }

    /// Connects to the app process. The attempt stores the connection.
    pub(super) async fn connect(&self) -> Result<AppStream, Failure> {
        let unit = self.unit.unit().ok_or(Failure::NotBegun)?;
        let connected = match self.shared.queue.channel().connect(unit) {
            Ok(Some(connection)) => AppStream::establish(connection).await,
            Ok(None) => return Err(Failure::NotBegun),
            Err(error) => Err(error),
        };
        // The process has died or does not listen any more, or the queue of its socket is full of connections of
        // processes that have died.
        let refusals = [Errno::EAGAIN, Errno::ECONNREFUSED, Errno::ENOENT].map(|errno| errno as i32);
        match connected {
            Err(error) if refusals.contains(&code_of(&error)) => {
                let _ = self.has_died().await; // this limits the rate of attempts
                Err(Failure::NotBegun)
            }
            outcome => outcome.inspect(|connection| self.uses(connection)).map_err(Failure::NotSent),
        }
    }

    /// Returns when the attempt must end although the app process has not ended the exchange. Answers the client when
    /// the app process has not begun its response in time.
    async fn given_up(&self, response: &Response<'_>, begun: Instant) {
        let (mut since, mut deadline) = (begun, self.shared.deadline(begun));
        let mut has_left = false;
        loop {
            tokio::select! {
                () = response.abandoned(), if !has_left => {
                    has_left = true;
                    if self.can_cancel(response) {
                        return;
                    }
                    if deadline.is_none() {
                        since = Instant::now();
                        deadline = self.shared.deadline(since);
                    }
                }
                () = until(deadline), if deadline.is_some() => {
                    deadline = None;
                    if response.is_awaited() || has_left {
                        self.timed_out(response, since);
                        if self.can_cancel(response) {
                            return;
                        }
                    }
                }
                else => std::future::pending().await,
            }
        }
    }

    fn timed_out(&self, response: &Response<'_>, since: Instant) {
        let (slot, pid) = (self.unit.slot(), self.unit.pid());
        // A process that answers other requests does not hang as a whole.
        let is_served = self.shared.concurrency > 1 && self.shared.activity.has_answered(slot, pid, since);
        if !is_served || matches!(self.outgoing.message, Message::Fastcgi(_)) {
            let connection = self.connection_of_child();
            self.shared.report_hang((slot, pid), connection, &self.outgoing.what, !response.is_awaited());
        }
        response.fail(Failure::TimedOut);
    }

    /// Stores the connection on which the request is sent.
    pub(super) fn uses(&self, connection: &AppStream) {
        self.connection.replace(Some(connection.clone()));
    }

    /// Returns the inode of the app process's end of the connection, if the request may be served by a child of the
    /// process; otherwise 0.
    fn connection_of_child(&self) -> u32 {
        let connection = self.connection.borrow();
        let is_fastcgi = matches!(self.outgoing.message, Message::Fastcgi(_));
        let has_children = self.shared.concurrency > 1 && is_fastcgi;
        let Some(connection) = connection.as_ref().filter(|_| has_children) else { return 0 };
        UnixDiagnosis::new().and_then(|diagnosis| diagnosis.peer(connection.as_fd())).unwrap_or(0)
    }

    /// Whether the app process cancels a request whose connection is closed, or does not end it otherwise.
    fn can_cancel(&self, response: &Response<'_>) -> bool {
        let is_http = matches!(self.outgoing.message, Message::Http(_));
        is_http && (self.shared.concurrency > 1 || response.is_stream.get())
    }

    /// Records that the app process has sent a part of its response.
    pub(super) fn answered(&self) {
        self.shared.activity.answered(self.unit.slot(), self.unit.pid());
    }

    /// Determines why the connection ended before the end of the response.
    pub(super) async fn why_ended(&self, response: &Response<'_>) -> Failure {
        if self.has_died().await {
            return Failure::Died;
        }
        // A child of the process may have died. Nothing else distinguishes this from a program that closes a connection.
        if self.shared.concurrency > 1 && matches!(self.outgoing.message, Message::Fastcgi(_)) {
            return Failure::ChildDied;
        }
        Failure::Broken(match response.is_awaited() {
            false => "the app process closed the connection in the middle of its response".to_owned(),
            true => "the app process closed the connection without a response".to_owned(),
        })
    }

    /// Returns when the process has died and its output has been read, if this is not known from the connection.
    async fn died(&self, begun: Instant) {
        sleep_until(begun + WATCH_AFTER).await;
        if let Ok(descriptor) = sys::process_descriptor(Pid::from_raw(self.unit.pid()))
            && let Ok(descriptor) = sys::register(descriptor, Interest::READABLE)
        {
            let _ = descriptor.readable().await;
        }
        // Usually, the exchange ends first. If the process has not accepted the connection, the master turns it away.
        sleep(2 * DEATH_TIMEOUT).await;
        let limit = Instant::now() + TURN_AWAY_TIMEOUT;
        while self.is_not_accepted() && Instant::now() < limit {
            sleep(DEATH_TIMEOUT).await;
        }
        if !self.has_died().await {
            std::future::pending::<()>().await; // the process cannot be watched
        }
    }

    /// Whether no process has accepted the connection on which the request was sent. The connection has then no other end.
    fn is_not_accepted(&self) -> bool {
        let connection = self.connection.borrow();
        let Some(connection) = connection.as_ref().filter(|connection| connection.is_local()) else { return false };
        UnixDiagnosis::new().and_then(|diagnosis| diagnosis.peer(connection.as_fd())).is_ok_and(|peer| peer == 0)
    }

    /// Whether the process has died, or dies within [`DEATH_TIMEOUT`].
    pub(super) async fn has_died(&self) -> bool {
        let descriptor = match sys::process_descriptor(Pid::from_raw(self.unit.pid())) {
            Ok(descriptor) => descriptor,
            Err(error) => return code_of(&error) == Errno::ESRCH as i32,
        };
        let Ok(descriptor) = sys::register(descriptor, Interest::READABLE) else { return false };
        timeout(DEATH_TIMEOUT, descriptor.readable()).await.is_ok()
    }

    /// Whether the process has begun to exit. A process that exits does so before its connections are closed.
    pub(super) fn is_exiting(&self) -> bool {
        let stat = fs::read(format!("/proc/{}/stat", self.unit.pid())).unwrap_or_default();
        is_exiting(&stat)
    }
}

/// Whether the contents of `/proc/PID/stat` show a process that exits, or that does not exist.
fn is_exiting(stat: &[u8]) -> bool {
    // The name in parentheses may contain any character.
    let Some(end) = stat.iter().rposition(|&byte| byte == b')') else { return true };
    let fields = String::from_utf8_lossy(stat.get(end + 1..).unwrap_or_default());
    let mut fields = fields.split_ascii_whitespace();
    let is_dead = fields.next().is_none_or(|state| ["Z", "X", "x"].contains(&state));
    let flags = fields.nth(5).and_then(|flags| flags.parse::<u64>().ok());
    is_dead || flags.is_none_or(|flags| flags & EXITING != 0)
}

fn code_of(error: &io::Error) -> i32 {
    error.raw_os_error().unwrap_or(0)
}

pub(super) async fn until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

/// A response while it arrives.
#[derive(Debug)]
pub(super) struct Response<'a> {
    shared: &'a Shared,
    /// The slot and the pid of the app process, for the log.
    process: (u32, i32),
    what: &'a str,
    state: RefCell<State>,
    /// Whether the body must reach the client while it is being produced.
    is_stream: Cell<bool>,
}

#[derive(Debug)]
enum State {
    /// The head has not been passed on.
    Awaited(oneshot::Sender<Result<Answer, Failure>>),
    Spooled(SpoolWriter),
    /// Whole, broken off, or turned into a tunnel. Further input is discarded.
    Ended,
}

impl<'a> Response<'a> {
    fn new(
        reply: oneshot::Sender<Result<Answer, Failure>>,
        shared: &'a Shared,
        process: (u32, i32),
        what: &'a str,
    ) -> Self {
        Self { shared, process, what, state: RefCell::new(State::Awaited(reply)), is_stream: Cell::new(false) }
    }

    /// Whether the head has not been passed on, and the attempt has not failed.
    pub(super) fn is_awaited(&self) -> bool {
        matches!(*self.state.borrow(), State::Awaited(_))
    }

    pub(super) fn max_headers_to_set(&self) -> Option<usize> {
        self.shared.max_headers_to_set
    }

    pub(super) fn max_head(&self) -> usize {
        self.shared.max_head
    }

    pub(super) fn what(&self) -> &str {
        self.what
    }

    /// Returns the slot and the pid of the app process.
    pub(super) fn process(&self) -> (u32, i32) {
        self.process
    }

    /// Becomes ready when the client has left.
    async fn abandoned(&self) {
        poll_fn(|context| match &mut *self.state.borrow_mut() {
            State::Awaited(reply) => reply.poll_closed(context),
            State::Spooled(writer) => writer.poll_abandoned(context),
            State::Ended => Poll::Pending,
        })
        .await;
    }

    /// Passes the head on, with the part of the body that has arrived. A body that has arrived completely needs no spool.
    pub(super) fn begin(&self, head: ResponseHead, arrived: Bytes, is_complete: bool) {
        let State::Awaited(reply) = self.state.replace(State::Ended) else { return };
        self.is_stream.set(is_streamed(&head.headers));
        let body = if is_complete {
            GatewayBody::Whole(arrived)
        } else {
            let limits = &self.shared.response_limits;
            let limits = if self.is_stream.get() { limits.streaming() } else { limits.clone() };
            let (writer, reader) = spool(&limits, &self.shared.budget);
            self.state.replace(State::Spooled(writer));
            self.push(arrived);
            GatewayBody::Spooled(reader)
        };
        let _ = reply.send(Ok(Answer { head, body })); // fails if the client has left
    }

    /// Passes on a head that turns the connection into a tunnel.
    pub(super) fn begin_tunnel(&self, head: ResponseHead) {
        let State::Awaited(reply) = self.state.replace(State::Ended) else { return };
        let _ = reply.send(Ok(Answer { head, body: GatewayBody::Whole(Bytes::new()) })); // fails if the client has left
    }

    /// Passes on a part of the body. The spool must have room: see [`Response::wait_for_room`].
    pub(super) fn push(&self, bytes: Bytes) {
        if let State::Spooled(writer) = &mut *self.state.borrow_mut()
            && let Err(error) = writer.push(bytes)
        {
            let (slot, pid) = self.process;
            log::error!(slot, pid, request = self.what; "a response was broken off: {error}");
        }
    }

    /// Waits until the spool can take more, if it is full.
    pub(super) async fn wait_for_room(&self) {
        let room = |context: &mut Context<'_>| match &mut *self.state.borrow_mut() {
            State::Spooled(writer) => writer.poll_ready(context),
            State::Awaited(_) | State::Ended => Poll::Ready(()),
        };
        poll_fn(room).await;
    }

    /// Marks the body as complete. The trailers follow, if there are any.
    pub(super) fn finish(&self, trailers: Option<HeaderMap>) {
        if let State::Spooled(writer) = self.state.replace(State::Ended) {
            writer.finish(trailers);
        }
    }

    /// Ends the response with an error.
    fn fail(&self, failure: Failure) {
        match self.state.replace(State::Ended) {
            State::Awaited(reply) => _ = reply.send(Err(failure)), // fails if the client has left
            State::Spooled(writer) => {
                if !writer.is_abandoned() {
                    let (slot, pid) = self.process;
                    log::error!(slot, pid, request = self.what; "a response was broken off: {}", reason(&failure));
                }
                writer.abort(SpoolError::BrokenOff);
            }
            State::Ended => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_exits_is_recognized_whatever_its_name() {
        let stat =
            |state: &str, flags: u64| is_exiting(format!("1 (a) S (b) {state} 1 1 1 0 -1 {flags} 0 0").as_bytes());
        assert!(!stat("S", 4_194_304) && !stat("R", 4_194_560));
        assert!(stat("R", 4_194_304 | EXITING) && stat("Z", 4_194_304));
        assert!(is_exiting(b"") && is_exiting(b"1 (x)"), "there is no such process");
        assert!(!is_exiting(&fs::read("/proc/self/stat").unwrap()));
    }
}
