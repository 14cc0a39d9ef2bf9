//! Creates the control socket, to which operators connect.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use super::listen::{bind_file, remove_own, set_blocking};

/// A bound, listening control socket. Only its owner may open its file.
#[derive(Debug)]
pub(crate) struct ControlListener {
    path: PathBuf,
    socket: OwnedFd,
    file: Option<(u64, u64)>,
}

impl AsFd for ControlListener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl ControlListener {
    /// Adopts a socket that a former master created at `path`, with its `file`.
    pub(crate) fn adopt(path: PathBuf, socket: OwnedFd, file: Option<(u64, u64)>) -> Self {
        Self { path, socket, file }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the device and inode of the socket file that this server created.
    pub(crate) fn file(&self) -> Option<(u64, u64)> {
        self.file
    }

    /// Returns the message for the operator if the control socket cannot be created.
    pub(crate) fn fail(path: &Path, cause: &str) -> String {
        format!("cannot create the control socket {}: {cause}", path.display())
    }

    /// Creates the socket and its file, and listens.
    ///
    /// # Errors
    /// Returns a message for the operator if the socket cannot be created.
    pub(crate) fn bind(path: &Path) -> Result<Self, String> {
        let fail = |cause: String| Self::fail(path, &cause);
        let (socket, file) = bind_file(path, Some(64), Some(0o600), "--control").map_err(fail)?;
        set_blocking(&socket, false).map_err(|error| fail(error.to_string()))?;
        Ok(Self { path: path.to_owned(), socket, file })
    }
}

impl Drop for ControlListener {
    /// Removes the socket file, unless a different file has replaced it.
    fn drop(&mut self) {
        remove_own(&self.path, self.file);
    }
}
