//! Children of a test: forked, awaited by a byte in a pipe, and killed with their parent.

use std::fs::File;
use std::io::{Read, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};

use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork, pipe};

/// A forked process.
pub(crate) struct Child {
    pub(crate) pid: Pid,
    ready: File,
}

/// Forks. The child runs `work` with the writing end of a pipe, and exits with 0 if that returns, with 101 if it panics.
pub(crate) fn spawn(work: impl FnOnce(File)) -> Child {
    let (reader, writer) = pipe().expect("pipe");
    // SAFETY: the caller sees to it that this process has one thread, or that the child needs nothing that the others'
    // locks protect.
    match unsafe { fork() }.expect("fork") {
        ForkResult::Parent { child } => Child { pid: child, ready: reader.into() },
        ForkResult::Child => {
            drop(reader);
            let outcome = catch_unwind(AssertUnwindSafe(|| {
                set_pdeathsig(Signal::SIGKILL).expect("prctl");
                work(writer.into());
            }));
            // SAFETY: ends the process here, before it returns into what the parent was doing.
            unsafe { libc::_exit(if outcome.is_ok() { 0 } else { 101 }) }
        }
    }
}

impl Child {
    /// Waits until the child has written a byte.
    pub(crate) fn await_ready(&mut self) {
        let mut byte = [0];
        if self.ready.read_exact(&mut byte).is_err() {
            panic!("child ended early: {:?}", waitpid(self.pid, None));
        }
    }

    /// Kills the child, which must not have ended by itself.
    pub(crate) fn kill(self) {
        kill(self.pid, Signal::SIGKILL).expect("kill");
        let status = waitpid(self.pid, None).expect("waitpid");
        assert!(matches!(status, WaitStatus::Signaled(_, Signal::SIGKILL, _)), "child ended by itself: {status:?}");
    }

    /// Waits for the child, which must end well.
    pub(crate) fn join(self) {
        assert_eq!(waitpid(self.pid, None), Ok(WaitStatus::Exited(self.pid, 0)));
    }
}

/// What [`Child::await_ready`] waits for.
pub(crate) fn say_ready(pipe: &mut File) {
    pipe.write_all(b"!").expect("parent is there");
}
