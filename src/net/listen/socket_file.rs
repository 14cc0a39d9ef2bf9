//! Manages the file of a Unix socket: creates it with its permissions, replaces only a file that a dead program left
//! behind, and removes it only if it still belongs to this server.

use std::fs::Metadata;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::socket::{self, AddressFamily, SockFlag, SockType, UnixAddr};
use nix::sys::stat::{Mode, fstat, umask};
use nix::unistd::Uid;

use super::{listen, new_socket};
use crate::config::privileges::Owner;
use crate::privileges;
use crate::sys::file_path::{self, Links, examine_directory};
use crate::sys::lock_file::LockFile;

/// A socket, with its file's device and inode.
pub(crate) type SocketAndFile = (OwnedFd, Option<(u64, u64)>);

/// Binds a datagram socket to a path. `flag` is the flag that contains the path.
///
/// # Errors
/// Returns a message for the operator if the socket cannot be bound.
pub(crate) fn bind_datagrams(path: &Path, mode: u32, flag: &str) -> Result<SocketAndFile, String> {
    bind_file(path, None, Some(mode), flag)
}

/// Binds a listening socket to a path or, without `backlog`, a datagram socket.
///
/// # Errors
/// Returns a message for the operator if the socket cannot be bound.
pub(in crate::net) fn bind_file(
    path: &Path,
    backlog: Option<u32>,
    mode: Option<u32>,
    flag: &str,
) -> Result<SocketAndFile, String> {
    let address = UnixAddr::new(path).map_err(|_| too_long(path, flag))?;
    file_path::examine(path, Links::Keep, flag)?;
    // The lock is needed because the new socket looks like one that a dead program left behind until it listens.
    let _turn = LockFile::for_path(path);
    clear_stale(path, flag)?;
    let kind = if backlog.is_some() { SockType::Stream } else { SockType::Datagram };
    let socket = new_socket(AddressFamily::Unix, kind)?;
    // The file is created with its final permissions, so there is no window between bind and chmod in which a client
    // could connect.
    let before = mode.map(|mode| umask(Mode::from_bits_truncate(0o777 & !mode)));
    let bound = socket::bind(socket.as_raw_fd(), &address);
    if let Some(before) = before {
        umask(before);
    }
    bound.map_err(|errno| explain_path(errno, flag))?;
    let file = file_identity(path);
    backlog.map_or(Ok(()), |backlog| listen(&socket, backlog))?;
    Ok((socket, file))
}

/// Removes the socket file if the program that created it has exited. Fails if a program is listening on the socket.
fn clear_stale(path: &Path, flag: &str) -> Result<(), String> {
    let Ok(metadata) = std::fs::symlink_metadata(path) else { return Ok(()) };
    expect_socket(&metadata, flag)?;
    match probe(path) {
        Err(Errno::ECONNREFUSED) => std::fs::remove_file(path)
            .map_err(|error| format!("cannot remove the stale socket file: {error} (remove it manually)")),
        Err(Errno::EACCES) => Err(format!(
            "permission denied for the existing socket (run as its owner, or choose another path with {flag})"
        )),
        // A full queue (EAGAIN) also means that a program is listening.
        Ok(_) | Err(_) => {
            Err(format!("another program is listening there (stop that program, or choose another path with {flag})"))
        }
    }
}

fn expect_socket(found: &Metadata, flag: &str) -> Result<(), String> {
    if found.file_type().is_socket() {
        return Ok(());
    }
    let what = file_path::special(found).map(|what| format!(" but {what}")).unwrap_or_default();
    Err(format!("the existing file is not a socket{what} (move it, or choose another path with {flag})"))
}

/// Whether this is the socket file of a program that has exited.
pub(crate) fn is_stale(path: &Path) -> bool {
    probe(path) == Err(Errno::ECONNREFUSED)
}

/// Connects to the socket. If the queue is full, returns EAGAIN instead of waiting for space.
pub(super) fn probe(path: &Path) -> Result<(), Errno> {
    let kind = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket::socket(AddressFamily::Unix, SockType::Stream, kind, None)?;
    socket::connect(socket.as_raw_fd(), &UnixAddr::new(path)?)
}

fn too_long(path: &Path, flag: &str) -> String {
    let length = path.as_os_str().len();
    format!("the path has {length} bytes, and the maximum for a Unix socket is 107 (choose a shorter path with {flag})")
}

/// Checks the length of a Unix socket's path. `flag` is the flag that contains the path.
///
/// # Errors
/// Returns a message for the operator if the path is too long.
pub(crate) fn examine_length(path: &Path, flag: &str) -> Result<(), String> {
    UnixAddr::new(path).map(drop).map_err(|_| too_long(path, flag))
}

fn explain_path(errno: Errno, flag: &str) -> String {
    let cause = errno.desc().to_lowercase();
    match errno {
        Errno::EACCES | Errno::EPERM | Errno::EROFS => {
            format!("{cause} (run as root, or choose a path that you can write, with {flag})")
        }
        _ => format!("{cause} (choose another path with {flag})"),
    }
}

/// Changes the owner of a socket file if it is still the file `ours`.
///
/// # Errors
/// Fails if the file has been replaced, or a system call fails.
pub(crate) fn give_socket_file(path: &Path, ours: (u64, u64), owner: Owner) -> io::Result<()> {
    give_socket_file_of(path, ours, nix::unistd::geteuid(), owner)
}

/// Like [`give_socket_file`], for a file whose owner was changed to `from` before.
///
/// # Errors
/// Fails if the file has been replaced, or a system call fails.
pub(crate) fn give_socket_file_of(path: &Path, ours: (u64, u64), from: Uid, owner: Owner) -> io::Result<()> {
    let file = open(path, OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC, Mode::empty())?;
    let found = fstat(&file)?;
    let same = (found.st_dev, found.st_ino) == ours;
    if same { privileges::give_of(file.as_fd(), from, owner) } else { Err(io::Error::other("the file was replaced")) }
}

/// Removes the socket file at `path` if it is still the file `file`.
pub(crate) fn remove_own(path: &Path, file: Option<(u64, u64)>) {
    if file.is_some()
        && file_identity(path) == file
        && let Err(error) = std::fs::remove_file(path)
    {
        log::warn!(file:% = path.display(); "cannot remove the socket file: {error}");
    }
}

fn file_identity(path: &Path) -> Option<(u64, u64)> {
    let metadata = std::fs::symlink_metadata(path).ok()?;
    Some((metadata.dev(), metadata.ino()))
}

/// Checks a path as far as possible without creating a socket there. Returns a note if a program is already listening
/// there. `flag` is the flag that contains the path.
///
/// # Errors
/// Returns a message for the operator if no socket can be created there.
pub(crate) fn examine_path(path: &Path, flag: &str) -> Result<Option<String>, String> {
    UnixAddr::new(path).map_err(|_| too_long(path, flag))?;
    let Some(found) = file_path::examine(path, Links::Keep, flag)? else { return Ok(None) };
    expect_socket(&found, flag)?;
    match probe(path) {
        Err(Errno::ECONNREFUSED) => examine_directory(path, flag).map(|()| None),
        Ok(()) | Err(_) => Ok(Some("a program is listening there now (this service, if it runs)".to_owned())),
    }
}
