//! The flags of an upgrade in place.

use std::time::Duration;

use clap::Args;

use crate::config::parse_positive_duration;
use crate::config::upgrade::UpgradeConfig;

#[derive(Args, Debug)]
pub(super) struct UpgradeOptions {
    /// Time for a new build to show that it can take over, in an upgrade (USR2)
    ///
    /// After this time the upgrade is abandoned, and the running build continues.
    #[arg(long, value_name = "TIME", env = "FORKYARD_UPGRADE_TIMEOUT", default_value = "60s", value_parser = parse_positive_duration, help_heading = "Processes")]
    upgrade_timeout: Duration,
}

impl UpgradeOptions {
    pub(super) fn config(&self) -> UpgradeConfig {
        UpgradeConfig { timeout: self.upgrade_timeout }
    }
}
