//! Runs the master: one thread with one `poll(2)` loop, which turns events into actions.
//!
//! The master spawns processes, detects when they are ready, reaps them, and carries out the decisions of the
//! [`supervisor`]. It runs no application code except hooks, does not use tokio, and takes no lock in shared memory. In
//! shared memory, it only reads the scoreboard, checks for damage, marks the rows of dead workers as dead, and writes
//! the list of refused requests. It does not trust what a child reports: each report is bounded, and matched against
//! the pid of its sender.
//!
//! Modules for processes:
//! - [`pool`] manages the workers, or the programs in their place: it starts and observes them, and makes all decisions
//!   about them.
//! - [`apps`] runs the second pool, if there are gateways: the app processes behind them.
//! - [`reap`] handles the death of any child, and [`remaining_processes`] terminates what the children leave behind.
//! - [`sidecars`] runs daemons and jobs; [`relay`] runs the process that publishes events for programs in other
//!   languages; [`guard`] runs the process that outlives a killed master and kills what its programs have started.
//! - [`procfs`] reads what other processes do not report, and [`output`] reads what they write to standard output and
//!   error.
//!
//! Modules for operators:
//! - [`signals`] and [`control`] receive commands, [`operator`] carries them out, and [`decision_log`] logs their outcome.
//! - [`reload`] applies a changed configuration, and [`upgrade`] replaces this process with another build of the program.
//! - [`memory_damage`] checks the shared memory.
//! - [`status`] describes the state, and [`sd_notify`] reports it to systemd.

mod apps;
mod background_daemons;
mod control;
pub(crate) mod decision_log;
mod earlier_children;
mod guard;
mod memory_damage;
mod operator;
mod output;
mod pool;
pub(crate) mod procfs;
mod reap;
mod relay;
mod reload;
mod remaining_processes;
pub(crate) mod sd_notify;
pub(crate) mod sidecars;
mod signals;
mod stall;
mod status;
pub(crate) mod upgrade;

use std::io;
use std::os::fd::{AsFd as _, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use forkyard_shm::Segment;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use self::apps::Which;
pub(crate) use self::control::Control;
pub(crate) use self::earlier_children::EarlierChildren;
use self::guard::Guard;
use self::memory_damage::Damage;
use self::operator::ReportedDeath;
use self::pool::Pool;
use self::pool::child::Child;
pub(crate) use self::pool::spawn::Launch;
use self::pool::spawn::{self, Spawner};
use self::pool::supervisor::{Command, Phase, SupervisorEvent};
use self::relay::Relay;
use self::sd_notify::Notify;
use self::sidecars::Sidecars;
pub(crate) use self::sidecars::check_sidecars;
use self::signals::Meaning;
pub(crate) use self::signals::SignalInbox;
use self::upgrade::Upgrade;
use crate::config::{Config, Program};
use crate::logging;
use crate::logging::files::LogFiles;
use crate::net::app_channel::AppChannel;
use crate::net::listen::Listener;
use crate::net::publish_socket::PublishSocket;
use crate::startup::{memory, systemd};
use crate::sys;
use crate::upgrade::saved_state::SavedPidFile;
use crate::upgrade::{StartCommand, Takeover, Ties};

/// How long to wait after poll(2) has failed.
const POLL_RETRY_INTERVAL: Duration = Duration::from_millis(10);

/// How long to wait for the heirs of the last workers: a little longer than an heir needs.
const HEIRS_TIMEOUT: Duration = Duration::from_millis(2500);

/// The application: what the processes run.
pub(crate) struct Application {
    /// The code of the workers, or of the gateways.
    pub(crate) launch: Launch,
    /// The settings and the program of the app processes, if the workers are gateways.
    pub(crate) apps: Option<(Arc<Config>, Launch)>,
    /// The descriptors that the application opened; workers keep these descriptors.
    pub(crate) descriptors: Arc<[RawFd]>,
}

impl Application {
    /// Returns the channel between gateways and app processes.
    pub(crate) fn channel(&self) -> Option<&AppChannel> {
        match &self.apps {
            Some((_, Launch::App(_, channel, _))) => Some(channel),
            _ => None,
        }
    }
}

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

struct Master {
    /// The processes that serve clients: workers, programs or gateways.
    pool: Pool,
    /// The app processes, if `pool` consists of gateways.
    apps: Option<Pool>,
    control: Option<Control>,
    reread: Reread,
    signals: SignalInbox,
    earlier: EarlierChildren,
    begun: Instant,
    start_command: StartCommand,
    upgrade: Upgrade,
    notify: Notify,
    pid_file: Option<SavedPidFile>,
    /// Daemons and jobs.
    sidecars: Sidecars,
    relay: Relay,
    guard: Guard,
    damage: Damage,
    /// Whether the server is stopping because no worker ever became ready.
    gave_up: bool,
    /// Whether all pools have been at full strength at some time.
    was_ready: bool,
    /// Set when the last process of one of two pools has ended. True if the operator asked the server to stop.
    emptied_first: Option<(Which, bool)>,
    reported_death: ReportedDeath,
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
/// Returns the control socket, to be closed last.
///
/// # Errors
/// Fails if the master cannot set itself up.
pub(crate) fn run(
    config: Arc<Config>,
    listeners: Arc<[Listener]>,
    segment: Segment,
    application: Application,
    start: Start,
    operators: Operators,
) -> io::Result<(StopReason, Option<Control>)> {
    let Application { launch, apps, descriptors } = application;
    let Start { begun, signals, start_command, earlier, mut takeover } = start;
    let ties = takeover.as_mut().map_or_else(Ties::default, |left| left.ties(&listeners));
    // Signals were blocked until now, so that none was handled too early. The parent process may have blocked signals
    // too, because the mask is inherited; these are unblocked as well.
    sys::unblock_signals();
    // Orphans among the descendants become children of this process, as they would of PID 1, and are reaped here.
    nix::sys::prctl::set_child_subreaper(true)?;
    let damage = Damage::new(&segment);
    let sidecars = Sidecars::new(&config, segment.clone(), begun)?;
    let apps = apps.map(|(config, launch)| {
        let (none, log_files) = (Arc::from([]), Arc::clone(&operators.log_files));
        Spawner::new(config, Arc::from([]), segment.clone(), launch, none, log_files, Ties::default())
    });
    let apps = apps.transpose()?.map(|spawner| Pool::new(spawner, "app process", begun));
    let noun = if apps.is_some() { "gateway" } else { "worker" };
    let spawner = Spawner::new(config, listeners, segment, launch, descriptors, operators.log_files, ties)?;
    let mut master = Master {
        pool: Pool::new(spawner, noun, begun),
        apps,
        control: operators.control,
        reread: operators.reread,
        signals,
        damage,
        sidecars,
        relay: Relay::new(operators.publish),
        guard: Guard::default(),
        start_command,
        upgrade: Upgrade::default(),
        notify: Notify::from_environment(Instant::now()),
        pid_file: operators.pid_file,
        earlier,
        begun,
        gave_up: false,
        was_ready: false,
        emptied_first: None,
        reported_death: ReportedDeath::default(),
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
            master.step(Which::Front, SupervisorEvent::Arrival);
        }
        master.read_signals();
        master.observe();
        master.check_memory_damage();
        master.read_operators(&events);
        master.step(Which::Front, SupervisorEvent::Tick);
        if master.apps.is_some() {
            master.step(Which::Apps, SupervisorEvent::Tick);
        }
        master.pool.check_closing();
        master.feed_observed(Which::Front);
        master.run_sidecars();
        master.relay.turn(&master.pool.spawner, &master.signals, begun.elapsed());
        master.upgrade.listen();
        master.notify.tick(Instant::now());
        master.finish_upgrade();
    }
    master.shut_down();
    memory::close(master.pool.spawner.segment.clone()); // a reload may have replaced a damaged segment
    Ok((master.stop_reason(), master.control))
}

impl Master {
    /// Stores the shared memory in systemd for the next startup, if the next server can use it.
    fn store_segment(&mut self) {
        if memory::is_worth_storing(&self.pool.spawner.config) {
            self.notify.store(systemd::SEGMENT, self.pool.spawner.segment.fd());
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
        let now = self.now();
        self.pool.orphaned_outputs.finish(now);
        self.apps.iter_mut().for_each(|apps| apps.orphaned_outputs.finish(now));
        self.farewell();
        logging::finish();
    }

    fn now(&self) -> Duration {
        self.begun.elapsed()
    }

    /// Passes the path of the publish socket to all programs.
    fn announce_publish_socket(&mut self) {
        let events = self.relay.seen_by_programs(&self.pool.spawner.config);
        for pool in [&mut self.pool].into_iter().chain(&mut self.apps) {
            pool.spawner.current.events.clone_from(&events);
        }
        self.sidecars.announce_publish_socket(events);
    }

    /// Waits for the heirs of the last workers, and for the relay, up to the time that heirs may take. An operator who
    /// stops the server immediately shortens this wait.
    fn await_heirs(&mut self) {
        if self.pool.programs.at_once {
            self.pool.spawner.end_lifeline();
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
        let of_pools = self.pools().flat_map(|pool| {
            let outputs = pool.children.values().filter_map(|child| child.output.as_ref()?.next_deadline());
            let own = [
                pool.supervisor.next_deadline(),
                pool.recycling.next_deadline(),
                pool.faults.next_deadline(),
                pool.orphaned_outputs.next_deadline(),
            ];
            own.into_iter().flatten().chain(outputs)
        });
        let deadlines = [
            self.control.as_ref().and_then(|control| control.next_deadline(now)),
            self.sidecars.next_deadline(),
            self.pool.programs.next_deadline(now),
            self.relay.next_deadline(now),
            self.guard.next_deadline(),
            self.damage.next_deadline(),
        ];
        let deadline = deadlines.into_iter().flatten().chain(of_pools).min();
        let mut timeout = deadline.map(|deadline| deadline.saturating_sub(now));
        let is_starting = |child: &Child| child.is_unsettled_program() || child.is_starting_app();
        if self.pools().any(|pool| pool.children.values().any(is_starting)) {
            let pace = self.pool.programs.pace(now);
            timeout = Some(timeout.map_or(pace, |timeout| timeout.min(pace)));
        }
        let due = [self.upgrade.due_in(), self.notify.due_in(Instant::now()), self.pool.closing.due_in()];
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
        let children = self.pools().flat_map(|pool| pool.children.values());
        let children = children.flat_map(|child| child.watched(slow_log.is_none()));
        let orphaned = self.pools().flat_map(|pool| pool.orphaned_outputs.watched());
        let outputs = orphaned.chain(self.sidecars.watched()).filter(|_| slow_log.is_none());
        let idle = self.apps.as_ref().and_then(Pool::channel).map(|channel| channel.wakes_master());
        let children = children
            .chain(outputs)
            .chain(idle)
            .chain(self.relay.watched(now))
            .chain(self.upgrade.watched())
            .map(|fd| PollFd::new(fd, PollFlags::POLLIN));
        let log = logging::waits_for().map(|fd| PollFd::new(fd, PollFlags::POLLOUT));
        // Without workers, only the master can detect a new connection.
        let listeners = if self.pool.supervisor.awaits_arrival() { &*self.pool.spawner.listeners } else { &[] };
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
                    let stopping = self.pool.supervisor.view().phase == Phase::Stopping;
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
                        | Command::Upgrade => self.obey(command),
                    }
                }
                Meaning::ReopenLogs => drop(self.reopen_logs()), // the errors are in the log
            }
        }
    }

    /// Observes the processes of the pool, and carries out what the supervisor decides about them.
    fn observe(&mut self) {
        self.pool.read_children();
        self.feed_observed(Which::Front);
        self.pool.orphaned_outputs.read(self.now());
        let orphans = self.pool.is_search_for_strays_due().then(|| self.orphans());
        self.pool.check_programs(orphans.as_deref());
        self.feed_observed(Which::Front);
        self.pool.recycle();
        self.feed_observed(Which::Front);
        self.pool.check_hangs_and_quarantine();
        self.feed_observed(Which::Front);
        self.observe_apps();
    }

    /// Starts the first processes.
    fn begin(&mut self) {
        self.keep_guard();
        self.step(Which::Front, SupervisorEvent::Tick);
        if self.apps.is_some() {
            self.step(Which::Apps, SupervisorEvent::Tick);
        }
    }

    /// Runs the guard, the daemons and the jobs. The master exits when the last worker and all daemons and jobs have
    /// ended.
    fn run_sidecars(&mut self) {
        self.keep_guard();
        if self.emptied.is_some() && self.pool.programs.is_empty() {
            self.sidecars.stop();
        }
        if self.sidecars.has_suspects() {
            let orphans = self.orphans();
            self.sidecars.inherit(&orphans);
        }
        let is_up = self.pools().all(|pool| pool.supervisor.is_up());
        self.sidecars.turn(is_up);
        if self.sidecars.is_empty() && self.pool.programs.is_empty() {
            self.ended = self.emptied;
        }
    }

    /// Carries out a command of the operator.
    fn obey(&mut self, command: Command) {
        if let Command::Drain | Command::Halt = command {
            self.upgrade.cancel();
            self.notify.stopping();
        }
        if command == Command::Halt {
            self.pool.programs.halt();
        }
        self.sidecars.apply(command);
        self.command(command);
    }
}
