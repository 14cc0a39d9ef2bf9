//! Closes a listening socket permanently, without losing a queued connection.
//!
//! Closing a descriptor is not enough: as long as any other process holds the socket, the kernel completes connections
//! that no process will accept. shutdown(2) acts on the socket itself, for all processes that hold it. On Linux, the
//! effect depends on the address family:
//!
//! - Unix: new connections are refused from that moment on; queued connections can still be accepted.
//! - TCP: new connections are refused, and queued connections are reset. Therefore, a socket filter that drops SYN
//!   segments first holds off new connections until the queue is empty. (The client's kernel retransmits its SYN after
//!   a second.)
//!
//! After a shutdown(2), a blocking `accept` returns EINVAL. A non-blocking `accept` returns EINVAL over TCP but EAGAIN
//! on a Unix socket, although poll(2) reports that socket as readable forever.
//!
//! Sockets that were passed to this server (systemd, fd:N) belong to other processes too, and are never shut down.

use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{self, Shutdown, sockopt};

use super::{Listener, SocketFamily};
use crate::config::address::Address;
use crate::sys;

/// How long to wait for the queue to empty if new connections cannot be held off.
const UNFILTERED: Duration = Duration::from_millis(200);
/// How long sockets may be held open for programs that have not been sent SIGTERM yet.
const MAX_HOLD: Duration = Duration::from_millis(1500);

impl Listener {
    /// Whether this server bound the socket itself. If it did, no process outside this server needs the socket.
    pub(crate) fn is_own(&self) -> bool {
        match self.bind.address {
            Address::Tcp(_) | Address::Path(_) | Address::Abstract(_) => true,
            Address::Inherited(_) | Address::Systemd(_) => false,
        }
    }

    /// Whether the socket has an abstract name. Such a name is in use as long as any process holds the socket.
    pub(crate) fn is_abstract(&self) -> bool {
        self.is_own() && matches!(self.address, Address::Abstract(_))
    }

    /// Keeps new connections out of the queue; queued connections can still be accepted. Returns false if new
    /// connections cannot be kept out.
    pub(crate) fn hold_off(&self) -> bool {
        match self.family {
            SocketFamily::Tcp => sys::drop_syn_segments(self.as_fd()).is_ok(),
            SocketFamily::Unix => {
                self.shut();
                true
            }
        }
    }

    /// Refuses new connections from now on. Over TCP, queued connections are reset.
    pub(crate) fn refuse(&self) {
        self.shut();
    }

    fn shut(&self) {
        match socket::shutdown(self.socket.as_raw_fd(), Shutdown::Read) {
            // ENOTSOCK or EBADF: this process has already closed the socket. ENOTCONN: the socket has already been shut
            // down.
            Ok(()) | Err(Errno::ENOTSOCK | Errno::ENOTCONN | Errno::EBADF) => {}
            Err(errno) => log::warn!(bind:% = self.bind; "cannot shut down a listening socket: {}", errno.desc()),
        }
    }

    /// Closes the socket in this process, and in processes that share this process's descriptor table. The descriptor
    /// number stays open and refers to `stand_in` from now on.
    pub(crate) fn give_up(&self, stand_in: &OwnedFd) {
        if let Err(error) = sys::replace(self.socket.as_raw_fd(), stand_in) {
            log::warn!(bind:% = self.bind; "cannot close a listening socket in this process: {error}");
        }
    }
}

/// Whether a socket listens and has not been shut down.
pub(crate) fn is_listening(socket: BorrowedFd<'_>) -> bool {
    // A Unix socket that was shut down still reports that it accepts connections.
    let mut watched = [PollFd::new(socket, PollFlags::from_bits_retain(libc::POLLRDHUP))];
    let is_shut = poll(&mut watched, PollTimeout::ZERO).is_ok_and(|ready| ready > 0);
    !is_shut && socket::getsockopt(&socket, sockopt::AcceptConn).unwrap_or(false)
}

/// Listening sockets that are being closed: new connections are held off until the queues are empty, and are then
/// refused.
#[derive(Debug)]
pub(crate) struct Closing {
    open: Vec<Open>,
    /// How long a socket with an empty queue continues to listen.
    linger: Duration,
}

/// A socket that is not refusing connections yet.
#[derive(Debug)]
struct Open {
    index: usize,
    /// When the wait for the queue to empty ends.
    until: Instant,
    /// When to refuse connections; `None` during the wait for the queue to empty.
    refuses_at: Option<Instant>,
}

impl Closing {
    /// Begins to close those of the `listeners` that this server bound. The wait for their queues lasts at most
    /// `timeout`. After that, the sockets stay open for `linger`, so that processes that block in accept(2) can exit on
    /// a separate request before accept fails.
    pub(crate) fn begin(listeners: &[Listener], timeout: Duration, linger: Duration) -> Self {
        let now = Instant::now();
        let own = listeners.iter().enumerate().filter(|(_, listener)| listener.is_own());
        let open = own.map(|(index, listener)| {
            let is_held_off = match listener.address {
                // Without the file, clients can no longer find the socket.
                Address::Path(_) if !linger.is_zero() => {
                    listener.remove_file();
                    true
                }
                _ => listener.hold_off(),
            };
            let timeout = if is_held_off { timeout } else { timeout.min(UNFILTERED) };
            Open { index, until: now + timeout, refuses_at: None }
        });
        Self { open: open.collect(), linger }
    }

    /// Ends all waits.
    pub(crate) fn hurry(&mut self, now: Instant) {
        self.linger = Duration::ZERO;
        for Open { until, refuses_at, .. } in &mut self.open {
            *until = now;
            *refuses_at = refuses_at.map(|_| now); // what was left in the queue has been counted
        }
    }

    /// Advances the closing of each socket whose queue is empty according to `queued`, or whose time has run out. While
    /// `is_held`, sockets with an empty queue continue to listen, for at most [`MAX_HOLD`] more. Returns the number of
    /// lost connections.
    pub(crate) fn advance(
        &mut self,
        listeners: &[Listener],
        queued: impl Fn(&Listener) -> u32,
        is_held: bool,
        now: Instant,
    ) -> u32 {
        let (mut lost, linger) = (0, self.linger);
        let hold = if is_held && !linger.is_zero() { MAX_HOLD } else { Duration::ZERO };
        self.open.retain_mut(|Open { index, until, refuses_at }| {
            let Some(listener) = listeners.get(*index) else { return false };
            if refuses_at.is_none() {
                let left = queued(listener);
                if left > 0 && now < *until {
                    return true;
                }
                lost += left;
            }
            let is_due = *refuses_at.get_or_insert(now + linger) + hold <= now;
            if is_due {
                listener.refuse();
            }
            !is_due
        });
        lost
    }

    /// Whether the wait for every queue is over.
    pub(crate) fn is_dry(&self) -> bool {
        self.open.iter().all(|open| open.refuses_at.is_some())
    }

    /// Whether all sockets refuse connections.
    pub(crate) fn is_over(&self) -> bool {
        self.open.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use std::io::{ErrorKind, Read as _, Write as _};
    use std::net::TcpStream;
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::config::address::Bind;

    fn bind(text: &str) -> Listener {
        Listener::bind(&text.parse::<Bind>().unwrap(), 8, None, false).unwrap()
    }

    fn queued(listener: &Listener) -> u32 {
        sys::tcp_queue(listener.as_fd()).unwrap_or(0)
    }

    #[test]
    fn a_tcp_queue_is_served_before_its_socket_refuses_and_then_its_port_is_free() {
        for host in ["127.0.0.1", "[::1]"] {
            let listener = bind(&format!("http:{host}:0"));
            let Address::Tcp(address) = listener.address.clone() else { panic!("not TCP") };
            let elsewhere = listener.duplicate().unwrap();
            let mut waiting = TcpStream::connect(&address).unwrap();
            let listeners = [listener];
            let mut closing = Closing::begin(&listeners, Duration::from_secs(60), Duration::ZERO);
            assert_eq!(closing.advance(&listeners, queued, false, Instant::now()), 0);
            assert!(!closing.is_over(), "a connection is queued");
            let late = TcpStream::connect_timeout(&address.parse().unwrap(), Duration::from_millis(50));
            assert_eq!(late.unwrap_err().kind(), ErrorKind::TimedOut, "the queue only shrinks");
            let (socket, _) = sys::accept(listeners[0].as_fd()).unwrap();
            assert_eq!(closing.advance(&listeners, queued, false, Instant::now()), 0);
            assert!(closing.is_over());
            assert_eq!(TcpStream::connect(&address).unwrap_err().kind(), ErrorKind::ConnectionRefused);
            assert!(!listeners[0].is_listening());
            // A process that still holds the socket does not keep the port in use.
            bind(&format!("http:{address}"));
            drop(elsewhere);
            // An accepted connection works even if it has inherited the filter.
            let mut accepted = TcpStream::from(socket);
            accepted.set_nonblocking(false).unwrap();
            accepted.write_all(b"hello").unwrap();
            let mut received = [0; 5];
            waiting.read_exact(&mut received).unwrap();
            assert_eq!(&received, b"hello");
        }
    }

    #[test]
    fn connections_that_wait_too_long_are_reset_and_counted() {
        let listeners = [bind("http:127.0.0.1:0")];
        let Address::Tcp(address) = &listeners[0].address else { panic!("not TCP") };
        let _waiting = [(); 3].map(|()| TcpStream::connect(address).unwrap());
        let mut closing = Closing::begin(&listeners, Duration::from_secs(1), Duration::ZERO);
        assert_eq!(closing.advance(&listeners, queued, false, Instant::now() + Duration::from_secs(2)), 3);
        assert!(closing.is_over());
    }

    #[test]
    fn a_unix_socket_refuses_immediately_and_queued_connections_are_served() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.sock");
        let listeners = [bind(&format!("http:unix:{}", path.display()))];
        let _waiting = UnixStream::connect(&path).unwrap();
        assert!(listeners[0].is_listening());
        let closing = Closing::begin(&listeners, Duration::from_secs(60), Duration::ZERO);
        assert_eq!(UnixStream::connect(&path).unwrap_err().kind(), ErrorKind::ConnectionRefused);
        assert!(!listeners[0].is_listening() && !closing.is_over());
        assert!(sys::accept(listeners[0].as_fd()).is_ok());
        assert_eq!(sys::accept(listeners[0].as_fd()).unwrap_err().kind(), ErrorKind::WouldBlock);
    }

    #[test]
    fn a_passed_socket_is_not_closed() {
        let theirs = bind("http:127.0.0.1:0");
        let Address::Tcp(address) = &theirs.address else { panic!("not TCP") };
        let passed = bind(&format!("http:fd:{}", theirs.as_fd().as_raw_fd()));
        let listeners = [passed];
        assert!(Closing::begin(&listeners, Duration::ZERO, Duration::ZERO).is_over());
        assert!(TcpStream::connect(address).is_ok());
    }

    #[test]
    fn an_abstract_name_is_free_when_its_socket_is_closed() {
        let text = format!("http:unix:@forkyard-test-{}", std::process::id());
        let listener = bind(&text);
        let (stand_in, _other) = nix::unistd::pipe().unwrap();
        listener.give_up(&stand_in);
        listener.refuse(); // this process has closed the socket
        bind(&text);
    }
}
