//! Replaces running workers, for a reload or at the end of their lifetime. Both kinds of replacement follow the same
//! rules and share one budget. The new worker is ready before the old one drains. At most `max_unavailable` workers are
//! being replaced at a time; a replacement lasts from the start of the new worker to the exit of the old one.
//!
//! A reload begins with one process of the new generation, the canary. Until the canary is ready, a process of the old
//! generation that dies is replaced by one of the old generation. After that, every started process is of the new
//! generation. When a new process fails to start, the reload has failed. The old processes then keep running, and are
//! later replaced by processes of the old generation. New processes that are ready keep running too.
//!
//! The supervisor distinguishes generations by number only.

use super::messages::{Action, Notice};
use super::{Slot, State, Supervisor, Uptime};

/// A reload under way.
#[derive(Clone, Copy, Debug)]
pub(super) struct Roll {
    pub(super) generation: u64,
    /// Whether a process of this generation has been ready.
    pub(super) proven: bool,
    /// Number of consecutive processes of this generation that have exited with 0 and have never been seen to be ready.
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

    /// Records that a process is ready: the first one of the new generation is the canary.
    pub(super) fn prove(&mut self, generation: u64) {
        if let Some(roll) = self.roll.as_mut().filter(|roll| roll.generation == generation) {
            roll.proven = true;
            roll.unseen = 0;
        }
    }

    /// Whether the reload depends on processes of this generation.
    pub(super) fn is_new(&self, generation: u64) -> bool {
        self.roll.is_some_and(|roll| roll.generation == generation)
    }

    pub(super) fn fail_roll(&mut self, slot: u32, pid: Option<nix::unistd::Pid>) {
        if let Some(Roll { generation, .. }) = self.roll.take() {
            self.notice(Notice::ReloadFailed { generation, slot, pid });
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
        while self.count_ready() > self.target {
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
        if !has_old && is_whole {
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
