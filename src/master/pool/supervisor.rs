//! Implements the supervisor, which decides without a system call which processes should run.
//!
//! ```text
//!                 Spawn            Ready                Terminate            Kill
//!   Empty ───────────────▶ Starting ─────▶ Ready ───────────────▶ Draining ───────▶ Killing
//!     ▲ ▲                     │ died        │ died                  │ died             │ died
//!     │ └── until is past ── Backoff ◀──────┘                       │                  │
//!     └─────────────────────────────────────────────────────────────┴──────────────────┘
//! ```
//!
//! [`Supervisor::step`] takes one event and the time, and returns the actions. The master's loop carries the actions
//! out and reports their results. Time is measured from the master's start and passed in, so that a test can simulate
//! years of crashes in a second, from a seed.
//!
//! The rules:
//! - A slot has at most one process. The slot number is unique among the running processes, and is the process's row in the scoreboard.
//! - The number of processes that are starting or ready should be `target`. Draining processes are not included. [`scale`] changes the
//!   target.
//! - A process that dies after it has become ready is replaced immediately, as long as fewer than `respawn_rate`
//!   processes were replaced within about a second. Further replacements are delayed.
//! - A process that dies before it is ready opens the circuit breaker: no process is spawned until a delay has passed.
//!   The delay doubles with each consecutive failure. After the delay, a single process is tried; if it becomes ready,
//!   the breaker closes and the other missing processes are spawned. The delay is a deadline and does not block the
//!   master.
//! - A process that exits with 0 before it has been seen to be ready may have served its share of requests, and is
//!   replaced immediately. After several consecutive exits of this kind, each further one counts as a death before the
//!   process was ready, and a reload fails.
//! - A running process that is replaced (reload, recycling) drains when its replacement is ready, and a budget limits
//!   the number of processes that are being replaced at a time. If the new processes of a reload do not become ready,
//!   the old ones keep running: see [`roll`]. So they do if a new process dies soon after it was ready.
//! - When the server stops, the ready processes are asked to exit first. When the other processes are asked depends on
//!   the queues of the listening sockets: see [`stop`].
//! - While a process is draining, the supervisor reminds the master's loop of it every second, because a program may
//!   miss a signal that arrives between its check for signals and `accept`. At the deadline, the process is killed.

mod breaker;
mod commands;
mod messages;
pub(crate) mod restore;
mod roll;
mod scale;
mod stop;
mod view;

use std::time::Duration;

use nix::unistd::Pid;

pub(in crate::master) use self::breaker::Breaker;
use self::breaker::TokenBucket;
pub(crate) use self::messages::{
    Action, AfterExit, Budget, Command, Demand, Notice, Policy, RollFailure, SupervisorEvent,
};
use self::roll::Roll;
use self::scale::Scaler;
pub(crate) use self::view::{Phase, SlotView};

/// Time since the master started.
pub(crate) type Uptime = Duration;

const TERMINATE_INTERVAL: Duration = Duration::from_secs(1);
/// Maximum number of consecutive processes that may exit with 0 without having been seen to be ready. A process that
/// has run for [`UNSEEN_LONG`] counts as three.
const MAX_UNSEEN: u32 = 10;
const UNSEEN_LONG: Duration = Duration::from_millis(100);

/// The content of a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    Empty,
    /// The deadline is set before the process exists, so that a process that never finishes starting is killed, too.
    Starting {
        pid: Option<Pid>,
        deadline: Uptime,
    },
    Ready {
        pid: Pid,
    },
    Draining {
        pid: Pid,
        deadline: Uptime,
        ask_again: Uptime,
    },
    /// `unready` is true if the process took too long to start. Its death then counts as that of a process that never
    /// became ready.
    Killing {
        pid: Pid,
        unready: bool,
    },
    Backoff {
        until: Uptime,
    },
}

#[derive(Clone, Copy, Debug)]
struct Slot {
    state: State,
    generation: u64,
    /// When the slot's process became ready.
    ready_since: Option<Uptime>,
    /// When the slot's process reached the end of its lifetime.
    worn: Option<Uptime>,
    /// Whether the slot's process is draining because a new process has replaced it.
    replaced: bool,
    /// Whether the slot's process was serving a request or an event stream at the last sample of demand.
    busy: bool,
    /// Whether the slot's process was ready when the server began to stop, and therefore accepts the queued
    /// connections.
    serves_queue: bool,
}

impl Slot {
    fn new(state: State, generation: u64) -> Self {
        Self { state, generation, ready_since: None, worn: None, replaced: false, busy: false, serves_queue: false }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Running,
    /// `until` is the deadline of all processes. `queue` is true if connections are waiting in a queue and must be
    /// served.
    Stopping {
        success: bool,
        until: Uptime,
        queue: bool,
    },
    Stopped,
}

/// The state of all processes. See the module documentation for the rules.
#[derive(Debug)]
pub(crate) struct Supervisor {
    policy: Policy,
    slots: Vec<Slot>,
    target: u32,
    scaler: Scaler,
    /// The generation of all processes, if no reload is under way and none has failed.
    generation: u64,
    /// The generation of the latest reload.
    newest: u64,
    roll: Option<Roll>,
    mode: Mode,
    reached_full_strength: bool,
    /// Whether at least one process has been ready.
    proven: bool,
    /// Number of consecutive processes that have exited with 0 and have never been seen to be ready: see
    /// [`Supervisor::done_unseen`].
    unseen: u32,
    breaker: Breaker,
    respawns: TokenBucket,
    /// The time of the last step.
    now: Uptime,
    actions: Vec<Action>,
}

impl Supervisor {
    pub(crate) fn new(policy: Policy) -> Self {
        Self {
            slots: vec![Slot::new(State::Empty, 0); policy.slots as usize],
            target: policy.workers.0,
            scaler: Scaler::new(policy.workers, policy.per_worker, policy.scale_down_after),
            generation: 1,
            newest: 1,
            roll: None,
            mode: Mode::Running,
            reached_full_strength: false,
            proven: false,
            unseen: 0,
            breaker: Breaker::default(),
            respawns: TokenBucket::full(policy.respawn_rate),
            now: Uptime::ZERO,
            policy,
            actions: Vec::new(),
        }
    }

    /// Handles an event. Returns the actions, in order.
    pub(crate) fn step(&mut self, event: SupervisorEvent, now: Uptime) -> Vec<Action> {
        self.now = now;
        match event {
            // This is the last event of an iteration, so a process whose report or death was read in the same iteration
            // is not killed.
            SupervisorEvent::Tick => self.meet_deadlines(now),
            SupervisorEvent::Spawned { slot, pid } => self.spawned(slot, pid),
            SupervisorEvent::SpawnFailed { slot } => self.failed_start(slot, None, now),
            SupervisorEvent::Ready { pid } => self.ready(pid),
            SupervisorEvent::Recycle { pid } => self.wear_out(pid, now),
            SupervisorEvent::Hung { pid } => self.hung(pid),
            SupervisorEvent::Demand(demand) => self.demanded(&demand, now),
            SupervisorEvent::Arrival if self.awaits_arrival() => self.target = self.scaler.arrival(now),
            SupervisorEvent::Arrival => {}
            SupervisorEvent::Exited { pid, after_exit } => self.exited(pid, after_exit, now),
            SupervisorEvent::Command(command) => self.command(command, now),
            SupervisorEvent::Queue { waits } => self.queue(waits, now),
            SupervisorEvent::Policy(policy) => self.set_policy(policy, now),
        }
        self.end_backoffs(now);
        match self.mode {
            Mode::Running if self.has_failed(now) => {
                self.notice(Notice::GivenUp { after: self.policy.give_up_after });
                self.stop(false, now);
            }
            Mode::Running => {
                self.balance(now);
                self.look_ahead(now);
            }
            Mode::Stopping { .. } | Mode::Stopped => {}
        }
        if let Mode::Stopping { success, .. } = self.mode {
            self.finish(success);
        }
        std::mem::take(&mut self.actions)
    }

    /// Whether there is no worker, in which case a connection must be reported with [`SupervisorEvent::Arrival`].
    pub(crate) fn awaits_arrival(&self) -> bool {
        self.mode == Mode::Running && self.target == 0
    }

    /// Returns the time at which [`SupervisorEvent::Tick`] is due without another event. After a tick, the result is
    /// always later than that tick.
    pub(crate) fn next_deadline(&self) -> Option<Uptime> {
        let slots = self.slots.iter().filter_map(|slot| match slot.state {
            State::Starting { deadline, .. } => Some(deadline),
            State::Draining { deadline, ask_again, .. } => Some(deadline.min(ask_again)),
            // While the server is stopping, `SupervisorEvent::Queue` follows soon anyway.
            State::Backoff { until } => (self.mode == Mode::Running).then_some(until),
            State::Empty | State::Ready { .. } | State::Killing { .. } => None,
        });
        // A slot that is empty while the breaker is open is waiting only for the breaker.
        let breaker = (self.mode == Mode::Running && self.missing() > 0).then_some(self.breaker.open_until());
        let sample = (self.mode == Mode::Running).then(|| self.scaler.sample_at(self.target)).flatten();
        let given_up = (self.mode == Mode::Running).then(|| self.gives_up_at()).flatten();
        let others = breaker.into_iter().chain(sample).chain(given_up).chain(self.settles_at());
        slots.chain(others.filter(|&until| until > self.now)).min()
    }

    /// Returns the time at which the supervisor gives up unless a process becomes ready before. Returns `None` if a
    /// process has ever been ready, or if processes are not failing to start.
    fn gives_up_at(&self) -> Option<Uptime> {
        let after = Some(self.policy.give_up_after).filter(|after| !after.is_zero() && !self.proven);
        Some(self.breaker.failing_since()?.saturating_add(after?))
    }

    /// Whether it is time to give up. A process that is already starting may finish starting first.
    fn has_failed(&self, now: Uptime) -> bool {
        self.gives_up_at().is_some_and(|at| at <= now) && !self.is_starting()
    }

    /// Whether the process is serving, and is not being replaced or stopped.
    pub(crate) fn is_ready(&self, pid: Pid) -> bool {
        self.find(pid).is_some_and(|index| matches!(self.slots[index].state, State::Ready { .. }))
    }

    /// Whether a process has ever been ready, or no process is needed for now.
    pub(crate) fn is_up(&self) -> bool {
        self.proven || self.reached_full_strength
    }

    /// Returns the slot and generation of a running process.
    #[cfg(test)]
    fn place_of(&self, pid: Pid) -> Option<(u32, u64)> {
        let index = self.find(pid)?;
        Some((number(index), self.slots[index].generation))
    }

    fn find(&self, pid: Pid) -> Option<usize> {
        self.slots.iter().position(|slot| slot.state.pid() == Some(pid))
    }

    fn spawned(&mut self, slot: u32, pid: Pid) {
        let state = &mut self.slots[slot as usize].state;
        match state {
            State::Starting { pid: place @ None, .. } => *place = Some(pid),
            State::Starting { pid: Some(_), .. }
            | State::Empty
            | State::Ready { .. }
            | State::Draining { .. }
            | State::Killing { .. }
            | State::Backoff { .. } => unreachable!("slot {slot} was not waiting for a process: {state:?}"),
        }
    }

    fn ready(&mut self, pid: Pid) {
        // Reports are not trusted: a report from a process that is no longer starting has no effect.
        let Some(index) = self.find(pid) else { return };
        match self.slots[index].state {
            State::Starting { .. } => {
                self.slots[index].state = State::Ready { pid };
                self.slots[index].ready_since = Some(self.now);
                self.proven = true;
                self.breaker.close();
                self.unseen = 0;
                self.new_is_ready(self.slots[index].generation);
                if let Mode::Stopping { .. } = self.mode {
                    self.finish_queue(index, self.now);
                }
            }
            State::Empty
            | State::Ready { .. }
            | State::Draining { .. }
            | State::Killing { .. }
            | State::Backoff { .. } => {}
        }
    }

    fn exited(&mut self, pid: Pid, after_exit: AfterExit, now: Uptime) {
        let Some(index) = self.find(pid) else { return }; // not a process of the supervisor
        let slot = number(index);
        let ended = self.slots[index];
        let Slot { state, generation, serves_queue, .. } = ended;
        self.slots[index] = Slot::new(State::Empty, generation);
        match state {
            State::Ready { .. } if self.is_unsettled(&ended, now) => {
                self.ended_early(slot, pid, after_exit);
                self.respawn(slot, now);
            }
            // During a reload, such an exit means that the new generation has failed; the old processes keep running.
            State::Starting { .. } if after_exit == AfterExit::StayDown && self.is_new(generation) => {
                self.failed_start(slot, Some(pid), now);
            }
            State::Starting { .. } | State::Ready { .. } if after_exit == AfterExit::StayDown => self.retire(now),
            State::Starting { deadline, .. } if matches!(after_exit, AfterExit::Restart | AfterExit::Done) => {
                let lived = now.saturating_sub(deadline.saturating_sub(self.policy.start_timeout));
                self.done_unseen(slot, pid, lived, now);
            }
            State::Ready { .. } => self.respawn(slot, now),
            State::Starting { .. } | State::Killing { unready: true, .. } => self.failed_start(slot, Some(pid), now),
            State::Draining { .. } | State::Killing { .. } if serves_queue && after_exit != AfterExit::StayDown => {
                self.respawn(slot, now);
            }
            State::Draining { .. } | State::Killing { .. } | State::Empty | State::Backoff { .. } => {}
        }
    }

    /// Handles a process that exited with 0 and was never seen to be ready. The process may have served its share of
    /// requests between two checks. If this happens repeatedly and no process is ever seen to be ready, the program has
    /// failed. A process that ran longer was checked more often, and is given more weight.
    fn done_unseen(&mut self, slot: u32, pid: Pid, lived: Duration, now: Uptime) {
        let generation = self.slots[slot as usize].generation;
        let added = if lived < UNSEEN_LONG { 1 } else { 3 };
        let of_roll = self.roll.as_mut().filter(|roll| roll.generation == generation);
        let is_new = of_roll.is_some();
        let unseen = of_roll.map_or(&mut self.unseen, |roll| &mut roll.unseen);
        *unseen = unseen.saturating_add(added);
        match *unseen < MAX_UNSEEN {
            true if is_new => {} // the number of these attempts is limited anyway
            true => self.respawn(slot, now),
            false => self.failed_start(slot, Some(pid), now),
        }
    }

    /// Replaces the process in the slot: immediately, or after a delay if too many processes exit.
    fn respawn(&mut self, slot: u32, now: Uptime) {
        if !self.replaces() {
            return;
        }
        let until = self.respawns.take(now);
        if let Some(until) = until {
            self.notice(Notice::Throttled { slot, delay: until.saturating_sub(now) });
        }
        if until.is_some() || self.mode != Mode::Running {
            self.slots[slot as usize].state = State::Backoff { until: until.unwrap_or(now) };
        }
    }

    fn failed_start(&mut self, slot: u32, pid: Option<Pid>, now: Uptime) {
        let place = &mut self.slots[slot as usize];
        let generation = place.generation;
        *place = Slot::new(State::Empty, generation);
        if !self.replaces() {
            return;
        }
        if self.is_new(generation) {
            self.fail_roll(slot, pid, RollFailure::NeverReady);
            if self.strength() >= self.target {
                return; // the new process was above the target, so none is missing
            }
        }
        if let Some((failures, delay)) = self.breaker.fail(now) {
            self.notice(Notice::Failing { failures, delay });
        }
        self.slots[slot as usize].state = State::Backoff { until: self.breaker.open_until() };
    }

    /// Handles a sample of demand, and adjusts the number of workers.
    fn demanded(&mut self, demand: &Demand, now: Uptime) {
        for (index, slot) in self.slots.iter_mut().enumerate() {
            slot.busy = demand.busy.contains(&number(index));
        }
        if self.mode != Mode::Running || self.target == 0 {
            return;
        }
        let (from, may_grow) = (self.target, !self.breaker.is_failing());
        let verdict = self.scaler.decide(demand, from, may_grow, now);
        let Demand { in_flight, waiting, .. } = *demand;
        if verdict.is_saturated {
            self.notice(Notice::Saturated { workers: from, in_flight, waiting });
        }
        if verdict.target != from {
            self.target = verdict.target;
            self.notice(Notice::Scaled { from, to: verdict.target, in_flight, waiting });
        }
    }

    /// Reports once that all processes are ready, and requests the next sample of demand when it is due.
    fn look_ahead(&mut self, now: Uptime) {
        if !self.reached_full_strength && self.count_ready() >= self.target {
            self.reached_full_strength = true;
            self.notice(Notice::FullStrength);
        }
        if self.scaler.sample_at(self.target).is_some_and(|at| at <= now) {
            self.scaler.sampled(now);
            self.actions.push(Action::Sample);
        }
    }

    fn meet_deadlines(&mut self, now: Uptime) {
        for index in 0..self.slots.len() {
            let slot = number(index);
            match self.slots[index].state {
                State::Starting { pid: Some(pid), deadline } if deadline <= now => {
                    self.notice(Notice::StartTimeout { slot, pid });
                    self.slots[index].state = State::Killing { pid, unready: true };
                    self.actions.push(Action::Kill { pid });
                }
                State::Draining { pid, deadline, .. } if deadline <= now => {
                    self.notice(Notice::DrainTimeout { slot, pid });
                    self.kill(index);
                }
                State::Draining { pid, deadline, ask_again } if ask_again <= now => {
                    self.actions.push(Action::Remind { pid });
                    self.slots[index].state = State::Draining { pid, deadline, ask_again: now + TERMINATE_INTERVAL };
                }
                State::Empty
                | State::Starting { .. }
                | State::Ready { .. }
                | State::Draining { .. }
                | State::Killing { .. }
                | State::Backoff { .. } => {}
            }
        }
    }

    fn end_backoffs(&mut self, now: Uptime) {
        if self.mode != Mode::Running {
            return;
        }
        for slot in &mut self.slots {
            if matches!(slot.state, State::Backoff { until } if until <= now) {
                slot.state = State::Empty;
            }
        }
    }

    /// Spawns missing processes, and drains processes that are surplus or have been replaced.
    fn balance(&mut self, now: Uptime) {
        self.prove(now);
        self.replace(now);
        while self.missing() > 0 && self.breaker.permits(self.is_starting(), now) {
            let Some(generation) = self.next_generation() else { break };
            // Slots beyond the policy's number contain processes of a former master that had more slots.
            let mut slots = self.slots.iter().take(self.policy.slots as usize);
            let Some(index) = slots.position(|slot| slot.state == State::Empty) else { break };
            self.start(index, generation, now);
        }
        while self.strength() > self.wanted() {
            // Processes are removed in this order: those that are not ready, then idle ones, then those of the oldest
            // generation, then those in the highest slots.
            let candidates = (0..self.slots.len()).filter(|&index| self.slots[index].state.counts());
            let surplus = candidates.min_by_key(|&index| {
                let Slot { state, busy, generation, .. } = self.slots[index];
                (matches!(state, State::Ready { .. }), busy, generation, std::cmp::Reverse(index))
            });
            // A process that is being created has no pid yet: the next step drains it.
            let Some(index) = surplus.filter(|&index| self.slots[index].state.pid().is_some()) else { break };
            self.drain(index, now);
        }
    }

    fn start(&mut self, index: usize, generation: u64, now: Uptime) {
        let deadline = now + self.policy.start_timeout;
        self.slots[index] = Slot::new(State::Starting { pid: None, deadline }, generation);
        self.actions.push(Action::Spawn { slot: number(index), generation });
    }

    /// Returns how many processes there should be: more than the target while processes are being replaced.
    fn wanted(&self) -> u32 {
        self.target + self.surge()
    }

    /// Returns how many of the wanted processes are missing: they do not exist, and their start is not delayed.
    fn missing(&self) -> u32 {
        // A process that is killed because it took too long to start keeps its place until its death is reported. The
        // death counts as a failure, after which no other process is spawned for a while.
        let waiting = self.count(|state| matches!(state, State::Backoff { .. } | State::Killing { unready: true, .. }));
        self.wanted().saturating_sub(self.strength() + waiting)
    }

    /// Returns the number of processes that serve or will serve.
    fn strength(&self) -> u32 {
        self.count(State::counts)
    }

    fn count_ready(&self) -> u32 {
        self.count(|state| matches!(state, State::Ready { .. }))
    }

    fn is_starting(&self) -> bool {
        self.count(|state| matches!(state, State::Starting { .. })) > 0
    }

    fn count(&self, which: impl Fn(&State) -> bool) -> u32 {
        self.count_slots(|slot| which(&slot.state))
    }

    fn count_slots(&self, which: impl Fn(&Slot) -> bool) -> u32 {
        number(self.slots.iter().filter(|slot| which(slot)).count())
    }

    fn notice(&mut self, notice: Notice) {
        self.actions.push(Action::Notice(notice));
    }
}

impl State {
    fn pid(&self) -> Option<Pid> {
        match *self {
            Self::Starting { pid, .. } => pid,
            Self::Ready { pid } | Self::Draining { pid, .. } | Self::Killing { pid, .. } => Some(pid),
            Self::Empty | Self::Backoff { .. } => None,
        }
    }

    fn counts(&self) -> bool {
        matches!(self, Self::Starting { .. } | Self::Ready { .. })
    }

    /// Whether the process counts as running, or may have to be replaced when its death is reported.
    fn holds_place(&self) -> bool {
        self.counts() || matches!(self, Self::Killing { unready: true, .. })
    }
}

fn number(index: usize) -> u32 {
    u32::try_from(index).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests;
#[cfg(test)]
mod upgrade_tests;
