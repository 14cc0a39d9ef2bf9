//! Decides which daemons and jobs run, without a system call.
//!
//! ```text
//!             Spawn            Terminate             Kill
//!   Idle ───────────▶ Running ───────────▶ Stopping ───────▶ Killing
//!    ▲ ▲                 │ ended               │ ended          │ ended
//!    │ └─── Backoff ◀────┤                     │                │
//!    └───────────────────┴─────────────────────┴────────────────┘        Retired: not restarted before a reload
//! ```
//!
//! [`SidecarSupervisor::step`] takes one event and the time, and returns the actions; [`sidecars`](crate::master::sidecars) carries them
//! out. There are two clocks: the time since the master started, for deadlines, and the wall clock, for schedules.
//!
//! The rules:
//! - A sidecar has at most one process.
//! - No sidecar runs before the first worker is ready. Daemons continue while the workers drain, but no job is started then.
//! - A daemon that exits is restarted: immediately if it had run for at least a second, otherwise after the delay of
//!   its circuit breaker. A daemon is not restarted before the next reload if it exited with 125 after running for at
//!   least a second, if it exited with 0 within a second too many times in a row, or if it has put itself into the
//!   background.
//! - At the end of a reload, each daemon is asked to stop, and is restarted when it has stopped.
//! - A job runs when it is due. If a job became due several times while the machine was suspended, it runs once. If it
//!   is still running when it becomes due again, the new run is skipped. When the wall clock is set back, the time of
//!   the next run is computed again.
//! - A process that has been asked to stop and does not stop in time is killed.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use nix::unistd::Pid;

use crate::config::sidecars::{Schedule, SidecarsConfig};
use crate::master::pool::supervisor::{AfterExit, Breaker, Uptime};

/// Minimum lifetime after which a daemon counts as started.
pub(crate) const STEADY_TIME: Duration = Duration::from_secs(1);
/// Interval at which the wall clock is read, because the other clock stops while the machine is suspended.
const WALL_CLOCK_INTERVAL: Duration = Duration::from_secs(60);
/// If the wall clock goes back by more than this, it has been set back; a smaller step is a correction.
const SET_BACK: SignedDuration = SignedDuration::from_secs(60);

#[derive(Clone, Copy, Debug)]
pub(crate) enum SidecarEvent {
    /// Time has passed, so a deadline may have been reached.
    Tick,
    /// Workers exist. May be repeated.
    Begin,
    /// The process for [`SidecarAction::Spawn`] exists.
    Spawned { sidecar: usize, pid: Pid },
    /// The process for [`SidecarAction::Spawn`] could not be created.
    SpawnFailed { sidecar: usize },
    /// A sidecar's process was reaped.
    Exited { pid: Pid, after_exit: AfterExit },
    /// A daemon has put itself into the background: `pid` is running, and was not started by the master itself.
    Detached { sidecar: usize, pid: Pid },
    /// A reload is done.
    Reloaded,
    /// The workers were asked to exit.
    Closing,
    /// The workers have exited.
    Stop,
    /// All processes must be terminated now.
    Halt,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SidecarAction {
    /// Start a process, and report [`SidecarEvent::Spawned`] or [`SidecarEvent::SpawnFailed`].
    Spawn { sidecar: usize },
    /// Ask the process to stop.
    Terminate { pid: Pid },
    /// Kill the process.
    Kill { pid: Pid },
    /// Log a notice for the operator.
    Notice { sidecar: usize, notice: SidecarNotice },
}

/// A notice for the operator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SidecarNotice {
    /// A daemon exited right after it started, this many times in a row.
    Failing { failures: u32, delay: Duration },
    /// A daemon has requested not to be restarted before a reload.
    Retired,
    /// A daemon is not restarted before a reload, because it exited with 0 right after it started this many times in a
    /// row.
    GivenUp { tries: u32 },
    /// A daemon is not restarted before a reload, because it runs in the background.
    Detached { pid: Pid },
    /// A job is due while it is still running.
    Skipped { pid: Pid },
    /// A job has exceeded its time limit.
    RunTimeout { pid: Pid },
    /// A process has not stopped in time.
    StopTimeout { pid: Pid },
}

#[derive(Debug)]
struct Sidecar {
    kind: Kind,
    state: State,
}

#[derive(Debug)]
enum Kind {
    Daemon {
        breaker: Breaker,
        /// Number of consecutive times that the daemon has exited with 0 right after it started.
        done: u32,
    },
    Job {
        schedule: Box<Schedule>,
        next: Option<Timestamp>,
    },
    /// The sidecar is running, and is not in the configuration.
    Unwanted,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Idle,
    /// The process is being created. The caller reports the result before the next event.
    Starting,
    Running {
        pid: Pid,
        since: Uptime,
        /// How long the process had run under a former master.
        before: Duration,
        deadline: Option<Uptime>,
    },
    Stopping {
        pid: Pid,
        deadline: Uptime,
    },
    Killing {
        pid: Pid,
    },
    Backoff {
        until: Uptime,
    },
    Retired,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Waiting,
    Running,
    /// The workers are draining.
    Closing,
    Stopping,
}

/// The state of all sidecars. See the module documentation for the rules.
#[derive(Debug)]
pub(crate) struct SidecarSupervisor {
    /// The configured sidecars in the order of the configuration, followed by unwanted sidecars.
    sidecars: Vec<Sidecar>,
    mode: Mode,
    cron_timeout: Duration,
    /// Maximum number of consecutive times that a daemon may exit with 0 right after it started; 0 means no limit.
    daemon_tries: u32,
    stop_timeout: Duration,
    now: Uptime,
    wall: Timestamp,
    /// When a former master last checked for due jobs.
    looked_at: Option<Timestamp>,
    actions: Vec<SidecarAction>,
}

impl SidecarSupervisor {
    /// Creates a supervisor. `stop_timeout` is how long a process may take to stop after it has been asked to.
    pub(crate) fn new(config: &SidecarsConfig, stop_timeout: Duration, wall: Timestamp) -> Self {
        let kind = |schedule: &Option<Schedule>| match schedule {
            Some(schedule) => Kind::Job { schedule: Box::new(schedule.clone()), next: None },
            None => Kind::Daemon { breaker: Breaker::default(), done: 0 },
        };
        let sidecars = config.sidecars.iter().map(|one| Sidecar { kind: kind(&one.schedule), state: State::Idle });
        Self {
            sidecars: sidecars.collect(),
            mode: Mode::Waiting,
            cron_timeout: config.cron_timeout,
            daemon_tries: config.daemon_tries,
            stop_timeout,
            now: Uptime::ZERO,
            wall,
            looked_at: None,
            actions: Vec::new(),
        }
    }

    /// Takes over a running process of a former master. `sidecar` is `None` if the process is no longer wanted; a
    /// second process of the same sidecar is not wanted either. Returns the index of the process's sidecar.
    pub(crate) fn adopt(
        &mut self,
        sidecar: Option<usize>,
        pid: Pid,
        age: Duration,
        stop_left: Option<Duration>,
        now: Uptime,
    ) -> usize {
        let free = sidecar.filter(|&index| self.sidecars[index].state == State::Idle);
        let state = match stop_left {
            Some(left) => State::Stopping { pid, deadline: now + left },
            None => State::Running { pid, since: now, before: age, deadline: None },
        };
        let Some(index) = free else {
            // The next step asks the process to stop.
            self.sidecars.push(Sidecar { kind: Kind::Unwanted, state });
            return self.sidecars.len() - 1;
        };
        let is_job = matches!(self.sidecars[index].kind, Kind::Job { .. });
        self.sidecars[index].state = if is_job { self.timed(state) } else { state };
        index
    }

    /// Returns the time left for a process to stop, if it has been asked to.
    pub(crate) fn stop_left(&self, pid: Pid) -> Option<Duration> {
        match self.sidecars[self.find(pid)?].state {
            State::Stopping { deadline, .. } => Some(deadline.saturating_sub(self.now)),
            State::Killing { .. } => Some(Duration::ZERO),
            State::Idle | State::Starting | State::Running { .. } | State::Backoff { .. } | State::Retired => None,
        }
    }

    /// Applies a new configuration. `former` contains, for each sidecar in the new configuration, the index of the same
    /// sidecar among the present sidecars, if any. The next step asks sidecars that are no longer configured to stop.
    /// Returns the new index of each present sidecar, or `None` for a sidecar that was dropped.
    pub(crate) fn reconfigure(
        &mut self,
        config: &SidecarsConfig,
        stop_timeout: Duration,
        former: &[Option<usize>],
        wall: Timestamp,
    ) -> Vec<Option<usize>> {
        (self.cron_timeout, self.stop_timeout) = (config.cron_timeout, stop_timeout);
        self.daemon_tries = config.daemon_tries;
        let mut before: Vec<Option<Sidecar>> = std::mem::take(&mut self.sidecars).into_iter().map(Some).collect();
        let mut now_at = vec![None; before.len()];
        for (one, former) in config.sidecars.iter().zip(former) {
            let was = former.and_then(|index| before[index].take());
            if let Some(index) = *former {
                now_at[index] = Some(self.sidecars.len());
            }
            let (kind, state) = was.map_or((None, State::Idle), |was| (Some(was.kind), was.state));
            let sidecar = match (&one.schedule, kind) {
                (Some(schedule), Some(Kind::Job { schedule: same, next })) if *same == *schedule => {
                    Sidecar { kind: Kind::Job { schedule: same, next }, state: self.timed(state) }
                }
                (Some(schedule), _) => {
                    let next = schedule.after(wall).filter(|_| self.mode == Mode::Running);
                    Sidecar { kind: Kind::Job { schedule: Box::new(schedule.clone()), next }, state: self.timed(state) }
                }
                (None, Some(kind @ Kind::Daemon { .. })) => Sidecar { kind, state },
                (None, _) => Sidecar { kind: Kind::Daemon { breaker: Breaker::default(), done: 0 }, state },
            };
            self.sidecars.push(sidecar);
        }
        for (index, left) in before.into_iter().enumerate() {
            if let Some(Sidecar { state, .. }) = left
                && state.pid().is_some()
            {
                now_at[index] = Some(self.sidecars.len());
                self.sidecars.push(Sidecar { kind: Kind::Unwanted, state });
            }
        }
        now_at
    }

    /// Returns the settings, for the log.
    pub(crate) fn describe(&self) -> String {
        let schedules = self.sidecars.iter().filter_map(|sidecar| match &sidecar.kind {
            Kind::Job { schedule, .. } => Some(schedule.to_string()),
            Kind::Daemon { .. } | Kind::Unwanted => None,
        });
        let schedules: Vec<String> = schedules.collect();
        let Self { cron_timeout, stop_timeout, daemon_tries, .. } = self;
        format!(
            "cron_timeout={cron_timeout:?} stop_timeout={stop_timeout:?} daemon_tries={daemon_tries} schedules={schedules:?}"
        )
    }

    /// Returns the state of a job, with its deadline according to the current time limit.
    fn timed(&self, state: State) -> State {
        match state {
            State::Running { pid, since, before, .. } => {
                let left = self.cron_timeout.saturating_sub(before);
                let deadline = (!self.cron_timeout.is_zero()).then(|| since + left);
                State::Running { pid, since, before, deadline }
            }
            other => other,
        }
    }

    /// Returns the time of the last check for due jobs, for the next master during an upgrade. `None` if jobs do not
    /// run.
    pub(crate) fn looked_at(&self) -> Option<Timestamp> {
        (self.mode == Mode::Running).then_some(self.wall)
    }

    /// Makes each job that has become due since this time run once.
    pub(crate) fn resume(&mut self, looked_at: Timestamp) {
        self.looked_at = Some(looked_at);
    }

    /// Handles an event. Returns the actions, in order.
    pub(crate) fn step(&mut self, event: SidecarEvent, now: Uptime, wall: Timestamp) -> Vec<SidecarAction> {
        // The wall clock may be set back a little at any time; that must not run a job twice.
        let was_set_back = self.wall.duration_since(wall) > SET_BACK;
        (self.now, self.wall) = (now, wall);
        // These are the last events in an iteration of the loop, so all deaths have been handled.
        let meets_deadlines = matches!(event, SidecarEvent::Tick | SidecarEvent::Begin);
        match event {
            SidecarEvent::Tick => {}
            SidecarEvent::Begin if self.mode == Mode::Waiting => {
                self.mode = Mode::Running;
                let from = self.looked_at.take().map_or(wall, |looked_at| looked_at.min(wall));
                self.find_next_times(from);
            }
            SidecarEvent::Begin => {}
            SidecarEvent::Spawned { sidecar, pid } => self.spawned(sidecar, pid),
            SidecarEvent::SpawnFailed { sidecar } => self.failed(sidecar),
            SidecarEvent::Exited { pid, after_exit } => self.exited(pid, after_exit),
            SidecarEvent::Detached { sidecar, pid } => self.detached(sidecar, pid),
            SidecarEvent::Reloaded => self.reload(),
            SidecarEvent::Closing if self.mode == Mode::Stopping => {}
            SidecarEvent::Closing => self.mode = Mode::Closing,
            SidecarEvent::Stop => self.mode = Mode::Stopping,
            SidecarEvent::Halt => {
                self.mode = Mode::Stopping;
                (0..self.sidecars.len()).for_each(|index| self.kill(index));
            }
        }
        if was_set_back {
            self.find_next_times(wall);
        }
        for index in 0..self.sidecars.len() {
            if meets_deadlines {
                self.meet_deadline(index);
            }
            self.balance(index);
        }
        std::mem::take(&mut self.actions)
    }

    /// Whether no process is left.
    pub(crate) fn is_empty(&self) -> bool {
        self.sidecars.iter().all(|sidecar| sidecar.state.pid().is_none())
    }

    /// Returns the time at which [`SidecarEvent::Tick`] is due without another event.
    pub(crate) fn next_deadline(&self) -> Option<Uptime> {
        let of_states = self.sidecars.iter().filter_map(|sidecar| match sidecar.state {
            State::Running { deadline, .. } => deadline,
            State::Stopping { deadline, .. } => Some(deadline),
            State::Backoff { until } => Some(until),
            State::Idle | State::Starting | State::Killing { .. } | State::Retired => None,
        });
        let of_schedules = self.sidecars.iter().filter_map(|sidecar| match sidecar.kind {
            Kind::Job { next: Some(next), .. } if self.mode == Mode::Running => {
                let left = Duration::try_from(next.duration_since(self.wall)).unwrap_or(Duration::ZERO);
                Some(self.now + left.min(WALL_CLOCK_INTERVAL))
            }
            Kind::Daemon { .. } | Kind::Job { .. } | Kind::Unwanted => None,
        });
        of_states.chain(of_schedules).min()
    }

    fn find(&self, pid: Pid) -> Option<usize> {
        self.sidecars.iter().position(|sidecar| sidecar.state.pid() == Some(pid))
    }

    fn find_next_times(&mut self, from: Timestamp) {
        for sidecar in &mut self.sidecars {
            if let Kind::Job { schedule, next } = &mut sidecar.kind {
                *next = schedule.after(from);
            }
        }
    }

    fn spawned(&mut self, index: usize, pid: Pid) {
        let sidecar = &mut self.sidecars[index];
        let state = sidecar.state;
        assert!(state == State::Starting, "sidecar {index} was not waiting for a process: {state:?}");
        let deadline = match sidecar.kind {
            Kind::Job { .. } if !self.cron_timeout.is_zero() => Some(self.now + self.cron_timeout),
            Kind::Daemon { .. } | Kind::Job { .. } | Kind::Unwanted => None,
        };
        sidecar.state = State::Running { pid, since: self.now, before: Duration::ZERO, deadline };
    }

    fn exited(&mut self, pid: Pid, after_exit: AfterExit) {
        let Some(index) = self.find(pid) else { return };
        let sidecar = &mut self.sidecars[index];
        let state = std::mem::replace(&mut sidecar.state, State::Idle);
        let (Kind::Daemon { breaker, done }, State::Running { since, before, .. }) = (&mut sidecar.kind, state) else {
            return;
        };
        let was_steady = self.now + before >= since + STEADY_TIME;
        *done = if after_exit == AfterExit::Restart && !was_steady { done.saturating_add(1) } else { 0 };
        let tries = *done;
        match after_exit {
            AfterExit::StayDown if was_steady => {
                sidecar.state = State::Retired;
                self.notice(index, SidecarNotice::Retired);
            }
            AfterExit::Replace | AfterExit::Restart | AfterExit::Done if was_steady => breaker.close(),
            AfterExit::Restart if tries == self.daemon_tries => {
                sidecar.state = State::Retired;
                self.notice(index, SidecarNotice::GivenUp { tries });
            }
            // A wrapper such as env, timeout or docker run also returns 125 when the wrapper itself fails.
            AfterExit::Replace | AfterExit::Restart | AfterExit::Done | AfterExit::StayDown => self.failed(index),
        }
    }

    /// Prevents a second process of a daemon that runs in the background. If the daemon is already running again, the
    /// action follows its next exit.
    fn detached(&mut self, index: usize, pid: Pid) {
        if let Some(Sidecar { kind: Kind::Daemon { .. }, state }) = self.sidecars.get_mut(index)
            && let State::Backoff { .. } | State::Idle = state
        {
            *state = State::Retired;
            self.notice(index, SidecarNotice::Detached { pid });
        }
    }

    /// Handles a process that could not be started, or that exited right after it started.
    fn failed(&mut self, index: usize) {
        let sidecar = &mut self.sidecars[index];
        sidecar.state = State::Idle;
        let Kind::Daemon { breaker, .. } = &mut sidecar.kind else { return };
        let failing = breaker.fail(self.now);
        sidecar.state = State::Backoff { until: breaker.open_until() };
        if let Some((failures, delay)) = failing {
            self.notice(index, SidecarNotice::Failing { failures, delay });
        }
    }

    fn reload(&mut self) {
        for index in 0..self.sidecars.len() {
            let Kind::Daemon { breaker, done } = &mut self.sidecars[index].kind else { continue };
            // After a reload, the cause of the failures is assumed to be fixed.
            breaker.close();
            *done = 0;
            match self.sidecars[index].state {
                State::Running { .. } => self.terminate(index),
                State::Backoff { .. } | State::Retired => self.sidecars[index].state = State::Idle,
                State::Idle | State::Starting | State::Stopping { .. } | State::Killing { .. } => {}
            }
        }
    }

    fn meet_deadline(&mut self, index: usize) {
        match self.sidecars[index].state {
            State::Running { pid, deadline: Some(deadline), .. } if deadline <= self.now => {
                self.notice(index, SidecarNotice::RunTimeout { pid });
                self.terminate(index);
            }
            State::Stopping { pid, deadline } if deadline <= self.now => {
                self.notice(index, SidecarNotice::StopTimeout { pid });
                self.kill(index);
            }
            State::Backoff { until } if until <= self.now => self.sidecars[index].state = State::Idle,
            State::Idle
            | State::Starting
            | State::Running { .. }
            | State::Stopping { .. }
            | State::Killing { .. }
            | State::Backoff { .. }
            | State::Retired => {}
        }
    }

    /// Starts a sidecar that must run, and stops one that must not.
    fn balance(&mut self, index: usize) {
        let is_due = self.is_due(index);
        match (&self.sidecars[index].kind, self.mode) {
            (Kind::Unwanted, _) | (_, Mode::Stopping) => self.terminate(index),
            (Kind::Daemon { .. }, Mode::Running | Mode::Closing) => self.spawn(index),
            (Kind::Job { .. }, Mode::Running) if is_due => match self.sidecars[index].state.pid() {
                Some(pid) => self.notice(index, SidecarNotice::Skipped { pid }),
                None => self.spawn(index),
            },
            (Kind::Daemon { .. }, Mode::Waiting)
            | (Kind::Job { .. }, Mode::Waiting | Mode::Running | Mode::Closing) => {}
        }
    }

    /// Whether a job is due. Returns true once.
    fn is_due(&mut self, index: usize) -> bool {
        let Kind::Job { schedule, next } = &mut self.sidecars[index].kind else { return false };
        let is_due = next.is_some_and(|next| next <= self.wall);
        if is_due {
            *next = schedule.after(self.wall);
        }
        is_due
    }

    fn spawn(&mut self, index: usize) {
        if self.sidecars[index].state == State::Idle {
            self.sidecars[index].state = State::Starting;
            self.actions.push(SidecarAction::Spawn { sidecar: index });
        }
    }

    fn terminate(&mut self, index: usize) {
        match self.sidecars[index].state {
            State::Running { pid, .. } => {
                self.sidecars[index].state = State::Stopping { pid, deadline: self.now + self.stop_timeout };
                self.actions.push(SidecarAction::Terminate { pid });
            }
            State::Backoff { .. } => self.sidecars[index].state = State::Idle,
            // A process that is being created has no pid yet: the next step stops it.
            State::Idle | State::Starting | State::Stopping { .. } | State::Killing { .. } | State::Retired => {}
        }
    }

    fn kill(&mut self, index: usize) {
        match self.sidecars[index].state {
            State::Running { pid, .. } | State::Stopping { pid, .. } => {
                self.sidecars[index].state = State::Killing { pid };
                self.actions.push(SidecarAction::Kill { pid });
            }
            State::Backoff { .. } => self.sidecars[index].state = State::Idle,
            State::Idle | State::Starting | State::Killing { .. } | State::Retired => {}
        }
    }

    fn notice(&mut self, sidecar: usize, notice: SidecarNotice) {
        self.actions.push(SidecarAction::Notice { sidecar, notice });
    }
}

impl State {
    fn pid(self) -> Option<Pid> {
        match self {
            Self::Running { pid, .. } | Self::Stopping { pid, .. } | Self::Killing { pid } => Some(pid),
            Self::Idle | Self::Starting | Self::Backoff { .. } | Self::Retired => None,
        }
    }
}

#[cfg(test)]
mod tests;
