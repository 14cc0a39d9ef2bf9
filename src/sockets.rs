//! Which sockets a start has: those that a former master left, and new ones for what it did not have.

use crate::config::Config;
use crate::listen::{ListenError, Listener};
use crate::master::upgrade::Takeover;

/// Adds a listener for each `--bind` to `listeners`. In an error too they are the caller's, who removes
/// their files.
///
/// # Errors
/// [`ListenError`], worded for the operator.
pub(crate) fn open(
    config: &Config,
    blocking: bool,
    mut takeover: Option<&mut Takeover>,
    listeners: &mut Vec<Listener>,
) -> Result<(), ListenError> {
    for bind in &config.binds {
        let left = takeover.as_deref_mut().map(|left| left.listeners(&bind.to_string())).unwrap_or_default();
        if left.is_empty() {
            listeners.push(Listener::bind(bind, config.backlog, config.socket_mode, blocking)?);
        }
        for (socket, file) in left {
            listeners.push(Listener::adopt(bind, socket, file, blocking)?);
        }
    }
    Ok(())
}
