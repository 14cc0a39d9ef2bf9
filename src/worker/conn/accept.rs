//! Accepting: connections from a listener that all workers share, and those that other workers pass on.
//!
//! A new connection wakes one worker of those that wait, and not all: the event loop's registration of the listener
//! is exchanged for one with EPOLLEXCLUSIVE (see [`ReadyListener`]). A worker leaves new connections to its siblings by taking
//! itself off that list: when its blocking functions occupy all their threads and a sibling's do not; when it has more
//! connections than a sibling, so that kept connections spread; and when its connections are at the limit. A worker
//! whose event loop is busy does not wait, and so is not woken.
//!
//! A worker at the limit to which somebody connects all the same, so that no sibling has room either, closes connections on which
//! nothing is under way ([`reclaim`]). If there are none, clients wait in the kernel's queue.

use std::cell::Cell;
use std::future::{Future, poll_fn};
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::task::Poll;
use std::time::{Duration, Instant};

use forkyard_shm::{Row, Scoreboard};
use nix::poll::{PollFd, PollFlags, PollTimeout};
use tokio::sync::Notify;
use tokio::time::sleep;

use super::reclaim;
use super::socket::Socket;
use super::throttle::Throttle;
use crate::app::blocking;
use crate::heir;
use crate::heir::journal::{Journal, WireProtocol};
use crate::net::handover::{Channel, Handoff, PackedOrigin};
use crate::net::listen::{self, Listener};
use crate::sys;
use crate::worker::lifecycle::watchdog::Watchdog;

/// How long a connection is left to siblings that have fewer.
const LEFT_TO_SIBLINGS: Duration = Duration::from_millis(1);
/// How long it is left to siblings that could serve it at once while this worker could not. On a busy machine it may take them
/// some time to come to it, and here it may wait for much longer.
const LEFT_TO_FREE: Duration = Duration::from_secs(1);
/// So many connections are then accepted before siblings are waited for again: enough that one that is stopped or
/// hangs does not slow the others much, and few enough that one that was merely late gets its share.
const NOT_WAITED_FOR: u32 = 4;
/// How long a worker at the limit leaves what waits to its siblings, before it looks for connections that it can close.
const LEFT_WHEN_FULL: Duration = Duration::from_millis(10);
/// How long accepting pauses when the system has no descriptor or memory for a connection.
const PAUSE: Duration = Duration::from_millis(100);
/// After so many pauses a listener that was shut down is no matter of a stop.
const CLOSED_FOR: u32 = 20;
/// The log hears of that so often.
const LOG_INTERVAL: Duration = Duration::from_secs(60);
/// After so many times that it was ready, and nobody was there, it is looked whether a listener listens still.
const RUNG_FOR_NOTHING: u32 = 16;
/// So many connections in a row that failed before they were accepted are passed over without a pause.
const FAILED_IN_A_ROW: u32 = 64;

/// What is done with an accepted connection.
pub(crate) trait Serve {
    /// Serves it to its end.
    fn serve(&self, socket: Socket, arrival: Arrival) -> impl Future<Output = ()> + 'static;

    /// What is spoken on the connections of a listener.
    fn wire_protocol(&self, listener: u16) -> WireProtocol;
}

/// How a connection came.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Arrival {
    /// Index of the listener at which it came, here or at another worker.
    pub(crate) listener: u16,
    pub(crate) origin: PackedOrigin,
}

/// The connections that this worker holds.
#[derive(Debug)]
pub(crate) struct Connections {
    open: Cell<u32>,
    limit: u32,
    row: Row,
    scoreboard: Scoreboard,
    slot: u32,
    one_began: Notify,
    one_ended: Notify,
    watchdog: Rc<Watchdog>,
    closed: Throttle,
    full: Throttle,
}

impl Connections {
    pub(crate) fn new(limit: u32, row: Row, scoreboard: Scoreboard, slot: u32, watchdog: Rc<Watchdog>) -> Self {
        let (one_began, one_ended) = (Notify::new(), Notify::new());
        let (closed, full) = (Throttle::default(), Throttle::default());
        Self { open: Cell::new(0), limit, row, scoreboard, slot, one_began, one_ended, watchdog, closed, full }
    }

    /// Returns when there is one.
    pub(crate) async fn some(&self) {
        while self.open.get() == 0 {
            self.one_began.notified().await;
        }
    }

    /// Returns when the next one has ended.
    pub(crate) async fn one_ended(&self) {
        self.one_ended.notified().await;
    }

    /// Returns when the last one has ended.
    pub(crate) async fn none(&self) {
        while self.open.get() > 0 {
            self.one_ended.notified().await;
        }
    }

    fn is_full(&self) -> bool {
        self.open.get() >= self.limit
    }

    /// Somebody waits to be accepted, and has to wait for a place: closes some connections on which nothing is under way. `why`: a
    /// flag to change.
    fn make_room(&self, why: &str) {
        let closed = self.watchdog.make_room(reclaim::share(self.limit));
        let open = self.open.get();
        if closed == 0 {
            if self.full.add(1).is_some() {
                log::warn!("clients wait to be accepted, and no connection is idle ({why}) connections={open}");
            }
        } else if let Some(count) = self.closed.add(closed) {
            log::warn!("closed idle connections to make room for others ({why}) count={count} connections={open}");
        }
    }

    /// Whether a sibling would be the better one to take the next connection.
    fn sibling_is_less_busy(&self) -> bool {
        let (open, occupied) = (self.open.get(), blocking::pool_is_full());
        if open == 0 && !occupied {
            return false;
        }
        let Some(freest) = self.scoreboard.freest(self.slot) else { return false };
        match (occupied, freest.occupied) {
            (true, false) => true,
            (false, true) => false,
            // A few more are no reason to make a connection wait.
            (true, true) | (false, false) => open > freest.connections + freest.connections / 8,
        }
    }

    fn open(self: &Rc<Self>) -> Open {
        let open = self.open.get();
        self.open.set(open + 1);
        self.row.connection_opened();
        if open == 0 {
            self.one_began.notify_waiters();
        }
        Open(Rc::clone(self))
    }
}

/// A connection that counts while it lives.
struct Open(Rc<Connections>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.open.set(self.0.open.get() - 1);
        self.0.row.connection_closed();
        self.0.one_ended.notify_waiters();
    }
}

/// Wakes the event loop when somebody waits to be accepted: it, and none of the siblings that wait too.
///
/// That is what [`sys::Exclusive`] is for. tokio does not notice a difference to its own registrations, except that the event
/// comes again as long as somebody waits.
#[derive(Debug)]
struct ReadyListener {
    listener: sys::Exclusive,
    /// Connections come by messages.
    is_channel: bool,
}

impl ReadyListener {
    fn new(listener: OwnedFd, is_channel: bool) -> io::Result<Self> {
        let listener = sys::Exclusive::new(listener)?;
        if !listener.is_exclusive() {
            static ONCE: std::sync::Once = std::sync::Once::new();
            ONCE.call_once(|| {
                log::warn!(
                    "each new connection wakes all workers: how the event loop waits for them cannot be found out"
                );
            });
        }
        Ok(Self { listener, is_channel })
    }

    fn pause(&self) {
        self.listener.pause();
    }

    fn resume(&self) -> io::Result<()> {
        self.listener.resume()
    }

    /// Whether somebody waits to be accepted.
    fn is_ready(&self) -> bool {
        let mut listener = [PollFd::new(self.listener.as_fd(), PollFlags::POLLIN)];
        nix::poll::poll(&mut listener, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
    }

    /// Takes one connection, as soon as there is one.
    async fn wait<T>(&self, take: impl Fn(BorrowedFd<'_>) -> io::Result<T>) -> io::Result<T> {
        let mut rung_for_nothing = 0;
        loop {
            let mut has_pending = self.listener.readable().await?;
            match take(self.listener.as_fd()) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    has_pending.clear_ready();
                    // A sibling may have been quicker. But a Unix socket that was shut down is ready for ever, and has nothing.
                    rung_for_nothing += 1;
                    let is_odd = rung_for_nothing % RUNG_FOR_NOTHING == 0;
                    if is_odd && !self.is_channel && !listen::is_listening(self.listener.as_fd()) {
                        return Err(io::Error::from_raw_os_error(libc::EINVAL));
                    }
                }
                outcome => {
                    if self.listener.is_exclusive() {
                        has_pending.clear_ready(); // it rings again if more wait
                    }
                    return outcome;
                }
            }
        }
    }
}

/// Where connections come from, and how they get to this worker.
#[derive(Debug)]
pub(crate) struct Acceptor {
    bell: ReadyListener,
    source: Source,
    connections: Rc<Connections>,
    journal: Journal,
}

#[derive(Clone, Copy, Debug)]
enum Source {
    Listener {
        index: u16,
        wire_protocol: WireProtocol,
    },
    /// Other workers pass them on.
    Channel,
}

/// A connection that was taken, before it is entered in the journal.
struct Taken {
    socket: OwnedFd,
    arrival: Arrival,
    early: Vec<u8>,
}

impl Acceptor {
    /// Of a listener, the one with this index.
    ///
    /// # Errors
    /// If no descriptor can be had, or epoll refuses it.
    pub(crate) fn of_listener(
        index: u16,
        listener: &Listener,
        connections: &Rc<Connections>,
        journal: Journal,
    ) -> io::Result<Self> {
        let source = Source::Listener { index, wire_protocol: heir::wire_protocol_of(listener.protocol) };
        Ok(Self {
            bell: ReadyListener::new(listener.duplicate()?, false)?,
            source,
            connections: Rc::clone(connections),
            journal,
        })
    }

    /// Of the connections that other workers pass on.
    ///
    /// # Errors
    /// As above.
    pub(crate) fn of_channel(channel: &Channel, connections: &Rc<Connections>, journal: Journal) -> io::Result<Self> {
        let bell = ReadyListener::new(channel.receiver().try_clone_to_owned()?, true)?;
        Ok(Self { bell, source: Source::Channel, connections: Rc::clone(connections), journal })
    }

    fn take(&self, from: BorrowedFd<'_>) -> io::Result<Taken> {
        match self.source {
            Source::Listener { index, .. } => {
                let (socket, peer) = self.journal.accept(from)?;
                let arrival = Arrival { listener: index, origin: PackedOrigin::of_peer(peer) };
                Ok(Taken { socket, arrival, early: Vec::new() })
            }
            Source::Channel => {
                let (socket, Handoff { listener, origin, early }) = self.journal.take_over(from)?;
                Ok(Taken { socket, arrival: Arrival { listener, origin }, early })
            }
        }
    }

    /// Accepts for ever; each connection is served by a task of its own.
    pub(crate) async fn run(&self, serve: &impl Serve) {
        let mut told = None::<Instant>;
        let mut patience = Patience::default();
        let (mut failed_in_a_row, mut closed_for) = (0, 0_u32);
        loop {
            let outcome = match self.turn(&mut patience).await {
                Ok(()) => tokio::select! {
                    biased;
                    taken = self.bell.wait(|from| self.take(from)) => taken,
                    // By a request of a connection that is here already: whose turn it is may be another matter now.
                    () = blocking::pool_became_full() => continue,
                },
                Err(error) => Err(error),
            };
            match outcome {
                Ok(taken) => {
                    (failed_in_a_row, closed_for) = (0, 0);
                    self.start(serve, taken).await;
                    self.settled().await;
                }
                // That connection is gone already; the next one is waiting.
                Err(error)
                    if !self.bell.listener.is_paused()
                        && is_of_one_connection(&error)
                        && failed_in_a_row < FAILED_IN_A_ROW =>
                {
                    failed_in_a_row += 1;
                }
                Err(error) => {
                    failed_in_a_row = 0;
                    // A master that stops closes its sockets a moment before it says so.
                    let is_closed = error.raw_os_error() == Some(libc::EINVAL);
                    closed_for = if is_closed { closed_for.saturating_add(1) } else { CLOSED_FOR };
                    if closed_for >= CLOSED_FOR && told.is_none_or(|told| told.elapsed() > LOG_INTERVAL) {
                        log::error!("accepting pauses until it can go on: {}{}", Explained(&error), self.name());
                        told = Some(Instant::now());
                    }
                    self.bell.pause();
                    if is_of_this_system(&error) && self.connections.open.get() > 0 {
                        self.connections.make_room("descriptors: --rlimit nofile=N");
                    }
                    sleep(PAUSE).await;
                }
            }
        }
    }

    /// Returns when the connection that was just accepted has got as far as it can: a short request is then over.
    async fn settled(&self) {
        let_others_run().await;
        if self.connections.open.get() > 0 {
            tokio::task::yield_now().await;
        }
    }

    /// Returns when it is this worker's turn to accept.
    async fn turn(&self, patience: &mut Patience) -> io::Result<()> {
        let connections = &self.connections;
        while connections.is_full() {
            self.bell.pause();
            let ended = tokio::time::timeout(LEFT_WHEN_FULL, connections.one_ended.notified()).await;
            if ended.is_err() && self.bell.is_ready() {
                connections.make_room("--max-connections");
            }
        }
        while !patience.is_over(blocking::pool_is_full()) && connections.sibling_is_less_busy() {
            self.bell.pause();
            let occupied = blocking::pool_is_full();
            let left_for = if occupied { LEFT_TO_FREE } else { LEFT_TO_SIBLINGS };
            tokio::select! {
                () = connections.one_ended.notified() => {}
                () = blocking::one_is_free(), if occupied => {}
                // While nobody waits, nobody has been left waiting.
                () = sleep(left_for) => if !occupied || self.bell.is_ready() { patience.end(occupied) },
            }
        }
        self.bell.resume()
    }

    /// Accepts what is waiting in the kernel's queue, and no more. For a worker that leaves: if all leave,
    /// nobody else would. False if there was no room for all.
    pub(crate) async fn run_dry(&self, serve: &impl Serve) -> bool {
        // Before, or else the kernel would go on to tell this worker, and it alone, of the next one.
        self.bell.pause();
        let mut failed_in_a_row = 0;
        while !self.connections.is_full() {
            match self.take(self.bell.listener.as_fd()) {
                Ok(taken) => {
                    failed_in_a_row = 0;
                    self.start(serve, taken).await;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return true,
                Err(error) if is_of_one_connection(&error) && failed_in_a_row < FAILED_IN_A_ROW => failed_in_a_row += 1,
                // The master has closed the socket for all, as the queue was empty.
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => return true,
                Err(error) => {
                    log::warn!("what is queued cannot be accepted: {error}{}", self.name());
                    return true;
                }
            }
        }
        false
    }

    /// Whether new connections come this way.
    pub(crate) fn is_of_listener(&self) -> bool {
        matches!(self.source, Source::Listener { .. })
    }

    /// For the log.
    fn name(&self) -> String {
        match self.source {
            Source::Listener { index, .. } => format!(" listener={index}"),
            Source::Channel => String::new(),
        }
    }

    async fn start(&self, serve: &impl Serve, Taken { socket, arrival, early }: Taken) {
        let open = self.connections.open();
        let wire_protocol = match self.source {
            Source::Listener { wire_protocol, .. } => wire_protocol,
            Source::Channel => serve.wire_protocol(arrival.listener),
        };
        let conn = self.journal.enter(socket.as_fd(), wire_protocol, arrival.listener, arrival.origin);
        let socket = Socket::new(socket, conn, &early, &self.connections.watchdog);
        let mut serving = Box::pin(serve.serve(socket, arrival));
        // What came with it is on the journal's intent record: it has to be looked at before anything else is read.
        if !early.is_empty() && poll_fn(|context| Poll::Ready(serving.as_mut().poll(context))).await.is_ready() {
            return drop(open);
        }
        tokio::task::spawn_local(async move {
            serving.await;
            drop(open);
        });
    }
}

/// Goes to the end of the event loop's queue. (tokio's `yield_now` would look at epoll in between.)
async fn let_others_run() {
    let mut last = false;
    poll_fn(|context| {
        if std::mem::replace(&mut last, true) {
            return Poll::Ready(());
        }
        context.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

/// Siblings that had their time and did not take what waits (one of them may be stopped, or hang) are not waited
/// for again at once.
#[derive(Default)]
struct Patience {
    accepts_without: u32,
    /// Siblings that have few connections were waited for while this worker could serve, which says nothing of how long
    /// to leave them what it cannot serve.
    while_occupied: bool,
}

impl Patience {
    fn end(&mut self, occupied: bool) {
        (self.accepts_without, self.while_occupied) = (NOT_WAITED_FOR, occupied);
    }

    fn is_over(&mut self, occupied: bool) -> bool {
        let over = self.accepts_without > 0 && (self.while_occupied || !occupied);
        self.accepts_without = self.accepts_without.saturating_sub(1);
        over
    }
}

/// Whether it is about the connection that would have been the next one: by accept(2), the errors that its network had for
/// it, and those by which it ended early. Everything else (no descriptor, no memory, a socket that listens no more, a security
/// module) concerns the next connection too.
fn is_of_one_connection(error: &io::Error) -> bool {
    match error.raw_os_error() {
        None => true, // a message that makes no sense
        Some(number) => matches!(
            number,
            libc::ECONNABORTED
                | libc::ECONNRESET
                | libc::EINTR
                | libc::ENETDOWN
                | libc::EPROTO
                | libc::ENOPROTOOPT
                | libc::EHOSTDOWN
                | libc::ENONET
                | libc::EHOSTUNREACH
                | libc::EOPNOTSUPP
                | libc::ENETUNREACH
                | libc::ETIMEDOUT
        ),
    }
}

/// No descriptor or memory is to be had.
fn is_of_this_system(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM))
}

/// An error of `accept(2)`, and what it means where that is not plain.
struct Explained<'a>(&'a io::Error);

impl std::fmt::Display for Explained<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.0.raw_os_error() != Some(libc::EINVAL) {
            return self.0.fmt(f);
        }
        f.write_str(
            "the socket listens no more: some process that holds it has called shutdown(2) on it (stop and start)",
        )
    }
}
