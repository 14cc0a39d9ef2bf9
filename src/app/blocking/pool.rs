//! Runs blocking functions on a bounded pool of threads.
//!
//! Waking a thread costs a system call, and so does waking the event loop. Wake-ups are therefore batched: one wake-up
//! covers all jobs that an iteration of the loop starts, or all jobs that have finished since the last iteration. A
//! thread that is awake takes further jobs by itself. At the end of the iteration, one sleeping thread is woken
//! ([`end_turn`]), and each woken thread wakes the next one if another job is waiting.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use forkyard_shm::Occupancy;
use tokio::sync::Notify;

use super::{Job, inline, overdue};
use crate::diagnostics::{crash, current_request};

/// Time between two attempts to create threads.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);

pub(super) struct Pool {
    threads: u32,
    /// Number of threads that exist. It is less than `threads` if the system does not allow more.
    started: AtomicU32,
    /// Time of the last attempt to create threads.
    attempted: Mutex<Option<Instant>>,
    /// Number of jobs that may wait in addition to those that are running.
    queue: u32,
    waiting: Mutex<Waiting>,
    one_is_called: Condvar,
    /// Number of jobs that are waiting or running.
    count: AtomicU32,
    occupancy: Option<Occupancy>,
    /// Whether the siblings were notified that all threads are occupied. Written under `reporting`.
    is_reported: AtomicBool,
    reporting: Mutex<()>,
    one_is_free: Notify,
    /// Whether [`finish`] is waiting.
    is_finishing: AtomicBool,
    one_has_ended: (Mutex<()>, Condvar),
    /// Whether all threads hung at the last check.
    is_stuck: AtomicBool,
    /// Number of hanging threads in the last notice. Written under `reporting`.
    hung: AtomicU32,
}

#[derive(Default)]
struct Waiting {
    jobs: VecDeque<Arc<dyn Job>>,
    /// Sleeping threads that have not been notified.
    asleep: u32,
    /// Threads that have been notified but have not woken yet.
    called: u32,
}

/// The values of `--threads` and `--queue`, and the scoreboard field that shows siblings whether this worker is
/// occupied.
static SIZE: OnceLock<(u32, u32, Option<Occupancy>)> = OnceLock::new();
static POOL: OnceLock<Pool> = OnceLock::new();
static POOL_IS_FULL: Notify = Notify::const_new();

/// Whether a further job would have to wait for a thread.
pub(crate) fn pool_is_full() -> bool {
    POOL.get().is_some_and(Pool::is_occupied)
}

/// Returns when a thread becomes free after all threads have been occupied. A thread that became free before the call
/// is not reported.
pub(crate) async fn one_is_free() {
    match POOL.get() {
        Some(pool) => pool.one_is_free.notified().await,
        None => std::future::pending().await,
    }
}

/// Returns when a job next takes the last free thread. A job that took the last free thread before the call is not
/// reported.
pub(crate) async fn pool_became_full() {
    POOL_IS_FULL.notified().await;
}

/// Sets the size of the pool, and the `occupancy` from which siblings read whether all its
/// threads are occupied. Called once, in a new worker, before the pool is created.
pub(crate) fn configure(threads: u32, queue: u32, occupancy: Option<Occupancy>) {
    let _ = SIZE.set((threads, queue, occupancy));
}

/// Waits for all jobs except hanging ones; returns the number of hanging functions. Called once,
/// when no new job can arrive.
pub(crate) fn finish() -> usize {
    let Some(pool) = POOL.get() else { return 0 };
    pool.wake_one();
    let (lock, one_has_ended) = &pool.one_has_ended;
    let mut locked = lock.lock().unwrap_or_else(PoisonError::into_inner);
    pool.is_finishing.store(true, Ordering::SeqCst);
    loop {
        let (hanging, next) = overdue::outstaying();
        if pool.has_nothing_but(hanging) {
            return hanging;
        }
        locked = match next.map(|at| at.saturating_duration_since(Instant::now())) {
            Some(time) => {
                one_has_ended.wait_timeout(locked, time).map_or_else(|error| error.into_inner().0, |woken| woken.0)
            }
            None => one_has_ended.wait(locked).unwrap_or_else(PoisonError::into_inner),
        };
    }
}

/// Checks whether all threads hang. If so, the waiting requests and all later ones are answered with 503. Called when a
/// function hangs.
pub(super) fn look_whether_stuck() {
    let Some(pool) = POOL.get() else { return };
    pool.report_hung();
    if !pool.is_stuck() {
        return;
    }
    let jobs = std::mem::take(&mut pool.waiting().jobs);
    let count = u32::try_from(jobs.len()).unwrap_or(u32::MAX);
    pool.count.fetch_sub(count, Ordering::SeqCst);
    pool.is_stuck.store(true, Ordering::SeqCst);
    log::error!(
        waiting = count;
        "all threads for blocking functions hang: requests that need one get 503 until this worker is replaced"
    );
    jobs.iter().for_each(|job| job.refuse());
}

/// Wakes a thread and notifies siblings. Called at the end of each event loop iteration in which jobs were started.
pub(super) fn end_turn() {
    if let Some(pool) = POOL.get() {
        pool.wake_one();
        if pool.is_occupied() {
            pool.report();
        }
    }
}

/// Wakes the tasks that wait for a free thread. Must be called on the event loop's thread.
pub(super) fn announce_free() {
    if let Some(pool) = POOL.get() {
        pool.one_is_free.notify_waiters();
    }
}

pub(super) fn pool() -> &'static Pool {
    let (threads, queue, occupancy) = SIZE.get().cloned().unwrap_or((1, 1024, None));
    POOL.get_or_init(|| Pool {
        threads,
        started: AtomicU32::new(0),
        attempted: Mutex::default(),
        queue,
        waiting: Mutex::default(),
        one_is_called: Condvar::new(),
        count: AtomicU32::new(0),
        occupancy,
        is_reported: AtomicBool::new(false),
        reporting: Mutex::new(()),
        one_is_free: Notify::new(),
        is_finishing: AtomicBool::new(false),
        one_has_ended: (Mutex::new(()), Condvar::new()),
        is_stuck: AtomicBool::new(false),
        hung: AtomicU32::new(0),
    })
}

impl Pool {
    /// Queues a job. Returns false if too many jobs are already waiting, or if no thread exists. If this thread has an
    /// event loop, a sleeping pool thread is woken at the end of the loop's iteration.
    ///
    /// The first call starts the threads, so neither the master nor a worker without blocking functions has pool
    /// threads.
    pub(super) fn start(&'static self, job: Arc<dyn Job>) -> bool {
        if self.started.load(Ordering::SeqCst) < self.threads && !self.start_threads() {
            return false;
        }
        if self.is_stuck.load(Ordering::SeqCst) {
            if self.is_stuck() {
                return false;
            }
            self.is_stuck.store(false, Ordering::SeqCst);
        }
        if self.count.fetch_add(1, Ordering::SeqCst) >= self.threads.saturating_add(self.queue) {
            self.count.fetch_sub(1, Ordering::SeqCst);
            return false;
        }
        self.waiting().jobs.push_back(job);
        if !inline::ends_later() {
            end_turn();
        }
        true
    }

    /// Starts as many of the missing threads as the system allows. Returns whether at least one thread exists.
    fn start_threads(&'static self) -> bool {
        let mut attempted = self.attempted.lock().unwrap_or_else(PoisonError::into_inner);
        let before = self.started.load(Ordering::SeqCst);
        if attempted.is_some_and(|at| at.elapsed() < RETRY_INTERVAL) {
            return before > 0;
        }
        let is_first = attempted.replace(Instant::now()).is_none();
        for number in before..self.threads {
            let thread = thread::Builder::new().name(format!("blocking-{number}"));
            if let Err(error) = thread.spawn(|| work(self)) {
                if is_first || number > before {
                    log::error!(
                        created = number, threads = self.threads;
                        "cannot create all threads for blocking functions: {error} (raise --rlimit nproc, ulimit -u, \
                         TasksMax= in the unit or pids.max of the container, or lower --threads)"
                    );
                }
                break;
            }
            self.started.fetch_add(1, Ordering::SeqCst);
        }
        let started = self.started.load(Ordering::SeqCst);
        if started == self.threads && !is_first {
            log::info!(threads = started; "created all threads for blocking functions");
        }
        self.report(); // the pool may have been occupied with fewer threads
        started > 0
    }

    /// Returns the number of threads that take jobs, or 1 if no thread exists; no job is waiting then.
    fn capacity(&self) -> u32 {
        self.started.load(Ordering::SeqCst).max(1)
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        // Code under the lock cannot panic.
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_occupied(&self) -> bool {
        self.count.load(Ordering::SeqCst) >= self.capacity()
    }

    fn is_stuck(&self) -> bool {
        overdue::hung() >= self.capacity() as usize
    }

    /// Publishes the number of hanging threads.
    fn report_hung(&self) {
        let _one_at_a_time = self.reporting.lock().unwrap_or_else(PoisonError::into_inner);
        let hung = u32::try_from(overdue::hung()).unwrap_or(u32::MAX);
        self.hung.store(hung, Ordering::SeqCst);
        if let Some(occupancy) = &self.occupancy {
            occupancy.set_hung(hung, hung >= self.capacity());
        }
    }

    /// Whether no request is waiting for a thread, and at most `running` jobs are running.
    fn has_nothing_but(&self, running: usize) -> bool {
        let waiting = self.waiting();
        let most = waiting.jobs.len().saturating_add(running);
        self.count.load(Ordering::SeqCst) as usize <= most && !waiting.jobs.iter().any(|job| job.is_waiting())
    }

    /// Wakes a thread if there is a job for it.
    fn wake_one(&self) {
        let mut waiting = self.waiting();
        let is_called = waiting.call();
        drop(waiting);
        if is_called {
            self.one_is_called.notify_one();
        }
    }

    /// Takes a job; waits until one is available.
    fn next(&self) -> Arc<dyn Job> {
        let mut waiting = self.waiting();
        loop {
            if let Some(job) = waiting.jobs.pop_front() {
                let is_called = waiting.call();
                drop(waiting);
                if is_called {
                    self.one_is_called.notify_one();
                }
                return job;
            }
            waiting.asleep += 1;
            waiting = self.one_is_called.wait(waiting).unwrap_or_else(PoisonError::into_inner);
            waiting.woke();
        }
    }

    fn one_ended(&self, job: &Arc<dyn Job>) {
        let before = self.count.fetch_sub(1, Ordering::SeqCst);
        if before <= self.capacity() && self.is_reported.load(Ordering::SeqCst) {
            self.report();
            match job.notifier() {
                Some(notifier) => notifier.one_is_free(),
                None => self.one_is_free.notify_waiters(),
            }
        }
        if self.hung.load(Ordering::SeqCst) > 0 {
            self.report_hung();
        }
        if self.is_finishing.load(Ordering::SeqCst) {
            let _locked = self.one_has_ended.0.lock().unwrap_or_else(PoisonError::into_inner);
            self.one_has_ended.1.notify_all();
        }
    }

    /// Publishes the occupancy to siblings and acceptors. If another thread changes the count at
    /// the same time, either that thread reads the flag set here, or the loop below reads the
    /// changed count.
    fn report(&self) {
        let _one_at_a_time = self.reporting.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let now = self.is_occupied();
            if self.is_reported.swap(now, Ordering::SeqCst) == now {
                return;
            }
            if let Some(occupancy) = &self.occupancy {
                occupancy.set(now);
            }
            if now {
                POOL_IS_FULL.notify_waiters();
            }
        }
    }
}

impl Waiting {
    /// Returns whether a thread must be woken. If so, counts that thread as notified.
    fn call(&mut self) -> bool {
        let is_called = !self.jobs.is_empty() && self.asleep > 0;
        self.asleep -= u32::from(is_called);
        self.called += u32::from(is_called);
        is_called
    }

    /// Records that a thread woke: the notified thread, or another one spuriously, as condition
    /// variables allow.
    fn woke(&mut self) {
        match self.called.checked_sub(1) {
            Some(called) => self.called = called,
            None => self.asleep -= 1,
        }
    }
}

fn work(pool: &Pool) {
    crash::give_stack();
    current_request::register_thread();
    loop {
        let job = pool.next();
        // A panic of the function itself is caught where the function is called. The call below catches panics of
        // destructors.
        let _ = catch_unwind(AssertUnwindSafe(|| job.run()));
        pool.one_ended(&job);
        let _ = catch_unwind(AssertUnwindSafe(|| drop(job)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_is_called_once_and_only_for_a_job() {
        let mut waiting = Waiting { asleep: 2, ..Waiting::default() };
        assert!(!waiting.call(), "there is nothing to do");
        waiting.jobs.push_back(Arc::new(Nothing));
        assert!(waiting.call() && waiting.call() && !waiting.call(), "all are awake");
        waiting.woke();
        waiting.woke();
        assert_eq!((waiting.asleep, waiting.called), (0, 0));
        waiting.asleep = 2;
        assert!(waiting.call());
        waiting.woke(); // the other thread, spuriously
        waiting.woke();
        assert_eq!((waiting.asleep, waiting.called), (0, 0));
    }

    struct Nothing;

    impl Job for Nothing {
        fn run(&self) {}

        fn poll(
            &self,
            _: &std::task::Context<'_>,
        ) -> std::task::Poll<Result<http::Response<crate::Body>, super::super::Panicked>> {
            std::task::Poll::Pending
        }

        fn shed(&self) {}

        fn refuse(&self) {}

        fn abandon(&self) -> bool {
            false
        }

        fn is_waiting(&self) -> bool {
            false
        }

        fn is_running(&self) -> bool {
            false
        }

        fn notifier(&self) -> Option<&Arc<inline::EventLoopNotifier>> {
            None
        }
    }
}
