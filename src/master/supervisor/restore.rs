//! What of the supervisor outlives an upgrade: who is there, and in which state. Pure, as the rest of it.

use std::time::Duration;

use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use super::{Mode, Now, Policy, Slot, State, Supervisor, TERMINATE_AGAIN, number};

/// More slots than any policy has.
const MOST_SLOTS: u32 = 1 << 16;

/// All processes, as one supervisor leaves them to the next.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Roster {
    pub(crate) generation: u64,
    /// How many workers were asked for at the start, and how many there were to be in the end.
    pub(crate) workers: u32,
    pub(crate) target: u32,
    pub(crate) reached_full_strength: bool,
    pub(crate) places: Vec<Place>,
}

/// A slot that holds a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Place {
    pub(crate) slot: u32,
    pub(crate) generation: u64,
    pub(crate) pid: i32,
    pub(crate) phase: Phase,
}

/// [`State`] of a process that exists; times are what is left of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Phase {
    Starting { left_ms: u64 },
    Ready,
    Draining { left_ms: u64 },
    Killing,
}

impl Supervisor {
    /// All that a successor has to know; `None` while everything is being stopped, when there is nothing to succeed to.
    pub(crate) fn save(&self, now: Now) -> Option<Roster> {
        if self.mode != Mode::Running {
            return None;
        }
        let left_ms = |deadline: Now| u64::try_from(deadline.saturating_sub(now).as_millis()).unwrap_or(u64::MAX);
        let places = self.slots.iter().enumerate().filter_map(|(index, slot)| {
            let (pid, phase) = match slot.state {
                State::Starting { pid: Some(pid), deadline } => (pid, Phase::Starting { left_ms: left_ms(deadline) }),
                State::Ready { pid } => (pid, Phase::Ready),
                State::Draining { pid, deadline, .. } => (pid, Phase::Draining { left_ms: left_ms(deadline) }),
                State::Killing { pid, .. } => (pid, Phase::Killing),
                State::Starting { pid: None, .. } | State::Empty | State::Backoff { .. } => return None,
            };
            Some(Place { slot: number(index), generation: slot.generation, pid: pid.as_raw(), phase })
        });
        Some(Roster {
            generation: self.generation,
            workers: self.policy.workers,
            target: self.target,
            reached_full_strength: self.reached_full_strength,
            places: places.collect(),
        })
    }

    /// A supervisor of the processes that another one left. There may be some in slots that this policy has no more: nobody
    /// else gets these.
    pub(crate) fn restore(policy: Policy, roster: &Roster, now: Now) -> Self {
        let mut restored = Self::new(policy);
        restored.now = now;
        restored.generation = roster.generation.max(1);
        restored.reached_full_strength = roster.reached_full_strength;
        if roster.workers == policy.workers {
            restored.target = roster.target.clamp(1, policy.slots.saturating_sub(1).max(1));
        }
        for place in roster.places.iter().filter(|place| place.slot < MOST_SLOTS && place.pid > 0) {
            let pid = Pid::from_raw(place.pid);
            let at = |left_ms: u64| now.saturating_add(Duration::from_millis(left_ms));
            let state = match place.phase {
                Phase::Starting { left_ms } => {
                    State::Starting { pid: Some(pid), deadline: at(left_ms).min(now + policy.start_timeout) }
                }
                Phase::Ready => State::Ready { pid },
                Phase::Draining { left_ms } => State::Draining {
                    pid,
                    deadline: at(left_ms).min(now + policy.drain_timeout),
                    ask_again: now + TERMINATE_AGAIN,
                },
                // Whatever it was killed for, it is no failure of the new build's.
                Phase::Killing => State::Killing { pid, unready: false },
            };
            restored.proven |= matches!(state, State::Ready { .. });
            let index = place.slot as usize;
            if restored.slots.len() <= index {
                restored.slots.resize(index + 1, Slot { state: State::Empty, generation: 0 });
            }
            restored.slots[index] = Slot { state, generation: place.generation };
        }
        restored
    }
}
