//! Starts processes: forked children, and programs that must not outlive this process.
#![expect(unsafe_code, reason = "this file forks, and runs code between fork and exec")]

use std::os::unix::process::CommandExt as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::Command;

use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, Pid, fork};

use crate::error::Error;

/// A forked process, which is killed when dropped.
#[derive(Debug)]
pub(crate) struct Child(Pid);

/// Forks. The child runs `work` and exits. It runs no other code of the parent, not even a destructor. It is killed when the parent
/// terminates. The process must be single-threaded.
pub(crate) fn spawn(work: impl FnOnce()) -> Result<Child, Error> {
    // SAFETY: this process is single-threaded, so no lock is held by a thread that the child lacks.
    match unsafe { fork() }.map_err(Error::errno("fork"))? {
        ForkResult::Parent { child } => Ok(Child(child)),
        ForkResult::Child => {
            let done = catch_unwind(AssertUnwindSafe(|| {
                if set_pdeathsig(Signal::SIGKILL).is_ok() {
                    work();
                }
            }));
            // SAFETY: terminates the process here, before it can return into the code of the parent.
            unsafe { libc::_exit(i32::from(done.is_err())) }
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        let _ = kill(self.0, Signal::SIGKILL);
        let _ = waitpid(self.0, None);
    }
}

/// Makes the kernel kill the program when this process terminates in any way.
pub(crate) fn die_with_us(command: &mut Command) {
    let request = || set_pdeathsig(Signal::SIGKILL).map_err(Into::into);
    // SAFETY: between fork and exec, the closure makes one system call and does nothing else.
    unsafe { command.pre_exec(request) };
}
