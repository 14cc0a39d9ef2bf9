//! Opens the sockets at startup: takes over the sockets of a former master and the sockets that systemd passed, and
//! creates the others.

use std::time::Duration;

use super::systemd;
use crate::config::Config;
use crate::config::address::{Address, Bind};
use crate::net::control_listener::ControlListener;
use crate::net::listen::{self, ListenError, Listener};
use crate::net::publish_socket::PublishSocket;
use crate::sys::BoxError;
use crate::upgrade::Takeover;

/// How long to wait for an address that is in use. A service manager may restart the server as soon as the former
/// master is dead, while the former workers are still using the address.
const FORMER: Duration = Duration::from_secs(1);

/// Adds the listeners of each `--bind` to `listeners`. After an error, the caller must remove the files of the
/// listeners that were added.
///
/// # Errors
/// Returns a message for the operator if an address cannot be bound or a socket cannot be used.
pub(crate) fn open(
    config: &Config,
    blocking: bool,
    mut takeover: Option<&mut Takeover>,
    listeners: &mut Vec<Listener>,
) -> Result<(), BoxError> {
    for bind in &config.binds {
        let left = takeover.as_deref_mut().map(|left| left.listeners(bind)).unwrap_or_default();
        match &bind.address {
            _ if !left.is_empty() => {}
            Address::Systemd(_) if takeover.is_some() => {
                let cause = "systemd passes sockets only at a start (stop and start the server instead)";
                return Err(ListenError::new(bind, cause).into());
            }
            Address::Systemd(name) => take_passed(config, blocking, bind, name.as_deref(), listeners)?,
            Address::Tcp(_) | Address::Path(_) | Address::Abstract(_) | Address::Inherited(_) => {
                let leaves_ipv4 = bind.leaves_ipv4(&config.binds);
                listen::await_address(bind, FORMER, leaves_ipv4);
                let bound = Listener::bind_all(bind, config.backlog, config.socket_mode, blocking, leaves_ipv4)?;
                for listener in bound {
                    let given = config.privileges.owner_of_sockets().map(|owner| listener.give_file(owner));
                    listeners.push(listener);
                    given.transpose()?;
                }
            }
        }
        for (socket, file) in left {
            listeners.push(Listener::adopt(bind, socket, file, blocking)?);
        }
    }
    match listeners.as_slice() {
        [_, second, ..] if blocking => {
            let cause = "forkyard run takes one listening socket, and this is the second";
            Err(ListenError::new(&second.bind, cause).into())
        }
        _ => Ok(()),
    }
}

/// Opens the control socket: a former master's socket if it has the same path, otherwise a new one. A former master's
/// socket at a different path is removed. An upgrade check does not take the socket over.
///
/// # Errors
/// Returns a message for the operator if the socket cannot be created.
pub(crate) fn open_control(
    config: &Config,
    takeover: Option<&mut Takeover>,
) -> Result<Option<ControlListener>, BoxError> {
    let wanted = config.control.socket.as_deref();
    if let Some(takeover) = takeover {
        if takeover.check && wanted.is_some_and(|path| takeover.has_control(path)) {
            return Ok(None);
        }
        match takeover.control() {
            Some(left) if wanted == Some(left.path()) => return Ok(Some(left)),
            Some(_) | None => {}
        }
    }
    Ok(wanted.map(ControlListener::bind).transpose()?)
}

/// Opens the publish socket: a former master's socket if its path is still the configured path, otherwise a new one.
/// Returns `None` without an event log, or if no path is configured and no place is suitable. A former master's socket
/// at a different path is removed. An upgrade check does not take the socket over.
///
/// # Errors
/// Returns a message for the operator if the socket cannot be created.
pub(crate) fn open_publish(
    config: &Config,
    takeover: Option<&mut Takeover>,
) -> Result<Option<PublishSocket>, BoxError> {
    let asked = config.publish.socket.as_deref();
    let wanted = config.events.bytes > 0;
    if let Some(takeover) = takeover {
        if takeover.check && wanted && takeover.has_publish(asked) {
            return Ok(None);
        }
        match takeover.publish() {
            Some(left) if wanted && left.asked() == asked => return Ok(Some(left)),
            Some(_) | None => {}
        }
    }
    if wanted { Ok(PublishSocket::bind(config)?) } else { Ok(None) }
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
