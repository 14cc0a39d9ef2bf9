//! Counts the connections in the kernel's queue of a listening socket that have not been accepted yet.
//!
//! A TCP socket reports its own count. The count of a Unix socket is available only from the kernel's socket diagnosis
//! (`unix_diagnosis.rs`); php-fpm and uWSGI show 0 for Unix sockets. If this diagnosis is not available, it can only be
//! determined whether any connection is waiting.

use std::os::fd::AsFd as _;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::listen::{Listener, SocketFamily};
use super::unix_diagnosis::UnixDiagnosis;
use crate::sys;

/// Queries the kernel for the lengths of the queues.
#[derive(Debug)]
pub(crate) struct QueueDepth {
    /// `None` if the kernel has no socket diagnosis.
    diagnosis: Option<UnixDiagnosis>,
}

impl QueueDepth {
    pub(crate) fn new() -> Self {
        Self { diagnosis: UnixDiagnosis::new().ok() }
    }

    /// Returns the number of connections in this listener's queue. If the kernel does not count them, returns 1 if
    /// there are any.
    pub(crate) fn of(&self, listener: &Listener) -> u32 {
        self.counted(listener).unwrap_or_else(|| u32::from(is_readable(listener)))
    }

    /// Like [`QueueDepth::of`], but returns `None` if the kernel does not count the connections. The result is correct
    /// even if a Unix socket was shut down, although poll(2) reports such a socket as readable forever.
    pub(crate) fn counted(&self, listener: &Listener) -> Option<u32> {
        match listener.family {
            SocketFamily::Tcp => sys::tcp_queue(listener.as_fd()).ok(),
            SocketFamily::Unix => self.diagnosis.as_ref().and_then(|diagnosis| diagnosis.queue(listener.as_fd()).ok()),
        }
    }
}

fn is_readable(listener: &Listener) -> bool {
    let mut watched = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
    poll(&mut watched, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
}

#[cfg(test)]
mod tests {
    use std::net::TcpStream;
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::config::address::{Address, Bind};

    fn listener(bind: &str) -> Listener {
        Listener::bind(&bind.parse::<Bind>().unwrap(), 8, None, false).unwrap()
    }

    #[test]
    fn connections_that_are_not_accepted_yet_are_counted() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.sock");
        let (unix, tcp) = (listener(&format!("http:unix:{}", path.display())), listener("http:127.0.0.1:0"));
        let Address::Tcp(address) = &tcp.address else { panic!("not TCP") };
        let depth = QueueDepth::new();
        assert_eq!((depth.of(&unix), depth.of(&tcp)), (0, 0));
        let waiting: Vec<UnixStream> = (0..3).map(|_| UnixStream::connect(&path).unwrap()).collect();
        let other: Vec<TcpStream> = (0..5).map(|_| TcpStream::connect(address).unwrap()).collect();
        assert_eq!((depth.of(&unix), depth.of(&tcp)), (3, 5));
        drop(sys::accept(unix.as_fd()).unwrap());
        drop(sys::accept(tcp.as_fd()).unwrap());
        assert_eq!((depth.of(&unix), depth.of(&tcp)), (2, 4));
        // Without the kernel's diagnosis the count is 0 or 1.
        let blind = QueueDepth { diagnosis: None };
        assert_eq!(blind.of(&unix), 1);
        drop((waiting, other));
        unix.remove_file();
    }
}
