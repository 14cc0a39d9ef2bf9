//! Creates the publish socket, to which programs in any language send events as datagrams. The relay receives the
//! datagrams.
//!
//! The socket has a file, so that file permissions decide which users may send. Without `--events-socket`, the file is
//! in its own directory, which is removed together with the file. If a master was killed, the next master that creates
//! such a directory removes the one left behind. The directory is created in the first suitable place; if there is
//! none, programs cannot publish, and the server starts without the socket.

use std::fs::DirBuilder;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use nix::unistd::Uid;

use super::listen::{self, SocketAndFile};
use crate::config::Config;
use crate::config::privileges::Owner;
use crate::privileges::Visitor;
use crate::sys::file_path::examine_directory;
use crate::sys::lock_file::LockFile;

/// Environment variable that contains the path of the socket. It is set for every program.
pub(crate) const VARIABLE: &str = "FORKYARD_EVENTS";
const FLAG: &str = "--events-socket";
/// Prefix of the names of such directories.
const DIRECTORY: &str = "forkyard-events-";
/// Name of the socket in such a directory.
const NAME: &str = "socket";

/// A bound publish socket. Removes its file when dropped, unless the file has been replaced.
#[derive(Debug)]
pub(crate) struct PublishSocket {
    /// The path of `--events-socket`. If `None`, this socket owns the directory as well.
    asked: Option<PathBuf>,
    path: PathBuf,
    socket: OwnedFd,
    file: Option<(u64, u64)>,
}

impl PublishSocket {
    /// Creates the socket. Logs a warning and returns `None` if no path was configured and there is no place for the socket.
    ///
    /// # Errors
    /// Returns a message for the operator if `--events-socket` names an unsuitable path.
    pub(crate) fn bind(config: &Config) -> Result<Option<Self>, String> {
        let Some(asked) = &config.publish.socket else {
            return Ok(Self::bind_somewhere(config).inspect_err(|why| log::warn!("{why}")).ok());
        };
        let fail = |cause: String| fail(asked, &cause);
        let path = std::path::absolute(asked).map_err(|error| fail(error.to_string()))?;
        let made = Self::make(Some(asked.clone()), path, config).map_err(fail)?;
        if let Some(note) = note_on(asked, config) {
            log::warn!("{note}");
        }
        Ok(Some(made))
    }

    /// Creates a directory for the socket in the first suitable place, and binds the socket there.
    ///
    /// # Errors
    /// Returns a message for the operator if there is no such place.
    fn bind_somewhere(config: &Config) -> Result<Self, String> {
        first_of(&places(), config, |place| {
            let path = private_directory(place).map_err(|error| error.to_string())?.join(NAME);
            Self::make(None, path.clone(), config).inspect_err(|_| remove_directory(&None, &path))
        })
    }

    fn make(asked: Option<PathBuf>, path: PathBuf, config: &Config) -> Result<Self, String> {
        let (socket, file): SocketAndFile = listen::bind_datagrams(&path, 0o660, FLAG)?;
        let made = Self { asked, path, socket, file };
        if let (Some(owner), Some(file)) = (config.privileges.owner_of_files(), made.file) {
            listen::give_socket_file(&made.path, file, owner).map_err(|error| {
                format!("cannot change its owner to the user of --user: {error} (choose a path with {FLAG})")
            })?;
        }
        Ok(made)
    }

    /// Adopts a socket that a former master created.
    pub(crate) fn adopt(
        asked: Option<PathBuf>,
        path: PathBuf,
        socket: OwnedFd,
        file: Option<(u64, u64)>,
    ) -> PublishSocket {
        Self { asked, path, socket, file }
    }

    /// Changes the owner of the file from `from` to `to`.
    ///
    /// # Errors
    /// Fails if the file has been replaced, or a system call fails.
    pub(crate) fn give(&self, from: Uid, to: Owner) -> io::Result<()> {
        self.file.map_or(Ok(()), |file| listen::give_socket_file_of(&self.path, file, from, to))
    }

    /// Returns the path in `--events-socket`.
    pub(crate) fn asked(&self) -> Option<&Path> {
        self.asked.as_deref()
    }

    /// Returns the directory that was created for the socket.
    pub(crate) fn own_directory(&self) -> Option<&Path> {
        if self.asked.is_none() { self.path.parent() } else { None }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the device and inode of the socket file that this server created.
    pub(crate) fn file(&self) -> Option<(u64, u64)> {
        self.file
    }

    pub(crate) fn raw(&self) -> RawFd {
        self.socket.as_raw_fd()
    }

    /// Returns the path for programs with the root directory `chroot`. Returns `None` if the socket is outside of that
    /// directory.
    pub(crate) fn seen_from(&self, chroot: Option<&Path>) -> Option<PathBuf> {
        let Some(root) = chroot else { return Some(self.path.clone()) };
        let root = std::path::absolute(root).ok()?;
        Some(Path::new("/").join(self.path.strip_prefix(root).ok()?))
    }
}

impl AsFd for PublishSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for PublishSocket {
    fn drop(&mut self) {
        listen::remove_own(&self.path, self.file);
        remove_directory(&self.asked, &self.path);
    }
}

/// Removes the directory if it was created for the socket and is empty.
fn remove_directory(asked: &Option<PathBuf>, path: &Path) {
    if let (None, Some(directory)) = (asked, path.parent()) {
        let _ = std::fs::remove_dir(directory); // the directory may contain other files, or be gone
    }
}

/// Candidates for the directory, best first: the directory that systemd created for this service, the directory for temporary
/// files, and the usual places.
fn places() -> Vec<PathBuf> {
    let given = std::env::var_os("RUNTIME_DIRECTORY");
    let given = given.and_then(|given| std::env::split_paths(&given).find(|path| path.is_dir()));
    let of_user = std::env::var_os("XDG_RUNTIME_DIR").filter(|directory| !directory.is_empty()).map(PathBuf::from);
    let further = ["/run", "/tmp"].map(PathBuf::from);
    let all = given.into_iter().chain([std::env::temp_dir()]).chain(of_user).chain(further);
    let mut places: Vec<PathBuf> = Vec::new();
    for place in all {
        if !places.contains(&place) {
            places.push(place);
        }
    }
    places
}

/// Calls `try_it` for each place that the workers' user can enter, until it succeeds.
///
/// # Errors
/// Returns a message for the operator if no place is suitable.
fn first_of<T>(
    places: &[PathBuf],
    config: &Config,
    mut try_it: impl FnMut(&Path) -> Result<T, String>,
) -> Result<T, String> {
    let visitor = Visitor::of(&config.privileges);
    let mut causes = Vec::new();
    for place in places {
        let barred = visitor.as_ref().and_then(|visitor| visitor.barred_at(place));
        let found = match barred {
            Some(directory) => Err(format!("the user of --user cannot enter {}", directory.display())),
            None => try_it(place),
        };
        match found {
            Ok(found) => return Ok(found),
            Err(cause) => causes.push(format!("{}: {cause}", place.display())),
        }
    }
    Err(format!(
        "programs cannot publish events and get no {VARIABLE}: there is no place for the socket: {} (name a path with {FLAG}, \
         set TMPDIR, or disable the event log with --events 0)",
        causes.join("; ")
    ))
}

/// Checks whether the publish socket can be created, without creating anything. May return a note for the operator.
///
/// # Errors
/// Returns a message for the operator if the configured path is unsuitable.
pub(crate) fn examine(config: &Config) -> Result<Option<String>, String> {
    if config.events.bytes == 0 {
        return Ok(None);
    }
    let Some(path) = &config.publish.socket else {
        let directory_name = format!("{DIRECTORY}{:016x}", 0);
        let is_suitable = |place: &Path| {
            let socket =
                std::path::absolute(place).map_err(|error| error.to_string())?.join(&directory_name).join(NAME);
            listen::examine_length(&socket, FLAG)?;
            examine_directory(&place.join(NAME), FLAG)
        };
        return Ok(first_of(&places(), config, is_suitable).err());
    };
    match listen::examine_path(path, FLAG) {
        Ok(None) => Ok(note_on(path, config)),
        Ok(Some(note)) => Ok(Some(format!("publish socket {}: {note}", path.display()))),
        Err(cause) => Err(fail(path, &cause)),
    }
}

fn fail(path: &Path, cause: &str) -> String {
    format!("cannot create the publish socket {}: {cause}", path.display())
}

/// Returns a note if the workers' user cannot publish at a configured path.
fn note_on(path: &Path, config: &Config) -> Option<String> {
    let directory = std::path::absolute(path).ok()?.parent()?.to_owned();
    let barred = Visitor::of(&config.privileges)?.barred_at(&directory)?;
    Some(format!(
        "the user of --user cannot publish at {}: it cannot enter {} (choose another path with {FLAG}, or chmod o+x that directory)",
        path.display(),
        barred.display()
    ))
}

/// Creates a directory that every user can enter and only this user can change.
fn private_directory(place: &Path) -> io::Result<PathBuf> {
    let place = std::path::absolute(place)?;
    sweep(&place);
    let mut random = [0; 8];
    getrandom::fill(&mut random).map_err(io::Error::other)?;
    let directory = place.join(format!("{DIRECTORY}{:016x}", u64::from_ne_bytes(random)));
    DirBuilder::new().mode(0o711).create(&directory)?;
    // The permissions are set again, because the umask may have removed some.
    std::fs::set_permissions(&directory, std::fs::Permissions::from_mode(0o711))?;
    Ok(directory)
}

/// Removes the directories that killed masters of this user have left behind.
fn sweep(place: &Path) {
    let ours = nix::unistd::geteuid().as_raw();
    let entries = std::fs::read_dir(place).into_iter().flatten().filter_map(Result::ok);
    for entry in entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(DIRECTORY)) {
        let is_ours = entry.metadata().is_ok_and(|metadata| metadata.is_dir() && metadata.uid() == ours);
        let socket = entry.path().join(NAME);
        // The lock is needed because a socket that is being created looks like one that a dead program left behind.
        let turn = is_ours.then(|| LockFile::for_path(&socket));
        if turn.is_some() && listen::is_stale(&socket) && std::fs::remove_file(&socket).is_ok() {
            drop(turn); // the lock file is in the directory
            let _ = std::fs::remove_dir(entry.path()); // fails if the directory has other files
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_is_removed_with_its_socket_and_a_dead_masters_directory_by_the_next_master() {
        let place = tempfile::tempdir().unwrap();
        let bind = || {
            let path = private_directory(place.path()).unwrap().join(NAME);
            let (socket, file) = listen::bind_datagrams(&path, 0o660, FLAG).unwrap();
            PublishSocket::adopt(None, path, socket, file)
        };
        let entries = || std::fs::read_dir(place.path()).unwrap().count();
        let living = bind();
        drop(bind());
        assert_eq!(entries(), 1);
        let path = private_directory(place.path()).unwrap().join(NAME);
        drop(listen::bind_datagrams(&path, 0o660, FLAG).unwrap());
        assert!(path.exists() && entries() == 2);
        let third = bind();
        assert!(!path.exists() && living.path().exists());
        assert_eq!(entries(), 2);
        drop((living, third));
        assert_eq!(entries(), 0);
    }

    #[test]
    fn the_path_is_relative_to_the_programs_root_or_none() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("run/events");
        std::fs::create_dir(directory.path().join("run")).unwrap();
        let (socket, file) = listen::bind_datagrams(&path, 0o600, FLAG).unwrap();
        let socket = PublishSocket::adopt(Some(path.clone()), path.clone(), socket, file);
        assert_eq!(socket.seen_from(None), Some(path));
        assert_eq!(socket.seen_from(Some(directory.path())), Some(PathBuf::from("/run/events")));
        assert_eq!(socket.seen_from(Some(Path::new("/srv"))), None);
        assert!(
            listen::bind_datagrams(socket.path(), 0o600, FLAG).unwrap_err().contains("another program is listening")
        );
    }
}
