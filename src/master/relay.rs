//! Starts and supervises the relay process. The master starts a relay when a datagram is waiting in the publish socket
//! and no relay is running. The master kills a relay that makes no progress while datagrams are waiting, for example
//! because a signal has stopped it; otherwise publishers would wait forever. [`crate::relay`] contains the code that
//! the relay runs.
//!
//! The master never reads from the socket. It only checks whether a datagram is waiting: continuously while no relay is
//! running, and periodically while one is running.

use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, Uid, pipe2, setpgid};

use super::output::{LineReader, MAX_REST};
use super::pool::spawn::Spawner;
use super::pool::supervisor::{Breaker, Uptime};
use super::signals::SignalInbox;
use super::stall::Stall;
use crate::config::privileges::Owner;
use crate::config::{Config, in_ms};
use crate::logging;
use crate::net::publish_socket::PublishSocket;
use crate::privileges::Privileges;
use crate::relay::{self, RefusedDatagrams};
use crate::sys::{self, Ending};
use crate::upgrade::saved_state::SavedPublish;

/// Maximum number of bytes of the relay's output that are read in one iteration of the master's loop.
const READ_BUDGET: usize = 4 << 10;
/// How long a relay may take to exit on request.
const STOP_TIMEOUT: Duration = Duration::from_secs(2);

/// The publish socket and the current relay process.
pub(super) struct Relay {
    /// `None` without an event log.
    socket: Option<PublishSocket>,
    state: State,
    breaker: Breaker,
}

enum State {
    None,
    Works(Process),
    /// The relay was asked to exit, and is killed at the deadline.
    Ends {
        pid: Pid,
        deadline: Option<Uptime>,
    },
    /// No further relay is started.
    Over,
}

struct Process {
    pid: Pid,
    since: Instant,
    /// Whether the relay has reported that it is ready.
    ready: bool,
    output: LineReader,
    open: bool,
    stall: Stall,
    /// Whether the relay was killed because it made no progress.
    is_given_up: bool,
    /// The relay exits when this descriptor is closed.
    _lifeline: OwnedFd,
}

impl Relay {
    pub(super) fn new(socket: Option<PublishSocket>) -> Self {
        Self { socket, state: State::None, breaker: Breaker::default() }
    }

    /// Returns the path by which programs reach the publish socket, or `None` if they cannot reach it.
    pub(super) fn seen_by_programs(&self, config: &Config) -> Option<PathBuf> {
        let socket = self.socket.as_ref()?;
        let seen = socket.seen_from(config.privileges.chroot.as_deref());
        if seen.is_none() {
            log::warn!(
                socket:% = socket.path().display();
                "programs cannot reach the publish socket (choose a path inside --chroot with --events-socket)"
            );
        }
        seen
    }

    /// Changes the owner of the publish socket.
    ///
    /// # Errors
    /// Returns the error from the system call.
    pub(super) fn give_socket(&self, from: Uid, to: Owner) -> io::Result<()> {
        self.socket.as_ref().map_or(Ok(()), |socket| socket.give(from, to))
    }

    pub(super) fn save_socket(&self) -> Option<SavedPublish> {
        let socket = self.socket.as_ref()?;
        let (asked, path) = (socket.asked().map(ToOwned::to_owned), socket.path().to_owned());
        Some(SavedPublish { fd: socket.raw(), asked, path, file: socket.file() })
    }

    /// Returns the pid of the running relay.
    pub(super) fn pid(&self) -> Option<Pid> {
        match &self.state {
            State::Works(Process { pid, .. }) | State::Ends { pid, .. } => Some(*pid),
            State::None | State::Over => None,
        }
    }

    /// Takes over the relay of a former master. The relay's lifeline has closed, so the relay is about to exit.
    pub(super) fn adopt(&mut self, pid: Pid, now: Uptime) {
        self.state = State::Ends { pid, deadline: Some(now + STOP_TIMEOUT) };
    }

    /// Returns the descriptor to watch for input.
    pub(super) fn watched(&self, now: Uptime) -> Option<BorrowedFd<'_>> {
        match &self.state {
            State::None => {
                self.socket.as_ref().filter(|_| now >= self.breaker.open_until()).map(|socket| socket.as_fd())
            }
            State::Works(process) => process.open.then(|| process.output.as_fd()),
            State::Ends { .. } | State::Over => None,
        }
    }

    pub(super) fn next_deadline(&self, now: Uptime) -> Option<Uptime> {
        match &self.state {
            State::None => self.socket.as_ref().map(|_| self.breaker.open_until()).filter(|until| *until > now),
            State::Ends { deadline, .. } => *deadline,
            State::Works(process) => (!process.is_given_up).then(|| process.stall.next_look()),
            State::Over => None,
        }
    }

    /// Logs the relay's output, and starts a relay if a datagram is waiting.
    pub(super) fn turn(&mut self, spawner: &Spawner, signals: &SignalInbox, now: Uptime) {
        match &mut self.state {
            State::Works(process) => {
                process.read_child(READ_BUDGET, &mut self.breaker);
                if let Some(socket) = self.socket.as_ref().filter(|_| now >= process.stall.next_look()) {
                    process.look(socket, now);
                }
            }
            State::Ends { pid, deadline } => {
                if deadline.take_if(|deadline| *deadline <= now).is_some() {
                    log::warn!(pid = pid.as_raw(); "killed the relay, because it did not exit in time");
                    let _ = kill(*pid, Signal::SIGKILL);
                }
            }
            State::None => {
                if let Some(socket) = self.socket.as_ref().filter(|_| now >= self.breaker.open_until())
                    && has_come(socket)
                {
                    match start(socket, spawner, signals, now) {
                        Ok(process) => {
                            log::info!(pid = process.pid.as_raw(); "relay started");
                            self.state = State::Works(process);
                        }
                        Err(error) => self.start_failed(now, &error),
                    }
                }
            }
            State::Over => {}
        }
    }

    fn start_failed(&mut self, now: Uptime, error: &io::Error) {
        if let Some((failures, delay)) = self.breaker.fail(now) {
            let error = sys::explain(error);
            log::error!(
                failures, next_try = in_ms(delay);
                "cannot start the relay: {error} (events wait in the publish socket)"
            );
        }
    }

    /// Handles the exit of the relay.
    pub(super) fn ended(&mut self, pid: Pid, ending: Ending, now: Uptime) {
        let (pid, status, signal) = (pid.as_raw(), ending.exit_status(), ending.signal_name());
        match std::mem::replace(&mut self.state, State::None) {
            State::Works(mut process) => {
                process.read_child(MAX_REST, &mut self.breaker);
                let lived = in_ms(process.since.elapsed());
                if process.ready {
                    log::warn!(
                        pid, status, signal, lived;
                        "relay exited: the event that it was publishing may be lost (other events wait in the publish socket)"
                    );
                } else if let Some((failures, delay)) = self.breaker.fail(now) {
                    log::error!(
                        pid, status, signal, lived,
                        failures, next_try = in_ms(delay);
                        "relay exited before it was ready (events wait in the publish socket)"
                    );
                }
            }
            State::Ends { deadline, .. } => {
                log::debug!(pid, status, signal; "relay exited");
                if deadline.is_none() {
                    self.state = State::Over;
                }
            }
            State::None | State::Over => {}
        }
    }

    /// Ends the relay after its environment has changed. The next datagram starts a new relay.
    pub(super) fn renew(&mut self, now: Uptime) {
        if let State::Works(Process { pid, .. }) = &self.state {
            // Dropping the process closes the lifeline.
            self.state = State::Ends { pid: *pid, deadline: Some(now + STOP_TIMEOUT) };
        }
    }

    /// Ends the relay permanently, because the master is exiting.
    pub(super) fn stop(&mut self) {
        // Dropping the process closes the lifeline.
        self.state = match self.pid() {
            Some(pid) => State::Ends { pid, deadline: None },
            None => State::Over,
        };
    }

    /// Kills the relay if it has not exited yet.
    pub(super) fn end(&mut self) {
        if let Some(pid) = self.pid() {
            let _ = kill(pid, Signal::SIGKILL);
        }
    }
}

impl Process {
    fn look(&mut self, socket: &PublishSocket, now: Uptime) {
        let something_waits = has_come(socket);
        let work = if something_waits { work_of(self.pid) } else { None };
        if self.stall.look(now, something_waits, work) && !std::mem::replace(&mut self.is_given_up, true) {
            log::error!(
                pid = self.pid.as_raw();
                "killed the relay, because it made no progress while events were waiting (was it stopped?)"
            );
            let _ = kill(self.pid, Signal::SIGKILL);
        }
    }

    fn read_child(&mut self, most: usize, breaker: &mut Breaker) {
        if !self.open {
            return;
        }
        let (pid, ready) = (self.pid.as_raw(), &mut self.ready);
        self.open = self.output.read(most, &mut |line, _| {
            if line == relay::READY {
                *ready = true;
                breaker.close();
            } else if let Ok(RefusedDatagrams { count, total, last }) = serde_json::from_str(line) {
                log::warn!(count, total, last, pid; "relay: datagrams not published");
            } else {
                log::warn!(pid; "relay: {line}");
            }
        });
    }
}

/// Whether a datagram is waiting in the socket.
fn has_come(socket: &PublishSocket) -> bool {
    let mut watched = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
    poll(&mut watched, PollTimeout::ZERO).is_ok() && watched[0].any().unwrap_or(false)
}

/// Returns a number that changes whenever the process does anything: the sum of its processor time and its context
/// switches.
fn work_of(pid: Pid) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_ascii_whitespace().collect();
    // Fields 14 and 15 of proc_pid_stat(5). `fields` begins with the third field.
    let ticks = [11, 12].into_iter().map(|field| fields.get(field)?.parse::<u64>().ok()).sum::<Option<u64>>()?;
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let switches = status.lines().filter(|line| line.contains("ctxt_switches:"));
    let switches =
        switches.map(|line| line.split_ascii_whitespace().nth(1)?.parse::<u64>().ok()).sum::<Option<u64>>()?;
    Some(ticks.wrapping_add(switches))
}

fn start(socket: &PublishSocket, spawner: &Spawner, signals: &SignalInbox, now: Uptime) -> io::Result<Process> {
    // Non-blocking at both ends, so that neither the relay nor the master waits for the other.
    let (read, write) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
    let (watched, lifeline) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
    let privileges = Privileges::resolve(&spawner.current.config.privileges, false).map_err(io::Error::other)?;
    let segment = &spawner.segment;
    let pid = sys::fork(|| {
        // The signal handlers stay installed and do nothing, because a signal to all processes of a service must not
        // terminate the relay early.
        signals.leave();
        logging::begin_worker(&spawner.config.logs);
        if [1, 2].into_iter().try_for_each(|fd| sys::replace(fd, &write)).is_err() {
            return 1;
        }
        let own = [socket.raw(), watched.as_raw_fd(), segment.fd().as_raw_fd()];
        // The log descriptors stay open, so that their numbers are not reused for other files.
        let keep: Vec<_> = [0, 1, 2].into_iter().chain(own).chain(spawner.current.log_files.descriptors()).collect();
        sys::close_all_except(&keep);
        let _ = nix::sys::prctl::set_name(c"relay"); // for `ps`
        let grouped = setpgid(Pid::from_raw(0), Pid::from_raw(0));
        // The process must register as a user of the segment while it can still reopen it.
        segment.enter();
        if let Err(error) = grouped.map_err(io::Error::from).and_then(|()| privileges.apply_without_slot()) {
            relay::say(&format!("{error}"));
            return 1;
        }
        sys::unblock_signals();
        relay::run(socket.as_fd(), watched.as_fd(), segment)
    })?;
    let (since, output) = (Instant::now(), LineReader::new(read));
    let stall = Stall::new(now);
    Ok(Process { pid, since, ready: false, output, open: true, stall, is_given_up: false, _lifeline: lifeline })
}
