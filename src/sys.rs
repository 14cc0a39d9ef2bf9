//! The fenced system calls: all code of the runtime that needs `unsafe`, or that is only sound at one moment of a process's
//! life, is in this file and its submodules.
//!
//! Guarantees to the callers:
//! - [`fork`] runs only with one thread (it checks that) and with every signal blocked. The child can
//!   neither return into the master's code nor run the master's destructors: it ends in `_exit`.
//! - Nothing here makes decisions. Policy lives in `master::supervisor`; this file only carries it out.
#![expect(unsafe_code, reason = "this file is the fence: fork, descriptors by number, signal actions, environment")]

mod announce;
mod exclusive;
pub(crate) mod file_path;
pub(crate) mod lock_file;
mod peek;
mod process_status;
mod receive;
mod syn_filter;

use std::collections::BTreeMap;
use std::ffi::{CString, OsStr, OsString};
use std::fs;
use std::io::{self, Write as _};
use std::net::SocketAddr;
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::Path;
use std::process::{Child, Command, ExitStatus};
use std::sync::OnceLock;
use std::time::Duration;

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, pthread_sigmask};
use nix::sys::socket::{SockaddrLike as _, SockaddrStorage};
use nix::sys::wait::WaitPidFlag;
use nix::unistd::{ForkResult, Pid, getppid};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

pub(crate) use self::announce::{announce, announce_by};
pub(crate) use self::exclusive::Exclusive;
pub(crate) use self::peek::{descriptor_of, ending_of};
pub(crate) use self::process_status::{process_kib, process_status};
pub(crate) use self::receive::{receive_with_descriptor, receive_with_descriptors};
pub(crate) use self::syn_filter::drop_syn_segments;

/// How a child process ended, as reported by `waitpid(2)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    /// It called `exit` with this status.
    Exited(i32),
    /// The signal with this number ended it.
    Signaled(i32),
}

impl Ending {
    /// Converts to the type of the standard library. Whether the kernel wrote a core dump is not included.
    pub(crate) fn status(self) -> ExitStatus {
        match self {
            Self::Exited(status) => ExitStatus::from_raw(status << 8),
            Self::Signaled(number) => ExitStatus::from_raw(number),
        }
    }
}

impl std::fmt::Display for Ending {
    /// A `key=value` pair for the log: `status=3` or `signal=SEGV`.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match *self {
            Self::Exited(status) => write!(f, "status={status}"),
            Self::Signaled(number) => match Signal::try_from(number) {
                Ok(signal) => write!(f, "signal={}", signal.as_str().trim_start_matches("SIG")),
                Err(_) => write!(f, "signal={number}"),
            },
        }
    }
}

/// Formats a system error for the operator; for a limit, with the setting to raise.
pub(crate) fn explain(error: &io::Error) -> String {
    let hint = match error.raw_os_error() {
        Some(libc::EMFILE) => {
            let limit = getrlimit(Resource::RLIMIT_NOFILE).map_or(0, |(soft, _)| soft);
            return format!(
                "{error}: this process may have {limit} descriptors (raise it with ulimit -n, or LimitNOFILE= in the unit)"
            );
        }
        Some(libc::ENFILE) => "the whole system has no more descriptors (raise fs.file-max)",
        Some(libc::EAGAIN) => {
            "no more processes are allowed (raise ulimit -u, TasksMax= in the unit, or pids.max of the container)"
        }
        Some(libc::EFBIG) => "files of this process may not be so large (raise ulimit -f, or LimitFSIZE= in the unit)",
        Some(libc::ENOMEM) => "there is no memory (raise the memory limit, or have fewer workers or a smaller cache)",
        _ => return error.to_string(),
    };
    format!("{error}: {hint}")
}

/// Forks a child that runs `child` and exits with the status it returns.
///
/// All signals are blocked in both processes during the fork, so that no handler of the parent runs
/// in a half-initialized child. The child's closure starts with signals still blocked: it calls
/// [`unblock_signals`] after it has set its own dispositions.
///
/// # Errors
/// Returns the error of `fork(2)`: `EAGAIN` when a limit on processes is reached, `ENOMEM`. Also fails if this process has more
/// than one thread: the child could inherit a lock that is never released.
pub(crate) fn fork(child: impl FnOnce() -> u8) -> io::Result<Pid> {
    expect_one_thread()?;
    // Buffered output would be written twice, once by each process.
    io::stdout().flush()?;
    let before = block_signals();
    // SAFETY: this process has one thread (checked above), so the child inherits no lock in a held state and
    // may allocate. It exits by `_exit` below and so never unwinds into the parent's frames.
    let forked = unsafe { nix::unistd::fork() };
    match forked {
        Ok(ForkResult::Parent { child }) => {
            restore_signals(&before);
            Ok(child)
        }
        Ok(ForkResult::Child) => {
            let status = std::panic::catch_unwind(std::panic::AssertUnwindSafe(child)).unwrap_or(101);
            exit_now(status)
        }
        Err(errno) => {
            restore_signals(&before);
            Err(errno.into())
        }
    }
}

/// Clones this process, which has one thread: the child gets a copy of the memory, and shares the table of descriptors, so
/// that a descriptor that the parent opens or closes later is open or closed in both. The child runs `child` and exits with the
/// status it returns. Signals stay blocked in the child, and must be blocked in the parent during the call.
///
/// No signal is sent when the child ends, and `wait(2)` does not report it, until the parent is dead and another process inherits the
/// child.
///
/// # Errors
/// Returns the error of `clone(2)`.
pub(crate) fn clone_with_descriptors(child: impl FnOnce() -> u8) -> io::Result<Pid> {
    expect_one_thread()?;
    // Not the C library's `fork`: its handlers would close descriptors that the parent continues to use.
    // SAFETY: as in `fork`; without a stack of its own the child continues with a copy of this one. Every further argument
    // is zero, whatever the order of arguments on this architecture.
    let pid = unsafe { libc::syscall(libc::SYS_clone, libc::CLONE_FILES, 0, 0, 0, 0) };
    match pid {
        0 => exit_now(std::panic::catch_unwind(std::panic::AssertUnwindSafe(child)).unwrap_or(101)),
        1.. => Ok(Pid::from_raw(i32::try_from(pid).map_err(io::Error::other)?)),
        _ => Err(io::Error::last_os_error()),
    }
}

/// A descriptor of process `pid`, which becomes readable when the process has ended.
///
/// # Errors
/// Returns the error of `pidfd_open(2)`.
pub(crate) fn process_descriptor(pid: Pid) -> io::Result<OwnedFd> {
    // SAFETY: plain system call with two integers.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid.as_raw(), 0) };
    let fd = i32::try_from(fd).ok().filter(|&fd| fd >= 0).ok_or_else(io::Error::last_os_error)?;
    // SAFETY: a number that pidfd_open returned is new, open and not owned elsewhere.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Takes ownership of a descriptor whose owner was in a process that is dead; `None` if it is not open.
///
/// For a process that shared its descriptors with the dead one, and for descriptors that no value here owns.
pub(crate) fn own(fd: RawFd) -> Option<OwnedFd> {
    descriptor_flags(fd)?;
    // SAFETY: it is open, and not owned elsewhere, as the comment above requires.
    Some(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Starts `command` as a child that dies with this process, in its own process group, which is announced to the guard. The child inherits
/// standard input, output and error as set in `command`, the descriptors of `pass`, and nothing else. It first
/// calls `prepare`, which must be async-signal-safe.
///
/// # Errors
/// Returns the error of `fork(2)`, `execve(2)` or `prepare`; the latter two come back through the standard library's pipe.
pub(crate) fn spawn(
    command: &mut Command,
    pass: &[RawFd],
    mut prepare: impl FnMut() -> io::Result<()> + Send + Sync + 'static,
) -> io::Result<Child> {
    let master = nix::unistd::getpid();
    let pass = pass.to_vec();
    let open = numbers_without_close_range();
    let descriptors = DESCRIPTOR_LIMIT.get().copied();
    let in_child = move || {
        announce(nix::unistd::getpid()); // the child leads its group by now
        if let Some((soft, hard)) = descriptors {
            setrlimit(Resource::RLIMIT_NOFILE, soft, hard)?; // before the preparation, which may set another one
        }
        prepare()?;
        // After the preparation, because the kernel forgets this when the user changes.
        // SIGKILL, because a foreign program may ignore SIGTERM, and no program may outlive the master.
        nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
        if getppid() != master {
            return Err(io::Error::from_raw_os_error(libc::ESRCH)); // the master died before the line above
        }
        set_close_on_exec_from(3, &open)?;
        for &fd in &pass {
            // SAFETY: the caller holds these descriptors open in the parent, and the child has copies of them.
            let fd = unsafe { BorrowedFd::borrow_raw(fd) };
            fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty()))?;
        }
        // The mask outlives exec, and the standard library leaves it unchanged: a program would never receive TERM.
        unblock_signals();
        Ok(())
    };
    // SAFETY: between fork and exec the closure only makes system calls (getpid, send, those of `prepare`, prctl, getppid,
    // close_range, fcntl, sigprocmask): no allocation, no lock. Descriptors that the child opens before exec are close-on-exec already.
    unsafe { command.process_group(0).pre_exec(in_child) };
    let before = block_signals();
    let spawned = command.spawn();
    restore_signals(&before);
    if spawned.is_err() {
        announce(Pid::from_raw(0)); // the child may have announced itself, and the standard library has reaped it
    }
    spawned
}

/// The original descriptor limit of this process, if it has raised the limit for itself.
static DESCRIPTOR_LIMIT: OnceLock<(u64, u64)> = OnceLock::new();

/// Makes all programs start with this descriptor limit, because this process is about to raise its own: programs that use select(2) break
/// with more than 1024.
pub(crate) fn note_descriptor_limit(soft: u64, hard: u64) {
    let _ = DESCRIPTOR_LIMIT.set((soft, hard)); // the first call has the original limit
}

/// Whether close_range(2) supports this flag: Linux 5.11 and later, unless a seccomp filter refuses it.
fn has_close_range() -> bool {
    static FOUND: OnceLock<bool> = OnceLock::new();
    *FOUND.get_or_init(|| close_range(u32::MAX, u32::MAX, libc::CLOSE_RANGE_CLOEXEC).is_ok())
}

fn close_range(first: u32, last: u32, flags: u32) -> io::Result<()> {
    // SAFETY: plain system call with three integers. The caller is responsible for the descriptors that are closed.
    let outcome = unsafe { libc::syscall(libc::SYS_close_range, first, last, flags) };
    if outcome == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// The argument for [`set_close_on_exec_from`]: nothing where close_range(2) is available, else the descriptors open here. To be
/// called before a fork, because it allocates.
fn numbers_without_close_range() -> Vec<RawFd> {
    if has_close_range() { Vec::new() } else { open_or_possible() }
}

/// The descriptors that are open here, or may be open.
fn open_or_possible() -> Vec<RawFd> {
    open_descriptors().unwrap_or_else(|_| {
        // There is no /proc here: all numbers up to the limit, within reason.
        let limit = getrlimit(Resource::RLIMIT_NOFILE).map_or(u64::MAX, |(_, hard)| hard);
        (0..RawFd::try_from(limit.min(1 << 20)).unwrap_or(RawFd::MAX)).collect()
    })
}

/// Async-signal-safe. `open` lists the open descriptors, where the kernel cannot enumerate them itself.
fn set_close_on_exec_from(first: u32, open: &[RawFd]) -> io::Result<()> {
    if open.is_empty() {
        return close_range(first, u32::MAX, libc::CLOSE_RANGE_CLOEXEC);
    }
    for &fd in open.iter().filter(|&&fd| u32::try_from(fd).is_ok_and(|fd| fd >= first)) {
        // SAFETY: F_SETFD accepts any number, and changes a flag of the descriptor open there, if any.
        unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) };
    }
    Ok(())
}

/// Closes every descriptor that is not in `keep`. For a child that has just been forked.
pub(crate) fn close_all_except(keep: &[RawFd]) {
    let mut keep: Vec<u32> = keep.iter().filter_map(|&fd| u32::try_from(fd).ok()).collect();
    keep.sort_unstable();
    keep.dedup();
    if !has_close_range() {
        let is_kept = |fd: &RawFd| u32::try_from(*fd).is_ok_and(|fd| keep.binary_search(&fd).is_ok());
        for fd in open_or_possible().into_iter().filter(|fd| !is_kept(fd)) {
            // SAFETY: only descriptors that the child does not use are closed, as below.
            unsafe { libc::close(fd) };
        }
        return;
    }
    let mut first = 0;
    for fd in keep.into_iter().map(Some).chain([None]) {
        let last = match fd {
            Some(0) => None,
            Some(fd) => Some(fd - 1),
            None => Some(u32::MAX),
        };
        if let Some(last) = last.filter(|&last| first <= last) {
            // Closes descriptors by number. The values in this process that own them are the master's, which the child never
            // touches again: it exits by `_exit`.
            let _ = close_range(first, last, 0); // it was found to work before
        }
        if let Some(fd) = fd {
            first = fd + 1;
        }
    }
}

/// The numbers of all descriptors that are open in this process.
///
/// # Errors
/// Returns the error of reading `/proc/self/fd`.
pub(crate) fn open_descriptors() -> io::Result<Vec<RawFd>> {
    let listed: Vec<RawFd> =
        fs::read_dir("/proc/self/fd")?.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect();
    // One of them was the directory itself, which is closed by now.
    Ok(listed.into_iter().filter(|&fd| descriptor_flags(fd).is_some()).collect())
}

/// The open descriptors that this program opened itself: Rust opens everything close-on-exec, and inherited descriptors
/// are not.
///
/// # Errors
/// Fails as [`open_descriptors`] does.
pub(crate) fn own_descriptors() -> io::Result<Vec<RawFd>> {
    let mut open = open_descriptors()?;
    open.retain(|&fd| fd > 2 && descriptor_flags(fd).is_some_and(|flags| flags.contains(FdFlag::FD_CLOEXEC)));
    Ok(open)
}

/// The flags of a descriptor by its number; `None` if nothing is open there.
fn descriptor_flags(fd: RawFd) -> Option<FdFlag> {
    // SAFETY: F_GETFD accepts any number, and returns -1 if nothing is open there.
    let flags = unsafe { libc::fcntl(fd, libc::F_GETFD) };
    (flags >= 0).then(|| FdFlag::from_bits_retain(flags))
}

/// The identity of the file behind descriptor `fd`, for comparison; `None` if it is not open.
pub(crate) fn identity(fd: RawFd) -> Option<(u64, u64)> {
    let status = nix::sys::stat::fstat(descriptor(fd)?).ok()?;
    Some((status.st_dev, status.st_ino))
}

/// A copy of descriptor `fd`, above standard error and closed on exec, if it is open in this process.
pub(crate) fn descriptor(fd: RawFd) -> Option<OwnedFd> {
    // SAFETY: F_DUPFD_CLOEXEC accepts any number and returns EBADF if nothing is open there.
    let copy = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 3) };
    // SAFETY: a number that F_DUPFD_CLOEXEC returned is new, open and not owned elsewhere.
    (copy >= 0).then(|| unsafe { OwnedFd::from_raw_fd(copy) })
}

/// Makes descriptor `fd` refer to the file of `file`, atomically. `fd` must be a descriptor that stays open for this
/// process's lifetime. Above standard error it is closed on exec.
///
/// # Errors
/// Returns the error of `dup3(2)`.
pub(crate) fn replace(fd: RawFd, file: &OwnedFd) -> io::Result<()> {
    let flags = if fd > 2 { libc::O_CLOEXEC } else { 0 };
    // SAFETY: `file` is open. Users and owners of `fd` still have an open descriptor afterwards.
    let outcome = unsafe { libc::dup3(file.as_raw_fd(), fd, flags) };
    if outcome >= 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Takes ownership of the inherited descriptors among `numbers`. Descriptors that this program opened itself are not
/// touched, because Rust opens everything close-on-exec. The descriptors are close-on-exec from now on.
///
/// `numbers` come from the process that became this program, or started it, and opened the descriptors for it. Each can be taken
/// once.
pub(crate) fn take_over(numbers: &[RawFd]) -> BTreeMap<RawFd, OwnedFd> {
    let mut taken = BTreeMap::new();
    for &fd in numbers {
        if fd <= 2 || descriptor_flags(fd).is_none_or(|flags| flags.contains(FdFlag::FD_CLOEXEC)) {
            continue;
        }
        // SAFETY: the number is open, and no value of this process owns it: it was open before `main`, and this function, the only
        // place that takes such a number, makes it close-on-exec, so that it is not taken again.
        let descriptor = unsafe { OwnedFd::from_raw_fd(fd) };
        if fcntl(&descriptor, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).is_ok() {
            taken.insert(fd, descriptor);
        }
    }
    taken
}

/// Replaces this process by another program, which inherits standard input, output and error and the descriptors of `keep`, and
/// starts in `directory`. Returns only if that fails, and then nothing has changed.
///
/// To be called with all signals blocked: a signal must not arrive before the other program has installed its handlers.
pub(crate) fn exec(
    program: &Path,
    arguments: &[OsString],
    environment: &[(OsString, OsString)],
    directory: &Path,
    keep: &[RawFd],
) -> io::Error {
    let before = std::env::current_dir();
    let error = match try_exec(program, arguments, environment, directory, keep) {
        Ok(never) => match never {},
        Err(error) => error,
    };
    let undone =
        set_close_on_exec_from(3, &numbers_without_close_range()).and(before.and_then(std::env::set_current_dir));
    if let Err(error) = undone {
        log::error!("after an exec that failed: {error}");
    }
    error
}

fn try_exec(
    program: &Path,
    arguments: &[OsString],
    environment: &[(OsString, OsString)],
    directory: &Path,
    keep: &[RawFd],
) -> io::Result<std::convert::Infallible> {
    let program = CString::new(program.as_os_str().as_bytes())?;
    let arguments = arguments.iter().map(|argument| Ok(CString::new(argument.as_bytes())?));
    let arguments: Vec<CString> = arguments.collect::<io::Result<_>>()?;
    let pair =
        |(name, value): &(OsString, OsString)| Ok(CString::new([name.as_bytes(), b"=", value.as_bytes()].concat())?);
    let environment: Vec<CString> = environment.iter().map(pair).collect::<io::Result<_>>()?;
    io::stdout().flush()?;
    std::env::set_current_dir(directory)?;
    set_close_on_exec_from(3, &numbers_without_close_range())?;
    for &fd in keep {
        // SAFETY: changes a flag of a descriptor by its number, and fails if nothing is open there.
        if unsafe { libc::fcntl(fd, libc::F_SETFD, 0) } != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(nix::unistd::execve(&program, &arguments, &environment)?)
}

/// Whether `pid` is a child of this process, dead or alive, that was not reaped.
pub(crate) fn is_child(pid: Pid) -> bool {
    let flags = (WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT).bits();
    let Ok(id) = libc::id_t::try_from(pid.as_raw()) else { return false };
    // SAFETY: all zeroes is a valid siginfo_t.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    // SAFETY: `info` is valid for writes during the whole call; nothing is reaped.
    unsafe { libc::waitid(libc::P_PID, id, &raw mut info, flags) == 0 }
}

/// Accepts a connection: non-blocking, closed on exec. Also returns the address of the peer if it is an internet address.
///
/// # Errors
/// Returns the error of `accept4(2)`; `WouldBlock` if no connection is waiting.
pub(crate) fn accept(listener: BorrowedFd<'_>) -> io::Result<(OwnedFd, Option<SocketAddr>)> {
    // SAFETY: all zeroes is a valid sockaddr_storage.
    let mut address: libc::sockaddr_storage = unsafe { std::mem::zeroed() };
    let mut length = libc::socklen_t::try_from(size_of_val(&address)).unwrap_or(0);
    let flags = libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    // SAFETY: `address` and `length` are valid for writes during the whole call, and `length` is the size of `address`.
    let socket = unsafe { libc::accept4(listener.as_raw_fd(), (&raw mut address).cast(), &raw mut length, flags) };
    if socket < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a number that accept4 returned is new, open and not owned elsewhere.
    let socket = unsafe { OwnedFd::from_raw_fd(socket) };
    // SAFETY: the kernel has written an address of `length` bytes there.
    let address = unsafe { SockaddrStorage::from_raw((&raw const address).cast(), Some(length)) };
    Ok((socket, address.as_ref().and_then(peer_address)))
}

/// The address of a client. An IPv4 client has an IPv4 address even if a dual-stack socket has accepted it.
pub(crate) fn peer_address(address: &SockaddrStorage) -> Option<SocketAddr> {
    let address = internet_address(address)?;
    Some(SocketAddr::new(address.ip().to_canonical(), address.port()))
}

/// An address, if it is an internet address.
pub(crate) fn internet_address(address: &SockaddrStorage) -> Option<SocketAddr> {
    match (address.as_sockaddr_in(), address.as_sockaddr_in6()) {
        (Some(&address), _) => Some(SocketAddr::V4(address.into())),
        (_, Some(&address)) => Some(SocketAddr::V6(address.into())),
        (None, None) => None,
    }
}

/// The number of connections in the queue of a listening TCP socket.
///
/// # Errors
/// Returns the error of `getsockopt(2)`; `InvalidInput` if the socket does not listen.
pub(crate) fn tcp_queue(listener: BorrowedFd<'_>) -> io::Result<u32> {
    const LISTEN: u8 = 10; // TCP_LISTEN, of the kernel's net/tcp_states.h
    let info = tcp_info(listener)?;
    // For a listening socket, the kernel stores the length of its queue here.
    if info.tcpi_state == LISTEN { Ok(info.tcpi_unacked) } else { Err(io::ErrorKind::InvalidInput.into()) }
}

/// The time since the last bytes were received on a TCP connection.
///
/// # Errors
/// Returns the error of `getsockopt(2)`.
pub(crate) fn since_last_received(connection: BorrowedFd<'_>) -> io::Result<Duration> {
    Ok(Duration::from_millis(tcp_info(connection)?.tcpi_last_data_recv.into()))
}

fn tcp_info(socket: BorrowedFd<'_>) -> io::Result<libc::tcp_info> {
    // SAFETY: all zeroes is a valid tcp_info.
    let mut info: libc::tcp_info = unsafe { std::mem::zeroed() };
    let mut length = libc::socklen_t::try_from(size_of_val(&info)).unwrap_or(0);
    let place = (&raw mut info).cast();
    // SAFETY: `info` and `length` are valid for writes during the whole call, and `length` is the size of `info`.
    let outcome =
        unsafe { libc::getsockopt(socket.as_raw_fd(), libc::IPPROTO_TCP, libc::TCP_INFO, place, &raw mut length) };
    if outcome == 0 { Ok(info) } else { Err(io::Error::last_os_error()) }
}

/// Registers a descriptor with the event loop, to wait until it is readable.
///
/// # Errors
/// Returns the error of `epoll_ctl(2)`.
pub(crate) fn register(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: the descriptor is open, and stays open: its owner is part of the returned value.
    Ok(unsafe { AsyncFd::register_with_interest(fd, interest) }?)
}

/// Ends the process at once: no destructors, no `atexit` functions, which belong to the master.
pub(crate) fn exit_now(status: u8) -> ! {
    // SAFETY: `_exit` is always sound; it never returns.
    unsafe { libc::_exit(i32::from(status)) }
}

/// Makes the kernel send SIGTERM to this process when the master dies.
///
/// # Errors
/// Returns `ESRCH` if the master is dead already.
pub(crate) fn die_with_parent(master: Pid) -> io::Result<()> {
    nix::sys::prctl::set_pdeathsig(Signal::SIGTERM)?;
    if getppid() == master { Ok(()) } else { Err(io::Error::from_raw_os_error(libc::ESRCH)) }
}

/// Blocks every signal in this thread and returns the previous mask. SIGBUS is not blocked: a file in shared
/// memory may be truncated at any moment, and the kernel kills a process that blocks the signal of its own fault.
pub(crate) fn block_signals() -> SigSet {
    let (mut before, mut all) = (SigSet::empty(), SigSet::all());
    all.remove(Signal::SIGBUS);
    let done = pthread_sigmask(SigmaskHow::SIG_SETMASK, Some(&all), Some(&mut before));
    debug_assert!(done.is_ok(), "the arguments of pthread_sigmask are constant and valid");
    before
}

/// Restores a mask that [`block_signals`] returned.
pub(crate) fn restore_signals(mask: &SigSet) {
    let done = pthread_sigmask(SigmaskHow::SIG_SETMASK, Some(mask), None);
    debug_assert!(done.is_ok(), "the arguments of pthread_sigmask are constant and valid");
}

/// Sends a signal to one thread of a process.
///
/// # Errors
/// Returns `ESRCH` if that process has no such thread, or another error of `tgkill(2)`.
pub(crate) fn signal_thread(process: Pid, thread: i32, signal: i32) -> io::Result<()> {
    // SAFETY: plain system call with three integers. The kernel checks that the thread belongs to that process.
    let outcome = unsafe { libc::syscall(libc::SYS_tgkill, process.as_raw(), thread, signal) };
    if outcome == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Unblocks all signals.
pub(crate) fn unblock_signals() {
    restore_signals(&SigSet::empty());
}

/// Makes each SIGTERM start the timer of `alarm(2)`: SIGALRM ends this process if it is still running after
/// `limit`, even when its event loop hangs and there is no master to kill it.
///
/// # Errors
/// Returns the error of `sigaction(2)`.
pub(crate) fn alarm_on_term(limit: Duration) -> io::Result<()> {
    let seconds = u32::try_from(limit.as_secs()).unwrap_or(u32::MAX).saturating_add(2);
    // SAFETY: `alarm` is async-signal-safe (signal-safety(7)) and accesses no memory of this program.
    let action = move || unsafe {
        libc::alarm(seconds);
    };
    // SAFETY: the action above makes one async-signal-safe call, does not panic and takes no lock.
    unsafe { signal_hook::low_level::register(libc::SIGTERM, action) }.map(|_| ())
}

/// Sets a variable in this process's environment. For a child that has just been forked.
pub(crate) fn set_environment(name: &str, value: impl AsRef<OsStr>) {
    // SAFETY: a freshly forked child has one thread (see `fork`), so no other thread reads the environment.
    unsafe { std::env::set_var(name, value) }
}

/// Removes all variables from this process's environment. For a child that has just been forked.
pub(crate) fn clear_environment() {
    for (name, _) in std::env::vars_os() {
        // SAFETY: as in `set_environment`.
        unsafe { std::env::remove_var(name) }
    }
}

/// Removes variables from this process's environment. For a child that has just been forked.
pub(crate) fn forget_environment(names: &[&[&str]]) {
    for name in names.iter().copied().flatten() {
        // SAFETY: as in `set_environment`.
        unsafe { std::env::remove_var(name) }
    }
}

/// A child that has ended and was not reaped yet, if there is one. This includes processes that this process inherited
/// because their parent died. Until the child is reaped, its pid is not reused.
pub(crate) fn ended_child() -> Option<Pid> {
    let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
    // libc's call and not nix's: nix reports a process ended by a real-time signal, for which it has no name,
    // as an error, and the pid would be lost.
    loop {
        // SAFETY: all zeroes is a valid siginfo_t.
        let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
        // SAFETY: `info` is valid for writes during the whole call.
        let outcome = unsafe { libc::waitid(libc::P_ALL, 0, &raw mut info, flags.bits()) };
        if outcome == 0 {
            // SAFETY: waitid has filled in the fields of a child's siginfo_t, or left all of it zero.
            let pid = unsafe { info.si_pid() };
            return (pid > 0).then(|| Pid::from_raw(pid));
        }
        if io::Error::last_os_error().raw_os_error() != Some(libc::EINTR) {
            return None; // there are no children
        }
    }
}

/// Reaps a child that has ended, which frees its pid. If its process group has ended too, announces that to the guard.
pub(crate) fn reap(pid: Pid) -> Option<Ending> {
    let groups = announce::groups_of(pid);
    loop {
        let mut status = 0;
        // SAFETY: `status` is valid for writes during the whole call.
        let reaped = unsafe { libc::waitpid(pid.as_raw(), &raw mut status, libc::WNOHANG) };
        if reaped > 0 {
            announce::announce_ends(groups);
            return Some(if libc::WIFSIGNALED(status) {
                Ending::Signaled(libc::WTERMSIG(status))
            } else {
                Ending::Exited(libc::WEXITSTATUS(status))
            });
        }
        if reaped == 0 || io::Error::last_os_error().raw_os_error() != Some(libc::EINTR) {
            return None;
        }
    }
}

/// Makes sure that this process has one thread.
///
/// # Errors
/// Fails if it has more, or if `/proc` is not mounted.
pub(crate) fn expect_one_thread() -> io::Result<()> {
    let mut threads = 0;
    // A thread that was joined may still be visible for a moment.
    for _ in 0..100 {
        threads = fs::read_dir("/proc/self/task")?.count();
        if threads == 1 {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Err(io::Error::other(format!(
        "the master has {threads} threads, and a fork would copy one alone (what runs before `run`, `preload` and `before_fork` must end the threads that it starts)"
    )))
}

/// Raises the number of descriptors that this process may have open to the hard limit, if possible.
pub(crate) fn raise_descriptor_limit() {
    use nix::sys::resource::{Resource, setrlimit};
    if let Some(hard) = hard_descriptor_limit() {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard); // on failure the limit is unchanged
    }
}

/// The hard limit of descriptors of this process.
pub(crate) fn hard_descriptor_limit() -> Option<u64> {
    use nix::sys::resource::{Resource, getrlimit};
    getrlimit(Resource::RLIMIT_NOFILE).ok().map(|(_, hard)| hard)
}
