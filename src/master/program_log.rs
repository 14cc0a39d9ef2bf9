//! The output of external programs, line by line into our log.

use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// A line longer than this is logged in pieces.
const LONGEST_LINE: usize = 64 << 10;

/// The read end of a program's standard output and error, and the line that is not finished yet.
#[derive(Debug)]
pub(crate) struct LineReader {
    pipe: File,
    partial: Vec<u8>,
    open: bool,
}

impl LineReader {
    /// `pipe` must be non-blocking.
    pub(crate) fn new(pipe: OwnedFd) -> Self {
        Self { pipe: File::from(pipe), partial: Vec::new(), open: true }
    }

    /// Goes on where another reader stopped.
    pub(crate) fn resume(pipe: OwnedFd, partial: Vec<u8>) -> Self {
        Self { partial, ..Self::new(pipe) }
    }

    /// The line that is not finished yet.
    pub(crate) fn partial(&self) -> &[u8] {
        &self.partial
    }

    /// Reads what is there (up to a limit, so that a chatty program does not hold up the master) and calls
    /// `line` for each line that is complete. False if nothing more will come.
    pub(crate) fn read(&mut self, mut line: impl FnMut(&str)) -> bool {
        let mut buffer = [0; 8192];
        for _ in 0..16 {
            match self.pipe.read(&mut buffer) {
                Ok(0) => self.open = false,
                Ok(count) => {
                    self.take(&buffer[..count], &mut line);
                    continue;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(_) => self.open = false,
            }
            break;
        }
        self.open
    }

    /// Hands out what stands without a line end, when the program is gone.
    pub(crate) fn finish(mut self, mut line: impl FnMut(&str)) {
        self.read(&mut line);
        if !self.partial.is_empty() {
            line(&String::from_utf8_lossy(&self.partial));
        }
    }

    fn take(&mut self, mut bytes: &[u8], line: &mut impl FnMut(&str)) {
        while let Some(end) = bytes.iter().position(|&byte| byte == b'\n') {
            self.partial.extend_from_slice(&bytes[..end]);
            bytes = &bytes[end + 1..];
            self.emit(line);
        }
        self.partial.extend_from_slice(bytes);
        if self.partial.len() >= LONGEST_LINE {
            self.emit(line);
        }
    }

    fn emit(&mut self, line: &mut impl FnMut(&str)) {
        let text = String::from_utf8_lossy(&self.partial);
        line(text.trim_end_matches('\r'));
        self.partial.clear();
    }
}

impl AsFd for LineReader {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pipe.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[test]
    fn lines_are_whole_however_they_arrive() {
        let (read, write) = nix::unistd::pipe2(nix::fcntl::OFlag::O_NONBLOCK).unwrap();
        let (mut reader, mut write) = (LineReader::new(read), File::from(write));
        let mut lines = Vec::new();
        for piece in ["one\ntw", "o\r\n", "", "\nlast"] {
            write.write_all(piece.as_bytes()).unwrap();
            assert!(reader.read(|line| lines.push(line.to_owned())));
        }
        assert_eq!(lines, ["one", "two", ""]);
        drop(write);
        reader.finish(|line| lines.push(line.to_owned()));
        assert_eq!(lines, ["one", "two", "", "last"]);
    }

    #[test]
    fn a_line_without_end_does_not_grow_without_end() {
        let (read, write) = nix::unistd::pipe2(nix::fcntl::OFlag::O_NONBLOCK).unwrap();
        let (mut reader, mut write) = (LineReader::new(read), File::from(write));
        let mut longest = 0;
        for _ in 0..40 {
            write.write_all(&[b'x'; 8192]).unwrap();
            reader.read(|line| longest = longest.max(line.len()));
        }
        assert_eq!(longest, LONGEST_LINE);
    }
}
