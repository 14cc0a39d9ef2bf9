//! Saves and restores the supervisor's state for an upgrade: its processes and their states. Pure, like the rest of the supervisor.

use std::time::Duration;

use nix::unistd::Pid;

use super::{Mode, Policy, Slot, State, Supervisor, TERMINATE_INTERVAL, Uptime, number};
use crate::config::millis;
use crate::upgrade::saved_processes::{Roster, SavedSlot, SavedSlotState};

/// Upper bound on the number of slots; no policy has as many.
const MAX_SLOTS: u32 = 1 << 16;

impl Supervisor {
    /// Returns the state for the next master, or `None` while the server is stopping, because no upgrade takes place
    /// then.
    pub(crate) fn save(&self, now: Uptime) -> Option<Roster> {
        if self.mode != Mode::Running {
            return None;
        }
        let left_ms = |deadline: Uptime| millis(deadline.saturating_sub(now));
        let slots = self.slots.iter().enumerate().filter_map(|(index, slot)| {
            let (pid, phase) = match slot.state {
                State::Starting { pid: Some(pid), deadline } => {
                    (pid, SavedSlotState::Starting { left_ms: left_ms(deadline) })
                }
                State::Ready { pid } => (pid, SavedSlotState::Ready),
                State::Draining { pid, deadline, .. } => (pid, SavedSlotState::Draining { left_ms: left_ms(deadline) }),
                State::Killing { pid, .. } => (pid, SavedSlotState::Killing),
                State::Starting { pid: None, .. } | State::Empty | State::Backoff { .. } => return None,
            };
            let (worn, replaced) = (slot.worn.is_some(), slot.replaced);
            Some(SavedSlot {
                slot: number(index),
                generation: slot.generation,
                pid: pid.as_raw(),
                phase,
                worn,
                replaced,
            })
        });
        Some(Roster {
            generation: self.generation,
            newest: self.newest,
            workers: self.policy.workers,
            limits: self.scaler.limits(),
            target: self.target,
            reached_full_strength: self.reached_full_strength,
            slots: slots.collect(),
        })
    }

    /// Creates a supervisor for the processes that a former master has left. Some processes may be in slots beyond this
    /// policy's number; these slots are not reused.
    pub(crate) fn restore(policy: Policy, roster: &Roster, now: Uptime) -> Self {
        let mut restored = Self::new(policy);
        restored.now = now;
        restored.generation = roster.generation.max(1);
        restored.newest = roster.newest.max(restored.generation);
        restored.reached_full_strength = roster.reached_full_strength;
        // Changes by commands are kept, unless the new build has other settings.
        let is_possible = (1..policy.slots).contains(&roster.limits.1) && roster.limits.0 <= roster.limits.1;
        let limits = if roster.workers == policy.workers && is_possible { roster.limits } else { policy.workers };
        restored.target = restored.scaler.set_limits(limits, roster.target, now);
        for saved in roster.slots.iter().filter(|saved| saved.slot < MAX_SLOTS && saved.pid > 0) {
            let pid = Pid::from_raw(saved.pid);
            let at = |left_ms: u64| now.saturating_add(Duration::from_millis(left_ms));
            let state = match saved.phase {
                SavedSlotState::Starting { left_ms } => {
                    State::Starting { pid: Some(pid), deadline: at(left_ms).min(now + policy.start_timeout) }
                }
                SavedSlotState::Ready => State::Ready { pid },
                SavedSlotState::Draining { left_ms } => State::Draining {
                    pid,
                    deadline: at(left_ms).min(now + policy.drain_timeout),
                    ask_again: now + TERMINATE_INTERVAL,
                },
                // The process is not killed because of a failure of the new build.
                SavedSlotState::Killing => State::Killing { pid, unready: false },
            };
            restored.proven |= matches!(state, State::Ready { .. });
            let index = saved.slot as usize;
            if restored.slots.len() <= index {
                restored.slots.resize(index + 1, Slot::new(State::Empty, 0));
            }
            let mut slot = Slot::new(state, saved.generation);
            slot.worn = saved.worn.then_some(now);
            slot.replaced = saved.replaced;
            restored.slots[index] = slot;
        }
        restored
    }
}
