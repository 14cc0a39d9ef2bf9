//! The event log and its subscribers.

/// All fields are zero without an event log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct EventsConfig {
    /// Size of the log; 0 disables it.
    pub(crate) bytes: u64,
    /// Number of encoded events that a worker keeps in memory for its subscribers.
    pub(crate) backlog: u32,
    /// Maximum number of subscribers per worker.
    pub(crate) max_subscribers: u32,
}
