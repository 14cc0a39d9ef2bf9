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
//! [`Helpers::step`] takes one event and the time, and returns what is to be done; [`beside`](super::beside) does that. The
//! time is two clocks: what has passed since the master started, for deadlines, and that on the wall, for schedules.
//!
//! The rules:
//! - One process a helper, at most.
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

use super::supervisor::{Breaker, Now, Wish};
use crate::config::helpers::{HelpersConfig, Schedule};

/// A daemon that ends sooner has not started.
pub(super) const STEADY: Duration = Duration::from_secs(1);
/// How often the wall's clock is looked at: the other one stands still while the machine sleeps.
const LOOK_AT_THE_WALL: Duration = Duration::from_secs(60);
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
    Spawned { helper: usize, pid: Pid },
    /// It could not be made.
    SpawnFailed { helper: usize },
    /// It was reaped.
    Exited { pid: Pid, wish: Wish },
    /// The last process of a daemon has put itself into the background: it lives, and is no child that was made here.
    Detached { helper: usize, pid: Pid },
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
    Spawn { helper: usize },
    /// Ask it to leave.
    Terminate { pid: Pid },
    /// End it.
    Kill { pid: Pid },
    /// Tell the operator.
    Note { helper: usize, note: Note },
}

/// What an operator should know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Note {
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
struct Helper {
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

/// The state of all helpers. See the module's text for the rules.
#[derive(Debug)]
pub(crate) struct Helpers {
    /// In the order of the configuration; then those that were adopted and are not wanted.
    helpers: Vec<Helper>,
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

impl Helpers {
    /// `stop_timeout` is what one that was asked to stop is given.
    pub(crate) fn new(config: &HelpersConfig, stop_timeout: Duration, wall: Timestamp) -> Self {
        let kind = |schedule: &Option<Schedule>| match schedule {
            Some(schedule) => Kind::Job { schedule: Box::new(schedule.clone()), next: None },
            None => Kind::Daemon { breaker: Breaker::default(), done: 0 },
        };
        let helpers = config.helpers.iter().map(|one| Helper { kind: kind(&one.schedule), state: State::Idle });
        Self {
            helpers: helpers.collect(),
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

    /// Takes over a process that another master has made, and runs since then; `helper` is `None` if it is not wanted any
    /// more, or not twice. Returns its number.
    pub(crate) fn adopt(&mut self, helper: Option<usize>, pid: Pid, now: Now) -> usize {
        let deadline = (!self.cron_timeout.is_zero()).then(|| now + self.cron_timeout);
        let free = helper.filter(|&index| self.helpers[index].state == State::Idle);
        let Some(index) = free else {
            // The next step asks it to stop.
            let state = State::Running { pid, since: now, deadline: None };
            self.helpers.push(Helper { kind: Kind::Unwanted, state });
            return self.helpers.len() - 1;
        };
        let helper = &mut self.helpers[index];
        let deadline = deadline.filter(|_| matches!(helper.kind, Kind::Job { .. }));
        helper.state = State::Running { pid, since: now, deadline };
        index
    }

    /// Goes by another configuration from now on. `former` says of each helper in it which one of the present ones it is.
    /// What is in it no more is asked to stop by the next step. Returns the number that each of the present ones has now;
    /// `None` if nothing is left of it.
    pub(crate) fn reconfigure(
        &mut self,
        config: &HelpersConfig,
        stop_timeout: Duration,
        former: &[Option<usize>],
        wall: Timestamp,
    ) -> Vec<Option<usize>> {
        (self.cron_timeout, self.stop_timeout) = (config.cron_timeout, stop_timeout);
        self.daemon_tries = config.daemon_tries;
        let mut before: Vec<Option<Helper>> = std::mem::take(&mut self.helpers).into_iter().map(Some).collect();
        let mut now_at = vec![None; before.len()];
        for (one, former) in config.helpers.iter().zip(former) {
            let was = former.and_then(|index| before[index].take());
            if let Some(index) = *former {
                now_at[index] = Some(self.helpers.len());
            }
            let (kind, state) = was.map_or((None, State::Idle), |was| (Some(was.kind), was.state));
            let helper = match (&one.schedule, kind) {
                (Some(schedule), Some(Kind::Job { schedule: same, next })) if *same == *schedule => {
                    Helper { kind: Kind::Job { schedule: same, next }, state: self.timed(state) }
                }
                (Some(schedule), _) => {
                    let next = schedule.after(wall).filter(|_| self.mode == Mode::Running);
                    Helper { kind: Kind::Job { schedule: Box::new(schedule.clone()), next }, state: self.timed(state) }
                }
                (None, Some(kind @ Kind::Daemon { .. })) => Helper { kind, state },
                (None, _) => Helper { kind: Kind::Daemon { breaker: Breaker::default(), done: 0 }, state },
            };
            self.helpers.push(helper);
        }
        for (index, left) in before.into_iter().enumerate() {
            if let Some(Helper { state, .. }) = left
                && state.pid().is_some()
            {
                now_at[index] = Some(self.helpers.len());
                self.helpers.push(Helper { kind: Kind::Unwanted, state });
            }
        }
        now_at
    }

    /// For the log.
    pub(crate) fn describe(&self) -> String {
        let schedules = self.helpers.iter().filter_map(|helper| match &helper.kind {
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
            State::Running { pid, since, .. } => {
                let deadline = (!self.cron_timeout.is_zero()).then(|| since + self.cron_timeout);
                State::Running { pid, since, deadline }
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
            Event::Spawned { helper, pid } => self.spawned(helper, pid),
            Event::SpawnFailed { helper } => self.failed(helper),
            Event::Exited { pid, wish } => self.exited(pid, wish),
            Event::Detached { helper, pid } => self.detached(helper, pid),
            Event::Reloaded => self.reload(),
            Event::Closing if self.mode == Mode::Stopping => {}
            Event::Closing => self.mode = Mode::Closing,
            Event::Stop => self.mode = Mode::Stopping,
            Event::Halt => {
                self.mode = Mode::Stopping;
                (0..self.helpers.len()).for_each(|index| self.kill(index));
            }
        }
        if was_set_back {
            self.find_next_times(wall);
        }
        for index in 0..self.helpers.len() {
            self.meet_deadline(index);
            self.balance(index);
        }
        std::mem::take(&mut self.actions)
    }

    /// Whether no process is left.
    pub(crate) fn is_empty(&self) -> bool {
        self.helpers.iter().all(|helper| helper.state.pid().is_none())
    }

    /// When [`Event::Tick`] is due, if nothing else happens before.
    pub(crate) fn next_deadline(&self) -> Option<Now> {
        let of_states = self.helpers.iter().filter_map(|helper| match helper.state {
            State::Running { deadline, .. } => deadline,
            State::Stopping { deadline, .. } => Some(deadline),
            State::Backoff { until } => Some(until),
            State::Idle | State::Starting | State::Killing { .. } | State::Retired => None,
        });
        let of_schedules = self.helpers.iter().filter_map(|helper| match helper.kind {
            Kind::Job { next: Some(next), .. } if self.mode == Mode::Running => {
                let left = Duration::try_from(next.duration_since(self.wall)).unwrap_or(Duration::ZERO);
                Some(self.now + left.min(LOOK_AT_THE_WALL))
            }
            Kind::Daemon { .. } | Kind::Job { .. } | Kind::Unwanted => None,
        });
        of_states.chain(of_schedules).min()
    }

    fn find(&self, pid: Pid) -> Option<usize> {
        self.helpers.iter().position(|helper| helper.state.pid() == Some(pid))
    }

    fn find_next_times(&mut self, from: Timestamp) {
        for helper in &mut self.helpers {
            if let Kind::Job { schedule, next } = &mut helper.kind {
                *next = schedule.after(from);
            }
        }
    }

    fn spawned(&mut self, index: usize, pid: Pid) {
        let helper = &mut self.helpers[index];
        let state = helper.state;
        assert!(state == State::Starting, "helper {index} was not waiting for a process: {state:?}");
        let deadline = match helper.kind {
            Kind::Job { .. } if !self.cron_timeout.is_zero() => Some(self.now + self.cron_timeout),
            Kind::Daemon { .. } | Kind::Job { .. } | Kind::Unwanted => None,
        };
        helper.state = State::Running { pid, since: self.now, deadline };
    }

    fn exited(&mut self, pid: Pid, wish: Wish) {
        let Some(index) = self.find(pid) else { return };
        let helper = &mut self.helpers[index];
        let state = std::mem::replace(&mut helper.state, State::Idle);
        let (Kind::Daemon { breaker, done }, State::Running { since, .. }) = (&mut helper.kind, state) else { return };
        let was_steady = self.now >= since + STEADY;
        *done = if wish == Wish::Renew && !was_steady { done.saturating_add(1) } else { 0 };
        let tries = *done;
        match wish {
            Wish::Retire if was_steady => {
                helper.state = State::Retired;
                self.note(index, Note::Retired);
            }
            Wish::Replace | Wish::Renew if was_steady => breaker.close(),
            Wish::Renew if tries == self.daemon_tries => {
                helper.state = State::Retired;
                self.note(index, Note::GivenUp { tries });
            }
            // As for 125: env, timeout, docker run and the like return it when they themselves fail.
            Wish::Replace | Wish::Renew | Wish::Retire => self.failed(index),
        }
    }

    /// It is not started a second time beside the first. If it runs again already, its next end tells.
    fn detached(&mut self, index: usize, pid: Pid) {
        if let Some(Helper { kind: Kind::Daemon { .. }, state }) = self.helpers.get_mut(index)
            && let State::Backoff { .. } | State::Idle = state
        {
            *state = State::Retired;
            self.note(index, Note::Detached { pid });
        }
    }

    /// It could not be started, or ended at once.
    fn failed(&mut self, index: usize) {
        let helper = &mut self.helpers[index];
        helper.state = State::Idle;
        let Kind::Daemon { breaker, .. } = &mut helper.kind else { return };
        let failing = breaker.fail(self.now);
        helper.state = State::Backoff { until: breaker.open_until() };
        if let Some((failures, delay)) = failing {
            self.note(index, Note::Failing { failures, delay });
        }
    }

    fn reload(&mut self) {
        for index in 0..self.helpers.len() {
            let Kind::Daemon { breaker, done } = &mut self.helpers[index].kind else { continue };
            // A reload is the operator's way to say that the cause is mended.
            breaker.close();
            *done = 0;
            match self.helpers[index].state {
                State::Running { .. } => self.terminate(index),
                State::Backoff { .. } | State::Retired => self.helpers[index].state = State::Idle,
                State::Idle | State::Starting | State::Stopping { .. } | State::Killing { .. } => {}
            }
        }
    }

    fn meet_deadline(&mut self, index: usize) {
        match self.helpers[index].state {
            State::Running { pid, deadline: Some(deadline), .. } if deadline <= self.now => {
                self.note(index, Note::RunTimeout { pid });
                self.terminate(index);
            }
            State::Stopping { pid, deadline } if deadline <= self.now => {
                self.note(index, Note::StopTimeout { pid });
                self.kill(index);
            }
            State::Backoff { until } if until <= self.now => self.helpers[index].state = State::Idle,
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
        match (&self.helpers[index].kind, self.mode) {
            (Kind::Unwanted, _) | (_, Mode::Stopping) => self.terminate(index),
            (Kind::Daemon { .. }, Mode::Running | Mode::Closing) => self.spawn(index),
            (Kind::Job { .. }, Mode::Running) if is_due => match self.helpers[index].state.pid() {
                Some(pid) => self.note(index, Note::Skipped { pid }),
                None => self.spawn(index),
            },
            (Kind::Daemon { .. }, Mode::Waiting)
            | (Kind::Job { .. }, Mode::Waiting | Mode::Running | Mode::Closing) => {}
        }
    }

    /// Whether a job's time has come; said once.
    fn is_due(&mut self, index: usize) -> bool {
        let Kind::Job { schedule, next } = &mut self.helpers[index].kind else { return false };
        let is_due = next.is_some_and(|next| next <= self.wall);
        if is_due {
            *next = schedule.after(self.wall);
        }
        is_due
    }

    fn spawn(&mut self, index: usize) {
        if self.helpers[index].state == State::Idle {
            self.helpers[index].state = State::Starting;
            self.actions.push(Action::Spawn { helper: index });
        }
    }

    fn terminate(&mut self, index: usize) {
        match self.helpers[index].state {
            State::Running { pid, .. } => {
                self.helpers[index].state = State::Stopping { pid, deadline: self.now + self.stop_timeout };
                self.actions.push(Action::Terminate { pid });
            }
            State::Backoff { .. } => self.helpers[index].state = State::Idle,
            // What is just being made has no pid to be asked by: its time comes in the next step.
            State::Idle | State::Starting | State::Stopping { .. } | State::Killing { .. } | State::Retired => {}
        }
    }

    fn kill(&mut self, index: usize) {
        match self.helpers[index].state {
            State::Running { pid, .. } | State::Stopping { pid, .. } => {
                self.helpers[index].state = State::Killing { pid };
                self.actions.push(Action::Kill { pid });
            }
            State::Backoff { .. } => self.helpers[index].state = State::Idle,
            State::Idle | State::Starting | State::Killing { .. } | State::Retired => {}
        }
    }

    fn note(&mut self, helper: usize, note: Note) {
        self.actions.push(Action::Note { helper, note });
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
