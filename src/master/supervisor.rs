//! The supervisor: which processes there should be, decided without a single system call.
//!
//! ```text
//!                 Spawn            Ready                Terminate            Kill
//!   Empty ───────────────▶ Starting ─────▶ Ready ───────────────▶ Draining ───────▶ Killing
//!     ▲ ▲                     │ died        │ died                  │ died             │ died
//!     │ └── until is past ── Backoff ◀──────┘                       │                  │
//!     └─────────────────────────────────────────────────────────────┴──────────────────┘
//! ```
//!
//! [`Supervisor::step`] takes one event and the time and returns what is to be done; the shell around it (the
//! master's loop) does that and reports back. Time is what has passed since the master started, and is passed
//! in, so that a test can play years of crashes in a second, from a seed.
//!
//! The rules:
//! - One process a slot; a slot's number is unique among the living, and is the process's row in the scoreboard.
//! - Strength is `target` processes that are starting or ready. Draining ones do not count.
//! - A process that dies after it was ready is replaced at once, as long as fewer than `respawn_rate` were
//!   replaced within about a second; further ones wait for their turn.
//! - A process that dies before it is ready opens the breaker: nothing is spawned until a delay has passed,
//!   which doubles with each failure in a row; then one process alone tries, and if it becomes ready the
//!   breaker closes and all are spawned. The delay is a deadline and blocks nobody.
//! - Reload makes a new generation: one new process is spawned above the target, and only when it is ready one
//!   of the old drains, until none is left. A new process that dies before it is ready ends the roll, and
//!   the old ones stay.
//! - Of a process that was asked to stop the shell is reminded every second (a program may lose a signal between
//!   a check and an `accept`); at its deadline it is killed.

pub(crate) mod restore;

use std::time::Duration;

use nix::unistd::Pid;

/// Time since the master started.
pub(crate) type Now = Duration;

/// First delay of the breaker, and the longest.
const BREAKER_FIRST: Duration = Duration::from_millis(100);
const BREAKER_LONGEST: Duration = Duration::from_secs(30);
/// The longest delay for a process that ended well, only too early to have been seen at work.
const BREAKER_LONGEST_DONE: Duration = Duration::from_secs(1);
const TERMINATE_AGAIN: Duration = Duration::from_secs(1);

/// What the operator chose.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Policy {
    pub(crate) workers: u32,
    /// How many processes there can be at once, draining ones included.
    pub(crate) slots: u32,
    pub(crate) start_timeout: Duration,
    pub(crate) drain_timeout: Duration,
    pub(crate) respawn_rate: u32,
}

/// What happened.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Event {
    /// The clock: something may be due.
    Tick,
    /// The process asked for with [`Action::Spawn`] exists.
    Spawned { slot: u32, pid: Pid },
    /// It could not be made.
    SpawnFailed { slot: u32 },
    /// A process says that it is serving.
    Ready { pid: Pid },
    /// A child was reaped.
    Exited { pid: Pid, wish: Wish },
    /// The operator wants something.
    Command(Command),
}

/// What the way in which a process ended asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wish {
    /// It crashed: replace it.
    Replace,
    /// It exited with 0, having done its share of work: replace it. That is no failure, not even of a process
    /// that was never seen to be ready, if others of its kind were.
    Renew,
    /// It exited with 125: do not replace it.
    Retire,
}

/// How a process failed to become ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ending {
    /// It crashed, was killed, or could not be made.
    Early,
    /// It exited with 0.
    Done,
}

/// What an operator can ask for by a signal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Command {
    /// Let all finish what they serve, then end.
    Drain,
    /// End now.
    Halt,
    /// Replace all, one by one.
    Reload,
    /// One worker more.
    Add,
    /// One worker less.
    Remove,
    /// Have another build of this program take over.
    Upgrade,
}

impl Command {
    /// For the log.
    pub(crate) fn verb(self) -> &'static str {
        match self {
            Self::Drain => "drain and stop",
            Self::Halt => "stop at once",
            Self::Reload => "reload",
            Self::Add => "add a worker",
            Self::Remove => "remove a worker",
            Self::Upgrade => "upgrade",
        }
    }
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// Make a process for this slot and report [`Event::Spawned`] or [`Event::SpawnFailed`].
    Spawn { slot: u32, generation: u64 },
    /// Ask it to finish and leave.
    Terminate { pid: Pid },
    /// It is still there: ask it again, if it may have missed that.
    Remind { pid: Pid },
    /// End it.
    Kill { pid: Pid },
    /// See whether the program's new build can take over, and let it.
    Upgrade,
    /// Tell the operator.
    Note(Note),
    /// The last process is gone: end the master.
    Exit { success: bool },
}

/// What an operator should know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Note {
    /// As many processes are ready as there should be, for the first time.
    FullStrength,
    /// So many processes in a row died before they were ready; the next try comes after `delay`.
    Failing {
        failures: u32,
        delay: Duration,
    },
    /// Replacements wait, because too many processes die.
    Throttled {
        slot: u32,
        delay: Duration,
    },
    StartTimeout {
        slot: u32,
        pid: Pid,
    },
    DrainTimeout {
        slot: u32,
        pid: Pid,
    },
    /// The number of workers that there should be is now this.
    Target(u32),
    /// It stays as it is.
    TargetLimit(u32),
    ReloadStarted {
        generation: u64,
    },
    ReloadDone {
        generation: u64,
    },
    ReloadFailed {
        generation: u64,
    },
}

/// What a slot holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    Empty,
    /// The deadline is set before the process exists, so that one that is stuck in its start is ended too.
    Starting {
        pid: Option<Pid>,
        deadline: Now,
    },
    Ready {
        pid: Pid,
    },
    Draining {
        pid: Pid,
        deadline: Now,
        ask_again: Now,
    },
    /// `unready`: it overran its start, so its death is that of a process that never became ready.
    Killing {
        pid: Pid,
        unready: bool,
    },
    Backoff {
        until: Now,
    },
}

#[derive(Clone, Copy, Debug)]
struct Slot {
    state: State,
    generation: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Running,
    Stopping { success: bool },
    Stopped,
}

/// The state of all processes. See the module's text for the rules.
#[derive(Debug)]
pub(crate) struct Supervisor {
    policy: Policy,
    slots: Vec<Slot>,
    target: u32,
    generation: u64,
    mode: Mode,
    rolling: bool,
    reached_full_strength: bool,
    /// Some process was ready, ever.
    proven: bool,
    /// Processes in a row that died before they were ready.
    failures: u32,
    /// The breaker: nothing is spawned before this.
    closed_until: Now,
    respawns: TokenBucket,
    /// The time of the last step.
    now: Now,
    actions: Vec<Action>,
}

impl Supervisor {
    pub(crate) fn new(policy: Policy) -> Self {
        let empty = Slot { state: State::Empty, generation: 0 };
        Self {
            slots: vec![empty; policy.slots as usize],
            target: policy.workers,
            generation: 1,
            mode: Mode::Running,
            rolling: false,
            reached_full_strength: false,
            proven: false,
            failures: 0,
            closed_until: Now::ZERO,
            respawns: TokenBucket::full(policy.respawn_rate),
            now: Now::ZERO,
            policy,
            actions: Vec::new(),
        }
    }

    /// Takes an event, and returns what is to be done because of it, in order.
    pub(crate) fn step(&mut self, event: Event, now: Now) -> Vec<Action> {
        self.now = now;
        match event {
            Event::Tick => {}
            Event::Spawned { slot, pid } => self.spawned(slot, pid),
            Event::SpawnFailed { slot } => self.failed_start(slot, Ending::Early, now),
            Event::Ready { pid } => self.ready(pid),
            Event::Exited { pid, wish } => self.exited(pid, wish, now),
            Event::Command(command) => self.command(command, now),
        }
        self.meet_deadlines(now);
        match self.mode {
            Mode::Running => self.balance(now),
            Mode::Stopping { success } => self.finish(success),
            Mode::Stopped => {}
        }
        std::mem::take(&mut self.actions)
    }

    /// When [`Event::Tick`] is due, if nothing else happens before. Always later than the last step.
    pub(crate) fn next_deadline(&self) -> Option<Now> {
        let slots = self.slots.iter().filter_map(|slot| match slot.state {
            State::Starting { deadline, .. } => Some(deadline),
            State::Draining { deadline, ask_again, .. } => Some(deadline.min(ask_again)),
            State::Backoff { until } => Some(until),
            State::Empty | State::Ready { .. } | State::Killing { .. } => None,
        });
        // A slot that is empty while the breaker is open waits for the breaker alone.
        let breaker = (self.mode == Mode::Running && self.missing() > 0).then_some(self.closed_until);
        slots.chain(breaker.filter(|&until| until > self.now)).min()
    }

    /// The slot and generation of a living process, if it is one of ours.
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
        // Gossip: it may come from a process that is no longer starting, and then means nothing.
        let Some(index) = self.find(pid) else { return };
        match self.slots[index].state {
            State::Starting { .. } => {
                self.slots[index].state = State::Ready { pid };
                self.proven = true;
                self.failures = 0;
                self.closed_until = Now::ZERO;
                if !self.reached_full_strength && self.count_ready() >= self.target {
                    self.reached_full_strength = true;
                    self.note(Note::FullStrength);
                }
            }
            State::Empty
            | State::Ready { .. }
            | State::Draining { .. }
            | State::Killing { .. }
            | State::Backoff { .. } => {}
        }
    }

    fn exited(&mut self, pid: Pid, wish: Wish, now: Now) {
        let Some(index) = self.find(pid) else { return }; // a stranger
        let slot = number(index);
        let state = self.slots[index].state;
        self.slots[index].state = State::Empty;
        match state {
            // During a reload it is the new build that has something against it, and the old ones stay.
            State::Starting { .. } if wish == Wish::Retire && self.rolling => {
                self.failed_start(slot, Ending::Early, now)
            }
            State::Starting { .. } | State::Ready { .. } if wish == Wish::Retire => self.retire(now),
            State::Starting { .. } if wish == Wish::Renew && self.proven => self.respawn(slot, now),
            State::Starting { .. } if wish == Wish::Renew => self.failed_start(slot, Ending::Done, now),
            State::Starting { .. } => self.failed_start(slot, Ending::Early, now),
            State::Ready { .. } => self.respawn(slot, now),
            State::Killing { unready: true, .. } => self.failed_start(slot, Ending::Early, now),
            State::Draining { .. } | State::Killing { .. } | State::Empty | State::Backoff { .. } => {}
        }
    }

    /// Has the slot refilled: at once, as a rule.
    fn respawn(&mut self, slot: u32, now: Now) {
        if self.mode == Mode::Running
            && let Some(until) = self.respawns.take(now)
        {
            self.slots[slot as usize].state = State::Backoff { until };
            self.note(Note::Throttled { slot, delay: until.saturating_sub(now) });
        }
    }

    fn retire(&mut self, now: Now) {
        if self.mode != Mode::Running {
            return;
        }
        self.target = self.target.saturating_sub(1);
        self.note(Note::Target(self.target));
        if self.target == 0 {
            self.stop(false, now);
        }
    }

    fn stop(&mut self, success: bool, now: Now) {
        self.mode = Mode::Stopping { success };
        for index in 0..self.slots.len() {
            self.drain(index, now);
        }
    }

    fn failed_start(&mut self, slot: u32, ending: Ending, now: Now) {
        self.slots[slot as usize].state = State::Empty;
        if self.mode != Mode::Running {
            return;
        }
        if self.rolling && self.slots[slot as usize].generation < self.generation {
            return; // it says nothing of the new ones, which take its place in any case
        }
        if now >= self.closed_until {
            // The first failure since the breaker let processes through; its siblings' failures are the same one.
            self.failures = self.failures.saturating_add(1);
            let longest = match ending {
                Ending::Early => BREAKER_LONGEST,
                Ending::Done => BREAKER_LONGEST_DONE,
            };
            let delay = BREAKER_FIRST.saturating_mul(1 << (self.failures - 1).min(16)).min(longest);
            self.closed_until = now + delay;
            self.note(Note::Failing { failures: self.failures, delay });
        }
        if self.rolling {
            // The slot stays empty: it was one above the target.
            self.rolling = false;
            self.note(Note::ReloadFailed { generation: self.generation });
        } else {
            self.slots[slot as usize].state = State::Backoff { until: self.closed_until };
        }
    }

    fn command(&mut self, command: Command, now: Now) {
        match (command, self.mode) {
            (Command::Drain, Mode::Running) => self.stop(true, now),
            (Command::Halt, Mode::Running | Mode::Stopping { .. }) => {
                self.mode = Mode::Stopping { success: true };
                for index in 0..self.slots.len() {
                    self.kill(index);
                }
            }
            (Command::Reload, Mode::Running) => {
                self.generation += 1;
                self.rolling = true;
                // A reload is the operator's way to say that the cause is mended: try at once.
                self.closed_until = Now::ZERO;
                self.failures = 0;
                self.end_backoffs(Now::MAX);
                self.note(Note::ReloadStarted { generation: self.generation });
            }
            (Command::Add, Mode::Running) => {
                let more = self.target + 1;
                self.retarget(if more < self.policy.slots { more } else { self.target });
            }
            (Command::Remove, Mode::Running) => self.retarget(self.target.saturating_sub(1).max(1)),
            (Command::Upgrade, Mode::Running) => self.actions.push(Action::Upgrade),
            (
                Command::Drain | Command::Reload | Command::Add | Command::Remove | Command::Upgrade,
                Mode::Stopping { .. } | Mode::Stopped,
            )
            | (Command::Halt, Mode::Stopped) => {}
        }
    }

    fn retarget(&mut self, target: u32) {
        let note = if target == self.target { Note::TargetLimit(target) } else { Note::Target(target) };
        self.target = target;
        self.note(note);
    }

    fn meet_deadlines(&mut self, now: Now) {
        for index in 0..self.slots.len() {
            let slot = number(index);
            match self.slots[index].state {
                State::Starting { pid: Some(pid), deadline } if deadline <= now => {
                    self.note(Note::StartTimeout { slot, pid });
                    self.slots[index].state = State::Killing { pid, unready: true };
                    self.actions.push(Action::Kill { pid });
                }
                State::Draining { pid, deadline, .. } if deadline <= now => {
                    self.note(Note::DrainTimeout { slot, pid });
                    self.kill(index);
                }
                State::Draining { pid, deadline, ask_again } if ask_again <= now => {
                    self.actions.push(Action::Remind { pid });
                    self.slots[index].state = State::Draining { pid, deadline, ask_again: now + TERMINATE_AGAIN };
                }
                State::Empty
                | State::Starting { .. }
                | State::Ready { .. }
                | State::Draining { .. }
                | State::Killing { .. }
                | State::Backoff { .. } => {}
            }
        }
        self.end_backoffs(now);
    }

    fn end_backoffs(&mut self, now: Now) {
        for slot in &mut self.slots {
            if matches!(slot.state, State::Backoff { until } if until <= now) {
                slot.state = State::Empty;
            }
        }
    }

    /// Spawns what is missing, and drains what is too much or old.
    fn balance(&mut self, now: Now) {
        if self.rolling {
            self.roll(now);
        }
        while self.missing() > 0 {
            let trying = self.count(|state| matches!(state, State::Starting { .. })) > 0;
            if now < self.closed_until || (self.failures > 0 && trying) {
                break;
            }
            // Those beyond the policy's were left by a predecessor that had more.
            let mut slots = self.slots.iter().take(self.policy.slots as usize);
            let Some(index) = slots.position(|slot| slot.state == State::Empty) else { break };
            let deadline = now + self.policy.start_timeout;
            self.slots[index] = Slot { state: State::Starting { pid: None, deadline }, generation: self.generation };
            self.actions.push(Action::Spawn { slot: number(index), generation: self.generation });
        }
        while self.strength() > self.wanted() {
            // What does not serve yet goes first, then the oldest generation, then the highest slot.
            let surplus =
                (0..self.slots.len()).filter(|&index| self.slots[index].state.counts()).min_by_key(|&index| {
                    let serves = matches!(self.slots[index].state, State::Ready { .. });
                    (serves, self.slots[index].generation, std::cmp::Reverse(index))
                });
            let Some(index) = surplus else { break };
            self.drain(index, now);
        }
    }

    /// One step of a reload: for each new process that is ready, one old one drains.
    fn roll(&mut self, now: Now) {
        loop {
            let old = (0..self.slots.len())
                .find(|&index| self.slots[index].state.counts() && self.slots[index].generation < self.generation);
            let Some(old) = old else {
                if self.count(|state| matches!(state, State::Starting { .. })) == 0 {
                    self.rolling = false;
                    self.note(Note::ReloadDone { generation: self.generation });
                }
                return;
            };
            if self.count_ready() <= self.target {
                return;
            }
            self.drain(old, now);
        }
    }

    fn drain(&mut self, index: usize, now: Now) {
        match self.slots[index].state {
            State::Starting { pid: Some(pid), .. } | State::Ready { pid } => {
                let deadline = now + self.policy.drain_timeout;
                self.slots[index].state = State::Draining { pid, deadline, ask_again: now + TERMINATE_AGAIN };
                self.actions.push(Action::Terminate { pid });
            }
            State::Backoff { .. } => self.slots[index].state = State::Empty,
            // The shell answers each Spawn before the next event, so there is no Starting without a pid here.
            State::Starting { pid: None, .. } | State::Empty | State::Draining { .. } | State::Killing { .. } => {}
        }
    }

    fn kill(&mut self, index: usize) {
        match self.slots[index].state {
            State::Starting { pid: Some(pid), .. } | State::Ready { pid } | State::Draining { pid, .. } => {
                self.slots[index].state = State::Killing { pid, unready: false };
                self.actions.push(Action::Kill { pid });
            }
            State::Backoff { .. } => self.slots[index].state = State::Empty,
            State::Starting { pid: None, .. } | State::Empty | State::Killing { .. } => {}
        }
    }

    fn finish(&mut self, success: bool) {
        if self.count(|state| state.pid().is_some()) == 0 {
            self.mode = Mode::Stopped;
            self.actions.push(Action::Exit { success });
        }
    }

    /// How many processes there should be: one above the target while a reload replaces them.
    fn wanted(&self) -> u32 {
        self.target + u32::from(self.rolling)
    }

    /// How many of them neither exist nor wait for their time.
    fn missing(&self) -> u32 {
        // One that is being killed because it overran its start holds its place until its death is known: that is
        // a failure, after which nobody else is spawned for a while.
        let waiting = self.count(|state| matches!(state, State::Backoff { .. } | State::Killing { unready: true, .. }));
        self.wanted().saturating_sub(self.strength() + waiting)
    }

    /// Processes that serve or will.
    fn strength(&self) -> u32 {
        self.count(State::counts)
    }

    fn count_ready(&self) -> u32 {
        self.count(|state| matches!(state, State::Ready { .. }))
    }

    fn count(&self, which: impl Fn(&State) -> bool) -> u32 {
        number(self.slots.iter().filter(|slot| which(&slot.state)).count())
    }

    fn note(&mut self, note: Note) {
        self.actions.push(Action::Note(note));
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
}

fn number(index: usize) -> u32 {
    u32::try_from(index).unwrap_or(u32::MAX)
}

/// So many at once, and so many a second.
#[derive(Debug)]
struct TokenBucket {
    rate: u32,
    /// When the bucket would be full if nothing more were taken.
    full_at: Now,
}

impl TokenBucket {
    fn full(rate: u32) -> Self {
        Self { rate: rate.max(1), full_at: Now::ZERO }
    }

    /// Takes one token; if there was none, says when it will have come.
    fn take(&mut self, now: Now) -> Option<Now> {
        self.full_at = self.full_at.max(now) + Duration::from_secs(1) / self.rate;
        let due = self.full_at.saturating_sub(Duration::from_secs(1));
        (due > now).then_some(due)
    }
}

#[cfg(test)]
mod tests;
#[cfg(test)]
mod upgrade_tests;
