//! The flags that say what is done about requests that hang, dawdle or kill.

use std::time::Duration;

use clap::{Args, ValueEnum};

use crate::config::failures::{Failures, QuarantineBy, QuarantineConfig};
use crate::config::{parse_duration, parse_interval_or_zero, parse_positive_duration};

/// What is done about requests that hang, dawdle or kill.
#[derive(Args, Debug)]
pub(super) struct FailureOptions {
    /// A request whose response has not begun by then gets 504; 0 for never
    #[arg(long, value_name = "TIME", env = "FORKYARD_REQUEST_TIMEOUT", default_value = "0", value_parser = parse_duration, help_heading = "Hangs and crashes")]
    request_timeout: Duration,

    /// A worker whose event loop is at work for so long without a pause is replaced and ended; one in which a function
    /// runs on for so long after the time of its request (--request-timeout) is over is replaced. A worker that leaves waits no
    /// longer for a function that nobody waits for. At least 100ms, or 0 for never
    #[arg(long, value_name = "TIME", env = "FORKYARD_HANG_TIMEOUT", default_value = "30s", value_parser = parse_interval_or_zero, help_heading = "Hangs and crashes")]
    hang_timeout: Duration,

    /// Log each request that is older, once, with a backtrace of what it is at; 0 for none
    #[arg(long, value_name = "TIME", env = "FORKYARD_SLOW_REQUEST", default_value = "0", value_parser = parse_duration, help_heading = "Hangs and crashes")]
    slow_request: Duration,

    /// Refuse a request with 503 after so many workers died of it; 0 for never
    #[arg(long, value_name = "N", env = "FORKYARD_QUARANTINE", default_value = "3", value_parser = clap::value_parser!(u32).range(0..=100), help_heading = "Hangs and crashes")]
    quarantine: u32,

    /// The time within which those deaths count
    #[arg(long, value_name = "TIME", env = "FORKYARD_QUARANTINE_WINDOW", default_value = "60s", value_parser = parse_positive_duration, help_heading = "Hangs and crashes")]
    quarantine_window: Duration,

    /// How long such a request is refused; twice as long with each relapse, up to an hour
    #[arg(long, value_name = "TIME", env = "FORKYARD_QUARANTINE_TIME", default_value = "60s", value_parser = parse_positive_duration, help_heading = "Hangs and crashes")]
    quarantine_time: Duration,

    /// What is refused then
    #[arg(
        long,
        value_name = "WHAT",
        env = "FORKYARD_QUARANTINE_BY",
        default_value = "pattern",
        help_heading = "Hangs and crashes"
    )]
    quarantine_by: By,
}

/// The names of [`QuarantineBy`] on the command line.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum By {
    /// The path that kills; and if several kill that differ in numbers and ids alone, all of that form
    Pattern,
    /// The path that kills, and no other
    Path,
}

impl FailureOptions {
    pub(super) fn failures(&self) -> Failures {
        let by = match self.quarantine_by {
            By::Pattern => QuarantineBy::Pattern,
            By::Path => QuarantineBy::Path,
        };
        Failures {
            request_timeout: self.request_timeout,
            hang_timeout: self.hang_timeout,
            slow_request: self.slow_request,
            quarantine: QuarantineConfig {
                deaths: self.quarantine,
                window: self.quarantine_window,
                time: self.quarantine_time,
                by,
            },
        }
    }
}
