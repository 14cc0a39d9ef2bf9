//! What becomes of the listening sockets when everything stops: new connections are refused, and what is queued is served.
//!
//! ```text
//! stop ─▶ nobody enters the queue ─▶ workers, asked to leave, accept what is queued ─▶ empty: refuse ─▶ socket files removed
//!                                    programs do so at once, and are asked to leave when it is empty
//! ```
//!
//! A worker that leaves accepts what is queued and then gives the socket up. A program that is asked to leave accepts
//! nothing more, so it is asked only when the queue is empty. Half of `--drain-timeout` is for that, the rest for what was accepted.
//! The sockets of others (systemd, fd:N) stay as they are.

use std::collections::{BTreeSet, HashMap};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use nix::unistd::Pid;

use super::Master;
use super::procfs::{self, Observed};
use super::spawn::{Child, Launch, Link};
use super::supervisor::{Event, Phase};
use crate::net::listen::{self, Listener};

/// How often the queues are looked at.
const POLL_INTERVAL: Duration = Duration::from_millis(5);
/// How long programs are left in accept(2) after they were asked to leave: it fails then, and one that learns of that first might report a
/// failure, or a manager of several might start others.
const IDLE_TIME: Duration = Duration::from_millis(200);
/// A program that is found to serve nobody so often, once a second, is ended.
const FOUND_IDLE: u32 = 3;

/// How far the closing is.
#[derive(Default)]
pub(super) struct Closing {
    sockets: Option<listen::Closing>,
    /// Nothing is waited for: a stop at once, or nobody is left to accept.
    hurries: bool,
    /// Programs that are to be asked to leave when the queues are empty.
    held: Vec<Pid>,
    /// Sockets that were found not to listen any more, and the log says so.
    deaf: BTreeSet<usize>,
    /// How often programs were found to serve nobody though they were asked to leave.
    found_idle: HashMap<Pid, u32>,
}

impl Closing {
    pub(super) fn has_begun(&self) -> bool {
        self.sockets.is_some()
    }

    fn is_under_way(&self) -> bool {
        self.sockets.as_ref().is_some_and(|sockets| !sockets.is_over())
    }

    /// Whether no queue is waited for.
    pub(super) fn is_dry(&self) -> bool {
        self.sockets.as_ref().is_none_or(listen::Closing::is_dry)
    }

    /// How long the loop may wait.
    pub(super) fn due_in(&self) -> Option<Duration> {
        self.is_under_way().then_some(POLL_INTERVAL)
    }
}

impl Master {
    /// Lets nobody enter the queues of our own sockets, and gives these some time to empty, or none.
    pub(super) fn close_sockets(&mut self, at_once: bool) {
        self.closing.hurries |= at_once;
        if let Some(sockets) = &mut self.closing.sockets {
            if at_once && !sockets.is_over() {
                sockets.hurry(Instant::now());
                self.advance_closing();
            }
            return;
        }
        let patience = if at_once { Duration::ZERO } else { self.spawner.config.drain_timeout / 2 };
        let runs_programs = matches!(self.spawner.launch, Launch::Program(_)) && !at_once;
        let linger = if runs_programs { IDLE_TIME } else { Duration::ZERO };
        let begun = listen::Closing::begin(&self.spawner.listeners, patience, linger);
        if begun.is_over() {
            return; // none is ours
        }
        self.closing.sockets = Some(begun);
        self.advance_closing();
    }

    /// Has the closing go on, and the supervisor know whether there is something to accept.
    pub(super) fn check_closing(&mut self) {
        if self.closing.is_under_way() {
            self.advance_closing();
            self.feed(Event::Queue { waits: !self.closing.is_dry() });
        }
    }

    /// Refuses connections where the queue is empty.
    fn advance_closing(&mut self) {
        if self.closing.is_under_way() {
            let depth = &self.queue_depth;
            let queued = |listener: &Listener| depth.counted(listener).unwrap_or(0);
            let sockets = self.closing.sockets.as_mut();
            let lost = sockets.map_or(0, |sockets| sockets.advance(&self.spawner.listeners, queued, Instant::now()));
            if lost > 0 {
                let (orphaned_outputs, limit) = match self.closing.hurries {
                    true => ("", ""),
                    false => (" in time", " (half of --drain-timeout is for them)"),
                };
                log::warn!("connections that nobody accepted{orphaned_outputs} are reset connections={lost}{limit}");
            }
            if self.closing.is_dry() {
                self.release_held();
            }
            if self.closing.is_under_way() {
                return;
            }
            // Their names are free for the next start from now on. (The number of a file's inode stays ours as long as we hold its
            // socket, so that a file which the next start makes is not taken for this one.)
            self.spawner.listeners.iter().for_each(Listener::remove_file);
            for listener in self.spawner.listeners.iter().filter(|listener| listener.is_abstract()) {
                listener.give_up(self.spawner.stand_in());
            }
            log::info!("new connections are refused");
        }
        self.release_held();
    }

    fn release_held(&mut self) {
        for pid in std::mem::take(&mut self.closing.held) {
            self.signal(pid, Signal::SIGTERM);
        }
    }

    /// A process has ended of which nobody wanted that. It may be that no socket listens any more: shutdown(2), by whatever process holds
    /// one, ends that for all.
    pub(super) fn look_whether_sockets_listen(&mut self) {
        if self.closing.has_begun() {
            return;
        }
        let listeners = self.spawner.listeners.iter().enumerate();
        for (index, listener) in listeners.filter(|(_, listener)| !listener.is_listening()) {
            if self.closing.deaf.insert(index) {
                log::error!(
                    "a socket listens no more: some process that holds it has called shutdown(2) on it (stop and start) \
                     bind={}",
                    listener.bind
                );
            }
        }
    }

    /// Asks a process to leave: a program that serves, when the queue is empty.
    pub(super) fn terminate(&mut self, pid: Pid) {
        let waits = !self.closing.is_dry();
        match self.children.get_mut(&pid) {
            Some(child) if waits && matches!(&child.link, Link::Program(program) if program.started) => {
                child.asked_to_leave = true;
                self.closing.held.push(pid);
            }
            _ => self.signal(pid, Signal::SIGTERM),
        }
    }

    /// A process has not left yet, a second after it was asked to. A program that serves nobody is not waited for when everything
    /// stops.
    pub(super) fn remind_or_end(&mut self, pid: Pid) {
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
                    log::warn!("worker slot={slot} pid={pid} serves nobody and does not leave: killed");
                    return self.signal(pid, Signal::SIGKILL);
                }
            }
        }
        self.remind(pid);
    }
}
