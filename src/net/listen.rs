//! Creates listening sockets: from the text of `--bind PROTO:ADDR` to a descriptor that all workers inherit.
//!
//! One socket serves all workers, and its queue belongs to no process: a queued connection survives the death of any
//! worker. (With SO_REUSEPORT, each worker would have its own queue, and the death of a worker would reset the
//! connections in its queue.)

mod closing;
mod repair;
mod socket_file;
mod tcp;

use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd, RawFd};
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::{
    self, AddressFamily, Backlog, SockFlag, SockType, SockaddrLike, SockaddrStorage, UnixAddr, setsockopt, sockopt,
};

pub(crate) use self::closing::{Closing, is_listening};
pub(in crate::net) use self::socket_file::bind_file;
pub(crate) use self::socket_file::{
    SocketAndFile, bind_datagrams, examine_length, examine_path, give_socket_file, give_socket_file_of, is_stale,
    remove_own,
};
pub(crate) use self::tcp::resolve;
use self::tcp::{bind_tcp, bound_tcp, examine_tcp, explain_tcp};
use crate::config::address::{Address, Bind, Protocol};
use crate::config::privileges::Owner;
use crate::sys;

/// Interval between two attempts to bind an address that is in use.
const IN_USE_INTERVAL: Duration = Duration::from_millis(20);

/// The error for a `--bind` that failed. The cause contains the remedy.
#[derive(Debug)]
pub(crate) struct ListenError {
    bind: Bind,
    cause: String,
}

impl fmt::Display for ListenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cannot bind {}: {}", self.bind, self.cause)
    }
}

impl std::error::Error for ListenError {}

impl ListenError {
    pub(crate) fn new(bind: &Bind, cause: impl Into<String>) -> Self {
        Self { bind: bind.clone(), cause: cause.into() }
    }
}

/// A bound, listening socket. Dropping the listener closes the socket; [`Listener::remove_file`] removes the socket's
/// file.
#[derive(Debug)]
pub(crate) struct Listener {
    pub(crate) protocol: Protocol,
    /// The bound address, with the port that the system chose.
    pub(crate) address: Address,
    pub(crate) family: SocketFamily,
    /// The setting for which the socket was created.
    pub(crate) bind: Bind,
    socket: OwnedFd,
    /// Device and inode of the socket file that this server created. A repair replaces the file.
    file: Mutex<Option<(u64, u64)>>,
    /// Whether a former master created the socket.
    adopted: bool,
}

/// The address family of a listener's socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SocketFamily {
    Tcp,
    Unix,
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl fmt::Display for Listener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.address, self.protocol) {
            (Address::Tcp(address), Protocol::Http) => write!(f, "http://{address}"),
            (address, protocol) => write!(f, "{protocol}:{address}"),
        }
    }
}

impl Listener {
    /// Binds a socket and makes it listen.
    ///
    /// `backlog` is the length of the kernel's queue of connections that have not been accepted yet. `mode` contains
    /// the permissions of a socket file. `blocking` is true for programs that call `accept` themselves.
    ///
    /// # Errors
    /// Fails if the address cannot be bound.
    pub(crate) fn bind(bind: &Bind, backlog: u32, mode: Option<u32>, blocking: bool) -> Result<Self, ListenError> {
        let fail = |cause: String| ListenError { bind: bind.clone(), cause };
        let listener = match &bind.address {
            Address::Tcp(_) => {
                let all = Self::bind_all(bind, backlog, mode, blocking, false)?;
                return all.into_iter().next().ok_or_else(|| fail("the name has no address".to_owned()));
            }
            Address::Path(path) => bind_path(path, bind.protocol, backlog, mode).map_err(fail)?,
            Address::Abstract(name) => bind_abstract(name, bind.protocol, backlog).map_err(fail)?,
            Address::Inherited(fd) => inherit(*fd, bind.protocol).map_err(fail)?,
            Address::Systemd(_) => return Err(fail("systemd passes sockets only at a start".to_owned())),
        };
        set_blocking(&listener.socket, blocking).map_err(|error| fail(error.to_string()))?;
        listener.prepared(bind)
    }

    /// Like [`Listener::bind`], for all addresses of a name. If `blocking`, only the first address is bound, because
    /// programs have one socket. `leaves_ipv4`: see [`Bind::leaves_ipv4`]. An address that this machine does not have
    /// is omitted if another address of the name is bound.
    ///
    /// # Errors
    /// Fails as [`Listener::bind`] does. No address is bound in that case.
    pub(crate) fn bind_all(
        bind: &Bind,
        backlog: u32,
        mode: Option<u32>,
        blocking: bool,
        leaves_ipv4: bool,
    ) -> Result<Vec<Self>, ListenError> {
        let Address::Tcp(address) = &bind.address else {
            return Self::bind(bind, backlog, mode, blocking).map(|listener| vec![listener]);
        };
        let fail = |cause: String| ListenError { bind: bind.clone(), cause };
        let most = if blocking { 1 } else { usize::MAX };
        let bound = bind_tcp(address, bind.protocol, backlog, leaves_ipv4, most).map_err(fail)?;
        let prepare = |listener: Self| {
            set_blocking(&listener.socket, blocking).map_err(|error| fail(error.to_string()))?;
            listener.prepared(bind)
        };
        bound.into_iter().map(prepare).collect()
    }

    /// Adopts a socket that a former master created for `bind`, with its `file`. Does not change whether the socket
    /// blocks: O_NONBLOCK belongs to the socket rather than to a descriptor, and the processes that accept on the
    /// socket depend on it. (A program with an event loop may have set it.)
    ///
    /// # Errors
    /// Fails if `socket` is not a listening socket, or if it blocks although `blocking` is false.
    pub(crate) fn adopt(
        bind: &Bind,
        socket: OwnedFd,
        file: Option<(u64, u64)>,
        blocking: bool,
    ) -> Result<Self, ListenError> {
        let fail = |cause: String| ListenError { bind: bind.clone(), cause };
        let family = family_of(&socket).map_err(|cause| fail(format!("the socket of the former master {cause}")))?;
        if !blocking && is_blocking(&socket).map_err(|error| fail(error.to_string()))? {
            let cause = "the former master's programs accept from this socket and block, and the workers of this build must not block";
            return Err(fail(format!("{cause} (stop and start the server instead)")));
        }
        let mut listener = Self::new(bind.protocol, bind.address.clone(), family, socket, file);
        listener.adopted = true;
        listener.prepared(bind)
    }

    /// Whether a former master created the socket.
    pub(crate) fn is_adopted(&self) -> bool {
        self.adopted
    }

    fn new(
        protocol: Protocol,
        address: Address,
        family: SocketFamily,
        socket: OwnedFd,
        file: Option<(u64, u64)>,
    ) -> Self {
        let bind = Bind { protocol, address: address.clone() };
        Self { protocol, address, family, bind, socket, file: Mutex::new(file), adopted: false }
    }

    fn prepared(mut self, bind: &Bind) -> Result<Self, ListenError> {
        let fail = |cause: String| ListenError { bind: bind.clone(), cause };
        let listener = &mut self;
        if listener.family == SocketFamily::Tcp {
            // Responses are written in one piece, so delaying segments gains nothing. Accepted sockets inherit the
            // option.
            setsockopt(&listener.socket, sockopt::TcpNoDelay, &true).map_err(|errno| fail(errno.desc().to_owned()))?;
        }
        if let (SocketFamily::Tcp, Ok(address)) = (listener.family, socket::getsockname(listener.socket.as_raw_fd())) {
            let address: SockaddrStorage = address;
            listener.address = Address::Tcp(address.to_string());
        }
        self.bind = bind.clone();
        Ok(self)
    }

    /// Returns the device and inode of the socket file that this server created.
    pub(crate) fn file(&self) -> Option<(u64, u64)> {
        *self.file.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the owner of the socket file that this listener created.
    ///
    /// # Errors
    /// Fails if the file has been replaced, or a system call fails.
    pub(crate) fn give_file(&self, owner: Owner) -> Result<(), ListenError> {
        self.give_file_of(nix::unistd::geteuid(), owner)
    }

    /// Like [`Listener::give_file`], for a file whose owner was changed to `from` before.
    ///
    /// # Errors
    /// Fails as [`Listener::give_file`] does.
    pub(crate) fn give_file_of(&self, from: nix::unistd::Uid, owner: Owner) -> Result<(), ListenError> {
        let (Address::Path(path), Some(ours)) = (&self.address, self.file()) else { return Ok(()) };
        give_socket_file_of(path, ours, from, owner).map_err(|error| ListenError {
            bind: Bind { protocol: self.protocol, address: self.address.clone() },
            cause: format!(
                "cannot change the owner of its file to user {} and group {}: {error} (choose a different owner with --socket-owner)",
                owner.user, owner.group
            ),
        })
    }

    /// Returns a second descriptor of the same socket.
    ///
    /// # Errors
    /// Fails if no descriptor is available.
    pub(crate) fn duplicate(&self) -> io::Result<OwnedFd> {
        self.socket.try_clone()
    }

    /// Whether `ours`, the local address of a connection, belongs to this listener.
    pub(crate) fn accepts_at(&self, ours: &SockaddrStorage) -> bool {
        let Ok(bound) = socket::getsockname::<SockaddrStorage>(self.socket.as_raw_fd()) else { return false };
        match (sys::internet_address(&bound), sys::internet_address(ours)) {
            (Some(bound), Some(ours)) => {
                // If an IPv4 and an IPv6 socket share a port, the IPv6 socket accepts no IPv4 connections.
                let same_family = bound.is_ipv4() == ours.is_ipv4();
                let same_host = bound.ip().is_unspecified() || bound.ip() == ours.ip();
                bound.port() == ours.port() && same_family && same_host
            }
            (None, None) => bound == *ours,
            _ => false,
        }
    }

    /// Removes the socket file, unless a different file has replaced it.
    pub(crate) fn remove_file(&self) {
        if let Address::Path(path) = &self.address {
            remove_own(path, self.file());
        }
    }
}

fn is_blocking(socket: &OwnedFd) -> io::Result<bool> {
    let flags = OFlag::from_bits_retain(fcntl(socket, FcntlArg::F_GETFL)?);
    Ok(!flags.contains(OFlag::O_NONBLOCK))
}

pub(super) fn set_blocking(socket: &OwnedFd, blocking: bool) -> io::Result<()> {
    let mut flags = OFlag::from_bits_retain(fcntl(socket, FcntlArg::F_GETFL)?);
    flags.set(OFlag::O_NONBLOCK, !blocking);
    fcntl(socket, FcntlArg::F_SETFL(flags))?;
    Ok(())
}

/// Checks a `--bind` as far as possible without listening. Returns a note if the address is in use, because the process
/// that uses the address may be the running instance of this service.
///
/// # Errors
/// Returns a message for the operator if the address cannot be bound.
pub(crate) fn examine(bind: &Bind, all: &[Bind]) -> Result<Option<String>, String> {
    let found = match &bind.address {
        Address::Path(path) => examine_path(path, "--bind"),
        Address::Tcp(address) => examine_tcp(address, bind.leaves_ipv4(all)),
        // Only the form of the name is checked: a name that is in use may belong to the running instance of this
        // service.
        Address::Abstract(name) => abstract_address(name).map(|_| None),
        // The process that starts the server may pass different descriptors.
        Address::Inherited(fd) => {
            Ok(inherit(*fd, bind.protocol).err().map(|cause| format!("for this process, {cause}")))
        }
        Address::Systemd(_) => Ok(None),
    };
    found.map(|note| note.map(|note| format!("{bind}: {note}"))).map_err(|cause| format!("cannot bind {bind}: {cause}"))
}

/// Waits up to `timeout` while the address is in use, because the workers of a server that has just been killed may be
/// about to release the address.
pub(crate) fn await_address(bind: &Bind, timeout: Duration, leaves_ipv4: bool) {
    let begun = Instant::now();
    while is_in_use(bind, leaves_ipv4) && begun.elapsed() < timeout {
        std::thread::sleep(IN_USE_INTERVAL);
    }
}

fn is_in_use(bind: &Bind, leaves_ipv4: bool) -> bool {
    match &bind.address {
        Address::Tcp(address) => resolve(address)
            .is_ok_and(|all| all.into_iter().any(|one| matches!(bound_tcp(one, leaves_ipv4), Err(Errno::EADDRINUSE)))),
        Address::Path(path) => matches!(socket_file::probe(path), Ok(()) | Err(Errno::EAGAIN)),
        Address::Abstract(name) => {
            let bound = UnixAddr::new_abstract(name.as_bytes())
                .ok()
                .zip(new_socket(AddressFamily::Unix, SockType::Stream).ok());
            bound.is_some_and(|(address, socket)| socket::bind(socket.as_raw_fd(), &address) == Err(Errno::EADDRINUSE))
        }
        Address::Inherited(_) | Address::Systemd(_) => false,
    }
}

fn new_socket(family: AddressFamily, kind: SockType) -> Result<OwnedFd, String> {
    socket::socket(family, kind, SockFlag::SOCK_CLOEXEC, None)
        .map_err(|errno| format!("cannot create a socket: {}", sys::explain(&errno.into())))
}

fn listen(socket: &OwnedFd, backlog: u32) -> Result<(), String> {
    let backlog = i32::try_from(backlog).unwrap_or(i32::MAX);
    let backlog = Backlog::new(backlog).unwrap_or(Backlog::MAXCONN);
    socket::listen(socket, backlog).map_err(|errno| format!("listen: {}", errno.desc()))
}

fn bind_path(path: &Path, protocol: Protocol, backlog: u32, mode: Option<u32>) -> Result<Listener, String> {
    let (socket, file) = bind_file(path, Some(backlog), mode, "--bind")?;
    Ok(Listener::new(protocol, Address::Path(path.to_owned()), SocketFamily::Unix, socket, file))
}

fn bind_abstract(name: &str, protocol: Protocol, backlog: u32) -> Result<Listener, String> {
    let address = abstract_address(name)?;
    let socket = new_socket(AddressFamily::Unix, SockType::Stream)?;
    socket::bind(socket.as_raw_fd(), &address).map_err(|errno| match errno {
        Errno::EADDRINUSE => {
            "another program is listening there (stop that program, or choose another name)".to_owned()
        }
        errno => errno.desc().to_lowercase(),
    })?;
    listen(&socket, backlog)?;
    Ok(Listener::new(protocol, Address::Abstract(name.to_owned()), SocketFamily::Unix, socket, None))
}

fn abstract_address(name: &str) -> Result<UnixAddr, String> {
    UnixAddr::new_abstract(name.as_bytes())
        .map_err(|_| format!("the name has {} bytes, and the maximum for an abstract socket is 107", name.len()))
}

fn inherit(fd: RawFd, protocol: Protocol) -> Result<Listener, String> {
    let socket = sys::descriptor(fd)
        .ok_or(format!("descriptor {fd} is not open (the program that starts the server must pass it)"))?;
    let family = family_of(&socket).map_err(|cause| format!("descriptor {fd} {cause}"))?;
    Ok(Listener::new(protocol, Address::Inherited(fd), family, socket, None))
}

/// Returns the device and inode of the listening socket that is open as descriptor `fd`; these are the same for each
/// descriptor of the socket.
pub(crate) fn identity_of(fd: RawFd) -> Option<(u64, u64)> {
    let socket = sys::descriptor(fd)?;
    let found = nix::sys::stat::fstat(&socket).ok()?;
    socket::getsockopt(&socket, sockopt::AcceptConn).ok()?.then_some((found.st_dev, found.st_ino))
}

/// Returns the family of a listening socket.
///
/// # Errors
/// Returns the predicate of a sentence about the socket, as in `is not a listening socket`.
fn family_of(socket: &OwnedFd) -> Result<SocketFamily, String> {
    if !socket::getsockopt(socket, sockopt::AcceptConn).unwrap_or(false) {
        return Err("is not a listening socket (call listen on it before passing it on)".to_owned());
    }
    if socket::getsockopt(socket, sockopt::SockType) != Ok(SockType::Stream) {
        return Err("is not a stream socket (under systemd: ListenStream= in the .socket unit)".to_owned());
    }
    let address: SockaddrStorage = socket::getsockname(socket.as_raw_fd()).map_err(|errno| errno.desc().to_owned())?;
    match address.family() {
        Some(AddressFamily::Unix) => Ok(SocketFamily::Unix),
        Some(AddressFamily::Inet | AddressFamily::Inet6) => Ok(SocketFamily::Tcp),
        other => Err(format!("is a socket of an unsupported address family: {other:?}")),
    }
}

/// Whether standard input is a listening socket: the FastCGI convention for a program that a web server starts (FastCGI
/// specification 1.0, section 2.2).
pub(crate) fn started_by_web_server() -> bool {
    socket::getsockopt(&io::stdin(), sockopt::AcceptConn).unwrap_or(false)
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;
    use std::os::unix::fs::MetadataExt as _;

    use super::socket_file::probe;
    use super::*;

    #[test]
    fn of_several_servers_that_start_together_on_one_path_one_listens() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.sock");
        let bind: Bind = format!("fastcgi:unix:{}", path.display()).parse().unwrap();
        for _ in 0..50 {
            drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
            let start = std::sync::Barrier::new(4);
            let one = || {
                start.wait();
                Listener::bind(&bind, 8, None, false)
            };
            let all: Vec<_> = std::thread::scope(|scope| {
                let threads = [(); 4].map(|()| scope.spawn(one));
                threads.into_iter().map(|thread| thread.join().unwrap()).collect()
            });
            assert_eq!(all.iter().filter(|listener| listener.is_ok()).count(), 1, "{all:?}");
            assert_eq!(probe(&path), Ok(()), "the file belongs to the listening socket");
            all.iter().flatten().for_each(Listener::remove_file);
        }
    }

    #[test]
    fn adopting_a_socket_does_not_change_whether_it_blocks() {
        let bind: Bind = "fastcgi:127.0.0.1:0".parse().unwrap();
        let adopt = |made: &Listener, blocking| Listener::adopt(&bind, made.duplicate().unwrap(), None, blocking);
        // The socket is created for programs that block in accept; a program with an event loop sets O_NONBLOCK.
        let made = Listener::bind(&bind, 8, None, true).unwrap();
        assert!(is_blocking(&made.socket).unwrap());
        let error = adopt(&made, false).unwrap_err().to_string();
        assert!(error.contains("stop and start"), "{error}");
        assert!(is_blocking(&made.socket).unwrap(), "a refused adoption changes nothing");
        set_blocking(&made.socket, false).unwrap();
        for blocking in [true, false] {
            adopt(&made, blocking).unwrap();
            assert!(!is_blocking(&made.socket).unwrap());
        }
    }

    #[test]
    fn all_addresses_of_a_name_are_bound_on_one_port_and_a_program_gets_the_first() {
        let bind: Bind = "http:localhost:0".parse().unwrap();
        let names: Vec<SocketAddr> = resolve("localhost:0").unwrap();
        let here = names.iter().filter(|address| bound_tcp(**address, false).is_ok()).count();
        let all = Listener::bind_all(&bind, 8, None, false, false).unwrap();
        assert_eq!(all.len(), here, "{names:?}: {all:?}");
        let ports = all.iter().map(|listener| match &listener.address {
            Address::Tcp(address) => address.parse::<SocketAddr>().unwrap().port(),
            other => panic!("not TCP: {other}"),
        });
        let ports: std::collections::BTreeSet<u16> = ports.collect();
        assert!(ports.len() == 1 && !ports.contains(&0), "{ports:?}");
        assert!(all.iter().all(|listener| listener.bind == bind));
        assert_eq!(Listener::bind_all(&bind, 8, None, true, false).unwrap().len(), 1);
    }

    #[test]
    fn a_connection_belongs_to_the_socket_of_its_family() {
        let both = ["http:[::]:0", "http:0.0.0.0:0"].map(|text| text.parse::<Bind>().unwrap());
        let v6 = Listener::bind_all(&both[0], 8, None, false, true).unwrap().remove(0);
        let Address::Tcp(bound) = &v6.address else { panic!("not TCP") };
        let port = bound.parse::<SocketAddr>().unwrap().port();
        let v4 = Listener::bind(&format!("http:0.0.0.0:{port}").parse().unwrap(), 8, None, false).unwrap();
        let near = |ip: &str| SockaddrStorage::from(SocketAddr::new(ip.parse().unwrap(), port));
        assert!(v4.accepts_at(&near("127.0.0.1")) && !v4.accepts_at(&near("::1")));
        assert!(v6.accepts_at(&near("::1")) && !v6.accepts_at(&near("127.0.0.1")));
    }

    #[test]
    fn a_seqpacket_socket_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let kind = SockType::SeqPacket;
        let socket = socket::socket(AddressFamily::Unix, kind, SockFlag::SOCK_CLOEXEC, None).unwrap();
        let address = UnixAddr::new(&directory.path().join("a.sock")).unwrap();
        socket::bind(socket.as_raw_fd(), &address).unwrap();
        listen(&socket, 8).unwrap();
        let bind = Bind { protocol: Protocol::Http, address: Address::Inherited(socket.as_raw_fd()) };
        let error = Listener::bind(&bind, 8, None, false).unwrap_err().to_string();
        assert!(error.contains("is not a stream socket"), "{error}");
    }

    #[test]
    fn a_stale_socket_is_replaced_and_a_live_one_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.sock");
        let bind: Bind = format!("fastcgi:unix:{}", path.display()).parse().unwrap();
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());

        let first = Listener::bind(&bind, 8, Some(0o600), false).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        let error = Listener::bind(&bind, 8, None, false).unwrap_err().to_string();
        assert!(error.contains("another program is listening there"), "{error}");

        // A file that another program created under the same name is kept.
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "mine").unwrap();
        first.remove_file();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "mine");
        let error = Listener::bind(&bind, 8, None, false).unwrap_err().to_string();
        assert!(error.contains("is not a socket"), "{error}");
    }
}
