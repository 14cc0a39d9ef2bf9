//! The publish socket: datagrams of programs in any language, which the relay reads.
//!
//! It is a file, so that the kernel says who may send. Without `--events-socket` it is in a directory made for it alone, which
//! goes with it; what a master left that was killed is removed by the next one that makes such a directory. Such a directory is made
//! in the first place that can have one; if none can, programs cannot publish, and the server starts without the socket.

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

/// In every program's environment: where the socket is.
pub(crate) const VARIABLE: &str = "FORKYARD_EVENTS";
const FLAG: &str = "--events-socket";
/// What the directories are called, and the socket in one.
const DIRECTORY: &str = "forkyard-events-";
const NAME: &str = "socket";

/// Removed when it is dropped, if it is still the one that this process made.
#[derive(Debug)]
pub(crate) struct PublishSocket {
    /// By `--events-socket`; without it, the directory is ours too.
    asked: Option<PathBuf>,
    path: PathBuf,
    socket: OwnedFd,
    file: Option<(u64, u64)>,
}

impl PublishSocket {
    /// `None`, with a warning, if nobody asked for it and there is no place for it.
    ///
    /// # Errors
    /// A sentence for the operator: `--events-socket` names a place where there can be none.
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

    /// In a directory of its own, in the first place that can have one.
    ///
    /// # Errors
    /// Why there is no such place.
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
                format!("it cannot be given to the user of --user: {error} (choose a path with {FLAG})")
            })?;
        }
        Ok(made)
    }

    /// Goes on with one that a predecessor made.
    pub(crate) fn adopt(
        asked: Option<PathBuf>,
        path: PathBuf,
        socket: OwnedFd,
        file: Option<(u64, u64)>,
    ) -> PublishSocket {
        Self { asked, path, socket, file }
    }

    /// Gives the file, which is that of `from`, to another owner.
    ///
    /// # Errors
    /// What the system says.
    pub(crate) fn give(&self, from: Uid, to: Owner) -> io::Result<()> {
        self.file.map_or(Ok(()), |file| listen::give_socket_file_of(&self.path, file, from, to))
    }

    /// The path that `--events-socket` named.
    pub(crate) fn asked(&self) -> Option<&Path> {
        self.asked.as_deref()
    }

    /// The directory that was made for the socket.
    pub(crate) fn own_directory(&self) -> Option<&Path> {
        if self.asked.is_none() { self.path.parent() } else { None }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Device and inode of the file that is ours.
    pub(crate) fn file(&self) -> Option<(u64, u64)> {
        self.file
    }

    pub(crate) fn raw(&self) -> RawFd {
        self.socket.as_raw_fd()
    }

    /// Where programs find it, which may have another root. `None` if that does not contain it.
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

/// If it was made for the socket, and is empty now.
fn remove_directory(asked: &Option<PathBuf>, path: &Path) {
    if let (None, Some(directory)) = (asked, path.parent()) {
        let _ = std::fs::remove_dir(directory); // somebody has put something there, or has removed it
    }
}

/// Where directories may be made, best first: what systemd made for this service, the directory of temporary files, and where they are as a
/// rule.
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

/// The first place where `try_it` succeeds, of those to which the workers' user gets.
///
/// # Errors
/// A sentence for the operator: why there is none.
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
            Some(directory) => Err(format!("the user of --user may not enter {}", directory.display())),
            None => try_it(place),
        };
        match found {
            Ok(found) => return Ok(found),
            Err(cause) => causes.push(format!("{}: {cause}", place.display())),
        }
    }
    Err(format!(
        "programs cannot publish events and get no {VARIABLE}, as there is no place for the socket: {} (name a path with \
         {FLAG}, set TMPDIR, or leave the event log out with --events 0)",
        causes.join("; ")
    ))
}

/// What a start would find out about the publish socket: an error if it was asked for and cannot be had, and what else an operator may
/// want to know. Nothing is made.
///
/// # Errors
/// A sentence for the operator.
pub(crate) fn examine(config: &Config) -> Result<Option<String>, String> {
    if config.events.bytes == 0 {
        return Ok(None);
    }
    let Some(path) = &config.publish.socket else {
        let name_of_folder = format!("{DIRECTORY}{:016x}", 0);
        let look = |place: &Path| {
            let socket =
                std::path::absolute(place).map_err(|error| error.to_string())?.join(&name_of_folder).join(NAME);
            listen::examine_length(&socket, FLAG)?;
            examine_directory(&place.join(NAME), FLAG)
        };
        return Ok(first_of(&places(), config, look).err());
    };
    match listen::examine_path(path, FLAG) {
        Ok(None) => Ok(note_on(path, config)),
        Ok(Some(note)) => Ok(Some(format!("publish socket {}: {note}", path.display()))),
        Err(cause) => Err(fail(path, &cause)),
    }
}

fn fail(path: &Path, cause: &str) -> String {
    format!("cannot have a publish socket at {}: {cause}", path.display())
}

/// What stands in the way of those who are to publish at a path that was asked for.
fn note_on(path: &Path, config: &Config) -> Option<String> {
    let directory = std::path::absolute(path).ok()?.parent()?.to_owned();
    let barred = Visitor::of(&config.privileges)?.barred_at(&directory)?;
    Some(format!(
        "the user of --user cannot publish at {}: it may not enter {} (choose another path with {FLAG}, or chmod o+x that directory)",
        path.display(),
        barred.display()
    ))
}

/// One that everybody may pass through, but only we may change.
fn private_directory(place: &Path) -> io::Result<PathBuf> {
    let place = std::path::absolute(place)?;
    sweep(&place);
    let mut random = [0; 8];
    getrandom::fill(&mut random).map_err(io::Error::other)?;
    let directory = place.join(format!("{DIRECTORY}{:016x}", u64::from_ne_bytes(random)));
    DirBuilder::new().mode(0o711).create(&directory)?;
    // Whatever the umask says.
    std::fs::set_permissions(&directory, std::fs::Permissions::from_mode(0o711))?;
    Ok(directory)
}

/// Removes what dead masters of this user left.
fn sweep(place: &Path) {
    let ours = nix::unistd::geteuid().as_raw();
    let entries = std::fs::read_dir(place).into_iter().flatten().filter_map(Result::ok);
    for entry in entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(DIRECTORY)) {
        let is_ours = entry.metadata().is_ok_and(|metadata| metadata.is_dir() && metadata.uid() == ours);
        let socket = entry.path().join(NAME);
        // One that is being made looks like what a dead program left.
        let turn = is_ours.then(|| LockFile::beside(&socket));
        if turn.is_some() && listen::is_stale(&socket) && std::fs::remove_file(&socket).is_ok() {
            drop(turn); // its file is in there
            let _ = std::fs::remove_dir(entry.path()); // something else is there
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_goes_with_its_socket_and_what_a_dead_master_left_with_the_next_one() {
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
    fn programs_with_another_root_find_it_below_that_or_not_at_all() {
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
