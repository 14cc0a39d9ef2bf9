//! Provides a lock that is held while a file is examined and replaced. Without it, two masters that start at the same
//! time with the same socket path or pid file would each mistake the other's file for the file of a dead master.
//!
//! The lock is flock(2) on a separate file next to the path, `.NAME.lock`, which only its owner can open. Any user
//! could hold a lock on the directory itself, because flock(2) requires only a readable descriptor. The holder of the
//! lock removes the file, so a process that acquires the lock must check that the name still leads to the file that it
//! has locked.
//!
//! ```text
//! open or create ─▶ is it private? ─▶ flock ─▶ does the name still lead here? ─▶ use ─▶ unlink ─▶ close
//!        ▲                                               │ no: its holder removed it
//!        └───────────────────────────────────────────────┘
//! ```
//!
//! If the lock is not available, the reason is logged and startup continues, because the race that the lock prevents is
//! rare. The lock must not be held for longer than the replacement takes.

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::fcntl::OFlag;

use super::file_path::directory_of;

/// How long to wait while another process holds the lock.
const LOCK_TIMEOUT: Duration = Duration::from_secs(10);
/// How long to sleep between two attempts.
const LOCK_INTERVAL: Duration = Duration::from_millis(5);

/// A lock. Dropping it releases the lock and removes its file.
#[derive(Debug)]
pub(crate) struct LockFile {
    held: Option<(PathBuf, File)>,
}

impl LockFile {
    /// Waits until no other master is replacing `path`. Continues without a lock if locking is impossible, or if
    /// another process holds the lock for too long.
    pub(crate) fn for_path(path: &Path) -> Self {
        Self::with_timeout(path, LOCK_TIMEOUT)
    }

    fn with_timeout(path: &Path, timeout: Duration) -> Self {
        let Some(name) = path.file_name() else { return Self { held: None } };
        let lock = directory_of(path).join(format!(".{}.lock", name.to_string_lossy()));
        let begun = Instant::now();
        loop {
            let file = match open(&lock) {
                Ok(file) => file,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    // If the directory is unusable, the code that needs the directory reports the error.
                    if let Ok(found) = lock.symlink_metadata() {
                        log::warn!(
                            file:% = lock.display(), uid = found.uid(), path:% = path.display();
                            "starting without a lock, because the lock file cannot be used: {error} (remove it)"
                        );
                    } else {
                        log::debug!(file:% = lock.display(); "cannot create the lock file: {error}");
                    }
                    return Self { held: None };
                }
            };
            match file.try_lock() {
                Ok(()) if leads_to(&lock, &file) => return Self { held: Some((lock, file)) },
                Ok(()) => {} // the holder has removed the file
                Err(TryLockError::WouldBlock) if begun.elapsed() < timeout => std::thread::sleep(LOCK_INTERVAL),
                Err(TryLockError::WouldBlock) => {
                    log::warn!(
                        file:% = lock.display(), waited:? = timeout;
                        "starting without a lock, because another process of this user holds it (find the process with lslocks)"
                    );
                    return Self { held: None };
                }
                Err(TryLockError::Error(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(TryLockError::Error(error)) => {
                    log::debug!(file:% = lock.display(); "cannot lock the lock file: {error}"); // a file system without locks
                    let _ = std::fs::remove_file(&lock); // an empty file that serves no purpose
                    return Self { held: None };
                }
            }
        }
    }
}

impl Drop for LockFile {
    fn drop(&mut self) {
        if let Some((lock, file)) = self.held.take()
            && leads_to(&lock, &file)
        {
            // No other process removes the file while this one holds the lock, so the name still leads to the locked
            // file.
            let _ = std::fs::remove_file(&lock); // if the file stays, the next server uses it
        }
    }
}

/// Opens the file. Fails if another user owns the file or can open it, because that user could hold a lock on it.
fn open(lock: &Path) -> io::Result<File> {
    let flags = (OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK).bits();
    let file = OpenOptions::new().read(true).write(true).create(true).mode(0o600).custom_flags(flags).open(lock)?;
    let found = file.metadata()?;
    let ours = found.uid() == nix::unistd::geteuid().as_raw() && found.nlink() <= 1 && found.mode() & 0o077 == 0;
    // A file without any name left has just been removed; the caller detects this.
    if found.is_file() && ours { Ok(file) } else { Err(io::Error::other("another user can open it")) }
}

fn leads_to(path: &Path, file: &File) -> bool {
    let (Ok(there), Ok(ours)) = (path.symlink_metadata(), file.metadata()) else { return false };
    (there.dev(), there.ino()) == (ours.dev(), ours.ino())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    fn names(directory: &Path) -> Vec<String> {
        let entries = directory.read_dir().unwrap();
        entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect()
    }

    #[test]
    fn one_at_a_time_holds_it_and_nothing_is_left() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.sock");
        let inside = AtomicU32::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..50 {
                        let lock = LockFile::with_timeout(&path, Duration::from_secs(60));
                        assert!(lock.held.is_some());
                        assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0, "no other thread holds the lock");
                        std::thread::yield_now();
                        inside.fetch_sub(1, Ordering::SeqCst);
                    }
                });
            }
        });
        assert_eq!(names(directory.path()), Vec::<String>::new());
    }

    #[test]
    fn a_lock_on_the_directory_or_on_a_file_that_others_can_open_prevents_no_start() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.sock");
        let of_a_stranger = File::open(directory.path()).unwrap();
        of_a_stranger.lock().unwrap();
        assert!(LockFile::for_path(&path).held.is_some());

        // Another user could hold a lock on this file, so it is not used.
        let lock = directory.path().join(".a.sock.lock");
        std::fs::write(&lock, "").unwrap();
        std::fs::set_permissions(&lock, std::fs::Permissions::from_mode(0o644)).unwrap();
        let held = File::open(&lock).unwrap();
        held.lock().unwrap();
        assert!(LockFile::for_path(&path).held.is_none());
        std::fs::remove_file(&lock).unwrap();

        // The target of the link is neither examined nor changed.
        std::fs::write(directory.path().join("b"), "b").unwrap();
        std::os::unix::fs::symlink("b", &lock).unwrap();
        assert!(LockFile::for_path(&path).held.is_none());
        assert_eq!(std::fs::read_to_string(directory.path().join("b")).unwrap(), "b");
        assert!(lock.symlink_metadata().unwrap().is_symlink());
    }

    #[test]
    fn a_dead_masters_file_is_used_and_the_wait_for_a_live_holder_has_a_limit() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.sock");
        let left = open(&directory.path().join(".a.sock.lock")).unwrap();
        let held = LockFile::with_timeout(&path, Duration::from_secs(60));
        assert!(held.held.is_some());
        assert!(LockFile::with_timeout(&path, Duration::ZERO).held.is_none());
        drop((left, held));
        assert_eq!(names(directory.path()), Vec::<String>::new());
    }
}
