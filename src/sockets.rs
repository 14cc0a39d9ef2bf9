//! Which sockets a start has: those that a former master left, those that systemd passed, and new
//! ones for the rest.

use crate::config::Config;
use crate::listen::{Address, Bind, ListenError, Listener};
use crate::master::upgrade::Takeover;
use crate::systemd;

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
        match &bind.address {
            _ if !left.is_empty() => {}
            Address::Systemd(_) if takeover.is_some() => {
                return Err(ListenError::new(bind, "systemd passes sockets at a start only (stop and start instead)"));
            }
            Address::Systemd(name) => take_passed(config, blocking, bind, name.as_deref(), listeners)?,
            Address::Tcp(_) | Address::Path(_) | Address::Abstract(_) | Address::Inherited(_) => {
                listeners.push(Listener::bind(bind, config.backlog, config.socket_mode, blocking)?);
            }
        }
        for (socket, file) in left {
            listeners.push(Listener::adopt(bind, socket, file, blocking)?);
        }
    }
    match listeners.as_slice() {
        [_, second, ..] if blocking => {
            Err(ListenError::new(&second.bind, "a program that accepts for itself has one socket, and here is another"))
        }
        _ => Ok(()),
    }
}

fn take_passed(
    config: &Config,
    blocking: bool,
    bind: &Bind,
    name: Option<&str>,
    listeners: &mut Vec<Listener>,
) -> Result<(), ListenError> {
    for fd in systemd::sockets(name).map_err(|cause| ListenError::new(bind, cause))? {
        let passed = Bind { protocol: bind.protocol, address: Address::Inherited(fd) };
        let mut listener = Listener::bind(&passed, config.backlog, config.socket_mode, blocking)?;
        listener.bind = bind.clone();
        listeners.push(listener);
    }
    Ok(())
}
