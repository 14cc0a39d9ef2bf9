//! What concerns an upgrade in place.

use std::time::Duration;

/// See `master/upgrade/mod.rs`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct UpgradeConfig {
    /// How long the new build's check may take.
    pub(crate) timeout: Duration,
}
