//! The flags for the number of workers and their start.

use std::time::Duration;

use clap::Args;

use super::recycling::{RecyclingOptions, RequestRecyclingOptions};
use crate::config::{Scaling, Share, parse_duration, parse_health_path};

/// Flags of both commands that serve.
#[derive(Args, Debug)]
pub(super) struct ScalingOptions {
    /// Workers that are replaced at a time: a number, or a share as in 25%
    ///
    /// A worker counts as unavailable from the start of its replacement until it has exited.
    #[arg(long, value_name = "N", env = "FORKYARD_MAX_UNAVAILABLE", default_value = "1", help_heading = "Processes")]
    max_unavailable: Share,

    /// Exit with status 1 if workers fail to start for this long and none was ever ready; 0 disables
    ///
    /// A reload restarts the period.
    #[arg(long, value_name = "TIME", env = "FORKYARD_GIVE_UP_AFTER", default_value = "5m", value_parser = parse_duration, help_heading = "Processes")]
    give_up_after: Duration,

    /// With a range of --workers, stop a worker that has not been needed for this long; 0 stops it immediately
    #[arg(long, value_name = "TIME", env = "FORKYARD_SCALE_DOWN_AFTER", default_value = "30s", value_parser = parse_duration, help_heading = "Processes")]
    scale_down_after: Duration,

    #[command(flatten)]
    recycling: RecyclingOptions,
}

/// Flags of linked applications.
#[derive(Args, Debug, Default)]
pub(super) struct OfEachWorker {
    #[command(flatten)]
    recycling: RequestRecyclingOptions,

    /// Path that a new worker requests from its application before it is ready, as in /health
    ///
    /// The start fails if the response has a status of 400 or more, if the application panics, or if there is no
    /// response within nine tenths of --start-timeout.
    #[arg(long, value_name = "PATH", env = "FORKYARD_HEALTH_PATH", value_parser = parse_health_path, help_heading = "Processes")]
    health_path: Option<String>,

    /// Answer 503 to a request that has waited longer than this for the application; 0 disables
    ///
    /// This includes the wait in the worker and the wait before it: in the kernel (over TCP, for the first request of a
    /// connection), or as a proxy of --trust reports it in X-Request-Start or X-Queue-Start.
    #[arg(long, value_name = "TIME", env = "FORKYARD_MAX_QUEUE_TIME", default_value = "0", value_parser = parse_duration, help_heading = "Processes")]
    max_queue_time: Duration,
}

impl OfEachWorker {
    /// Returns the settings of processes of a program behind gateways.
    pub(super) fn of_app_processes(recycling: RequestRecyclingOptions) -> Self {
        Self { recycling, ..Self::default() }
    }
}

impl ScalingOptions {
    pub(super) fn scaling(&self, of_each: OfEachWorker) -> Scaling {
        Scaling {
            max_unavailable: self.max_unavailable,
            give_up_after: self.give_up_after,
            scale_down_after: self.scale_down_after,
            max_requests: of_each.recycling.max_requests(),
            max_memory: self.recycling.max_memory(),
            memory_interval: self.recycling.memory_interval,
            max_age: self.recycling.max_age(),
            health_path: of_each.health_path,
            max_queue_time: of_each.max_queue_time,
        }
    }
}
