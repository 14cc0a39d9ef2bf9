//! Serves the control socket: accepts clients, checks their permission, reads their requests, and sends the replies.
//!
//! The control socket is a Unix stream socket of mode 0600. The kernel must report that the client's process runs as
//! root or as the user of the master. A client sends one line and receives lines up to the outcome; for a command that
//! takes time, the client waits. All buffers and counts are bounded, and no client can block the master: a client that
//! sends no line, or does not read its replies, is disconnected.
//!
//! This module must not block, and must not decide what a request does; `operator.rs` decides that.

use std::io::{self, ErrorKind, IoSlice, Read as _, Write as _};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags};
use nix::sys::socket::{ControlMessage, MsgFlags, getsockopt, sendmsg, sockopt};

use super::pool::supervisor::Uptime;
use crate::control::wire::{self, ControlReply, ControlRequest, MAX_REQUEST};
use crate::logging::rate::{Admission, ByteLimit};
use crate::net::control_listener::ControlListener;
use crate::sys;
use crate::upgrade::saved_state::{SavedClient, SavedControl, SavedWaiting};

/// Maximum number of clients that are not waiting for an outcome. Further clients wait in the kernel's queue.
const MAX_CLIENTS: usize = 16;
/// Maximum number of clients, including those that are waiting. Waiting clients do not count toward [`MAX_CLIENTS`], so
/// that the master can still answer status requests.
const MAX_CLIENTS_AND_WAITING: usize = 64;
/// How long a client may take to send its line, or to read the next part of its replies.
const CLIENT_TIMEOUT: Duration = Duration::from_secs(10);
/// Maximum number of unsent bytes per client. The longest status fits.
const MAX_UNSENT: usize = 4 << 20;
/// Maximum number of unsent bytes that are saved for the next master during an upgrade.
const MAX_SAVED: usize = 64 << 10;
/// How long to wait after a failed accept, for example because no descriptor is free.
const ACCEPT_RETRY_INTERVAL: Duration = Duration::from_secs(1);

/// The control socket and its clients. Dropping it removes the socket's file, and then closes all connections.
pub(crate) struct Control {
    /// `None` if there are only clients that a former master accepted.
    listener: Option<ControlListener>,
    clients: Vec<Client>,
    next: ClientId,
    paused_until: Uptime,
    /// Limits the log lines about users without permission to one a second on average, with short bursts.
    refusals: ByteLimit,
}

/// Identifies a client; unique over the master's lifetime.
pub(crate) type ClientId = u64;

/// What a client waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Waiting {
    /// The client has sent no request yet, or has received its outcome.
    No,
    Reload,
    /// Until exactly this many workers are ready and none is draining.
    Scale(u32),
    Stop,
    /// Until this process becomes the new build, or the upgrade fails.
    Upgrade,
}

struct Client {
    id: ClientId,
    stream: UnixStream,
    unread: Vec<u8>,
    unsent: Vec<u8>,
    /// Whether the request was read, or reading has failed. Nothing more is read then.
    asked: bool,
    /// Whether `unsent` contains the outcome. The connection closes when it has been sent.
    ending: bool,
    gone: bool,
    /// The time by which the client must have sent or read something.
    deadline: Uptime,
    waiting: Waiting,
}

impl Control {
    pub(crate) fn new(listener: Option<ControlListener>) -> Self {
        Self { listener, clients: Vec::new(), next: 1, paused_until: Uptime::ZERO, refusals: ByteLimit::new(1) }
    }

    /// Returns the state to save for the next master during an upgrade. A client with too many unsent bytes is left
    /// out.
    pub(crate) fn save(&self) -> Option<SavedControl> {
        let listener = self.listener.as_ref()?;
        let clients = self.clients.iter().filter(|client| !client.gone && client.unsent.len() <= MAX_SAVED);
        Some(SavedControl {
            fd: listener.as_fd().as_raw_fd(),
            path: listener.path().to_owned(),
            file: listener.file(),
            clients: clients.map(Client::save).collect(),
        })
    }

    /// Takes over the clients of a former master.
    pub(crate) fn restore(&mut self, clients: Vec<(OwnedFd, SavedClient)>, now: Uptime) {
        for (socket, saved) in clients {
            let mut client = Client::new(self.next, socket.into(), now + CLIENT_TIMEOUT);
            self.next += 1;
            let SavedClient { unread, unsent, asked, ending, waiting, .. } = saved;
            (client.unread, client.unsent, client.asked, client.ending) = (unread, unsent, asked, ending);
            client.waiting = match waiting {
                SavedWaiting::No => Waiting::No,
                SavedWaiting::Reload => Waiting::Reload,
                SavedWaiting::Scale(workers) => Waiting::Scale(workers),
                SavedWaiting::Stop => Waiting::Stop,
            };
            self.clients.push(client);
        }
    }

    /// Returns the descriptors for the master's `poll`, in the order that [`Control::attend`] expects.
    pub(crate) fn watched(&self, now: Uptime) -> Vec<PollFd<'_>> {
        let mut watched: Vec<PollFd<'_>> =
            self.clients.iter().map(|client| PollFd::new(client.stream.as_fd(), client.interest())).collect();
        if self.has_room() && now >= self.paused_until {
            watched.extend(self.listener.iter().map(|listener| PollFd::new(listener.as_fd(), PollFlags::POLLIN)));
        }
        watched
    }

    /// Returns the time at which [`Control::attend`] is due without an event.
    pub(crate) fn next_deadline(&self, now: Uptime) -> Option<Uptime> {
        let clients = self.clients.iter().filter(|client| client.is_timed()).map(|client| client.deadline);
        clients.chain((self.paused_until > now).then_some(self.paused_until)).min()
    }

    /// Reads from and writes to all clients, and accepts new ones. `events` are the results of `poll` for [`Control::watched`].
    /// Returns the requests.
    pub(crate) fn attend(&mut self, events: &[PollFlags], now: Uptime) -> Vec<(ClientId, ControlRequest)> {
        let mut asked = Vec::new();
        for (client, &events) in self.clients.iter_mut().zip(events) {
            if events.intersects(PollFlags::POLLIN | PollFlags::POLLHUP | PollFlags::POLLERR)
                && let Some(request) = client.read_child(now)
            {
                asked.push((client.id, request));
            }
            // A client that has closed its end does not read the replies, but its command continues.
            client.gone |= events.intersects(PollFlags::POLLHUP | PollFlags::POLLERR);
            client.send(now);
        }
        let accept = events.get(self.clients.len()).is_some_and(|events| !events.is_empty());
        self.sweep(now);
        if accept {
            self.accept(now);
        }
        asked
    }

    /// Closes the connections of clients that have received their outcome, have disconnected, or have taken too long.
    pub(crate) fn sweep(&mut self, now: Uptime) {
        self.clients.retain(|client| {
            let is_late = client.is_timed() && client.deadline <= now;
            if is_late {
                log::info!(
                    "control client disconnected: it sent no request, or did not read its replies, for {} seconds",
                    CLIENT_TIMEOUT.as_secs()
                );
            }
            !(is_late || client.gone || client.ending && client.unsent.is_empty())
        });
    }

    fn has_room(&self) -> bool {
        let asking = self.clients.iter().filter(|client| client.waiting == Waiting::No).count();
        asking < MAX_CLIENTS && self.clients.len() < MAX_CLIENTS_AND_WAITING
    }

    fn accept(&mut self, now: Uptime) {
        while let Some(listener) = self.listener.as_ref().filter(|_| self.has_room()) {
            match sys::accept(listener.as_fd()) {
                Ok((socket, _)) => {
                    let mut client = Client::new(self.next, socket.into(), now + CLIENT_TIMEOUT);
                    self.next += 1;
                    if let Err(why) = may_ask(client.stream.as_fd()) {
                        let Admission { left_out, is_admitted } = self.refusals.take(1, now);
                        let left_out = left_out.map(|left_out| left_out.lines);
                        if is_admitted || left_out.is_some() {
                            log::warn!(left_out; "control client refused: {why}");
                        }
                        client.asked = true;
                        client.reply(&ControlReply::failed(why), now);
                    }
                    self.clients.push(client);
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => {
                    log::error!("cannot accept on the control socket: {}", sys::explain(&error));
                    self.paused_until = now + ACCEPT_RETRY_INTERVAL;
                    return;
                }
            }
        }
    }

    /// Sends a reply to a client, if it is still connected.
    pub(crate) fn reply(&mut self, id: ClientId, answer: &ControlReply, now: Uptime) {
        if let Some(client) = self.clients.iter_mut().find(|client| client.id == id) {
            client.reply(answer, now);
        }
    }

    /// Sends a descriptor to a client together with the outcome.
    pub(crate) fn hand_over(&mut self, id: ClientId, fd: BorrowedFd<'_>, answer: &ControlReply, now: Uptime) {
        let Some(client) = self.clients.iter_mut().find(|client| client.id == id) else { return };
        let line = wire::line(answer);
        // Nothing was sent to this client before, so the whole line fits into the socket's buffer.
        let sent = sendmsg::<()>(
            client.stream.as_raw_fd(),
            &[IoSlice::new(&line)],
            &[ControlMessage::ScmRights(&[fd.as_raw_fd()])],
            MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL,
            None,
        );
        match sent {
            Ok(sent) if sent == line.len() => client.ending = true,
            Ok(_) => client.gone = true,
            Err(errno) => client
                .reply(&ControlReply::failed(format!("cannot send the descriptor of the shared memory: {errno}")), now),
        }
    }

    pub(crate) fn set_waiting(&mut self, id: ClientId, waiting: Waiting) {
        if let Some(client) = self.clients.iter_mut().find(|client| client.id == id) {
            client.waiting = waiting;
        }
    }

    /// Returns the waiting clients.
    pub(crate) fn waiting(&self) -> Vec<(ClientId, Waiting)> {
        let waiting = self.clients.iter().filter(|client| client.waiting != Waiting::No);
        waiting.map(|client| (client.id, client.waiting)).collect()
    }

    /// Sends a reply to all clients that wait for `what`.
    pub(crate) fn reply_to_waiting(&mut self, what: Waiting, answer: &ControlReply, now: Uptime) {
        for client in self.clients.iter_mut().filter(|client| client.waiting == what) {
            client.reply(answer, now);
        }
    }
}

impl Client {
    fn new(id: ClientId, stream: UnixStream, deadline: Uptime) -> Self {
        let (unread, unsent) = (Vec::new(), Vec::new());
        let (asked, ending, gone) = (false, false, false);
        Self { id, stream, unread, unsent, asked, ending, gone, deadline, waiting: Waiting::No }
    }

    fn save(&self) -> SavedClient {
        SavedClient {
            fd: self.stream.as_raw_fd(),
            unread: self.unread.clone(),
            unsent: self.unsent.clone(),
            asked: self.asked,
            ending: self.ending,
            waiting: match self.waiting {
                Waiting::No => SavedWaiting::No,
                Waiting::Reload | Waiting::Upgrade => SavedWaiting::Reload,
                Waiting::Scale(workers) => SavedWaiting::Scale(workers),
                Waiting::Stop => SavedWaiting::Stop,
            },
        }
    }

    fn interest(&self) -> PollFlags {
        let mut interest = PollFlags::empty();
        interest.set(PollFlags::POLLIN, !self.asked);
        interest.set(PollFlags::POLLOUT, !self.unsent.is_empty());
        interest
    }

    /// Whether the time limit applies to this client. It does not apply to a client that is waiting for its outcome and
    /// has read all replies so far.
    fn is_timed(&self) -> bool {
        !self.asked || !self.unsent.is_empty()
    }

    /// Reads until a whole line has arrived, and parses the line as the request. A client may send only one line.
    fn read_child(&mut self, now: Uptime) -> Option<ControlRequest> {
        while !self.asked {
            let mut piece = [0; 512];
            match self.stream.read(&mut piece) {
                Ok(0) => {
                    self.asked = true;
                    self.gone = true; // the request is incomplete
                }
                Ok(count) => self.unread.extend_from_slice(&piece[..count]),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return None,
                Err(_) => {
                    self.asked = true;
                    self.gone = true;
                }
            }
            let line = self.unread.iter().position(|&byte| byte == b'\n');
            if line.unwrap_or(self.unread.len()) >= MAX_REQUEST {
                self.refuse(format!("the request is too long: at most {MAX_REQUEST} bytes are allowed"), now);
            } else if let Some(end) = line {
                self.asked = true;
                match ControlRequest::parse(&self.unread[..end]) {
                    Ok(request) => return Some(request),
                    Err(why) => self.refuse(why, now),
                }
            }
        }
        None
    }

    fn refuse(&mut self, why: String, now: Uptime) {
        self.asked = true;
        self.reply(&ControlReply::failed(why), now);
    }

    fn reply(&mut self, answer: &ControlReply, now: Uptime) {
        if self.ending {
            return;
        }
        let line = wire::line(answer);
        if self.unsent.len() + line.len() > MAX_UNSENT {
            self.gone = true;
            return;
        }
        if self.unsent.is_empty() {
            self.deadline = now + CLIENT_TIMEOUT;
        }
        self.unsent.extend_from_slice(&line);
        if answer.is_outcome() {
            self.ending = true;
            self.waiting = Waiting::No;
        }
        self.send(now);
    }

    /// Sends as much as the socket accepts.
    fn send(&mut self, now: Uptime) {
        let mut sent = 0;
        while sent < self.unsent.len() {
            match self.stream.write(&self.unsent[sent..]) {
                Ok(count) if count > 0 => sent += count,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Ok(_) | Err(_) => {
                    self.gone = true;
                    break;
                }
            }
        }
        if sent > 0 {
            self.unsent.drain(..sent);
            self.deadline = now + CLIENT_TIMEOUT;
        }
    }
}

/// Checks that the client's process runs as root or as the user of this process.
fn may_ask(socket: BorrowedFd<'_>) -> Result<(), String> {
    let peer = getsockopt(&socket, sockopt::PeerCredentials)
        .map_err(|errno| format!("cannot determine the client's user: {}", io::Error::from(errno)))?;
    let ours = nix::unistd::geteuid().as_raw();
    if peer.uid() == 0 || peer.uid() == ours {
        return Ok(());
    }
    Err(format!(
        "user {} (pid {}) must not control this master: only root and user {ours} may (run the command as one of them)",
        peer.uid(),
        peer.pid()
    ))
}
