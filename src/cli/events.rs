//! The flags of the event log.

use clap::Args;

use crate::config::events::EventsConfig;
use crate::config::parse_size;

/// Flags of linked applications.
#[derive(Args, Debug)]
pub(super) struct EventsOptions {
    /// Size of the event log, which all workers share, as in 4M; 0 disables it
    ///
    /// When the log is full, the oldest events are evicted.
    #[arg(long, value_name = "SIZE", env = "FORKYARD_EVENTS_SIZE", default_value = "1M", value_parser = parse_size, help_heading = "Cache and events")]
    events: u64,

    /// Encoded events that each worker keeps in memory for its subscribers
    ///
    /// A subscriber that is further behind reads from the log.
    #[arg(long, value_name = "N", env = "FORKYARD_EVENTS_BACKLOG", default_value = "256", value_parser = clap::value_parser!(u32).range(1..), help_heading = "Cache and events")]
    events_backlog: u32,

    /// Event subscribers per worker; further ones get 503 [default: three quarters of --max-connections]
    #[arg(long, value_name = "N", env = "FORKYARD_MAX_SUBSCRIBERS", value_parser = clap::value_parser!(u32).range(1..), help_heading = "Cache and events")]
    max_subscribers: Option<u32>,
}

impl EventsOptions {
    /// Returns the settings of the event log. Most subscribers hold a connection each, so the default limit on
    /// subscribers leaves a quarter of the connections for other requests.
    pub(super) fn config(&self, max_connections: u32) -> EventsConfig {
        let default = (max_connections - max_connections / 4).max(1);
        let max_subscribers = self.max_subscribers.unwrap_or(default);
        EventsConfig { bytes: self.events, backlog: self.events_backlog, max_subscribers }
    }
}

/// Flags of `forkyard run`.
#[derive(Args, Debug)]
pub(super) struct LogOfProgram {
    /// Size of the event log in shared memory, as in 1M; 0 disables it
    ///
    /// The log serves the publish socket (FORKYARD_EVENTS), the events sub-commands, and programs with the
    /// forkyard-shm library.
    #[arg(long, value_name = "SIZE", env = "FORKYARD_EVENTS_SIZE", default_value = "0", value_parser = parse_size, help_heading = "Cache and events")]
    events: u64,
}

impl LogOfProgram {
    pub(super) fn config(&self) -> EventsConfig {
        EventsConfig { bytes: self.events, ..EventsConfig::default() }
    }
}
