//! The publish socket: datagrams of programs in any language, which the relay reads.
//!
//! It is a file, so that the kernel says who may send. Without `--events-socket` it is in a folder made for it alone, which
//! goes with it; what a master left that was killed is removed by the next one that makes such a folder.

use std::fs::DirBuilder;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use crate::config::Config;
use crate::folder_lock::FolderLock;
use crate::listen::{self, SocketAndFile};

/// In every program's environment: where the socket is.
pub(crate) const VARIABLE: &str = "FORKYARD_EVENTS";
const FLAG: &str = "--events-socket";
/// What the folders are called, and the socket in one.
const FOLDER: &str = "forkyard-events-";
const NAME: &str = "socket";

/// Removed when it is dropped, if it is still the one that this process made.
#[derive(Debug)]
pub(crate) struct PublishSocket {
    /// By `--events-socket`; without it, the folder is ours too.
    asked: Option<PathBuf>,
    path: PathBuf,
    socket: OwnedFd,
    file: Option<(u64, u64)>,
}

impl PublishSocket {
    /// # Errors
    /// A sentence for the operator.
    pub(crate) fn bind(config: &Config) -> Result<Self, String> {
        let asked = config.publish.socket.clone();
        let fail = |path: &Path, cause: String| format!("cannot have a publish socket at {}: {cause}", path.display());
        let path = match &asked {
            Some(asked) => std::path::absolute(asked).map_err(|error| fail(asked, error.to_string()))?,
            None => {
                let place = place();
                private_folder(&place)
                    .map_err(|error| fail(&place, format!("{error} (choose a path with {FLAG})")))?
                    .join(NAME)
            }
        };
        let bound = listen::bind_datagrams(&path, 0o660, FLAG);
        let (socket, file): SocketAndFile = bound.map_err(|cause| {
            remove_folder(&asked, &path);
            fail(&path, cause)
        })?;
        let made = Self { asked, path, socket, file };
        if let (Some(owner), Some(file)) = (config.privileges.owner_of_files(), made.file) {
            listen::give_socket_file(&made.path, file, owner).map_err(|error| {
                fail(
                    &made.path,
                    format!("it cannot be given to the user of --user: {error} (choose a path with {FLAG})"),
                )
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

    /// The path that `--events-socket` named.
    pub(crate) fn asked(&self) -> Option<&Path> {
        self.asked.as_deref()
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
        remove_folder(&self.asked, &self.path);
    }
}

/// If it was made for the socket, and is empty now.
fn remove_folder(asked: &Option<PathBuf>, path: &Path) {
    if let (None, Some(folder)) = (asked, path.parent()) {
        let _ = std::fs::remove_dir(folder); // somebody has put something there, or has removed it
    }
}

/// Where folders are made: what systemd made for this service, or the folder of temporary files.
fn place() -> PathBuf {
    let given = std::env::var_os("RUNTIME_DIRECTORY");
    let first = given.and_then(|given| std::env::split_paths(&given).find(|path| path.is_dir()));
    first.unwrap_or_else(std::env::temp_dir)
}

/// One that everybody may pass through, but only we may change.
fn private_folder(place: &Path) -> io::Result<PathBuf> {
    let place = std::path::absolute(place)?;
    sweep(&place);
    let mut random = [0; 8];
    getrandom::fill(&mut random).map_err(io::Error::other)?;
    let folder = place.join(format!("{FOLDER}{:016x}", u64::from_ne_bytes(random)));
    DirBuilder::new().mode(0o711).create(&folder)?;
    // Whatever the umask says.
    std::fs::set_permissions(&folder, std::fs::Permissions::from_mode(0o711))?;
    Ok(folder)
}

/// Removes what dead masters of this user left.
fn sweep(place: &Path) {
    let ours = nix::unistd::geteuid().as_raw();
    let entries = std::fs::read_dir(place).into_iter().flatten().filter_map(Result::ok);
    for entry in entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(FOLDER)) {
        let is_ours = entry.metadata().is_ok_and(|metadata| metadata.is_dir() && metadata.uid() == ours);
        let socket = entry.path().join(NAME);
        // One that is being made looks like what a dead program left.
        let turn = is_ours.then(|| FolderLock::of(&socket));
        if matches!(turn, Some(Ok(_))) && listen::is_stale(&socket) && std::fs::remove_file(&socket).is_ok() {
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
            let path = private_folder(place.path()).unwrap().join(NAME);
            let (socket, file) = listen::bind_datagrams(&path, 0o660, FLAG).unwrap();
            PublishSocket::adopt(None, path, socket, file)
        };
        let entries = || std::fs::read_dir(place.path()).unwrap().count();
        let living = bind();
        drop(bind());
        assert_eq!(entries(), 1);
        let path = private_folder(place.path()).unwrap().join(NAME);
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
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run/events");
        std::fs::create_dir(folder.path().join("run")).unwrap();
        let (socket, file) = listen::bind_datagrams(&path, 0o600, FLAG).unwrap();
        let socket = PublishSocket::adopt(Some(path.clone()), path.clone(), socket, file);
        assert_eq!(socket.seen_from(None), Some(path));
        assert_eq!(socket.seen_from(Some(folder.path())), Some(PathBuf::from("/run/events")));
        assert_eq!(socket.seen_from(Some(Path::new("/srv"))), None);
        assert!(
            listen::bind_datagrams(socket.path(), 0o600, FLAG).unwrap_err().contains("another program is listening")
        );
    }
}
