//! The flags for the replacement of workers that have served for a long time, or have grown.

use std::time::Duration;

use clap::Args;

use crate::config::{Jittered, parse_interval, parse_max_age, parse_max_memory, parse_max_requests};

/// Flags of both commands that serve.
#[derive(Args, Debug)]
pub(super) struct RecyclingOptions {
    /// Replace a worker whose own memory exceeds this, as in 512M, in three consecutive checks; 0 disables
    ///
    /// Shared memory, such as the page cache, does not count; memory shared with siblings since the fork counts in
    /// part.
    #[arg(long, value_name = "SIZE", env = "FORKYARD_MAX_MEMORY", default_value = "0", value_parser = parse_max_memory, help_heading = "Processes")]
    max_memory: u64,

    /// Time between checks of the memory of each worker, for --max-memory; at least 100ms
    #[arg(long, value_name = "TIME", env = "FORKYARD_MEMORY_INTERVAL", default_value = "5s", value_parser = parse_interval, help_heading = "Processes")]
    pub(super) memory_interval: Duration,

    /// Replace a worker at this age, as in 12h; 0 disables
    ///
    /// 12h~1h gives each worker an age of its own between 12 and 13 hours.
    #[arg(long, value_name = "TIME[~JITTER]", env = "FORKYARD_MAX_AGE", default_value = "0", value_parser = parse_max_age, help_heading = "Processes")]
    max_age: Jittered<Duration>,
}

impl RecyclingOptions {
    pub(super) fn max_memory(&self) -> Option<u64> {
        Some(self.max_memory).filter(|&bytes| bytes > 0)
    }

    pub(super) fn max_age(&self) -> Option<Jittered<Duration>> {
        Some(self.max_age).filter(|age| !age.limit.is_zero())
    }
}

/// Flags of linked applications.
#[derive(Args, Debug, Default)]
pub(super) struct RequestRecyclingOptions {
    /// Replace a worker after this many requests, as in 1000; 0 disables
    ///
    /// 1000~200 gives each worker a number of its own between 1000 and 1200.
    #[arg(long, value_name = "N[~JITTER]", env = "FORKYARD_MAX_REQUESTS", default_value = "0", value_parser = parse_max_requests, help_heading = "Processes")]
    max_requests: Option<Jittered<u64>>,
}

impl RequestRecyclingOptions {
    pub(super) fn max_requests(&self) -> Option<Jittered<u64>> {
        self.max_requests.filter(|requests| requests.limit > 0)
    }
}
