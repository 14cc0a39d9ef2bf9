//! The address on which an app process accepts connections of gateways, and connections to it.
//!
//! | kind | who listens | readiness | after a death |
//! |---|---|---|---|
//! | inherited | the master, for the process | the process has accepted a connection | waiting connections are turned away |
//! | port | the process, on a port of 127.0.0.1 | a connection is possible | connections are refused |
//! | path | the process, on a Unix socket | a connection is possible | the file is removed |
//!
//! A port is reserved by a socket that is bound, but does not listen, with SO_REUSEADDR. A server that sets this option,
//! as nearly all do, can bind to the same port, and no other process gets the port by chance. Every local user can
//! connect to the port. The directory of a path is accessible only to the user of the app processes.

use std::ffi::OsString;
use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::{AsFd, AsRawFd as _, OwnedFd, RawFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{self, AddressFamily, SockFlag, SockType, SockaddrIn, SockaddrLike, UnixAddr, sockopt};
use nix::sys::stat::Mode;
use nix::unistd::{Pid, chown, getpid, mkdtemp, unlink};
use serde::{Deserialize, Serialize};

use super::private_socket::PrivateSocket;
use crate::config::gateway::ListenMethod;
use crate::config::privileges::Owner;

/// The name of the socket in its directory.
const SOCKET_NAME: &str = "app.sock";

/// The address of the processes in one slot.
#[derive(Debug)]
pub(crate) enum AppEndpoint {
    Inherited(PrivateSocket),
    Port(ReservedPort),
    Path(PrivatePath),
}

/// An address, for the next master. Descriptors are saved by number.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum SavedEndpoint {
    Inherited { listener: RawFd, path: RawFd },
    Port { number: u16, reservation: RawFd },
    Path { directory: PathBuf, opened: RawFd },
}

impl SavedEndpoint {
    pub(crate) fn descriptors(&self) -> impl Iterator<Item = RawFd> + use<> {
        let (first, second) = match *self {
            Self::Inherited { listener, path } => (listener, Some(path)),
            Self::Port { reservation, .. } => (reservation, None),
            Self::Path { opened, .. } => (opened, None),
        };
        [first].into_iter().chain(second)
    }
}

/// What a new process needs in order to listen.
#[derive(Debug)]
pub(crate) enum ListenOn {
    Socket(OwnedFd),
    Port(u16),
    Path(PathBuf),
}

/// A connection to an app process. It does not block.
#[derive(Debug)]
pub(crate) enum AppConnection {
    Unix(OwnedFd),
    /// The connection may not be established yet.
    Tcp(OwnedFd),
}

impl AppEndpoint {
    /// Creates the address of one slot. `owner` is the user of the app processes, if it is not that of the master.
    ///
    /// # Errors
    /// Returns the error from the system call that failed.
    pub(crate) fn create(method: ListenMethod, directory: &Path, owner: Option<Owner>) -> io::Result<Self> {
        Ok(match method {
            ListenMethod::Inherited => Self::Inherited(PrivateSocket::bind(directory)?),
            ListenMethod::Port => Self::Port(ReservedPort::reserve()?),
            ListenMethod::Path => Self::Path(PrivatePath::create(directory, owner)?),
        })
    }

    /// Restores an address of a former master. `claim` takes ownership of a descriptor.
    ///
    /// # Errors
    /// Fails if a descriptor is missing.
    pub(crate) fn resume(
        saved: SavedEndpoint,
        claim: &mut impl FnMut(RawFd) -> io::Result<OwnedFd>,
    ) -> io::Result<Self> {
        Ok(match saved {
            SavedEndpoint::Inherited { listener, path } => {
                Self::Inherited(PrivateSocket::from_descriptors((claim(listener)?, claim(path)?)))
            }
            SavedEndpoint::Port { number, reservation } => {
                Self::Port(ReservedPort { number, reservation: claim(reservation)? })
            }
            SavedEndpoint::Path { directory, opened } => {
                Self::Path(PrivatePath { directory, opened: claim(opened)?, creator: getpid() })
            }
        })
    }

    /// Returns the address for the next master.
    pub(crate) fn save(&self) -> SavedEndpoint {
        match self {
            Self::Inherited(socket) => {
                SavedEndpoint::Inherited { listener: socket.as_fd().as_raw_fd(), path: socket.path().as_raw_fd() }
            }
            Self::Port(port) => SavedEndpoint::Port { number: port.number, reservation: port.reservation.as_raw_fd() },
            Self::Path(path) => {
                SavedEndpoint::Path { directory: path.directory.clone(), opened: path.opened.as_raw_fd() }
            }
        }
    }

    /// Returns the descriptor that a gateway needs to connect.
    pub(crate) fn descriptor(&self) -> Option<RawFd> {
        match self {
            Self::Inherited(socket) => Some(socket.path().as_raw_fd()),
            Self::Port(_) => None,
            Self::Path(path) => Some(path.opened.as_raw_fd()),
        }
    }

    /// Connects. A new connection over TCP may not be established yet.
    ///
    /// # Errors
    /// Returns the error from the system call that failed.
    pub(crate) fn connect(&self) -> io::Result<AppConnection> {
        match self {
            Self::Inherited(socket) => socket.connect().map(AppConnection::Unix),
            Self::Port(port) => port.connect().map(AppConnection::Tcp),
            Self::Path(path) => path.connect().map(AppConnection::Unix),
        }
    }

    /// Connects, to find out whether the process is ready.
    ///
    /// # Errors
    /// Fails if the process does not listen.
    pub(crate) fn probe(&self) -> io::Result<OwnedFd> {
        if let Self::Inherited(socket) = self {
            return socket.probe();
        }
        match self.connect()? {
            AppConnection::Unix(connection) => Ok(connection),
            AppConnection::Tcp(connection) => {
                let mut watched = [PollFd::new(connection.as_fd(), PollFlags::POLLOUT)];
                if poll(&mut watched, PollTimeout::ZERO)? == 0 {
                    return Err(Errno::EINPROGRESS.into());
                }
                match socket::getsockopt(&connection, sockopt::SocketError)? {
                    0 => Ok(connection),
                    code => Err(io::Error::from_raw_os_error(code)),
                }
            }
        }
    }

    /// Prepares the address for the next process in the slot.
    ///
    /// # Errors
    /// Fails if no descriptor is available, or if a process has shut an inherited socket down.
    pub(crate) fn prepare(&self) -> io::Result<ListenOn> {
        Ok(match self {
            Self::Inherited(socket) => {
                socket.mend()?;
                ListenOn::Socket(socket.duplicate()?)
            }
            Self::Port(port) => ListenOn::Port(port.number),
            Self::Path(path) => {
                path.remove_socket();
                ListenOn::Path(path.directory.join(SOCKET_NAME))
            }
        })
    }

    /// Whether the master owns the listening socket.
    pub(crate) fn inherited(&self) -> Option<&PrivateSocket> {
        match self {
            Self::Inherited(socket) => Some(socket),
            Self::Port(_) | Self::Path(_) => None,
        }
    }
}

impl ListenOn {
    /// Replaces the placeholders in the arguments of a program.
    pub(crate) fn fill_in(&self, arguments: &[OsString]) -> Vec<OsString> {
        let (name, value) = match self {
            Self::Socket(_) => ("{fd}", crate::sys::LISTEN_FD.to_string().into()),
            Self::Port(number) => ("{port}", number.to_string().into()),
            Self::Path(path) => ("{socket}", path.clone().into_os_string()),
        };
        arguments.iter().map(|argument| replace(argument, name.as_bytes(), &value)).collect()
    }
}

fn replace(text: &OsString, name: &[u8], value: &OsString) -> OsString {
    use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
    let (mut rest, mut replaced) = (text.as_bytes(), Vec::new());
    while let Some(at) = rest.windows(name.len()).position(|part| part == name) {
        replaced.extend_from_slice(&rest[..at]);
        replaced.extend_from_slice(value.as_bytes());
        rest = &rest[at + name.len()..];
    }
    replaced.extend_from_slice(rest);
    OsString::from_vec(replaced)
}

/// A port of 127.0.0.1.
#[derive(Debug)]
pub(crate) struct ReservedPort {
    number: u16,
    reservation: OwnedFd,
}

impl ReservedPort {
    fn reserve() -> io::Result<Self> {
        let reservation = socket::socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
        socket::setsockopt(&reservation, sockopt::ReuseAddr, &true)?;
        let any = SockaddrIn::from(SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0));
        socket::bind(reservation.as_raw_fd(), &any)?;
        let bound: SockaddrIn = socket::getsockname(reservation.as_raw_fd())?;
        Ok(Self { number: bound.port(), reservation })
    }

    fn connect(&self) -> io::Result<OwnedFd> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let connection = socket::socket(AddressFamily::Inet, SockType::Stream, flags, None)?;
        socket::setsockopt(&connection, sockopt::TcpNoDelay, &true)?;
        connect(&connection, &SockaddrIn::from(SocketAddrV4::new(Ipv4Addr::LOCALHOST, self.number)))?;
        Ok(connection)
    }
}

/// A directory for the Unix socket of an app process. The process that created the directory removes it.
#[derive(Debug)]
pub(crate) struct PrivatePath {
    directory: PathBuf,
    /// The directory itself (O_PATH).
    opened: OwnedFd,
    creator: Pid,
}

impl PrivatePath {
    fn create(below: &Path, owner: Option<Owner>) -> io::Result<Self> {
        let directory = mkdtemp(&std::path::absolute(below)?.join("forkyard-XXXXXX"))?;
        let opened = open(&directory, OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())?;
        let private = Self { directory, opened, creator: getpid() };
        UnixAddr::new(&private.directory.join(SOCKET_NAME))?; // fails if the path is too long
        if let Some(Owner { user, group }) = owner {
            chown(&private.directory, Some(user), Some(group))?;
        }
        Ok(private)
    }

    fn connect(&self) -> io::Result<OwnedFd> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let connection = socket::socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
        let path = format!("/proc/self/fd/{}/{SOCKET_NAME}", self.opened.as_raw_fd());
        connect(&connection, &UnixAddr::new(path.as_str())?)?;
        Ok(connection)
    }

    fn remove_socket(&self) {
        let _ = unlink(&self.directory.join(SOCKET_NAME)); // a server that ends normally may have removed it
    }
}

impl Drop for PrivatePath {
    fn drop(&mut self) {
        if getpid() == self.creator {
            self.remove_socket();
            let _ = std::fs::remove_dir(&self.directory); // fails if the program has created other files there
        }
    }
}

/// Begins to connect.
fn connect(connection: &OwnedFd, address: &impl SockaddrLike) -> io::Result<()> {
    loop {
        match socket::connect(connection.as_raw_fd(), address) {
            Ok(()) | Err(Errno::EINPROGRESS) => return Ok(()),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn placeholders_are_replaced_wherever_they_are() {
        let arguments = ["--bind=127.0.0.1:{port}", "{port}{port}", "{fd}", ""].map(OsString::from);
        let filled = ListenOn::Port(80).fill_in(&arguments);
        assert_eq!(filled, ["--bind=127.0.0.1:80", "8080", "{fd}", ""]);
    }

    #[test]
    fn a_reserved_port_is_free_for_the_process_only() {
        let port = ReservedPort::reserve().unwrap();
        let endpoint = AppEndpoint::Port(port);
        assert_eq!(endpoint.probe().unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
        let ListenOn::Port(number) = endpoint.prepare().unwrap() else { panic!("a port") };
        let listener = TcpListener::bind(("127.0.0.1", number)).unwrap(); // the standard library sets SO_REUSEADDR
        let probe = endpoint.probe().unwrap();
        drop((listener.accept().unwrap(), probe));
    }

    #[test]
    fn the_socket_of_a_dead_process_is_removed_and_so_is_the_directory() {
        let below = tempfile::tempdir().unwrap();
        let endpoint = AppEndpoint::create(ListenMethod::Path, below.path(), None).unwrap();
        assert_eq!(endpoint.probe().unwrap_err().kind(), io::ErrorKind::NotFound);
        for _ in 0..2 {
            let ListenOn::Path(path) = endpoint.prepare().unwrap() else { panic!("a path") };
            let listener = UnixListener::bind(path).unwrap();
            drop((endpoint.probe().unwrap(), listener));
            assert_eq!(endpoint.probe().unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
        }
        drop(endpoint);
        assert_eq!(below.path().read_dir().unwrap().count(), 0);
    }
}
