//! The event log.

/// As in [`super::Config`]. All zero: there is none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct EventsConfig {
    /// The log's size; 0 is none.
    pub(crate) bytes: u64,
}
