//! The master: one thread, one `poll(2)`, events in, actions out.
//!
//! It makes processes, hears of their readiness and their end, and does what the [`supervisor`] decides. It
//! runs no code of the application's but two hooks, never touches tokio, and takes no lock in shared memory: of that it reads the
//! scoreboard rows of dead workers, marks them as such, and nothing else. What a child says is gossip: bounded,
//! and matched against the pid it came from.
//!
//! - [`supervisor`] decides (pure).
//! - [`spawn`] makes processes; [`signals`] and [`program_log`] make signals and programs' output readable.
//! - [`demand`] and [`recycling`] find out how much there is to do, and who has served its time.
//! - [`hangs`] finds workers that hang, and [`quarantine`] the requests that they die of (both pure); [`sickbed`] brings
//!   them what they go by. [`symbols`] has the functions named in which workers crashed.
//! - [`helpers`] decides which daemons and jobs run beside the workers (pure); [`beside`] runs them.
//! - [`obituary`] writes the line for each process that ended.

mod beside;
mod demand;
mod hangs;
mod helpers;
mod notes;
mod obituary;
mod program_log;
mod quarantine;
mod recycling;
mod sickbed;
mod signals;
mod spawn;
mod supervisor;
mod symbols;

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsFd as _, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use forkyard_shm::{Scoreboard, Segment};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;

use self::beside::Beside;
pub(crate) use self::beside::check_helpers;
use self::recycling::Recycling;
use self::sickbed::Sickbed;
use self::signals::{Meaning, SignalInbox};
pub(crate) use self::spawn::Launch;
use self::spawn::{Child, Link, Nursery, has_connection, is_accepting};
use self::supervisor::{Action, Budget, Event, Note, Policy, Supervisor, Wish};
use crate::config::{Config, Share};
use crate::heritage::Report;
use crate::hooks::{WorkerExit, WorkerId};
use crate::listen::Listener;
use crate::queue_depth::QueueDepth;
use crate::sys::{self, Ending};

/// The exit status by which a worker asks not to be replaced.
const RETIRE: i32 = 125;
/// How often an external program that is starting is looked at.
const LOOK: Duration = Duration::from_millis(10);

struct Master {
    supervisor: Supervisor,
    nursery: Nursery,
    signals: SignalInbox,
    scoreboard: Scoreboard,
    children: HashMap<Pid, Child>,
    recycling: Recycling,
    queue_depth: QueueDepth,
    /// The process that was buried last, and its last words.
    last_buried: Option<(Pid, String)>,
    begun: Instant,
    sickbed: Sickbed,
    beside: Beside,
    /// Set when the last worker is gone: whether the operator asked for that.
    emptied: Option<bool>,
    /// Set when the last process is gone: whether the operator asked for that.
    ended: Option<bool>,
}

/// Runs until it is told to stop and every process is gone. True if it was told to, false if all workers
/// asked not to be replaced.
///
/// `begun` is when the program started, and `application` are the descriptors of the application's own, which
/// workers keep.
///
/// # Errors
/// If the master cannot set itself up.
pub(crate) fn run(
    config: Arc<Config>,
    listeners: Arc<[Listener]>,
    segment: Segment,
    launch: Launch,
    application: Arc<[RawFd]>,
    begun: Instant,
) -> io::Result<bool> {
    // Whoever started us may have blocked signals, and the mask is inherited.
    sys::unblock_signals();
    // Orphans among our descendants come to us, to be reaped, as they would come to PID 1.
    nix::sys::prctl::set_child_subreaper(true)?;
    let recycling = Recycling::new(&config.numbers);
    let mut master = Master {
        supervisor: Supervisor::new(policy(&config)),
        signals: SignalInbox::open()?,
        scoreboard: segment.scoreboard(),
        sickbed: Sickbed::new(&config.failures, segment.quarantine()),
        beside: Beside::new(&config, segment.clone(), begun)?,
        nursery: Nursery::new(config, listeners, segment, launch, application)?,
        recycling,
        queue_depth: QueueDepth::new(),
        children: HashMap::new(),
        last_buried: None,
        begun,
        emptied: None,
        ended: None,
    };
    master.feed(Event::Tick);
    while master.ended.is_none() {
        if master.wait() {
            master.feed(Event::Arrival);
        }
        master.hear_signals();
        master.hear_children();
        master.look_at_programs();
        master.recycle();
        master.look_after_the_sick();
        master.feed(Event::Tick);
        master.look_beside();
    }
    Ok(master.ended == Some(true))
}

/// What of the configuration the supervisor goes by.
fn policy(config: &Config) -> Policy {
    Policy {
        workers: (config.workers.min, config.workers.max),
        // A program serves one request at a time, as far as we know.
        per_worker: config.threads.max(1),
        scale_down_after: config.numbers.scale_down_after,
        max_unavailable: match config.numbers.max_unavailable {
            Share::Number(number) => Budget::Number(number),
            Share::Percent(percent) => Budget::Percent(percent),
        },
        slots: config.slots(),
        start_timeout: config.start_timeout,
        drain_timeout: config.drain_timeout,
        respawn_rate: config.respawn_rate,
    }
}

impl Master {
    fn now(&self) -> Duration {
        self.begun.elapsed()
    }

    /// The one wait point. True if a connection waits and there is no worker.
    fn wait(&self) -> bool {
        let deadlines = [
            self.supervisor.next_deadline(),
            self.recycling.next_deadline(),
            self.sickbed.next_deadline(),
            self.beside.next_deadline(),
        ];
        let deadline = deadlines.into_iter().flatten().min();
        let mut timeout = deadline.map(|deadline| deadline.saturating_sub(self.now()));
        if self.children.values().any(Child::is_unsettled_program) {
            timeout = Some(timeout.map_or(LOOK, |timeout| timeout.min(LOOK)));
        }
        // One more millisecond, or else it would wake just before the deadline.
        let timeout = timeout.map_or(PollTimeout::NONE, |timeout| {
            PollTimeout::try_from(timeout.as_millis() + 1).unwrap_or(PollTimeout::MAX)
        });
        let signals = PollFd::new(self.signals.as_fd(), PollFlags::POLLIN);
        let children = self.children.values().filter_map(Child::watched);
        let children = children.chain(self.beside.watched()).map(|fd| PollFd::new(fd, PollFlags::POLLIN));
        // Without workers nobody else looks whether somebody comes.
        let listeners = if self.supervisor.awaits_arrival() { &*self.nursery.listeners } else { &[] };
        let arrivals = listeners.iter().map(|listener| PollFd::new(listener.as_fd(), PollFlags::POLLIN));
        let mut watched: Vec<PollFd<'_>> = arrivals.chain([signals]).chain(children).collect();
        match poll(&mut watched, timeout) {
            Ok(_) => watched[..listeners.len()].iter().any(|listener| listener.any().unwrap_or(false)),
            Err(nix::errno::Errno::EINTR) => false,
            Err(errno) => {
                // ENOMEM: nothing is lost, but do not spin.
                log::error!("the master cannot poll: {errno}");
                std::thread::sleep(LOOK);
                false
            }
        }
    }

    fn hear_signals(&mut self) {
        for meaning in self.signals.take() {
            match meaning {
                Meaning::Child => self.reap(),
                Meaning::Command(command) => {
                    log::info!("asked to {}", command.verb());
                    self.feed(Event::Command(command));
                }
                Meaning::Reserved(what) => log::info!("signal {what} is reserved and does nothing yet"),
            }
        }
    }

    /// Reaps all that have ended: one SIGCHLD may stand for many.
    fn reap(&mut self) {
        while let Some(pid) = sys::ended_child() {
            if self.beside.has(pid) || self.children.get(&pid).is_some_and(|child| !child.is_worker()) {
                // What a wrapper script started, say, and left behind. Before the pid is free for others.
                let _ = killpg(pid, Signal::SIGKILL);
            }
            let Some(ending) = sys::reap(pid) else { return };
            if self.beside.ended(pid, ending) {
                continue;
            }
            self.hear(pid);
            let Some(child) = self.children.remove(&pid) else {
                if !self.sickbed.symbols.ended(pid, &self.signals) {
                    log::debug!("reaped a stranger pid={pid} {ending}");
                }
                continue;
            };
            let (slot, generation, since, asked) = (child.slot, child.generation, child.since, child.asked_to_leave);
            self.recycling.died(pid);
            self.scoreboard.bury(slot, pid.as_raw().cast_unsigned());
            let mut end = obituary::publish(pid, ending, child, &self.scoreboard);
            self.last_buried = Some((pid, std::mem::take(&mut end.last_words)));
            if let Launch::Worker(_, hooks) = &self.nursery.launch {
                let worker = WorkerId { slot, generation };
                let (pid, served, lived) = (pid.as_raw().cast_unsigned(), end.served, since.elapsed());
                let exit = WorkerExit { worker, pid, status: ending.status(), asked, served, lived };
                hooks.of_master.on_worker_exit(exit);
            }
            self.take_evidence(slot, pid, end);
            let wish = match ending {
                Ending::Exited(0) => Wish::Renew,
                Ending::Exited(RETIRE) => Wish::Retire,
                Ending::Exited(_) | Ending::Signaled(_) => Wish::Replace,
            };
            self.feed(Event::Exited { pid, wish });
        }
    }

    fn hear_children(&mut self) {
        let pids: Vec<Pid> = self.children.keys().copied().collect();
        for pid in pids {
            self.hear(pid);
        }
    }

    fn hear(&mut self, pid: Pid) {
        let Some(child) = self.children.get_mut(&pid) else { return };
        if child.watched().is_none() {
            return;
        }
        for report in child.listen(pid) {
            match report {
                Report::Ready => self.feed(Event::Ready { pid }),
                Report::Recycle(reason) => self.wear_out(pid, &reason),
                Report::LastWords(_) | Report::Trace(_) => {}
            }
        }
    }

    /// An external program tells us nothing. It counts as started when it sleeps in `accept`, or has a
    /// connection, or has lived for `--settle`.
    fn look_at_programs(&mut self) {
        let settle = self.nursery.config.settle;
        let mut started = Vec::new();
        for (&pid, child) in &mut self.children {
            let lived = child.since.elapsed();
            if let Link::Program { started: seen @ false, .. } = &mut child.link
                && (lived >= settle || is_accepting(pid) || has_connection(pid))
            {
                *seen = true;
                started.push(pid);
            }
        }
        for pid in started {
            self.feed(Event::Ready { pid });
        }
    }

    /// Looks who has served its time.
    fn recycle(&mut self) {
        let now = self.now();
        for pid in self.recycling.too_old(|pid| self.supervisor.is_ready(pid), now) {
            self.wear_out(pid, "max-age");
        }
        if let Some(pid) = self.recycling.turn(now)
            && self.supervisor.is_ready(pid)
            && let Some(bytes) = recycling::own_memory(pid)
            && self.recycling.is_too_large(pid, bytes)
        {
            self.wear_out(pid, &format!("max-memory memory={}K", bytes >> 10));
        }
    }

    /// Has a process replaced that serves well, and goes on doing so meanwhile.
    fn wear_out(&mut self, pid: Pid, reason: &str) {
        let Some(child) = self.children.get(&pid) else { return };
        let (slot, lived) = (child.slot, child.since.elapsed().as_millis());
        log::info!("worker is to be replaced slot={slot} pid={pid} lived={lived}ms reason={reason}");
        self.feed(Event::Recycle { pid });
    }

    /// Has daemons and jobs go on. When they are gone too, after the last worker, the master ends.
    fn look_beside(&mut self) {
        self.beside.turn(self.supervisor.is_up());
        if self.beside.is_empty() {
            self.ended = self.emptied;
        }
    }

    /// Gives the supervisor an event and does what it wants, until it wants nothing more.
    fn feed(&mut self, event: Event) {
        if let Event::Command(command) = event {
            self.beside.heed(command);
        }
        let mut actions = VecDeque::from(self.supervisor.step(event, self.now()));
        while let Some(action) = actions.pop_front() {
            if let Some(answer) = self.act(action) {
                actions.extend(self.supervisor.step(answer, self.now()));
            }
        }
    }

    fn act(&mut self, action: Action) -> Option<Event> {
        match action {
            Action::Spawn { slot, generation } => Some(self.spawn(slot, generation)),
            Action::Terminate { pid } => {
                self.signal(pid, Signal::SIGTERM);
                None
            }
            Action::Remind { pid } => {
                // Our own workers miss nothing; and to a program that is at work a second TERM may mean "at once".
                if self.children.get(&pid).is_some_and(|child| !child.is_worker()) && is_accepting(pid) {
                    self.signal(pid, Signal::SIGTERM);
                }
                None
            }
            Action::Kill { pid } => {
                self.signal(pid, Signal::SIGKILL);
                None
            }
            Action::Sample => {
                let (children, listeners) = (&self.children, &self.nursery.listeners);
                let (supervisor, scoreboard) = (&self.supervisor, &self.scoreboard);
                Some(Event::Demand(demand::sample(children, supervisor, scoreboard, &self.queue_depth, listeners)))
            }
            Action::Abort { pid } => {
                self.abort(pid);
                None
            }
            Action::Note(note) => {
                self.tell(note);
                if let Note::ReloadDone { .. } = note {
                    self.beside.reloaded();
                }
                None
            }
            Action::Exit { success } => {
                self.emptied = Some(success);
                self.beside.stop();
                None
            }
        }
    }

    fn spawn(&mut self, slot: u32, generation: u64) -> Event {
        match self.nursery.spawn(slot, generation, &self.signals) {
            Ok((pid, child)) => {
                log::debug!("worker spawned slot={slot} pid={pid} gen={generation}");
                self.children.insert(pid, child);
                self.recycling.born(pid, self.now());
                Event::Spawned { slot, pid }
            }
            Err(error) => {
                log::error!("cannot make a worker slot={slot} gen={generation}: {error}");
                Event::SpawnFailed { slot }
            }
        }
    }

    fn signal(&mut self, pid: Pid, signal: Signal) {
        let Some(child) = self.children.get_mut(&pid) else { return };
        child.asked_to_leave = true;
        // The pid cannot have been given to another process: we have not reaped it. A program may be a wrapper:
        // its whole group is meant.
        let sent = if child.is_worker() { kill(pid, signal) } else { killpg(pid, signal) };
        if let Err(errno) = sent {
            log::error!("cannot signal worker slot={} pid={pid} signal={signal}: {errno}", child.slot);
        }
    }
}

impl Child {
    fn is_unsettled_program(&self) -> bool {
        matches!(self.link, Link::Program { started: false, .. })
    }
}
