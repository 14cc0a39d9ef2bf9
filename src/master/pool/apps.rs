//! Supervises app processes: programs behind the gateways, each with a private listening socket.
//!
//! ```text
//! spawn ─▶ probe: connect to the private socket ─▶ accepted: ready, door open ─▶ door draining, no claim: stop signal
//! ```
//!
//! - **Readiness** is proved. The kernel accepts connections on behalf of a process that has not called `accept` yet,
//!   so a connection alone proves nothing. The master connects once, and the process is ready when it has accepted this
//!   connection. With `--ready-path`, it must then answer a request ([`ready_check`](super::ready_check)). Gateways
//!   connect only after that.
//! - **The end**: the master marks the process as draining, so that gateways do not claim it any more, and sends the
//!   signal when no gateway has a claim on it. The process therefore never has a request when it is asked to exit, and
//!   needs no handler for the signal. A gateway that releases the last claim wakes the master.
//! - **Crashes**: the rest of the process group is killed, because a part of it may still have the private socket. The
//!   group of a CGI runner is killed whenever the runner has ended.
//!
//! [`AppChannel`] contains the sockets and the claims. Its functions make no decision about processes.

use std::collections::VecDeque;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::sync::Arc;

use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;

use super::child::{Child, EndBy, Link};
use super::death_log;
use super::ready_check::{ReadyCheck, ReadyRequest};
use super::spawn::Launch;
use super::supervisor::{Demand, SupervisorEvent, Uptime};
use super::{EndOfLife, Pool};
use crate::config::gateway::Backend;
use crate::config::{Config, Jittered};
use crate::master::procfs;
use crate::net::app_channel::AppChannel;
use crate::sys::{self, Ending};
use crate::upgrade::saved_state::SavedLink;

/// A gateway's report about an app process. It is not trusted: the process must be in that slot.
#[derive(Debug)]
pub(in crate::master) struct AppFault {
    pub(in crate::master) kind: AppFaultKind,
    pub(in crate::master) slot: u32,
    pub(in crate::master) pid: Pid,
    /// The request that the process was serving.
    pub(in crate::master) request: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::master) enum AppFaultKind {
    /// The process has not begun its response in time. The inode of its end of the connection is 0 if it is unknown.
    Hung { connection: u32 },
    /// The process died.
    Died,
    /// Enough children of the process died of one request for the quarantine. What they died of is unknown, because the
    /// master is not their parent; but a request that is repeated only when its child dies would hardly meet several by chance.
    ChildrenDied,
}

/// The app processes that have crashed recently. A gateway may report the request after the process was reaped.
#[derive(Debug, Default)]
pub(super) struct RecentCrashes(VecDeque<(Pid, u32)>);

impl RecentCrashes {
    const MAX: usize = 64;

    fn add(&mut self, pid: Pid, slot: u32) {
        self.0.truncate(Self::MAX - 1);
        self.0.push_front((pid, slot));
    }

    /// Whether this process has crashed and no request was blamed for it yet.
    fn take(&mut self, pid: Pid, slot: u32) -> bool {
        let found = self.0.iter().position(|crash| *crash == (pid, slot));
        found.and_then(|index| self.0.remove(index)).is_some()
    }
}

/// The master's view of an app process.
#[derive(Debug)]
pub(crate) struct AppState {
    /// How the readiness of the process is proved, until it is.
    probe: Option<Probe>,
    /// The request that the process must answer before it is ready.
    request_of_probe: Option<Arc<ReadyRequest>>,
    /// Whether the process was ready before. It may still be working on the request of a gateway that has died.
    was_ready: bool,
    /// When a process that was ready before counts as hung, because it has not finished the request of a dead gateway.
    hung_at: Option<Uptime>,
    /// Number of requests that gateways had sent to the process when it became ready for the second time.
    served_before: u64,
    /// Whether the process is sent the signal to exit as soon as no gateway has a claim on it.
    awaits_idle: bool,
    /// When the process is sent this signal although it still has a request.
    signal_at: Option<Uptime>,
    /// Number of requests after which the process is replaced.
    max_requests: Option<u64>,
    /// The request that a gateway was waiting for when the process died.
    request: Option<String>,
    /// The requests that the process was serving when it died, for the log.
    at_work: Vec<String>,
}

/// The proof of readiness.
#[derive(Debug)]
pub(super) enum Probe {
    /// The process is ready when it has accepted this connection.
    Connected(OwnedFd),
    /// The process listens on its own, and is ready when a connection is possible.
    Awaited,
    /// The process accepts connections, and is ready when it has answered a request.
    Request(Box<ReadyCheck>),
}

impl Probe {
    pub(super) fn new(connection: Option<OwnedFd>) -> Self {
        connection.map_or(Self::Awaited, Self::Connected)
    }

    fn is_passed(&mut self, channel: &AppChannel, slot: u32, now: Uptime) -> bool {
        match self {
            Self::Connected(probe) => channel.has_accepted(slot, probe),
            Self::Awaited => channel.probe(slot).is_ok(),
            Self::Request(check) => check.advance(channel, slot, now),
        }
    }
}

impl AppState {
    pub(super) fn new(
        probe: Option<Probe>,
        request_of_probe: Option<Arc<ReadyRequest>>,
        max_requests: Option<Jittered<u64>>,
    ) -> Self {
        let max_requests = max_requests.map(Jittered::<u64>::draw);
        Self {
            probe,
            request_of_probe,
            was_ready: false,
            hung_at: None,
            served_before: 0,
            awaits_idle: false,
            signal_at: None,
            max_requests,
            request: None,
            at_work: Vec::new(),
        }
    }

    pub(in crate::master) fn save(&self) -> SavedLink {
        SavedLink::App {
            probe: self.probe.as_ref().and_then(|probe| match probe {
                Probe::Connected(probe) => Some(probe.as_raw_fd()),
                Probe::Awaited | Probe::Request(_) => None,
            }),
            // The next master asks the process again.
            awaits_address: matches!(self.probe, Some(Probe::Awaited | Probe::Request(_))),
            was_ready: self.was_ready,
            served_before: self.served_before,
            awaits_idle: self.awaits_idle,
            max_requests: self.max_requests,
        }
    }

    /// Restores the state of a process that another master started.
    pub(in crate::master) fn restore(
        probe: Option<OwnedFd>,
        awaits_address: bool,
        (was_ready, served_before): (bool, u64),
        awaits_idle: bool,
        max_requests: Option<u64>,
    ) -> Self {
        let probe = probe.map(Probe::Connected).or(awaits_address.then_some(Probe::Awaited));
        Self {
            probe,
            request_of_probe: None,
            was_ready,
            hung_at: None,
            served_before,
            awaits_idle,
            signal_at: None,
            max_requests,
            request: None,
            at_work: Vec::new(),
        }
    }

    /// Returns the descriptor that becomes readable when the process closes the connection that proves its readiness.
    pub(super) fn probe(&self) -> Option<BorrowedFd<'_>> {
        match &self.probe {
            Some(Probe::Connected(probe)) => Some(probe.as_fd()),
            Some(Probe::Awaited | Probe::Request(_)) | None => None,
        }
    }

    pub(super) fn is_ready(&self) -> bool {
        self.probe.is_none() || self.was_ready
    }
}

impl Child {
    pub(in crate::master) fn is_starting_app(&self) -> bool {
        matches!(&self.link, Link::App(app) if app.probe.is_some())
    }

    /// Sets the request that the process must answer, after another master has started it.
    pub(in crate::master) fn await_answer(&mut self, config: &Config, launch: &Launch) {
        if let (Link::App(app), Launch::App(_, _, encode)) = (&mut self.link, launch)
            && app.probe.is_some()
            && !app.was_ready
        {
            // If there is no script, the reload after the upgrade reports this.
            app.request_of_probe = ReadyRequest::of(config, *encode).ok().flatten();
        }
    }

    /// Whether gateways have sent requests to the process.
    pub(super) fn has_served(&self, channel: &AppChannel) -> bool {
        let Link::App(app) = &self.link else { return false };
        app.served_before + channel.process(self.slot).map_or(0, |process| process.begun) > 0
    }

    /// Notes what an app process was serving when it died, before its units can be used by another process.
    pub(super) fn note_requests(&mut self, channel: &AppChannel) {
        let Link::App(app) = &mut self.link else { return };
        app.at_work = channel.requests(self.slot).into_iter().map(|request| request.what).collect();
        if app.at_work.is_empty() {
            app.at_work = app.request.iter().cloned().collect(); // the gateway has released the process already
        }
    }

    /// Returns what an app process was serving when it died.
    pub(super) fn at_work(&self) -> &[String] {
        match &self.link {
            Link::App(app) => &app.at_work,
            Link::Worker { .. } | Link::Program(_) => &[],
        }
    }

    /// Returns how the process has answered the request of `--ready-path`, if it is not ready because of it.
    pub(super) fn answer_to_ready_check(&self) -> Option<String> {
        match &self.link {
            Link::App(AppState { probe: Some(Probe::Request(check)), .. }) => Some(check.describe()),
            Link::Worker { .. } | Link::Program(_) | Link::App(_) => None,
        }
    }
}

/// Kills the descendant of an app process that hangs in a request, if the program serves requests in child processes (as
/// php-cgi does with PHP_FCGI_CHILDREN). Such a program starts a new child by itself. Returns whether there is one.
fn kill_descendant(slot: u32, pid: Pid, connection: u32, request: &str) -> bool {
    let holders = procfs::holders_of_socket(&procfs::descendants_of(pid), connection);
    for (descendant, process) in &holders {
        let (pid, child) = (pid.as_raw(), descendant.as_raw());
        match sys::signal_process(process, Signal::SIGKILL) {
            Ok(()) => log::error!(slot, pid, child, request; "killed a child of an app process, which hangs"),
            Err(error) => log::error!(slot, pid, child; "cannot kill a child of an app process, which hangs: {error}"),
        }
    }
    !holders.is_empty()
}

impl Pool {
    /// Returns the channel between gateways and app processes, if this pool consists of app processes.
    pub(in crate::master) fn channel(&self) -> Option<&Arc<AppChannel>> {
        match &self.spawner.launch {
            Launch::App(_, channel, _) => Some(channel),
            Launch::Worker(..) | Launch::Program(_) => None,
        }
    }

    /// Marks app processes as ready, and sends the signal to exit to those that have become idle.
    pub(in crate::master) fn check_apps(&mut self) {
        let Some(channel) = self.channel().map(Arc::clone) else { return };
        let (now, concurrency) =
            (self.now(), self.spawner.config.gateway.as_ref().map_or(1, |gateway| gateway.concurrency));
        let (mut idle, mut worn) = (Vec::new(), Vec::new());
        for (&pid, child) in &mut self.children {
            let Link::App(app) = &mut child.link else { continue };
            let is_passed = app.probe.as_mut().is_some_and(|probe| probe.is_passed(&channel, child.slot, now));
            if is_passed && let Some(request) = app.request_of_probe.take() {
                app.probe = Some(Probe::Request(Box::new(ReadyCheck::new(request))));
            } else if is_passed {
                (app.probe, app.hung_at) = (None, None);
                app.was_ready = true;
                if !child.asked_to_leave {
                    channel.open(child.slot, pid, concurrency);
                }
                self.observed.push_back(SupervisorEvent::Ready { pid });
            }
            if !child.hung && app.hung_at.take_if(|at| *at <= now).is_some() {
                log::error!(
                    slot = child.slot, pid = pid.as_raw();
                    "an app process has not finished the request of a dead gateway in time"
                );
                self.observed.push_back(SupervisorEvent::Hung { pid });
            }
            let served = app.served_before + channel.process(child.slot).map_or(0, |process| process.begun);
            if app.is_ready() && app.max_requests.is_some_and(|max| served >= max) {
                app.max_requests = None;
                worn.push(pid);
            }
            if app.awaits_idle && channel.is_idle(child.slot) {
                app.awaits_idle = false;
                idle.push(pid);
            }
        }
        for pid in idle {
            self.send_to_app(pid, EndBy::StopSignal);
        }
        for pid in worn {
            self.wear_out(pid, EndOfLife::because("max-requests"));
        }
    }

    /// Opens the process in `slot` when it accepts connections again. The gateway that was using it has died, and the
    /// process may still be working on that gateway's request.
    pub(in crate::master) fn await_end_of_request(&mut self, channel: &AppChannel, slot: u32) {
        let now = self.now();
        let child = self.children.iter_mut().find(|(_, child)| child.slot == slot && !child.asked_to_leave);
        let Some((&pid, Child { link: Link::App(app), hung: false, .. })) = child else { return };
        if channel.is_concurrent() || app.probe.is_some() {
            return; // it was not closed to gateways, or it will be opened anyway
        }
        app.served_before += channel.process(slot).map_or(0, |process| process.begun);
        let config = &self.spawner.config;
        let limit = config.gateway.as_ref().map(|gateway| gateway.request_timeout).filter(|limit| !limit.is_zero());
        let hung_at = now + limit.unwrap_or(config.start_timeout);
        match channel.probe(slot) {
            Ok(probe) => (app.probe, app.hung_at) = (Some(Probe::Connected(probe)), Some(hung_at)),
            Err(_) => channel.open(slot, pid, 1), // whether it is busy remains unknown
        }
    }

    /// Kills a gateway that keeps connections to app processes and does not react, as another gateway reports.
    pub(super) fn kill_stuck(&mut self, slot: u32, pid: Pid) {
        let is_ours = self.children.get(&pid).is_some_and(|child| child.slot == slot && child.is_worker());
        if is_ours {
            log::error!(
                slot, pid = pid.as_raw();
                "gateway killed: it is stopped or hangs, and keeps connections to app processes that other gateways need"
            );
            let _ = kill(pid, Signal::SIGKILL); // the child has not been reaped yet
        }
    }

    /// Handles a gateway's report about an app process.
    pub(in crate::master) fn attribute(&mut self, fault: AppFault) {
        let AppFault { kind, slot, pid, request } = fault;
        let child = self.children.get_mut(&pid).filter(|child| child.slot == slot);
        match (kind, child) {
            (AppFaultKind::Hung { connection }, Some(child)) if !child.hung => {
                if !kill_descendant(slot, pid, connection, &request) {
                    child.hung = true; // so that no further report about this hang counts
                    self.observed.push_back(SupervisorEvent::Hung { pid });
                }
                self.culprits.push(request);
            }
            (AppFaultKind::Died, Some(Child { link: Link::App(app), .. })) => app.request = Some(request),
            (AppFaultKind::Died, None) if self.recent_crashes.take(pid, slot) => self.culprits.push(request),
            (AppFaultKind::ChildrenDied, _) => {
                let deaths = self.spawner.config.failures.quarantine.deaths;
                self.culprits.extend((0..deaths).map(|_| request.clone()));
            }
            (AppFaultKind::Hung { .. } | AppFaultKind::Died, _) => {}
        }
    }

    /// Records the death of an app process, which has been reaped.
    pub(super) fn app_ended(&mut self, pid: Pid, child: &mut Child, ending: Ending) {
        let Link::App(app) = &mut child.link else { return };
        if child.asked_to_leave || child.hung || !death_log::is_caused_by_request(ending) {
            return;
        }
        match app.request.take() {
            Some(request) => self.culprits.push(request),
            None => self.recent_crashes.add(pid, child.slot),
        }
    }

    /// Asks an app process that hangs, and its children, to exit. If it does not, it is killed shortly afterwards.
    pub(super) fn abort_app(&mut self, pid: Pid) {
        let Some(child) = self.children.get_mut(&pid) else { return };
        child.hung = true;
        if let Some(channel) = self.channel() {
            let slot = self.children.get(&pid).map_or(u32::MAX, |child| child.slot);
            let _ = channel.drain(slot); // no further request is sent to it
        }
        let _ = killpg(pid, Signal::SIGTERM); // the child has not been reaped yet
    }

    /// Ends an app process. It is asked to exit only when it has no request, and killed together with its group.
    pub(super) fn signal_app(&mut self, channel: &AppChannel, pid: Pid, by: EndBy) {
        let patience = self.spawner.config.drain_timeout / 8 * 5;
        let signal_at = self.now() + patience;
        let Some(child) = self.children.get_mut(&pid) else { return };
        let Link::App(app) = &mut child.link else { return };
        child.asked_to_leave = true;
        if by == EndBy::StopSignal && !channel.drain(child.slot) {
            (app.awaits_idle, app.signal_at) = (true, Some(signal_at));
            return;
        }
        self.send_to_app(pid, by);
    }

    fn send_to_app(&self, pid: Pid, by: EndBy) {
        let Some(child) = self.children.get(&pid) else { return };
        let (signal, to_group) = (child.signal_for(by), by == EndBy::Kill);
        // The pid cannot belong to another process, because the child has not been reaped yet.
        if let Err(errno) = if to_group { killpg(pid, signal) } else { kill(pid, signal) } {
            log::error!(pid = pid.as_raw(), signal:%; "cannot signal app process: {errno}");
        }
    }

    /// Sends the stop signal again to an app process that has not exited within a second. The first one may have arrived between
    /// the process's check for signals and `accept`. A process that still has a request late in its drain is sent the signal
    /// once, so that it can end event streams and the like before it is killed.
    pub(super) fn remind_app(&mut self, pid: Pid) {
        let now = self.now();
        let Some(Child { link: Link::App(app), .. }) = self.children.get_mut(&pid) else { return };
        let is_late = app.signal_at.take_if(|at| *at <= now).is_some();
        if !app.awaits_idle || is_late {
            self.send_to_app(pid, EndBy::StopSignal);
        }
    }

    /// Handles the exit of an app process before it is reaped.
    pub(in crate::master) fn app_ending(&self, pid: Pid, ending: Ending) {
        let Some(child) = self.children.get(&pid) else { return };
        let is_normal = match ending {
            Ending::Exited(status) => status == 0 || child.asked_to_leave,
            Ending::Signaled(signal) => signal == child.stop_signal as i32 && child.asked_to_leave,
        };
        // Processes that CGI programs have left behind are in the group of their runner.
        if !is_normal || self.spawner.config.backend() == Backend::Cgi {
            let _ = killpg(pid, Signal::SIGKILL); // the group may be empty
        }
    }

    /// Records that a request waits while there is no app process.
    pub(in crate::master) fn observe_arrival(&mut self) {
        self.observed.push_back(SupervisorEvent::Arrival);
    }

    /// Returns the demand as the gateways have recorded it.
    pub(super) fn demand_on_apps(&self, channel: &AppChannel) -> Demand {
        let mut demand = Demand::default();
        for child in self.children.values() {
            let in_flight = channel.process(child.slot).map_or(0, |process| process.busy);
            demand.in_flight = demand.in_flight.saturating_add(in_flight);
            if in_flight > 0 {
                demand.busy.push(child.slot);
            }
        }
        demand.waiting = channel.demand().waiting;
        demand
    }
}
