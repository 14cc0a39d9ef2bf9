//! The flags of the event log.

use clap::Args;

use crate::config::events::EventsConfig;
use crate::config::parse_size;

/// The event log of our own workers.
#[derive(Args, Debug)]
pub(super) struct EventsOptions {
    /// Size of the event log that all workers share, as in 4M; 0 for none. When it is full the oldest events are forgotten
    #[arg(long, value_name = "SIZE", env = "FORKYARD_EVENTS_SIZE", default_value = "1M", value_parser = parse_size, help_heading = "Memory and limits")]
    events: u64,
}

impl EventsOptions {
    pub(super) fn config(&self) -> EventsConfig {
        EventsConfig { bytes: self.events }
    }
}

/// The event log beside an external program.
#[derive(Args, Debug)]
pub(super) struct LogOfProgram {
    /// Size of the event log in the shared memory, for programs that use the forkyard-shm library, for the publish socket
    /// (FORKYARD_EVENTS) and the events sub-commands, as in 1M; 0 for none
    #[arg(long, value_name = "SIZE", env = "FORKYARD_EVENTS_SIZE", default_value = "0", value_parser = parse_size, help_heading = "Processes")]
    events: u64,
}

impl LogOfProgram {
    pub(super) fn config(&self) -> EventsConfig {
        EventsConfig { bytes: self.events }
    }
}
