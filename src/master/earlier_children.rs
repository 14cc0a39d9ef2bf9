//! Records the children that this process already had when the server started, and their descendants: for example the
//! log collector of an entry script that called exec to become the server (`exec SERVER 2> >(cat)`). These processes
//! are reaped, and otherwise left alone.

use nix::unistd::{Pid, getpgrp};

use super::procfs::{self, Process};
use crate::upgrade::saved_state::SavedProcess;

/// The processes that were found at startup, including those that have exited since.
#[derive(Debug, Default)]
pub(crate) struct EarlierChildren(Vec<Process>);

impl EarlierChildren {
    /// Finds all children of this process, and their descendants. Must be called before the server starts a child.
    pub(crate) fn record() -> Self {
        Self(procfs::family_of(&procfs::own_children()).into_iter().filter_map(Process::of).collect())
    }

    pub(super) fn save(&self) -> Vec<SavedProcess> {
        self.0.iter().map(|&process| process.into()).collect()
    }

    pub(super) fn restore(saved: &[SavedProcess]) -> Self {
        Self(saved.iter().map(|&process| process.into()).collect())
    }

    /// Whether the process is a recorded process, or appears to descend from one because it is in the process group of
    /// a recorded process or of the master. (Each process that the master starts has its own group.)
    pub(super) fn has(&self, pid: Pid) -> bool {
        if self.0.is_empty() {
            return false;
        }
        let Some(stat) = procfs::stat(pid) else { return false };
        let is_known = |one: &Process| one.pid() == pid && one.started == stat.started;
        let is_in_group = |one: &Process| {
            procfs::stat(one.pid()).is_some_and(|known| known.started == one.started && known.group == stat.group)
        };
        stat.group == getpgrp().as_raw() || self.0.iter().any(|one| is_known(one) || is_in_group(one))
    }
}
