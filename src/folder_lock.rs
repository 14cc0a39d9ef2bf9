//! A lock on a folder, for the moment in which a file there is looked at and replaced: two masters that start at once with one
//! socket path, or one pid file, would otherwise each take the other's for what a dead one left.
//!
//! It is flock(2) on the folder itself: no file is left behind, and it ends with the process. May not be held for longer
//! than that moment.

use std::fs::{File, TryLockError};
use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

/// How long others may hold it.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long to sleep between two looks.
const NAP: Duration = Duration::from_millis(5);

/// Ends when it is dropped.
#[derive(Debug)]
pub(crate) struct FolderLock {
    _folder: Option<File>,
}

/// The folder in which `path` is.
pub(crate) fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

impl FolderLock {
    /// Waits until nobody else has the folder of `path`. A folder that may not be read cannot be locked, and is not: who can
    /// make files there while nobody may list them has to see to it himself that one master starts at a time.
    ///
    /// # Errors
    /// A sentence for the operator: somebody holds it for long.
    pub(crate) fn of(path: &Path) -> Result<Self, String> {
        let shown = folder_of(path).display();
        let folder = match File::open(folder_of(path)) {
            Ok(folder) => folder,
            Err(error) => {
                // If it is not there, whatever needs it says so.
                log::debug!("cannot lock the folder {shown}: {error}");
                return Ok(Self { _folder: None });
            }
        };
        let begun = Instant::now();
        loop {
            match folder.try_lock() {
                Ok(()) => return Ok(Self { _folder: Some(folder) }),
                Err(TryLockError::WouldBlock) if begun.elapsed() < PATIENCE => std::thread::sleep(NAP),
                Err(TryLockError::WouldBlock) => {
                    return Err(format!(
                        "another program has held the lock of the folder {shown} for {}s (find it with: lslocks)",
                        PATIENCE.as_secs()
                    ));
                }
                Err(TryLockError::Error(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(TryLockError::Error(error)) => {
                    log::debug!("cannot lock the folder {shown}: {error}"); // a file system without locks
                    return Ok(Self { _folder: None });
                }
            }
        }
    }
}
