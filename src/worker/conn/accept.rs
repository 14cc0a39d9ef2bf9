//! Accepts connections from the listeners that all workers share, and connections handed over by other workers.
//!
//! A new connection wakes one of the waiting workers, not all of them: each worker replaces the event loop's
//! registration of the listener with one that uses EPOLLEXCLUSIVE (see [`ReadyListener`]). A worker removes its
//! registration, and so leaves new connections to its siblings:
//!
//! - when blocking functions occupy all its threads and a sibling has a free thread;
//! - when it has more connections than a sibling, so that keep-alive connections spread over the workers;
//! - when it is at its connection limit.
//!
//! A worker whose event loop is busy does not wait on epoll, so it is not woken.
//!
//! If a connection arrives at a worker that is at its limit, the siblings are at their limits too. The worker then
//! closes connections that have no request under way ([`reclaim`]). If there are no such connections, clients wait in
//! the kernel's queue.

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

/// How long a waiting connection is left to siblings that have fewer connections.
const LEFT_TO_SIBLINGS: Duration = Duration::from_millis(1);
/// How long a waiting connection is left to siblings with a free thread while this worker has none. On a busy machine,
/// a sibling may take some time to accept the connection, but in this worker the connection could wait much longer.
const LEFT_TO_FREE: Duration = Duration::from_secs(1);
/// Number of connections that are accepted without waiting for siblings, after the siblings have failed to accept a
/// connection in time. The number is high enough that a stopped or hanging sibling hardly slows this worker down, and
/// low enough that a slow sibling gets its share.
const NOT_WAITED_FOR: u32 = 4;
/// How long a worker at its limit leaves waiting clients to its siblings before it closes idle
/// connections.
const LEFT_WHEN_FULL: Duration = Duration::from_millis(10);
/// Time for which the worker stops accepting when it cannot accept a connection, for example
/// because no descriptor or memory is available.
const PAUSE: Duration = Duration::from_millis(100);
/// Number of pauses after which a closed listener is logged as an error. Until then, the cause may be a master that is
/// stopping.
const CLOSED_FOR: u32 = 20;
/// Minimum time between two log lines about pauses in accepting.
const LOG_INTERVAL: Duration = Duration::from_secs(60);
/// Number of consecutive wakeups without a connection after which the worker checks that the socket is still listening.
const RUNG_FOR_NOTHING: u32 = 16;
/// Number of consecutive failed connections that are skipped without a pause.
const FAILED_IN_A_ROW: u32 = 64;

/// Serves accepted connections.
pub(crate) trait Serve {
    /// Serves the connection until it ends.
    fn serve(&self, socket: Socket, arrival: Arrival) -> impl Future<Output = ()> + 'static;

    /// Returns the protocol of a listener's connections.
    fn wire_protocol(&self, listener: u16) -> WireProtocol;
}

/// Where a connection came from.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Arrival {
    /// Index of the listener that accepted the connection, in this worker or in another one.
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

    /// Waits until there is at least one connection.
    pub(crate) async fn some(&self) {
        while self.open.get() == 0 {
            self.one_began.notified().await;
        }
    }

    /// Waits until the next connection ends.
    pub(crate) async fn one_ended(&self) {
        self.one_ended.notified().await;
    }

    /// Waits until there is no connection.
    pub(crate) async fn none(&self) {
        while self.open.get() > 0 {
            self.one_ended.notified().await;
        }
    }

    fn is_full(&self) -> bool {
        self.open.get() >= self.limit
    }

    /// Closes some idle connections, because a client is waiting to be accepted and the worker is at its limit. `why`
    /// is the flag to change.
    fn make_room(&self, why: &str) {
        let closed = self.watchdog.make_room(reclaim::share(self.limit));
        let open = self.open.get();
        if closed == 0 {
            if self.full.add(1).is_some() {
                log::warn!(connections = open; "cannot accept waiting clients: no connection is idle ({why})");
            }
        } else if let Some(count) = self.closed.add(closed) {
            log::warn!(count, connections = open; "closed idle connections to make room for others ({why})");
        }
    }

    /// Whether a sibling should take the next connection.
    fn sibling_is_less_busy(&self) -> bool {
        let (open, occupied) = (self.open.get(), blocking::pool_is_full());
        if open == 0 && !occupied {
            return false;
        }
        let Some(freest) = self.scoreboard.freest(self.slot) else { return false };
        match (occupied, freest.occupied) {
            (true, false) => true,
            (false, true) => false,
            // A small difference is no reason to delay a connection.
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

/// Counts as an open connection until it is dropped.
struct Open(Rc<Connections>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.open.set(self.0.open.get() - 1);
        self.0.row.connection_closed();
        self.0.one_ended.notify_waiters();
    }
}

/// Wakes the event loop of this worker, and of no sibling, when a connection is waiting to be accepted.
///
/// [`sys::Exclusive`] does this. For tokio, the only difference from its own registrations is that the event repeats as
/// long as a connection is waiting.
#[derive(Debug)]
struct ReadyListener {
    listener: sys::Exclusive,
    /// Whether connections arrive as messages on a channel.
    is_channel: bool,
}

impl ReadyListener {
    fn new(listener: OwnedFd, is_channel: bool) -> io::Result<Self> {
        let listener = sys::Exclusive::new(listener)?;
        if !listener.is_exclusive() {
            static ONCE: std::sync::Once = std::sync::Once::new();
            ONCE.call_once(|| {
                log::warn!(
                    "each new connection wakes all workers: cannot find the epoll registration of a listener in /proc"
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

    /// Whether a connection waits to be accepted.
    fn is_ready(&self) -> bool {
        let mut listener = [PollFd::new(self.listener.as_fd(), PollFlags::POLLIN)];
        nix::poll::poll(&mut listener, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
    }

    /// Waits for a connection and takes it.
    async fn wait<T>(&self, take: impl Fn(BorrowedFd<'_>) -> io::Result<T>) -> io::Result<T> {
        let mut rung_for_nothing = 0;
        loop {
            let mut has_pending = self.listener.readable().await?;
            match take(self.listener.as_fd()) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    has_pending.clear_ready();
                    // A sibling may have accepted the connection first. Or the socket is a Unix socket that was shut
                    // down and therefore stays ready without a connection.
                    rung_for_nothing += 1;
                    let is_odd = rung_for_nothing % RUNG_FOR_NOTHING == 0;
                    if is_odd && !self.is_channel && !listen::is_listening(self.listener.as_fd()) {
                        return Err(io::Error::from_raw_os_error(libc::EINVAL));
                    }
                }
                outcome => {
                    if self.listener.is_exclusive() {
                        has_pending.clear_ready(); // the event repeats if more connections wait
                    }
                    return outcome;
                }
            }
        }
    }
}

/// Accepts connections from one listener or channel.
#[derive(Debug)]
pub(crate) struct Acceptor {
    ready_listener: ReadyListener,
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
    /// Connections handed over by other workers.
    Channel,
}

/// A connection that was accepted but has no journal record yet.
struct AcceptedSocket {
    socket: OwnedFd,
    arrival: Arrival,
    early: Vec<u8>,
}

impl Acceptor {
    /// Accepts from a listener; `index` is its position among the listeners.
    ///
    /// # Errors
    /// Fails if no descriptor is available, or if epoll refuses the registration.
    pub(crate) fn of_listener(
        index: u16,
        listener: &Listener,
        connections: &Rc<Connections>,
        journal: Journal,
    ) -> io::Result<Self> {
        let source = Source::Listener { index, wire_protocol: heir::wire_protocol_of(listener.protocol) };
        Ok(Self {
            ready_listener: ReadyListener::new(listener.duplicate()?, false)?,
            source,
            connections: Rc::clone(connections),
            journal,
        })
    }

    /// Accepts the connections that other workers hand over.
    ///
    /// # Errors
    /// Fails if no descriptor is available, or if epoll refuses the registration.
    pub(crate) fn of_channel(channel: &Channel, connections: &Rc<Connections>, journal: Journal) -> io::Result<Self> {
        let ready_listener = ReadyListener::new(channel.receiver().try_clone_to_owned()?, true)?;
        Ok(Self { ready_listener, source: Source::Channel, connections: Rc::clone(connections), journal })
    }

    fn take(&self, from: BorrowedFd<'_>) -> io::Result<AcceptedSocket> {
        match self.source {
            Source::Listener { index, .. } => {
                let (socket, peer) = self.journal.accept(from)?;
                let arrival = Arrival { listener: index, origin: PackedOrigin::of_peer(peer) };
                Ok(AcceptedSocket { socket, arrival, early: Vec::new() })
            }
            Source::Channel => {
                let (socket, Handoff { listener, origin, early }) = self.journal.take_over(from)?;
                Ok(AcceptedSocket { socket, arrival: Arrival { listener, origin }, early })
            }
        }
    }

    /// Accepts forever; each connection is served by its own task.
    pub(crate) async fn run(&self, serve: &impl Serve) {
        let mut reported = None::<Instant>;
        let mut patience = Patience::default();
        let (mut failed_in_a_row, mut closed_for) = (0, 0_u32);
        loop {
            let outcome = match self.turn(&mut patience).await {
                Ok(()) => tokio::select! {
                    biased;
                    taken = self.ready_listener.wait(|from| self.take(from)) => taken,
                    // A request on an open connection has taken the last free thread, so a sibling may now be the
                    // better choice.
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
                // The client of this connection has already disconnected; accept the next connection.
                Err(error)
                    if !self.ready_listener.listener.is_paused()
                        && is_of_one_connection(&error)
                        && failed_in_a_row < FAILED_IN_A_ROW =>
                {
                    failed_in_a_row += 1;
                }
                Err(error) => {
                    failed_in_a_row = 0;
                    // A stopping master closes its sockets shortly before it stops its workers.
                    let is_closed = error.raw_os_error() == Some(libc::EINVAL);
                    closed_for = if is_closed { closed_for.saturating_add(1) } else { CLOSED_FOR };
                    if closed_for >= CLOSED_FOR && reported.is_none_or(|reported| reported.elapsed() > LOG_INTERVAL) {
                        let error = Explained(&error);
                        log::error!(listener = self.listener(); "cannot accept connections for now: {error}");
                        reported = Some(Instant::now());
                    }
                    self.ready_listener.pause();
                    if is_of_this_system(&error) && self.connections.open.get() > 0 {
                        self.connections.make_room("descriptors: --rlimit nofile=N");
                    }
                    sleep(PAUSE).await;
                }
            }
        }
    }

    /// Returns when the new connection has made all the progress that it can make for now. A short request is complete
    /// by then.
    async fn settled(&self) {
        let_others_run().await;
        if self.connections.open.get() > 0 {
            tokio::task::yield_now().await;
        }
    }

    /// Returns when it is this worker's turn to accept the next connection.
    async fn turn(&self, patience: &mut Patience) -> io::Result<()> {
        let connections = &self.connections;
        while connections.is_full() {
            self.ready_listener.pause();
            let ended = tokio::time::timeout(LEFT_WHEN_FULL, connections.one_ended.notified()).await;
            if ended.is_err() && self.ready_listener.is_ready() {
                connections.make_room("--max-connections");
            }
        }
        while !patience.is_over(blocking::pool_is_full()) && connections.sibling_is_less_busy() {
            self.ready_listener.pause();
            let occupied = blocking::pool_is_full();
            let left_for = if occupied { LEFT_TO_FREE } else { LEFT_TO_SIBLINGS };
            tokio::select! {
                () = connections.one_ended.notified() => {}
                () = blocking::one_is_free(), if occupied => {}
                // If no client is waiting, the siblings have not failed to accept a connection.
                () = sleep(left_for) => if !occupied || self.ready_listener.is_ready() { patience.end(occupied) },
            }
        }
        self.ready_listener.resume()
    }

    /// Accepts the connections that are in the kernel's queue, and no others. A draining worker must do this, because
    /// all workers may be draining. Returns false if the worker could not take all of these connections.
    pub(crate) async fn run_dry(&self, serve: &impl Serve) -> bool {
        // The registration is paused first: otherwise the kernel would notify only this worker of the next connection.
        self.ready_listener.pause();
        let mut failed_in_a_row = 0;
        while !self.connections.is_full() {
            match self.take(self.ready_listener.listener.as_fd()) {
                Ok(taken) => {
                    failed_in_a_row = 0;
                    self.start(serve, taken).await;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return true,
                Err(error) if is_of_one_connection(&error) && failed_in_a_row < FAILED_IN_A_ROW => failed_in_a_row += 1,
                // The queue was empty, and the master has closed the socket for all workers.
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => return true,
                Err(error) => {
                    log::warn!(listener = self.listener(); "cannot accept the queued connections: {error}");
                    return true;
                }
            }
        }
        false
    }

    /// Whether this acceptor accepts new connections.
    pub(crate) fn is_of_listener(&self) -> bool {
        matches!(self.source, Source::Listener { .. })
    }

    /// Returns the index of the listener, or `None` for the channel.
    fn listener(&self) -> Option<u16> {
        match self.source {
            Source::Listener { index, .. } => Some(index),
            Source::Channel => None,
        }
    }

    async fn start(&self, serve: &impl Serve, AcceptedSocket { socket, arrival, early }: AcceptedSocket) {
        let open = self.connections.open();
        let wire_protocol = match self.source {
            Source::Listener { wire_protocol, .. } => wire_protocol,
            Source::Channel => serve.wire_protocol(arrival.listener),
        };
        let conn = self.journal.enter(socket.as_fd(), wire_protocol, arrival.listener, arrival.origin);
        let socket = Socket::new(socket, conn, &early, &self.connections.watchdog);
        let mut serving = Box::pin(serve.serve(socket, arrival));
        // The early bytes are in the journal's intent record, so they must be processed before anything else is read.
        if !early.is_empty() && poll_fn(|context| Poll::Ready(serving.as_mut().poll(context))).await.is_ready() {
            return drop(open);
        }
        tokio::task::spawn_local(async move {
            serving.await;
            drop(open);
        });
    }
}

/// Yields to the other tasks in the event loop's queue. (tokio's `yield_now` would poll epoll
/// first.)
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

/// Suspends the wait for siblings after they have failed to accept a waiting connection in time. Such a sibling may be
/// stopped or hanging.
#[derive(Default)]
struct Patience {
    accepts_without: u32,
    /// Whether the failed wait ended while this worker was occupied. A wait that ends while the worker is free is much
    /// shorter, and its failure is no reason to suspend the waits of an occupied worker.
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

/// Whether the error concerns only the connection that would have been accepted. According to accept(2), such errors
/// are pending network errors of the connection, and errors of a connection that ended early. Every other error (no
/// descriptor, no memory, a socket that no longer listens, a security module) also affects the next connection.
fn is_of_one_connection(error: &io::Error) -> bool {
    match error.raw_os_error() {
        None => true, // a malformed message
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

/// Whether the system has no descriptor or memory left.
fn is_of_this_system(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM))
}

/// Displays an error from `accept(2)`, with an explanation where its text does not suffice.
struct Explained<'a>(&'a io::Error);

impl std::fmt::Display for Explained<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.0.raw_os_error() != Some(libc::EINVAL) {
            return self.0.fmt(f);
        }
        f.write_str("a process has called shutdown(2) on the listening socket (stop and start the server)")
    }
}
