//! The files of the log and the access log: opened by the master, and opened again after a rotation.
//!
//! Workers may not be allowed to open them (`--user`, `--chroot`, `--sandbox`), so each has a socket through which it gets
//! the new files from the master. It puts them in the place of the old ones, under the same number: what writes there at
//! that moment writes to the one or to the other, and its heir, which shares the table, follows along.

use std::fs::OpenOptions;
use std::io::{self, IoSlice};
use std::os::fd::{AsRawFd as _, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::sync::Arc;

use nix::sys::socket::{AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, sendmsg, socketpair};
use nix::sys::stat::{SFlag, fstat};

use crate::config::logs::LogConfig;
use crate::sys;

/// Opens a file to write at its end, and makes it if there is none. It belongs to whoever the master is: workers do not open it.
///
/// # Errors
/// A sentence for the operator.
pub(super) fn open(path: &Path, flag: &str) -> Result<OwnedFd, String> {
    // Not to wait for somebody who reads, should it be a FIFO.
    let options = OpenOptions::new().append(true).create(true).mode(0o640).custom_flags(libc::O_NONBLOCK).open(path);
    options.map(OwnedFd::from).map_err(|error| {
        format!(
            "{flag}: cannot open {}: {error} (create its folder, or name a file that you can write)",
            path.display()
        )
    })
}

/// The files, as master and workers have them: under the same numbers in all.
#[derive(Debug)]
pub(crate) struct LogFiles {
    config: LogConfig,
    access: Option<OwnedFd>,
    /// It is a file, to which others' lines do not come in between.
    is_whole: bool,
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
                Some(path) => open(path, "--access-log")?,
                None => sys::descriptor(1).ok_or("--access-log: standard output is closed (name a file)")?,
            }),
        };
        let is_whole = access.as_ref().is_some_and(is_file);
        Ok(Self { config: config.clone(), access, is_whole })
    }

    pub(crate) fn config(&self) -> &LogConfig {
        &self.config
    }

    pub(crate) fn has_access_log(&self) -> bool {
        self.access.is_some()
    }

    /// Writes lines to the access log: to a file all at once; to a pipe so many that they stay in one piece.
    ///
    /// # Errors
    /// What `write(2)` says. Nobody knows then how many were written.
    pub(crate) fn write_access(&self, mut lines: &[u8]) -> io::Result<()> {
        let Some(access) = &self.access else { return Ok(()) };
        let most = if self.is_whole { lines.len() } else { libc::PIPE_BUF };
        while !lines.is_empty() {
            let (first, rest) = lines.split_at(whole_lines(lines, most));
            sys::write_all(access.as_raw_fd(), first)?;
            lines = rest;
        }
        Ok(())
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
        let opened = open(path, "--access-log")?;
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
    /// `WouldBlock` if none wait, or what the system says.
    pub(crate) fn take_in(&self, channel: BorrowedFd<'_>) -> io::Result<bool> {
        let mut byte = [0];
        let (bytes, taken) = sys::receive_with_descriptors::<2>(channel, &mut byte, MsgFlags::MSG_DONTWAIT)?;
        let places = self.files();
        if taken.len() == places.len() {
            places.iter().zip(&taken).try_for_each(|(&place, file)| sys::replace(place, file))?;
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

fn is_file(descriptor: &OwnedFd) -> bool {
    let kind = fstat(descriptor).map(|status| SFlag::from_bits_truncate(status.st_mode) & SFlag::S_IFMT);
    kind == Ok(SFlag::S_IFREG)
}

/// How long the whole lines at the beginning are, up to `most` bytes; or the first one, if it is longer.
fn whole_lines(lines: &[u8], most: usize) -> usize {
    let is_end = |&byte: &u8| byte == b'\n';
    let within = lines.iter().take(most).rposition(is_end);
    within.or_else(|| lines.iter().position(is_end)).map_or(lines.len(), |end| end + 1)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd as _;
    use std::path::PathBuf;

    use super::*;
    use crate::config::logs::{AccessConfig, AccessFormat};

    #[test]
    fn whoever_gets_the_files_writes_to_the_new_ones_under_the_old_number() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("access");
        let access = AccessConfig { file: Some(path.clone()), format: AccessFormat::Combined };
        let config = LogConfig { access: Some(access), ..LogConfig::default() };
        let files = LogFiles::open(&config).unwrap();
        let (master, worker) = files.channel().unwrap().unwrap();
        assert_eq!(files.take_in(worker.as_fd()).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        let place = files.access.as_ref().unwrap().as_raw_fd();
        sys::write_all(place, b"old\n").unwrap();
        let moved: PathBuf = folder.path().join("access.1");
        std::fs::rename(&path, &moved).unwrap();
        sys::write_all(place, b"still old\n").unwrap();

        let again = LogFiles::open(&config).unwrap();
        again.hand_out(master.as_fd()).unwrap();
        assert!(files.take_in(worker.as_fd()).unwrap());
        sys::write_all(place, b"new\n").unwrap();
        assert_eq!(std::fs::read_to_string(&moved).unwrap(), "old\nstill old\n");
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "new\n");
        assert_eq!(files.reopen_access(), Ok(()));
        drop(master);
        assert!(!files.take_in(worker.as_fd()).unwrap());
        std::fs::remove_dir_all(folder.path()).unwrap();
        let error = files.reopen_access().unwrap_err();
        assert!(error.contains("--access-log: cannot open"), "{error}");
        sys::write_all(place, b"goes on\n").unwrap();
    }

    #[test]
    fn lines_are_never_cut_for_a_pipe() {
        assert_eq!(whole_lines(b"ab\ncd\nef\n", 7), 6);
        assert_eq!(whole_lines(b"ab\ncd\n", 6), 6);
        assert_eq!(whole_lines(b"abcdef\ngh\n", 3), 7);
        assert_eq!(whole_lines(b"abc", 2), 3);
    }
}
