//! The flags for requests that hang, are slow or crash workers.

use std::time::Duration;

use clap::{Args, ValueEnum};

use crate::config::failures::{Failures, QuarantineBy, QuarantineConfig};
use crate::config::{parse_duration, parse_interval_or_zero, parse_positive_duration};

#[derive(Args, Debug)]
pub(super) struct FailureOptions {
    /// Answer 504 if the application has not begun its response within this time; 0 disables
    #[arg(long, value_name = "TIME", env = "FORKYARD_REQUEST_TIMEOUT", default_value = "0", value_parser = parse_duration, help_heading = "Hangs and crashes")]
    request_timeout: Duration,

    /// Replace a worker that hangs for this long, at least 100ms; 0 disables
    ///
    /// A worker hangs if its event loop does not yield for this time (the worker is then killed), or if a blocking
    /// function runs for this time after its request got 504 (--request-timeout). A draining worker does not wait for
    /// such a function.
    #[arg(long, value_name = "TIME", env = "FORKYARD_HANG_TIMEOUT", default_value = "30s", value_parser = parse_interval_or_zero, help_heading = "Hangs and crashes")]
    hang_timeout: Duration,

    /// Log each request that takes longer than this, once, with a backtrace; 0 disables
    #[arg(long, value_name = "TIME", env = "FORKYARD_SLOW_REQUEST", default_value = "0", value_parser = parse_duration, help_heading = "Hangs and crashes")]
    slow_request: Duration,

    /// Refuse a request with 503 after it has killed this many workers; 0 disables
    #[arg(long, value_name = "N", env = "FORKYARD_QUARANTINE", default_value = "3", value_parser = clap::value_parser!(u32).range(0..=100), help_heading = "Hangs and crashes")]
    quarantine: u32,

    /// Time within which the deaths for --quarantine are counted
    #[arg(long, value_name = "TIME", env = "FORKYARD_QUARANTINE_WINDOW", default_value = "60s", value_parser = parse_positive_duration, help_heading = "Hangs and crashes")]
    quarantine_window: Duration,

    /// Time for which a quarantined request is refused; doubles each time it is quarantined again, up to an hour
    #[arg(long, value_name = "TIME", env = "FORKYARD_QUARANTINE_TIME", default_value = "60s", value_parser = parse_positive_duration, help_heading = "Hangs and crashes")]
    quarantine_time: Duration,

    /// Which requests a quarantine covers
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
    /// The path; if paths that differ only in numbers and ids kill workers, all paths of that pattern
    Pattern,
    /// The path only
    Path,
}

impl FailureOptions {
    pub(super) fn request_timeout(&self) -> Duration {
        self.request_timeout
    }

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
