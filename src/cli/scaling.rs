//! The flags for the number of workers and their replacement.

use std::time::Duration;

use clap::Args;

use crate::config::{
    Jittered, Scaling, Share, parse_duration, parse_health_path, parse_interval, parse_max_age, parse_max_memory,
    parse_max_requests,
};

/// Flags of both commands that serve.
#[derive(Args, Debug)]
pub(super) struct ScalingOptions {
    /// Workers that are replaced at a time: a number, or a share as in 25%
    ///
    /// A worker counts from the start of its replacement until it has exited.
    #[arg(long, value_name = "N", env = "FORKYARD_MAX_UNAVAILABLE", default_value = "1", help_heading = "Processes")]
    max_unavailable: Share,

    /// Exit with status 1 if workers fail to start for this long and none was ever ready; 0 disables
    ///
    /// A reload restarts the period.
    #[arg(long, value_name = "TIME", env = "FORKYARD_GIVE_UP_AFTER", default_value = "5m", value_parser = parse_duration, help_heading = "Processes")]
    give_up_after: Duration,

    /// With a range of --workers, stop a worker not needed for this long; 0 stops it at once
    #[arg(long, value_name = "TIME", env = "FORKYARD_SCALE_DOWN_AFTER", default_value = "30s", value_parser = parse_duration, help_heading = "Processes")]
    scale_down_after: Duration,

    /// Replace a worker whose own memory exceeds this, as in 512M, in three checks in a row; 0 disables
    ///
    /// Shared memory, such as the page cache, does not count; memory shared with siblings since the fork counts in
    /// part.
    #[arg(long, value_name = "SIZE", env = "FORKYARD_MAX_MEMORY", default_value = "0", value_parser = parse_max_memory, help_heading = "Processes")]
    max_memory: u64,

    /// Time between checks of the memory of each worker, for --max-memory; at least 100ms
    #[arg(long, value_name = "TIME", env = "FORKYARD_MEMORY_INTERVAL", default_value = "5s", value_parser = parse_interval, help_heading = "Processes")]
    memory_interval: Duration,

    /// Replace a worker at this age, as in 12h; 0 disables
    ///
    /// 12h~1h gives each worker an age of its own between 12 and 13 hours.
    #[arg(long, value_name = "TIME[~JITTER]", env = "FORKYARD_MAX_AGE", default_value = "0", value_parser = parse_max_age, help_heading = "Processes")]
    max_age: Jittered<Duration>,
}

/// Flags of linked applications.
#[derive(Args, Debug, Default)]
pub(super) struct OfEachWorker {
    /// Replace a worker after this many requests, as in 1000; 0 disables
    ///
    /// 1000~200 gives each worker a number of its own between 1000 and 1200.
    #[arg(long, value_name = "N[~JITTER]", env = "FORKYARD_MAX_REQUESTS", default_value = "0", value_parser = parse_max_requests, help_heading = "Processes")]
    max_requests: Option<Jittered<u64>>,

    /// Path that a new worker requests from its application before it is ready, as in /health
    ///
    /// The start fails if the response has a status of 400 or more, if the application panics, or if there is no
    /// response within nine tenths of --start-timeout.
    #[arg(long, value_name = "PATH", env = "FORKYARD_HEALTH_PATH", value_parser = parse_health_path, help_heading = "Processes")]
    health_path: Option<String>,

    /// Answer 503 to a request that has waited longer than this for the application; 0 disables
    ///
    /// The wait in the worker counts, and the wait before it: in the kernel (over TCP, for the first request of a
    /// connection), or as a proxy of --trust states it in X-Request-Start or X-Queue-Start.
    #[arg(long, value_name = "TIME", env = "FORKYARD_MAX_QUEUE_TIME", default_value = "0", value_parser = parse_duration, help_heading = "Processes")]
    max_queue_time: Duration,
}

impl ScalingOptions {
    pub(super) fn scaling(&self, of_each: OfEachWorker) -> Scaling {
        Scaling {
            max_unavailable: self.max_unavailable,
            give_up_after: self.give_up_after,
            scale_down_after: self.scale_down_after,
            max_requests: of_each.max_requests.filter(|requests| requests.limit > 0),
            max_memory: Some(self.max_memory).filter(|&bytes| bytes > 0),
            memory_interval: self.memory_interval,
            max_age: Some(self.max_age).filter(|age| !age.limit.is_zero()),
            health_path: of_each.health_path,
            max_queue_time: of_each.max_queue_time,
        }
    }
}
