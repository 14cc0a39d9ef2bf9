//! The bounded pool of threads that run blocking functions.

use std::sync::{Mutex, OnceLock, PoisonError};
use std::thread;

use crossbeam::channel::{Receiver, Sender, bounded};
use crossbeam::sync::WaitGroup;

use super::Job;

/// The threads, and the queue from which they take.
pub(super) struct Pool {
    queue: Sender<Job>,
    /// Held by each job that waits or runs.
    jobs: Mutex<WaitGroup>,
}

/// This worker's `--threads` and `--queue`.
static SIZE: OnceLock<(u32, u32)> = OnceLock::new();
static POOL: OnceLock<Pool> = OnceLock::new();

/// Sets the size of the pool that will be made. Called once, in a new worker.
pub(crate) fn configure(threads: u32, queue: u32) {
    let _ = SIZE.set((threads, queue));
}

/// Waits for all that runs. Called once, when nothing new can come.
pub(crate) fn finish() {
    if let Some(pool) = POOL.get() {
        // Our own hold on the group is given up with it.
        let jobs = std::mem::take(&mut *pool.jobs.lock().unwrap_or_else(PoisonError::into_inner));
        jobs.wait();
    }
}

/// The first call starts the threads: a worker without blocking functions has none, nor has the master.
pub(super) fn pool() -> &'static Pool {
    POOL.get_or_init(|| {
        let &(threads, queue) = SIZE.get().unwrap_or(&(1, 1024));
        let (sender, receiver) = bounded(queue as usize);
        let started = (0..threads).filter(|&number| start_thread(number, receiver.clone())).count();
        assert!(started > 0, "not one of the {threads} threads for blocking functions could be started");
        Pool { queue: sender, jobs: Mutex::new(WaitGroup::new()) }
    })
}

impl Pool {
    /// False if too many wait already.
    pub(super) fn start(&self, job: impl FnOnce() + Send + 'static) -> bool {
        let held = self.jobs.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let job = move || {
            job();
            drop(held);
        };
        self.queue.try_send(Box::new(job)).is_ok()
    }
}

fn start_thread(number: u32, jobs: Receiver<Job>) -> bool {
    let work = move || jobs.into_iter().for_each(super::run);
    match thread::Builder::new().name(format!("blocking-{number}")).spawn(work) {
        Ok(_) => true,
        Err(error) => {
            log::error!("cannot start a thread for blocking functions: {error}");
            false
        }
    }
}
