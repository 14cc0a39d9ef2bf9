//! Closes the listening sockets when the server stops: new connections are refused, and queued connections are served.
//!
//! ```text
//! stop ─▶ queues stop growing ─▶ workers, asked to exit, accept what is queued ─▶ empty: refuse ─▶ socket files removed
//!                                programs accept what is queued, and are asked to exit when it is empty
//! ```
//!
//! A worker that is asked to exit accepts the queued connections and then closes its listening sockets. A program that
//! is asked to exit accepts no further connections, so the master asks it only when the queue is empty. Half of
//! `--drain-timeout` is reserved for the queue, the rest for accepted connections. Sockets that the server did not bind
//! (systemd, fd:N) are left unchanged.

use std::collections::{BTreeSet, HashMap};
use std::time::{Duration, Instant};

use nix::unistd::Pid;

use super::Pool;
use super::child::{Child, EndBy, Link};
use super::supervisor::{Phase, SupervisorEvent};
use crate::master::procfs::{self, Observed};
use crate::net::listen::{self, Listener};

/// How often the queues are checked.
const POLL_INTERVAL: Duration = Duration::from_millis(5);
/// How long programs may stay in accept(2) after they have been asked to exit. When the socket closes, accept fails. A
/// program that notices the failure before the request to exit might report an error, and a program manager might start
/// other processes.
pub(super) const IDLE_TIME: Duration = Duration::from_millis(200);
/// A program that is found idle in this many checks, one per second, is killed.
const FOUND_IDLE: u32 = 3;

/// The progress of closing the listening sockets.
#[derive(Default)]
pub(in crate::master) struct Closing {
    sockets: Option<listen::Closing>,
    /// Whether to stop waiting for the queues, because the server stops immediately or because no process is left to
    /// accept.
    hurries: bool,
    /// Programs to ask to exit when the queues are empty.
    held: Vec<Pid>,
    /// Indexes of sockets that were found not to be listening and have been logged.
    not_listening: BTreeSet<usize>,
    /// Number of times that each program has been found idle since it was asked to exit.
    found_idle: HashMap<Pid, u32>,
}

impl Closing {
    pub(in crate::master) fn has_begun(&self) -> bool {
        self.sockets.is_some()
    }

    fn is_under_way(&self) -> bool {
        self.sockets.as_ref().is_some_and(|sockets| !sockets.is_over())
    }

    /// Whether the master is not waiting for any queue.
    pub(in crate::master) fn is_dry(&self) -> bool {
        self.sockets.as_ref().is_none_or(listen::Closing::is_dry)
    }

    /// Returns how long the master's loop may wait.
    pub(in crate::master) fn due_in(&self) -> Option<Duration> {
        self.is_under_way().then_some(POLL_INTERVAL)
    }
}

impl Pool {
    /// Stops new connections from entering the queues of the sockets that the server bound. With `at_once`, the master
    /// does not wait until the queues are empty.
    pub(in crate::master) fn close_sockets(&mut self, at_once: bool) {
        self.closing.hurries |= at_once;
        if let Some(sockets) = &mut self.closing.sockets {
            if at_once && !sockets.is_over() {
                sockets.hurry(Instant::now());
                self.advance_closing();
            }
            return;
        }
        let patience = if at_once { Duration::ZERO } else { self.spawner.config.drain_timeout / 2 };
        let linger = if self.runs_programs() && !at_once { IDLE_TIME } else { Duration::ZERO };
        let begun = listen::Closing::begin(&self.spawner.listeners, patience, linger);
        if begun.is_over() {
            return; // the server bound none of the sockets
        }
        self.closing.sockets = Some(begun);
        self.advance_closing();
    }

    /// Advances the closing of the sockets, and reports to the supervisor whether connections wait in the queues.
    pub(in crate::master) fn check_closing(&mut self) {
        if self.closing.is_under_way() {
            self.advance_closing();
            self.observed.push_back(SupervisorEvent::Queue { waits: !self.closing.is_dry() });
        }
    }

    /// Refuses connections at sockets whose queue is empty.
    fn advance_closing(&mut self) {
        if self.closing.is_under_way() {
            let is_held = self.programs_exit_soon();
            let depth = &self.queue_depth;
            let queued = |listener: &Listener| depth.counted(listener).unwrap_or(0);
            let sockets = self.closing.sockets.as_mut();
            let lost =
                sockets.map_or(0, |sockets| sockets.advance(&self.spawner.listeners, queued, is_held, Instant::now()));
            if lost > 0 {
                let in_time = match self.closing.hurries {
                    true => "are reset",
                    false => "in time are reset (half of --drain-timeout is reserved for them)",
                };
                log::warn!(connections = lost; "connections that no process accepted {in_time}");
            }
            if self.closing.is_dry() {
                self.release_held();
            }
            if self.closing.is_under_way() {
                return;
            }
            // From now on, the next server can use the names. The inode number of a socket's file is not reused while
            // this process holds the socket, so a file that the next server creates cannot be mistaken for this
            // server's file.
            self.spawner.listeners.iter().for_each(Listener::remove_file);
            // A program has the socket as its standard input, so its name stays in use until the program has exited.
            if !self.runs_programs() {
                for listener in self.spawner.listeners.iter().filter(|listener| listener.is_abstract()) {
                    listener.give_up(self.spawner.stand_in());
                }
            }
            log::info!("new connections are refused");
        }
        self.release_held();
    }

    fn release_held(&mut self) {
        for pid in std::mem::take(&mut self.closing.held) {
            self.signal(pid, EndBy::StopSignal);
        }
    }

    /// Checks whether the sockets are still listening, because any process that holds a socket can end this for all
    /// processes with shutdown(2). Called after an unexpected exit.
    pub(in crate::master) fn look_whether_sockets_listen(&mut self) {
        if self.closing.has_begun() {
            return;
        }
        let listeners = self.spawner.listeners.iter().enumerate();
        for (index, listener) in listeners.filter(|(_, listener)| !listener.is_listening()) {
            if self.closing.not_listening.insert(index) {
                log::error!(
                    bind:% = listener.bind;
                    "a socket no longer listens: a process that holds it called shutdown(2) on it (stop and start the server)"
                );
            }
        }
    }

    /// Asks a process to exit. A started program is asked only when the queue is empty.
    pub(in crate::master) fn terminate(&mut self, pid: Pid) {
        let waits = !self.closing.is_dry();
        match self.children.get_mut(&pid) {
            Some(child) if waits && matches!(&child.link, Link::Program(program) if program.started) => {
                child.asked_to_leave = true;
                self.closing.held.push(pid);
            }
            _ => self.signal(pid, EndBy::StopSignal),
        }
    }

    /// Sends the request to exit again to a process that has not exited within a second. While the server is stopping,
    /// a program that serves no request is killed after several checks.
    pub(in crate::master) fn remind_or_end(&mut self, pid: Pid) {
        if self.closing.held.contains(&pid) {
            return;
        }
        if self.supervisor.view().phase == Phase::Stopping
            && let Some(Child { link: Link::Program(program), slot, .. }) = self.children.get(&pid)
        {
            let listener = &self.spawner.listeners[0];
            let starts = || !program.started && procfs::servers_under(&[pid], listener).is_empty();
            if procfs::of(pid, listener) == Observed::Accepting || starts() {
                let found = self.closing.found_idle.entry(pid).or_default();
                *found += 1;
                if *found >= FOUND_IDLE {
                    log::warn!(slot, pid = pid.as_raw(); "worker killed: it serves no request and did not exit");
                    return self.signal(pid, EndBy::Kill);
                }
            }
        }
        self.remind(pid);
    }
}
