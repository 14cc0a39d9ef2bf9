//! What is done about requests that hang, dawdle or kill: parsed once, then never changed.

use std::time::Duration;

/// Zero is "never", for each of the times and for the number of deaths.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Failures {
    /// For the head of a response; then the request gets 504.
    pub(crate) request_timeout: Duration,
    /// How long an event loop may be at work without a pause, and a thread go on after the time of its request is over.
    pub(crate) hang_timeout: Duration,
    /// A request that is older is logged, with a backtrace.
    pub(crate) slow_request: Duration,
    pub(crate) quarantine: QuarantineConfig,
}

/// When a request is refused because workers died of it.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct QuarantineConfig {
    /// So many deaths...
    pub(crate) deaths: u32,
    /// ... within this time.
    pub(crate) window: Duration,
    /// For how long, the first time.
    pub(crate) time: Duration,
    pub(crate) by: QuarantineBy,
}

/// What of a request is refused.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum QuarantineBy {
    /// Its path; and all paths that differ in their numbers alone, if several of them killed.
    #[default]
    Pattern,
    /// Its path alone.
    Path,
}
