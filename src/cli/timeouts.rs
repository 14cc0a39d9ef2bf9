//! The flags for the time limits of clients.

use std::time::Duration;

use clap::Args;

use crate::config::{Timeouts, parse_duration};

/// Flags of linked applications.
#[derive(Args, Debug)]
pub(super) struct TimeoutOptions {
    /// Time that a connection is kept open without a request; 0 for no limit
    ///
    /// This limit and the next three are rounded up to whole seconds and checked once a second, so a connection may
    /// last up to a second longer.
    #[arg(long, value_name = "TIME", env = "FORKYARD_IDLE_TIMEOUT", default_value = "75s", value_parser = parse_duration, help_heading = "Timeouts")]
    idle_timeout: Duration,

    /// Time for a client to send the head of a request; 0 for no limit
    #[arg(long, value_name = "TIME", env = "FORKYARD_HEADER_TIMEOUT", default_value = "30s", value_parser = parse_duration, help_heading = "Timeouts")]
    header_timeout: Duration,

    /// Time for a client to send the next 4 KiB of a request body; 0 for no limit
    ///
    /// The time counts only while the application waits for the body.
    #[arg(long, value_name = "TIME", env = "FORKYARD_BODY_TIMEOUT", default_value = "30s", value_parser = parse_duration, help_heading = "Timeouts")]
    body_timeout: Duration,

    /// Time for a client to read the next 4 KiB of a response; 0 for no limit
    #[arg(long, value_name = "TIME", env = "FORKYARD_WRITE_TIMEOUT", default_value = "30s", value_parser = parse_duration, help_heading = "Timeouts")]
    write_timeout: Duration,

    /// Time that an upgraded connection (WebSocket) may be silent in both directions; 0 for no limit
    #[arg(long, value_name = "TIME", env = "FORKYARD_UPGRADED_TIMEOUT", default_value = "0s", value_parser = parse_duration, help_heading = "Timeouts")]
    upgraded_timeout: Duration,
}

impl TimeoutOptions {
    pub(super) fn timeouts(&self) -> Timeouts {
        Timeouts {
            idle: self.idle_timeout,
            header: self.header_timeout,
            body: self.body_timeout,
            write: self.write_timeout,
            upgraded: self.upgraded_timeout,
        }
    }
}
