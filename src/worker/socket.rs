//! An accepted connection's socket, and how long it may keep somebody waiting.
//!
//! It is registered with the event loop only when it has to wait. A short request on a fresh connection has most
//! often come before the connection is accepted, and its response fits the socket's buffer: then it costs accept, read,
//! write and close, and no more.
//!
//! The [`Watchdog`] looks once a second at every connection that had to wait, at its [`Stage`], and at what has moved since;
//! whoever takes too long is cut off. That costs a request a few stores, and no timer of its own.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd, RawFd};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::BytesMut;
use nix::sys::socket::Shutdown;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::sync::Notify;
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::io::poll_read_buf;

use super::later;
use crate::config::Timeouts;
use crate::heir::ledger::{Account, LANDING};
use crate::pulse::{Pulse, Stage};
use crate::sys;

/// How often the watchdog looks.
const TICK: Duration = Duration::from_secs(1);
/// How long the end of an event stream may take to leave, after the worker was told to.
const LAST_EVENTS: Duration = Duration::from_secs(2);
/// So many bytes have to move, of a body within its timeout and of a response within its own, or all that is left.
const PROGRESS: u32 = 4 << 10;

/// A connection's socket.
#[derive(Debug)]
pub(crate) struct Socket {
    /// What was read too early, and will be read again.
    early: BytesMut,
    link: Link,
    account: Account,
    pulse: Arc<Pulse>,
    watchdog: Rc<Watchdog>,
    /// How long the first bytes waited is to be found out.
    asks_wait: Cell<bool>,
}

#[derive(Debug)]
enum Link {
    /// Never had to wait.
    Fresh(OwnedFd, Look),
    Registered(AsyncFd<OwnedFd>),
    /// It could not be registered, or is closed.
    Broken,
}

/// Bytes of the first reads of a connection, before it had to wait.
const FIRST: usize = 4 << 10;
/// Bytes of memory that are read into, and what must be left of it at least.
const BLOCK: usize = 64 << 10;
const ROOM: usize = 16 << 10;

thread_local! {
    static BLOCK_OF_THREAD: RefCell<BytesMut> = RefCell::default();
}

/// Whether there may be something to read on a socket that the event loop does not know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Look {
    /// Perhaps.
    Now,
    /// All was read that had come.
    Later,
    /// As above, and everything that can go on without has done so.
    Last,
}

impl Socket {
    /// `accepted` is a connection, does not block, and has been entered in the ledger. `early` was read of it before.
    pub(crate) fn new(accepted: OwnedFd, account: Account, early: &[u8], watchdog: &Rc<Watchdog>) -> Self {
        let (link, early) = (Link::Fresh(accepted, Look::Now), BytesMut::from(early));
        let asks_wait = Cell::new(false);
        Self { early, link, account, pulse: Arc::default(), watchdog: Rc::clone(watchdog), asks_wait }
    }

    /// Has the first request know how long it has waited in the kernel, if this is TCP. Nothing was read yet.
    pub(crate) fn ask_wait(&self) {
        self.asks_wait.set(true);
    }

    /// Its page in the ledger.
    pub(crate) fn account(&self) -> &Account {
        &self.account
    }

    pub(crate) fn pulse(&self) -> &Arc<Pulse> {
        &self.pulse
    }

    /// What was read and will be read again.
    pub(crate) fn early(&self) -> &[u8] {
        &self.early
    }

    /// Reads what comes next, and keeps it to be read again. Returns how much that was.
    ///
    /// # Errors
    /// What the socket says.
    pub(crate) async fn look_ahead(&mut self) -> io::Result<usize> {
        poll_fn(|context| {
            let mut early = std::mem::take(&mut self.early); // or it would be read once more
            early.reserve(FIRST);
            let read = poll_read_buf(Pin::new(&mut *self), context, &mut early);
            self.early = early;
            read
        })
        .await
    }

    /// Reads what has come, at most [`BLOCK`] bytes; none at the end of the stream.
    ///
    /// They lie in a block of memory that all connections of this thread read into, one after the other: a connection
    /// that waits has no buffer, and a request costs no allocation. Whoever keeps them for long should copy them, or
    /// they keep the whole block.
    ///
    /// # Errors
    /// What the socket says, or `TimedOut`.
    pub(crate) fn poll_bytes(&mut self, context: &mut Context<'_>) -> Poll<io::Result<BytesMut>> {
        BLOCK_OF_THREAD.with_borrow_mut(|block| {
            if block.capacity() < ROOM {
                block.reserve(BLOCK);
            }
            ready!(poll_read_buf(Pin::new(self), context, block))?;
            Poll::Ready(Ok(block.split()))
        })
    }

    pub(crate) fn fd(&self) -> Option<BorrowedFd<'_>> {
        match &self.link {
            Link::Fresh(socket, _) => Some(socket.as_fd()),
            Link::Registered(socket) => Some(socket.get_ref().as_fd()),
            Link::Broken => None,
        }
    }

    /// It has to wait: from now on the event loop knows it.
    fn register(&mut self) -> io::Result<()> {
        if !matches!(self.link, Link::Fresh(..)) {
            return Ok(());
        }
        self.link = match std::mem::replace(&mut self.link, Link::Broken) {
            Link::Fresh(socket, _) => Link::Registered(sys::register(socket, Interest::READABLE | Interest::WRITABLE)?),
            registered => registered,
        };
        if let Some(fd) = self.fd() {
            self.watchdog.watch(fd, &self.pulse);
        }
        Ok(())
    }

    /// Before a wait: the response may be on its way, and the connection then at its end. So everything else that can be
    /// done comes first, and registering the socket last. Ready when it is registered.
    fn poll_register(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        if let Link::Fresh(_, look) = &mut self.link
            && *look != Look::Last
        {
            *look = Look::Last;
            later::wake_later(context.waker().clone());
            return Poll::Pending;
        }
        Poll::Ready(self.register())
    }

    /// Tries a system call, again whenever there is something to read, until it does not say `WouldBlock`.
    pub(crate) fn poll_try<T>(
        &mut self,
        context: &mut Context<'_>,
        mut call: impl FnMut(BorrowedFd<'_>) -> io::Result<T>,
    ) -> Poll<io::Result<T>> {
        if let (Link::Fresh(_, Look::Now), Some(fd)) = (&self.link, self.fd())
            && let Some(outcome) = at_once(|| call(fd))
        {
            return Poll::Ready(outcome);
        }
        ready!(self.poll_register(context))?;
        let Link::Registered(socket) = &self.link else { return Poll::Ready(Err(io::ErrorKind::NotConnected.into())) };
        loop {
            let mut readable = ready!(socket.poll_read_ready(context))?;
            match call(socket.get_ref().as_fd()) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => readable.clear_ready(),
                // `poll(2)` says so if a signal is there, even if it was not to wait.
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                outcome => return Poll::Ready(outcome),
            }
        }
    }

    /// `count` bytes came, or none at the end.
    fn came(&self, count: usize) -> io::Result<()> {
        if count == 0 && self.pulse.has_expired() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        self.pulse.add_read(count);
        if self.asks_wait.take()
            && let Some(Ok(waited)) = self.fd().map(sys::since_last_received)
        {
            self.pulse.set_waited(waited);
        }
        Ok(())
    }

    fn poll_write_registered(&self, context: &mut Context<'_>, slices: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        let Link::Registered(fd) = &self.link else { return Poll::Ready(Err(io::ErrorKind::NotConnected.into())) };
        loop {
            let mut writable = ready!(fd.poll_write_ready(context))?;
            match self.account.write(fd.get_ref().as_fd(), slices) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => writable.clear_ready(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                outcome => return Poll::Ready(outcome),
            }
        }
    }

    fn went(&self, outcome: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if let Poll::Ready(Ok(count)) = &outcome {
            self.pulse.add_written(*count);
        }
        self.pulse.set_writing(outcome.is_pending());
        outcome
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        self.pulse.close();
        self.account.close(std::mem::replace(&mut self.link, Link::Broken));
    }
}

/// Makes one system call on a socket that is not registered; `None` if it would have to wait.
fn at_once<T>(mut call: impl FnMut() -> io::Result<T>) -> Option<io::Result<T>> {
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return None,
            outcome => return Some(outcome),
        }
    }
}

impl AsyncRead for Socket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if !self.early.is_empty() {
            let count = self.early.len().min(buffer.remaining());
            buffer.put_slice(&self.early.split_to(count));
            if self.early.is_empty() {
                self.early = BytesMut::new(); // its memory is not needed again
            }
            return Poll::Ready(Ok(()));
        }
        let socket = &mut *self;
        if let Link::Fresh(fd, look @ Look::Now) = &mut socket.link {
            let room = buffer.remaining().min(FIRST);
            if let Some(read) = at_once(|| socket.account.read(fd.as_fd(), buffer, room)) {
                let count = read?;
                if count < room {
                    *look = Look::Later;
                }
                return Poll::Ready(socket.came(count));
            }
        }
        ready!(socket.poll_register(context))?;
        let Link::Registered(fd) = &socket.link else { return Poll::Ready(Err(io::ErrorKind::NotConnected.into())) };
        let room = buffer.remaining().min(LANDING);
        loop {
            let mut readable = ready!(fd.poll_read_ready(context))?;
            match socket.account.read(fd.get_ref().as_fd(), buffer, room) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => readable.clear_ready(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Poll::Ready(Err(error)),
                Ok(count) => {
                    // That was all; what comes later is told by another event.
                    if count > 0 && count < room {
                        readable.clear_ready();
                    }
                    return Poll::Ready(socket.came(count));
                }
            }
        }
    }
}

impl AsyncWrite for Socket {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(context, &[IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let socket = &mut *self;
        if let Link::Fresh(fd, _) = &socket.link {
            match at_once(|| socket.account.write(fd.as_fd(), slices)) {
                Some(written) => return Poll::Ready(written),
                None => socket.register()?,
            }
        }
        let written = socket.poll_write_registered(context, slices);
        socket.went(written)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    /// Nothing is buffered here.
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.account.flushed();
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.fd() {
            Some(fd) => Poll::Ready(shut(fd.as_raw_fd(), Shutdown::Write)),
            None => Poll::Ready(Err(io::ErrorKind::NotConnected.into())),
        }
    }
}

fn shut(fd: RawFd, how: Shutdown) -> io::Result<()> {
    Ok(nix::sys::socket::shutdown(fd, how)?)
}

/// Cuts off connections that take too long.
#[derive(Debug)]
pub(crate) struct Watchdog {
    timeouts: Timeouts,
    /// The worker was told to leave.
    drains: Arc<AtomicBool>,
    watched: RefCell<Vec<Watched>>,
    some: Notify,
}

/// A connection as it was at the last tick.
#[derive(Debug)]
struct Watched {
    fd: RawFd,
    pulse: Arc<Pulse>,
    stage: Stage,
    requests: u32,
    /// Ticks in this stage, and what had come when they were counted from.
    waited: u32,
    read: u32,
    /// It is shut down for reading.
    is_deaf: bool,
    /// Ticks for which a write has waited.
    unread: u32,
    written: u32,
    /// Ticks of a drain in which there was nothing but the end of an event stream.
    leaving: u32,
}

impl Watchdog {
    pub(crate) fn new(timeouts: Timeouts, drains: Arc<AtomicBool>) -> Rc<Self> {
        Rc::new(Self { timeouts, drains, watched: RefCell::default(), some: Notify::new() })
    }

    fn watch(&self, fd: BorrowedFd<'_>, pulse: &Arc<Pulse>) {
        let mut watched = self.watched.borrow_mut();
        if watched.is_empty() {
            self.some.notify_one();
        }
        watched.push(Watched::new(fd.as_raw_fd(), Arc::clone(pulse)));
    }

    /// Looks after the connections for ever. While there are none, it sleeps.
    pub(crate) async fn run(&self) {
        loop {
            self.some.notified().await;
            let mut ticks = interval(TICK);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            ticks.tick().await; // the first is at once
            while !self.watched.borrow().is_empty() {
                ticks.tick().await;
                let drains = self.drains.load(Relaxed);
                self.watched.borrow_mut().retain_mut(|watched| watched.tick(&self.timeouts, drains));
            }
        }
    }
}

impl Watched {
    fn new(fd: RawFd, pulse: Arc<Pulse>) -> Self {
        let (stage, is_deaf) = (Stage::Idle, false);
        Self { fd, pulse, stage, requests: 0, waited: 0, read: 0, is_deaf, unread: 0, written: 0, leaving: 0 }
    }

    /// Another second has passed. False if the connection needs no more looking after.
    fn tick(&mut self, timeouts: &Timeouts, drains: bool) -> bool {
        if self.pulse.is_closed() {
            return false;
        }
        let stage = self.count();
        let (doing, limit) = match stage {
            Stage::Idle => ("idle", timeouts.idle),
            Stage::Head => ("sending the head of a request", timeouts.header),
            Stage::Body => ("sending the body of a request", timeouts.body),
            Stage::Answering => ("", Duration::ZERO),
        };
        if is_over(self.unread, timeouts.write) {
            self.cut_off("reading a response", Shutdown::Both);
            return false;
        }
        if drains && self.outstays() {
            self.cut_off("reading the end of an event stream", Shutdown::Both);
            return false;
        }
        if !self.is_deaf && is_over(self.waited, limit) {
            // A response may still be on its way.
            self.cut_off(doing, Shutdown::Read);
        }
        true
    }

    fn count(&mut self) -> Stage {
        let pulse = &self.pulse;
        let (stage, requests) = (pulse.stage(), pulse.requests());
        let (read, written) = (pulse.read(), pulse.written());
        // While the application reads a body it waits now and then: that adds up until enough has come.
        let goes_on = stage == self.stage || matches!(stage, Stage::Body | Stage::Answering);
        let moves = stage == Stage::Body && read.wrapping_sub(self.read) >= PROGRESS;
        // Beside a body that is waited for, further requests change nothing.
        let begins = requests != self.requests && !(stage == Stage::Body && pulse.under_way() > 1);
        if begins || !goes_on || moves {
            (self.waited, self.read) = (0, read);
        }
        (self.stage, self.requests) = (stage, requests);
        self.waited += u32::from(stage != Stage::Answering);

        let writing = pulse.is_writing();
        if !writing || written.wrapping_sub(self.written) >= PROGRESS {
            (self.unread, self.written) = (0, written);
        }
        self.unread += u32::from(writing);
        stage
    }

    /// In a drain: whether it is there for event streams alone, whose clients have been told to come back, and may be elsewhere.
    /// They lose nothing by it: each knows how far it is.
    fn outstays(&mut self) -> bool {
        self.leaving = if self.pulse.ends_in_stream() { self.leaving + 1 } else { 0 };
        is_over(self.leaving, LAST_EVENTS) || self.pulse.is_streaming() && is_over(self.unread, LAST_EVENTS)
    }

    fn cut_off(&mut self, doing: &str, how: Shutdown) {
        log::debug!("a connection is cut off, it took too long: {doing}");
        self.pulse.expire();
        self.is_deaf = true;
        let _ = shut(self.fd, how); // it may have been closed by its peer
    }
}

/// Whether so many ticks are certainly longer than `limit`; none is longer than a limit of zero.
fn is_over(ticks: u32, limit: Duration) -> bool {
    !limit.is_zero() && TICK * ticks.saturating_sub(1) >= limit
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::pulse::Wait;

    const TIMEOUTS: Timeouts = Timeouts {
        idle: Duration::from_secs(9),
        header: Duration::from_secs(3),
        body: Duration::from_secs(4),
        write: Duration::from_secs(5),
    };

    /// How many ticks a connection lives to which `each` happens before every one; 100 if that many.
    fn ticks(mut each: impl FnMut(&Pulse)) -> u32 {
        ticks_of(move |pulse| each(pulse))
    }

    fn ticks_of(each: impl FnMut(&Arc<Pulse>)) -> u32 {
        ticks_with(false, each)
    }

    fn ticks_with(drains: bool, mut each: impl FnMut(&Arc<Pulse>)) -> u32 {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let mut watched = Watched::new(ours.as_raw_fd(), Arc::default());
        let mut lives = || {
            each(&watched.pulse);
            watched.tick(&TIMEOUTS, drains) && !watched.is_deaf
        };
        (0..100).take_while(|_| lives()).map(|_| 1).sum()
    }

    #[test]
    fn whoever_takes_too_long_is_cut_off() {
        assert_eq!(ticks(|_| ()), 9, "idle");
        let answering = |pulse: &Pulse| {
            if pulse.requests() == 0 {
                pulse.request_came();
            }
        };
        assert_eq!(ticks(answering), 100, "the application may take its time");
        assert_eq!(ticks(|pulse| pulse.add_read(2000)), 3, "a head is not allowed to trickle");
        let write = |bytes| {
            move |pulse: &Pulse| {
                pulse.set_writing(true);
                pulse.add_written(bytes);
            }
        };
        assert_eq!(ticks(write(1)), 5);
        assert_eq!(ticks(write(1024)), 100, "it is slow, but it gets on: that is not idle");
    }

    #[test]
    fn a_body_may_be_slow_but_has_to_get_on_whatever_else_is_under_way() {
        let trickle = |bytes, others| {
            let mut body = None;
            ticks_of(move |pulse| {
                let wait = body.get_or_insert_with(|| {
                    pulse.request_came();
                    Wait::for_body(pulse)
                });
                wait.set(true);
                pulse.add_read(bytes);
                for _ in 0..others {
                    pulse.request_came();
                }
            })
        };
        assert_eq!(trickle(1, 0), 4);
        assert_eq!(trickle(1, 1), 4);
        assert_eq!(trickle(1024, 0), 100);
        let mut body = None;
        let mut turn = 0;
        let waits_now_and_then = ticks_of(move |pulse| {
            turn += 1;
            let wait = body.get_or_insert_with(|| {
                pulse.request_came();
                Wait::for_body(pulse)
            });
            wait.set(turn % 2 == 0);
        });
        assert_eq!(waits_now_and_then, 9, "every second tick finds somebody waiting");
        let dropped = ticks_of(|pulse| {
            if pulse.requests() == 0 {
                pulse.request_came();
                Wait::for_body(pulse).set(true);
            }
        });
        assert_eq!(dropped, 100, "nobody waits for a body that was given up");
    }

    #[test]
    fn each_request_has_its_own_time() {
        let requests = ticks(|pulse| {
            pulse.add_read(100);
            pulse.request_came();
            pulse.request_over();
        });
        assert_eq!(requests, 100);
    }

    #[test]
    fn a_response_that_gets_no_room_in_its_stream_is_not_read() {
        let mut reply = None;
        let held_back = ticks_of(move |pulse| {
            reply
                .get_or_insert_with(|| {
                    pulse.request_came();
                    Wait::for_room(pulse)
                })
                .set(true);
        });
        assert_eq!(held_back, 5);
    }

    #[test]
    fn a_drain_waits_for_answers_and_not_for_event_streams() {
        let ticks = |requests: u32, streams: u32, writing: Option<usize>| {
            let mut waits = Vec::new();
            ticks_with(true, move |pulse| {
                if pulse.requests() == 0 {
                    (0..requests).for_each(|_| pulse.request_came());
                    waits.extend((0..streams).map(|_| Wait::for_events(pulse)));
                }
                pulse.set_writing(writing.is_some());
                pulse.add_written(writing.unwrap_or_default());
            })
        };
        assert_eq!(ticks(1, 0, None), 100, "an answer");
        assert_eq!(ticks(2, 1, None), 100, "an answer and a stream");
        assert_eq!(ticks(2, 1, Some(0)), 5, "likewise, to who does not read");
        for writing in [None, Some(0), Some(5000)] {
            assert_eq!(ticks(2, 2, writing), 2, "{writing:?}");
        }
        let mut ended = false;
        let after_its_end = ticks_with(true, |pulse| {
            if !std::mem::replace(&mut ended, true) {
                pulse.request_came();
                drop(Wait::for_events(pulse));
                pulse.request_over();
            }
        });
        assert_eq!(after_its_end, 2);
        let mut stream = None;
        let beside_an_answer_on_its_way = ticks_with(true, |pulse| {
            if pulse.requests() == 0 {
                pulse.set_writing(true);
                pulse.request_came();
                stream = Some(Wait::for_events(pulse));
            }
            pulse.add_written(5000);
        });
        assert_eq!(beside_an_answer_on_its_way, 100);
    }

    #[test]
    fn a_closed_connection_is_forgotten() {
        assert_eq!(ticks(|pulse| pulse.close()), 0);
    }
}
