//! Detects and repairs changes that other processes have made to a listening socket. Programs and their children hold
//! the socket as their standard input, and both `O_NONBLOCK` and shutdown(2) act on the socket rather than on a
//! descriptor.
//!
//! A socket that was shut down for reading no longer listens. Over TCP, listen(2) makes it listen again, but on a
//! different port if it was bound to port 0; a Unix socket never listens again. A socket that this server bound is
//! therefore replaced: a new socket is bound to the same address, and takes the descriptor number of the old socket.
//! listen(2) is used only for a TCP socket that was passed to the server.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::sync::PoisonError;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{self, AddressFamily, Shutdown, SockType, UnixAddr, setsockopt, sockopt};

use super::{Listener, SocketFamily, bind_file, bound_tcp, explain_tcp, is_blocking, listen, new_socket, set_blocking};
use crate::config::Config;
use crate::config::address::Address;
use crate::sys;

impl Listener {
    /// Whether the socket can still receive connections.
    pub(crate) fn is_listening(&self) -> bool {
        // A Unix socket that was shut down still reports in SO_ACCEPTCONN that it listens.
        let asked = PollFlags::from_bits_retain(libc::POLLRDHUP);
        let mut watched = [PollFd::new(self.as_fd(), asked)];
        let polled = poll(&mut watched, PollTimeout::ZERO);
        // nix has no name for POLLRDHUP, and returns `None` if that bit is set.
        let is_over = polled.is_ok() && watched[0].revents().is_none_or(|events| events.contains(PollFlags::POLLHUP));
        socket::getsockopt(&self.socket, sockopt::AcceptConn).unwrap_or(false) && !is_over
    }

    /// Whether accept(2) blocks on the socket; true if this cannot be determined.
    pub(crate) fn is_blocking(&self) -> bool {
        is_blocking(&self.socket).unwrap_or(true)
    }

    /// Makes accept(2) block again.
    ///
    /// # Errors
    /// Returns the error from `fcntl(2)`.
    pub(crate) fn make_blocking(&self) -> io::Result<()> {
        set_blocking(&self.socket, true)
    }

    /// Listens again after another process has shut the socket down. `blocking` is as for [`Listener::bind`].
    ///
    /// # Errors
    /// Returns a message for the operator if the socket cannot be repaired.
    pub(crate) fn repair(&self, config: &Config, blocking: bool) -> Result<(), String> {
        let backlog = config.backlog;
        let socket = match (&self.bind.address, &self.address) {
            (Address::Tcp(_), Address::Tcp(address)) => {
                let address: SocketAddr = address.parse().map_err(|_| format!("'{address}' is not an address"))?;
                let leaves_ipv4 = socket::getsockopt(&self.socket, sockopt::Ipv6V6Only).unwrap_or(false);
                let socket = bound_tcp(address, leaves_ipv4).map_err(|errno| explain_tcp(errno, address))?;
                listen(&socket, backlog)?;
                setsockopt(&socket, sockopt::TcpNoDelay, &true).map_err(|errno| errno.desc().to_owned())?;
                socket
            }
            (Address::Path(path), _) => {
                let (socket, file) = bind_file(path, Some(backlog), config.socket_mode, "--bind")?;
                *self.file.lock().unwrap_or_else(PoisonError::into_inner) = file;
                let given = config.privileges.owner_of_sockets().map(|owner| self.give_file(owner));
                given.transpose().map_err(|error| error.to_string())?;
                socket
            }
            (Address::Abstract(name), _) => return self.bind_abstract_again(name, backlog, blocking),
            (Address::Inherited(_) | Address::Systemd(_) | Address::Tcp(_), _) if self.family == SocketFamily::Tcp => {
                return listen(&self.socket, backlog);
            }
            (Address::Inherited(_) | Address::Systemd(_) | Address::Tcp(_), _) => {
                return Err(
                    "another program passed it to this server, so the server cannot recreate it (restart the socket \
                            unit, or the program that passed it)"
                        .to_owned(),
                );
            }
        };
        self.take_place(&socket, blocking)
    }

    /// Binds a new socket to an abstract name. The name becomes free when the last process that holds the old socket
    /// closes it. This process also holds the old socket, and must close it first.
    fn bind_abstract_again(&self, name: &str, backlog: u32, blocking: bool) -> Result<(), String> {
        let address = UnixAddr::new_abstract(name.as_bytes()).map_err(|errno| errno.desc().to_owned())?;
        self.take_place(&new_socket(AddressFamily::Unix, SockType::Stream)?, blocking)?;
        socket::bind(self.socket.as_raw_fd(), &address).map_err(|errno| {
            let why = errno.desc().to_lowercase();
            format!("{why} (a process still holds the old socket: the name is free when that process has exited)")
        })?;
        listen(&self.socket, backlog)
    }

    fn take_place(&self, socket: &OwnedFd, blocking: bool) -> Result<(), String> {
        let taken = set_blocking(socket, blocking).and_then(|()| sys::replace(self.socket.as_raw_fd(), socket));
        taken.map_err(|error| error.to_string())
    }

    /// Stops listening when the server exits, even if other processes hold the socket, so that the address becomes free
    /// and clients are refused. Has no effect on a socket that was passed to this server, because it belongs to other
    /// processes too.
    pub(crate) fn stop_listening(&self) {
        if !matches!(self.bind.address, Address::Inherited(_) | Address::Systemd(_)) {
            let _ = socket::shutdown(self.socket.as_raw_fd(), Shutdown::Both); // the socket may be shut down already
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpStream;
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::config::address::Bind;

    fn config(bind: &str) -> Config {
        let arguments = ["x", "--bind", bind].map(std::ffi::OsString::from);
        let app_info = crate::cli::AppInfo::default();
        let crate::cli::Invocation::Serve(request) = crate::cli::parse_linked(&arguments, &app_info).unwrap() else {
            panic!("not a request to serve")
        };
        request.config
    }

    #[test]
    fn a_socket_that_was_shut_down_listens_again_at_its_address() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.sock");
        let name = format!("forkyard-repair-{}", std::process::id());
        for bind in [
            format!("fastcgi:unix:{}", path.display()),
            "fastcgi:127.0.0.1:0".to_owned(),
            format!("fastcgi:unix:@{name}"),
        ] {
            let config = config(&bind);
            let listener = Listener::bind(&bind.parse::<Bind>().unwrap(), 8, None, true).unwrap();
            let connects = || match &listener.address {
                Address::Tcp(address) => TcpStream::connect(address).is_ok(),
                Address::Path(path) => UnixStream::connect(path).is_ok(),
                Address::Abstract(name) => {
                    use std::os::linux::net::SocketAddrExt as _;
                    let address = std::os::unix::net::SocketAddr::from_abstract_name(name).unwrap();
                    UnixStream::connect_addr(&address).is_ok()
                }
                Address::Inherited(_) | Address::Systemd(_) => false,
            };
            assert!(listener.is_listening() && connects(), "{bind}");
            for how in [Shutdown::Both, Shutdown::Read] {
                socket::shutdown(listener.socket.as_raw_fd(), how).unwrap();
                assert!(!listener.is_listening() && !connects(), "{bind}");
                listener.repair(&config, true).unwrap();
                assert!(listener.is_listening() && listener.is_blocking() && connects(), "{bind}");
            }
            listener.stop_listening();
            assert!(!connects(), "{bind}");
            listener.remove_file();
            assert!(!path.exists(), "the new file is removed");
        }
    }

    #[test]
    fn a_tcp_socket_that_was_passed_on_is_made_to_listen_again() {
        let made = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = made.local_addr().unwrap();
        drop(made);
        let made = Listener::bind(&format!("fastcgi:{address}").parse::<Bind>().unwrap(), 8, None, true).unwrap();
        let fd = made.socket.as_raw_fd();
        let passed = Listener::bind(&format!("fastcgi:fd:{fd}").parse::<Bind>().unwrap(), 8, None, true).unwrap();
        socket::shutdown(fd, Shutdown::Read).unwrap();
        assert!(!passed.is_listening());
        passed.repair(&config("http:127.0.0.1:0"), true).unwrap();
        assert!(passed.is_listening() && TcpStream::connect(address).is_ok());
        passed.stop_listening();
        assert!(passed.is_listening(), "it belongs to another process");
    }
}
