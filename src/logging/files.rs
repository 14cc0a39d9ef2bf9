//! Opens the files of the log and the access log in the master, and reopens them after a rotation.
//!
//! Workers may lack permission to open the files (`--user`, `--chroot`, `--sandbox`), so each worker receives the new
//! files from the master through a socket. The worker replaces the old files under the same descriptor numbers. A
//! concurrent write therefore goes either to the old or to the new file, and the worker's heir, which shares the
//! descriptor table, uses the new files too.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd, RawFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::socket::{AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, sendmsg, socketpair};

use super::destination::{self, Kind};
use crate::config::logs::LogConfig;
use crate::sys;

/// The files of master and workers, under the same descriptor numbers in all processes.
#[derive(Debug)]
pub(crate) struct LogFiles {
    config: LogConfig,
    access: Option<OwnedFd>,
    access_kind: Kind,
}

impl LogFiles {
    /// Opens the access log. The log itself is already open ([`super::start`]).
    ///
    /// # Errors
    /// Returns a message for the operator if the access log cannot be opened.
    pub(crate) fn open(config: &LogConfig) -> Result<Self, String> {
        let access = match &config.access {
            None => None,
            Some(access) => Some(match &access.file {
                Some(path) => destination::open(path, "--access-log")?,
                None => sys::descriptor(1).ok_or("--access-log: standard output is closed (name a file)")?,
            }),
        };
        let kind = access.as_ref().map(|access| Kind::of(access.as_fd()));
        let (access_kind, own) = kind.unwrap_or((Kind::File, None));
        Ok(Self { config: config.clone(), access: own.or(access), access_kind })
    }

    pub(crate) fn config(&self) -> &LogConfig {
        &self.config
    }

    pub(crate) fn has_access_log(&self) -> bool {
        self.access.is_some()
    }

    /// Writes lines to the access log. All lines go to a file in one write; a write to a pipe contains only as many
    /// lines as other writers cannot interrupt. Never waits for a reader. Returns the number of bytes written, and the
    /// reason if not all of them were written.
    pub(crate) fn write_access(&self, lines: &[u8]) -> (usize, io::Result<()>) {
        match &self.access {
            Some(access) => destination::write_lines(access.as_fd(), self.access_kind, lines),
            None => (lines.len(), Ok(())),
        }
    }

    /// Like [`write_access`](Self::write_access), but waits for a slow reader, up to `limit`. For a process that is about to
    /// exit.
    pub(crate) fn write_access_within(&self, lines: &[u8], limit: Duration) -> (usize, io::Result<()>) {
        match &self.access {
            Some(access) => destination::write_lines_within(access.as_fd(), self.access_kind, lines, limit),
            None => (lines.len(), Ok(())),
        }
    }

    /// Returns the descriptors that children keep open.
    pub(crate) fn descriptors(&self) -> impl Iterator<Item = RawFd> {
        [super::descriptor()].into_iter().chain(self.access.as_ref().map(|access| access.as_raw_fd()))
    }

    /// Returns the files for a new configuration. These are the same files if the settings are equal.
    ///
    /// # Errors
    /// Fails as [`LogFiles::open`] does.
    pub(crate) fn reconfigured(self: &Arc<Self>, config: &LogConfig) -> Result<Arc<Self>, String> {
        // Workers depend on whether there is a log file, but not on its path; and they depend on all settings of the
        // access log.
        let same = self.config.file == config.file && self.config.access == config.access;
        if same { Ok(Arc::clone(self)) } else { Self::open(config).map(Arc::new) }
    }

    /// Reopens the access log.
    ///
    /// # Errors
    /// Returns a message for the operator if the file cannot be opened. The old file then stays in use.
    pub(crate) fn reopen_access(&self) -> Result<(), String> {
        let Some((path, access)) = self.access_file() else { return Ok(()) };
        let opened = destination::open(path, "--access-log")?;
        sys::replace(access, &opened).map_err(|error| format!("--access-log: {}: {error}", path.display()))
    }

    /// Creates a channel that passes the files to one worker. Returns the master's end and the worker's end, or `None`
    /// if there are no files.
    ///
    /// # Errors
    /// Fails if no sockets are available.
    pub(crate) fn channel(&self) -> io::Result<Option<(OwnedFd, OwnedFd)>> {
        if self.files().is_empty() {
            return Ok(None);
        }
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        Ok(Some(socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)?))
    }

    /// Sends the current files to a worker.
    ///
    /// # Errors
    /// Returns `WouldBlock` if the worker has not yet received the previous files, or another error from the channel.
    pub(crate) fn hand_out(&self, channel: BorrowedFd<'_>) -> io::Result<()> {
        let files = self.files();
        let control = [ControlMessage::ScmRights(&files)];
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        sendmsg::<()>(channel.as_raw_fd(), &[IoSlice::new(b"!")], &control, flags, None)?;
        Ok(())
    }

    /// Replaces the old files with the files that are waiting in the channel. Returns false if the master has closed
    /// the channel.
    ///
    /// # Errors
    /// Returns `WouldBlock` if no files are waiting, or the error from the system call. If this process has no free
    /// descriptors, the files stay in the channel.
    pub(crate) fn take_in(&self, channel: BorrowedFd<'_>) -> io::Result<bool> {
        let mut byte = [0];
        let mut receive =
            |flags| sys::receive_with_descriptors::<2>(channel, &mut byte, MsgFlags::MSG_DONTWAIT | flags);
        // The message is peeked at first: receiving it while no descriptor is free would lose the files.
        drop(receive(MsgFlags::MSG_PEEK)?);
        let (bytes, taken) = receive(MsgFlags::empty())?;
        let mut taken = taken.into_iter();
        if self.config.file.is_some()
            && let Some(file) = taken.next()
        {
            super::replace(file)?;
        }
        if let (Some((_, place)), Some(file)) = (self.access_file(), taken.next()) {
            sys::replace(place, &file)?;
        }
        Ok(bytes > 0)
    }

    /// Returns the descriptors of the files that are reopened, in the order in which they are sent.
    fn files(&self) -> Vec<RawFd> {
        let log = self.config.file.as_ref().map(|_| super::descriptor());
        log.into_iter().chain(self.access_file().map(|(_, access)| access)).collect()
    }

    fn access_file(&self) -> Option<(&Path, RawFd)> {
        let path = self.config.access.as_ref()?.file.as_deref()?;
        Some((path, self.access.as_ref()?.as_raw_fd()))
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::config::logs::{AccessConfig, AccessFormat};

    #[test]
    fn received_files_replace_the_old_ones_under_the_same_numbers() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("access");
        let access = AccessConfig { file: Some(path.clone()), format: AccessFormat::Combined };
        let config = LogConfig { access: Some(access), ..LogConfig::default() };
        let files = LogFiles::open(&config).unwrap();
        let (master, worker) = files.channel().unwrap().unwrap();
        assert_eq!(files.take_in(worker.as_fd()).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        assert!(files.write_access(b"old\n").1.is_ok());
        let moved: PathBuf = directory.path().join("access.1");
        std::fs::rename(&path, &moved).unwrap();
        assert!(files.write_access(b"still old\n").1.is_ok());

        let again = LogFiles::open(&config).unwrap();
        again.hand_out(master.as_fd()).unwrap();
        assert!(files.take_in(worker.as_fd()).unwrap());
        assert!(files.write_access(b"new\n").1.is_ok());
        assert_eq!(std::fs::read_to_string(&moved).unwrap(), "old\nstill old\n");
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "new\n");
        assert_eq!(files.reopen_access(), Ok(()));
        drop(master);
        assert!(!files.take_in(worker.as_fd()).unwrap());
        std::fs::remove_dir_all(directory.path()).unwrap();
        let error = files.reopen_access().unwrap_err();
        assert!(error.contains("--access-log: cannot open"), "{error}");
        assert!(files.write_access(b"still open\n").1.is_ok());
    }
}
