//! Accepts connections, and reads the kernel's information about them.
#![expect(unsafe_code, reason = "part of the fence: see `sys.rs`")]

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};
use std::time::Duration;

use nix::sys::socket::{SockaddrLike as _, SockaddrStorage};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Accepts a connection, which is non-blocking and close-on-exec. Also returns the peer's address if it is an internet
/// address.
///
/// # Errors
/// Returns the error from `accept4(2)`; `WouldBlock` if no connection is waiting.
pub(crate) fn accept(listener: BorrowedFd<'_>) -> io::Result<(OwnedFd, Option<SocketAddr>)> {
    // SAFETY: all zeroes is a valid sockaddr_storage.
    let mut address: libc::sockaddr_storage = unsafe { std::mem::zeroed() };
    let mut length = libc::socklen_t::try_from(size_of_val(&address)).unwrap_or(0);
    let flags = libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    // SAFETY: `address` and `length` are valid for writes during the whole call, and `length` is the size of `address`.
    let socket = unsafe { libc::accept4(listener.as_raw_fd(), (&raw mut address).cast(), &raw mut length, flags) };
    if socket < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a number that accept4 returned is new, open and not owned elsewhere.
    let socket = unsafe { OwnedFd::from_raw_fd(socket) };
    // SAFETY: the kernel has written an address of `length` bytes there.
    let address = unsafe { SockaddrStorage::from_raw((&raw const address).cast(), Some(length)) };
    Ok((socket, address.as_ref().and_then(peer_address)))
}

/// Returns the address of a client. An IPv4 client has an IPv4 address even if a dual-stack socket accepted it.
pub(crate) fn peer_address(address: &SockaddrStorage) -> Option<SocketAddr> {
    let address = internet_address(address)?;
    Some(SocketAddr::new(address.ip().to_canonical(), address.port()))
}

/// Returns the IPv4 or IPv6 address, or `None` for other families.
pub(crate) fn internet_address(address: &SockaddrStorage) -> Option<SocketAddr> {
    match (address.as_sockaddr_in(), address.as_sockaddr_in6()) {
        (Some(&address), _) => Some(SocketAddr::V4(address.into())),
        (_, Some(&address)) => Some(SocketAddr::V6(address.into())),
        (None, None) => None,
    }
}

/// Returns the number of connections in the queue of a listening TCP socket.
///
/// # Errors
/// Returns the error from `getsockopt(2)`; `InvalidInput` if the socket does not listen.
pub(crate) fn tcp_queue(listener: BorrowedFd<'_>) -> io::Result<u32> {
    const LISTEN: u8 = 10; // TCP_LISTEN, of the kernel's net/tcp_states.h
    let info = tcp_info(listener)?;
    // For a listening socket, the kernel stores the length of its queue here.
    if info.tcpi_state == LISTEN { Ok(info.tcpi_unacked) } else { Err(io::ErrorKind::InvalidInput.into()) }
}

/// Returns the time since the last bytes were received on a TCP connection.
///
/// # Errors
/// Returns the error from `getsockopt(2)`.
pub(crate) fn since_last_received(connection: BorrowedFd<'_>) -> io::Result<Duration> {
    Ok(Duration::from_millis(tcp_info(connection)?.tcpi_last_data_recv.into()))
}

fn tcp_info(socket: BorrowedFd<'_>) -> io::Result<libc::tcp_info> {
    // SAFETY: all zeroes is a valid tcp_info.
    let mut info: libc::tcp_info = unsafe { std::mem::zeroed() };
    let mut length = libc::socklen_t::try_from(size_of_val(&info)).unwrap_or(0);
    let place = (&raw mut info).cast();
    // SAFETY: `info` and `length` are valid for writes during the whole call, and `length` is the size of `info`.
    let outcome =
        unsafe { libc::getsockopt(socket.as_raw_fd(), libc::IPPROTO_TCP, libc::TCP_INFO, place, &raw mut length) };
    if outcome == 0 { Ok(info) } else { Err(io::Error::last_os_error()) }
}

/// Registers a descriptor with the event loop, to wait until it is readable.
///
/// # Errors
/// Returns the error from `epoll_ctl(2)`.
pub(crate) fn register(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: the descriptor is open, and stays open because its owner is part of the returned value.
    Ok(unsafe { AsyncFd::register_with_interest(fd, interest) }?)
}
