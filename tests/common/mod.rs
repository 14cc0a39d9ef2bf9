//! Code shared by the integration tests. It starts the real programs, waits for them without sleeping, and always terminates them.
//! Everything that a test creates is in its own temporary directory, listens on loopback or a Unix socket, and is removed with the test.
//!
//! No test can hang. Every wait has a time limit, and its failure names the awaited event. Tests wait with [`wait_until`] and the functions
//! based on it, sockets with timeouts ([`connect_tcp`], [`connect_unix`] and the clients), [`limit::InTime`] for commands,
//! [`limit::end_of`] for children, [`limit::Pipe`] for their output, and [`received`] for channels. A thread that runs until a flag is set
//! uses a [`StopOnDrop`], so that a panic stops the thread too. The whole binary also has a time limit (see [`limit`]).

#![allow(dead_code, unreachable_pub, reason = "each test binary uses only a part of this module")]
#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "test code outside of test functions")]

pub mod fastcgi;
pub mod gateway;
pub mod http;
pub mod http2;
pub mod limit;
pub mod load;
pub mod nginx;
pub mod raw;
pub mod recipes;
pub mod refuse;
pub mod run;
pub mod scgi;
pub mod sse;

use std::collections::BTreeSet;
use std::io::{self, BufRead as _, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, AsRawFd as _, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, Once, PoisonError, Weak};
use std::time::{Duration, Instant};

use forkyard_shm::Segment;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigHandler, Signal, kill, signal};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, setsockopt, socket, sockopt};
use nix::sys::time::{TimeVal, TimeValLike as _};
use nix::unistd::Pid;

pub use limit::PATIENCE;

/// Returns the path of a built program: `forkyard`, or an example.
pub fn program(name: &str) -> PathBuf {
    let test = std::env::current_exe().expect("the test knows its own path");
    let target = test.parent().and_then(Path::parent).expect("tests are in target/PROFILE/deps");
    let path = if name == "forkyard" { target.join(name) } else { target.join("examples").join(name) };
    assert!(path.exists(), "{} is not built: run scripts/test, or cargo build --examples --bins", path.display());
    path
}

/// Restores the default actions of ignored signals. A shell starts background jobs (`&`) with SIGINT and SIGQUIT ignored, and nohup ignores
/// SIGHUP. A server inherits ignored signals from the tests, and such a signal is lost if it arrives before the server has installed its
/// handlers.
#[expect(unsafe_code, reason = "an action that runs code could be unsound; the default action runs none")]
fn stop_ignoring_signals() {
    static DONE: Once = Once::new();
    DONE.call_once(|| {
        for number in [Signal::SIGINT, Signal::SIGQUIT, Signal::SIGHUP] {
            // SAFETY: the default action runs no code of this process.
            unsafe { signal(number, SigHandler::SigDfl) }.expect("the signal has a default action");
        }
    });
}

/// The log of a server, and other data that the watchdog prints about the server.
struct Log {
    pid: Pid,
    command: String,
    /// Name of the thread that started the server. A test's thread has the name of the test.
    test: String,
    lines: Mutex<Vec<String>>,
}

impl Log {
    fn text(&self) -> String {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner).join("\n")
    }
}

/// The running servers of this binary, for the watchdog.
static SERVERS: Mutex<Vec<Weak<Log>>> = Mutex::new(Vec::new());

fn register(log: &Arc<Log>) {
    static REPORTED: Once = Once::new();
    REPORTED.call_once(|| limit::report_with(report_servers));
    limit::start();
    let mut servers = SERVERS.lock().unwrap_or_else(PoisonError::into_inner);
    servers.retain(|server| server.strong_count() > 0);
    servers.push(Arc::downgrade(log));
}

fn report_servers(out: &mut dyn Write) {
    let servers: Vec<_> =
        SERVERS.lock().unwrap_or_else(PoisonError::into_inner).iter().filter_map(Weak::upgrade).collect();
    for server in servers {
        let Log { pid, command, test, .. } = &*server;
        let _ = writeln!(out, "--- the server pid={pid} of the test {test}: {command}");
        if let Some(segment) = memory_of(*pid) {
            let board = segment.scoreboard();
            for (slot, row) in (0..board.rows()).filter_map(|slot| Some((slot, board.read(slot)?))) {
                if row.pid != 0 {
                    let _ = writeln!(out, "slot {slot}: {row:?}");
                }
            }
        }
        let _ = writeln!(out, "the log of the server:\n{}", server.text());
    }
}

/// A running master and its log. Dropping it stops the master, and checks that none of its processes is left.
pub struct Server {
    child: Child,
    log: Arc<Log>,
    log_ended: Arc<AtomicBool>,
    /// In a mutex, so that several threads can share a server.
    lines: Mutex<Receiver<String>>,
    runs_programs: bool,
    /// The addresses in the banner, in order: `http://127.0.0.1:4711` or `fastcgi:unix:/path`.
    pub binds: Vec<String>,
}

impl Server {
    /// Starts an example or `forkyard`, and waits until the server is ready.
    pub fn start(name: &str, arguments: &[&str]) -> Self {
        Self::start_command(Command::new(program(name)).args(arguments))
    }

    pub fn start_command(command: &mut Command) -> Self {
        let mut server = Self::launch(command);
        server.wait_for("ready in ");
        server
    }

    /// Starts the server without waiting until it is ready.
    pub fn launch(command: &mut Command) -> Self {
        stop_ignoring_signals();
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
        let stderr = child.stderr.take().expect("standard error is piped");
        let (sender, lines) = channel();
        let log = Arc::new(Log {
            pid: Pid::from_raw(child.id().cast_signed()),
            command: format!("{command:?}"),
            test: std::thread::current().name().unwrap_or("?").to_owned(),
            lines: Mutex::default(),
        });
        register(&log);
        let copy = Arc::clone(&log);
        let log_ended = Arc::new(AtomicBool::new(false));
        let ended = Arc::clone(&log_ended);
        std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                copy.lines.lock().unwrap().push(line.clone());
                let _ = sender.send(line);
            }
            drop(copy);
            ended.store(true, Ordering::SeqCst);
        });
        let runs_programs = command.get_args().any(|argument| argument == "run");
        Self { child, log, log_ended, lines: Mutex::new(lines), runs_programs, binds: Vec::new() }
    }

    /// Waits for a log line that contains `what`, and returns the line. The search begins after the line that the previous call returned.
    /// For lines whose order is not fixed, use [`Server::logged`].
    pub fn wait_for(&mut self, what: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let Ok(line) = self.lines.get_mut().unwrap().recv_timeout(left) else {
                panic!("no line with {what:?} was logged. The log:\n{}", self.log());
            };
            if let Some(bind) = line.strip_prefix("  bind     ") {
                self.binds.push(bind.to_owned());
            }
            if line.contains(what) {
                return line;
            }
        }
    }

    /// Waits until any line of the whole log contains `what`, and returns the first such line.
    pub fn logged(&self, what: &str) -> String {
        wait_until(&format!("a line with {what:?} in the log"), || {
            self.log.lines.lock().unwrap().iter().find(|line| line.contains(what)).cloned()
        })
    }

    pub fn log(&self) -> String {
        self.log.text()
    }

    /// Returns `HOST:PORT` of the first `http` bind.
    pub fn http(&self) -> String {
        let bind = self.binds.iter().find_map(|bind| bind.strip_prefix("http://"));
        bind.expect("there is an http bind").to_owned()
    }

    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id().cast_signed())
    }

    /// Maps the server's shared memory. Does not support a segment in a file, because no other process may open the file.
    pub fn segment(&self) -> Segment {
        self.memory().expect("the master holds a sealed memory file")
    }

    fn memory(&self) -> Option<Segment> {
        memory_of(self.pid())
    }

    /// Returns the pids of the running workers: the processes with a row in the scoreboard. If the scoreboard cannot be read, and under
    /// `run`, where workers have no rows, returns the pids of all children.
    pub fn workers(&self) -> BTreeSet<i32> {
        match self.memory() {
            Some(segment) if !self.runs_programs => {
                let board = segment.scoreboard();
                let pids = (0..board.rows()).filter_map(|slot| i32::try_from(board.read(slot)?.pid).ok());
                pids.filter(|&pid| !is_gone(pid)).collect()
            }
            _ => self.children(),
        }
    }

    /// Checks that the server has exactly these workers and no other children, such as failed attempts or zombies.
    pub fn has_only(&self, workers: &BTreeSet<i32>) {
        assert_eq!(&self.workers(), workers);
        wait_until("the server has no other children", || (self.children() == *workers).then_some(()));
    }

    /// Waits until all workers in `old` are gone and there are `count` workers.
    pub fn renewed(&self, count: usize, old: &BTreeSet<i32>) -> BTreeSet<i32> {
        wait_until("the workers are replaced", || {
            let workers = self.workers();
            (workers.len() == count && old.iter().all(|&pid| is_gone(pid))).then_some(workers)
        })
    }

    /// Returns the pids of all children: workers, sidecars and zombies, but not heirs.
    pub fn children(&self) -> BTreeSet<i32> {
        children_of(self.pid())
    }

    pub fn signal(&self, signal: Signal) {
        kill(self.pid(), signal).expect("the master is running");
    }

    /// Waits until the master has exited and its log has ended. Returns the exit status.
    pub fn wait_end(&mut self) -> Option<i32> {
        let status =
            wait_until("the master has exited", || self.child.try_wait().expect("the master is a child of the test"));
        wait_until("the log of the master has ended", || self.log_ended.load(Ordering::SeqCst).then_some(()));
        status.code()
    }

    /// Stops the master gracefully, and checks its exit status.
    pub fn stop(&mut self) {
        self.signal(Signal::SIGTERM);
        assert_eq!(self.wait_end(), Some(0), "the log:\n{}", self.log());
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = kill(self.pid(), Signal::SIGINT);
            let deadline = Instant::now() + PATIENCE;
            while matches!(self.child.try_wait(), Ok(None)) && Instant::now() < deadline {
                std::thread::park_timeout(Duration::from_millis(2));
            }
            if matches!(self.child.try_wait(), Ok(None)) {
                limit::kill_trees(&BTreeSet::from([self.child.id()]));
            }
            let _ = self.child.wait();
        }
        if std::thread::panicking() {
            eprintln!("--- the log of the master:\n{}", self.log());
        }
    }
}

/// Another program that a test needs, such as a web server. Dropping it terminates the program.
pub struct Helper(pub Child);

impl Helper {
    pub fn start(command: &mut Command) -> Self {
        limit::start();
        Self(command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error} (scripts/test installs it)")))
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        // SIGTERM first, because a program may have its own children.
        let _ = kill(Pid::from_raw(self.0.id().cast_signed()), Signal::SIGTERM);
        let deadline = Instant::now() + Duration::from_secs(5);
        while matches!(self.0.try_wait(), Ok(None)) && Instant::now() < deadline {
            std::thread::park_timeout(Duration::from_millis(2));
        }
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Calls `ask` repeatedly until it returns a value.
pub fn wait_until<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    limit::start();
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(Instant::now() < deadline, "did not happen within {PATIENCE:?}: {what}");
        std::thread::park_timeout(Duration::from_millis(1));
    }
}

/// Returns the next message of a channel. Panics if none arrives in time.
pub fn received<T>(messages: &Receiver<T>, what: &str) -> T {
    match messages.recv_timeout(PATIENCE) {
        Ok(message) => message,
        Err(RecvTimeoutError::Timeout) => panic!("did not arrive within {PATIENCE:?}: {what}"),
        Err(RecvTimeoutError::Disconnected) => panic!("the sender has been dropped: {what}"),
    }
}

/// Sets a flag when it is dropped, including by a panic. `thread::scope` requires this for threads that run until the flag is set, because
/// it waits for these threads even after a panic.
pub struct StopOnDrop<'a>(pub &'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// Connects over TCP, with timeouts for the connect and for each read and write.
pub fn connect_tcp(address: impl ToSocketAddrs) -> io::Result<TcpStream> {
    limit::start();
    let addresses: Vec<SocketAddr> = address.to_socket_addrs()?.collect();
    let mut outcome = Err(io::Error::other("the name has no address"));
    for address in addresses {
        outcome = TcpStream::connect_timeout(&address, PATIENCE);
        if outcome.is_ok() {
            break;
        }
    }
    let stream = outcome?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    Ok(stream)
}

/// Like [`connect_tcp`], for a Unix socket. The socket's accept queue may be full.
pub fn connect_unix(path: impl AsRef<Path>) -> io::Result<UnixStream> {
    limit::start();
    let socket = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    let patience = TimeVal::milliseconds(i64::try_from(PATIENCE.as_millis()).expect("the timeout is short"));
    setsockopt(&socket, sockopt::SendTimeout, &patience)?;
    setsockopt(&socket, sockopt::ReceiveTimeout, &patience)?;
    let path = path.as_ref();
    let address = match path.to_str().and_then(|path| path.strip_prefix('@')) {
        Some(name) => UnixAddr::new_abstract(name.as_bytes())?,
        None => UnixAddr::new(path)?,
    };
    connect(socket.as_raw_fd(), &address)?;
    Ok(socket.into())
}

/// Returns the next connection to a listener, with timeouts. Panics if none arrives in time.
pub fn accepted(listener: &TcpListener, what: &str) -> TcpStream {
    listener.set_nonblocking(true).expect("the socket is listening");
    let stream = wait_until(what, || listener.accept().ok()).0;
    stream.set_nonblocking(false).expect("the socket is connected");
    stream.set_read_timeout(Some(PATIENCE)).expect("the socket is connected");
    stream.set_write_timeout(Some(PATIENCE)).expect("the socket is connected");
    stream
}

/// Like [`accepted`], for a Unix socket.
pub fn accepted_unix(listener: &UnixListener, what: &str) -> UnixStream {
    listener.set_nonblocking(true).expect("the socket is listening");
    let stream = wait_until(what, || listener.accept().ok()).0;
    stream.set_nonblocking(false).expect("the socket is connected");
    stream.set_read_timeout(Some(PATIENCE)).expect("the socket is connected");
    stream.set_write_timeout(Some(PATIENCE)).expect("the socket is connected");
    stream
}

/// Reads one line from a pipe. Data after the line stays in the pipe. Panics if no line arrives in time.
pub fn line_of(pipe: &mut (impl Read + AsFd), what: &str) -> String {
    let deadline = Instant::now() + PATIENCE;
    let mut line = Vec::new();
    while !line.ends_with(b"\n") {
        let left = deadline.saturating_duration_since(Instant::now());
        let mut ready = [PollFd::new(pipe.as_fd(), PollFlags::POLLIN)];
        let count = poll(&mut ready, PollTimeout::try_from(left).expect("the timeout is short"));
        assert!(
            count != Ok(0),
            "did not arrive within {PATIENCE:?}: {what}, after {:?}",
            String::from_utf8_lossy(&line)
        );
        let mut byte = [0];
        if pipe.read(&mut byte).unwrap_or_else(|error| panic!("{what}: {error}")) == 0 {
            break;
        }
        line.extend_from_slice(&byte);
    }
    String::from_utf8(line).unwrap_or_else(|error| panic!("{what}: {error}"))
}

/// Reads to the end of the stream. The time limit applies to the whole read, so that a stream that keeps sending data does not extend it.
pub fn read_all(stream: &mut impl Read, into: &mut Vec<u8>) -> io::Result<()> {
    let deadline = Instant::now() + PATIENCE;
    let mut piece = vec![0; 64 << 10];
    loop {
        match stream.read(&mut piece) {
            Ok(0) => return Ok(()),
            Ok(count) => into.extend_from_slice(&piece[..count]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(awaited("the end of the stream", error)),
        }
        if Instant::now() >= deadline {
            return Err(io::Error::new(io::ErrorKind::TimedOut, format!("the stream did not end within {PATIENCE:?}")));
        }
    }
}

/// Adds the name of the awaited event to the error from a socket timeout.
pub fn awaited(what: &str, error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
            io::Error::new(error.kind(), format!("{what} did not arrive in time ({error})"))
        }
        _ => error,
    }
}

fn memory_of(master: Pid) -> Option<Segment> {
    let descriptors = std::fs::read_dir(format!("/proc/{master}/fd")).ok()?;
    descriptors.filter_map(|entry| segment_at(&entry.ok()?.path())).next()
}

fn segment_at(path: &Path) -> Option<Segment> {
    let is_memfd = std::fs::read_link(path).is_ok_and(|to| to.to_string_lossy().contains("memfd:"));
    let file = is_memfd.then(|| std::fs::File::options().read(true).write(true).open(path))?.ok()?;
    Segment::attach(OwnedFd::from(file)).ok()
}

/// Returns the pids of the processes whose parent is `pid`, including zombies, except the heirs of dead workers and the guard. Under `run`,
/// a child with the master's name is also excluded: such a child has been forked, but has not set its own name yet.
pub fn children_of(pid: Pid) -> BTreeSet<i32> {
    let is_master = process(pid.as_raw()).is_some_and(|process| process.name == "forkyard");
    let is_left_out = |name: &str| ["heir", "guard"].contains(&name) || (is_master && name == "forkyard");
    let of_pid = processes().into_iter().filter(|process| process.parent == pid.as_raw());
    let children = of_pid.filter(|process| !is_left_out(&process.name));
    children.map(|process| process.pid).collect()
}

pub struct Process {
    pub pid: i32,
    pub name: String,
    pub parent: i32,
    pub state: char,
}

/// Returns all processes of the machine.
pub fn processes() -> Vec<Process> {
    let entries = std::fs::read_dir("/proc").expect("/proc is mounted").filter_map(Result::ok);
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter_map(process).collect()
}

/// Stops a process with SIGSTOP, and returns when all its threads have stopped.
pub fn stop(pid: Pid) {
    kill(pid, Signal::SIGSTOP).expect("the process is running");
    wait_until("the process is stopped", || {
        let threads = std::fs::read_dir(format!("/proc/{pid}/task")).ok()?;
        let mut states = threads.filter_map(|thread| field_of::<char>(&thread.ok()?.path(), 3));
        states.all(|state| state == 'T').then_some(())
    });
}

pub fn process(pid: i32) -> Option<Process> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let name = stat.rsplit_once(')')?.0.split_once('(')?.1.to_owned();
    let fields = fields(&stat)?;
    Some(Process { pid, name, parent: fields[1].parse().ok()?, state: fields[0].chars().next()? })
}

/// Returns whether the process is gone. A zombie counts as gone, because only its parent can reap it.
pub fn is_gone(pid: i32) -> bool {
    process(pid).is_none_or(|process| matches!(process.state, 'Z' | 'X'))
}

/// Returns the fields of a `stat` file in `/proc` (see proc_pid_stat(5)), beginning with the third, the state. The name before them is in
/// parentheses and may contain any character.
fn fields(stat: &str) -> Option<Vec<&str>> {
    Some(stat.rsplit_once(')')?.1.split_ascii_whitespace().collect())
}

/// Returns one field of `/proc/PID/stat` or `/proc/PID/task/TID/stat`, by its number in proc_pid_stat(5). The number must be at least 3.
pub fn field_of<T: FromStr>(directory: &Path, number: usize) -> Option<T> {
    fields(&std::fs::read_to_string(directory.join("stat")).ok()?)?.get(number - 3)?.parse().ok()
}

/// Returns the CPU time that a process or thread has used in kernel and user mode. `directory` is its directory in `/proc`.
pub fn cpu_time(directory: &Path) -> Duration {
    let ticks: u64 = [14, 15].map(|number| field_of::<u64>(directory, number).unwrap()).iter().sum();
    let second = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK).unwrap().unwrap();
    Duration::from_secs(ticks) / u32::try_from(second).unwrap()
}

pub fn proc_of(pid: i32) -> PathBuf {
    PathBuf::from(format!("/proc/{pid}"))
}

/// Returns the number of open descriptors of a process.
pub fn descriptors_of(pid: i32) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count)
}

/// Returns the number of open sockets of a process.
pub fn sockets_of(pid: i32) -> usize {
    let links = std::fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().filter_map(Result::ok);
    let targets = links.filter_map(|link| std::fs::read_link(link.path()).ok());
    targets.filter(|target| target.to_string_lossy().starts_with("socket:")).count()
}

/// Returns a number from `/proc/PID/status`, in KiB if that is its unit.
pub fn status_number(pid: i32, name: &str) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find(|line| line.split(':').next() == Some(name))?;
    line.split_ascii_whitespace().nth(1)?.parse().ok()
}

/// Returns a port that was free when the function returned, for a program that cannot choose a port itself. The port is below those that the
/// kernel chooses for other sockets (ip_local_port_range), so that only another caller of this function could take it.
pub fn free_port() -> u16 {
    let ports = std::iter::repeat_with(|| fastrand::u16(10_000..32_000)).take(1000);
    let is_free = |&port: &u16| std::net::TcpListener::bind(("127.0.0.1", port)).is_ok();
    ports.into_iter().find(is_free).expect("a port is free")
}

/// Whether the process has a TCP socket that listens on this port.
pub fn listens_on(pid: i32, port: u16) -> bool {
    let sockets =
        ["tcp", "tcp6"].map(|list| std::fs::read_to_string(format!("/proc/{pid}/net/{list}")).unwrap_or_default());
    let listening = sockets.iter().flat_map(|list| list.lines().skip(1)).filter_map(|line| {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        let local = fields.get(1)?.rsplit_once(':')?.1;
        let (state, inode) = (*fields.get(3)?, *fields.get(9)?);
        (state == "0A" && u16::from_str_radix(local, 16) == Ok(port)).then(|| format!("socket:[{inode}]"))
    });
    let listening: Vec<String> = listening.collect();
    let descriptors = std::fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    let mut links = descriptors.filter_map(|entry| std::fs::read_link(entry.path()).ok());
    links.any(|link| listening.iter().any(|socket| link.as_os_str() == socket.as_str()))
}
