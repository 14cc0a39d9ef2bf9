//! Carries out the commands of operators, and changes the number of workers and the settings. Pure, like the rest of
//! the supervisor.

use super::messages::{Action, Command, Notice, Policy};
use super::{Mode, Supervisor, Uptime};

impl Supervisor {
    pub(super) fn command(&mut self, command: Command, now: Uptime) {
        match (command, self.mode) {
            (Command::Drain, Mode::Running) => self.stop(true, now),
            (Command::Halt, Mode::Running | Mode::Stopping { .. }) => self.halt(now),
            (Command::Reload, Mode::Running) => self.begin_roll(),
            (Command::Add, Mode::Running) => {
                let (min, max) = self.scaler.limits();
                self.retarget((min + 1, max + 1), self.target + 1, now);
            }
            (Command::Remove, Mode::Running) => {
                let (min, max) = self.scaler.limits();
                // The last worker may be removed only if the configured minimum is 0.
                let lowest = self.policy.workers.0.min(1);
                let fewer = max.saturating_sub(1).max(1);
                let least = min.saturating_sub(1).max(lowest).min(fewer);
                self.retarget((least, fewer), self.target.saturating_sub(1).max(lowest), now);
            }
            (Command::Scale(number), Mode::Running) => self.retarget((number, number), number, now),
            (Command::Upgrade, Mode::Running) => self.actions.push(Action::Upgrade),
            (
                Command::Drain
                | Command::Reload
                | Command::Add
                | Command::Remove
                | Command::Scale(_)
                | Command::Upgrade,
                Mode::Stopping { .. } | Mode::Stopped,
            )
            | (Command::Halt, Mode::Stopped) => {}
        }
    }

    pub(crate) fn policy(&self) -> Policy {
        self.policy
    }

    pub(super) fn set_policy(&mut self, policy: Policy, now: Uptime) {
        let before = self.policy;
        self.policy = Policy { slots: before.slots, ..policy };
        self.respawns.set_rate(policy.respawn_rate);
        self.scaler.set_pace(policy.per_worker, policy.scale_down_after);
        // Changes by commands are kept, unless the configured number has changed.
        if policy.workers != before.workers && self.mode == Mode::Running {
            self.retarget(policy.workers, self.target, now);
        }
    }

    /// Applies the number of workers that the operator has requested.
    fn retarget(&mut self, limits: (u32, u32), target: u32, now: Uptime) {
        let is_possible = limits.1 > 0 && limits.1 < self.policy.slots;
        if !is_possible || (limits == self.scaler.limits() && target == self.target) {
            return self.notice(Notice::TargetLimit(self.target));
        }
        self.target = self.scaler.set_limits(limits, target, now);
        self.notice(Notice::Target(self.target));
    }

    /// Removes a worker that has asked not to be replaced.
    pub(super) fn retire(&mut self, now: Uptime) {
        if self.mode != Mode::Running {
            return;
        }
        let (min, max) = self.scaler.limits();
        let fewer = max.saturating_sub(1);
        let target = self.target.saturating_sub(1);
        self.target = self.scaler.set_limits((min.min(fewer), fewer), target, now);
        self.notice(Notice::Target(self.target));
        if fewer == 0 {
            self.stop(false, now);
        }
    }
}
