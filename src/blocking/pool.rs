//! The bounded pool of threads that run blocking functions.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread;

use crossbeam::channel::{Receiver, Sender, bounded};
use crossbeam::sync::WaitGroup;
use forkyard_shm::Occupancy;
use tokio::sync::Notify;

use super::Job;
use crate::{at_work, crash};

/// The threads, and the queue from which they take.
pub(super) struct Pool {
    threads: u32,
    queue: Sender<Task>,
    /// Held by each job that waits or runs.
    jobs: Mutex<WaitGroup>,
    /// Jobs that wait or run.
    count: AtomicU32,
    occupancy: Option<Occupancy>,
    one_is_free: Notify,
}

/// A job in the queue.
struct Task {
    job: Arc<dyn Job>,
    _held: WaitGroup,
}

/// This worker's `--threads` and `--queue`, and where its siblings see whether it is occupied.
static SIZE: OnceLock<(u32, u32, Option<Occupancy>)> = OnceLock::new();
static POOL: OnceLock<Pool> = OnceLock::new();
static ALL_ARE_OCCUPIED: Notify = Notify::const_new();

/// Whether a further job would have to wait for a thread.
pub(crate) fn are_all_occupied() -> bool {
    POOL.get().is_some_and(|pool| pool.count.load(Ordering::Relaxed) >= pool.threads)
}

/// Returns when a job has ended. One that ends while nobody waits here is not told.
pub(crate) async fn one_is_free() {
    match POOL.get() {
        Some(pool) => pool.one_is_free.notified().await,
        None => std::future::pending().await,
    }
}

/// Returns when a job has taken the last free thread. One that does so while nobody waits here is not told.
pub(crate) async fn all_became_occupied() {
    ALL_ARE_OCCUPIED.notified().await;
}

/// Sets the size of the pool that will be made, and tells siblings through `occupancy` when all its threads are
/// occupied. Called once, in a new worker.
pub(crate) fn configure(threads: u32, queue: u32, occupancy: Option<Occupancy>) {
    let _ = SIZE.set((threads, queue, occupancy));
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
        let (threads, queue, occupancy) = SIZE.get().cloned().unwrap_or((1, 1024, None));
        let (sender, receiver) = bounded(queue as usize);
        let started = (0..threads).filter(|&number| start_thread(number, receiver.clone())).count();
        assert!(started > 0, "not one of the {threads} threads for blocking functions could be started");
        let (jobs, count) = (Mutex::new(WaitGroup::new()), AtomicU32::new(0));
        Pool { threads, queue: sender, jobs, count, occupancy, one_is_free: Notify::new() }
    })
}

impl Pool {
    /// False if too many wait already.
    pub(super) fn start(&self, job: Arc<dyn Job>) -> bool {
        let held = self.jobs.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if self.count.fetch_add(1, Ordering::SeqCst) + 1 == self.threads {
            self.tell();
            ALL_ARE_OCCUPIED.notify_waiters();
        }
        let started = self.queue.try_send(Task { job, _held: held }).is_ok();
        if !started {
            self.one_ended();
        }
        started
    }

    fn one_ended(&self) {
        if self.count.fetch_sub(1, Ordering::SeqCst) <= self.threads {
            self.tell();
            self.one_is_free.notify_waiters();
        }
    }

    /// Tells the siblings, until what they were told is how it is: another thread may have told them something else
    /// meanwhile.
    fn tell(&self) {
        let Some(occupancy) = &self.occupancy else { return };
        let are_occupied = || self.count.load(Ordering::SeqCst) >= self.threads;
        let mut told = None;
        while told != Some(are_occupied()) {
            let now = are_occupied();
            occupancy.set(now);
            told = Some(now);
        }
    }
}

fn work(tasks: Receiver<Task>) {
    crash::give_stack();
    at_work::enlist();
    for task in tasks {
        task.job.run();
        if let Some(pool) = POOL.get() {
            pool.one_ended();
        }
    }
}

fn start_thread(number: u32, tasks: Receiver<Task>) -> bool {
    match thread::Builder::new().name(format!("blocking-{number}")).spawn(|| work(tasks)) {
        Ok(_) => true,
        Err(error) => {
            log::error!("cannot start a thread for blocking functions: {error}");
            false
        }
    }
}
