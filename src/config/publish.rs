//! Where programs in any language publish events.

use std::path::PathBuf;

/// As in [`super::Config`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct PublishConfig {
    /// The publish socket; without it, one in a folder of its own. There is one only if there is an event log.
    pub(crate) socket: Option<PathBuf>,
}
