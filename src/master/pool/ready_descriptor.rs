//! Reads the declaration of a program that it is ready (`--ready-by descriptor`).
//!
//! The program inherits the write end of a pipe, whose number is in [`VARIABLE`], and writes to it when it can serve. Only
//! the program and its descendants have the pipe, so no other process can declare them ready. A program that closes the
//! pipe without writing to it can no longer become ready.
//!
//! The read end stays open until the program has ended. A program that writes a second time would otherwise receive
//! SIGPIPE.

use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::unistd::{pipe2, read};

use super::spawn::blocking;

/// The variable that contains the number of the descriptor.
pub(super) const VARIABLE: &str = "FORKYARD_READY";

/// Why a program that has closed the descriptor is not ready.
pub(super) const CLOSED: &str = "it has closed the descriptor in FORKYARD_READY, or its copies, without writing to it \
                                 (--ready-by descriptor)";

/// The master's end of the pipe.
#[derive(Debug)]
pub(crate) struct Declaration {
    pipe: OwnedFd,
    state: DeclarationState,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DeclarationState {
    Awaited,
    Made,
    /// No process can make the declaration any more.
    Closed,
}

impl Declaration {
    /// Returns the declaration of a new program, and the program's end of the pipe.
    ///
    /// # Errors
    /// Fails if no descriptor is available.
    pub(super) fn expect() -> io::Result<(Self, OwnedFd)> {
        let (read, write) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
        Ok((Self { pipe: read, state: DeclarationState::Awaited }, blocking(write)?))
    }

    /// Restores the declaration of a program that another master has started.
    pub(in crate::master) fn restore(pipe: OwnedFd, is_made: bool) -> Self {
        let state = if is_made { DeclarationState::Made } else { DeclarationState::Awaited };
        Self { pipe, state }
    }

    /// Returns the descriptor for the next master.
    pub(in crate::master) fn save(&self) -> RawFd {
        self.pipe.as_raw_fd()
    }

    /// Reads what the program has written.
    pub(super) fn look(&mut self) -> DeclarationState {
        if self.state == DeclarationState::Awaited {
            self.state = match read(&self.pipe, &mut [0; 16]) {
                Ok(0) => DeclarationState::Closed,
                Ok(_) => DeclarationState::Made,
                Err(Errno::EAGAIN | Errno::EINTR) => DeclarationState::Awaited,
                Err(_) => DeclarationState::Closed,
            };
        }
        self.state
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_is_ready_when_it_has_written_and_never_if_it_has_closed_the_descriptor() {
        let (mut declaration, write) = Declaration::expect().unwrap();
        assert_eq!(declaration.look(), DeclarationState::Awaited);
        nix::unistd::write(&write, b"\n").unwrap();
        drop(write);
        assert_eq!(declaration.look(), DeclarationState::Made);
        assert_eq!(declaration.look(), DeclarationState::Made, "the end of the pipe changes nothing");

        let (mut declaration, write) = Declaration::expect().unwrap();
        let copy = write.try_clone().unwrap();
        drop(write);
        assert_eq!(declaration.look(), DeclarationState::Awaited, "another process has the descriptor");
        drop(copy);
        assert_eq!(declaration.look(), DeclarationState::Closed);
    }
}
