//! The files of the log and the access log: opened by the master, and opened again after a rotation.
//!
//! Workers may not be allowed to open them (`--user`, `--chroot`, `--sandbox`), so each has a socket through which it gets
//! the new files from the master. It puts them in the place of the old ones, under the same number: what writes there at
//! that moment writes to the one or to the other, and its heir, which shares the table, follows along.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd, RawFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::socket::{AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, sendmsg, socketpair};

use super::destination::{self, Kind};
use crate::config::logs::LogConfig;
use crate::sys;

/// The files, as master and workers have them: under the same numbers in all.
#[derive(Debug)]
pub(crate) struct LogFiles {
    config: LogConfig,
    access: Option<OwnedFd>,
    access_kind: Kind,
}

impl LogFiles {
    /// The log is open by now ([`super::start`]).
    ///
    /// # Errors
    /// A sentence for the operator.
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

    /// Writes lines to the access log: to a file all at once; to a pipe so many that they stay in one piece. Never waits for a
    /// reader. Returns how many bytes went, and why no more did.
    pub(crate) fn write_access(&self, lines: &[u8]) -> (usize, io::Result<()>) {
        match &self.access {
            Some(access) => destination::write_lines(access.as_fd(), self.access_kind, lines),
            None => (lines.len(), Ok(())),
        }
    }

    /// As [`write_access`](Self::write_access), for a process that ends: a reader that is slow is waited for, up to `limit`.
    pub(crate) fn write_access_within(&self, lines: &[u8], limit: Duration) -> (usize, io::Result<()>) {
        match &self.access {
            Some(access) => destination::write_lines_within(access.as_fd(), self.access_kind, lines, limit),
            None => (lines.len(), Ok(())),
        }
    }

    /// What children keep.
    pub(crate) fn descriptors(&self) -> impl Iterator<Item = RawFd> {
        [super::descriptor()].into_iter().chain(self.access.as_ref().map(|access| access.as_raw_fd()))
    }

    /// The files of another configuration: these, if they are the same.
    ///
    /// # Errors
    /// A sentence for the operator.
    pub(crate) fn reconfigured(self: &Arc<Self>, config: &LogConfig) -> Result<Arc<Self>, String> {
        // Workers need to know whether there is a log file, and all about the access log.
        let same = self.config.file == config.file && self.config.access == config.access;
        if same { Ok(Arc::clone(self)) } else { Self::open(config).map(Arc::new) }
    }

    /// Opens the access log again.
    ///
    /// # Errors
    /// A sentence for the operator; the old one goes on.
    pub(crate) fn reopen_access(&self) -> Result<(), String> {
        let Some((path, access)) = self.access_file() else { return Ok(()) };
        let opened = destination::open(path, "--access-log")?;
        sys::replace(access, &opened).map_err(|error| format!("--access-log: {}: {error}", path.display()))
    }

    /// A channel for the files of one worker: the master's end and the worker's. `None` if there are no files.
    ///
    /// # Errors
    /// If no sockets can be had.
    pub(crate) fn channel(&self) -> io::Result<Option<(OwnedFd, OwnedFd)>> {
        if self.files().is_empty() {
            return Ok(None);
        }
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        Ok(Some(socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)?))
    }

    /// Sends the files, as they are now, to a worker.
    ///
    /// # Errors
    /// `WouldBlock` if it has not taken those sent before, or what the channel says.
    pub(crate) fn hand_out(&self, channel: BorrowedFd<'_>) -> io::Result<()> {
        let files = self.files();
        let control = [ControlMessage::ScmRights(&files)];
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        sendmsg::<()>(channel.as_raw_fd(), &[IoSlice::new(b"!")], &control, flags, None)?;
        Ok(())
    }

    /// Puts the files that wait in the channel into the place of the old ones. False when no more will come.
    ///
    /// # Errors
    /// `WouldBlock` if none wait, or what the system says: if it has no descriptors for them, they wait on.
    pub(crate) fn take_in(&self, channel: BorrowedFd<'_>) -> io::Result<bool> {
        let mut byte = [0];
        let mut receive =
            |flags| sys::receive_with_descriptors::<2>(channel, &mut byte, MsgFlags::MSG_DONTWAIT | flags);
        // Looked at first: a message that is taken while there is no room for its descriptors comes without them.
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

    /// The descriptors of those that are opened again, in the order in which they are sent.
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
    fn whoever_gets_the_files_writes_to_the_new_ones_under_the_old_number() {
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
        assert!(files.write_access(b"goes on\n").1.is_ok());
    }
}
