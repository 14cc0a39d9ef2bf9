//! Upgrades in place.

use std::time::Duration;

#[derive(Clone, Copy, Debug)]
pub(crate) struct UpgradeConfig {
    /// Time limit for the check of the new build.
    pub(crate) timeout: Duration,
}
