//! Sends notifications to the service manager (`sd_notify(3)`): datagrams to the socket named by `NOTIFY_SOCKET`,
//! without waiting. If that variable is not set, nothing is sent.
//!
//! The existing crates send blocking datagrams. The master must not block outside its one wait point, so this module sends the datagrams
//! itself.

use std::collections::VecDeque;
use std::io::IoSlice;
use std::os::fd::{AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, sendmsg, socket};
use nix::time::{ClockId, clock_gettime};

/// The variables of this protocol. They are for the master only, and are not passed on.
pub(crate) const VARIABLES: [&str; 3] = ["NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"];
/// How often to report progress during shutdown or a reload, and by how much each report extends the manager's time
/// limit.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(5);
const EXTEND_TIMEOUT_US: u64 = 20_000_000;
/// How often to retry while the manager's queue is full.
const RETRY_INTERVAL: Duration = Duration::from_millis(100);
const MAX_UNSENT: usize = 8;

/// The last state sent to the manager.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Starting,
    Ready,
    Reloading,
    Stopping,
}

/// The connection to the service manager, if there is one.
#[derive(Debug)]
pub(crate) struct Notify {
    socket: Option<(OwnedFd, UnixAddr)>,
    /// Interval between watchdog messages: half of the time that the manager allows.
    watchdog: Option<Duration>,
    phase: Phase,
    next_watchdog: Option<Instant>,
    next_progress: Option<Instant>,
    /// States that did not fit into the manager's queue, the oldest first.
    unsent: VecDeque<String>,
    next_try: Option<Instant>,
    /// Whether the last message could not be sent. Only the first of several consecutive failures is logged.
    is_unreachable: bool,
}

impl Notify {
    /// Reads the settings from the environment.
    pub(crate) fn from_environment(now: Instant) -> Self {
        let address = std::env::var_os("NOTIFY_SOCKET").and_then(|path| match path.as_bytes() {
            [b'@', name @ ..] => UnixAddr::new_abstract(name).ok(),
            path @ [b'/', ..] => UnixAddr::new(path).ok(),
            _ => None,
        });
        let socket = address.and_then(|address| {
            let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
            Some((socket(AddressFamily::Unix, SockType::Datagram, flags, None).ok()?, address))
        });
        let number = |name: &str| std::env::var(name).ok()?.parse::<u64>().ok();
        // An upgrade keeps the pid, so the comparison stays valid.
        let ours = number("WATCHDOG_PID").is_none_or(|pid| pid == u64::from(std::process::id()));
        let allowed = number("WATCHDOG_USEC").filter(|&us| ours && us > 0 && socket.is_some());
        let watchdog = allowed.map(|us| Duration::from_micros(us / 2).max(Duration::from_millis(1)));
        Self {
            socket,
            watchdog,
            phase: Phase::Starting,
            next_watchdog: watchdog.map(|_| now),
            next_progress: None,
            unsent: VecDeque::new(),
            next_try: None,
            is_unreachable: false,
        }
    }

    /// Reports that the server serves: all workers are ready, or a reload has ended.
    pub(crate) fn ready(&mut self, status: &str) {
        self.enter(Phase::Ready, &format!("READY=1\nSTATUS={status}"));
    }

    pub(crate) fn reloading(&mut self) {
        let now = clock_gettime(ClockId::CLOCK_MONOTONIC).map(Duration::from).unwrap_or_default();
        let text = format!("RELOADING=1\nMONOTONIC_USEC={}\nSTATUS=replacing the workers", now.as_micros());
        self.enter(Phase::Reloading, &text);
    }

    pub(crate) fn stopping(&mut self) {
        self.enter(Phase::Stopping, "STOPPING=1\nSTATUS=finishing the current requests");
    }

    /// Sends a status text.
    pub(crate) fn status(&mut self, text: &str) {
        self.send(&format!("STATUS={text}"), true);
    }

    /// Stores the shared memory in the service manager for the next startup of the service.
    pub(crate) fn store(&mut self, name: &str, memory: BorrowedFd<'_>) {
        // Remove what a former server stored under this name, because the manager would otherwise keep both.
        let _ = self.try_send(&format!("FDSTOREREMOVE=1\nFDNAME={name}"), None);
        let _ = self.try_send(&format!("FDSTORE=1\nFDNAME={name}\nFDPOLL=0"), Some(memory)); // systemd keeps it only with FDPOLL=0
    }

    /// Removes what a former server stored under this name.
    pub(crate) fn forget(&mut self, name: &str) {
        self.send(&format!("FDSTOREREMOVE=1\nFDNAME={name}"), true);
    }

    /// Returns the time until [`Notify::tick`] is due.
    pub(crate) fn due_in(&self, now: Instant) -> Option<Duration> {
        let due = [self.next_watchdog, self.next_progress, self.next_try].into_iter().flatten().min();
        due.map(|due| due.saturating_duration_since(now))
    }

    /// Sends what is due.
    pub(crate) fn tick(&mut self, now: Instant) {
        if self.next_try.take_if(|due| *due <= now).is_some() {
            self.send_again();
        }
        if let (Some(interval), Some(_)) = (self.watchdog, self.next_watchdog.take_if(|due| *due <= now)) {
            self.send("WATCHDOG=1", false);
            self.next_watchdog = Some(now + interval);
        }
        if self.next_progress.take_if(|due| *due <= now).is_some() {
            self.send(&format!("EXTEND_TIMEOUT_USEC={EXTEND_TIMEOUT_US}"), false);
            self.next_progress = Some(now + PROGRESS_INTERVAL);
        }
    }

    fn enter(&mut self, phase: Phase, text: &str) {
        if self.phase == Phase::Stopping || self.socket.is_none() {
            return;
        }
        self.phase = phase;
        self.send(text, true);
        self.next_progress = matches!(phase, Phase::Reloading | Phase::Stopping).then(Instant::now);
    }

    /// Sends a message. With `keep`, a message that does not fit into the manager's queue is sent later. Watchdog
    /// messages are not kept, because the next one follows soon.
    fn send(&mut self, text: &str, keep: bool) {
        if self.unsent.is_empty() && self.try_send(text, None) != Err(Errno::EAGAIN) {
            return;
        }
        if keep {
            if self.unsent.len() == MAX_UNSENT {
                self.unsent.pop_front();
            }
            self.unsent.push_back(text.to_owned());
            self.next_try = Some(Instant::now() + RETRY_INTERVAL);
        }
    }

    fn send_again(&mut self) {
        while let Some(text) = self.unsent.pop_front() {
            if self.try_send(&text, None) == Err(Errno::EAGAIN) {
                self.unsent.push_front(text);
                self.next_try = Some(Instant::now() + RETRY_INTERVAL);
                return;
            }
        }
    }

    fn try_send(&mut self, text: &str, descriptor: Option<BorrowedFd<'_>>) -> Result<(), Errno> {
        let Some((socket, address)) = &self.socket else { return Ok(()) };
        let scaling: Vec<_> = descriptor.iter().map(|fd| fd.as_raw_fd()).collect();
        let rights = [ControlMessage::ScmRights(&scaling)];
        let rights = if scaling.is_empty() { &[] } else { &rights[..] };
        let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
        let sent = sendmsg(socket.as_raw_fd(), &[IoSlice::new(text.as_bytes())], rights, flags, Some(address));
        if let (Err(errno), false) = (sent, self.is_unreachable) {
            log::warn!(notification = text; "cannot notify the service manager: {}", errno.desc());
        }
        self.is_unreachable = sent.is_err();
        sent.map(drop)
    }
}
