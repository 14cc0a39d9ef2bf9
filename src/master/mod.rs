//! The master: one thread, one `poll(2)`, events in, actions out.
//!
//! It makes processes, hears of their readiness and their end, and does what the [`supervisor`] decides. It
//! never runs application code, never touches tokio, and takes no lock in shared memory: of that it reads the
//! scoreboard rows of dead workers, marks them as such, and nothing else. What a child says is gossip: bounded,
//! and matched against the pid it came from.
//!
//! - [`supervisor`] decides (pure).
//! - [`spawn`] makes processes; [`signals`] and [`program_log`] make signals and programs' output readable.
//! - [`upgrade`] has this process become another build of the program.
//! - [`obituary`] writes the line for each process that ended.

mod obituary;
mod program_log;
mod signals;
mod spawn;
mod supervisor;
pub(crate) mod upgrade;

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsFd as _, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use forkyard_shm::{Scoreboard, Segment};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;

use self::signals::{Meaning, SignalInbox};
pub(crate) use self::spawn::Launch;
use self::spawn::{Child, Link, Nursery, has_connection, is_accepting};
use self::supervisor::{Action, Command, Event, Note, Policy, Supervisor, Wish};
use self::upgrade::{Origin, Takeover, Upgrade};
use crate::config::Config;
use crate::heritage::Report;
use crate::listen::Listener;
use crate::notify::Notify;
use crate::sys::{self, Ending};
use crate::{memory, systemd};

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
    begun: Instant,
    origin: Origin,
    upgrade: Upgrade,
    notify: Notify,
    /// Set when the last process is gone: whether the operator asked for that.
    ended: Option<bool>,
}

/// How the program came to be here.
#[derive(Debug)]
pub(crate) struct Start {
    pub(crate) begun: Instant,
    pub(crate) origin: Origin,
    /// What the master left whose place this one takes.
    pub(crate) takeover: Option<Takeover>,
}

/// Runs until it is told to stop and every process is gone. True if it was told to, false if all workers
/// asked not to be replaced.
///
/// `application` are the descriptors of the application's own, which workers keep.
///
/// # Errors
/// If the master cannot set itself up.
pub(crate) fn run(
    config: Arc<Config>,
    listeners: Arc<[Listener]>,
    segment: Segment,
    launch: Launch,
    application: Arc<[RawFd]>,
    start: Start,
) -> io::Result<bool> {
    let Start { begun, origin, mut takeover } = start;
    let lifeline = takeover.as_mut().and_then(Takeover::lifeline);
    let signals = SignalInbox::open()?;
    // After an upgrade they are all blocked, so that none came too early. And whoever started us may have blocked some: the
    // mask is inherited.
    sys::unblock_signals();
    // Orphans among our descendants come to us, to be reaped, as they would come to PID 1.
    nix::sys::prctl::set_child_subreaper(true)?;
    let mut master = Master {
        supervisor: Supervisor::new(policy(&config)),
        signals,
        scoreboard: segment.scoreboard(),
        nursery: Nursery::new(config, listeners, segment, launch, application, lifeline)?,
        children: HashMap::new(),
        begun,
        origin,
        upgrade: Upgrade::default(),
        notify: Notify::from_environment(Instant::now()),
        ended: None,
    };
    if memory::is_worth_storing(&master.nursery.config) {
        master.notify.store(systemd::SEGMENT, master.nursery.segment.fd());
    }
    match takeover {
        Some(left) => master.adopt(left),
        None => master.feed(Event::Tick),
    }
    while master.ended.is_none() {
        master.wait();
        master.hear_signals();
        master.hear_children();
        master.look_at_programs();
        master.upgrade.listen();
        master.notify.tick(Instant::now());
        master.feed(Event::Tick);
        master.finish_upgrade();
    }
    Ok(master.ended == Some(true))
}

fn policy(config: &Config) -> Policy {
    Policy {
        workers: config.workers,
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

    /// The one wait point.
    fn wait(&self) {
        let mut timeout = self.supervisor.next_deadline().map(|deadline| deadline.saturating_sub(self.now()));
        if self.children.values().any(Child::is_unsettled_program) {
            timeout = Some(timeout.map_or(LOOK, |timeout| timeout.min(LOOK)));
        }
        for due in [self.upgrade.due_in(), self.notify.due_in(Instant::now())].into_iter().flatten() {
            timeout = Some(timeout.map_or(due, |timeout| timeout.min(due)));
        }
        // One more millisecond, or else it would wake just before the deadline.
        let timeout = timeout.map_or(PollTimeout::NONE, |timeout| {
            PollTimeout::try_from(timeout.as_millis() + 1).unwrap_or(PollTimeout::MAX)
        });
        let signals = PollFd::new(self.signals.as_fd(), PollFlags::POLLIN);
        let children = self.children.values().filter_map(Child::watched);
        let others = children.chain(self.upgrade.watched()).map(|fd| PollFd::new(fd, PollFlags::POLLIN));
        let mut watched: Vec<PollFd<'_>> = std::iter::once(signals).chain(others).collect();
        match poll(&mut watched, timeout) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(errno) => {
                // ENOMEM: nothing is lost, but do not spin.
                log::error!("the master cannot poll: {errno}");
                std::thread::sleep(LOOK);
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
            let is_check = self.upgrade.is_check(pid);
            if is_check || self.children.get(&pid).is_some_and(|child| !child.is_worker()) {
                // What a wrapper script started, say, and left behind. Before the pid is free for others.
                let _ = killpg(pid, Signal::SIGKILL);
            }
            let Some(ending) = sys::reap(pid) else { return };
            if is_check {
                self.upgrade.ended(ending);
                continue;
            }
            self.hear(pid);
            let Some(child) = self.children.remove(&pid) else {
                log::debug!("reaped a stranger pid={pid} {ending}");
                continue;
            };
            self.scoreboard.bury(child.slot, pid.as_raw().cast_unsigned());
            obituary::publish(pid, ending, child, &self.scoreboard);
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
                Report::Recycle(reason) => log::info!("worker wants to be replaced pid={pid} reason={reason}"),
                Report::LastWords(_) => {}
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

    /// Gives the supervisor an event and does what it wants, until it wants nothing more.
    fn feed(&mut self, event: Event) {
        if matches!(event, Event::Command(Command::Drain | Command::Halt)) {
            self.notify.stopping();
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
            Action::Upgrade => {
                self.begin_upgrade();
                None
            }
            Action::Note(note) => {
                self.tell(note);
                None
            }
            Action::Exit { success } => {
                self.ended = Some(success);
                None
            }
        }
    }

    fn spawn(&mut self, slot: u32, generation: u64) -> Event {
        match self.nursery.spawn(slot, generation, &self.signals) {
            Ok((pid, child)) => {
                log::debug!("worker spawned slot={slot} pid={pid} gen={generation}");
                self.children.insert(pid, child);
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

    fn notify_of(&mut self, note: Note) {
        match note {
            Note::FullStrength => self.notify.ready("serving"),
            Note::ReloadStarted { .. } => self.notify.reloading(),
            Note::ReloadDone { .. } => self.notify.ready("serving"),
            Note::ReloadFailed { .. } => self.notify.ready("serving with the old workers: the last reload failed"),
            Note::Failing { .. } => self.notify.status("workers die before they are ready: see the log"),
            Note::Target(_)
            | Note::TargetLimit(_)
            | Note::Throttled { .. }
            | Note::StartTimeout { .. }
            | Note::DrainTimeout { .. } => {}
        }
    }

    fn tell(&mut self, note: Note) {
        self.notify_of(note);
        match note {
            Note::FullStrength => crate::banner::ready(self.begun.elapsed()),
            Note::Failing { failures, delay } => log::error!(
                "workers die before they are ready: {failures} in a row, next try in {}ms (see the lines above for why)",
                delay.as_millis()
            ),
            Note::Throttled { slot, delay } => {
                log::warn!(
                    "workers end too often: slot={slot} is filled again in {}ms (--respawn-rate)",
                    delay.as_millis()
                )
            }
            Note::StartTimeout { slot, pid } => {
                log::warn!("worker slot={slot} pid={pid} is not ready in time (--start-timeout): killed");
            }
            Note::DrainTimeout { slot, pid } => {
                log::warn!("worker slot={slot} pid={pid} does not finish in time (--drain-timeout): killed");
            }
            Note::Target(target) => log::info!("workers={target}"),
            Note::TargetLimit(target) => log::warn!("workers={target} is the limit: left as it is"),
            Note::ReloadStarted { generation } => log::info!("reload begins gen={generation}"),
            Note::ReloadDone { generation } => log::info!("reload done gen={generation}"),
            Note::ReloadFailed { generation } => {
                log::error!("reload failed gen={generation}: a new worker died before it was ready; the old ones stay");
            }
        }
    }
}

impl Child {
    fn is_unsettled_program(&self) -> bool {
        matches!(self.link, Link::Program { started: false, .. })
    }
}
