//! Terminates or logs the processes that remain when the server exits.
//!
//! The kernel reparents orphaned descendants to the master, so the master can list the remaining processes. Processes
//! in the master's session end with the master: the master first asks them to exit, and then kills them. Processes with
//! their own session (setsid) are meant to outlive the server, and are only logged, except that processes left behind
//! by daemons are always terminated. The sockets that this server has bound stop listening, even if another process
//! still has them open.

use std::collections::BTreeSet;
use std::os::fd::AsFd as _;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, getpid};

use super::Master;
use super::procfs::{self, Environment, Observed};
use crate::sys;

/// How long the remaining processes may take to exit.
const GRACE_TIMEOUT: Duration = Duration::from_secs(1);
/// How long killed processes may take to disappear.
const KILL_TIMEOUT: Duration = Duration::from_secs(1);
/// Interval at which to look for remaining processes. The kernel may reparent an orphan to the master only a moment
/// later.
const POLL_INTERVAL: Duration = Duration::from_millis(10);

impl Master {
    pub(super) fn end_leftovers(&mut self) {
        self.pool.spawner.listeners.iter().for_each(crate::net::listen::Listener::stop_listening);
        let Some(session) = procfs::stat(getpid()).map(|stat| stat.session) else { return };
        let begun = Instant::now();
        let mut asked = BTreeSet::new();
        loop {
            while let Some(pid) = sys::ended_child() {
                sys::reap(pid);
            }
            let family = procfs::family_of(&self.orphans());
            let (ours, apart): (Vec<Pid>, Vec<Pid>) =
                family.into_iter().partition(|&pid| self.ends_with_us(pid, session));
            let is_over = begun.elapsed() >= GRACE_TIMEOUT;
            // While a process is in the middle of exec, it is unknown which daemon started it.
            let is_in_exec = |&pid: &Pid| procfs::environment_of(pid).seen_for(begun.elapsed()) == Environment::InExec;
            let is_undecided = || apart.iter().any(is_in_exec);
            if ours.is_empty() && !is_undecided() || begun.elapsed() >= GRACE_TIMEOUT + KILL_TIMEOUT {
                return apart.into_iter().for_each(|pid| self.log_survivor(pid));
            }
            for pid in ours {
                let signal = if is_over || self.pool.programs.at_once { Signal::SIGKILL } else { Signal::SIGTERM };
                if asked.insert((pid, signal as i32)) {
                    let name = procfs::stat(pid).map(|stat| stat.name).unwrap_or_default();
                    log::info!(
                        pid = pid.as_raw(), name, signal:%;
                        "sent a signal to a process that was left behind, because the server is exiting"
                    );
                    let _ = kill(pid, signal); // it may just have exited
                }
            }
            let timeout = PollTimeout::try_from(POLL_INTERVAL).unwrap_or(PollTimeout::ZERO);
            let _ = poll(&mut [PollFd::new(self.signals.as_fd(), PollFlags::POLLIN)], timeout);
            self.signals.take();
        }
    }

    fn ends_with_us(&self, pid: Pid, session: i32) -> bool {
        procfs::stat(pid).is_some_and(|stat| stat.session == session) || self.sidecars.has_left(pid)
    }

    fn log_survivor(&self, pid: Pid) {
        let Some(name) = procfs::stat(pid).filter(|stat| !stat.is_zombie).map(|stat| stat.name) else { return };
        let listeners = self.pool.spawner.listeners.iter();
        let mut holds =
            listeners.filter(|listener| !matches!(procfs::of(pid, listener), Observed::Apart | Observed::Hidden));
        let pid = pid.as_raw();
        match holds.next() {
            Some(listener) => log::warn!(
                pid, name, socket:% = listener;
                "a process outlives the server, and still has a listening socket open"
            ),
            None => log::info!(pid, name; "a process outlives the server, because it has its own session"),
        }
    }
}
