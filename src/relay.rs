//! The relay: a process beside the workers that publishes what comes as datagrams, since the master may not.
//!
//! ```text
//! programs ── datagrams ──▶ the publish socket ──▶ relay ──▶ the event log
//! ```
//!
//! Whatever it has not taken out of the socket waits there, should it die: so at most the datagram that it was at is lost,
//! and none comes twice. It takes one at a time for that reason. It ends when the lifeline does, after those that it can
//! publish at once: at the end of the master, and when the master becomes another build.
//!
//! It says on standard error what it has to say, which the master logs. It may not: write logs by itself, which are not
//! reopened here; know the master or the workers.

mod complaints;
mod datagram;

use std::io::{self, IoSliceMut};
use std::ops::ControlFlow;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd};
use std::time::{Duration, Instant};

use forkyard_shm::{Events, PublishError, Segment};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, recvmsg};

use self::complaints::Complaints;
use self::datagram::Datagram;

/// What it says first.
pub(crate) const READY: &str = "ready";
/// Bytes of a datagram beside the event's: its topic, and two line ends.
const FRAME: usize = 128 + 2;
/// Datagrams between two looks at the lifeline.
const BATCH: usize = 64;
/// How long the log is waited for if somebody holds it, and how often it is tried.
const PATIENCE: Duration = Duration::from_secs(5);
const NAP: Duration = Duration::from_millis(10);

/// Publishes what comes to `socket` until `lifeline` ends. Returns the exit status.
pub(crate) fn run(socket: BorrowedFd<'_>, lifeline: BorrowedFd<'_>, segment: &Segment) -> u8 {
    let events = segment.events();
    let most = usize::try_from(events.max_event()).unwrap_or(usize::MAX).saturating_add(FRAME);
    let mut relay = Relay {
        socket,
        lifeline,
        events,
        begun: Instant::now(),
        complaints: Complaints::default(),
        patience: PATIENCE,
    };
    say(READY);
    match relay.work(&mut vec![0; most]) {
        Ok(()) => 0,
        Err(error) => {
            say(&format!("cannot go on: {error}"));
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
    /// None after it was of no avail, until something can be published again.
    patience: Duration,
}

/// What was in the socket.
enum Taken {
    Nothing,
    Whole(usize),
    /// Longer than any event.
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
                    Taken::Nothing => break,
                    Taken::TooLong => self.complaints.add(PublishError::TooLong { most: self.events.max_event() }),
                    Taken::Whole(count) => {
                        if self.publish(&buffer[..count])?.is_break() {
                            return Ok(()); // what still waits is for the next relay
                        }
                    }
                }
            }
            if let Some(line) = self.complaints.take(self.begun.elapsed()) {
                say(&line);
            }
        }
    }

    /// Breaks off if the lifeline ends while others hold the log.
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
                Ok(_) => self.patience = PATIENCE,
                Err(PublishError::Busy) if begun.elapsed() < self.patience => {
                    // The senders wait meanwhile.
                    if wait(self.lifeline, None, Some(NAP))? {
                        return Ok(ControlFlow::Break(()));
                    }
                    continue;
                }
                Err(error) => {
                    if error == PublishError::Busy {
                        self.patience = Duration::ZERO;
                    }
                    self.complaints.add(error);
                }
            }
            return Ok(ControlFlow::Continue(()));
        }
    }
}

/// Waits for the socket, and for no longer than `longest`. Returns whether the lifeline has ended.
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

/// Takes a datagram out of the socket.
fn take(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<Taken> {
    let received = recvmsg::<()>(socket.as_raw_fd(), &mut [IoSliceMut::new(buffer)], None, MsgFlags::MSG_DONTWAIT)
        .map(|message| (message.bytes, message.flags));
    match received {
        Ok((_, flags)) if flags.contains(MsgFlags::MSG_TRUNC) => Ok(Taken::TooLong),
        Ok((count, _)) => Ok(Taken::Whole(count)),
        Err(Errno::EAGAIN | Errno::EINTR) => Ok(Taken::Nothing),
        Err(errno) => Err(errno.into()),
    }
}

/// Says a line to the master; if nobody listens, to nobody.
pub(crate) fn say(line: &str) {
    let _ = nix::unistd::write(io::stderr().as_fd(), format!("{line}\n").as_bytes());
}
