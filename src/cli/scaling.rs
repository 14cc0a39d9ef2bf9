//! The flags about how many workers there are, and when they are replaced.

use std::time::Duration;

use clap::Args;

use crate::config::{
    Jittered, Scaling, Share, parse_duration, parse_health_path, parse_interval, parse_max_age, parse_max_memory,
    parse_max_requests,
};

/// Those of everything that serves.
#[derive(Args, Debug)]
pub(super) struct ScalingOptions {
    /// Workers that are being replaced at a time, for whatever reason: a number, or a part as in 25%. A worker counts
    /// from the start of its replacement, which becomes ready first, to its own end
    #[arg(long, value_name = "N", env = "FORKYARD_MAX_UNAVAILABLE", default_value = "1", help_heading = "Processes")]
    max_unavailable: Share,

    /// End with status 1 when workers have failed to start for so long and none ever became ready, as in 5m; 0 to try for
    /// ever. A reload begins the time anew
    #[arg(long, value_name = "TIME", env = "FORKYARD_GIVE_UP_AFTER", default_value = "5m", value_parser = parse_duration, help_heading = "Processes")]
    give_up_after: Duration,

    /// Of a range of --workers, how long one was not needed when it may leave; 0 for at once
    #[arg(long, value_name = "TIME", env = "FORKYARD_SCALE_DOWN_AFTER", default_value = "30s", value_parser = parse_duration, help_heading = "Processes")]
    scale_down_after: Duration,

    /// Replace a worker that has more memory of its own, as in 512M, three times in a row; 0 for any. Shared memory (the
    /// page cache) does not count, and of what it shares with others its part does
    #[arg(long, value_name = "SIZE", env = "FORKYARD_MAX_MEMORY", default_value = "0", value_parser = parse_max_memory, help_heading = "Processes")]
    max_memory: u64,

    /// How often the memory of each worker is looked at, for --max-memory; at least 100ms
    #[arg(long, value_name = "TIME", env = "FORKYARD_MEMORY_INTERVAL", default_value = "5s", value_parser = parse_interval, help_heading = "Processes")]
    memory_interval: Duration,

    /// Replace a worker at this age, as in 12h, or 12h~1h for each at an age of its own between 12 and 13 hours; 0 for
    /// none
    #[arg(long, value_name = "TIME[~JITTER]", env = "FORKYARD_MAX_AGE", default_value = "0", value_parser = parse_max_age, help_heading = "Processes")]
    max_age: Jittered<Duration>,
}

/// Those of an application linked in.
#[derive(Args, Debug, Default)]
pub(super) struct OfEachWorker {
    /// Replace a worker after so many requests, as in 1000, or 1000~200 for each after a number of its own between 1000
    /// and 1200; 0 for any number
    #[arg(long, value_name = "N[~JITTER]", env = "FORKYARD_MAX_REQUESTS", default_value = "0", value_parser = parse_max_requests, help_heading = "Processes")]
    max_requests: Option<Jittered<u64>>,

    /// A new worker asks its application for this path before it counts as ready; a status of 400 or more, a panic, or no
    /// answer within --start-timeout is a failed start
    #[arg(long, value_name = "PATH", env = "FORKYARD_HEALTH_PATH", value_parser = parse_health_path, help_heading = "Processes")]
    health_path: Option<String>,

    /// A request that has waited for so long when the application could begin with it gets 503; 0 for never. What counts is
    /// the wait for a thread, that in the kernel (over TCP, for the first request of a connection), and what a proxy of
    /// --trust says with X-Request-Start or X-Queue-Start
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
