//! Requests that hang, are slow or crash workers.

use std::time::Duration;

/// A time limit of zero is disabled. The quarantine is disabled if its number of deaths is zero.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Failures {
    /// Time limit for the head of the response. After this time, the request is answered with 504.
    pub(crate) request_timeout: Duration,
    /// How long an event loop may run without yielding, and how long a blocking function may continue to run after its
    /// request has timed out.
    pub(crate) hang_timeout: Duration,
    /// Age at which a request is logged with a backtrace.
    pub(crate) slow_request: Duration,
    pub(crate) quarantine: QuarantineConfig,
}

/// The conditions under which a request is refused because workers have died while serving it.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct QuarantineConfig {
    /// Number of deaths after which the request is refused.
    pub(crate) deaths: u32,
    /// Time within which the deaths are counted.
    pub(crate) window: Duration,
    /// Duration of the first quarantine.
    pub(crate) time: Duration,
    pub(crate) by: QuarantineBy,
}

/// What a quarantine covers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum QuarantineBy {
    /// The path; if several paths that differ only in numbers crashed workers, all paths of that pattern.
    #[default]
    Pattern,
    /// The path only.
    Path,
}
