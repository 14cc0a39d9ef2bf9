//! Forks, executes, terminates and reaps processes.
//!
//! [`fork`] requires a single thread (it checks this), and every signal to be blocked. The child can neither return
//! into the caller's code nor run the caller's destructors, because it ends in `_exit`.
#![expect(unsafe_code, reason = "part of the fence: see `sys.rs`")]

use std::ffi::{CStr, CString, OsString};
use std::fs;
use std::io::{self, Write as _};
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::Path;
use std::process::{Child, Command, ExitStatus};
use std::time::Duration;

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::prctl;
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::Signal;
use nix::sys::wait::WaitPidFlag;
use nix::unistd::{ForkResult, Pid, getppid, setpgid};

use super::descriptors::{DESCRIPTOR_LIMIT, numbers_without_close_range, set_close_on_exec_from};
use super::{announce, block_signals, guard_link, restore_signals, short_name, unblock_signals};

/// How a child process ended, as reported by `waitpid(2)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    /// The process exited with this status.
    Exited(i32),
    /// The signal with this number terminated the process.
    Signaled(i32),
}

impl Ending {
    /// Converts the ending to the standard library's type, without the flag for a core dump.
    pub(crate) fn status(self) -> ExitStatus {
        match self {
            Self::Exited(status) => ExitStatus::from_raw(status << 8),
            Self::Signaled(number) => ExitStatus::from_raw(number),
        }
    }

    /// Returns the exit status, for the log.
    pub(crate) fn exit_status(self) -> Option<i32> {
        match self {
            Self::Exited(status) => Some(status),
            Self::Signaled(_) => None,
        }
    }

    /// Returns the name of the signal without `SIG`, for the log.
    pub(crate) fn signal_name(self) -> Option<String> {
        match self {
            Self::Exited(_) => None,
            Self::Signaled(number) => Some(match Signal::try_from(number) {
                Ok(signal) => short_name(signal).to_owned(),
                Err(_) => number.to_string(),
            }),
        }
    }
}

/// Forks a child that runs `child` and exits with the status it returns.
///
/// All signals are blocked in both processes during the fork, so that no handler of the parent runs in a
/// half-initialized child. `child` starts with signals still blocked, and calls [`unblock_signals`] after it has set
/// its own dispositions.
///
/// # Errors
/// Returns the error from `fork(2)`: `EAGAIN` if a limit on processes is reached, or `ENOMEM`. Also fails if this
/// process has more than one thread, because the child could inherit a lock that is never released.
pub(crate) fn fork(child: impl FnOnce() -> u8) -> io::Result<Pid> {
    expect_one_thread()?;
    // Buffered output would be written twice, once by each process.
    io::stdout().flush()?;
    let before = block_signals();
    // SAFETY: this process has one thread (checked above), so the child inherits no lock in a held state and may
    // allocate. The child exits through `_exit` below, so it never unwinds into the parent's frames.
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

/// Clones this process, which has one thread. The child has a copy of the memory but shares the descriptor table, so
/// that a descriptor that one process opens or closes later is open or closed in both. The child runs `child` and exits
/// with the status it returns. Signals stay blocked in the child, and must be blocked in the parent during the call.
///
/// No signal is sent when the child ends, and `wait(2)` does not report the child until the parent is dead and the child has a new
/// parent.
///
/// The child has the name `name` from its creation on, even before it first runs, and it has its own process group.
///
/// # Errors
/// Returns the error from `clone(2)` or `prctl(2)`.
pub(crate) fn clone_with_descriptors(name: &CStr, child: impl FnOnce() -> u8) -> io::Result<Pid> {
    expect_one_thread()?;
    // A child begins with its parent's name, so the parent temporarily takes the child's name.
    let own_name = thread_name();
    prctl::set_name(name)?;
    // The system call is used instead of the C library's `fork`, whose handlers would close descriptors that the parent
    // continues to use. SAFETY: as in `fork`; without a separate stack, the child continues on a copy of this one.
    // Every further argument is zero, whatever the order of arguments on this architecture.
    let pid = unsafe { libc::syscall(libc::SYS_clone, libc::CLONE_FILES, 0, 0, 0, 0) };
    if pid == 0 {
        let _ = setpgid(Pid::from_raw(0), Pid::from_raw(0)); // cannot fail
        exit_now(std::panic::catch_unwind(std::panic::AssertUnwindSafe(child)).unwrap_or(101));
    }
    let cloned = if pid < 0 { Err(io::Error::last_os_error()) } else { i32::try_from(pid).map_err(io::Error::other) };
    if let Ok(own_name) = CStr::from_bytes_until_nul(&own_name) {
        prctl::set_name(own_name)?;
    }
    let pid = Pid::from_raw(cloned?);
    // The parent sets the group too, because the child may not have run yet. If this call fails, the child has exited.
    let _ = setpgid(pid, pid);
    Ok(pid)
}

/// Returns the name of this thread, with a null byte at its end. Async-signal-safe.
pub(crate) fn thread_name() -> [u8; 16] {
    let mut name = [0; 16];
    // SAFETY: the kernel writes at most 16 bytes.
    unsafe { libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr()) };
    name
}

/// Returns a descriptor of process `pid` that becomes readable when the process has ended.
///
/// # Errors
/// Returns the error from `pidfd_open(2)`.
pub(crate) fn process_descriptor(pid: Pid) -> io::Result<OwnedFd> {
    // SAFETY: plain system call with two integers.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid.as_raw(), 0) };
    let fd = i32::try_from(fd).ok().filter(|&fd| fd >= 0).ok_or_else(io::Error::last_os_error)?;
    // SAFETY: a number that pidfd_open returned is new, open and not owned elsewhere.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Sends a signal to a process that is referred to by a [descriptor](process_descriptor). A process with the same pid that was started
/// later does not receive it.
///
/// # Errors
/// Fails if the process has exited, or if this process lacks the permission to signal it.
pub(crate) fn signal_process(process: &OwnedFd, signal: Signal) -> io::Result<()> {
    let (fd, signal) = (process.as_raw_fd(), signal as libc::c_int);
    // SAFETY: plain system call with integers and a null pointer, which stands for the default information.
    let sent =
        unsafe { libc::syscall(libc::SYS_pidfd_send_signal, fd, signal, std::ptr::null::<libc::siginfo_t>(), 0) };
    if sent == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Starts `command` as a child that dies with this process, in its own process group, which is announced to the guard. The child inherits
/// standard input, output and error as set in `command`, the descriptors of `pass`, and nothing else. Before exec it calls `prepare`,
/// which must be async-signal-safe.
///
/// # Errors
/// Returns the error from `fork(2)`, `execve(2)` or `prepare`. The standard library transfers the last two errors from
/// the child through a pipe.
pub(crate) fn spawn(
    command: &mut Command,
    pass: &[RawFd],
    prepare: impl FnMut() -> io::Result<()> + Send + Sync + 'static,
) -> io::Result<Child> {
    spawn_and(command, pass, prepare, || Ok(()))
}

/// Like [`spawn`]. The child calls `last` immediately before exec; it must be async-signal-safe, too.
///
/// # Errors
/// Fails as [`spawn`] does, or with the error from `last`.
pub(super) fn spawn_and(
    command: &mut Command,
    pass: &[RawFd],
    mut prepare: impl FnMut() -> io::Result<()> + Send + Sync + 'static,
    mut last: impl FnMut() -> io::Result<()> + Send + Sync + 'static,
) -> io::Result<Child> {
    let master = nix::unistd::getpid();
    let pass = pass.to_vec();
    let open = numbers_without_close_range();
    let descriptors = DESCRIPTOR_LIMIT.get().copied();
    let in_child = move || {
        announce(nix::unistd::getpid()); // the child leads its group by now
        if let Some((soft, hard)) = descriptors {
            setrlimit(Resource::RLIMIT_NOFILE, soft, hard)?; // before `prepare`, which may set a different limit
        }
        prepare()?;
        // This call comes after `prepare`, because the kernel resets the parent-death signal when the user changes. The
        // signal is SIGKILL, because a program may ignore SIGTERM, and no program may outlive the master.
        nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
        if getppid() != master {
            return Err(io::Error::from_raw_os_error(libc::ESRCH)); // the master died before the line above
        }
        set_close_on_exec_from(3, &open)?;
        for &fd in &pass {
            // SAFETY: the caller holds these descriptors open in the parent, and the child has copies of them, or
            // `prepare` has opened them.
            let fd = unsafe { BorrowedFd::borrow_raw(fd) };
            fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty()))?;
        }
        // The mask survives exec, and the standard library leaves it unchanged: without this call, a program would
        // never receive SIGTERM.
        unblock_signals();
        last()
    };
    // SAFETY: between fork and exec the closure only makes system calls (getpid, send, those of `prepare`, prctl, getppid,
    // close_range, fcntl, sigprocmask, those of `last`): no allocation, no lock. Descriptors that the child opens before exec are close-on-exec already.
    unsafe { command.process_group(0).pre_exec(in_child) };
    let before = block_signals();
    let spawned = command.spawn();
    restore_signals(&before);
    if spawned.is_err() {
        announce(Pid::from_raw(0)); // the child may have announced itself before the standard library reaped it
    }
    spawned
}

/// Replaces this process with another program, which inherits standard input, output and error and the descriptors of `keep`,
/// and starts in `directory`. Returns only on failure; in that case nothing has changed.
///
/// Must be called with all signals blocked: no signal may arrive before the new program has installed its handlers.
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
        log::error!("cannot restore this process after a failed exec: {error}");
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

/// Whether `pid` is a child of this process that is running, or that has ended but has not been reaped yet.
pub(crate) fn is_child(pid: Pid) -> bool {
    let flags = (WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT).bits();
    let Ok(id) = libc::id_t::try_from(pid.as_raw()) else { return false };
    // SAFETY: all zeroes is a valid siginfo_t.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    // SAFETY: `info` is valid for writes during the whole call; nothing is reaped.
    unsafe { libc::waitid(libc::P_PID, id, &raw mut info, flags) == 0 }
}

/// Terminates the process immediately: neither destructors nor `atexit` functions run, because they belong to the
/// master.
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

/// Returns a child that has ended but has not been reaped yet, if any. Children include processes that this process
/// inherited because their parent died. Until the child is reaped, its pid is not reused.
pub(crate) fn ended_child() -> Option<Pid> {
    let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
    // This code calls libc rather than nix. nix has no names for real-time signals, so it reports a process that was
    // terminated by one as an error, and the pid would be lost.
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

/// Reaps a child that has ended. This frees the child's pid. If the child's process group has ended too, announces this
/// to the guard.
pub(crate) fn reap(pid: Pid) -> Option<Ending> {
    let groups = guard_link::groups_of(pid);
    loop {
        let mut status = 0;
        // SAFETY: `status` is valid for writes during the whole call.
        let reaped = unsafe { libc::waitpid(pid.as_raw(), &raw mut status, libc::WNOHANG) };
        if reaped > 0 {
            guard_link::announce_ends(groups);
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

/// Checks that this process has one thread.
///
/// # Errors
/// Fails if this process has more than one thread, or if `/proc` is not mounted.
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
        "the master has {threads} threads, and a fork would copy only one (code before `run`, in `preload` and in `before_fork` must \
         end the threads that it starts)"
    )))
}
