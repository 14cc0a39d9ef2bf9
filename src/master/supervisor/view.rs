//! The supervisor as operators see it: what there is, and what is under way. Nothing is decided here.

use nix::unistd::Pid;

use super::{Mode, State, Supervisor, number};

/// How things are.
#[derive(Clone, Debug)]
pub(crate) struct View {
    /// How many processes there should be.
    pub(crate) target: u32,
    /// Between which numbers that moves.
    pub(crate) limits: (u32, u32),
    /// How many there can be, if the operator wants.
    pub(crate) most: u32,
    pub(crate) generation: u64,
    pub(crate) phase: Phase,
    /// The slots in use.
    pub(crate) places: Vec<Place>,
}

/// What the supervisor is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    Running,
    Reloading,
    Stopping,
}

/// A slot in use.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
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
        let place = |(index, slot): (usize, &super::Slot)| {
            let state = slot.state.name()?;
            Some(Place { slot: number(index), generation: slot.generation, pid: slot.state.pid(), state })
        };
        let places = self.slots.iter().enumerate().filter_map(place).collect();
        let (limits, most) = (self.scaler.limits(), self.policy.slots.saturating_sub(1));
        View { target: self.target, limits, most, generation: self.generation, phase, places }
    }
}

impl View {
    /// Processes that are ready.
    pub(crate) fn ready(&self) -> usize {
        self.places.iter().filter(|place| place.state == State::READY).count()
    }
}

impl State {
    pub(crate) const READY: &'static str = "ready";

    /// `None` for an empty slot.
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
