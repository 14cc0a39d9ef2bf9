//! Writes the pid file: the master's pid for other programs, and a lock against a second master.
//!
//! The file is written under another name, locked, and moved into place, so that no reader sees a partial file. The
//! lock ends with the master, so a file without a lock was left behind by a dead master. The lock is an fcntl(2) write
//! lock. A process that can only read the file cannot take such a lock, and so cannot be mistaken for a running master.
//! The file must stay open until the master exits.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::statvfs::{Statvfs, statvfs};

use super::abort::Leftover;
use crate::sys::file_path::{self, Links, directory_of, examine_directory};
use crate::sys::lock_file::LockFile;
use crate::upgrade::Takeover;
use crate::upgrade::saved_state::SavedPidFile;

const FLAG: &str = "--pid-file";

/// A pid file of this process.
#[derive(Debug)]
pub(crate) struct PidFile {
    path: PathBuf,
    file: File,
}

impl PidFile {
    /// Writes this process's pid to `path`.
    ///
    /// # Errors
    /// Returns a message for the operator if another master uses the file, or the file cannot be written.
    pub(crate) fn create(path: &Path) -> Result<Self, String> {
        let fail = |cause: String| format!("cannot write the pid file {}: {cause}", path.display());
        let denied = |error: std::io::Error| fail(format!("{error} (choose another path with --pid-file)"));
        file_path::examine(path, Links::Keep, FLAG).map_err(fail)?;
        let _turn = LockFile::for_path(path);
        refuse_second(path).map_err(fail)?;
        let name =
            path.file_name().ok_or_else(|| fail("the path names no file (name one with --pid-file)".to_owned()))?;
        let prefix = format!(".{}.", name.to_string_lossy());
        remove_leftovers(directory_of(path), &prefix);
        // The temporary name is random, so that neither a killed master with the same pid nor another user can have
        // used it.
        let mut random = [0; 8];
        getrandom::fill(&mut random).map_err(|error| denied(io::Error::other(error)))?;
        let fresh = directory_of(path).join(format!("{prefix}{:016x}", u64::from_ne_bytes(random)));
        let write = || {
            let mut file = OpenOptions::new().write(true).create_new(true).mode(0o644).open(&fresh)?;
            let written = file.write_all(format!("{}\n", std::process::id()).as_bytes());
            written.and_then(|()| lock(&file)).and_then(|()| std::fs::rename(&fresh, path)).map(|()| file)
        };
        match write() {
            Ok(file) => Ok(Self { path: path.to_owned(), file }),
            Err(error) => {
                let _ = std::fs::remove_file(&fresh); // it may not exist
                Err(denied(error))
            }
        }
    }

    /// Opens the pid file at `path`: takes over the former master's file, or creates a new one. A former master's file
    /// at a different path is removed. Returns `None` without a path, or if an upgrade check finds that the former
    /// master's file could be taken over.
    ///
    /// # Errors
    /// Fails as [`PidFile::create`] does.
    pub(crate) fn open(path: Option<&Path>, takeover: Option<&mut Takeover>) -> Result<Option<Self>, String> {
        let is_check = takeover.as_ref().is_some_and(|left| left.check);
        let Some((former, descriptor)) = takeover.and_then(Takeover::pid_file) else {
            return path.map(Self::create).transpose();
        };
        let adopted = descriptor.map(|descriptor| Self { path: former.clone(), file: File::from(descriptor) });
        if let Some(Self { path, file }) = &adopted
            && let Err(error) = lock(file)
        {
            log::warn!(file:% = path.display(); "cannot lock the pid file: {error}");
        }
        if path == Some(&*former) && (is_check || adopted.is_some()) {
            return Ok(adopted);
        }
        let created = path.map(Self::create).transpose()?;
        adopted.into_iter().for_each(Self::remove);
        Ok(created)
    }

    /// Returns the state to save for the next master during an upgrade.
    pub(crate) fn saved(&self) -> SavedPidFile {
        SavedPidFile { fd: self.file.as_raw_fd(), path: self.path.clone() }
    }

    /// Returns the file to remove if startup is aborted.
    pub(crate) fn leftover(&self) -> Option<Leftover> {
        let ours = self.file.metadata().ok()?;
        Leftover::file(&self.path, (ours.dev(), ours.ino()))
    }

    /// Removes the file, unless a different file has replaced it.
    pub(crate) fn remove(self) {
        let (Ok(ours), Ok(there)) = (self.file.metadata(), self.path.symlink_metadata()) else { return };
        if (ours.dev(), ours.ino()) == (there.dev(), there.ino())
            && let Err(error) = std::fs::remove_file(&self.path)
        {
            log::warn!(file:% = self.path.display(); "cannot remove the pid file: {error}");
        }
    }
}

/// Locks the file until it is closed. Succeeds if this process already holds the lock.
fn lock(file: &File) -> io::Result<()> {
    let flock = flock_of(libc::F_WRLCK);
    match fcntl(file, FcntlArg::F_OFD_SETLK(&flock)) {
        Ok(_) => Ok(()),
        // The file system does not support locks: continue without one.
        Err(nix::errno::Errno::ENOLCK | nix::errno::Errno::EOPNOTSUPP) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

/// Whether another process has a write lock on the file.
fn is_locked(file: &File) -> bool {
    let mut flock = flock_of(libc::F_RDLCK);
    fcntl(file, FcntlArg::F_OFD_GETLK(&mut flock)).is_ok() && i32::from(flock.l_type) == libc::F_WRLCK
}

/// Returns a lock on the whole file.
fn flock_of(kind: libc::c_int) -> libc::flock {
    let kind = libc::c_short::try_from(kind).unwrap_or(0);
    let whence = libc::c_short::try_from(libc::SEEK_SET).unwrap_or(0);
    libc::flock { l_type: kind, l_whence: whence, l_start: 0, l_len: 0, l_pid: 0 }
}

/// Removes temporary files of this user's masters that were killed before they had moved their file into place. The caller
/// holds the lock file of the path, so no other master is about to move such a file.
fn remove_leftovers(directory: &Path, prefix: &str) {
    let is_number = |rest: &str| !rest.is_empty() && rest.bytes().all(|byte| byte.is_ascii_hexdigit());
    let ours = nix::unistd::geteuid().as_raw();
    for entry in directory.read_dir().into_iter().flatten().flatten() {
        let name = entry.file_name();
        let left = name.to_str().and_then(|name| name.strip_prefix(prefix)).is_some_and(is_number);
        if left && entry.metadata().is_ok_and(|found| found.is_file() && found.uid() == ours) {
            let _ = std::fs::remove_file(entry.path()); // a file that stays does no harm
        }
    }
}

/// Checks whether the pid file can be written, without writing it. Returns a warning if a running master uses it.
///
/// # Errors
/// Returns a message for the operator if the file cannot be written.
pub(crate) fn examine(path: &Path) -> Result<Option<String>, String> {
    let examined = file_path::examine(path, Links::Keep, FLAG).and_then(|_| {
        let holder = holder(path)?;
        examine_directory(path, FLAG)?;
        if is_full(directory_of(path)) {
            return Err(format!("no space left on the device (choose another path with {FLAG})"));
        }
        Ok(holder)
    });
    let holder = examined.map_err(|cause| format!("cannot write the pid file {}: {cause}", path.display()))?;
    let note =
        |pid| format!("pid file {}: the running master with pid {pid} uses it (perhaps this service)", path.display());
    Ok(holder.map(note))
}

/// Whether the file system has no free block for this user.
fn is_full(directory: &Path) -> bool {
    let is_root = nix::unistd::geteuid().is_root();
    let free = |found: &Statvfs| if is_root { found.blocks_free() } else { found.blocks_available() };
    // Some file systems do not count blocks, and report 0 blocks in total.
    statvfs(directory).is_ok_and(|found| found.blocks() > 0 && free(&found) == 0)
}

/// Fails if a running master uses the file, or if the file is not a pid file.
fn refuse_second(path: &Path) -> Result<(), String> {
    match holder(path)? {
        None => Ok(()),
        Some(pid) => Err(format!(
            "another master uses it, with pid {pid} (stop that master, or choose another path with --pid-file)"
        )),
    }
}

/// Returns the pid of the running master that uses the file.
///
/// # Errors
/// Returns a message for the operator if the file is not a pid file.
fn holder(path: &Path) -> Result<Option<String>, String> {
    let Ok(metadata) = path.symlink_metadata() else { return Ok(None) };
    if !metadata.is_file() {
        let what = file_path::special(&metadata).unwrap_or("a symbolic link");
        return Err(format!("it is {what}, not a pid file (choose another path with {FLAG})"));
    }
    let mut text = String::new();
    let file = File::open(path).map_err(|error| format!("{error} (choose another path with --pid-file)"))?;
    let held = is_locked(&file);
    let read = file.take(32).read_to_string(&mut text);
    let text = text.trim();
    if read.is_err() || !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err("the existing file does not contain a pid (choose another path with --pid-file)".to_owned());
    }
    Ok(held.then(|| text.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_master_at_a_time_uses_the_file_and_a_dead_masters_file_is_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.pid");
        std::fs::write(&path, "4000000\n").unwrap();
        let first = PidFile::create(&path).unwrap();
        let own = format!("{}\n", std::process::id());
        assert_eq!(std::fs::read_to_string(&path).unwrap(), own);
        let error = PidFile::create(&path).unwrap_err();
        assert!(error.contains("another master uses it") && error.contains("--pid-file"), "{error}");
        first.remove();
        assert_eq!(directory.path().read_dir().unwrap().count(), 0);
    }

    #[test]
    fn temporary_files_of_a_killed_master_are_removed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.pid");
        for left in [format!(".a.pid.{}", std::process::id()), ".a.pid.0123456789abcdef".to_owned()] {
            std::fs::write(directory.path().join(left), "").unwrap();
        }
        std::fs::write(directory.path().join(".a.pid.swp"), "an editor's").unwrap();
        let first = PidFile::create(&path).unwrap();
        assert_eq!(directory.path().read_dir().unwrap().count(), 2);
        first.remove();
    }

    #[test]
    fn a_read_lock_on_a_dead_masters_file_does_not_prevent_a_start() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.pid");
        std::fs::write(&path, "4000000\n").unwrap();
        let stranger = File::open(&path).unwrap();
        stranger.lock().unwrap();
        fcntl(&stranger, FcntlArg::F_OFD_SETLK(&flock_of(libc::F_RDLCK))).unwrap();
        PidFile::create(&path).unwrap().remove();
    }

    #[test]
    fn a_file_that_is_not_a_pid_file_stays() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.pid");
        std::fs::write(&path, "notes").unwrap();
        assert!(PidFile::create(&path).unwrap_err().contains("does not contain a pid"));
        assert!(PidFile::create(directory.path()).unwrap_err().contains("it is a directory, not a pid file"));
        assert!(PidFile::create(&path.join("b")).unwrap_err().contains("--pid-file"));

        // A different file under the same name is not removed either.
        std::fs::remove_file(&path).unwrap();
        let first = PidFile::create(&path).unwrap();
        std::fs::rename(&path, directory.path().join("b")).unwrap();
        std::fs::write(&path, "1\n").unwrap();
        first.remove();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "1\n");
    }
}
