//! Describes the supervisor's state for operators. Nothing is decided here.

use nix::unistd::Pid;

use super::{Mode, State, Supervisor, number};

/// The supervisor's state.
#[derive(Clone, Debug)]
pub(crate) struct View {
    /// Target number of processes.
    pub(crate) target: u32,
    /// Minimum and maximum of the target.
    pub(crate) limits: (u32, u32),
    /// The highest number of processes that an operator can set.
    pub(crate) most: u32,
    pub(crate) generation: u64,
    pub(crate) phase: Phase,
    /// The slots in use.
    pub(crate) slots: Vec<SlotView>,
}

/// The current phase.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    Running,
    Reloading,
    Stopping,
}

/// A slot in use.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SlotView {
    pub(crate) slot: u32,
    pub(crate) generation: u64,
    pub(crate) pid: Option<Pid>,
    pub(crate) state: &'static str,
}

impl Supervisor {
    pub(crate) fn view(&self) -> View {
        let phase = match self.mode {
            Mode::Stopping { .. } | Mode::Stopped => Phase::Stopping,
            Mode::Running if self.roll.is_some() => Phase::Reloading,
            Mode::Running => Phase::Running,
        };
        let view = |(index, slot): (usize, &super::Slot)| {
            let state = slot.state.name()?;
            Some(SlotView { slot: number(index), generation: slot.generation, pid: slot.state.pid(), state })
        };
        let slots = self.slots.iter().enumerate().filter_map(view).collect();
        let (limits, most) = (self.scaler.limits(), self.policy.slots.saturating_sub(1));
        View { target: self.target, limits, most, generation: self.generation, phase, slots }
    }
}

impl View {
    pub(crate) fn ready(&self) -> usize {
        self.slots.iter().filter(|slot| slot.state == State::READY).count()
    }
}

impl State {
    pub(crate) const READY: &'static str = "ready";

    /// Returns the name of the state, or `None` for an empty slot.
    fn name(&self) -> Option<&'static str> {
        match self {
            Self::Empty => None,
            Self::Starting { .. } => Some("starting"),
            Self::Ready { .. } => Some(Self::READY),
            Self::Draining { .. } => Some("draining"),
            Self::Killing { .. } => Some("killed"),
            Self::Backoff { .. } => Some("waiting"),
        }
    }
}
