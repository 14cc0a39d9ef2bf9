//! The private listening socket of an app process: only the server's own processes can connect to it.
//!
//! The socket is bound to a path in a new directory, and path and directory are removed at once. The gateways keep a
//! descriptor of the path (O_PATH), through which they connect (`/proc/self/fd/N`), whatever user they run as. So no
//! file is left behind, whenever the server dies, and no other process can connect.
//!
//! The master keeps the socket open. Connections that wait in its queue survive the death of the app process, and are
//! accepted by the next process in the same slot.

use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{self, AddressFamily, Backlog, SockFlag, SockType, UnixAddr};
use nix::sys::stat::{FchmodatFlags, Mode, fchmodat};
use nix::unistd::{mkdtemp, unlink};

use super::listen::{is_listening, set_blocking};

/// Connections that may wait in the kernel's queue. A gateway connects only to a process that it has claimed, so the
/// queue is nearly empty.
const BACKLOG: i32 = 128;

/// A listening socket, and the descriptor through which processes of this server connect to it.
#[derive(Debug)]
pub(crate) struct PrivateSocket {
    listener: OwnedFd,
    path: OwnedFd,
}

impl PrivateSocket {
    /// Creates a socket. For a moment, it has a name below `directory`.
    ///
    /// # Errors
    /// Returns the error from the system call that failed.
    pub(crate) fn bind(directory: &Path) -> io::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC;
        let listener = socket::socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
        let own = mkdtemp(&directory.join("forkyard-XXXXXX"))?;
        let name = own.join("app");
        let bound = bind_at(&listener, &name);
        let _ = unlink(&name); // absent if it could not be bound
        let _ = std::fs::remove_dir(&own);
        Ok(Self { path: bound?, listener })
    }

    /// Restores a socket from its descriptors: the listening socket, and the one for connecting.
    pub(crate) fn from_descriptors((listener, path): (OwnedFd, OwnedFd)) -> Self {
        Self { listener, path }
    }

    /// Returns the descriptor for connecting.
    pub(crate) fn path(&self) -> BorrowedFd<'_> {
        self.path.as_fd()
    }

    /// Connects. The connection does not block.
    ///
    /// # Errors
    /// Returns the error from the system call that failed. EAGAIN means that the queue is full, and ECONNREFUSED that
    /// a process has shut the socket down.
    pub(crate) fn connect(&self) -> io::Result<OwnedFd> {
        connect_through(self.path.as_fd())
    }

    /// Connects, to find out when a process accepts connections. The process reads end of file at once, and usually
    /// closes the connection ([`is_closed`]); php-cgi would otherwise wait five seconds for a request.
    ///
    /// # Errors
    /// Fails as [`connect`](Self::connect) does.
    pub(crate) fn probe(&self) -> io::Result<OwnedFd> {
        let connection = self.connect()?;
        socket::shutdown(connection.as_raw_fd(), socket::Shutdown::Write)?;
        Ok(connection)
    }

    /// Whether a connection waits to be accepted.
    pub(crate) fn has_queue(&self) -> bool {
        let mut watched = [PollFd::new(self.listener.as_fd(), PollFlags::POLLIN)];
        poll(&mut watched, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
    }

    /// Prepares the socket for the next process, because the former one may have changed it.
    ///
    /// # Errors
    /// Fails if the former process has shut the socket down.
    pub(crate) fn mend(&self) -> io::Result<()> {
        if !is_listening(self.listener.as_fd()) {
            return Err(io::Error::other("a process has shut down its private socket (restart the server)"));
        }
        set_blocking(&self.listener, true)
    }

    /// Makes accept(2) return an error if no connection waits.
    ///
    /// # Errors
    /// Returns the error from fcntl(2).
    pub(crate) fn make_nonblocking(&self) -> io::Result<()> {
        set_blocking(&self.listener, false)
    }

    /// Returns a descriptor for a new process.
    ///
    /// # Errors
    /// Fails if no descriptor is available.
    pub(crate) fn duplicate(&self) -> io::Result<OwnedFd> {
        self.listener.try_clone()
    }
}

impl AsFd for PrivateSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

fn bind_at(listener: &OwnedFd, name: &Path) -> io::Result<OwnedFd> {
    socket::bind(listener.as_raw_fd(), &UnixAddr::new(name)?)?;
    // Connecting requires permission to write to the socket's file. Only processes that have the descriptor can.
    fchmodat(nix::fcntl::AT_FDCWD, name, Mode::from_bits_truncate(0o666), FchmodatFlags::FollowSymlink)?;
    socket::listen(listener, Backlog::new(BACKLOG)?)?;
    Ok(open(name, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty())?)
}

/// Whether the peer has closed a connection on which it has sent nothing.
pub(crate) fn is_closed(connection: &OwnedFd) -> bool {
    let mut watched = [PollFd::new(connection.as_fd(), PollFlags::POLLIN)];
    poll(&mut watched, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
}

/// Connects to the socket whose path is open as `path`.
///
/// # Errors
/// Returns the error from the system call that failed.
pub(crate) fn connect_through(path: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let connection = socket::socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    let mut name = [0; 32];
    let length = {
        use std::io::Write as _;
        let mut rest = &mut name[..];
        write!(rest, "/proc/self/fd/{}", path.as_raw_fd())?;
        let left = rest.len();
        name.len() - left
    };
    let address = UnixAddr::new(std::ffi::OsStr::from_bytes(&name[..length]))?;
    loop {
        match socket::connect(connection.as_raw_fd(), &address) {
            Err(Errno::EINTR) => {}
            outcome => return outcome.map(|()| connection).map_err(Into::into),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::os::unix::net::{UnixListener, UnixStream};

    use super::*;

    #[test]
    fn a_socket_leaves_no_file_and_accepts_connections_through_its_descriptor() {
        let directory = tempfile::tempdir().unwrap();
        let private = PrivateSocket::bind(directory.path()).unwrap();
        assert_eq!(directory.path().read_dir().unwrap().count(), 0);
        assert!(!private.has_queue());
        let mut client = UnixStream::from(private.connect().unwrap());
        assert!(private.has_queue());
        let (mut server, _) = UnixListener::from(private.duplicate().unwrap()).accept().unwrap();
        assert!(!private.has_queue());
        client.write_all(b"x").unwrap();
        drop(client);
        let mut text = String::new();
        server.read_to_string(&mut text).unwrap();
        assert_eq!(text, "x");
    }

    #[test]
    fn a_socket_is_mended_for_the_next_process_unless_it_was_shut_down() {
        let directory = tempfile::tempdir().unwrap();
        let private = PrivateSocket::bind(directory.path()).unwrap();
        UnixListener::from(private.duplicate().unwrap()).set_nonblocking(true).unwrap();
        private.mend().unwrap();
        let flags = nix::fcntl::fcntl(private.as_fd(), nix::fcntl::FcntlArg::F_GETFL).unwrap();
        assert!(!OFlag::from_bits_retain(flags).contains(OFlag::O_NONBLOCK));
        socket::shutdown(private.as_fd().as_raw_fd(), socket::Shutdown::Both).unwrap();
        assert!(private.mend().unwrap_err().to_string().contains("shut down"));
    }
}
