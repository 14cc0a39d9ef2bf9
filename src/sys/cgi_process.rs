//! System calls of the CGI runner (`cgi_runner/`), which is a fork of the master and starts programs.
#![expect(unsafe_code, reason = "part of the fence: see `sys.rs`")]

use std::io;
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command};

use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::Signal;
use nix::unistd::{Pid, getpid, getppid};

use super::descriptors::DESCRIPTOR_LIMIT;
use super::{exit_now, unblock_signals};

/// Highest number of a standard signal.
const LAST_SIGNAL: i32 = 31;

/// Gives this process, which has just been forked, the signal dispositions and the descriptor limit of an executed
/// program, and unblocks all signals. Ignored signals stay ignored, as they do when a program is executed. The kernel kills
/// this process when `master` dies.
///
/// # Errors
/// Returns the error from the system call that failed, or `ESRCH` if the master is dead already.
pub(crate) fn begin_like_program(master: Pid) -> io::Result<()> {
    for signal in 1..=LAST_SIGNAL {
        // SAFETY: all zeroes is a valid sigaction.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        // SAFETY: `action` is valid for writes; the call changes nothing.
        let found = unsafe { libc::sigaction(signal, std::ptr::null(), &raw mut action) };
        if found == 0 && action.sa_sigaction != libc::SIG_IGN {
            // SAFETY: the default action runs no code of this process. For SIGKILL and SIGSTOP, the call fails.
            unsafe { libc::signal(signal, libc::SIG_DFL) };
        }
    }
    if let Some(&(soft, hard)) = DESCRIPTOR_LIMIT.get() {
        setrlimit(Resource::RLIMIT_NOFILE, soft, hard)?;
    }
    die_with(master)?;
    unblock_signals();
    Ok(())
}

/// Makes the kernel send SIGKILL to this process when its parent dies. Async-signal-safe.
fn die_with(parent: Pid) -> io::Result<()> {
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
    if getppid() == parent { Ok(()) } else { Err(io::Error::from_raw_os_error(libc::ESRCH)) }
}

/// Starts `command` as a child in the process group of this process. The kernel kills the child when this process dies. The
/// child inherits standard input, output and error as set in `command`, and descriptors that are not close-on-exec.
///
/// # Errors
/// Returns the error from `fork(2)` or `execve(2)`.
pub(crate) fn spawn_in_group(command: &mut Command) -> io::Result<Child> {
    let parent = getpid();
    // SAFETY: the closure makes two async-signal-safe system calls: no allocation, no lock.
    unsafe { command.pre_exec(move || die_with(parent)) };
    command.spawn()
}

/// Ends this process with the signal that has terminated its child. Leaves no second core dump.
pub(crate) fn die_of(signal: i32) -> ! {
    let _ = setrlimit(Resource::RLIMIT_CORE, 0, 0); // lowering a limit is allowed
    // SAFETY: plain system call. The signal has its default action: see `begin_like_program`.
    unsafe { libc::raise(signal) };
    // The signal is ignored, or does not terminate a process.
    exit_now(u8::try_from(128 + signal).unwrap_or(u8::MAX))
}
