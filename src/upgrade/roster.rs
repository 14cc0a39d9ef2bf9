//! The processes that one master leaves to the next, as they are saved.

use serde::{Deserialize, Serialize};

/// All processes, as one supervisor leaves them to the next.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Roster {
    pub(crate) generation: u64,
    /// The last one that a reload was given.
    pub(crate) newest: u64,
    /// How many workers were asked for at the start, between which numbers that moved in the end, and how many there were to be.
    pub(crate) workers: (u32, u32),
    pub(crate) limits: (u32, u32),
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
    /// It has served its time.
    #[serde(default)]
    pub(crate) worn: bool,
    /// It leaves because another has taken its place.
    #[serde(default)]
    pub(crate) replaced: bool,
}

/// The state of a process that exists; times are what is left of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Phase {
    Starting { left_ms: u64 },
    Ready,
    Draining { left_ms: u64 },
    Killing,
}
