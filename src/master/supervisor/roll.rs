//! Replacing workers that live: because of a reload, or because they have served their time. Both in one way, and under
//! one budget: the new one is ready before the old one drains, and at most `max_unavailable` are being replaced at a
//! time, from the birth of a replacement to the end of the one replaced.
//!
//! A reload begins with one process of the new generation, the canary. Until that is ready, the old generation is kept up
//! in its own name: who dies meanwhile is replaced by one of the old generation. Afterwards whatever is made is
//! new. When a new process fails to start, the reload is over: what is old stays (and is old again when it has to be
//! replaced later), what is new and ready stays too.
//!
//! That a generation is old is a number and no more: its processes are made as the new ones are, from what is on disk now.

use super::messages::{Action, Notice};
use super::{Now, Slot, State, Supervisor};

/// A reload under way.
#[derive(Clone, Copy, Debug)]
pub(super) struct Roll {
    pub(super) generation: u64,
    /// A process of this generation was ready.
    pub(super) proven: bool,
    /// Processes of this generation in a row that ended well and were never seen to be ready.
    pub(super) unseen: u32,
}

impl Supervisor {
    pub(super) fn begin_roll(&mut self) {
        self.newest += 1;
        self.roll = Some(Roll { generation: self.newest, proven: false, unseen: 0 });
        // A reload is the operator's way to say that the cause is mended: try at once.
        self.breaker.close();
        self.end_backoffs(Now::MAX);
        self.notice(Notice::ReloadStarted { generation: self.newest });
    }

    /// One new process more is ready: is it the canary?
    pub(super) fn prove(&mut self, generation: u64) {
        if let Some(roll) = self.roll.as_mut().filter(|roll| roll.generation == generation) {
            roll.proven = true;
            roll.unseen = 0;
        }
    }

    /// Whether a process of this generation is one that the reload depends upon.
    pub(super) fn is_new(&self, generation: u64) -> bool {
        self.roll.is_some_and(|roll| roll.generation == generation)
    }

    pub(super) fn fail_roll(&mut self, slot: u32, pid: Option<nix::unistd::Pid>) {
        if let Some(Roll { generation, .. }) = self.roll.take() {
            self.notice(Notice::ReloadFailed { generation, slot, pid });
        }
    }

    /// The generation of the next process; `None` if it has to wait for the canary.
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

    /// Processes above the target, because others are being replaced.
    pub(super) fn surge(&self) -> u32 {
        let outdated = self.count_slots(|slot| slot.state.counts() && self.is_outdated(slot));
        let leaving = self.count_slots(|slot| slot.replaced && slot.state.pid().is_some());
        let budget = self.policy.max_unavailable.of(self.target);
        let budget = if self.roll.is_some_and(|roll| !roll.proven) { 1 } else { budget };
        outdated.min(budget.saturating_sub(leaving))
    }

    /// For each new process that is ready, one that is to be replaced drains.
    pub(super) fn replace(&mut self, now: Now) {
        while self.count_ready() > self.target {
            // Who has served its time goes before who is merely old.
            let outdated = (0..self.slots.len()).filter(|&index| {
                matches!(self.slots[index].state, State::Ready { .. }) && self.is_outdated(&self.slots[index])
            });
            let first = outdated.min_by_key(|&index| {
                let slot = &self.slots[index];
                (slot.worn.is_none(), slot.worn, slot.generation, index)
            });
            let Some(index) = first else { break };
            // If there are too many anyhow, nobody takes its place.
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

    /// A process that serves no more is replaced without further ado: nothing is lost by its going first.
    pub(super) fn hung(&mut self, pid: nix::unistd::Pid) {
        let Some(index) = self.find(pid) else { return };
        match self.slots[index].state {
            State::Ready { .. } | State::Draining { .. } => {
                self.slots[index].state = State::Killing { pid, unready: false };
                self.actions.push(Action::Abort { pid });
            }
            // The first has a deadline already, and the others are gone or dying.
            State::Starting { .. } | State::Empty | State::Killing { .. } | State::Backoff { .. } => {}
        }
    }

    /// It has served its time.
    pub(super) fn wear_out(&mut self, pid: nix::unistd::Pid, now: Now) {
        let Some(index) = self.find(pid) else { return };
        let slot = &mut self.slots[index];
        // Who is not ready yet has not served; who drains is being replaced, or is not wanted.
        if matches!(slot.state, State::Ready { .. }) && slot.worn.is_none() {
            slot.worn = Some(now);
        }
    }

    fn is_outdated(&self, slot: &Slot) -> bool {
        slot.worn.is_some() || self.roll.is_some_and(|roll| slot.generation < roll.generation)
    }
}
