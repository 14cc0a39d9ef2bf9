//! Runs the master: one thread with one `poll(2)` loop, which turns events into actions.
//!
//! The master spawns processes, detects when they are ready, reaps them, and carries out the decisions of the
//! [`supervisor`]. It runs no application code except hooks, does not use tokio, and takes no lock in shared memory.
//! The only things that it does in shared memory are to read the scoreboard, to check for damage, to mark the rows of
//! dead workers as dead, and to write the list of refused requests. It does not trust what a child reports: each report
//! is bounded, and matched against the pid of its sender.
//!
//! Modules that decide, without a system call:
//! - [`supervisor`]: which processes should run.
//! - [`sidecars`]'s supervisor: which daemons and jobs should run.
//! - [`hangs`] and [`quarantine`]: which workers hang, and which requests kill their workers. [`worker_faults`]
//!   collects the evidence for both.
//! - [`demand`] and [`recycling`]: how much work there is, and which workers have reached the end of their lifetime.
//!
//! Modules for processes:
//! - [`spawn`] starts workers and programs; [`reap`] handles the death of any child, and [`death_log`] writes its log line.
//! - [`programs`] observes external programs through [`procfs`]; [`remaining_processes`] terminates what they leave behind.
//! - [`sidecars`] runs daemons and jobs; [`relay`] runs the process that publishes events for programs in other languages; [`guard`] runs
//!   the process that outlives a killed master and kills what its programs have started; [`symbolizer`] runs the process that names the
//!   functions in a crash.
//! - [`output`] reads what processes write to standard output and error.
//!
//! Modules for operators:
//! - [`signals`] and [`control`] receive commands, [`operator`] carries them out, and [`decision_log`] logs their outcome.
//! - [`reload`] applies a changed configuration, [`upgrade`] replaces this process with another build of the program,
//!   and [`close_listeners`] closes the listening sockets when the server stops.
//! - [`status`] describes the state, and [`sd_notify`] reports it to systemd.

mod background_daemons;
mod close_listeners;
mod control;
mod death_log;
pub(crate) mod decision_log;
mod demand;
mod earlier_children;
mod guard;
mod hangs;
mod idle_sigterm;
mod memory_damage;
mod oom;
mod operator;
mod output;
pub(crate) mod procfs;
mod programs;
mod quarantine;
mod reap;
mod recycling;
mod relay;
mod reload;
mod remaining_processes;
pub(crate) mod sd_notify;
pub(crate) mod sidecars;
mod signals;
mod spawn;
mod stall;
mod status;
mod supervisor;
pub(crate) mod symbolizer;
pub(crate) mod upgrade;
pub(crate) mod worker_faults;

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsFd as _, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use forkyard_shm::{Scoreboard, Segment};
use log::kv::Value;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use nix::unistd::Pid;

use self::close_listeners::Closing;
pub(crate) use self::control::Control;
use self::death_log::DeathRecord;
pub(crate) use self::earlier_children::EarlierChildren;
use self::guard::Guard;
use self::memory_damage::Damage;
use self::output::OrphanedOutputs;
use self::programs::Programs;
use self::recycling::Recycling;
use self::relay::Relay;
use self::sd_notify::Notify;
use self::sidecars::Sidecars;
pub(crate) use self::sidecars::check_sidecars;
use self::signals::Meaning;
pub(crate) use self::signals::SignalInbox;
pub(crate) use self::spawn::Launch;
use self::spawn::{Child, Spawner};
use self::status::line_of;
use self::supervisor::{Action, Budget, Command, Phase, Policy, Supervisor, SupervisorEvent};
use self::upgrade::Upgrade;
use self::worker_faults::Faults;
use crate::config::{Config, Program, Share, in_ms};
use crate::inherited_by_workers::Report;
use crate::logging;
use crate::logging::files::LogFiles;
use crate::net::listen::Listener;
use crate::net::publish_socket::PublishSocket;
use crate::net::queue_depth::QueueDepth;
use crate::startup::{memory, systemd};
use crate::sys;
use crate::upgrade::saved_state::SavedPidFile;
use crate::upgrade::{StartCommand, Takeover, Ties};

/// How long to wait after poll(2) has failed.
const POLL_RETRY_INTERVAL: Duration = Duration::from_millis(10);

/// How long to wait for the heirs of the last workers: a little longer than an heir needs.
const HEIRS_TIMEOUT: Duration = Duration::from_millis(2500);

/// Interfaces for operators, except signals.
pub(crate) struct Operators {
    pub(crate) control: Option<Control>,
    /// The socket on which programs publish events.
    pub(crate) publish: Option<PublishSocket>,
    pub(crate) reread: Reread,
    pub(crate) log_files: Arc<LogFiles>,
    /// The pid file, which the caller keeps open.
    pub(crate) pid_file: Option<SavedPidFile>,
}

/// Rereads the configuration file, given the current configuration. Returns `None` if there is no configuration file.
///
/// # Errors
/// Returns a message for the operator if the configuration is invalid.
pub(crate) type Reread = Box<dyn Fn(&Config) -> Result<Option<Reloaded>, String>>;

/// A configuration that was reread.
pub(crate) struct Reloaded {
    /// The new configuration. Settings that cannot change without a restart keep their old values.
    pub(crate) config: Config,
    /// The external program, if there is one.
    pub(crate) program: Option<Program>,
    /// The flags that have changed and need a restart.
    pub(crate) fixed: Vec<String>,
}

/// Why a worker has reached the end of its lifetime, for the log.
#[derive(Clone, Copy)]
struct EndOfLife<'a> {
    reason: &'a str,
    /// The memory size of the worker in bytes, if the worker is too large.
    memory: Option<u64>,
    /// The request of a hanging function, if that is the reason.
    request: Option<&'a str>,
}

impl<'a> EndOfLife<'a> {
    fn because(reason: &'a str) -> Self {
        Self { reason, memory: None, request: None }
    }
}

struct Master {
    supervisor: Supervisor,
    control: Option<Control>,
    reread: Reread,
    /// The latest death record. Clients that wait for a reload receive it as the reason if the reload fails.
    death_record: DeathRecord,
    spawner: Spawner,
    signals: SignalInbox,
    scoreboard: Scoreboard,
    children: HashMap<Pid, Child>,
    earlier: EarlierChildren,
    programs: Programs,
    recycling: Recycling,
    queue_depth: QueueDepth,
    begun: Instant,
    faults: Faults,
    /// Outputs of dead processes whose children may still write.
    orphaned_outputs: OrphanedOutputs,
    start_command: StartCommand,
    upgrade: Upgrade,
    notify: Notify,
    pid_file: Option<SavedPidFile>,
    /// Daemons and jobs.
    sidecars: Sidecars,
    relay: Relay,
    guard: Guard,
    damage: Damage,
    closing: Closing,
    /// Whether the server is stopping because no worker ever became ready.
    gave_up: bool,
    /// Set when the last worker has ended. True if the operator asked the server to stop.
    emptied: Option<bool>,
    /// Set when the last process has ended. True if the operator asked the server to stop.
    ended: Option<bool>,
}

/// Why a master ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum StopReason {
    /// The operator asked the server to stop.
    Asked,
    /// All workers exited with the status that requests no replacement.
    Retired,
    /// No worker ever became ready (`--give-up-after`).
    NeverReady,
}

/// The circumstances under which a master starts.
#[derive(Debug)]
pub(crate) struct Start {
    pub(crate) begun: Instant,
    /// Receives signals from the beginning of startup.
    pub(crate) signals: SignalInbox,
    pub(crate) start_command: StartCommand,
    /// Children that existed before the server started any.
    pub(crate) earlier: EarlierChildren,
    /// The state of the former master, if this process takes over from one.
    pub(crate) takeover: Option<Takeover>,
}

/// Runs the master until it has been stopped or has given up, and every process has ended.
///
/// `application` contains the descriptors that the application opened; workers keep these descriptors. Returns the
/// control socket, to be closed last.
///
/// # Errors
/// Fails if the master cannot set itself up.
pub(crate) fn run(
    config: Arc<Config>,
    listeners: Arc<[Listener]>,
    segment: Segment,
    launch: Launch,
    application: Arc<[RawFd]>,
    start: Start,
    operators: Operators,
) -> io::Result<(StopReason, Option<Control>)> {
    let Start { begun, signals, start_command, earlier, mut takeover } = start;
    let ties = takeover.as_mut().map_or_else(Ties::default, |left| left.ties(&listeners));
    // Signals were blocked until now, so that none was handled too early. The parent process may have blocked signals
    // too, because the mask is inherited; these are unblocked as well.
    sys::unblock_signals();
    // Orphans among the descendants become children of this process, as they would of PID 1, and are reaped here.
    nix::sys::prctl::set_child_subreaper(true)?;
    let recycling = Recycling::new(&config.scaling);
    let mut master = Master {
        supervisor: Supervisor::new(policy(&config)),
        control: operators.control,
        reread: operators.reread,
        death_record: DeathRecord::default(),
        signals,
        scoreboard: segment.scoreboard(),
        damage: Damage::new(&segment),
        faults: Faults::new(&config.failures, segment.quarantine()),
        sidecars: Sidecars::new(&config, segment.clone(), begun)?,
        relay: Relay::new(operators.publish),
        guard: Guard::default(),
        spawner: Spawner::new(config, listeners, segment, launch, application, operators.log_files, ties)?,
        orphaned_outputs: OrphanedOutputs::default(),
        start_command,
        upgrade: Upgrade::default(),
        notify: Notify::from_environment(Instant::now()),
        pid_file: operators.pid_file,
        recycling,
        queue_depth: QueueDepth::new(),
        children: HashMap::new(),
        earlier,
        programs: Programs::default(),
        begun,
        closing: Closing::default(),
        gave_up: false,
        emptied: None,
        ended: None,
    };
    master.announce_publish_socket();
    master.describe_settings();
    master.describe_sidecars();
    master.store_segment();
    match takeover {
        Some(left) => master.adopt(left),
        None => master.begin(),
    }
    while master.ended.is_none() || master.upgrade.is_checking() {
        let (arrived, events) = master.wait();
        logging::tick();
        if arrived {
            master.feed(SupervisorEvent::Arrival);
        }
        master.read_signals();
        master.read_children();
        master.orphaned_outputs.read(master.now());
        master.check_programs();
        master.recycle();
        master.check_hangs_and_quarantine();
        master.check_memory_damage();
        master.read_operators(&events);
        master.feed(SupervisorEvent::Tick);
        master.check_closing();
        master.run_sidecars();
        master.relay.turn(&master.spawner, &master.signals, begun.elapsed());
        master.upgrade.listen();
        master.notify.tick(Instant::now());
        master.finish_upgrade();
    }
    master.shut_down();
    memory::close(master.spawner.segment.clone()); // a reload may have replaced a damaged segment
    Ok((master.stop_reason(), master.control))
}

/// Returns the part of the configuration that the supervisor needs.
fn policy(config: &Config) -> Policy {
    Policy {
        workers: (config.workers.min, config.workers.max),
        // A program is assumed to serve one request at a time.
        per_worker: config.threads.max(1),
        scale_down_after: config.scaling.scale_down_after,
        max_unavailable: match config.scaling.max_unavailable {
            Share::Number(number) => Budget::Number(number),
            Share::Percent(percent) => Budget::Percent(percent),
        },
        slots: config.slots(),
        start_timeout: config.start_timeout,
        drain_timeout: config.drain_timeout,
        respawn_rate: config.respawn_rate,
        give_up_after: config.scaling.give_up_after,
    }
}

impl Master {
    /// Stores the shared memory in systemd for the next startup, if the next server can use it.
    fn store_segment(&mut self) {
        if memory::is_worth_storing(&self.spawner.config) {
            self.notify.store(systemd::SEGMENT, self.spawner.segment.fd());
        } else {
            self.notify.forget(systemd::SEGMENT); // memory of an earlier server
        }
    }

    fn stop_reason(&self) -> StopReason {
        match self.ended {
            Some(true) => StopReason::Asked,
            _ if self.gave_up => StopReason::NeverReady,
            _ => StopReason::Retired,
        }
    }

    /// Performs the last steps, after the last worker and sidecar.
    fn shut_down(&mut self) {
        self.relay.stop();
        // The master waits for the heirs first, because all processes of the server must have ended by the time a
        // client reads that the master has stopped.
        self.await_heirs();
        self.relay.end();
        self.end_leftovers();
        self.guard.stop();
        self.orphaned_outputs.finish(self.now());
        self.farewell();
        logging::finish();
    }

    fn now(&self) -> Duration {
        self.begun.elapsed()
    }

    /// Passes the path of the publish socket to all programs.
    fn announce_publish_socket(&mut self) {
        let events = self.relay.seen_by_programs(&self.spawner.config);
        self.spawner.current.events.clone_from(&events);
        self.sidecars.announce_publish_socket(events);
    }

    /// Waits for the heirs of the last workers, and for the relay, up to the time that heirs may take. An operator who
    /// stops the server immediately shortens this wait.
    fn await_heirs(&mut self) {
        if self.programs.at_once {
            self.spawner.end_lifeline();
        }
        let begun = Instant::now();
        while let Some(left) =
            HEIRS_TIMEOUT.checked_sub(begun.elapsed()).filter(|_| spawn::has_heirs() || self.relay.pid().is_some())
        {
            let timeout = PollTimeout::try_from(left.as_millis() + 1).unwrap_or(PollTimeout::MAX);
            let _ = poll(&mut [PollFd::new(self.signals.as_fd(), PollFlags::POLLIN)], timeout);
            self.read_signals();
        }
    }

    /// Waits for events; this is the only place where the master waits. Returns whether a connection is waiting while
    /// there is no worker, and the events of the control socket.
    fn wait(&self) -> (bool, Vec<PollFlags>) {
        let now = self.now();
        let deadlines = [
            self.supervisor.next_deadline(),
            self.recycling.next_deadline(),
            self.faults.next_deadline(),
            self.control.as_ref().and_then(|control| control.next_deadline(now)),
            self.sidecars.next_deadline(),
            self.programs.next_deadline(now),
            self.relay.next_deadline(now),
            self.guard.next_deadline(),
            self.damage.next_deadline(),
        ];
        let outputs = self.children.values().filter_map(|child| child.output.as_ref()?.next_deadline());
        let deadline =
            deadlines.into_iter().flatten().chain(outputs).chain(self.orphaned_outputs.next_deadline()).min();
        let mut timeout = deadline.map(|deadline| deadline.saturating_sub(now));
        if self.children.values().any(Child::is_unsettled_program) {
            let pace = self.programs.pace(now);
            timeout = Some(timeout.map_or(pace, |timeout| timeout.min(pace)));
        }
        let due = [self.upgrade.due_in(), self.notify.due_in(Instant::now()), self.closing.due_in()];
        for due in due.into_iter().flatten() {
            timeout = Some(timeout.map_or(due, |timeout| timeout.min(due)));
        }
        // While the log's reader is slow, the master leaves output in the pipes. This slows down the processes that
        // write the output.
        let slow_log = logging::is_slow_for();
        if let Some(left) = slow_log {
            timeout = Some(timeout.map_or(left, |timeout| timeout.min(left)));
        }
        // One millisecond is added, because poll would otherwise return just before the deadline.
        let timeout = timeout.map_or(PollTimeout::NONE, |timeout| {
            PollTimeout::try_from(timeout.as_millis() + 1).unwrap_or(PollTimeout::MAX)
        });
        let signals = PollFd::new(self.signals.as_fd(), PollFlags::POLLIN);
        let children = self.children.values().flat_map(|child| child.watched(slow_log.is_none()));
        let outputs = self.orphaned_outputs.watched().chain(self.sidecars.watched()).filter(|_| slow_log.is_none());
        let children = children
            .chain(outputs)
            .chain(self.relay.watched(now))
            .chain(self.upgrade.watched())
            .map(|fd| PollFd::new(fd, PollFlags::POLLIN));
        let log = logging::waits_for().map(|fd| PollFd::new(fd, PollFlags::POLLOUT));
        // Without workers, only the master can detect a new connection.
        let listeners = if self.supervisor.awaits_arrival() { &*self.spawner.listeners } else { &[] };
        let arrivals = listeners.iter().map(|listener| PollFd::new(listener.as_fd(), PollFlags::POLLIN));
        let mut watched: Vec<PollFd<'_>> = arrivals.chain([signals]).chain(log).chain(children).collect();
        let others = watched.len();
        watched.extend(self.control.iter().flat_map(|control| control.watched(now)));
        match poll(&mut watched, timeout) {
            // Without a result, no descriptor has events.
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(errno) => {
                // The error may be ENOMEM. No event is lost, but the loop must not spin.
                log::error!("the master cannot poll: {errno}");
                std::thread::sleep(POLL_RETRY_INTERVAL);
            }
        }
        let arrived = watched[..listeners.len()].iter().any(|listener| listener.any().unwrap_or(false));
        (arrived, watched[others..].iter().map(|fd| fd.revents().unwrap_or(PollFlags::empty())).collect())
    }

    fn read_signals(&mut self) {
        for meaning in self.signals.take() {
            match meaning {
                Meaning::Child => self.reap(),
                Meaning::Command(command) => {
                    let stopping = self.supervisor.view().phase == Phase::Stopping;
                    let ignored = stopping && command != Command::Halt;
                    let verb = command.verb();
                    if ignored {
                        log::info!("ignored a signal to {verb}, because the server is stopping");
                    } else {
                        log::info!("received a signal to {verb}");
                    }
                    match command {
                        Command::Reload if ignored => {}
                        Command::Reload => drop(self.reload()), // the error is in the log
                        Command::Drain
                        | Command::Halt
                        | Command::Add
                        | Command::Remove
                        | Command::Scale(_)
                        | Command::Upgrade => self.feed(SupervisorEvent::Command(command)),
                    }
                }
                Meaning::ReopenLogs => drop(self.reopen_logs()), // the errors are in the log
            }
        }
    }

    fn read_children(&mut self) {
        let pids: Vec<Pid> = self.children.keys().copied().collect();
        let share = output::share(pids.len());
        for pid in pids {
            self.read_child(pid, share);
        }
    }

    /// Reads the reports of a process, and up to `most` bytes of its output.
    fn read_child(&mut self, pid: Pid, most: usize) {
        let now = self.now();
        let Some(child) = self.children.get_mut(&pid) else { return };
        child.log_output(pid, most, now);
        for report in child.listen() {
            match report {
                Report::Ready => self.ready(pid),
                Report::Recycle(reason) => self.wear_out(pid, EndOfLife::because(&reason)),
                Report::HungThread(request) => self.hung_thread(pid, &request),
                Report::LastWords(_) | Report::Trace(_) | Report::SentBy(_) => {}
            }
        }
    }

    /// Finds workers that have reached the end of their lifetime.
    fn recycle(&mut self) {
        let now = self.now();
        for pid in self.recycling.too_old(|pid| self.supervisor.is_ready(pid), now) {
            self.wear_out(pid, EndOfLife::because("max-age"));
        }
        if let Some(pid) = self.recycling.turn(now)
            && self.supervisor.is_ready(pid)
            && let Some(bytes) = recycling::own_memory(pid)
            && self.recycling.is_too_large(pid, bytes)
        {
            self.wear_out(pid, EndOfLife { memory: Some(bytes), ..EndOfLife::because("max-memory") });
        }
    }

    /// Requests the replacement of a healthy process. The process continues to serve until its replacement is ready.
    fn wear_out(&mut self, pid: Pid, EndOfLife { reason, memory, request }: EndOfLife<'_>) {
        let Some(child) = self.children.get(&pid) else { return };
        let (slot, lived) = (child.slot, in_ms(child.since.elapsed()));
        let memory = memory.map(|bytes| format!("{}K", bytes >> 10));
        log::info!(
            slot, pid = pid.as_raw(), lived, reason, memory, request;
            "worker will be replaced"
        );
        self.feed(SupervisorEvent::Recycle { pid });
    }

    /// Starts the first processes.
    fn begin(&mut self) {
        self.keep_guard();
        self.feed(SupervisorEvent::Tick);
    }

    /// Runs the guard, the daemons and the jobs. The master exits when the last worker and all daemons and jobs have
    /// ended.
    fn run_sidecars(&mut self) {
        self.keep_guard();
        if self.emptied.is_some() && self.programs.is_empty() {
            self.sidecars.stop();
        }
        if self.sidecars.has_suspects() {
            let orphans = self.orphans();
            self.sidecars.inherit(&orphans);
        }
        self.sidecars.turn(self.supervisor.is_up());
        if self.sidecars.is_empty() && self.programs.is_empty() {
            self.ended = self.emptied;
        }
    }

    /// Passes an event to the supervisor and carries out the resulting actions, until none are left.
    fn feed(&mut self, event: SupervisorEvent) {
        if let SupervisorEvent::Command(command) = event {
            if let Command::Drain | Command::Halt = command {
                self.upgrade.cancel();
                self.notify.stopping();
            }
            if command == Command::Halt {
                self.programs.halt();
            }
            self.sidecars.apply(command);
        }
        let mut actions = VecDeque::from(self.supervisor.step(event, self.now()));
        while let Some(action) = actions.pop_front() {
            if let Some(answer) = self.act(action) {
                actions.extend(self.supervisor.step(answer, self.now()));
            }
        }
    }

    fn act(&mut self, action: Action) -> Option<SupervisorEvent> {
        match action {
            Action::Spawn { slot, generation } => Some(self.spawn(slot, generation)),
            Action::Terminate { pid } => {
                self.terminate(pid);
                None
            }
            Action::Remind { pid } => {
                self.remind_or_end(pid);
                None
            }
            Action::Close { at_once } => {
                self.close_sockets(at_once);
                Some(SupervisorEvent::Queue { waits: !self.closing.is_dry() })
            }
            Action::Kill { pid } => {
                self.signal(pid, Signal::SIGKILL);
                None
            }
            Action::Sample => {
                let (children, listeners) = (&self.children, &self.spawner.listeners);
                let (supervisor, scoreboard) = (&self.supervisor, &self.scoreboard);
                Some(SupervisorEvent::Demand(demand::sample(
                    children,
                    supervisor,
                    scoreboard,
                    &self.queue_depth,
                    listeners,
                )))
            }
            Action::Upgrade => {
                self.begin_upgrade();
                None
            }
            Action::Abort { pid } => {
                self.abort(pid);
                None
            }
            Action::Notice(notice) => {
                self.follow_reload(notice);
                self.log(notice);
                self.report_to_clients(notice);
                None
            }
            Action::Exit { success } => {
                self.close_sockets(true);
                self.emptied = Some(success);
                None
            }
        }
    }

    fn spawn(&mut self, slot: u32, generation: u64) -> SupervisorEvent {
        let mended = self.mend_socket().map_err(io::Error::other);
        match mended.and_then(|()| self.spawner.spawn(slot, generation, &self.signals)) {
            Ok((pid, child)) => {
                log::debug!(slot, pid = pid.as_raw(), "gen" = generation; "worker spawned");
                self.children.insert(pid, child);
                self.recycling.spawned(pid, Duration::ZERO, self.now());
                SupervisorEvent::Spawned { slot, pid }
            }
            Err(error) => {
                let event = format!("cannot start a worker: {}", sys::explain(&error));
                log::error!(slot, "gen" = generation; "{event}");
                let line = line_of(&event, &[("slot", Value::from(slot)), ("gen", generation.into())]);
                self.death_record = DeathRecord { line, ..DeathRecord::default() };
                SupervisorEvent::SpawnFailed { slot }
            }
        }
    }
}
