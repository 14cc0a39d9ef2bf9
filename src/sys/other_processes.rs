//! Reads the state of other processes with system calls that need `unsafe`.

#![expect(
    unsafe_code,
    reason = "this file is part of the fence: calls by number, and a siginfo_t that the kernel fills in"
)]

use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd};

use nix::sys::wait::WaitPidFlag;
use nix::unistd::Pid;

use super::Ending;

/// Returns a copy of descriptor `fd` in another process, which `process` identifies (see [`process_descriptor`]).
///
/// [`process_descriptor`]: super::process_descriptor
///
/// # Errors
/// Returns the error from `pidfd_getfd(2)`: the kernel requires the rights of a debugger.
pub(crate) fn descriptor_of(process: &OwnedFd, fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: plain system call with three integers.
    let copy = unsafe { libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), fd, 0) };
    let copy = i32::try_from(copy).ok().filter(|&copy| copy >= 0).ok_or_else(io::Error::last_os_error)?;
    // SAFETY: a number that pidfd_getfd returned is new, open and not owned elsewhere.
    Ok(unsafe { OwnedFd::from_raw_fd(copy) })
}

/// Returns how a child has ended that has not been reaped yet, or `None` if the child is running. The child stays
/// unreaped, so that neither its pid nor the number of its process group can be reused.
pub(crate) fn ending_of(pid: Pid) -> Option<Ending> {
    let flags = (WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT).bits();
    let id = libc::id_t::try_from(pid.as_raw()).ok()?;
    // SAFETY: all zeroes is a valid siginfo_t.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    // SAFETY: `info` is valid for writes during the whole call.
    let outcome = unsafe { libc::waitid(libc::P_PID, id, &raw mut info, flags) };
    // SAFETY: waitid has filled in the fields of a child's siginfo_t, or left all of it zero.
    let found = unsafe { info.si_pid() };
    // SAFETY: waitid has filled in the fields of a child's siginfo_t, or left all of it zero.
    let status = unsafe { info.si_status() };
    match info.si_code {
        _ if outcome != 0 || found == 0 => None,
        libc::CLD_EXITED => Some(Ending::Exited(status)),
        _ => Some(Ending::Signaled(status)),
    }
}
