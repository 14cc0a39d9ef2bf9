//! The heir: a process beside each worker that sees to it that the worker's death costs its clients as little as can be.
//!
//! ```text
//! worker dies ─▶ every request in flight: 502 ─▶ kept connections: to another worker ─▶ the rest: closed
//! ```
//!
//! An heir is a clone of its worker that shares its table of descriptors (`clone(2)`, CLONE_FILES) and nothing else. While
//! the worker lives it sleeps, and a connection costs neither of them a system call. When the worker dies, by whatever
//! signal, the table stays, and with it every connection, open; the [`journal`] tells what each was at, and [`settlement`] what
//! becomes of it.
//!
//! - The heir is made right after the fork, when the worker has one thread, and before anything of the application
//!   runs. It never touches the application's memory, the page cache or tokio.
//! - First it closes all descriptors that are not connections: the kernel takes locks by them for a sign of life.
//! - It is no child that the application could wait for (its exit signal is none). When the worker is dead it is the
//!   master's, who reaps it.
//! - Killed itself, it takes nothing along: its worker asks to be replaced. Killed together with its worker, the
//!   connections break off.
//!
//! May not: believe the journal more than its own safety allows; wait for anybody longer than [`PEER_TIMEOUT`].

pub(crate) mod journal;
pub(crate) mod settlement;

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    MsgFlags, Shutdown, SockaddrStorage, getpeername, getsockname, recv, send, setsockopt, shutdown, sockopt,
};
use nix::unistd::{Pid, setpgid};

use self::journal::{ConnRecord, Journal, LastOp, MAX_CONNECTIONS, WireProtocol};
use self::settlement::{Settlement, Then, settle};
use crate::config::address::Protocol;
use crate::heritage::Heritage;
use crate::logging::files::LogFiles;
use crate::logging::line_buffer::LineBuffer;
use crate::net::handover::{self, Channel, Handoff, PackedOrigin};
use crate::net::listen::{Closing, Listener};
use crate::{logging, sys};

/// How long peers that have been told that it is over are listened to, so that they hear it: closed before, a connection on which they
/// still send would be reset, and what they were told be lost.
const PEER_TIMEOUT: Duration = Duration::from_secs(2);
/// The same when the server stops at once, or the master is dead.
const STOP_PEER_TIMEOUT: Duration = Duration::from_millis(250);
/// When the master is dead: how long a worker may take to accept what is queued before its sockets are closed, and how often that is
/// looked at, in milliseconds.
const QUEUE_TIMEOUT: Duration = Duration::from_secs(1);
const QUEUE_POLL_INTERVAL_MS: u8 = 5;

/// What a worker has of its heir.
#[derive(Debug)]
pub(crate) struct Heir {
    pub(crate) journal: Journal,
    /// For the access log, if there is one.
    pub(crate) lines: Option<LineBuffer>,
    /// Readable when the heir is dead. None if there is no heir.
    pub(crate) end: Option<OwnedFd>,
    /// What the heir goes by: it has to stay open as long as the worker lives.
    pub(crate) retained: RetainedFds,
}

/// Descriptors that the heir uses, and the worker must not close.
#[derive(Debug)]
pub(crate) struct RetainedFds {
    /// None without an heir.
    worker: Option<OwnedFd>,
    /// The worker gives up its own when it leaves.
    lifeline: OwnedFd,
    _channel: Arc<Channel>,
    listeners: Arc<[Listener]>,
    _log_files: Arc<LogFiles>,
}

impl RetainedFds {
    /// Has worker and heir hold the listening sockets no longer.
    pub(crate) fn give_up(&self, listeners: &[Listener]) {
        listeners.iter().for_each(|listener| listener.give_up(&self.lifeline));
    }

    /// Returns when the worker is dead. If the master dies before, its sockets are closed: a worker whose event loop is
    /// busy may be long in coming to that.
    fn await_death(&self, worker: Pid, end: &OwnedFd) {
        let is_lifeline = identity_of(self.lifeline.as_fd());
        let mut has_master = true;
        let mut closing = None;
        let mut own = None;
        let is_alive = || nix::unistd::getppid() == worker;
        // No descriptor must be changed before: they are the worker's.
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
                // The application may have closed it, and the number be another's.
                if is_lifeline.is_some() && identity_of(self.lifeline.as_fd()) == is_lifeline {
                    closing = Some(Closing::begin(&self.listeners, QUEUE_TIMEOUT, Duration::ZERO));
                }
            }
            if let Some(sockets) = &mut closing {
                sockets.advance(
                    &self.listeners,
                    |listener| sys::tcp_queue(listener.as_fd()).unwrap_or(0),
                    Instant::now(),
                );
            }
            closing = closing.filter(|sockets| !sockets.is_over());
            match polled {
                // What is readable may be a stranger's: then the worker is still our parent.
                Ok(_) if of_worker.contains(PollFlags::POLLIN) && !is_alive() => return,
                Ok(_) if of_worker.is_empty() => {}
                Err(nix::errno::Errno::EINTR) => {}
                // The application has closed it.
                Ok(_) | Err(_) => match sys::process_descriptor(worker) {
                    Ok(end) => own = Some(end),
                    Err(_) => std::thread::sleep(PEER_TIMEOUT / 100),
                },
            }
        }
    }
}

/// What a descriptor stands for.
fn identity_of(fd: BorrowedFd<'_>) -> Option<(u64, u64)> {
    let status = nix::sys::stat::fstat(fd).ok()?;
    Some((status.st_dev, status.st_ino))
}

/// Why processes of this machine can have no heir, if that is so: an heir goes by descriptors of processes.
pub(crate) fn obstacle() -> Option<io::Error> {
    sys::process_descriptor(nix::unistd::getpid()).err().filter(lacks_call)
}

/// Whether the kernel, or a filter of system calls, does not have the call; other errors may be gone the next time.
fn lacks_call(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::EPERM | libc::EACCES))
}

/// Makes the heir of the process that calls this: a worker with one thread. Without an heir the worker can live.
///
/// # Errors
/// If there is no memory for the journal, or no descriptor for what the worker itself needs.
pub(crate) fn spawn(heritage: &Heritage) -> io::Result<Heir> {
    let journal = Journal::create()?;
    let lines = heritage.log_files.has_access_log().then(LineBuffer::create).transpose()?;
    // Asked here: an heir that asks who its parent is may be an orphan already.
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
        sys::clone_with_descriptors(|| run(worker, heritage, journal, lines, &retained))
            .and_then(sys::process_descriptor)
    });
    match &heir {
        Ok(_) => {}
        // The master has said so, once for all.
        Err(error) if lacks_call(error) => log::debug!("a worker has no heir: {error} slot={}", heritage.slot),
        Err(error) => {
            let slot = heritage.slot;
            log::warn!(
                "a worker has no heir, and its clients would see its death: {} slot={slot}",
                sys::explain(error)
            );
        }
    }
    Ok(Heir { journal, lines, end: heir.ok(), retained })
}

/// The heir's life. Signals are blocked, as they were when the worker was forked, and stay so.
fn run(worker: Pid, heritage: &Heritage, journal: Journal, lines: Option<LineBuffer>, retained: &RetainedFds) -> u8 {
    let _ = nix::sys::prctl::set_name(c"heir"); // for `ps`
    let _ = setpgid(Pid::from_raw(0), Pid::from_raw(0)); // else a signal to the worker's group ends both
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

/// Writes the lines of the access log that the worker had no time for.
fn write_last(heritage: &Heritage, lines: &[u8]) -> usize {
    if let (count, Err(error)) = heritage.log_files.write_access_within(lines, logging::last_flush_timeout()) {
        let lost = lines[count..].iter().filter(|&&byte| byte == b'\n').count();
        log::error!(
            "the last lines of a dead worker's access log are lost: {error} slot={} lost={lost}",
            heritage.slot
        );
    }
    lines.len()
}

/// The connections of a dead worker.
struct OpenConnections<'a> {
    heritage: &'a Heritage,
    /// At its end the master is dead, or stops at once. `None` from then on.
    lifeline: Option<BorrowedFd<'a>>,
    /// Too many connections are on their way in the whole system.
    crowded: bool,
    passed_on: u32,
    /// To be passed on, with their messages.
    handoffs: Vec<(OwnedFd, Vec<u8>)>,
    /// Told that it is over.
    leaving: Vec<OwnedFd>,
    answered: u32,
    cut: u32,
}

impl<'a> OpenConnections<'a> {
    /// Takes stock, closes all other descriptors, and settles.
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

    /// Connections that were accepted and not entered, with the messages by which they are passed on: the last one.
    fn unrecorded(&self, records: &BTreeMap<RawFd, ConnRecord>) -> Vec<(RawFd, Vec<u8>)> {
        let candidates = sys::open_descriptors().unwrap_or_else(|_| (3..1 << 16).collect()); // no /proc here
        let has_page = |fd: &RawFd| usize::try_from(*fd).is_ok_and(|fd| fd < MAX_CONNECTIONS);
        let unknown = candidates.into_iter().filter(|fd| has_page(fd) && !records.contains_key(fd));
        unknown.filter_map(|fd| Some((fd, self.fresh(fd)?))).collect()
    }

    /// The message of a connection of which nothing was read, if `fd` is one, and ours.
    fn fresh(&self, fd: RawFd) -> Option<Vec<u8>> {
        let ours: SockaddrStorage = getsockname(fd).ok()?;
        let peer: SockaddrStorage = getpeername(fd).ok()?; // a listener has none
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
            Then::PassOn(early) if said => {
                let handoff = Handoff { listener: record.listener, origin: record.origin, early };
                self.handoffs.push((connection, handoff.encode()));
            }
            Then::Close if said => {
                let _ = shutdown(connection.as_raw_fd(), Shutdown::Write);
                self.leaving.push(connection);
            }
            Then::PassOn(_) | Then::Close | Then::Reset => {
                // So that nobody takes the end of the connection for the end of a response.
                let at_once = libc::linger { l_onoff: 1, l_linger: 0 };
                let _ = setsockopt(&connection, sockopt::Linger, &at_once);
            }
        }
    }

    /// Passes on what can be passed on, and waits until those that leave have heard.
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
                self.handoffs.clear(); // nobody takes what is passed on
            }
        }
        let Self { answered, cut, passed_on, .. } = self;
        if answered > 0 || cut > 0 || passed_on > 0 {
            log::info!("connections settled slot={slot} answered={answered} cut={cut} passed_on={passed_on}");
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

    /// Reads and forgets what the leaving still send, and closes those that have left.
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

    /// Waits for something to happen, and at most `left` for those who leave. False if the lifeline has ended.
    fn wait(&self, left: Duration) -> bool {
        let mut events: Vec<_> = self.lifeline.iter().map(|&end| PollFd::new(end, PollFlags::POLLIN)).collect();
        if !self.handoffs.is_empty() && !self.crowded {
            events.push(PollFd::new(self.heritage.handover.sender(), PollFlags::POLLOUT));
        }
        events.extend(self.leaving.iter().map(|connection| PollFd::new(connection.as_fd(), PollFlags::POLLIN)));
        let timeout = match self.leaving.len() {
            // Nobody tells when there is room again in the whole system.
            _ if self.crowded => PollTimeout::from(20_u8),
            0 => PollTimeout::NONE,
            _ => PollTimeout::try_from(left.as_millis() + 1).unwrap_or(PollTimeout::MAX),
        };
        let _ = poll(&mut events, timeout); // if it fails, the next round is just earlier
        self.lifeline.is_none() || !events.first().and_then(PollFd::any).unwrap_or(false)
    }
}

/// What connections of a listener speak, until more is known.
pub(crate) fn wire_protocol_of(protocol: Protocol) -> WireProtocol {
    match protocol {
        Protocol::FastCgi => WireProtocol::FastCgi,
        Protocol::Scgi => WireProtocol::Scgi,
        Protocol::Http => WireProtocol::Http1,
    }
}
