//! Observes external programs, which send no reports: reads their state from `/proc`, decides to which of their
//! processes signals are sent, and terminates the processes that they leave behind.
//!
//! A program is one process, or a wrapper around the processes that serve (`sh -c 'php-cgi; …'`, php-cgi with
//! PHP_FCGI_CHILDREN, FCGI::ProcManager). Descendants of the serving processes belong to requests. A graceful shutdown
//! does not affect them, because a page may be waiting for such a process, or the process may be a background job. The
//! rules are:
//!
//! The stop signal is SIGTERM, unless `--stop-signal` is given. In the following, SIGTERM stands for the stop signal.
//!
//! - SIGTERM is sent to the program's own process. If that process serves, SIGTERM is never sent to any other process.
//! - A process that serves one connection at a time is sent SIGTERM while it serves no request (`idle_stop`). If it
//!   handles SIGTERM and is not found idle within a second, it is sent SIGTERM in the middle of a request.
//! - If the program's own process is a wrapper that does not serve, its descendants that have the socket are recorded
//!   before SIGTERM is sent to the wrapper. Each of these servers is sent SIGTERM while it waits in accept, so that no
//!   request is lost: a second after the wrapper was sent SIGTERM, or when the wrapper has exited. If SIGTERM itself
//!   terminated the wrapper, the wrapper did not pass the signal on. In that case, SIGTERM is also sent to a server
//!   that has no connection and, if it handles SIGTERM, to a server that is serving: immediately if the server accepts
//!   connections at the same time, otherwise after half of the drain timeout.
//! - SIGKILL is sent to the program's whole process group when the program has crashed or has been killed.
//! - A process that is left behind and still accepts connections is a stray. A stray is sent SIGTERM under the same
//!   conditions as a server below a wrapper, and is killed after the drain timeout. The server does not exit before its
//!   strays have exited.

use std::sync::Arc;
use std::time::Duration;

use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;

use super::Pool;
use super::child::{Child, EndBy, Link, restored_signal};
use super::close_listeners::IDLE_TIME;
use super::idle_stop::IdleStop;
use super::ready_descriptor::{self, DeclarationState};
use super::spawn::Spawner;
use super::supervisor::{SupervisorEvent, Uptime};
use crate::config::millis;
use crate::master::procfs::{self, Observed, Process};
use crate::sys::Ending;
use crate::upgrade::saved_state::{SavedProgram, SavedStray};

/// How long a program must run to count as ready, if no program was ever seen to accept connections and `--settle` is
/// not set.
const SETTLE_TIME: Duration = Duration::from_secs(1);
/// Time between two checks of starting programs.
const POLL_INTERVAL: Duration = Duration::from_millis(10);
/// Time between two checks of starting programs after a program has exited with status 0 without having been observed
/// to be ready. A program may serve its share of requests between two checks.
const QUICK_POLL_INTERVAL: Duration = Duration::from_millis(1);
/// How long [`QUICK_POLL_INTERVAL`] applies after such an exit.
const QUICK_POLL_TIME: Duration = Duration::from_secs(2);
/// Interval at which to look for strays after a program has exited.
const STRAYS_INTERVAL: Duration = Duration::from_millis(50);
/// Interval at which to look whether a program serves no request.
const IDLE_INTERVAL: Duration = Duration::from_millis(5);
/// How long the server waits until a program that handles SIGTERM serves no request, before it sends SIGTERM.
const IDLE_PATIENCE: Duration = Duration::from_secs(1);
/// Interval at which to look for strays while there are orphans that may become strays.
const ORPHANS_INTERVAL: Duration = Duration::from_secs(1);
/// Time after which SIGTERM is sent again to a stray that waits for connections.
const TERMINATE_INTERVAL: Duration = Duration::from_secs(1);
/// Interval at which to check for waiting connections.
const QUEUE_INTERVAL: Duration = Duration::from_secs(1);
/// Time after which waiting connections count as unserved, if no program was ever seen to accept.
const UNSERVED_TIMEOUT: Duration = Duration::from_secs(5);

/// Why a program that no longer has the socket open cannot serve.
const SOCKET_CLOSED: &str = "it has closed the listening socket, which was its standard input: does it bind a socket of \
                             its own? (php-fpm does; php-cgi accepts from standard input)";

#[derive(Clone, Debug, Default)]
pub(crate) struct ProgramState {
    /// Whether the program counts as ready.
    pub(crate) started: bool,
    /// Whether the program, or a descendant of it, was seen to accept connections.
    pub(crate) seen: bool,
    /// The time by which the program must have exited, if it has been sent a signal to exit.
    leave_by: Option<Uptime>,
    /// Whether the program's descriptors could not be read when the first signal to exit was sent.
    hidden: bool,
    /// If the program does not serve itself: its descendants that had the socket when the first signal to exit was
    /// sent.
    servers: Vec<Process>,
    /// Whether the program is still running some time after it was sent SIGTERM.
    reminded: bool,
    /// Since when SIGTERM is to be sent as soon as the program serves no request.
    awaits_idle_since: Option<Uptime>,
    /// Why the program cannot serve; empty if no cause is known.
    pub(crate) trouble: &'static str,
}

impl ProgramState {
    pub(crate) fn save(&self, now: Uptime) -> SavedProgram {
        SavedProgram {
            started: self.started,
            seen: self.seen,
            leave_left_ms: self.leave_by.map(|by| millis(by.saturating_sub(now))),
            hidden: self.hidden,
            servers: self.servers.iter().map(|&process| process.into()).collect(),
            reminded: self.reminded,
            awaits_idle: self.awaits_idle_since.is_some(),
        }
    }

    /// Restores a program that another master started.
    pub(crate) fn restore(saved: SavedProgram, now: Uptime) -> Self {
        Self {
            started: saved.started,
            seen: saved.seen,
            leave_by: saved.leave_left_ms.map(|left| now + Duration::from_millis(left)),
            hidden: saved.hidden,
            servers: saved.servers.into_iter().map(Process::from).collect(),
            reminded: saved.reminded,
            awaits_idle_since: saved.awaits_idle.then_some(now),
            trouble: "",
        }
    }

    /// Records and logs that none of the program's processes has the listening socket any more.
    fn socket_closed(&mut self, slot: u32, pid: Pid) {
        self.trouble = SOCKET_CLOSED;
        log::error!(slot, pid = pid.as_raw(); "worker cannot serve clients: {SOCKET_CLOSED}");
    }
}

/// A process that accepts connections although its program has ended.
#[derive(Debug)]
struct Stray {
    process: Process,
    deadline: Uptime,
    asked: Option<Uptime>,
    /// Whether SIGTERM terminated this process's wrapper and was not sent to the process itself.
    unasked: bool,
    stop_signal: Signal,
}

impl Stray {
    fn name(&self) -> String {
        procfs::stat(self.process.pid()).map(|stat| stat.name).unwrap_or_default()
    }

    fn was_asked(&mut self, now: Uptime) {
        if self.asked.is_none() {
            log::info!(
                pid = self.process.pid, name = self.name();
                "sent {} to a process that a worker left behind, because it accepts connections", self.stop_signal
            );
        }
        (self.asked, self.unasked) = (Some(now), false);
    }
}

/// The state that all programs share.
#[derive(Debug, Default)]
pub(in crate::master) struct Programs {
    /// Whether a program was seen to accept connections. Further programs must then be seen to accept connections
    /// before they count as ready.
    pub(in crate::master) seen: bool,
    /// Whether a program was seen to sleep in accept. The socket must then be blocking.
    sleeps_in_accept: bool,
    /// The time until which programs are checked at [`QUICK_POLL_INTERVAL`].
    quick_until: Uptime,
    strays: Vec<Stray>,
    idle_stop: IdleStop,
    /// When SIGTERM was last sent to a program that had been waited for.
    idle_stop_at: Option<Uptime>,
    next_look: Option<Uptime>,
    /// The time until which strays are looked for at [`STRAYS_INTERVAL`].
    stray_until: Uptime,
    /// When to check for waiting connections.
    next_count: Option<Uptime>,
    /// Time since which connections have been waiting while no program accepts them.
    unserved_since: Option<Uptime>,
    unserved_said: bool,
    /// Whether the operator has requested that all programs be terminated immediately.
    pub(in crate::master) at_once: bool,
}

impl Programs {
    pub(in crate::master) fn next_deadline(&self, now: Uptime) -> Option<Uptime> {
        [self.next_look, self.next_count, self.idle_stop.next_deadline(now)].into_iter().flatten().min()
    }

    /// Returns the current time between two checks of starting programs.
    pub(in crate::master) fn pace(&self, now: Uptime) -> Duration {
        if now < self.quick_until { QUICK_POLL_INTERVAL } else { POLL_INTERVAL }
    }

    /// Whether there are no strays.
    pub(in crate::master) fn is_empty(&self) -> bool {
        self.strays.is_empty()
    }

    /// Returns the strays, for the next master. Processes that this master has stopped continue.
    pub(in crate::master) fn save_strays(&self, now: Uptime) -> Vec<SavedStray> {
        self.idle_stop.resume_all();
        let save = |stray: &Stray| SavedStray {
            process: stray.process.into(),
            left_ms: millis(stray.deadline.saturating_sub(now)),
            asked: stray.asked.is_some(),
            unasked: stray.unasked,
            stop_signal: Some(stray.stop_signal as i32),
        };
        self.strays.iter().map(save).collect()
    }

    /// Restores the strays of a former master.
    pub(in crate::master) fn restore_strays(&mut self, saved: Vec<SavedStray>, now: Uptime) {
        if saved.is_empty() {
            return;
        }
        self.strays.extend(saved.into_iter().map(|stray| Stray {
            process: stray.process.into(),
            deadline: now + Duration::from_millis(stray.left_ms),
            asked: stray.asked.then_some(now),
            unasked: stray.unasked,
            stop_signal: restored_signal(stray.stop_signal),
        }));
        self.check_soon(now);
    }

    /// Kills all programs and strays now.
    pub(in crate::master) fn halt(&mut self) {
        self.at_once = true;
        for Stray { process, .. } in self.strays.drain(..).filter(|stray| stray.process.lives()) {
            let _ = kill(process.pid(), Signal::SIGKILL); // it may just have exited
        }
    }

    fn check_soon(&mut self, now: Uptime) {
        self.next_look = Some(now);
        self.stray_until = now + QUICK_POLL_TIME;
    }
}

impl Child {
    pub(in crate::master) fn is_unsettled_program(&self) -> bool {
        matches!(&self.link, Link::Program(program) if !program.started)
    }
}

impl Pool {
    /// Marks programs as ready. A program is ready when the program, or a descendant of it, is seen to accept
    /// connections. Without being seen, it is ready after `--settle` if it still has the socket. (The default of
    /// `--settle` is [`SETTLE_TIME`], unless another program was seen to accept connections.)
    ///
    /// Also sends signals to strays, if `orphans` are given: the processes that the master has inherited.
    pub(in crate::master) fn check_programs(&mut self, orphans: Option<&[Pid]>) {
        if !self.runs_programs() {
            return;
        }
        let settle = self.spawner.config.program.as_ref().and_then(|program| program.settle);
        let listener = &self.spawner.listeners[0];
        let (mut started, mut closed) = (Vec::new(), Vec::new());
        for (&pid, child) in &mut self.children {
            let lived = child.since.elapsed();
            let Link::Program(program) = &mut child.link else { continue };
            // A program that has been sent SIGTERM or SIGKILL may have no descriptors that can be read. This does not
            // mean that the program is ready.
            if program.started || child.asked_to_leave {
                continue;
            }
            let servers = procfs::servers_under(&[pid], listener);
            program.seen = !servers.is_empty();
            self.programs.seen |= program.seen;
            self.programs.sleeps_in_accept |= servers.iter().any(|(_, observed)| *observed == Observed::Accepting);
            if let Some(declaration) = &mut child.declaration {
                match declaration.look() {
                    DeclarationState::Awaited => {}
                    DeclarationState::Made => {
                        program.started = true;
                        started.push(pid);
                    }
                    DeclarationState::Closed if program.trouble.is_empty() => {
                        program.trouble = ready_descriptor::CLOSED;
                        closed.push((child.slot, pid));
                    }
                    DeclarationState::Closed => {}
                }
                continue;
            }
            let enough = settle.or((!self.programs.seen).then_some(SETTLE_TIME));
            program.started = program.seen || enough.is_some_and(|enough| lived >= enough && has_socket(pid, listener));
            if program.started {
                started.push(pid);
            } else if program.trouble.is_empty() && lived >= settle.unwrap_or(SETTLE_TIME) && !has_socket(pid, listener)
            {
                program.socket_closed(child.slot, pid);
            }
        }
        for (slot, pid) in closed {
            log::error!(slot, pid = pid.as_raw(); "worker killed: {}", ready_descriptor::CLOSED);
            let _ = killpg(pid, Signal::SIGKILL); // it can never become ready
        }
        for pid in started {
            self.observed.push_back(SupervisorEvent::Ready { pid });
            if !self.programs.seen && self.programs.next_count.is_none() {
                self.programs.next_count = Some(self.now() + QUEUE_INTERVAL);
            }
        }
        if let Some(orphans) = orphans {
            self.check_strays(orphans);
        }
        self.terminate_idle();
        self.check_queue();
    }

    /// Sends SIGTERM to programs and strays that do not handle SIGTERM and serve no request.
    fn terminate_idle(&mut self) {
        let now = self.now();
        for process in self.programs.idle_stop.advance(&self.spawner.listeners[0], now) {
            if let Some(Child { link: Link::Program(program), .. }) = self.children.get_mut(&process.pid()) {
                program.awaits_idle_since = None;
                self.programs.idle_stop_at = Some(now);
            } else if let Some(stray) = self.programs.strays.iter_mut().find(|stray| stray.process == process) {
                stray.was_asked(now);
            }
        }
    }

    /// Logs once if connections are waiting and no program was ever seen to accept one.
    fn check_queue(&mut self) {
        let now = self.now();
        if self.programs.next_count.is_none_or(|at| at > now) {
            return;
        }
        let listener = &self.spawner.listeners[0];
        let pids: Vec<Pid> = self.children.keys().copied().collect();
        let servers = procfs::servers_under(&pids, listener);
        if self.programs.unserved_said || !servers.is_empty() {
            // The program was slow to start. Because it was seen to accept connections, further programs must be seen
            // to do so too.
            self.programs.seen |= !servers.is_empty();
            for (&pid, child) in &mut self.children {
                if let Link::Program(program) = &mut child.link {
                    program.seen |= !procfs::servers_under(&[pid], listener).is_empty();
                }
            }
            self.programs.next_count = None;
            return;
        }
        // A program that counts as ready because it held the socket long enough may still close the socket.
        for (&pid, child) in &mut self.children {
            if let Link::Program(program) = &mut child.link
                && program.started
                && !child.asked_to_leave
                && program.trouble.is_empty()
                && !has_socket(pid, listener)
            {
                program.socket_closed(child.slot, pid);
            }
        }
        self.programs.next_count = Some(now + QUEUE_INTERVAL);
        let waiting = self.queue_depth.of(listener);
        if waiting == 0 {
            self.programs.unserved_since = None;
        } else if now >= *self.programs.unserved_since.get_or_insert(now) + UNSERVED_TIMEOUT {
            self.programs.unserved_said = true;
            log::error!(
                waiting;
                "no process accepts the waiting connections: does the program accept from its standard input? (php-cgi \
                 and programs linked with libfcgi do; php-fpm and php do not)"
            );
        }
    }

    /// Repairs the listening socket before a program is started, because any process that has the socket open may have
    /// changed it.
    ///
    /// # Errors
    /// Returns a message for the operator if the socket cannot be repaired.
    pub(in crate::master) fn mend_socket(&mut self) -> Result<(), String> {
        if !self.runs_programs() {
            return Ok(());
        }
        let listener = &self.spawner.listeners[0];
        let cause = "a process that has it open, usually as its standard input,";
        if !listener.is_listening() && !self.closing.has_begun() {
            listener.repair(&self.spawner.config, true).map_err(|why| {
                format!("cannot recreate the listening socket {listener}, which {cause} has shut down: {why}")
            })?;
            log::warn!(socket:% = listener; "recreated the listening socket: {cause} had shut it down");
        }
        // A program with an event loop sets O_NONBLOCK itself, and needs it to stay set.
        let now = self.begun.elapsed();
        let suspect = self.programs.sleeps_in_accept || self.children.is_empty() || now < self.programs.quick_until;
        if suspect && !listener.is_blocking() {
            listener
                .make_blocking()
                .map_err(|error| format!("cannot make the listening socket {listener} blocking: {error}"))?;
            log::warn!(socket:% = listener; "made the listening socket blocking again: {cause} had set O_NONBLOCK");
        }
        Ok(())
    }

    /// Sends a signal to a worker or program.
    pub(in crate::master) fn signal(&mut self, pid: Pid, by: EndBy) {
        if let Some(channel) = self.channel().map(Arc::clone) {
            return self.signal_app(&channel, pid, by);
        }
        let now = self.now();
        let listener = &self.spawner.listeners[0];
        let Some(child) = self.children.get_mut(&pid) else { return };
        let to_group = by == EndBy::Kill && !child.is_worker();
        let signal = child.signal_for(by);
        if let Link::Program(program) = &mut child.link
            && program.leave_by.is_none()
        {
            program.leave_by = Some(now + self.spawner.config.drain_timeout);
            let observed = procfs::of(pid, listener);
            program.hidden = observed == Observed::Hidden;
            if !observed.serves() {
                program.servers = procfs::holders_under(pid, listener).into_iter().filter_map(Process::of).collect();
            }
        }
        child.asked_to_leave = true;
        if by == EndBy::StopSignal
            && let Link::Program(program) = &mut child.link
            && program.servers.is_empty()
            && procfs::serves_one_at_a_time(pid, listener)
        {
            program.awaits_idle_since.get_or_insert(now);
            return self.programs.check_soon(now);
        }
        // The pid cannot belong to another process, because the child has not been reaped yet.
        let sent = if to_group { killpg(pid, signal) } else { kill(pid, signal) };
        if let Err(errno) = sent {
            let (slot, pid) = (child.slot, pid.as_raw());
            log::error!(slot, pid, signal:%; "cannot signal worker: {errno}");
        }
    }

    /// Sends SIGTERM again to a program that is still running and sleeps in accept: the first SIGTERM may have arrived
    /// between the program's check for signals and accept. A program that is serving is not sent a second SIGTERM,
    /// because it may take this as a request to exit immediately. Workers do not miss signals. If the program is a
    /// wrapper that is still running, the servers below it are treated like strays from now on.
    pub(in crate::master) fn remind(&mut self, pid: Pid) {
        if self.channel().is_some() {
            return self.remind_app(pid);
        }
        let now = self.now();
        let listener = &self.spawner.listeners[0];
        let Some(Child { link: Link::Program(program), .. }) = self.children.get_mut(&pid) else { return };
        if procfs::of(pid, listener) == Observed::Accepting {
            self.signal(pid, EndBy::StopSignal);
        } else if !program.servers.is_empty() {
            program.reminded = true;
            self.programs.check_soon(now);
        }
    }

    /// Handles the exit of a child before it is reaped. If the child has crashed or was killed, the remaining processes of its group are
    /// killed.
    pub(in crate::master) fn program_ending(&mut self, pid: Pid, ending: Ending) {
        let Some(child) = self.children.get(&pid) else { return };
        let Child { link: Link::Program(program), asked_to_leave: asked, stop_signal, .. } = child else { return };
        let stop = *stop_signal as i32;
        let signal = match ending {
            // The program may be the wrapper of processes that cannot be observed and that were not sent SIGTERM.
            Ending::Signaled(signal) if signal == stop && *asked && program.hidden => Some(*stop_signal),
            Ending::Signaled(signal) if signal == stop && *asked => None,
            Ending::Exited(_) if *asked => None,
            Ending::Exited(0 | super::STAY_DOWN) if program.started || self.programs.seen => None,
            Ending::Exited(_) | Ending::Signaled(_) => Some(Signal::SIGKILL),
        };
        if let Some(signal) = signal {
            let _ = killpg(pid, signal); // the group may be empty
        }
    }

    /// Handles the exit of a program. The program's remaining servers, which may still accept connections, must exit
    /// too.
    pub(in crate::master) fn program_ended(&mut self, program: ProgramState, stop_signal: Signal, ending: Ending) {
        let now = self.now();
        if !program.started && ending == Ending::Exited(0) {
            self.programs.quick_until = now + QUICK_POLL_TIME;
        }
        let deadline = program.leave_by.unwrap_or(now + self.spawner.config.drain_timeout);
        for process in program.servers.into_iter().filter(|process| process.lives()) {
            if self.programs.at_once {
                let _ = kill(process.pid(), Signal::SIGKILL);
                continue;
            }
            let unasked = ending == Ending::Signaled(stop_signal as i32);
            self.programs.strays.push(Stray { process, deadline, asked: None, unasked, stop_signal });
        }
        self.programs.check_soon(now);
    }

    /// Whether a program is to be sent SIGTERM soon, or was sent SIGTERM just now. If `accept` failed first, the program
    /// might report an error.
    pub(super) fn programs_exit_soon(&self) -> bool {
        let now = self.now();
        let is_recent = |at: Uptime| now < at + IDLE_TIME;
        let awaits_idle = |child: &Child| match &child.link {
            Link::Program(program) => program.awaits_idle_since.is_some(),
            Link::Worker { .. } | Link::App(_) => false,
        };
        self.programs.idle_stop_at.is_some_and(is_recent) || self.children.values().any(awaits_idle)
    }

    pub(in crate::master) fn is_search_for_strays_due(&self) -> bool {
        self.programs.next_look.is_some_and(|at| at <= self.now())
    }

    fn check_strays(&mut self, orphans: &[Pid]) {
        let now = self.now();
        let mut roots = orphans.to_vec();
        let (mut awaiting, mut is_frequent) = (Vec::new(), false);
        for (&pid, child) in &mut self.children {
            let stop_signal = child.stop_signal;
            let Link::Program(program) = &mut child.link else { continue };
            if program.reminded {
                roots.extend(procfs::children_of(pid));
            }
            let Some(since) = program.awaits_idle_since else { continue };
            if now >= since + IDLE_PATIENCE && procfs::handles(pid, stop_signal) {
                program.awaits_idle_since = None;
                self.programs.idle_stop_at = Some(now);
                let _ = kill(pid, stop_signal); // it may just have exited
            } else {
                is_frequent |= now < since + IDLE_PATIENCE;
                awaiting.extend(Process::of(pid).map(|process| (process, stop_signal)));
            }
        }
        let listener = &self.spawner.listeners[0];
        for (process, stop_signal) in &awaiting {
            self.programs.idle_stop.attempt(*process, *stop_signal, listener, now);
        }
        let mut seen = procfs::servers_under(&roots, listener);
        seen.retain(|(_, observed)| observed.accepts());
        self.programs.signal_strays(&seen, &self.spawner, now);
        let left = if is_frequent {
            Some(IDLE_INTERVAL)
        } else if !awaiting.is_empty() || !self.programs.is_empty() || now < self.programs.stray_until {
            Some(STRAYS_INTERVAL)
        } else {
            (roots.len() > orphans.len() || !orphans.is_empty()).then_some(ORPHANS_INTERVAL)
        };
        self.programs.next_look = left.map(|left| now + left);
    }
}

impl Programs {
    /// Sends SIGTERM to strays at a moment when this loses no request, and SIGKILL at their deadline. `seen` are the
    /// processes without a program that accept connections now.
    fn signal_strays(&mut self, seen: &[(Pid, Observed)], spawner: &Spawner, now: Uptime) {
        let listener = &spawner.listeners[0];
        let (drain_timeout, stop_signal) = (spawner.config.drain_timeout, spawner.current.stop_signal());
        self.strays.retain(|stray| stray.process.lives());
        for process in seen.iter().filter_map(|(pid, _)| Process::of(*pid)) {
            if self.strays.iter().all(|stray| stray.process != process) {
                let deadline = now + drain_timeout;
                self.strays.push(Stray { process, deadline, asked: None, unasked: false, stop_signal });
            }
        }
        for stray in &mut self.strays {
            let Stray { process, deadline, asked, unasked, stop_signal } = *stray;
            let pid = process.pid();
            if deadline <= now {
                let name = stray.name();
                log::warn!(
                    pid = process.pid, name;
                    "killed a process that a worker left behind, because it did not exit in time (--drain-timeout)"
                );
                let _ = kill(pid, Signal::SIGKILL); // it may just have exited
                continue;
            }
            let waits = (unasked || seen.iter().any(|(seen, _)| *seen == pid))
                && procfs::can_be_asked(pid, stop_signal, listener);
            let is_late = unasked && deadline <= now + drain_timeout / 2 && procfs::handles(pid, stop_signal);
            let is_due = asked.map_or(waits || is_late, |asked| waits && now >= asked + TERMINATE_INTERVAL);
            if is_due && waits && procfs::serves_one_at_a_time(pid, listener) {
                self.idle_stop.attempt(process, stop_signal, listener, now);
            } else if is_due {
                let _ = kill(pid, stop_signal); // it may just have exited
                stray.was_asked(now);
            }
        }
    }
}

/// Whether any process of a program has the socket open; true if this is unknown.
fn has_socket(pid: Pid, listener: &crate::net::listen::Listener) -> bool {
    procfs::family_of(&[pid]).into_iter().any(|pid| procfs::of(pid, listener) != Observed::Apart)
}

/// Returns a hint for the operator about the exit of a program that was not ready.
pub(in crate::master) fn hint(ending: Ending) -> &'static str {
    match ending {
        Ending::Exited(0) => {
            "it exited with status 0, and was not seen to accept a connection: if it accepted none, is it a FastCGI \
             program, which accepts from its standard input? (php-cgi is one, php is not)"
        }
        Ending::Exited(125) => "env, timeout, nice, docker run and the like return 125 when they themselves fail",
        Ending::Exited(126) => "126: a shell, env or the like found the command but could not execute it",
        Ending::Exited(127) => "127: a shell, env or the like did not find the command",
        Ending::Exited(_) | Ending::Signaled(_) => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_strays_an_upgrade_leaves_nothing_to_check() {
        let mut programs = Programs::default();
        programs.restore_strays(Vec::new(), Uptime::ZERO);
        assert_eq!(programs.next_deadline(Uptime::ZERO), None);
    }
}
