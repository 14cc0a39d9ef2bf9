//! Calls the application's hooks when workers are forked, become ready, drain and exit.
//!
//! The master's hooks run in the master, between two events of its loop; a worker's hooks run in the worker. A panic in
//! a hook does not terminate the process.

use std::cell::RefCell;
use std::fmt;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitStatus;
use std::time::Duration;

use crate::sys::BoxError;

/// A hook that runs in the master, which has one thread.
type OfMaster<A, R> = Option<RefCell<Box<dyn FnMut(A) -> R>>>;
/// A hook that runs in a worker, on a thread that was created after the fork.
type OfWorker<A, R> = Option<Box<dyn Fn(A) -> R + Send + Sync>>;

/// Identifies the worker that a hook is called for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct WorkerId {
    /// The number of the worker's slot, unique among the running workers: see [`Context::slot`](crate::Context::slot).
    pub slot: u32,
    /// The worker's generation: 1 for the first workers, incremented by each reload.
    pub generation: u64,
}

/// Describes how a worker ended.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct WorkerExit {
    /// The worker's slot and generation.
    pub worker: WorkerId,
    /// The worker's process id.
    pub pid: u32,
    /// The exit status, or the signal that terminated the worker.
    pub status: ExitStatus,
    /// Whether the worker had been asked to exit. Such a worker may have crashed while draining: see `status`.
    pub asked: bool,
    /// Number of requests served, as counted by the worker itself.
    pub served: u64,
    /// How long the worker ran.
    pub lived: Duration,
}

/// All hooks of an application.
#[derive(Default)]
pub(crate) struct Hooks {
    pub(crate) of_master: MasterHooks,
    pub(crate) of_worker: WorkerHooks,
}

#[derive(Default)]
pub(crate) struct MasterHooks {
    pub(crate) before_fork: OfMaster<WorkerId, Result<(), BoxError>>,
    pub(crate) on_worker_exit: OfMaster<WorkerExit, ()>,
}

#[derive(Default)]
pub(crate) struct WorkerHooks {
    pub(crate) after_fork: OfWorker<WorkerId, Result<(), BoxError>>,
    pub(crate) on_ready: OfWorker<WorkerId, Result<(), BoxError>>,
    pub(crate) on_drain: OfWorker<(WorkerId, Duration), ()>,
    pub(crate) on_exit: OfWorker<WorkerId, ()>,
}

impl fmt::Debug for WorkerHooks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WorkerHooks").finish_non_exhaustive()
    }
}

impl MasterHooks {
    /// Calls the hook before a worker is forked.
    ///
    /// # Errors
    /// Fails if the hook fails or panics.
    pub(crate) fn before_fork(&self, worker: WorkerId) -> io::Result<()> {
        let Some(hook) = &self.before_fork else { return Ok(()) };
        call("before_fork", || (hook.borrow_mut())(worker))
    }

    pub(crate) fn on_worker_exit(&self, exit: WorkerExit) {
        let Some(hook) = &self.on_worker_exit else { return };
        complain(call("on_worker_exit", || {
            (hook.borrow_mut())(exit);
            Ok(())
        }));
    }
}

impl WorkerHooks {
    /// Calls the hook in a new worker.
    ///
    /// # Errors
    /// Fails if the hook fails or panics.
    pub(crate) fn after_fork(&self, worker: WorkerId) -> io::Result<()> {
        self.after_fork.as_ref().map_or(Ok(()), |hook| call("after_fork", || hook(worker)))
    }

    /// Calls the hook when the worker can serve.
    ///
    /// # Errors
    /// Fails if the hook fails or panics.
    pub(crate) fn on_ready(&self, worker: WorkerId) -> io::Result<()> {
        self.on_ready.as_ref().map_or(Ok(()), |hook| call("on_ready", || hook(worker)))
    }

    pub(crate) fn on_drain(&self, worker: WorkerId, within: Duration) {
        let Some(hook) = &self.on_drain else { return };
        complain(call("on_drain", || {
            hook((worker, within));
            Ok(())
        }));
    }

    pub(crate) fn on_exit(&self, worker: WorkerId) {
        let Some(hook) = &self.on_exit else { return };
        complain(call("on_exit", || {
            hook(worker);
            Ok(())
        }));
    }
}

/// Calls a hook; a panic becomes an error.
fn call(name: &str, hook: impl FnOnce() -> Result<(), BoxError>) -> io::Result<()> {
    let outcome = catch_unwind(AssertUnwindSafe(hook)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str));
        Err(format!("a panic: {}", text.unwrap_or("(without a message)")).into())
    });
    outcome.map_err(|error| io::Error::other(format!("the application's {name} failed: {error}")))
}

fn complain(outcome: io::Result<()>) {
    if let Err(error) = outcome {
        log::error!("{error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_an_error_and_the_hook_can_be_called_again() {
        let mut count = 0;
        let hook = move |_| {
            count += 1;
            if count == 1 { panic!("number {count}") } else { Err(format!("number {count}").into()) }
        };
        let hooks = MasterHooks { before_fork: Some(RefCell::new(Box::new(hook))), ..MasterHooks::default() };
        let worker = WorkerId { slot: 0, generation: 1 };
        for words in ["a panic: number 1", "failed: number 2"] {
            let error = hooks.before_fork(worker).unwrap_err().to_string();
            assert!(error.contains("before_fork") && error.contains(words), "{error}");
        }
        WorkerHooks { on_exit: Some(Box::new(|_| panic!("contained"))), ..WorkerHooks::default() }.on_exit(worker);
    }
}
