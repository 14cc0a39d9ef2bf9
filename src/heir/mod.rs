//! Implements the heir: a process alongside each worker that takes over the worker's connections when the worker dies.
//!
//! ```text
//! worker dies ─▶ every request in flight: 502 ─▶ kept-alive connections: to another worker ─▶ the rest: closed
//! ```
//!
//! An heir is a clone of its worker that shares only the journal and the worker's descriptor table (`clone(2)`,
//! CLONE_FILES). The heir sleeps while the worker is alive, and adds no system call to a connection. When the worker
//! dies, whatever the signal, the table and all connections in it stay open. The [`journal`] shows the state of each
//! connection, and [`settlement`] decides what happens to the connection.
//!
//! - The heir is created right after the fork, while the worker has one thread, and before any application code runs. It
//!   never touches the application's memory, the page cache or tokio.
//! - After the worker's death, the heir first closes all descriptors that are not connections, because other processes
//!   interpret a lock that is held through such a descriptor as evidence that the worker is alive.
//! - The heir has no exit signal, so the application's wait(2) calls do not report it. After the worker's death, the
//!   heir becomes a child of the master, which reaps it.
//! - If only the heir is killed, no connection is lost, and its worker requests its own replacement. If the heir is
//!   killed together with its worker, the kernel closes the connections.
//!
//! The heir must stay safe whatever the journal contains, and must not wait for a peer longer than [`PEER_TIMEOUT`].

pub(crate) mod journal;
pub(crate) mod settlement;

use std::collections::BTreeMap;
use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    MsgFlags, Shutdown, SockaddrStorage, getpeername, getsockname, recv, send, setsockopt, shutdown, sockopt,
};
use nix::unistd::Pid;

use self::journal::{ConnRecord, Journal, LastOp, MAX_CONNECTIONS, WireProtocol};
use self::settlement::{FinalStep, Settlement, settle};
use crate::config::address::Protocol;
use crate::inherited_by_workers::Heritage;
use crate::logging::files::LogFiles;
use crate::logging::line_buffer::LineBuffer;
use crate::net::handover::{self, Channel, Handoff, PackedOrigin};
use crate::net::listen::{Closing, Listener};
use crate::{logging, sys};

/// The name of the process, as shown in `ps`. The master recognizes the heirs of dead workers by this name.
pub(crate) const NAME: &CStr = c"heir";

/// How long the heir reads from peers after it has written its last bytes to them. If the heir closed a connection on
/// which the peer is still sending, the kernel would reset the connection, and the peer could lose the heir's last
/// bytes.
const PEER_TIMEOUT: Duration = Duration::from_secs(2);
/// Like [`PEER_TIMEOUT`], if the server stops immediately or the master is dead.
const STOP_PEER_TIMEOUT: Duration = Duration::from_millis(250);
/// When the master is dead: how long a worker may take to accept queued connections before its sockets are closed.
const QUEUE_TIMEOUT: Duration = Duration::from_secs(1);
/// When the master is dead: the interval at which the queues are checked.
const QUEUE_POLL_INTERVAL_MS: u8 = 5;

/// What a worker holds for its heir.
#[derive(Debug)]
pub(crate) struct Heir {
    pub(crate) journal: Journal,
    /// Buffer for access log lines. `None` without an access log.
    pub(crate) lines: Option<LineBuffer>,
    /// Becomes readable when the heir has died. `None` without an heir.
    pub(crate) end: Option<OwnedFd>,
    /// Descriptors that the heir uses: they must stay open as long as the worker is alive.
    pub(crate) retained: RetainedFds,
}

/// Descriptors that the heir uses. The worker must not close them.
#[derive(Debug)]
pub(crate) struct RetainedFds {
    /// `None` without an heir.
    worker: Option<OwnedFd>,
    /// The heir's own lifeline, because a worker closes its lifeline when it is asked to exit.
    lifeline: OwnedFd,
    _channel: Arc<Channel>,
    listeners: Arc<[Listener]>,
    _log_files: Arc<LogFiles>,
}

impl RetainedFds {
    /// Removes the listening sockets from the descriptor table of worker and heir.
    pub(crate) fn give_up(&self, listeners: &[Listener]) {
        listeners.iter().for_each(|listener| listener.give_up(&self.lifeline));
    }

    /// Returns when the worker is dead. If the master dies first, this function closes the listening sockets, because a
    /// worker whose event loop is busy may take long to do so.
    fn await_death(&self, worker: Pid, end: &OwnedFd) {
        let is_lifeline = identity_of(self.lifeline.as_fd());
        let mut has_master = true;
        let mut closing = None;
        let mut own = None;
        let is_alive = || nix::unistd::getppid() == worker;
        // Until the worker is dead, the heir must not change any descriptor, because the table belongs to the worker.
        while is_alive() {
            let end = own.as_ref().unwrap_or(end);
            let mut ends = vec![PollFd::new(end.as_fd(), PollFlags::POLLIN)];
            if has_master {
                ends.push(PollFd::new(self.lifeline.as_fd(), PollFlags::empty()));
            }
            let timeout = closing.as_ref().map_or(PollTimeout::NONE, |_| PollTimeout::from(QUEUE_POLL_INTERVAL_MS));
            let polled = poll(&mut ends, timeout);
            let said_of = |index: usize| ends.get(index).and_then(PollFd::revents).unwrap_or(PollFlags::empty());
            let (of_worker, of_lifeline) = (said_of(0), said_of(1));
            if !of_lifeline.is_empty() {
                has_master = false;
                // The application may have closed the lifeline, and the lifeline's number may now belong to another
                // file.
                if is_lifeline.is_some() && identity_of(self.lifeline.as_fd()) == is_lifeline {
                    closing = Some(Closing::begin(&self.listeners, QUEUE_TIMEOUT, Duration::ZERO));
                }
            }
            if let Some(sockets) = &mut closing {
                sockets.advance(
                    &self.listeners,
                    |listener| sys::tcp_queue(listener.as_fd()).unwrap_or(0),
                    false,
                    Instant::now(),
                );
            }
            closing = closing.filter(|sockets| !sockets.is_over());
            match polled {
                // The descriptor's number may now belong to another file. In that case the worker is still this
                // process's parent.
                Ok(_) if of_worker.contains(PollFlags::POLLIN) && !is_alive() => return,
                Ok(_) if of_worker.is_empty() => {}
                Err(nix::errno::Errno::EINTR) => {}
                // The application has closed the descriptor.
                Ok(_) | Err(_) => match sys::process_descriptor(worker) {
                    Ok(end) => own = Some(end),
                    Err(_) => std::thread::sleep(PEER_TIMEOUT / 100),
                },
            }
        }
    }
}

/// Returns the device and inode of an open descriptor.
fn identity_of(fd: BorrowedFd<'_>) -> Option<(u64, u64)> {
    let status = nix::sys::stat::fstat(fd).ok()?;
    Some((status.st_dev, status.st_ino))
}

/// Returns the error if the system does not support heirs, which need process descriptors (pidfd).
pub(crate) fn obstacle() -> Option<io::Error> {
    sys::process_descriptor(nix::unistd::getpid()).err().filter(lacks_call)
}

/// Whether the kernel lacks the system call, or a filter rejects it. Other errors may be temporary.
fn lacks_call(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::EPERM | libc::EACCES))
}

/// Creates the heir of the calling process, a worker with one thread. On failure, the worker runs without an heir.
///
/// # Errors
/// Fails if no memory is available for the journal or the line buffer, or if the worker itself has no free descriptor.
pub(crate) fn spawn(heritage: &Heritage) -> io::Result<Heir> {
    let journal = Journal::create()?;
    let lines = heritage.log_files.has_access_log().then(LineBuffer::create).transpose()?;
    // The pid must be read before the clone: the heir may already be an orphan when it reads its parent's pid.
    let worker = nix::unistd::getpid();
    let end_of_worker = sys::process_descriptor(worker);
    let mut retained = RetainedFds {
        worker: None,
        lifeline: heritage.lifeline.try_clone()?,
        _channel: Arc::clone(&heritage.handover),
        listeners: Arc::clone(&heritage.listeners),
        _log_files: Arc::clone(&heritage.log_files),
    };
    let heir = end_of_worker.and_then(|end| {
        retained.worker = Some(end);
        sys::clone_with_descriptors(NAME, || run(worker, heritage, journal, lines, &retained))
            .and_then(sys::process_descriptor)
    });
    match &heir {
        Ok(_) => {}
        // The master has already logged this.
        Err(error) if lacks_call(error) => log::debug!(slot = heritage.slot; "a worker has no heir: {error}"),
        Err(error) => log::warn!(
            slot = heritage.slot;
            "a worker has no heir, so its connections will end if it dies: {}", sys::explain(error)
        ),
    }
    Ok(Heir { journal, lines, end: heir.ok(), retained })
}

/// Runs the heir; returns its exit status. Signals stay blocked, as they were when the worker was forked.
fn run(worker: Pid, heritage: &Heritage, journal: Journal, lines: Option<LineBuffer>, retained: &RetainedFds) -> u8 {
    let Some(end) = &retained.worker else { return 0 };
    retained.await_death(worker, end);
    let settlement = OpenConnections::open(heritage, journal, retained.lifeline.as_fd());
    if let Some(lines) = lines {
        lines.write_out(|lines| write_last(heritage, lines));
    }
    settlement.close();
    logging::finish();
    0
}

/// Writes the access log lines that the worker had buffered.
fn write_last(heritage: &Heritage, lines: &[u8]) -> usize {
    if let (count, Err(error)) = heritage.log_files.write_access_within(lines, logging::last_flush_timeout()) {
        let lost = lines[count..].iter().filter(|&&byte| byte == b'\n').count();
        log::error!(slot = heritage.slot, lost; "cannot write a dead worker's last lines to the access log: {error}");
    }
    lines.len()
}

/// The connections of a dead worker.
struct OpenConnections<'a> {
    heritage: &'a Heritage,
    /// The lifeline, whose other end is closed when the master dies or stops immediately. `None` from then on.
    lifeline: Option<BorrowedFd<'a>>,
    /// Whether the system-wide limit on connections in transit has been reached.
    crowded: bool,
    passed_on: u32,
    /// Connections to be passed on, with their messages.
    handoffs: Vec<(OwnedFd, Vec<u8>)>,
    /// Connections that are closed as soon as the peer has closed them.
    leaving: Vec<OwnedFd>,
    answered: u32,
    cut: u32,
}

impl<'a> OpenConnections<'a> {
    /// Reads the records, closes all other descriptors, and settles each connection.
    fn open(heritage: &'a Heritage, journal: Journal, lifeline: BorrowedFd<'a>) -> Self {
        let (handoffs, leaving) = (Vec::new(), Vec::new());
        let mut settlement = Self {
            heritage,
            lifeline: Some(lifeline),
            crowded: false,
            passed_on: 0,
            handoffs,
            leaving,
            answered: 0,
            cut: 0,
        };
        let mut records: BTreeMap<RawFd, ConnRecord> =
            journal.descriptors().filter_map(|fd| Some((fd, journal.read_record(fd)?))).collect();
        let mut without_page = Vec::new();
        match journal.last_op() {
            LastOp::Settled => {}
            LastOp::Closing(fd) | LastOp::Passed(fd) => drop(records.remove(&fd)),
            LastOp::Received(fd, message) => {
                records.remove(&fd);
                without_page.push((fd, message));
            }
            LastOp::Accepting => without_page = settlement.unrecorded(&records),
        }
        let inherited = [heritage.handover.sender(), lifeline].map(|fd| fd.as_raw_fd());
        let connections = records.keys().chain(without_page.iter().map(|(fd, _)| fd));
        let logs = heritage.log_files.descriptors();
        let keep: Vec<RawFd> = [0, 1, 2].into_iter().chain(logs).chain(inherited).chain(connections.copied()).collect();
        sys::close_all_except(&keep);
        for (fd, record) in records {
            if let Some(connection) = sys::own(fd) {
                settlement.settle(connection, &record);
            }
        }
        let fresh = without_page.into_iter().filter_map(|(fd, message)| Some((sys::own(fd)?, message)));
        settlement.handoffs.extend(fresh);
        settlement
    }

    /// Returns connections that were accepted but have no record, with their handoff messages. There is at most one
    /// such connection.
    fn unrecorded(&self, records: &BTreeMap<RawFd, ConnRecord>) -> Vec<(RawFd, Vec<u8>)> {
        let candidates = sys::open_descriptors().unwrap_or_else(|_| (3..1 << 16).collect()); // no /proc here
        let has_page = |fd: &RawFd| usize::try_from(*fd).is_ok_and(|fd| fd < MAX_CONNECTIONS);
        let unknown = candidates.into_iter().filter(|fd| has_page(fd) && !records.contains_key(fd));
        unknown.filter_map(|fd| Some((fd, self.fresh(fd)?))).collect()
    }

    /// Returns the handoff message for `fd` if `fd` is a connection that one of this server's listeners accepted.
    fn fresh(&self, fd: RawFd) -> Option<Vec<u8>> {
        let ours: SockaddrStorage = getsockname(fd).ok()?;
        let peer: SockaddrStorage = getpeername(fd).ok()?; // a listener has no peer
        let listener = self.heritage.listeners.iter().position(|listener| listener.accepts_at(&ours))?;
        let origin = PackedOrigin::of_peer(sys::peer_address(&peer));
        Some(Handoff { listener: u16::try_from(listener).ok()?, origin, early: Vec::new() }.encode())
    }

    fn settle(&mut self, connection: OwnedFd, record: &ConnRecord) {
        let Settlement { say, then, answered, cut } = settle(record);
        (self.answered, self.cut) = (self.answered + answered, self.cut + cut);
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        let said = say.is_empty() || send(connection.as_raw_fd(), &say, flags) == Ok(say.len());
        match then {
            FinalStep::PassOn(early) if said => {
                let handoff = Handoff { listener: record.listener, origin: record.origin, early };
                self.handoffs.push((connection, handoff.encode()));
            }
            FinalStep::Close if said => {
                let _ = shutdown(connection.as_raw_fd(), Shutdown::Write);
                self.leaving.push(connection);
            }
            FinalStep::PassOn(_) | FinalStep::Close | FinalStep::Reset => {
                // The connection is reset, so that the peer cannot mistake its end for the end of a response.
                let at_once = libc::linger { l_onoff: 1, l_linger: 0 };
                let _ = setsockopt(&connection, sockopt::Linger, &at_once);
            }
        }
    }

    /// Passes on the connections in `handoffs`, and waits until the peers have closed the connections in `leaving`.
    fn close(mut self) {
        let slot = self.heritage.slot;
        let (begun, mut patience) = (Instant::now(), PEER_TIMEOUT);
        loop {
            self.hand_off();
            self.listen();
            let left = patience.saturating_sub(begun.elapsed());
            if left.is_zero() {
                self.leaving.clear();
            }
            if self.handoffs.is_empty() && self.leaving.is_empty() {
                break;
            }
            if !self.wait(left) {
                (self.lifeline, patience) = (None, STOP_PEER_TIMEOUT);
                self.handoffs.clear(); // no worker receives them
            }
        }
        let Self { answered, cut, passed_on, .. } = self;
        if answered > 0 || cut > 0 || passed_on > 0 {
            log::info!(slot, answered, cut, passed_on; "took over the connections of a dead worker");
        }
    }

    fn hand_off(&mut self) {
        let channel = self.heritage.handover.sender();
        self.crowded = false;
        let Self { handoffs, crowded, passed_on, cut, .. } = self;
        handoffs.retain(|(connection, message)| match handover::hand_off(channel, connection.as_fd(), message) {
            Ok(()) => {
                *passed_on += 1;
                false
            }
            Err(error) if handover::is_for_later(&error) => {
                *crowded |= error.kind() != io::ErrorKind::WouldBlock;
                true
            }
            Err(_) => {
                *cut += 1;
                false
            }
        });
    }

    /// Discards the input of the connections in `leaving`, and closes those that their peers have closed.
    fn listen(&mut self) {
        self.leaving.retain(|connection| {
            let mut sink = [0; 16 << 10];
            for _ in 0..64 {
                match recv(connection.as_raw_fd(), &mut sink, MsgFlags::MSG_DONTWAIT) {
                    Ok(1..) => {}
                    Err(nix::errno::Errno::EAGAIN) => return true,
                    Ok(0) | Err(_) => return false,
                }
            }
            true
        });
    }

    /// Waits for an event, for at most `left` if connections are leaving. Returns false if the lifeline has ended.
    fn wait(&self, left: Duration) -> bool {
        let mut events: Vec<_> = self.lifeline.iter().map(|&end| PollFd::new(end, PollFlags::POLLIN)).collect();
        if !self.handoffs.is_empty() && !self.crowded {
            events.push(PollFd::new(self.heritage.handover.sender(), PollFlags::POLLOUT));
        }
        events.extend(self.leaving.iter().map(|connection| PollFd::new(connection.as_fd(), PollFlags::POLLIN)));
        let timeout = match self.leaving.len() {
            // No event occurs when the system-wide limit permits one more connection in transit, so the heir tries
            // again soon.
            _ if self.crowded => PollTimeout::from(20_u8),
            0 => PollTimeout::NONE,
            _ => PollTimeout::try_from(left.as_millis() + 1).unwrap_or(PollTimeout::MAX),
        };
        let _ = poll(&mut events, timeout); // if it fails, the next round begins earlier
        self.lifeline.is_none() || !events.first().and_then(PollFd::any).unwrap_or(false)
    }
}

/// Returns the protocol that the heir assumes for a listener's connections until the worker has detected the actual
/// one.
pub(crate) fn wire_protocol_of(protocol: Protocol) -> WireProtocol {
    match protocol {
        Protocol::FastCgi => WireProtocol::FastCgi,
        Protocol::Scgi => WireProtocol::Scgi,
        Protocol::Http => WireProtocol::Http1,
    }
}
