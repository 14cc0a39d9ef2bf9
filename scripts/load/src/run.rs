//! Runs the closed loop. Each client sends a request, waits for the response, and sends the next request, until the time has
//! passed or all requests have been sent.
//!
//! All connections are registered with one level-triggered epoll instance. The events of a connection contain the client's
//! index. A stale event from a connection that has been closed is harmless, because reading from the new connection returns
//! `EAGAIN`.

use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use crate::check::{Expectation, Seen};
use crate::cpu;
use crate::error::Error;
use crate::options::Options;
use crate::request::request;
use crate::response::{End, Response};
use crate::socket::Socket;
use crate::tally::{Fault, Kind, Tally};
use crate::target::Peer;

/// Delay after which a client that could not connect retries.
const BACK_OFF: Duration = Duration::from_millis(2);

/// Interval between two checks for requests that have timed out.
const SCAN: Duration = Duration::from_millis(20);

/// Time after which a request that is incomplete at the end of the run counts as starved.
const STARVED: Duration = Duration::from_secs(1);

const EVENTS_AT_ONCE: usize = 256;
const BUFFER_LEN: usize = 256 * 1024;

/// The result of a run.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) tally: Tally,
    pub(crate) elapsed: Duration,
    /// Number of requests that were incomplete at the end of the run.
    pub(crate) in_flight: u64,
    /// Number of those requests that had been in flight for over a second.
    pub(crate) starved: u64,
    /// Number of clients that were waiting at the end, and for which no request had completed in the measured time.
    pub(crate) unserved: u64,
    pub(crate) warmup_errors: u64,
    /// CPU time of the server. `None` if no processes were given, if one of these processes has exited, or if the time is too
    /// short to be significant.
    pub(crate) server_cpu: Option<Duration>,
    /// CPU time of the part of the server that was given, if any. `None` as above.
    pub(crate) part_cpu: Option<Duration>,
    pub(crate) own_cpu: Duration,
}

/// A client and its connection.
#[derive(Debug)]
struct Client {
    socket: Option<Socket>,
    /// Whether `socket` is known to be connected.
    connected: bool,
    /// Whether `socket` is registered for writability.
    blocked: bool,
    /// Time at which the request in flight began.
    began: Option<Instant>,
    sent: usize,
    answered: bool,
    /// Whether a request has completed since the measurement began.
    served: bool,
    response: Response,
    seen: Seen,
    retry_at: Option<Instant>,
}

struct Run<'a> {
    peer: &'a Peer,
    expectation: Expectation<'a>,
    request: Vec<u8>,
    keep: bool,
    timeout: Duration,
    /// Number of requests that may still be started.
    budget: u64,
    epoll: Epoll,
    clients: Vec<Client>,
    /// Number of clients whose `retry_at` is set.
    backing_off: usize,
    tally: Tally,
    buffer: Vec<u8>,
}

/// The state at the start of the measurement.
struct Start {
    at: Instant,
    server_cpu: Option<Duration>,
    part_cpu: Option<Duration>,
    own_cpu: Duration,
}

/// Runs the load that `options` describe. Every body must be equal to `body`, unless `options` allow any body.
/// `sent` is the body of the requests.
pub(crate) fn run(peer: &Peer, options: &Options, sent: Option<&[u8]>, body: &[u8]) -> Result<Outcome, Error> {
    let request = request(options, sent, !options.fresh);
    let mut run = Run::new(peer, options, request, body)?;
    let mut start = Start::now(options)?;
    let mut warmup_errors = 0;
    for index in 0..run.clients.len() {
        run.begin(index, Instant::now())?;
    }
    if !options.warmup.is_zero() {
        run.until(Some(start.at + options.warmup), None)?;
        warmup_errors = run.tally.errors();
        run.tally = Tally::new();
        run.clients.iter_mut().for_each(|client| client.served = false);
        start = Start::now(options)?;
    }
    run.until(options.measured_time().map(|time| start.at + time), options.requests)?;

    let now = Instant::now();
    let waiting: Vec<Duration> =
        run.clients.iter().filter_map(|client| Some(now.saturating_duration_since(client.began?))).collect();
    Ok(Outcome {
        elapsed: now - start.at,
        in_flight: waiting.len() as u64,
        starved: waiting.iter().filter(|waited| **waited > STARVED).count() as u64,
        unserved: run.clients.iter().filter(|client| client.began.is_some() && !client.served).count() as u64,
        warmup_errors,
        server_cpu: spent(start.server_cpu, &options.pids),
        part_cpu: spent(start.part_cpu, &options.part_pids),
        own_cpu: cpu::own()?.saturating_sub(start.own_cpu),
        tally: run.tally,
    })
}

impl Start {
    fn now(options: &Options) -> Result<Self, Error> {
        let measured = |pids: &[i32]| if pids.is_empty() { Ok(None) } else { cpu::of_trees(pids).map(Some) };
        let (server_cpu, part_cpu) = (measured(&options.pids)?, measured(&options.part_pids)?);
        Ok(Self { at: Instant::now(), server_cpu, part_cpu, own_cpu: cpu::own()? })
    }
}

/// Returns the CPU time that these processes have used since the start, if it is significant.
fn spent(before: Option<Duration>, pids: &[i32]) -> Option<Duration> {
    let spent = cpu::of_trees(pids).ok()?.checked_sub(before?)?;
    (spent >= cpu::MEASURABLE).then_some(spent)
}

impl Client {
    fn new(response: Response) -> Self {
        Self {
            socket: None,
            connected: false,
            blocked: false,
            began: None,
            sent: 0,
            answered: false,
            served: false,
            response,
            seen: Seen::default(),
            retry_at: None,
        }
    }

    fn disconnect(&mut self) {
        self.socket = None; // closing the socket also removes it from epoll, because its descriptor has no duplicates
        self.connected = false;
        self.blocked = false;
    }
}

impl<'a> Run<'a> {
    fn new(peer: &'a Peer, options: &Options, request: Vec<u8>, body: &'a [u8]) -> Result<Self, Error> {
        let new_client = |_| Client::new(Response::new(options.connect.protocol));
        Ok(Self {
            peer,
            expectation: Expectation { body: (!options.any_body).then_some(body), length: options.expect_body_len },
            request,
            keep: !options.fresh,
            timeout: options.timeout,
            budget: options.requests.unwrap_or(u64::MAX),
            epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(Error::system("epoll_create"))?,
            clients: (0..options.clients).map(new_client).collect(),
            backing_off: 0,
            tally: Tally::new(),
            buffer: vec![0; BUFFER_LEN],
        })
    }

    /// Handles events until the deadline, or until this number of requests has completed.
    fn until(&mut self, deadline: Option<Instant>, requests: Option<u64>) -> Result<(), Error> {
        let mut events = [EpollEvent::empty(); EVENTS_AT_ONCE];
        let mut next_scan = Instant::now() + SCAN;
        loop {
            let now = Instant::now();
            if deadline.is_some_and(|deadline| now >= deadline)
                || requests.is_some_and(|most| self.tally.finished() >= most)
            {
                return Ok(());
            }
            if now >= next_scan || self.backing_off > 0 {
                self.scan(now)?;
                next_scan = now + SCAN;
            }
            let pause = if self.backing_off > 0 { BACK_OFF } else { SCAN };
            let pause = deadline.map_or(pause, |deadline| pause.min(deadline - now)).max(Duration::from_millis(1));
            let pause = EpollTimeout::try_from(pause).unwrap_or(EpollTimeout::ZERO);
            let count = match self.epoll.wait(&mut events, pause) {
                Ok(count) => count,
                Err(Errno::EINTR) => 0,
                Err(error) => return Err(Error::system("epoll_wait")(error)),
            };
            for event in &events[..count] {
                self.event(event)?;
            }
        }
    }

    fn event(&mut self, event: &EpollEvent) -> Result<(), Error> {
        let index = usize::try_from(event.data()).expect("the data of an event is an index");
        let closed = EpollFlags::EPOLLERR | EpollFlags::EPOLLHUP;
        if self.clients[index].blocked && event.events().intersects(EpollFlags::EPOLLOUT | closed) {
            self.send(index)?;
        }
        if event.events().intersects(EpollFlags::EPOLLIN | closed) {
            self.receive(index)?;
        }
        Ok(())
    }

    /// Fails requests that have taken too long, and reconnects clients whose delay has passed.
    fn scan(&mut self, now: Instant) -> Result<(), Error> {
        for index in 0..self.clients.len() {
            let client = &mut self.clients[index];
            if client.retry_at.is_some_and(|at| now >= at) {
                client.retry_at = None;
                self.backing_off -= 1;
                self.begin(index, now)?;
            } else if client.began.is_some_and(|began| now.saturating_duration_since(began) >= self.timeout) {
                let kind = if client.connected { Kind::Timeout } else { Kind::Connect };
                self.fail(index, Fault::new(kind, "timed out"))?;
            }
        }
        Ok(())
    }

    /// Starts a client's next request, on its connection or on a new one.
    fn begin(&mut self, index: usize, now: Instant) -> Result<(), Error> {
        let client = &mut self.clients[index];
        if self.budget == 0 {
            client.disconnect();
            return Ok(());
        }
        self.budget -= 1;
        client.began = Some(now);
        client.sent = 0;
        client.answered = false;
        client.seen = Seen::default();
        client.response.reset();
        if client.socket.is_none() {
            match Socket::open(self.peer) {
                Ok((socket, connected)) => {
                    client.socket = Some(socket);
                    client.connected = connected;
                }
                Err(error) => return self.fail(index, Fault::new(Kind::Connect, error.desc())),
            }
            self.tally.connections += 1;
            return self.send_first(index);
        }
        self.send(index)
    }

    /// Sends on a connection that is not yet registered with epoll.
    fn send_first(&mut self, index: usize) -> Result<(), Error> {
        match self.write(index) {
            Ok(done) => {
                self.clients[index].blocked = !done;
                let Some(socket) = &self.clients[index].socket else {
                    return Ok(());
                };
                self.epoll.add(socket, interest(index, !done)).map_err(Error::system("epoll_ctl"))
            }
            Err(fault) => self.fail(index, fault),
        }
    }

    /// Sends on a connection that is registered with epoll.
    fn send(&mut self, index: usize) -> Result<(), Error> {
        match self.write(index) {
            Ok(done) if self.clients[index].blocked == done => {
                let client = &mut self.clients[index];
                client.blocked = !done;
                let Some(socket) = &client.socket else {
                    return Ok(());
                };
                let mut event = interest(index, !done);
                self.epoll.modify(socket, &mut event).map_err(Error::system("epoll_ctl"))
            }
            Ok(_) => Ok(()),
            Err(fault) => self.fail(index, fault),
        }
    }

    /// Writes as much of the request as possible. Returns true if the whole request is written. Fails only if there is no
    /// connection.
    fn write(&mut self, index: usize) -> Result<bool, Fault> {
        let client = &mut self.clients[index];
        let Some(socket) = &client.socket else {
            return Ok(true);
        };
        while client.sent < self.request.len() {
            match socket.send(&self.request[client.sent..]) {
                Ok(count) => {
                    client.sent += count;
                    client.connected = true;
                }
                Err(Errno::EAGAIN) => return Ok(false),
                Err(error) if !client.connected && !matches!(error, Errno::EPIPE | Errno::ECONNRESET) => {
                    return Err(Fault::new(Kind::Connect, error.desc()));
                }
                // The server has closed the connection. Data that it sent earlier can still be read.
                Err(_) => {
                    client.sent = self.request.len();
                    client.connected = true;
                }
            }
        }
        Ok(true)
    }

    fn receive(&mut self, index: usize) -> Result<(), Error> {
        let client = &mut self.clients[index];
        let Some(socket) = &client.socket else {
            return Ok(());
        };
        let if_closed = if client.answered { Kind::Cut } else { Kind::Dropped };
        match socket.receive(&mut self.buffer) {
            Err(Errno::EAGAIN) => Ok(()),
            Err(error) if !client.connected => self.fail(index, Fault::new(Kind::Connect, error.desc())),
            Err(error) => self.fail(index, Fault::new(if_closed, error.desc())),
            Ok(0) => match client.response.closed() {
                Some(end) => self.complete(index, &end),
                None => self.fail(index, Fault::new(if_closed, "the server closed the connection")),
            },
            Ok(count) => {
                client.answered = true;
                let (seen, expectation) = (&mut client.seen, &self.expectation);
                match client.response.feed(&self.buffer[..count], &mut |part| seen.pass(part, expectation)) {
                    Ok(None) => Ok(()),
                    Ok(Some(end)) => self.complete(index, &end),
                    Err(malformed) => self.fail(index, Fault::new(Kind::Malformed, malformed.0)),
                }
            }
        }
    }

    /// Handles a response that ended as its protocol requires.
    fn complete(&mut self, index: usize, end: &End) -> Result<(), Error> {
        let now = Instant::now();
        let client = &mut self.clients[index];
        let began = client.began.take().unwrap_or(now);
        client.served = true;
        match self.expectation.judge(end, &client.seen) {
            Ok(()) => self.tally.right(now.saturating_duration_since(began)),
            Err(fault) => self.tally.wrong(fault),
        }
        // If the response arrived before the whole request was sent, the connection cannot be reused.
        if !self.keep || !end.keep || client.sent < self.request.len() {
            client.disconnect();
        }
        self.begin(index, now)
    }

    /// Handles a failed request, whose connection is closed or cannot be reused.
    fn fail(&mut self, index: usize, fault: Fault) -> Result<(), Error> {
        let now = Instant::now();
        let client = &mut self.clients[index];
        client.began = None;
        client.served = true;
        client.disconnect();
        let no_connection = fault.kind == Kind::Connect;
        self.tally.wrong(fault);
        if no_connection {
            client.retry_at = Some(now + BACK_OFF);
            self.backing_off += 1;
            return Ok(());
        }
        self.begin(index, now)
    }
}

fn interest(index: usize, to_write: bool) -> EpollEvent {
    let flags = if to_write { EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT } else { EpollFlags::EPOLLIN };
    EpollEvent::new(flags, index as u64)
}
