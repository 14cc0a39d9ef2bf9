//! Helpers: which of the daemons and jobs beside the workers are to run, decided without a single system call.
//!
//! ```text
//!             Spawn            Terminate             Kill
//!   Idle ───────────▶ Running ───────────▶ Stopping ───────▶ Killing
//!    ▲ ▲                 │ ended               │ ended          │ ended
//!    │ └─── Backoff ◀────┤                     │                │
//!    └───────────────────┴─────────────────────┴────────────────┘        Retired: it exited with 125
//! ```
//!
//! [`SidecarSupervisor::step`] takes one event and the time, and returns what is to be done; [`sidecars`](crate::master::sidecars) does that. The
//! time is two clocks: what has passed since the master started, for deadlines, and that on the wall, for schedules.
//!
//! The rules:
//! - One process a sidecar, at most.
//! - Nothing runs before the first worker is ready. Daemons run on while the workers drain; jobs are not begun any more.
//! - A daemon that ends is started again: at once, if it had run for a second, else by a breaker of its own. It is left alone until
//!   the next reload when it exits with 125 after a second, when it has exited with 0 within a second too many times in a row, and when it
//!   has put itself into the background.
//! - At the end of a reload each daemon is asked to stop, and started again when it has.
//! - A job is run when its time has come; once, however often that was while nobody looked (the machine slept). If it
//!   runs still, that time is skipped. When the wall's clock is set back, the next time is found anew.
//! - Who was asked to stop and does not is killed.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use nix::unistd::Pid;

use crate::config::sidecars::{Schedule, SidecarsConfig};
use crate::master::supervisor::{AfterExit, Breaker, Now};

/// A daemon that ends sooner has not started.
pub(crate) const STEADY_TIME: Duration = Duration::from_secs(1);
/// How often the wall's clock is looked at: the other one stands still while the machine sleeps.
const WALL_CLOCK_INTERVAL: Duration = Duration::from_secs(60);
/// By more than this the wall's clock is not just being put right.
const SET_BACK: SignedDuration = SignedDuration::from_secs(60);

/// What happened.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Event {
    /// The clock: something may be due.
    Tick,
    /// There are workers. May be said again and again.
    Begin,
    /// The process asked for with [`Action::Spawn`] exists.
    Spawned { sidecar: usize, pid: Pid },
    /// It could not be made.
    SpawnFailed { sidecar: usize },
    /// It was reaped.
    Exited { pid: Pid, after_exit: AfterExit },
    /// The last process of a daemon has put itself into the background: it lives, and is no child that was made here.
    Detached { sidecar: usize, pid: Pid },
    /// A reload is done.
    Reloaded,
    /// The workers were asked to leave.
    Closing,
    /// The workers are gone.
    Stop,
    /// All is to end now.
    Halt,
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// Make its process, and report [`Event::Spawned`] or [`Event::SpawnFailed`].
    Spawn { sidecar: usize },
    /// Ask it to leave.
    Terminate { pid: Pid },
    /// End it.
    Kill { pid: Pid },
    /// Tell the operator.
    Notice { sidecar: usize, notice: Notice },
}

/// What an operator should know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Notice {
    /// A daemon ended so many times in a row as soon as it was started.
    Failing { failures: u32, delay: Duration },
    /// A daemon is not started again before a reload: it asked for that.
    Retired,
    /// The same, because it ended well so many times in a row as soon as it was started.
    GivenUp { tries: u32 },
    /// The same, because it runs in the background.
    Detached { pid: Pid },
    /// A job's time has come while it runs.
    Skipped { pid: Pid },
    /// A job takes too long.
    RunTimeout { pid: Pid },
    /// It does not stop.
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
        /// So often in a row it has ended with 0 as soon as it was started.
        done: u32,
    },
    Job {
        schedule: Box<Schedule>,
        next: Option<Timestamp>,
    },
    /// Adopted, and not in the configuration.
    Unwanted,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Idle,
    /// Being made: the shell answers before the next event.
    Starting,
    Running {
        pid: Pid,
        since: Now,
        /// How long it had run under a former master.
        before: Duration,
        deadline: Option<Now>,
    },
    Stopping {
        pid: Pid,
        deadline: Now,
    },
    Killing {
        pid: Pid,
    },
    Backoff {
        until: Now,
    },
    Retired,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Waiting,
    Running,
    /// The workers drain.
    Closing,
    Stopping,
}

/// The state of all sidecars. See the module's text for the rules.
#[derive(Debug)]
pub(crate) struct SidecarSupervisor {
    /// In the order of the configuration; then those that were adopted and are not wanted.
    sidecars: Vec<Sidecar>,
    mode: Mode,
    cron_timeout: Duration,
    /// So often a daemon may end well as soon as it is started; 0 for any number.
    daemon_tries: u32,
    stop_timeout: Duration,
    now: Now,
    wall: Timestamp,
    /// When another master, whose place this one takes, looked last at what is due.
    looked_at: Option<Timestamp>,
    actions: Vec<Action>,
}

impl SidecarSupervisor {
    /// `stop_timeout` is what one that was asked to stop is given.
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
            now: Now::ZERO,
            wall,
            looked_at: None,
            actions: Vec::new(),
        }
    }

    /// Takes over a process that another master has made, and runs since then; `sidecar` is `None` if it is not wanted any
    /// more, or not twice. Returns its number.
    pub(crate) fn adopt(
        &mut self,
        sidecar: Option<usize>,
        pid: Pid,
        age: Duration,
        stop_left: Option<Duration>,
        now: Now,
    ) -> usize {
        let free = sidecar.filter(|&index| self.sidecars[index].state == State::Idle);
        let state = match stop_left {
            Some(left) => State::Stopping { pid, deadline: now + left },
            None => State::Running { pid, since: now, before: age, deadline: None },
        };
        let Some(index) = free else {
            // The next step asks it to stop.
            self.sidecars.push(Sidecar { kind: Kind::Unwanted, state });
            return self.sidecars.len() - 1;
        };
        let is_job = matches!(self.sidecars[index].kind, Kind::Job { .. });
        self.sidecars[index].state = if is_job { self.timed(state) } else { state };
        index
    }

    /// How long a process may take to stop, if it was asked to.
    pub(crate) fn stop_left(&self, pid: Pid) -> Option<Duration> {
        match self.sidecars[self.find(pid)?].state {
            State::Stopping { deadline, .. } => Some(deadline.saturating_sub(self.now)),
            State::Killing { .. } => Some(Duration::ZERO),
            State::Idle | State::Starting | State::Running { .. } | State::Backoff { .. } | State::Retired => None,
        }
    }

    /// Goes by another configuration from now on. `former` says of each sidecar in it which one of the present ones it is.
    /// What is in it no more is asked to stop by the next step. Returns the number that each of the present ones has now;
    /// `None` if nothing is left of it.
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

    /// For the log.
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

    /// The state of a job, with the deadline that it has now.
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

    /// When it was last looked what is due, for a master that takes over; `None` if jobs do not run.
    pub(crate) fn looked_at(&self) -> Option<Timestamp> {
        (self.mode == Mode::Running).then_some(self.wall)
    }

    /// Jobs whose time has come since then run, each once.
    pub(crate) fn resume(&mut self, looked_at: Timestamp) {
        self.looked_at = Some(looked_at);
    }

    /// Takes an event, and returns what is to be done because of it, in order.
    pub(crate) fn step(&mut self, event: Event, now: Now, wall: Timestamp) -> Vec<Action> {
        // By a little it may be at any time, and that is no reason to run a job twice.
        let was_set_back = self.wall.duration_since(wall) > SET_BACK;
        (self.now, self.wall) = (now, wall);
        match event {
            Event::Tick => {}
            Event::Begin if self.mode == Mode::Waiting => {
                self.mode = Mode::Running;
                let from = self.looked_at.take().map_or(wall, |looked_at| looked_at.min(wall));
                self.find_next_times(from);
            }
            Event::Begin => {}
            Event::Spawned { sidecar, pid } => self.spawned(sidecar, pid),
            Event::SpawnFailed { sidecar } => self.failed(sidecar),
            Event::Exited { pid, after_exit } => self.exited(pid, after_exit),
            Event::Detached { sidecar, pid } => self.detached(sidecar, pid),
            Event::Reloaded => self.reload(),
            Event::Closing if self.mode == Mode::Stopping => {}
            Event::Closing => self.mode = Mode::Closing,
            Event::Stop => self.mode = Mode::Stopping,
            Event::Halt => {
                self.mode = Mode::Stopping;
                (0..self.sidecars.len()).for_each(|index| self.kill(index));
            }
        }
        if was_set_back {
            self.find_next_times(wall);
        }
        for index in 0..self.sidecars.len() {
            self.meet_deadline(index);
            self.balance(index);
        }
        std::mem::take(&mut self.actions)
    }

    /// Whether no process is left.
    pub(crate) fn is_empty(&self) -> bool {
        self.sidecars.iter().all(|sidecar| sidecar.state.pid().is_none())
    }

    /// When [`Event::Tick`] is due, if nothing else happens before.
    pub(crate) fn next_deadline(&self) -> Option<Now> {
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
                self.notice(index, Notice::Retired);
            }
            AfterExit::Replace | AfterExit::Restart if was_steady => breaker.close(),
            AfterExit::Restart if tries == self.daemon_tries => {
                sidecar.state = State::Retired;
                self.notice(index, Notice::GivenUp { tries });
            }
            // As for 125: env, timeout, docker run and the like return it when they themselves fail.
            AfterExit::Replace | AfterExit::Restart | AfterExit::StayDown => self.failed(index),
        }
    }

    /// It is not started a second time beside the first. If it runs again already, its next end tells.
    fn detached(&mut self, index: usize, pid: Pid) {
        if let Some(Sidecar { kind: Kind::Daemon { .. }, state }) = self.sidecars.get_mut(index)
            && let State::Backoff { .. } | State::Idle = state
        {
            *state = State::Retired;
            self.notice(index, Notice::Detached { pid });
        }
    }

    /// It could not be started, or ended at once.
    fn failed(&mut self, index: usize) {
        let sidecar = &mut self.sidecars[index];
        sidecar.state = State::Idle;
        let Kind::Daemon { breaker, .. } = &mut sidecar.kind else { return };
        let failing = breaker.fail(self.now);
        sidecar.state = State::Backoff { until: breaker.open_until() };
        if let Some((failures, delay)) = failing {
            self.notice(index, Notice::Failing { failures, delay });
        }
    }

    fn reload(&mut self) {
        for index in 0..self.sidecars.len() {
            let Kind::Daemon { breaker, done } = &mut self.sidecars[index].kind else { continue };
            // A reload is the operator's way to say that the cause is mended.
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
                self.notice(index, Notice::RunTimeout { pid });
                self.terminate(index);
            }
            State::Stopping { pid, deadline } if deadline <= self.now => {
                self.notice(index, Notice::StopTimeout { pid });
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

    /// Starts what is to run, and stops what is not.
    fn balance(&mut self, index: usize) {
        let is_due = self.is_due(index);
        match (&self.sidecars[index].kind, self.mode) {
            (Kind::Unwanted, _) | (_, Mode::Stopping) => self.terminate(index),
            (Kind::Daemon { .. }, Mode::Running | Mode::Closing) => self.spawn(index),
            (Kind::Job { .. }, Mode::Running) if is_due => match self.sidecars[index].state.pid() {
                Some(pid) => self.notice(index, Notice::Skipped { pid }),
                None => self.spawn(index),
            },
            (Kind::Daemon { .. }, Mode::Waiting)
            | (Kind::Job { .. }, Mode::Waiting | Mode::Running | Mode::Closing) => {}
        }
    }

    /// Whether a job's time has come; said once.
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
            self.actions.push(Action::Spawn { sidecar: index });
        }
    }

    fn terminate(&mut self, index: usize) {
        match self.sidecars[index].state {
            State::Running { pid, .. } => {
                self.sidecars[index].state = State::Stopping { pid, deadline: self.now + self.stop_timeout };
                self.actions.push(Action::Terminate { pid });
            }
            State::Backoff { .. } => self.sidecars[index].state = State::Idle,
            // What is just being made has no pid to be asked by: its time comes in the next step.
            State::Idle | State::Starting | State::Stopping { .. } | State::Killing { .. } | State::Retired => {}
        }
    }

    fn kill(&mut self, index: usize) {
        match self.sidecars[index].state {
            State::Running { pid, .. } | State::Stopping { pid, .. } => {
                self.sidecars[index].state = State::Killing { pid };
                self.actions.push(Action::Kill { pid });
            }
            State::Backoff { .. } => self.sidecars[index].state = State::Idle,
            State::Idle | State::Starting | State::Killing { .. } | State::Retired => {}
        }
    }

    fn notice(&mut self, sidecar: usize, notice: Notice) {
        self.actions.push(Action::Notice { sidecar, notice });
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
