//! Runs the relay: a process alongside the workers that receives events as datagrams and publishes them. The master
//! does not do this, because it must not take a lock in shared memory.
//!
//! ```text
//! programs ── datagrams ──▶ the publish socket ──▶ relay ──▶ the event log
//! ```
//!
//! The relay takes one datagram at a time. If the relay dies, the other datagrams stay in the socket: at most the
//! current datagram is lost, and none is published twice. The relay's lifeline is closed when the master exits, and
//! when a new build replaces the master. The relay then publishes the datagrams that it can publish without waiting,
//! and exits.
//!
//! The relay reports on standard error, which the master logs. The relay must not write to log files itself, because it
//! does not reopen them. This module must not depend on the master or the workers.

mod datagram;
mod refused_datagrams;

use std::io::{self, IoSliceMut};
use std::ops::ControlFlow;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd};
use std::time::{Duration, Instant};

use forkyard_shm::{Events, PublishError, Segment};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, recvmsg};

use self::datagram::Datagram;
use self::refused_datagrams::Complaints;
pub(crate) use self::refused_datagrams::RefusedDatagrams;

/// The first line that the relay writes.
pub(crate) const READY: &str = "ready";
/// Number of bytes in a datagram in addition to the event's name and data: the topic, and two line feeds.
const FRAME: usize = 128 + 2;
/// Number of datagrams between two checks of the lifeline.
const BATCH: usize = 64;
/// How long the relay waits for the event log's lock while other processes hold it.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);
/// Interval between attempts to publish while other processes hold the event log's lock.
const BUSY_INTERVAL: Duration = Duration::from_millis(10);

/// Publishes the datagrams from `socket` until the other end of `lifeline` is closed. Returns the exit status.
pub(crate) fn run(socket: BorrowedFd<'_>, lifeline: BorrowedFd<'_>, segment: &Segment) -> u8 {
    let events = segment.events();
    let most = usize::try_from(events.max_event()).unwrap_or(usize::MAX).saturating_add(FRAME);
    let mut relay = Relay {
        socket,
        lifeline,
        events,
        begun: Instant::now(),
        complaints: Complaints::default(),
        busy_timeout: BUSY_TIMEOUT,
    };
    say(READY);
    match relay.work(&mut vec![0; most]) {
        Ok(()) => 0,
        Err(error) => {
            say(&format!("cannot continue: {error}"));
            1
        }
    }
}

struct Relay<'a> {
    socket: BorrowedFd<'a>,
    lifeline: BorrowedFd<'a>,
    events: Events,
    begun: Instant,
    complaints: Complaints,
    /// How long to wait for the log. Zero after a wait that timed out, until an event can be published again.
    busy_timeout: Duration,
}

/// The result of a read from the socket.
enum Received {
    Nothing,
    Whole(usize),
    /// A datagram that is longer than any event.
    TooLong,
}

impl Relay<'_> {
    fn work(&mut self, buffer: &mut [u8]) -> io::Result<()> {
        loop {
            let due = self.complaints.due_in(self.begun.elapsed());
            let ended = wait(self.lifeline, Some(self.socket), due)?;
            if ended {
                return Ok(());
            }
            for _ in 0..BATCH {
                match take(self.socket, buffer)? {
                    Received::Nothing => break,
                    Received::TooLong => self.complaints.add(PublishError::TooLong { most: self.events.max_event() }),
                    Received::Whole(count) => {
                        if self.publish(&buffer[..count])?.is_break() {
                            return Ok(()); // the next relay takes the waiting datagrams
                        }
                    }
                }
            }
            if let Some(report) = self.complaints.take(self.begun.elapsed()) {
                say(&serde_json::to_string(&report)?);
            }
        }
    }

    /// Publishes an event. Returns `Break` if the lifeline is closed while other processes hold the event log's lock.
    fn publish(&mut self, bytes: &[u8]) -> io::Result<ControlFlow<()>> {
        let Datagram { topic, name, data } = match Datagram::parse(bytes) {
            Ok(datagram) => datagram,
            Err(why) => {
                self.complaints.add(why);
                return Ok(ControlFlow::Continue(()));
            }
        };
        let begun = Instant::now();
        loop {
            match self.events.publish(topic, name, data) {
                Ok(_) => self.busy_timeout = BUSY_TIMEOUT,
                Err(PublishError::Busy) if begun.elapsed() < self.busy_timeout => {
                    // While the relay waits, the senders wait too.
                    if wait(self.lifeline, None, Some(BUSY_INTERVAL))? {
                        return Ok(ControlFlow::Break(()));
                    }
                    continue;
                }
                Err(error) => {
                    if error == PublishError::Busy {
                        self.busy_timeout = Duration::ZERO;
                    }
                    self.complaints.add(error);
                }
            }
            return Ok(ControlFlow::Continue(()));
        }
    }
}

/// Waits for the socket, for up to `longest`. Returns whether the lifeline has ended.
fn wait(lifeline: BorrowedFd<'_>, socket: Option<BorrowedFd<'_>>, longest: Option<Duration>) -> io::Result<bool> {
    let timeout = longest.map_or(PollTimeout::NONE, |longest| {
        PollTimeout::try_from(longest.as_millis() + 1).unwrap_or(PollTimeout::MAX)
    });
    let watched = [lifeline].into_iter().chain(socket);
    let mut watched: Vec<PollFd<'_>> = watched.map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
    match poll(&mut watched, timeout) {
        Ok(_) => Ok(watched[0].any().unwrap_or(true)),
        Err(Errno::EINTR) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

/// Takes a datagram from the socket.
fn take(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<Received> {
    let received = recvmsg::<()>(socket.as_raw_fd(), &mut [IoSliceMut::new(buffer)], None, MsgFlags::MSG_DONTWAIT)
        .map(|message| (message.bytes, message.flags));
    match received {
        Ok((_, flags)) if flags.contains(MsgFlags::MSG_TRUNC) => Ok(Received::TooLong),
        Ok((count, _)) => Ok(Received::Whole(count)),
        Err(Errno::EAGAIN | Errno::EINTR) => Ok(Received::Nothing),
        Err(errno) => Err(errno.into()),
    }
}

/// Writes a line to the master. Errors are ignored.
pub(crate) fn say(line: &str) {
    let _ = nix::unistd::write(io::stderr().as_fd(), format!("{line}\n").as_bytes());
}
