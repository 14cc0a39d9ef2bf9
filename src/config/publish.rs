//! The socket on which programs in any language publish events.

use std::path::PathBuf;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct PublishConfig {
    /// Path of the publish socket. If `None`, the socket is in its own directory. Without an event log there is no
    /// socket.
    pub(crate) socket: Option<PathBuf>,
}
