//! Logs the output of workers and programs, line by line.
//!
//! A process that floods its output must not block the master: each iteration of the loop reads a bounded number of
//! bytes, and the writer waits. Every loss of a line must be logged.

mod last_lines;

use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};

use nix::unistd::Pid;

pub(crate) use self::last_lines::LastLines;
use super::pool::supervisor::Uptime;
use crate::logging::rate::{Admission, ByteLimit, LeftOut};
use crate::logging::{self, OUTPUT};
use crate::upgrade::saved_state::SavedOutput;

/// A line longer than this is logged in parts.
const MAX_LINE: usize = 64 << 10;
/// Marks a line that continues in the next part.
const CONTINUED: &str = " [continued]";
/// Number of bytes read from all processes in one iteration of the master's loop.
const READ_BUDGET: usize = 64 << 10;
/// Minimum and maximum number of bytes read from one process in one iteration.
const SHARE: (usize, usize) = (1 << 10, 16 << 10);
/// Maximum number of bytes read from a dead process's pipe. A pipe holds less than this.
pub(super) const MAX_REST: usize = 1 << 20;
/// A line that is repeated is logged this many times; further repetitions are only counted.
const MAX_REPEATS: u32 = 10;
/// Interval at which the number of repetitions is logged.
const REPEATS_INTERVAL: Uptime = Uptime::from_secs(1);
/// Maximum number of dead processes whose output is still read.
const MAX_ORPHANED: usize = 64;

/// The process that writes a line of output. The log line's fields identify the process; a field without a value is
/// left out.
#[derive(Clone, Copy, Debug)]
pub(super) struct Writer<'a> {
    slot: Option<u32>,
    daemon: Option<&'a str>,
    cron: Option<&'a str>,
    pid: i32,
}

impl<'a> Writer<'a> {
    fn worker(slot: u32, pid: Pid) -> Self {
        Self { slot: Some(slot), daemon: None, cron: None, pid: pid.as_raw() }
    }

    pub(super) fn daemon(name: &'a str, pid: Pid) -> Self {
        Self { slot: None, daemon: Some(name), cron: None, pid: pid.as_raw() }
    }

    pub(super) fn job(name: &'a str, pid: Pid) -> Self {
        Self { slot: None, daemon: None, cron: Some(name), pid: pid.as_raw() }
    }
}

/// The output of one process and of the processes that it has started.
#[derive(Debug)]
pub(crate) struct Output {
    slot: u32,
    pid: Option<Pid>,
    reader: LineReader,
    filter: LineFilter,
    last_lines: LastLines,
}

impl Output {
    /// Creates the output of a new process. `pipe` must be non-blocking.
    pub(crate) fn new(slot: u32, pipe: OwnedFd) -> Self {
        Self {
            slot,
            pid: None,
            reader: LineReader::new(pipe),
            filter: LineFilter::new(),
            last_lines: LastLines::default(),
        }
    }

    /// Continues an output that a former master has been reading.
    pub(crate) fn resume(slot: u32, pipe: OwnedFd, partial: Vec<u8>) -> Self {
        let mut output = Self::new(slot, pipe);
        output.reader.partial = partial;
        output
    }

    /// Returns the state to save for the next master during an upgrade. `pid` is the process that writes the output.
    pub(crate) fn save(&self, pid: Pid) -> SavedOutput {
        let (fd, partial) = (self.as_fd().as_raw_fd(), self.reader.partial.clone());
        SavedOutput { slot: self.slot, pid: pid.as_raw(), fd, partial }
    }

    /// Logs up to `most` bytes of output. Returns false at the end of the output.
    pub(crate) fn read(&mut self, pid: Pid, most: usize, now: Uptime) -> bool {
        self.pid = Some(pid);
        let Self { slot, reader, filter, last_lines, .. } = self;
        let writer = Writer::worker(*slot, pid);
        let open = reader.read(most, &mut |line, is_whole| {
            last_lines.push(line);
            filter.log(writer, line, is_whole, now);
        });
        if !open {
            self.end(now);
        }
        open
    }

    pub(crate) fn last_lines(&self) -> LastLines {
        self.last_lines.clone()
    }

    /// Returns the time at which [`Output::tick`] has something to log.
    pub(crate) fn next_deadline(&self) -> Option<Uptime> {
        self.filter.due()
    }

    pub(crate) fn tick(&mut self, now: Uptime) {
        let Some(pid) = self.pid else { return };
        self.filter.tick(Writer::worker(self.slot, pid), now);
    }

    /// Logs the remaining output, even if its last line has no line feed.
    fn end(&mut self, now: Uptime) {
        let Some(pid) = self.pid else { return };
        let Self { slot, reader, filter, last_lines, .. } = self;
        let writer = Writer::worker(*slot, pid);
        reader.finish(&mut |line, is_whole| {
            last_lines.push(line);
            filter.log(writer, line, is_whole, now);
        });
        filter.end(writer);
    }
}

impl AsFd for Output {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.reader.pipe.as_fd()
    }
}

impl AsFd for LineReader {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pipe.as_fd()
    }
}

/// Returns the number of bytes to read from each of `processes` in one iteration: 0 while the log's reader is slow.
pub(crate) fn share(processes: usize) -> usize {
    if logging::is_slow_for().is_some() {
        return 0;
    }
    (READ_BUDGET / processes.max(1)).clamp(SHARE.0, SHARE.1)
}

/// The outputs of dead processes whose heirs and children may still write.
#[derive(Debug, Default)]
pub(crate) struct OrphanedOutputs(Vec<Output>);

impl OrphanedOutputs {
    /// Takes over the output of the dead process `pid`. Returns the last lines of the output.
    pub(crate) fn adopt(&mut self, mut output: Output, pid: Pid, now: Uptime) -> LastLines {
        if !output.read(pid, MAX_REST, now) {
            return output.last_lines();
        }
        output.end(now); // the dead process cannot finish its line
        let last_lines = output.last_lines();
        if self.0.len() == MAX_ORPHANED {
            let mut oldest = self.0.remove(0);
            oldest.end(now);
            log::warn!(
                slot = oldest.slot, pid = oldest.pid.map(Pid::as_raw);
                "stopped logging what a dead process's children write: too many dead processes have such children"
            );
        }
        self.0.push(output);
        last_lines
    }

    /// Returns the state to save for the next master during an upgrade.
    pub(crate) fn save(&self) -> Vec<SavedOutput> {
        self.0.iter().filter_map(|output| Some(output.save(output.pid?))).collect()
    }

    pub(crate) fn read(&mut self, now: Uptime) {
        let most = share(self.0.len());
        self.0.retain_mut(|output| output.pid.is_some_and(|pid| output.read(pid, most, now)));
        self.0.iter_mut().for_each(|output| output.tick(now));
    }

    /// Logs the remaining output when the master ends.
    pub(crate) fn finish(&mut self, now: Uptime) {
        for mut output in self.0.drain(..) {
            if output.pid.is_some_and(|pid| output.read(pid, MAX_REST, now)) {
                output.end(now);
            }
        }
    }

    pub(crate) fn next_deadline(&self) -> Option<Uptime> {
        self.0.iter().filter_map(Output::next_deadline).min()
    }

    pub(crate) fn watched(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.0.iter().map(AsFd::as_fd)
    }
}

/// Decides which lines of one writer are logged.
#[derive(Debug)]
pub(super) struct LineFilter {
    repeats: Repeats,
    limit: ByteLimit,
}

impl LineFilter {
    pub(super) fn new() -> Self {
        Self { repeats: Repeats::default(), limit: ByteLimit::new(logging::output_rate()) }
    }

    /// Logs a line of output, if the limits permit it.
    pub(super) fn log(&mut self, writer: Writer<'_>, line: &str, is_whole: bool, now: Uptime) {
        if self.admits(writer, line, now) {
            let mark = if is_whole { "" } else { CONTINUED };
            let Writer { slot, daemon, cron, pid } = writer;
            log::info!(target: OUTPUT, slot, daemon, cron, pid; "{line}{mark}");
        }
    }

    /// Whether a line is to be logged. Before that line, logs how many lines were omitted.
    fn admits(&mut self, writer: Writer<'_>, line: &str, now: Uptime) -> bool {
        let Verdict { count, log } = self.repeats.take(line, now);
        if let Some(count) = count {
            log_repeats(writer, count);
        }
        if !log {
            return false;
        }
        let Admission { left_out, is_admitted } = self.limit.take(line.len() + 1, now);
        if let Some(left_out) = left_out {
            log_left_out(writer, left_out);
        }
        is_admitted
    }

    /// Returns the time at which [`LineFilter::tick`] has something to log.
    pub(super) fn due(&self) -> Option<Uptime> {
        [self.repeats.due, self.limit.due()].into_iter().flatten().min()
    }

    pub(super) fn tick(&mut self, writer: Writer<'_>, now: Uptime) {
        if let Some(count) = self.repeats.tick(now) {
            log_repeats(writer, count);
        }
        if let Some(left_out) = self.limit.tick(now) {
            log_left_out(writer, left_out);
        }
    }

    /// Logs the remaining counts at the end of the output.
    pub(super) fn end(&mut self, writer: Writer<'_>) {
        if let Some(count) = self.repeats.end() {
            log_repeats(writer, count);
        }
        if let Some(left_out) = self.limit.end() {
            log_left_out(writer, left_out);
        }
    }
}

fn log_repeats(Writer { slot, daemon, cron, pid }: Writer<'_>, times: u64) {
    log::info!(slot, daemon, cron, pid, times; "the last line of output was repeated");
}

fn log_left_out(writer: Writer<'_>, LeftOut { lines, bytes }: LeftOut) {
    let Writer { slot, daemon, cron, pid } = writer;
    log::warn!(slot, daemon, cron, pid, lines, bytes; "output was left out of the log (--output-rate)");
}

/// Detects repeated lines. Makes no system call, and reads no clock.
#[derive(Debug, Default)]
struct Repeats {
    last: String,
    /// Number of consecutive times that the last line was received.
    row: u32,
    /// Number of repetitions that have not been logged.
    held: u64,
    due: Option<Uptime>,
}

/// The decision about a line.
#[derive(Debug, PartialEq, Eq)]
struct Verdict {
    /// How many times the previous line was repeated, to be logged first.
    count: Option<u64>,
    /// Whether the line itself is logged.
    log: bool,
}

impl Repeats {
    fn take(&mut self, line: &str, now: Uptime) -> Verdict {
        if self.row == 0 || line != self.last {
            let count = self.end();
            line.clone_into(&mut self.last);
            self.row = 1;
            return Verdict { count, log: true };
        }
        self.row = self.row.saturating_add(1);
        if self.row <= MAX_REPEATS {
            return Verdict { count: None, log: true };
        }
        self.held += 1;
        let due = *self.due.get_or_insert(now + REPEATS_INTERVAL);
        Verdict { count: if due <= now { self.tick(now) } else { None }, log: false }
    }

    fn tick(&mut self, now: Uptime) -> Option<u64> {
        self.due.take_if(|due| *due <= now)?;
        Some(std::mem::take(&mut self.held))
    }

    fn end(&mut self) -> Option<u64> {
        self.row = 0;
        self.due = None;
        Some(std::mem::take(&mut self.held)).filter(|&held| held > 0)
    }
}

/// The read end of a pipe, and its unfinished line.
#[derive(Debug)]
pub(super) struct LineReader {
    pipe: File,
    partial: Vec<u8>,
    open: bool,
}

impl LineReader {
    pub(super) fn new(pipe: OwnedFd) -> Self {
        Self::resume(pipe, Vec::new())
    }

    /// Creates a reader whose first line begins with `partial`.
    pub(super) fn resume(pipe: OwnedFd, partial: Vec<u8>) -> Self {
        Self { pipe: File::from(pipe), partial, open: true }
    }

    pub(super) fn partial(&self) -> &[u8] {
        &self.partial
    }

    /// Reads up to `most` bytes, and calls `line` for each complete line or part of a line. The second argument is false for a part that is
    /// continued. Returns false at the end of the output.
    pub(super) fn read(&mut self, mut most: usize, line: &mut impl FnMut(&str, bool)) -> bool {
        let mut buffer = [0; 8192];
        while most > 0 && self.open {
            let room = most.min(buffer.len());
            match self.pipe.read(&mut buffer[..room]) {
                Ok(0) => self.open = false,
                Ok(count) => {
                    self.take(&buffer[..count], line);
                    most -= count;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => self.open = false,
            }
        }
        self.open
    }

    /// Calls `line` for the last line if that line has no line feed.
    pub(super) fn finish(&mut self, line: &mut impl FnMut(&str, bool)) {
        if !self.partial.is_empty() {
            self.emit(line, true);
        }
    }

    fn take(&mut self, mut bytes: &[u8], line: &mut impl FnMut(&str, bool)) {
        while !bytes.is_empty() {
            // The partial line from a former build of this program may be longer than MAX_LINE.
            let room = MAX_LINE.saturating_sub(self.partial.len());
            let end = bytes.iter().take(room + 1).position(|&byte| byte == b'\n');
            let taken = end.unwrap_or(bytes.len().min(room));
            self.partial.extend_from_slice(&bytes[..taken]);
            bytes = &bytes[taken..];
            if end.is_some() {
                bytes = &bytes[1..];
                self.emit(line, true);
            } else if !bytes.is_empty() {
                self.emit(line, false);
            }
        }
    }

    fn emit(&mut self, line: &mut impl FnMut(&str, bool), is_whole: bool) {
        // If the text is UTF-8, a part must end between two characters.
        let cut = match std::str::from_utf8(&self.partial) {
            Err(error) if !is_whole && error.error_len().is_none() && error.valid_up_to() > 0 => error.valid_up_to(),
            _ => self.partial.len(),
        };
        let text = String::from_utf8_lossy(&self.partial[..cut]);
        line(text.trim_end_matches('\r'), is_whole);
        self.partial.drain(..cut);
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn pipe() -> (LineReader, File) {
        let (read, write) = nix::unistd::pipe2(nix::fcntl::OFlag::O_NONBLOCK).unwrap();
        (LineReader::new(read), File::from(write))
    }

    #[test]
    fn lines_are_whole_however_they_arrive() {
        let (mut reader, mut write) = pipe();
        let mut lines = Vec::new();
        let mut take = |line: &str, is_whole: bool| {
            assert!(is_whole);
            lines.push(line.to_owned());
        };
        for piece in ["one\ntw", "o\r\n", "", "\nlast"] {
            write.write_all(piece.as_bytes()).unwrap();
            assert!(reader.read(4, &mut take), "a few bytes in each call");
            assert!(reader.read(64, &mut take));
        }
        drop(write);
        assert!(!reader.read(64, &mut take));
        reader.finish(&mut take);
        assert_eq!(lines, ["one", "two", "", "last"]);
    }

    #[test]
    fn a_line_of_64_kib_is_logged_whole_and_a_longer_line_in_parts() {
        for (length, pieces) in
            [(MAX_LINE, vec![(MAX_LINE, true)]), (MAX_LINE + 1, vec![(MAX_LINE - 1, false), (2, true)])]
        {
            let (mut reader, mut write) = pipe();
            // The boundary between the parts is inside the last character.
            let mut text = vec![b'x'; length - 2];
            text.extend("é".as_bytes());
            let mut found = Vec::new();
            for piece in text.chunks(8192) {
                write.write_all(piece).unwrap();
                assert!(reader.read(usize::MAX, &mut |line, is_whole| found.push((line.len(), is_whole))));
            }
            write.write_all(b"\n").unwrap();
            reader.read(usize::MAX, &mut |line, is_whole| found.push((line.len(), is_whole)));
            assert_eq!(found, pieces);
        }
    }

    #[test]
    fn a_partial_line_from_a_former_build_may_be_longer_than_the_limit() {
        let (reader, mut write) = pipe();
        let mut reader = LineReader::resume(reader.pipe.into(), vec![b'x'; MAX_LINE + 100]);
        write.write_all(b"y\n").unwrap();
        let mut pieces = Vec::new();
        reader.read(usize::MAX, &mut |line, is_whole| pieces.push((line.len(), is_whole)));
        assert_eq!(pieces, [(MAX_LINE + 100, false), (1, true)]);
    }

    #[test]
    fn no_line_is_lost_in_any_history() {
        for seed in 0..500 {
            let mut random = fastrand::Rng::with_seed(seed);
            let (mut repeats, mut now) = (Repeats::default(), Uptime::from_secs(5));
            let (mut written, mut reported, mut logged) = ([0_u64; 2], [0_u64; 2], 0);
            let mut last = 0;
            for _ in 0..400 {
                now += Uptime::from_millis(random.u64(0..200));
                if random.u32(0..4) == 0
                    && let Some(count) = repeats.tick(now)
                {
                    assert!(count > 0, "seed {seed}");
                    reported[last] += count;
                    logged += 1;
                }
                let line = if random.u32(0..60) == 0 { 1 - last } else { last };
                let Verdict { count, log } = repeats.take(["a", "b"][line], now);
                reported[last] += count.unwrap_or(0);
                reported[line] += u64::from(log);
                logged += u32::from(log) + u32::from(count.is_some());
                written[line] += 1;
                last = line;
                assert!(repeats.due.is_none_or(|due| due <= now + REPEATS_INTERVAL), "seed {seed}");
                assert_eq!(repeats.held > 0, repeats.due.is_some(), "seed {seed}");
            }
            reported[last] += repeats.end().unwrap_or(0);
            assert_eq!(written, reported, "seed {seed}");
            assert!(logged < 300, "seed {seed}: {logged} lines");
        }
    }
}
