//! Opens the subscribers' connections, and reads them when data arrives (level-triggered).
//!
//! Connecting and sending the requests block. From then on, only `epoll_wait` blocks.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use super::stream::{Came, Stream};
use super::{EventsOptions, Signals};
use crate::cpu;
use crate::error::Error;
use crate::probe::{connect, exchange, send_all};
use crate::response::Response;
use crate::socket::Socket;
use crate::tally::{Fault, Kind, Tally};
use crate::target::{Peer, Protocol};

/// Maximum number of subscribers that wait for a response while others connect.
const UNANSWERED: u32 = 128;
/// Interval between two checks whether the run is over.
const LOOK: Duration = Duration::from_millis(20);

const EVENTS_AT_ONCE: usize = 256;
const BUFFER_LEN: usize = 256 * 1024;

pub(super) struct Subscribers<'a> {
    peer: &'a Peer,
    options: &'a EventsOptions,
    clock: Instant,
    epoll: Epoll,
    each: Vec<Subscriber>,
    /// Number of subscribers whose response has begun.
    answered: u32,
    /// Number of subscribers that have received an event.
    subscribed: u32,
    /// Number of subscribers that have received the last event, or whose connection is closed.
    done: u32,
    /// Time at which data last arrived.
    progress: Instant,
    seen: Seen,
    buffer: Vec<u8>,
}

/// The totals over all subscribers.
#[derive(Debug)]
pub(super) struct Seen {
    /// Deliveries by latency, and failures of connections.
    pub(super) tally: Tally,
    pub(super) missing: u64,
    pub(super) doubled: u64,
    /// Time from the first delivery to the last.
    pub(super) elapsed: Duration,
    first: Option<Instant>,
}

struct Subscriber {
    socket: Option<Socket>,
    is_answered: bool,
    response: Response,
    stream: Stream,
}

impl<'a> Subscribers<'a> {
    pub(super) fn new(peer: &'a Peer, options: &'a EventsOptions, clock: Instant) -> Result<Self, Error> {
        let tally = Tally::new();
        Ok(Self {
            peer,
            options,
            clock,
            epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(Error::system("epoll_create"))?,
            each: Vec::new(),
            answered: 0,
            subscribed: 0,
            done: 0,
            progress: Instant::now(),
            seen: Seen { tally, missing: 0, doubled: 0, elapsed: Duration::ZERO, first: None },
            buffer: vec![0; BUFFER_LEN],
        })
    }

    /// Connects and sends the requests, until each subscriber has received the beginning of its response.
    pub(super) fn open(&mut self) -> Result<(), Error> {
        let host = self.options.connect.host();
        let get = |uri: &str, accept: &str| format!("GET {uri} HTTP/1.1\r\nHost: {host}\r\nAccept: {accept}\r\n\r\n");
        let first = self.options.first.as_deref().map(|uri| get(uri, "*/*"));
        let request = get(&self.options.subscribe, "text/event-stream");
        self.progress = Instant::now();
        for opened in 1..=self.options.subscribers {
            self.open_one(first.as_deref(), &request).map_err(|fault| self.unsubscribed(fault))?;
            while opened - self.answered > UNANSWERED {
                self.turn_before_all()?;
            }
        }
        while self.answered < self.options.subscribers {
            self.turn_before_all()?;
        }
        Ok(())
    }

    fn open_one(&mut self, first: Option<&str>, request: &str) -> Result<(), Fault> {
        let socket = connect(self.peer, self.options.timeout)?;
        if let Some(first) = first {
            let end = exchange(&socket, Protocol::Http, first.as_bytes(), |_| ())?;
            if end.status != 200 || !end.keep {
                return Err(Fault::new(Kind::Status, format!("{} to the first request, or not kept", end.status)));
            }
        }
        send_all(&socket, request.as_bytes())?;
        let interest = EpollEvent::new(EpollFlags::EPOLLIN, self.each.len() as u64);
        self.epoll.add(&socket, interest).map_err(|error| Fault::new(Kind::Connect, error.desc()))?;
        let response = Response::new(Protocol::Http);
        self.each.push(Subscriber { socket: Some(socket), is_answered: false, response, stream: Stream::default() });
        Ok(())
    }

    /// Reads until all subscribers have received all events, or no more data arrives. Returns the CPU time that this process
    /// had used when all subscribers had subscribed.
    pub(super) fn read(&mut self, signals: &Signals) -> Result<Duration, Error> {
        self.progress = Instant::now();
        while self.subscribed < self.options.subscribers && !signals.is_published.load(Ordering::Acquire) {
            self.turn_before_all()?;
        }
        let own_cpu = cpu::own()?;
        signals.all_subscribed.store(true, Ordering::Release);
        while self.done < self.options.subscribers {
            self.turn()?;
            let is_published = signals.is_published.load(Ordering::Acquire);
            if signals.has_failed.load(Ordering::Acquire) || (is_published && self.is_stuck()) {
                break;
            }
        }
        Ok(own_cpu)
    }

    /// Returns the totals. Events that have not arrived count as missing.
    pub(super) fn finish(mut self) -> Seen {
        let last = self.options.events();
        self.seen.missing +=
            self.each.iter().map(|subscriber| last.saturating_sub(subscriber.stream.last)).sum::<u64>();
        self.seen
    }

    fn is_stuck(&self) -> bool {
        self.progress.elapsed() > self.options.timeout
    }

    fn unsubscribed(&self, fault: Fault) -> Error {
        Error::Subscribe { ready: self.subscribed, of: self.options.subscribers, fault }
    }

    /// Runs one iteration of the loop. Any failure is an error, because fewer subscribers than requested would remain.
    fn turn_before_all(&mut self) -> Result<(), Error> {
        self.turn()?;
        if let Some(fault) = self.seen.tally.first_fault() {
            return Err(self.unsubscribed(fault));
        }
        if self.is_stuck() {
            return Err(self.unsubscribed(Fault::new(Kind::Timeout, "no data arrived")));
        }
        Ok(())
    }

    /// Reads the available data.
    fn turn(&mut self) -> Result<(), Error> {
        let mut events = [EpollEvent::empty(); EVENTS_AT_ONCE];
        let pause = EpollTimeout::try_from(LOOK).unwrap_or(EpollTimeout::ZERO);
        let count = match self.epoll.wait(&mut events, pause) {
            Ok(count) => count,
            Err(Errno::EINTR) => 0,
            Err(error) => return Err(Error::system("epoll_wait")(error)),
        };
        for event in &events[..count] {
            let index = usize::try_from(event.data()).expect("the data of an event is an index");
            if let Err(fault) = self.receive(index) {
                self.seen.tally.wrong(fault);
                self.each[index].socket = None;
                self.done += u32::from(self.each[index].stream.last < self.options.events());
            }
        }
        Ok(())
    }

    fn receive(&mut self, index: usize) -> Result<(), Fault> {
        let Self { seen, .. } = self;
        let subscriber = &mut self.each[index];
        let Some(socket) = &subscriber.socket else {
            return Ok(());
        };
        let if_closed = if subscriber.is_answered { Kind::Cut } else { Kind::Dropped };
        let count = socket.receive(&mut self.buffer).map_err(|error| Fault::new(if_closed, error.desc()))?;
        if count == 0 {
            return Err(Fault::new(if_closed, "the server closed the connection"));
        }
        let now = Instant::now();
        self.progress = now;
        self.answered += u32::from(!subscriber.is_answered);
        subscriber.is_answered = true;
        let now_ns = u64::try_from((now - self.clock).as_nanos()).unwrap_or(u64::MAX);
        let (was_subscribed, last) = (subscriber.stream.is_subscribed, subscriber.stream.last);
        let (stream, mut read) = (&mut subscriber.stream, Ok(()));
        let end = subscriber.response.feed(&self.buffer[..count], &mut |part| {
            if read.is_ok() {
                read = stream.feed(part, &mut |came| seen.count(came, now, now_ns));
            }
        });
        self.subscribed += u32::from(stream.is_subscribed && !was_subscribed);
        self.done += u32::from(last < self.options.events() && stream.last >= self.options.events());
        match read.and(end) {
            Ok(None) => Ok(()),
            Ok(Some(end)) => Err(Fault::new(Kind::Status, format!("a stream that ends, with status {}", end.status))),
            Err(malformed) => Err(Fault::new(Kind::Malformed, malformed.0)),
        }
    }
}

impl Seen {
    fn count(&mut self, came: Came, now: Instant, now_ns: u64) {
        match came {
            Came::Early => {}
            Came::Again => self.doubled += 1,
            Came::Next { missing, published_ns } => {
                self.missing += missing;
                self.tally.right(Duration::from_nanos(now_ns.saturating_sub(published_ns)));
                self.elapsed = now - *self.first.get_or_insert(now);
            }
        }
    }
}
