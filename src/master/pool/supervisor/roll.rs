//! Replaces running workers, for a reload or at the end of their lifetime. Both kinds of replacement follow the same
//! rules and share one budget. The new worker is ready before the old one drains. At most `max_unavailable` workers are
//! being replaced at a time; a replacement lasts from the start of the new worker to the exit of the old one.
//!
//! A reload begins with one process of the new generation, the canary. The generation is proven when the canary has been
//! ready for `settle`. Until then, no process is replaced because of its generation, and a process of the old generation
//! that dies is replaced by one of the old generation. After that, every started process is of the new generation.
//!
//! When a new process fails to start, or dies within `settle` of being ready, the reload has failed. The old processes
//! then keep running, and are later replaced by processes of the old generation. New processes that are ready keep running
//! too; those that die are replaced by processes of the old generation.
//!
//! A new process that exits with 0 within `settle` may have served its share of requests. If it is known to have served
//! requests, this proves the generation. Otherwise, another canary is tried, up to [`MAX_UNSEEN`] times.
//!
//! The supervisor distinguishes generations by number only.

use super::messages::{Action, AfterExit, Notice, RollFailure};
use super::{MAX_UNSEEN, Slot, State, Supervisor, Uptime, number};

/// A reload under way.
#[derive(Clone, Copy, Debug)]
pub(super) struct Roll {
    pub(super) generation: u64,
    /// Whether a process of this generation has been ready for long enough.
    pub(super) proven: bool,
    /// Number of consecutive processes of this generation that have exited with 0 before they were ready, or soon after.
    pub(super) unseen: u32,
}

impl Supervisor {
    pub(super) fn begin_roll(&mut self) {
        self.newest += 1;
        self.roll = Some(Roll { generation: self.newest, proven: false, unseen: 0 });
        // A reload presumably fixes the cause of the failures: try again immediately.
        self.breaker.close();
        self.end_backoffs(Uptime::MAX);
        self.notice(Notice::ReloadStarted { generation: self.newest });
    }

    /// Records that a process is ready.
    pub(super) fn new_is_ready(&mut self, generation: u64) {
        if let Some(roll) = self.roll.as_mut().filter(|roll| roll.generation == generation && roll.proven) {
            roll.unseen = 0;
        }
    }

    /// Marks the new generation as proven if one of its processes has been ready for long enough.
    pub(super) fn prove(&mut self, now: Uptime) {
        let is_due = self.settling().any(|at| at <= now);
        if let Some(roll) = self.roll.as_mut().filter(|_| is_due) {
            (roll.proven, roll.unseen) = (true, 0);
        }
    }

    /// Returns the time at which the new generation is proven, if one of its processes is ready.
    pub(super) fn settles_at(&self) -> Option<Uptime> {
        self.settling().min()
    }

    /// Returns when each process of a generation that is not proven will have been ready for long enough.
    fn settling(&self) -> impl Iterator<Item = Uptime> {
        let unproven = self.roll.filter(|roll| !roll.proven);
        let slots =
            self.slots.iter().filter(move |slot| unproven.is_some_and(|roll| roll.generation == slot.generation));
        let ready = slots.filter(|slot| matches!(slot.state, State::Ready { .. }));
        ready.filter_map(|slot| Some(slot.ready_since?.saturating_add(self.policy.settle)))
    }

    /// Whether a process of the new generation has not been ready for long enough.
    pub(super) fn is_unsettled(&self, slot: &Slot, now: Uptime) -> bool {
        let settles_at = slot.ready_since.map(|since| since.saturating_add(self.policy.settle));
        self.is_new(slot.generation) && settles_at.is_some_and(|at| now < at)
    }

    /// Handles the end of a process of the new generation that was not ready for long enough.
    pub(super) fn ended_early(&mut self, slot: u32, pid: nix::unistd::Pid, after_exit: AfterExit) {
        let Some(roll) = &mut self.roll else { return };
        match after_exit {
            AfterExit::Done => (roll.proven, roll.unseen) = (true, 0),
            AfterExit::Restart if roll.unseen + 1 < MAX_UNSEEN => roll.unseen += 1,
            AfterExit::Restart | AfterExit::Replace | AfterExit::StayDown => {
                self.fail_roll(slot, Some(pid), RollFailure::DiedSoon);
            }
        }
    }

    /// Whether the reload depends on processes of this generation.
    pub(super) fn is_new(&self, generation: u64) -> bool {
        self.roll.is_some_and(|roll| roll.generation == generation)
    }

    pub(super) fn fail_roll(&mut self, slot: u32, pid: Option<nix::unistd::Pid>, failure: RollFailure) {
        if let Some(Roll { generation, .. }) = self.roll.take() {
            self.notice(Notice::ReloadFailed { generation, slot, pid, failure });
        }
    }

    /// Returns the generation of the next process, or `None` if it must wait for the canary.
    pub(super) fn next_generation(&self) -> Option<u64> {
        let Some(Roll { generation, proven, .. }) = self.roll else { return Some(self.generation) };
        if proven {
            return Some(generation);
        }
        let old = self.count_slots(|slot| slot.state.counts() && slot.generation < generation);
        if (1..self.target).contains(&old) {
            return Some(self.generation);
        }
        let has_canary = self.slots.iter().any(|slot| slot.generation == generation && slot.state.holds_place());
        (!has_canary).then_some(generation)
    }

    /// Returns the number of processes that may run above the target, because other processes are being replaced.
    pub(super) fn surge(&self) -> u32 {
        let outdated = self.count_slots(|slot| slot.state.counts() && self.is_outdated(slot));
        let leaving = self.count_slots(|slot| slot.replaced && slot.state.pid().is_some());
        let budget = self.policy.max_unavailable.of(self.target);
        let budget = if self.roll.is_some_and(|roll| !roll.proven) { 1 } else { budget };
        outdated.min(budget.saturating_sub(leaving))
    }

    /// Drains one outdated process for each new process that is ready.
    pub(super) fn replace(&mut self, now: Uptime) {
        // The canary replaces no process until its generation is proven.
        let canaries = number(self.settling().count());
        while self.count_ready() > self.target + canaries {
            // A worker at the end of its lifetime drains before a worker that is merely of an old generation.
            let outdated = (0..self.slots.len()).filter(|&index| {
                matches!(self.slots[index].state, State::Ready { .. }) && self.is_outdated(&self.slots[index])
            });
            let first = outdated.min_by_key(|&index| {
                let slot = &self.slots[index];
                (slot.worn.is_none(), slot.worn, slot.generation, index)
            });
            let Some(index) = first else { break };
            // If there are more processes than wanted, this process is not replaced.
            self.slots[index].replaced = self.strength() <= self.wanted();
            self.drain(index, now);
        }
        let Some(Roll { generation, .. }) = self.roll else { return };
        let has_old = self.slots.iter().any(|slot| slot.state.counts() && slot.generation < generation);
        let is_whole = self.count_ready() >= self.target && !self.is_starting();
        if !has_old && is_whole && self.settles_at().is_none() {
            self.roll = None;
            self.generation = generation;
            self.notice(Notice::ReloadDone { generation });
        }
    }

    /// Kills a hanging process without waiting for its replacement. The process serves no requests, so killing it loses
    /// none.
    pub(super) fn hung(&mut self, pid: nix::unistd::Pid) {
        let Some(index) = self.find(pid) else { return };
        match self.slots[index].state {
            State::Ready { .. } | State::Draining { .. } => {
                self.slots[index].state = State::Killing { pid, unready: false };
                self.actions.push(Action::Abort { pid });
            }
            // A starting process already has a deadline. In the other states, the process does not exist or is being
            // killed.
            State::Starting { .. } | State::Empty | State::Killing { .. } | State::Backoff { .. } => {}
        }
    }

    /// Marks a process that has reached the end of its lifetime.
    pub(super) fn wear_out(&mut self, pid: nix::unistd::Pid, now: Uptime) {
        let Some(index) = self.find(pid) else { return };
        let slot = &mut self.slots[index];
        // A process that is not ready has not served yet. A draining process is already being replaced, or is no longer
        // wanted.
        if matches!(slot.state, State::Ready { .. }) && slot.worn.is_none() {
            slot.worn = Some(now);
        }
    }

    fn is_outdated(&self, slot: &Slot) -> bool {
        slot.worn.is_some() || self.roll.is_some_and(|roll| slot.generation < roll.generation)
    }
}
