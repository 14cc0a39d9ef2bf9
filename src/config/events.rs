//! The event log, and who subscribes to it.

/// As in [`super::Config`]. All zero: there is none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct EventsConfig {
    /// The log's size; 0 is none.
    pub(crate) bytes: u64,
    /// Events that a worker has at hand for its subscribers.
    pub(crate) backlog: u32,
    /// Subscribers of a worker.
    pub(crate) max_subscribers: u32,
}
