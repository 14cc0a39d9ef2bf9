//! The socket on which programs in any language publish events.

use std::path::PathBuf;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct PublishConfig {
    /// Path of the publish socket; if `None`, it is in a directory of its own. Without an event log there is no socket.
    pub(crate) socket: Option<PathBuf>,
}
