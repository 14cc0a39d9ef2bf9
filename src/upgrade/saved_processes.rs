//! Defines the saved form of the processes that one master leaves to the next.

use serde::{Deserialize, Serialize};

/// The processes of one supervisor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Roster {
    pub(crate) generation: u64,
    /// The generation of the latest reload.
    pub(crate) newest: u64,
    /// The minimum and maximum number of workers in the configuration.
    pub(crate) workers: (u32, u32),
    /// The current minimum and maximum, which commands may have changed.
    pub(crate) limits: (u32, u32),
    /// The current target, between these limits.
    pub(crate) target: u32,
    pub(crate) reached_full_strength: bool,
    #[serde(rename = "places")]
    pub(crate) slots: Vec<SavedSlot>,
}

/// A slot that holds a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SavedSlot {
    pub(crate) slot: u32,
    pub(crate) generation: u64,
    pub(crate) pid: i32,
    pub(crate) phase: SavedSlotState,
    /// Whether the process has reached the end of its lifetime.
    #[serde(default)]
    pub(crate) worn: bool,
    /// Whether the process is draining because another process has replaced it.
    #[serde(default)]
    pub(crate) replaced: bool,
}

/// The state of a running process. Durations are remaining times.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum SavedSlotState {
    Starting { left_ms: u64 },
    Ready,
    Draining { left_ms: u64 },
    Killing,
}
