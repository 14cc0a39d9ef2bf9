//! Reaps the master's children: determines what each child was, kills the processes that must end with it, and notifies
//! the component that started it.

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use super::apps::Which;
use super::{Master, procfs};
use crate::sys;

/// The kind of a child. Each component records the children that it has started; only [`Master::kind_of`] searches
/// the records of all components for a pid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// A worker, or a program in its place.
    Worker,
    /// A program behind gateways.
    App,
    /// A daemon or a job.
    Sidecar,
    Relay,
    Guard,
    UpgradeCheck,
    Symbolizer,
    /// The child existed before the master.
    Earlier,
    /// An heir, or an orphan whose parent was a child of a different kind.
    Orphan,
}

impl Master {
    pub(super) fn kind_of(&self, pid: Pid) -> Kind {
        match pid {
            _ if self.pool.children.contains_key(&pid) => Kind::Worker,
            _ if self.apps.as_ref().is_some_and(|apps| apps.children.contains_key(&pid)) => Kind::App,
            _ if self.sidecars.has(pid) => Kind::Sidecar,
            _ if self.relay.pid() == Some(pid) => Kind::Relay,
            _ if self.guard.has(pid) => Kind::Guard,
            _ if self.upgrade.has(pid) => Kind::UpgradeCheck,
            _ if self.pool.faults.symbolizer.has(pid) => Kind::Symbolizer,
            _ if self.earlier.has(pid) => Kind::Earlier,
            _ => Kind::Orphan,
        }
    }

    /// Returns the children that this process did not start but inherited when their parents exited. Children that
    /// existed before the server started are not included.
    pub(super) fn orphans(&self) -> Vec<Pid> {
        let mut orphans = procfs::own_children();
        orphans.retain(|&pid| {
            self.kind_of(pid) == Kind::Orphan
                && procfs::stat(pid).is_some_and(|stat| !stat.is_zombie && !stat.is_heir())
        });
        orphans
    }

    /// Reaps all children that have exited. One SIGCHLD may stand for several exits.
    pub(super) fn reap(&mut self) {
        self.guard.look();
        while let Some(pid) = sys::ended_child() {
            let kind = self.kind_of(pid);
            self.end_group(kind, pid);
            let Some(ending) = sys::reap(pid) else { return };
            match kind {
                Kind::Worker => {
                    let slot = self.pool.children.get(&pid).map(|child| child.slot);
                    self.pool.ended(pid, ending, &self.signals);
                    slot.into_iter().for_each(|slot| self.gateway_died(slot));
                    self.report_death(Which::Front);
                    self.feed_observed(Which::Front);
                }
                Kind::App => {
                    self.pool.read_children(); // a gateway may have reported the request of which the process died
                    self.attribute_faults();
                    self.apps.iter_mut().for_each(|apps| apps.ended(pid, ending, &self.signals));
                    self.report_death(Which::Apps);
                    self.feed_observed(Which::Apps);
                }
                Kind::Sidecar => self.sidecars.ended(pid, ending),
                Kind::Relay => self.relay.ended(pid, ending, self.now()),
                Kind::Guard => self.guard.ended(pid, ending, self.now()),
                Kind::UpgradeCheck => self.upgrade_check_ended(ending),
                Kind::Symbolizer => self.pool.faults.symbolizer.ended(&self.signals),
                Kind::Earlier | Kind::Orphan => {
                    let (status, signal) = (ending.exit_status(), ending.signal_name());
                    log::debug!(pid = pid.as_raw(), status, signal; "reaped an orphan");
                }
            }
        }
    }

    /// Kills the remaining processes in the group of a child if they must not outlive the child. The child has not been
    /// reaped yet, so its pid cannot be another group's number.
    fn end_group(&mut self, kind: Kind, pid: Pid) {
        let ending = sys::ending_of(pid);
        match (kind, ending) {
            (Kind::UpgradeCheck, _) | (Kind::Sidecar, None) => drop(killpg(pid, Signal::SIGKILL)), // the group must be empty
            (Kind::Sidecar, Some(ending)) if !self.sidecars.spares(pid, ending) => drop(killpg(pid, Signal::SIGKILL)),
            (Kind::Worker, Some(ending)) => self.pool.program_ending(pid, ending),
            (Kind::App, Some(ending)) => self.apps.iter().for_each(|apps| apps.app_ending(pid, ending)),
            (
                Kind::Worker
                | Kind::App
                | Kind::Sidecar
                | Kind::Relay
                | Kind::Guard
                | Kind::Symbolizer
                | Kind::Earlier
                | Kind::Orphan,
                _,
            ) => {}
        }
    }
}
