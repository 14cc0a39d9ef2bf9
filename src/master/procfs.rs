//! Reads from `/proc` what other processes do not report: their children, and their use of the listening socket.
//!
//! Reading these facts requires the right to trace the process (ptrace(2)). A master has this right over its own
//! programs, unless they run as a different user while the master is not root, or the kernel forbids tracing.
//! [`Observed::Hidden`] means that nothing can be read.

use std::fs::{self, File};
use std::io::Read as _;
use std::os::fd::{AsFd as _, OwnedFd, RawFd};
use std::time::Duration;

use nix::sys::signal::Signal;
use nix::sys::socket::{SockaddrStorage, getsockname};
use nix::sys::stat::fstat;
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use crate::net::listen::Listener;
use crate::upgrade::saved_state::SavedProcess;
use crate::{heir, sys};

/// Maximum number of threads that are examined in one process, and of processes that are examined in one tree.
const MAX_PROCESSES: usize = 256;
/// Maximum number of bytes read from an environment.
const MAX_ENVIRONMENT: usize = 1 << 20;

/// Identifies a process even if its pid is reused. The process need not be a child of the master.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Process {
    pub(super) pid: i32,
    /// Start time, in ticks since the system booted.
    pub(super) started: u64,
}

impl From<Process> for SavedProcess {
    fn from(Process { pid, started }: Process) -> Self {
        Self { pid, started }
    }
}

impl From<SavedProcess> for Process {
    fn from(SavedProcess { pid, started }: SavedProcess) -> Self {
        Self { pid, started }
    }
}

/// Fields of `/proc/PID/stat`: see proc_pid_stat(5).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Stat {
    pub(super) name: String,
    pub(super) group: i32,
    pub(super) session: i32,
    pub(super) started: u64,
    /// Whether the process has exited and has not been reaped yet.
    pub(super) is_zombie: bool,
    /// Whether a signal has stopped the process, or the thread.
    is_stopped: bool,
    has_empty_environment: bool,
}

impl Stat {
    /// Whether the process is an heir. If an heir is a child of the master, the heir's worker is dead.
    pub(super) fn is_heir(&self) -> bool {
        self.name.as_bytes() == heir::NAME.to_bytes()
    }
}

/// The environment that a process was started with.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Environment {
    /// The environment, as `/proc` shows it. The process may have overwritten it.
    Shown(Vec<u8>),
    /// The process is in the middle of exec: it has its new name, and no environment yet.
    InExec,
    /// The environment cannot be read.
    Hidden,
}

/// How long an empty environment is taken to mean that the process is in the middle of exec. The kernel shows no
/// environment while it writes the new one.
const EMPTY_IN_EXEC: Duration = Duration::from_millis(90);

/// A process's use of the listening socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Observed {
    /// The process sleeps in accept.
    Accepting,
    /// The process has registered the socket with an epoll instance.
    Watching,
    /// The process, or one of its ancestors, has accepted a connection from the socket.
    Serving,
    /// The process has the socket open, and may be waiting for connections in a way that `/proc` does not show.
    Holding,
    /// The process does not have the socket open.
    Apart,
    /// The descriptors of the process cannot be read.
    Hidden,
}

impl Observed {
    /// Whether the process certainly accepts connections.
    pub(super) fn accepts(self) -> bool {
        matches!(self, Self::Accepting | Self::Watching)
    }

    /// Whether the process serves connections, or is a child of a process that does.
    pub(super) fn serves(self) -> bool {
        self.accepts() || self == Self::Serving
    }
}

impl Process {
    /// Identifies the process with this pid. Returns `None` if no such process exists, or if it has exited.
    pub(super) fn of(pid: Pid) -> Option<Self> {
        let stat = stat(pid).filter(|stat| !stat.is_zombie)?;
        Some(Self { pid: pid.as_raw(), started: stat.started })
    }

    pub(super) fn pid(self) -> Pid {
        Pid::from_raw(self.pid)
    }

    pub(super) fn lives(self) -> bool {
        Self::of(self.pid()) == Some(self)
    }
}

pub(super) fn stat(pid: Pid) -> Option<Stat> {
    stat_in(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

fn stat_in(text: &str) -> Option<Stat> {
    // The name may contain any character.
    let (head, rest) = text.rsplit_once(')')?;
    let name = head.split_once('(')?.1.to_owned();
    // `fields` begins with the third field of the file.
    let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
    let state = *fields.first()?;
    let started = fields.get(22 - 3)?.parse().ok()?;
    let [group, session] = [5, 6].map(|field| fields.get(field - 3)?.parse().ok());
    let is_zombie = matches!(state, "Z" | "X");
    let is_stopped = matches!(state, "T" | "t");
    // Start and end address of the environment. During exec, and for a hidden process, both are 0.
    let [from, to] = [50, 51].map(|field| fields.get(field - 3).and_then(|at| at.parse().ok()).unwrap_or(0_u64));
    Some(Stat {
        name,
        group: group?,
        session: session?,
        started,
        is_zombie,
        is_stopped,
        has_empty_environment: from > 0 && from == to,
    })
}

/// Returns all processes of the machine, or of the container.
pub(super) fn all() -> impl Iterator<Item = Pid> {
    let entries = fs::read_dir("/proc").into_iter().flatten().filter_map(Result::ok);
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).map(Pid::from_raw)
}

/// Returns the children of all threads of a process.
pub(super) fn children_of(pid: Pid) -> Vec<Pid> {
    let mut children = Vec::new();
    for thread in threads_of(pid) {
        let listed = fs::read_to_string(format!("/proc/{pid}/task/{thread}/children")).unwrap_or_default();
        children.extend(listed.split_ascii_whitespace().filter_map(|pid| pid.parse().ok()).map(Pid::from_raw));
    }
    children
}

/// Returns the children of the current process. This process must be single-threaded.
pub(super) fn own_children() -> Vec<Pid> {
    let listed = fs::read_to_string("/proc/thread-self/children").unwrap_or_default();
    listed.split_ascii_whitespace().filter_map(|pid| pid.parse().ok()).map(Pid::from_raw).collect()
}

fn threads_of(pid: Pid) -> Vec<i32> {
    let entries = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().filter_map(Result::ok);
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).take(MAX_PROCESSES).collect()
}

/// Returns these processes and all their running descendants.
pub(super) fn family_of(roots: &[Pid]) -> Vec<Pid> {
    let mut family: Vec<Pid> = roots.to_vec();
    let mut at = 0;
    while at < family.len() && family.len() < MAX_PROCESSES {
        family.extend(children_of(family[at]));
        at += 1;
    }
    family
}

/// Returns all running descendants of a process.
pub(super) fn descendants_of(pid: Pid) -> Vec<Pid> {
    family_of(&[pid]).split_off(1)
}

/// Returns those of the processes that have the socket with this inode open, with a descriptor of each.
pub(super) fn holders_of_socket(processes: &[Pid], inode: u32) -> Vec<(Pid, OwnedFd)> {
    if inode == 0 {
        return Vec::new();
    }
    let socket = format!("socket:[{inode}]");
    let holds = |pid: Pid| {
        let entries = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().filter_map(Result::ok);
        entries.filter_map(|entry| fs::read_link(entry.path()).ok()).any(|to| to.as_os_str() == socket.as_str())
    };
    // The descriptor is opened first, so that it belongs to the process that is examined.
    let holders = processes.iter().filter_map(|&pid| {
        let process = sys::process_descriptor(pid).ok()?;
        holds(pid).then_some((pid, process))
    });
    holders.collect()
}

/// The open descriptors of a process.
struct Descriptors {
    pid: Pid,
    open: Vec<(RawFd, String)>,
    /// The listening socket, as `/proc` names it.
    socket: String,
    /// The descriptors of the listening socket.
    at: Vec<RawFd>,
}

impl Descriptors {
    /// Reads the descriptors of `pid`. Returns `None` if they cannot be read.
    fn of(pid: Pid, listener: &Listener) -> Option<Self> {
        let socket = format!("socket:[{}]", fstat(listener.as_fd()).ok()?.st_ino);
        let entries = fs::read_dir(format!("/proc/{pid}/fd")).ok()?;
        let open: Vec<(RawFd, String)> = entries
            .filter_map(|entry| {
                let entry = entry.ok()?;
                let to = fs::read_link(entry.path()).ok()?;
                Some((entry.file_name().to_str()?.parse().ok()?, to.to_string_lossy().into_owned()))
            })
            .collect();
        if open.is_empty() {
            return None; // the process is exiting
        }
        let at = open.iter().filter(|(_, to)| *to == socket).map(|(fd, _)| *fd).collect();
        Some(Self { pid, open, socket, at })
    }

    fn is_accepting(&self) -> bool {
        let Self { pid, at, .. } = self;
        !at.is_empty() && threads_of(*pid).into_iter().any(|thread| is_accepting(*pid, thread, at))
    }

    fn has_connection(&self, listener: &Listener) -> bool {
        self.connections(listener).next().is_some()
    }

    /// Returns the connections that were accepted from the listening socket, as `/proc` names them.
    fn connections(&self, listener: &Listener) -> impl Iterator<Item = &str> {
        let Self { pid, socket, .. } = self;
        let sockets = self.open.iter().filter(move |(_, to)| to.starts_with("socket:") && to != socket);
        let mut process = None;
        sockets.filter_map(move |(fd, to)| {
            let process = process.get_or_insert_with(|| sys::process_descriptor(*pid).ok());
            is_connection(*pid, process.as_ref(), *fd, to, listener).then_some(to.as_str())
        })
    }

    /// The connections of the process if no request is in flight: none, or those that the process had inherited.
    fn idle(&self, listener: &Listener) -> Option<Idle> {
        let connections: Vec<String> = self.connections(listener).map(str::to_owned).collect();
        // If the process has only one thread and that thread sleeps in accept, any connection that the process holds
        // was inherited.
        let is_idle = connections.is_empty() || (self.is_accepting() && threads_of(self.pid).len() == 1);
        is_idle.then_some(Idle { connections })
    }

    fn is_watching(&self) -> bool {
        let mut epolls = self.open.iter().filter(|(_, to)| to == "anon_inode:[eventpoll]");
        epolls.any(|(fd, _)| is_watching(self.pid, *fd, &self.at))
    }
}

/// Returns how `pid` uses the socket.
pub(super) fn of(pid: Pid, listener: &Listener) -> Observed {
    match Descriptors::of(pid, listener) {
        None => Observed::Hidden,
        Some(descriptors) if descriptors.is_accepting() => Observed::Accepting,
        Some(descriptors) if descriptors.has_connection(listener) => Observed::Serving,
        Some(descriptors) if descriptors.is_watching() => Observed::Watching,
        Some(descriptors) if descriptors.at.is_empty() => Observed::Apart,
        Some(_) => Observed::Holding,
    }
}

/// A process that had no request in flight when it was examined.
#[derive(Debug)]
pub(super) struct Idle {
    /// The connections that the process had inherited, as `/proc` names them.
    connections: Vec<String>,
}

impl Idle {
    /// Examines a process. Returns `None` if it may have a request in flight, or if its descriptors cannot be read.
    pub(super) fn of(pid: Pid, listener: &Listener) -> Option<Self> {
        Descriptors::of(pid, listener)?.idle(listener)
    }

    /// Whether the process has accepted no connection since it was examined.
    pub(super) fn has_lasted(&self, pid: Pid, listener: &Listener) -> bool {
        Descriptors::of(pid, listener).is_some_and(|descriptors| {
            descriptors.connections(listener).all(|connection| self.connections.iter().any(|had| had == connection))
        })
    }
}

/// Whether the stop signal loses no request: either no request is in flight, or the process handles the signal and accepts
/// connections while it serves others (with an event loop, or with threads).
pub(super) fn can_be_asked(pid: Pid, signal: Signal, listener: &Listener) -> bool {
    let Some(descriptors) = Descriptors::of(pid, listener) else { return false };
    descriptors.idle(listener).is_some()
        || ((descriptors.is_accepting() || descriptors.is_watching()) && handles(pid, signal))
}

/// Whether the process has one thread, which does not watch the listening socket while it serves a connection.
pub(super) fn serves_one_at_a_time(pid: Pid, listener: &Listener) -> bool {
    Descriptors::of(pid, listener).is_some_and(|descriptors| !descriptors.is_watching() && threads_of(pid).len() == 1)
}

/// Whether all threads of a process have stopped after SIGSTOP.
pub(super) fn has_stopped(pid: Pid) -> bool {
    let threads = threads_of(pid);
    let stat = |thread: i32| stat_in(&fs::read_to_string(format!("/proc/{pid}/task/{thread}/stat")).ok()?);
    !threads.is_empty()
        && threads.into_iter().all(|thread| stat(thread).is_none_or(|stat| stat.is_stopped || stat.is_zombie))
}

/// Whether a process blocks, ignores or catches a signal (proc_pid_status(5)).
pub(super) fn handles(pid: Pid, signal: Signal) -> bool {
    ["SigBlk:", "SigIgn:", "SigCgt:"].iter().any(|name| {
        let mask = sys::process_status(pid, name).and_then(|mask| u64::from_str_radix(&mask, 16).ok());
        mask.is_some_and(|mask| mask >> (signal as i32 - 1) & 1 == 1)
    })
}

/// Whether a thread sleeps in accept on one of these descriptors.
fn is_accepting(pid: Pid, thread: i32, at: &[RawFd]) -> bool {
    let Ok(text) = fs::read_to_string(format!("/proc/{pid}/task/{thread}/syscall")) else { return false };
    let mut words = text.split_ascii_whitespace();
    let call = words.next().and_then(|number| number.parse().ok());
    let first = words.next().and_then(|word| RawFd::from_str_radix(word.trim_start_matches("0x"), 16).ok());
    matches!(call, Some(libc::SYS_accept | libc::SYS_accept4)) && first.is_some_and(|fd| at.contains(&fd))
}

/// Whether the epoll instance `epoll` of the process watches one of these descriptors.
fn is_watching(pid: Pid, epoll: RawFd, at: &[RawFd]) -> bool {
    let info = fs::read_to_string(format!("/proc/{pid}/fdinfo/{epoll}")).unwrap_or_default();
    let mut targets = info.lines().filter(|line| line.starts_with("tfd:"));
    targets.any(|line| {
        line.split_ascii_whitespace().nth(1).and_then(|fd| fd.parse().ok()).is_some_and(|fd| at.contains(&fd))
    })
}

/// Whether a socket of another process is a connection that was accepted from the listening socket. A connection that the process itself
/// has opened, for example to a database, is not.
fn is_connection(pid: Pid, process: Option<&OwnedFd>, fd: RawFd, link: &str, listener: &Listener) -> bool {
    use std::os::fd::AsRawFd as _;
    match process.and_then(|process| sys::descriptor_of(process, fd).ok()) {
        Some(socket) => getsockname::<SockaddrStorage>(socket.as_raw_fd()).is_ok_and(|near| listener.accepts_at(&near)),
        // The kernel is too old, or forbids copying the descriptor. In this case, use the kernel's list of sockets.
        None => link
            .strip_prefix("socket:[")
            .and_then(|rest| rest.strip_suffix(']'))
            .is_some_and(|inode| lists::is_connection(pid, inode, listener)),
    }
}

/// Reads the kernel's lists of sockets, for use when a descriptor cannot be copied.
mod lists {
    use nix::sys::socket::{SockaddrStorage, getsockname};

    use super::{Pid, fs};
    use crate::config::address::Address;
    use crate::net::listen::Listener;
    use crate::sys;

    pub(super) fn is_connection(pid: Pid, inode: &str, listener: &Listener) -> bool {
        use std::os::fd::{AsFd as _, AsRawFd as _};
        let list = |name: &str| fs::read_to_string(format!("/proc/{pid}/net/{name}")).unwrap_or_default();
        match &listener.address {
            Address::Path(path) => unix(&list("unix"), inode).is_some_and(|near| near == path.to_string_lossy()),
            Address::Abstract(name) => unix(&list("unix"), inode).is_some_and(|near| near == format!("@{name}")),
            Address::Tcp(_) | Address::Inherited(_) | Address::Systemd(_) => {
                let Ok(bound) = getsockname::<SockaddrStorage>(listener.as_fd().as_raw_fd()) else { return false };
                let Some(port) = sys::internet_address(&bound).map(|bound| bound.port()) else { return false };
                ["tcp", "tcp6"].iter().any(|name| tcp(&list(name), inode) == Some(port))
            }
        }
    }

    /// Returns the address of a Unix socket: the last column, if it is present.
    pub(super) fn unix(list: &str, inode: &str) -> Option<String> {
        let line = list.lines().find(|line| line.split_ascii_whitespace().nth(6) == Some(inode))?;
        line.split_ascii_whitespace().nth(7).map(str::to_owned)
    }

    /// Returns the local port of a TCP connection.
    pub(super) fn tcp(list: &str, inode: &str) -> Option<u16> {
        let line = list.lines().find(|line| line.split_ascii_whitespace().nth(9) == Some(inode))?;
        let near = line.split_ascii_whitespace().nth(1)?;
        u16::from_str_radix(near.rsplit_once(':')?.1, 16).ok()
    }
}

/// Returns the processes in the trees under `roots` that serve connections. Descendants of these processes are not
/// included, because they belong to requests.
pub(super) fn servers_under(roots: &[Pid], listener: &Listener) -> Vec<(Pid, Observed)> {
    let (mut servers, mut left, mut looks) = (Vec::new(), roots.to_vec(), 0);
    while let Some(pid) = left.pop() {
        looks += 1;
        let observed = of(pid, listener);
        if observed.serves() {
            servers.push((pid, observed));
        } else if looks < MAX_PROCESSES {
            left.extend(children_of(pid));
        }
    }
    servers
}

/// Returns the processes below `pid` that have the socket open: the topmost process of each branch, and the serving
/// processes below a topmost process that may itself be a wrapper.
pub(super) fn holders_under(pid: Pid, listener: &Listener) -> Vec<Pid> {
    let (mut holders, mut left, mut looks) = (Vec::new(), children_of(pid), 0);
    while let Some(pid) = left.pop() {
        looks += 1;
        match of(pid, listener) {
            Observed::Apart | Observed::Hidden if looks < MAX_PROCESSES => left.extend(children_of(pid)),
            Observed::Apart | Observed::Hidden => {}
            Observed::Holding => {
                holders.push(pid);
                holders.extend(servers_under(&children_of(pid), listener).into_iter().map(|(pid, _)| pid));
            }
            Observed::Accepting | Observed::Watching | Observed::Serving => holders.push(pid),
        }
    }
    holders
}

pub(super) fn environment_of(pid: Pid) -> Environment {
    let Ok(mut file) = File::open(format!("/proc/{pid}/environ")) else { return Environment::Hidden };
    let mut bytes = vec![0; MAX_ENVIRONMENT];
    // The environment is read in a single call, because an exec between two reads would truncate it.
    match file.read(&mut bytes) {
        Err(_) => Environment::Hidden,
        Ok(0) if stat(pid).is_some_and(|stat| !stat.is_zombie && !stat.has_empty_environment) => Environment::InExec,
        Ok(length) => {
            bytes.truncate(length);
            Environment::Shown(bytes)
        }
    }
}

impl Environment {
    /// Interprets an environment that a process has shown for `seen_for`: an empty one may mean that the process is in
    /// the middle of exec.
    pub(super) fn seen_for(self, seen_for: Duration) -> Self {
        match self {
            Self::Shown(bytes) if bytes.is_empty() && seen_for < EMPTY_IN_EXEC => Self::InExec,
            environment => environment,
        }
    }

    pub(super) fn variable(&self, name: &str) -> Option<String> {
        let Self::Shown(bytes) = self else { return None };
        let mut variables = bytes.split(|&byte| byte == 0).map(String::from_utf8_lossy);
        variables.find_map(|variable| Some(variable.strip_prefix(name)?.strip_prefix('=')?.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;
    use std::os::unix::net::{UnixListener, UnixStream};
    use std::process::{Child, Command, Stdio};

    use super::*;
    use crate::config::address::{Address, Bind};

    fn listener(directory: &std::path::Path) -> Listener {
        let bind = format!("fastcgi:unix:{}", directory.join("a.sock").display());
        Listener::bind(&bind.parse::<Bind>().unwrap(), 8, None, true).unwrap()
    }

    /// Starts a Python program with the socket as its standard input. The program exits when its standard output is
    /// closed.
    fn python(listener: &Listener, text: &str) -> Child {
        let text = format!("import os, select, socket, time\ns = socket.socket(fileno=0)\n{text}");
        let mut command = Command::new("python3");
        command.args(["-c", &text]).stdin(Stdio::from(listener.duplicate().unwrap())).stdout(Stdio::piped());
        command.spawn().expect("python3 is there (scripts/test installs it)")
    }

    fn pid(child: &Child) -> Pid {
        Pid::from_raw(child.id().cast_signed())
    }

    fn seen(child: &Child, listener: &Listener, wanted: Observed) {
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
        while of(pid(child), listener) != wanted {
            assert!(std::time::Instant::now() < deadline, "{:?} and not {wanted:?}", of(pid(child), listener));
            std::thread::park_timeout(std::time::Duration::from_millis(1));
        }
    }

    fn end(mut child: Child) {
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn an_environment_is_empty_only_when_it_stays_so() {
        let empty = || Environment::Shown(Vec::new());
        assert_eq!(empty().seen_for(Duration::ZERO), Environment::InExec);
        assert_eq!(empty().seen_for(EMPTY_IN_EXEC), empty());
        let filled = || Environment::Shown(b"A=b\0".to_vec());
        assert_eq!(filled().seen_for(Duration::ZERO), filled());
    }

    #[test]
    fn the_use_of_the_socket_is_observed_and_a_connection_to_a_database_does_not_count() {
        let directory = tempfile::tempdir().unwrap();
        let ours = listener(directory.path());
        let Address::Path(path) = &ours.address else { panic!("it has a path") };
        let database = UnixListener::bind(directory.path().join("database")).unwrap();

        let connect = format!(
            "c = socket.socket(socket.AF_UNIX)\nc.connect('{}')\n",
            directory.path().join("database").display()
        );
        let program =
            python(&ours, &format!("{connect}p = socket.socketpair()\nprint('up', flush=True)\ntime.sleep(600)"));
        let (_connection, _) = database.accept().unwrap();
        seen(&program, &ours, Observed::Holding);
        end(program);

        let program = python(&ours, "s.setblocking(True)\nc = s.accept()\nprint('it', flush=True)\ntime.sleep(600)");
        seen(&program, &ours, Observed::Accepting);
        let _client = UnixStream::connect(path).unwrap();
        seen(&program, &ours, Observed::Serving);
        let link = format!("/proc/{}/fd", program.id());
        let sockets = fs::read_dir(link).unwrap().filter_map(|entry| fs::read_link(entry.unwrap().path()).ok());
        let inodes: Vec<String> = sockets
            .filter_map(|to| Some(to.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.to_owned()))
            .filter(|inode| *inode != fstat(ours.as_fd()).unwrap().st_ino.to_string())
            .collect();
        assert!(
            inodes.iter().any(|inode| lists::is_connection(pid(&program), inode, &ours)),
            "the kernel's list contains it too"
        );
        end(program);

        let program = python(&ours, "e = select.epoll()\ne.register(0)\nprint('up', flush=True)\ntime.sleep(600)");
        seen(&program, &ours, Observed::Watching);
        end(program);

        let mut program = python(&ours, "os.close(0)\nprint('up', flush=True)\ntime.sleep(600)");
        program.stdout.as_mut().unwrap().read_exact(&mut [0; 3]).unwrap();
        assert_eq!(of(pid(&program), &ours), Observed::Apart);
        end(program);
        ours.remove_file();
    }

    #[test]
    fn servers_in_a_tree_are_found_without_the_processes_that_they_have_started() {
        let directory = tempfile::tempdir().unwrap();
        let ours = listener(directory.path());
        let Address::Path(path) = &ours.address else { panic!("it has a path") };
        // A wrapper that waits for a server. The server is serving, and has started a process that holds the server's
        // socket and connection.
        let text = "if os.fork() == 0:\n  s.setblocking(True)\n  c, _ = s.accept()\n  os.set_inheritable(c.fileno(), True)\n  \
                    if os.fork() == 0: os.execvp('sleep', ['sleep', '600'])\n  print('up', flush=True)\n  time.sleep(600)\nos.wait()";
        let mut program = python(&ours, text);
        let _client = UnixStream::connect(path).unwrap();
        program.stdout.as_mut().unwrap().read_exact(&mut [0; 3]).unwrap();
        let wrapper = pid(&program);
        let family = family_of(&[wrapper]);
        assert_eq!(family.len(), 3, "{family:?}");
        assert_eq!(servers_under(&[wrapper], &ours), [(family[1], Observed::Serving)]);
        assert_eq!(holders_under(wrapper, &ours), [family[1]]);
        assert_eq!(stat(wrapper).unwrap().session, nix::unistd::getsid(None).unwrap().as_raw());
        assert!(Process::of(family[2]).unwrap().lives());
        assert!(
            !Process { started: 1, ..Process::of(family[2]).unwrap() }.lives(),
            "a different process with this pid"
        );
        for pid in family.into_iter().skip(1) {
            nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
        }
        end(program);
        ours.remove_file();
    }

    #[test]
    fn term_loses_a_request_if_it_terminates_a_process_that_serves() {
        let directory = tempfile::tempdir().unwrap();
        let ours = listener(directory.path());
        let Address::Path(path) = &ours.address else { panic!("it has a path") };
        let (handled, accepts) = ("import signal\nsignal.signal(15, lambda *_: 0)\n", "c, _ = s.accept()\n");
        let threads = "import threading\nthreading.Thread(target=time.sleep, args=[600]).start()\n";
        let watches = "e = select.epoll()\ne.register(0)\n";
        for (text, can_be_asked) in [
            (format!("{accepts}up()\ntime.sleep(600)"), false),
            (format!("{handled}{accepts}up()\ntime.sleep(600)"), false),
            (format!("{accepts}c.close()\nup()\ntime.sleep(600)"), true),
            (format!("{accepts}up()\ns.accept()"), true),
            (format!("{threads}{accepts}up()\ns.accept()"), false),
            (format!("{handled}{threads}{accepts}up()\ns.accept()"), true),
            (format!("{watches}{accepts}up()\ne.poll()"), false),
            (format!("{handled}{watches}{accepts}up()\ne.poll()"), true),
        ] {
            let head = "s.setblocking(True)\ndef up(): print('up', flush=True)\n";
            let mut program = python(&ours, &format!("{head}{text}"));
            let _client = UnixStream::connect(path).unwrap();
            program.stdout.as_mut().unwrap().read_exact(&mut [0; 3]).unwrap();
            if text.ends_with("accept()") {
                seen(&program, &ours, Observed::Accepting);
            }
            assert_eq!(super::can_be_asked(pid(&program), Signal::SIGTERM, &ours), can_be_asked, "{text}");
            end(program);
        }
        ours.remove_file();
    }

    #[test]
    fn the_kernels_lists_are_read() {
        let unix = "Num       RefCount Protocol Flags    Type St Inode Path\n\
                    ffff: 00000003 00000000 00000000 0001 03 4711 /run/a.sock\nffff: 00000003 00000000 00000000 0001 03 4712\n";
        assert_eq!(lists::unix(unix, "4711").as_deref(), Some("/run/a.sock"));
        assert_eq!(lists::unix(unix, "4712"), None);
        let tcp = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n   \
                   0: 0100007F:2328 0100007F:D431 01 00000000:00000000 00:00000000 00000000     0        0 99 1 0 20 4 30 10 -1\n";
        assert_eq!(lists::tcp(tcp, "99"), Some(9000));
        assert_eq!(lists::tcp(tcp, "98"), None);
        let stat = stat_in("7 (a b) c) S 1 6 5 0 -1 0 0 0 0 0 0 0 0 0 20 0 1 0 777 0").unwrap();
        assert_eq!((stat.group, stat.session, stat.started), (6, 5, 777));
        assert!(stat_in("7 (a) Z 1 7 5 0 -1 0 0 0 0 0 0 0 0 0 20 0 1 0 777 0").unwrap().is_zombie);
    }

    #[test]
    fn an_empty_environment_is_not_mistaken_for_an_exec() {
        let mut child = Command::new("sleep").arg("600").env_clear().spawn().unwrap();
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
        while environment_of(pid(&child)) != Environment::Shown(Vec::new()) {
            assert!(std::time::Instant::now() < deadline, "{:?}", environment_of(pid(&child)));
            std::thread::park_timeout(std::time::Duration::from_millis(1));
        }
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(environment_of(pid(&child)), Environment::Hidden);
    }
}
