//! Binds TCP addresses: every address of a name, over IPv4 and IPv6.

use std::net::{SocketAddr, ToSocketAddrs as _};
use std::os::fd::{AsRawFd as _, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{
    self, AddressFamily, SockFlag, SockType, SockaddrIn, SockaddrIn6, SockaddrLike, SockaddrStorage, setsockopt,
    sockopt,
};

use super::{Listener, SocketFamily, listen};
use crate::config::address::{Address, Protocol};
use crate::sys;

/// Binds up to `most` sockets, one for each address.
pub(super) fn bind_tcp(
    address: &str,
    protocol: Protocol,
    backlog: u32,
    leaves_ipv4: bool,
    most: usize,
) -> Result<Vec<Listener>, String> {
    let mut cause = format!("'{address}' resolves to no address");
    let mut listeners: Vec<Listener> = Vec::new();
    let mut chosen = None;
    for mut candidate in resolve(address)? {
        if listeners.len() == most {
            log::info!(address:% = candidate; "did not bind an address: a program that accepts connections itself has one socket (--bind)");
            continue;
        }
        // The port that the system chose for the first address applies to all.
        candidate.set_port(chosen.unwrap_or(candidate.port()));
        match bound_tcp(candidate, leaves_ipv4) {
            Ok(socket) => {
                listen(&socket, backlog)?;
                let bound: Result<SockaddrStorage, _> = socket::getsockname(socket.as_raw_fd());
                chosen = bound.ok().and_then(|bound| sys::internet_address(&bound)).map(|bound| bound.port());
                let address = Address::Tcp(candidate.to_string());
                listeners.push(Listener::new(protocol, address, SocketFamily::Tcp, socket, None));
            }
            Err(errno) if is_absent(errno) => {
                cause = explain_tcp(errno, candidate);
                log::debug!(name = address; "did not bind an address of a name: {cause}");
            }
            Err(errno) => return Err(explain_tcp(errno, candidate)),
        }
    }
    if listeners.is_empty() { Err(cause) } else { Ok(listeners) }
}

/// Whether the error means that this machine does not have the address. Such an address is omitted if a name has
/// several addresses.
fn is_absent(errno: Errno) -> bool {
    matches!(errno, Errno::EADDRNOTAVAIL | Errno::EAFNOSUPPORT)
}

/// Returns all addresses of `HOST:PORT`.
///
/// # Errors
/// Returns a message for the operator if the name cannot be resolved.
pub(crate) fn resolve(address: &str) -> Result<Vec<SocketAddr>, String> {
    let found = address.to_socket_addrs().map_err(|error| {
        format!("cannot resolve '{address}': {error} (give an address and a port, as in 127.0.0.1:8080)")
    })?;
    let mut all: Vec<SocketAddr> = Vec::new();
    for address in found {
        if !all.contains(&address) {
            all.push(address); // an address is listed once for each socket type, and for each line of /etc/hosts
        }
    }
    Ok(all)
}

/// Returns a socket that is bound but does not listen yet.
pub(super) fn bound_tcp(address: SocketAddr, leaves_ipv4: bool) -> Result<OwnedFd, Errno> {
    let (family, storage): (_, Box<dyn SockaddrLike>) = match address {
        SocketAddr::V4(address) => (AddressFamily::Inet, Box::new(SockaddrIn::from(address))),
        SocketAddr::V6(address) => (AddressFamily::Inet6, Box::new(SockaddrIn6::from(address))),
    };
    let socket = socket::socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    setsockopt(&socket, sockopt::ReuseAddr, &true)?;
    if address.is_ipv6() {
        // This overrides the sysctl net.ipv6.bindv6only.
        setsockopt(&socket, sockopt::Ipv6V6Only, &leaves_ipv4)?;
    }
    socket::bind(socket.as_raw_fd(), &*storage)?;
    Ok(socket)
}

pub(super) fn explain_tcp(errno: Errno, address: SocketAddr) -> String {
    let port = address.port();
    match errno {
        Errno::EADDRINUSE => {
            format!("port {port} is in use by another program (stop that program, or choose another port with --bind)")
        }
        Errno::EACCES => {
            format!("permission denied for port {port} (ports below 1024 need root or CAP_NET_BIND_SERVICE)")
        }
        Errno::EADDRNOTAVAIL if address.is_ipv6() => {
            format!(
                "{} is not an address of this machine (::1 is one, if the machine has IPv6; [::] stands for all of them)",
                address.ip()
            )
        }
        Errno::EADDRNOTAVAIL => {
            format!(
                "{} is not an address of this machine (127.0.0.1 is one; 0.0.0.0 stands for all of them; without IPv4: [::1] and [::])",
                address.ip()
            )
        }
        Errno::EAFNOSUPPORT if address.is_ipv6() => {
            "this machine has no IPv6 (give an IPv4 address with --bind)".to_owned()
        }
        Errno::EAFNOSUPPORT => {
            "this machine has no IPv4 (give an IPv6 address with --bind, as in http:[::1]:8080)".to_owned()
        }
        errno @ (Errno::EMFILE | Errno::ENFILE) => sys::explain(&errno.into()),
        errno => errno.desc().to_owned(),
    }
}

/// Like [`super::examine`], for TCP.
pub(super) fn examine_tcp(address: &str, leaves_ipv4: bool) -> Result<Option<String>, String> {
    let mut found = Err(format!("'{address}' resolves to no address"));
    for candidate in resolve(address)? {
        match bound_tcp(candidate, leaves_ipv4) {
            Ok(_) => found = Ok(None),
            Err(Errno::EADDRINUSE) => {
                return Ok(Some("the port is in use now (by this service, if it runs)".to_owned()));
            }
            Err(errno) if is_absent(errno) => found = found.map_err(|_| explain_tcp(errno, candidate)),
            Err(errno) => return Err(explain_tcp(errno, candidate)),
        }
    }
    found
}
