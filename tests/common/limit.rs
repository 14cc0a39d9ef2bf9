//! Limits the run time of tests, so that no test can hang. Contains a watchdog for the whole test binary, and functions that wait for child
//! processes and pipes. If a wait fails, its error names the awaited event.
//!
//! The watchdog is a thread that starts when this module is first used. When the binary has run for FORKYARD_TEST_LIMIT seconds (default:
//! 900), the watchdog prints the tests that are still running, all processes that the binary has started, and the output of the reporters.
//! Then it kills those processes and exits with status 1. `scripts/limit` enforces a limit from outside, for test binaries that do not use
//! this module.
//!
//! This module uses only the standard library, because crates that do not use `tests/common` include this file by its path.

#![allow(dead_code, unreachable_pub, reason = "each test binary uses only a part of this module")]

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read, Write};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel, sync_channel};
use std::sync::{Mutex, Once, PoisonError};
use std::time::{Duration, Instant};
use std::{fmt, fs, thread};

/// Maximum time that a test waits for an event that must happen. This is not a limit on speed, because a passing test never reaches it.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Maximum run time of a test binary, unless FORKYARD_TEST_LIMIT sets a different limit.
const BINARY_LIMIT: Duration = Duration::from_secs(900);

/// A function that prints the state of the servers.
type Reporter = fn(&mut dyn Write);

static REPORTERS: Mutex<Vec<Reporter>> = Mutex::new(Vec::new());

pub fn start() {
    static STARTED: Once = Once::new();
    STARTED.call_once(|| {
        let seconds = std::env::var("FORKYARD_TEST_LIMIT").ok().and_then(|text| text.parse().ok());
        let limit = seconds.map_or(BINARY_LIMIT, Duration::from_secs);
        thread::Builder::new().name("watchdog".into()).spawn(move || watch(limit)).expect("a thread can be started");
    });
}

/// Registers a reporter that the watchdog calls before it terminates the binary.
pub fn report_with(reporter: Reporter) {
    REPORTERS.lock().unwrap_or_else(PoisonError::into_inner).push(reporter);
}

#[expect(clippy::exit, reason = "only an exit terminates a test binary whose threads hang")]
fn watch(limit: Duration) {
    thread::sleep(limit);
    // `eprintln!` is captured in the threads of the test harness and in the threads that they start.
    let mut out = io::stderr();
    let _ = writeln!(out, "\nThis test binary has reached its limit of {} s (FORKYARD_TEST_LIMIT).", limit.as_secs());
    print_state(&mut out, std::process::id());
    for reporter in REPORTERS.lock().unwrap_or_else(PoisonError::into_inner).clone() {
        reporter(&mut out);
    }
    kill_trees(&children_of(std::process::id()));
    std::process::exit(1);
}

// ---- Processes ----

#[derive(Debug)]
struct Process {
    parent: u32,
    name: String,
    state: String,
    /// CPU time in clock ticks.
    cpu: u64,
}

/// Reads a `stat` file in `/proc` (see proc_pid_stat(5)).
fn read_stat(directory: &Path) -> Option<Process> {
    let stat = fs::read_to_string(directory.join("stat")).ok()?;
    let (before, after) = stat.rsplit_once(')')?;
    let fields: Vec<&str> = after.split_ascii_whitespace().collect();
    let number = |at: usize| fields.get(at).and_then(|field| field.parse::<u64>().ok());
    Some(Process {
        parent: u32::try_from(number(1)?).ok()?,
        name: before.split_once('(')?.1.to_owned(),
        state: (*fields.first()?).to_owned(),
        cpu: number(11)? + number(12)?,
    })
}

fn numbered(directory: &Path) -> Vec<u32> {
    let entries = fs::read_dir(directory).into_iter().flatten().filter_map(Result::ok);
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

fn processes() -> BTreeMap<u32, Process> {
    let directory = |pid: u32| Path::new("/proc").join(pid.to_string());
    numbered(Path::new("/proc")).into_iter().filter_map(|pid| Some((pid, read_stat(&directory(pid))?))).collect()
}

fn children_of(pid: u32) -> BTreeSet<u32> {
    processes().into_iter().filter(|(_, process)| process.parent == pid).map(|(pid, _)| pid).collect()
}

/// Prints the threads of a test binary and all its descendant processes. Each test runs in a thread with the test's name.
pub fn print_state(out: &mut dyn Write, pid: u32) {
    let directory = Path::new("/proc").join(pid.to_string());
    let _ = writeln!(out, "--- the threads of the test binary (pid {pid}):");
    for thread in numbered(&directory.join("task")) {
        let _ = write_line(out, "  ", thread, &directory.join("task").join(thread.to_string()));
    }
    let _ = writeln!(out, "--- its processes:");
    let all = processes();
    print_below(out, &all, pid, 1);
}

fn print_below(out: &mut dyn Write, all: &BTreeMap<u32, Process>, parent: u32, depth: usize) {
    for pid in all.iter().filter(|(_, process)| process.parent == parent).map(|(pid, _)| *pid) {
        let _ = write_line(out, &"  ".repeat(depth), pid, &Path::new("/proc").join(pid.to_string()));
        if depth < 32 {
            print_below(out, all, pid, depth + 1);
        }
    }
}

/// Writes what a process or thread is doing: where it sleeps in the kernel, and in which system call, if the kernel allows this to be read.
fn write_line(out: &mut dyn Write, indent: &str, pid: u32, directory: &Path) -> Option<()> {
    let Process { name, state, cpu, .. } = read_stat(directory)?;
    let read = |file: &str| fs::read_to_string(directory.join(file)).unwrap_or_default();
    let command = read("cmdline").replace('\0', " ");
    let call = read("syscall").split(' ').next().unwrap_or_default().trim().to_owned();
    let waits = read("wchan");
    writeln!(out, "{indent}{pid} {name} state={state} ticks={cpu} syscall={call} wchan={waits} {command}").ok()
}

/// Kills these processes and all their descendants. The processes are stopped first, so that none of them can start another process.
pub fn kill_trees(roots: &BTreeSet<u32>) {
    kill_trees_but(roots, 0);
}

/// Like [`kill_trees`], but spares one process and its descendants.
pub fn kill_trees_but(roots: &BTreeSet<u32>, spared: u32) {
    let mut found = BTreeSet::new();
    loop {
        let all = processes();
        let is_new = |pid: &u32| {
            let process = &all[pid];
            let below = roots.contains(pid) || found.contains(&process.parent);
            below && *pid != spared && !found.contains(pid) && !process.state.starts_with(['Z', 'X'])
        };
        let new: BTreeSet<u32> = all.keys().copied().filter(is_new).collect();
        if new.is_empty() {
            break;
        }
        send("STOP", &new);
        found.extend(new);
    }
    send("KILL", &found);
}

fn send(signal: &str, pids: &BTreeSet<u32>) {
    let pids: Vec<String> = pids.iter().map(ToString::to_string).collect();
    let script = format!("kill -{signal} {} 2>/dev/null", pids.join(" "));
    let _ = Command::new("sh").args(["-c", &script]).status();
}

// ---- Commands ----

/// Runs a command until it exits. If the command is still running after [`PATIENCE`], it is killed with its descendants, and the test
/// panics.
pub trait InTime {
    /// Like [`Command::output`], with an empty standard input.
    fn output_in_time(&mut self) -> io::Result<Output>;
    /// Like [`Command::output`], with the command's own standard input.
    fn output_with_input_in_time(&mut self) -> io::Result<Output>;
    /// Like [`Command::status`].
    fn status_in_time(&mut self) -> io::Result<ExitStatus>;
}

impl InTime for Command {
    fn output_in_time(&mut self) -> io::Result<Output> {
        self.stdin(Stdio::null()).output_with_input_in_time()
    }

    fn output_with_input_in_time(&mut self) -> io::Result<Output> {
        let child = self.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        Ok(output_of(child, &format!("{self:?}")))
    }

    fn status_in_time(&mut self) -> io::Result<ExitStatus> {
        Ok(end_of(&mut self.spawn()?, &format!("{self:?}")))
    }
}

/// Waits until a child exits. After [`PATIENCE`], kills the child with its descendants, and panics.
pub fn end_of(child: &mut Child, what: &str) -> ExitStatus {
    end_before(Instant::now() + PATIENCE, child).unwrap_or_else(|| {
        kill_trees(&BTreeSet::from([child.id()]));
        panic!("{what}: has not exited in {PATIENCE:?}, and was killed")
    })
}

fn end_before(deadline: Instant, child: &mut Child) -> Option<ExitStatus> {
    start();
    loop {
        let status = child.try_wait().expect("the process is a child of the test");
        if status.is_some() || Instant::now() >= deadline {
            return status;
        }
        thread::park_timeout(Duration::from_millis(1));
    }
}

/// Like `Child::wait_with_output`, with a time limit.
pub fn output_of(mut child: Child, what: &str) -> Output {
    drop(child.stdin.take());
    let (out, err) = (child.stdout.take().map(collect), child.stderr.take().map(collect));
    let end = end_before(Instant::now() + PATIENCE, &mut child);
    if end.is_none() {
        kill_trees(&BTreeSet::from([child.id()]));
    }
    let rest = |pipe: Option<Receiver<Vec<u8>>>, name: &str| {
        let Some(pipe) = pipe else { return Vec::new() };
        pipe.recv_timeout(PATIENCE)
            .unwrap_or_else(|_| panic!("{what}: has exited, but its {name} has not ended in {PATIENCE:?}"))
    };
    let (stdout, stderr) = (rest(out, "standard output"), rest(err, "standard error"));
    let Some(status) = end else {
        let said = String::from_utf8_lossy(&[stdout, stderr].concat()).into_owned();
        panic!("{what}: has not exited in {PATIENCE:?}, and was killed. Its output: {said}");
    };
    Output { status, stdout, stderr }
}

fn collect(mut stream: impl Read + Send + 'static) -> Receiver<Vec<u8>> {
    let (sender, all) = channel();
    thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = stream.read_to_end(&mut bytes);
        let _ = sender.send(bytes);
    });
    all
}

/// The reading end of a pipe, or of another stream without timeouts. Each read has a time limit. A thread reads from the stream.
pub struct Pipe {
    pieces: Receiver<io::Result<Vec<u8>>>,
    /// Received data that has not been read yet.
    buffer: Vec<u8>,
}

impl fmt::Debug for Pipe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pipe").finish_non_exhaustive()
    }
}

impl Pipe {
    pub fn of(mut stream: impl Read + Send + 'static) -> Self {
        start();
        // While the test does not read, the thread takes at most one or two buffers from the stream.
        let (sender, pieces) = sync_channel(0);
        thread::spawn(move || {
            let mut piece = vec![0; 8 << 10];
            loop {
                let outcome = match stream.read(&mut piece) {
                    Ok(0) => return,
                    Ok(count) => Ok(piece[..count].to_vec()),
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                    Err(error) => Err(error),
                };
                let failed = outcome.is_err();
                if sender.send(outcome).is_err() || failed {
                    return;
                }
            }
        });
        Self { pieces, buffer: Vec::new() }
    }

    /// Waits for the next data. Returns false at the end of the stream.
    fn fill(&mut self, deadline: Instant) -> io::Result<bool> {
        match self.pieces.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(piece) => self.buffer.extend(piece?),
            Err(RecvTimeoutError::Disconnected) => return Ok(false),
            Err(RecvTimeoutError::Timeout) => return Err(io::ErrorKind::TimedOut.into()),
        }
        Ok(true)
    }

    /// Reads up to and including this byte. Returns less data, or none, at the end of the stream.
    pub fn until(&mut self, end: u8, what: &str) -> Vec<u8> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(at) = self.buffer.iter().position(|byte| *byte == end) {
                return self.buffer.drain(..=at).collect();
            }
            match self.fill(deadline) {
                Ok(true) => {}
                Ok(false) => return std::mem::take(&mut self.buffer),
                Err(error) => panic!("{what}: {error} after {:?}", String::from_utf8_lossy(&self.buffer)),
            }
        }
    }

    /// Reads the next line, with its line ending. Returns an empty string at the end of the stream.
    pub fn line(&mut self, what: &str) -> String {
        String::from_utf8(self.until(b'\n', what)).unwrap_or_else(|error| panic!("{what}: {error}"))
    }

    /// Reads the rest of the stream.
    pub fn rest(&mut self, what: &str) -> Vec<u8> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.fill(deadline) {
                Ok(true) => {}
                Ok(false) => return std::mem::take(&mut self.buffer),
                Err(error) => panic!("{what}: {error} after {:?}", String::from_utf8_lossy(&self.buffer)),
            }
        }
    }
}

impl Read for Pipe {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.buffer.is_empty() {
            self.fill(Instant::now() + PATIENCE)?;
        }
        let count = self.buffer.len().min(buffer.len());
        buffer[..count].copy_from_slice(&self.buffer[..count]);
        self.buffer.drain(..count);
        Ok(count)
    }
}
