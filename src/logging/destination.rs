//! Writes log lines to their destination, without ever waiting for a reader.
//!
//! A log that is not being read (a paused terminal, a pipe whose reader has stopped) must not block the master or a
//! worker's event loop. A line that cannot be written immediately therefore waits in this process's queue, whose size
//! is limited. Further lines are lost and counted; the count is logged as soon as the log is being read again.
//!
//! A pipe or a terminal on standard error is shared with other programs, and making it non-blocking would affect them
//! too. Such a destination is reopened through `/proc/self/fd`, which gives this program its own file description. If
//! reopening is not permitted, `poll(2)` is called before each write, and no write is larger than PIPE_BUF.
//!
//! Must not log, or wait.

use std::fs::{File, FileType, OpenOptions};
use std::io::{self, IsTerminal as _};
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, SigmaskHow, Signal};
use nix::sys::socket::{MsgFlags, send};
use nix::sys::stat::{SFlag, fstat, makedev};

use crate::sys::file_path::{self, Links};

/// A destination that has accepted nothing for this long is considered stopped. Processes that fill the queue are then
/// no longer slowed down.
const STALL_TIMEOUT: Duration = Duration::from_secs(1);

/// How a write is prevented from blocking.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Files on a disk, and devices, which accept writes without waiting for a reader.
    File,
    /// A pipe or a terminal, opened for this program alone, non-blocking.
    Pipe,
    /// A connected socket.
    Socket,
    /// A blocking pipe or terminal whose file description is shared with other programs.
    SharedPipe,
    /// A terminal, opened for this program alone, non-blocking.
    Terminal,
    /// A blocking terminal whose file description is shared with other programs.
    SharedTerminal,
}

impl Kind {
    /// Returns the kind of `fd`, and the descriptor to use instead of `fd`, if any.
    pub(crate) fn of(fd: BorrowedFd<'_>) -> (Self, Option<OwnedFd>) {
        let kind = fstat(fd).map_or(SFlag::S_IFREG, |status| SFlag::from_bits_truncate(status.st_mode) & SFlag::S_IFMT);
        match kind {
            SFlag::S_IFSOCK => (Self::Socket, None),
            SFlag::S_IFIFO | SFlag::S_IFCHR => {
                let is_terminal = fd.is_terminal();
                let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
                let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
                match OpenOptions::new().write(true).custom_flags(flags).open(path) {
                    Ok(own) => (if is_terminal { Self::Terminal } else { Self::Pipe }, Some(own.into())),
                    Err(_) => (if is_terminal { Self::SharedTerminal } else { Self::SharedPipe }, None),
                }
            }
            _ => (Self::File, None),
        }
    }

    /// Returns the maximum size of a write that other processes' lines cannot interrupt.
    fn most(self) -> usize {
        if self == Self::File { usize::MAX } else { libc::PIPE_BUF }
    }
}

/// Writes as much as possible without waiting.
///
/// # Errors
/// Returns `WouldBlock`, or the error from the system call.
fn write_now(fd: BorrowedFd<'_>, kind: Kind, bytes: &[u8]) -> io::Result<usize> {
    loop {
        let written = match kind {
            Kind::Socket => send(fd.as_raw_fd(), bytes, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL),
            Kind::File | Kind::Pipe => nix::unistd::write(fd, bytes),
            Kind::Terminal => from_the_background(|| nix::unistd::write(fd, bytes)),
            Kind::SharedPipe | Kind::SharedTerminal => {
                match poll(&mut [PollFd::new(fd, PollFlags::POLLOUT)], PollTimeout::ZERO) {
                    Ok(0) => Err(Errno::EAGAIN),
                    // Another process may have filled the pipe since then. A write of that size waits for at most one
                    // read by the reader.
                    Ok(_) => {
                        let write = || nix::unistd::write(fd, bytes.get(..libc::PIPE_BUF).unwrap_or(bytes));
                        if kind == Kind::SharedTerminal { from_the_background(write) } else { write() }
                    }
                    Err(errno) => Err(errno),
                }
            }
        };
        match written {
            Err(Errno::EINTR) => {}
            outcome => return Ok(outcome?),
        }
    }
}

/// Makes a write to a terminal succeed even if this process belongs to a background job. With `stty tostop`, the kernel
/// sends SIGTTOU to a background job that writes, unless the writing thread blocks that signal. The master would treat
/// SIGTTOU as a command from the operator, and the write would be restarted forever.
fn from_the_background<T>(write: impl FnOnce() -> T) -> T {
    let before = SigSet::from(Signal::SIGTTOU).thread_swap_mask(SigmaskHow::SIG_BLOCK);
    let outcome = write();
    if let Ok(before) = before {
        let _ = before.thread_set_mask(); // restores the previous mask
    }
    outcome
}

/// Writes lines, in groups that other writers cannot interrupt. Returns the number of bytes written, and the reason if
/// not all of them were written.
pub(crate) fn write_lines(fd: BorrowedFd<'_>, kind: Kind, lines: &[u8]) -> (usize, io::Result<()>) {
    let mut written = 0;
    while written < lines.len() {
        let rest = &lines[written..];
        match write_now(fd, kind, &rest[..whole_lines(rest, kind.most())]) {
            Ok(count) => written += count,
            Err(error) => return (written, Err(error)),
        }
    }
    (written, Ok(()))
}

/// Like [`write_lines`], but waits for a reader, up to `limit`. Used by a process that is about to exit.
pub(crate) fn write_lines_within(
    fd: BorrowedFd<'_>,
    kind: Kind,
    lines: &[u8],
    limit: Duration,
) -> (usize, io::Result<()>) {
    let begun = Instant::now();
    let mut written = 0;
    loop {
        let (count, outcome) = write_lines(fd, kind, &lines[written..]);
        written += count;
        match outcome {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && begun.elapsed() < limit => {
                let left = PollTimeout::try_from(limit.saturating_sub(begun.elapsed())).unwrap_or(PollTimeout::MAX);
                let _ = poll(&mut [PollFd::new(fd, PollFlags::POLLOUT)], left); // the next write shows the result
            }
            outcome => return (written, outcome),
        }
    }
}

/// Returns the length of the complete lines among the first `most` bytes or, if the first line is longer than that, the
/// length of the first line.
fn whole_lines(lines: &[u8], most: usize) -> usize {
    let is_end = |&byte: &u8| byte == b'\n';
    let within = lines.iter().take(most).rposition(is_end);
    within.or_else(|| lines.iter().position(is_end)).map_or(lines.len(), |end| end + 1)
}

/// The outcome for a line that was passed to a [`Queue`].
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    Written,
    /// The line waits in the queue.
    Queued,
    /// The line is lost: the queue is full, or the log will never be read.
    Lost,
    /// The destination failed with this error. The line is not written.
    Failed(String),
}

/// Lines that wait for their reader, and the number of lost lines.
#[derive(Debug, Default)]
pub(super) struct Queue {
    bytes: Vec<u8>,
    /// The number of bytes of `bytes` that were written.
    written: usize,
    /// The number of lost lines.
    lost: u64,
    last_progress: Option<Instant>,
    /// Whether the last write ended in the middle of a line.
    is_torn: bool,
}

impl Queue {
    /// Writes a line, or queues it if `limit` allows.
    pub(super) fn put(&mut self, fd: BorrowedFd<'_>, kind: Kind, line: &[u8], limit: usize) -> Outcome {
        if let Err(error) = self.flush(fd, kind) {
            return self.fail(&error);
        }
        if self.is_empty() {
            let (count, outcome) = self.write(fd, kind, line);
            match outcome {
                Ok(()) => return Outcome::Written,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.last_progress = Some(Instant::now());
                    self.bytes.extend_from_slice(&line[count..]);
                    return Outcome::Queued;
                }
                Err(error) => return self.fail(&error),
            }
        }
        if self.bytes.len() - self.written + line.len() > limit {
            self.lost += 1;
            return Outcome::Lost;
        }
        self.bytes.extend_from_slice(line);
        Outcome::Queued
    }

    fn fail(&mut self, error: &io::Error) -> Outcome {
        if error.kind() == io::ErrorKind::BrokenPipe {
            (self.lost, self.written) = (self.lost + 1, 0);
            self.bytes = Vec::new();
            return Outcome::Lost;
        }
        Outcome::Failed(error.to_string())
    }

    fn write(&mut self, fd: BorrowedFd<'_>, kind: Kind, bytes: &[u8]) -> (usize, io::Result<()>) {
        if self.is_torn && kind == Kind::File {
            // The file ends with the beginning of a line. The remainder of that line was written elsewhere, so the line
            // is ended here.
            match write_now(fd, kind, b"\n") {
                Ok(_) => self.is_torn = false,
                Err(error) => return (0, Err(error)),
            }
        }
        let (count, outcome) = write_lines(fd, kind, bytes);
        self.is_torn = kind == Kind::File && outcome.is_err() && count > 0 && bytes.get(count - 1) != Some(&b'\n');
        (count, outcome)
    }

    /// Writes as much of the queue as possible without waiting.
    ///
    /// # Errors
    /// Fails if the destination fails. A destination that is full for now is not a failure.
    pub(super) fn flush(&mut self, fd: BorrowedFd<'_>, kind: Kind) -> io::Result<()> {
        if self.is_empty() {
            return Ok(());
        }
        let waiting = std::mem::take(&mut self.bytes);
        let (count, outcome) = self.write(fd, kind, &waiting[self.written..]);
        self.bytes = waiting;
        self.written += count;
        if count > 0 {
            self.last_progress = Some(Instant::now());
        }
        if self.written == self.bytes.len() {
            (self.bytes, self.written) = (Vec::new(), 0); // frees the memory, which is no longer needed
        }
        match outcome {
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => Err(error),
            _ => Ok(()),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Removes and returns the queued bytes.
    pub(super) fn take(&mut self) -> Vec<u8> {
        let written = std::mem::take(&mut self.written);
        std::mem::take(&mut self.bytes).split_off(written)
    }

    /// Returns the number of lines that have been lost since the last call, if the log is being read again.
    pub(super) fn take_lost(&mut self) -> Option<u64> {
        if self.is_empty() { Some(std::mem::take(&mut self.lost)).filter(|&lost| lost > 0) } else { None }
    }

    /// Returns for how long to slow down processes that add lines, if the reader is slow but has not stopped.
    pub(super) fn is_slow_for(&self) -> Option<Duration> {
        let since = self.last_progress.filter(|_| !self.is_empty())?;
        STALL_TIMEOUT.checked_sub(since.elapsed()).filter(|left| !left.is_zero())
    }
}

/// Opens a file for appending, and creates it if it does not exist. The file belongs to the master's user; workers do
/// not open it. A path such as `/dev/stderr` stands for the stream itself, whatever the stream leads to.
///
/// # Errors
/// Returns a message for the operator if the file cannot be opened, or cannot be a log.
pub(super) fn open(path: &Path, flag: &str) -> Result<OwnedFd, String> {
    if let Some(standard) = standard_stream(path) {
        return standard.map_err(|error| format!("{flag}: cannot use {}: {error} (name a file)", path.display()));
    }
    let fail = |cause: String| format!("{flag}: cannot open {}: {cause}", path.display());
    let kind = kind_at(path, flag).map_err(fail)?;
    open_file(path, true).map_err(|error| fail(explain(&error, kind, flag)))
}

/// Checks the path of a log without creating the file. Returns a note if it depends on a condition that cannot be
/// checked whether startup would succeed.
///
/// # Errors
/// Returns the error that startup would report.
pub(crate) fn examine(path: &Path, flag: &str) -> Result<Option<String>, String> {
    if standard_stream(path).is_some() {
        return open(path, flag).map(|_| None);
    }
    let fail = |cause: String| format!("{flag}: cannot open {}: {cause}", path.display());
    let kind = kind_at(path, flag).map_err(fail)?;
    match kind {
        None => Ok(None),
        // To the FIFO's reader, opening and closing it here would look like a writer that has disconnected.
        Some(kind) if kind.is_fifo() => {
            let allowed = nix::unistd::access(path, nix::unistd::AccessFlags::W_OK);
            allowed.map_err(|errno| fail(explain(&errno.into(), Some(kind), flag)))?;
            Ok(Some(format!("{flag}: a start fails unless a program reads from the FIFO {}", path.display())))
        }
        Some(_) => open_file(path, false).map(|_| None).map_err(|error| fail(explain(&error, kind, flag))),
    }
}

/// Returns the type of the existing file, or `None` if a file would be created.
fn kind_at(path: &Path, flag: &str) -> Result<Option<FileType>, String> {
    let found = file_path::examine(path, Links::Follow, flag)?;
    if found.as_ref().is_some_and(|found| found.file_type().is_char_device() && found.rdev() == makedev(1, 7)) {
        return Err(format!("it is a device that is always full (name a file with {flag})"));
    }
    match found.map(|found| found.file_type()) {
        Some(kind) if kind.is_dir() => Err(format!("it is a directory (name a file in it, with {flag})")),
        Some(kind) if kind.is_socket() => {
            Err(format!("it is a socket (omit {flag} and have a collector read standard error, or name a file)"))
        }
        Some(kind) if kind.is_block_device() => Err(format!("it is a disk (name a file with {flag})")),
        found => Ok(found),
    }
}

/// Opens the file. Does not wait for a reader if the file is a FIFO.
fn open_file(path: &Path, create: bool) -> io::Result<OwnedFd> {
    let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
    let opened = OpenOptions::new().append(true).create(create).mode(0o640).custom_flags(flags).open(path);
    opened.map(OwnedFd::from)
}

fn explain(error: &io::Error, kind: Option<FileType>, flag: &str) -> String {
    match error.raw_os_error() {
        Some(libc::ENXIO) if kind.is_some_and(|kind| kind.is_fifo()) => {
            "no process reads this FIFO (start its reader first)".to_owned()
        }
        _ => format!("{} (name a file that you can write, with {flag})", crate::sys::explain(error)),
    }
}

/// Returns a copy of standard output or standard error, if `path` is one of their names. Opening such a path would fail
/// if the stream is a socket or belongs to another user.
fn standard_stream(path: &Path) -> Option<io::Result<OwnedFd>> {
    let number = match path.to_str()? {
        "/dev/stdout" | "/dev/fd/1" | "/proc/self/fd/1" => 1,
        "/dev/stderr" | "/dev/fd/2" | "/proc/self/fd/2" => 2,
        _ => return None,
    };
    let copy = crate::sys::descriptor(number).ok_or_else(|| io::Error::other("it is closed"));
    Some(copy.map(|copy| Kind::of(copy.as_fd()).1.unwrap_or(copy)))
}

/// Returns a copy of the destination that other code can use as a standard stream. Writes to the copy block.
pub(super) fn blocking_copy(fd: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let opened = File::options().append(true).open(format!("/proc/self/fd/{}", fd.as_raw_fd()));
    opened.map(OwnedFd::from).or_else(|_| fd.try_clone_to_owned())
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use super::*;

    /// Returns a blocking pipe, as standard error often is.
    fn pipe() -> (File, OwnedFd) {
        let (read, write) = nix::unistd::pipe().unwrap();
        (File::from(read), write)
    }

    fn line(number: usize) -> String {
        format!("line {number} {}\n", "x".repeat(number % 200))
    }

    #[test]
    fn lines_wait_for_their_reader_up_to_the_limit_and_the_lost_are_counted() {
        for shared in [false, true] {
            let (mut read, write) = pipe();
            let (kind, own) = if shared { (Kind::SharedPipe, None) } else { Kind::of(write.as_fd()) };
            assert!(shared || (kind == Kind::Pipe && own.is_some()), "a description of its own");
            let fd = own.as_ref().unwrap_or(&write).as_fd();
            let (mut queue, limit) = (Queue::default(), 32 << 10);
            let mut outcomes = Vec::new();
            for number in 0..3000 {
                outcomes.push(queue.put(fd, kind, line(number).as_bytes(), limit));
            }
            let count = |wanted: Outcome| outcomes.iter().filter(|outcome| **outcome == wanted).count();
            let (written, queued, lost) = (count(Outcome::Written), count(Outcome::Queued), count(Outcome::Lost));
            assert!(written > 0 && queued > 0 && lost > 0 && written + queued + lost == 3000);
            assert_eq!(queue.take_lost(), None, "no process reads yet");
            assert!(queue.is_slow_for().is_some());
            let mut seen = Vec::new();
            let mut buffer = [0; 4096];
            while !queue.is_empty() {
                let count = read.read(&mut buffer).unwrap();
                seen.extend_from_slice(&buffer[..count]);
                queue.flush(fd, kind).unwrap();
            }
            assert_eq!(queue.take_lost(), Some(lost as u64));
            assert_eq!((queue.take_lost(), queue.is_slow_for()), (None, None));
            drop((own, write));
            read.read_to_end(&mut seen).unwrap();
            let expected: String = (0..3000).filter(|&n| outcomes[n] != Outcome::Lost).map(line).collect();
            assert_eq!(String::from_utf8(seen).unwrap(), expected);
        }
    }

    #[test]
    fn a_reader_that_is_gone_costs_lines_and_no_memory() {
        let (read, write) = pipe();
        let (kind, own) = Kind::of(write.as_fd());
        let fd = own.as_ref().unwrap().as_fd();
        let mut queue = Queue::default();
        while queue.put(fd, kind, &[b'x'; 1000], 1 << 20) != Outcome::Queued {}
        drop(read);
        assert_eq!(queue.put(fd, kind, b"y\n", 1 << 20), Outcome::Lost);
        assert!(queue.is_empty());
    }

    #[test]
    fn a_full_device_is_a_failure_with_its_name() {
        let path = std::path::Path::new("/dev/full");
        assert!(open(path, "--log-file").unwrap_err().contains("always full"));
        let full = open_file(path, false).unwrap();
        let outcome = Queue::default().put(full.as_fd(), Kind::File, b"x\n", 100);
        assert!(matches!(&outcome, Outcome::Failed(why) if why.contains("No space")), "{outcome:?}");
    }

    #[test]
    fn a_socket_a_fifo_and_a_directory_are_refused_by_name() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("socket");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        assert!(open(&socket, "--log-file").unwrap_err().contains("it is a socket"));
        let fifo = directory.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(open(&fifo, "--log-file").unwrap_err().contains("no process reads this FIFO"));
        assert!(open(directory.path(), "--log-file").unwrap_err().contains("it is a directory"));
        assert!(open(std::path::Path::new("/dev/stderr"), "--log-file").is_ok());
    }

    #[test]
    fn lines_are_never_cut_for_a_pipe() {
        assert_eq!(whole_lines(b"ab\ncd\nef\n", 7), 6);
        assert_eq!(whole_lines(b"ab\ncd\n", 6), 6);
        assert_eq!(whole_lines(b"abcdef\ngh\n", 3), 7);
        assert_eq!(whole_lines(b"abc", 2), 3);
    }
}
