//! Reaps the master's children: determines what each child was, kills the processes that must end with it, and notifies
//! the component that started it.

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use super::spawn::Launch;
use super::supervisor::{AfterExit, SupervisorEvent};
use super::{Master, death_log};
use crate::app::hooks::{WorkerExit, WorkerId};
use crate::sys::{self, Ending};

/// The exit status with which a worker requests not to be replaced.
pub(super) const STAY_DOWN: i32 = 125;

/// The kind of a child. Each component records the children that it has started; only [`Master::kind_of`] searches
/// the records of all components for a pid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// A worker, or a program in its place.
    Worker,
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
            _ if self.children.contains_key(&pid) => Kind::Worker,
            _ if self.sidecars.has(pid) => Kind::Sidecar,
            _ if self.relay.pid() == Some(pid) => Kind::Relay,
            _ if self.guard.has(pid) => Kind::Guard,
            _ if self.upgrade.has(pid) => Kind::UpgradeCheck,
            _ if self.faults.symbolizer.has(pid) => Kind::Symbolizer,
            _ if self.earlier.has(pid) => Kind::Earlier,
            _ => Kind::Orphan,
        }
    }

    /// Reaps all children that have exited. One SIGCHLD may stand for several exits.
    pub(super) fn reap(&mut self) {
        self.guard.look();
        while let Some(pid) = sys::ended_child() {
            let kind = self.kind_of(pid);
            self.end_group(kind, pid);
            let Some(ending) = sys::reap(pid) else { return };
            match kind {
                Kind::Worker => self.worker_ended(pid, ending),
                Kind::Sidecar => self.sidecars.ended(pid, ending),
                Kind::Relay => self.relay.ended(pid, ending, self.now()),
                Kind::Guard => self.guard.ended(pid, ending, self.now()),
                Kind::UpgradeCheck => self.upgrade_check_ended(ending),
                Kind::Symbolizer => self.faults.symbolizer.ended(&self.signals),
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
            (Kind::Worker, Some(ending)) => self.program_ending(pid, ending),
            (
                Kind::Worker
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

    fn worker_ended(&mut self, pid: Pid, ending: Ending) {
        self.read_child(pid, 0);
        let Some(mut child) = self.children.remove(&pid) else { return };
        if let Some(output) = child.output.take() {
            child.last_line = self.orphaned_outputs.adopt(output, pid, self.now());
        }
        let program = child.program();
        let (slot, generation, since, asked) = (child.slot, child.generation, child.since, child.asked_to_leave);
        self.recycling.died(pid);
        let is_starting = death_log::is_starting(pid, &child, &self.scoreboard);
        self.scoreboard.mark_dead(slot, pid.as_raw().cast_unsigned());
        let unasked = child.is_worker() && !child.asked_to_leave && !child.hung;
        let was_killed = unasked && ending == Ending::Signaled(libc::SIGKILL);
        let no_memory = if was_killed { self.faults.ran_out_of_memory(self.now()) } else { None };
        if !is_starting && program.is_none() && matches!(ending, Ending::Signaled(_)) {
            self.feed(SupervisorEvent::Ready { pid }); // its row shows that it was ready; it may have been killed before its report
        }
        let limits = is_starting.then_some(self.spawner.config.privileges.limits.as_slice());
        let mut postmortem = death_log::publish(pid, ending, child, no_memory, &self.scoreboard, limits);
        self.left(std::mem::take(&mut postmortem.death_record));
        if let Launch::Worker(_, hooks) = &self.spawner.launch {
            let worker = WorkerId { slot, generation };
            let (pid, served, lived) = (pid.as_raw().cast_unsigned(), postmortem.served, since.elapsed());
            let exit = WorkerExit { worker, pid, status: ending.status(), asked, served, lived };
            hooks.of_master.on_worker_exit(exit);
        }
        self.take_evidence(slot, pid, postmortem);
        let after_exit = after_exit(ending, !is_starting);
        match program {
            Some(program) => self.program_ended(program, ending),
            None if !asked => self.look_whether_sockets_listen(),
            None => {}
        }
        self.check_closing(); // the process may have exited because the queue is empty
        self.feed(SupervisorEvent::Exited { pid, after_exit });
    }
}

/// Returns the reaction to the end of a process. A program may be a wrapper: `env`, `timeout` and `docker run` return
/// 125 when they themselves fail. Status 125 therefore takes effect only for a process that was ready.
pub(super) fn after_exit(ending: Ending, was_ready: bool) -> AfterExit {
    match ending {
        Ending::Exited(0) => AfterExit::Restart,
        Ending::Exited(STAY_DOWN) if was_ready => AfterExit::StayDown,
        Ending::Exited(_) | Ending::Signaled(_) => AfterExit::Replace,
    }
}

#[cfg(test)]
mod tests {
    use super::super::programs::hint;
    use super::*;

    #[test]
    fn status_125_is_a_failure_unless_the_process_was_ready() {
        assert_eq!(after_exit(Ending::Exited(125), false), AfterExit::Replace);
        assert_eq!(after_exit(Ending::Exited(125), true), AfterExit::StayDown);
        assert_eq!(after_exit(Ending::Exited(0), false), AfterExit::Restart);
        assert!([125, 126, 127].iter().all(|&status| hint(Ending::Exited(status)).contains(&status.to_string())));
    }
}
