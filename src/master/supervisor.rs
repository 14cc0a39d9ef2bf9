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
            (
                Command::Drain | Command::Reload | Command::Add | Command::Remove,
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
            let Some(index) = self.slots.iter().position(|slot| slot.state == State::Empty) else { break };
            let deadline = now + self.policy.start_timeout;
            self.slots[index] = Slot { state: State::Starting { pid: None, deadline }, generation: self.generation };
            self.actions.push(Action::Spawn { slot: number(index), generation: self.generation });
        }
        while self.strength() > self.wanted() {
            // The oldest generation goes first, then the highest slot.
            let surplus = (0..self.slots.len())
                .filter(|&index| self.slots[index].state.counts())
                .min_by_key(|&index| (self.slots[index].generation, std::cmp::Reverse(index)));
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
        let waiting = self.count(|state| matches!(state, State::Backoff { .. }));
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
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn policy(workers: u32) -> Policy {
        Policy { workers, slots: workers * 2 + 4, start_timeout: 1000 * MS, drain_timeout: 5000 * MS, respawn_rate: 8 }
    }

    /// What a simulated process will do.
    #[derive(Clone, Copy, Debug, PartialEq)]
    enum Life {
        Starting,
        Ready,
        Leaving,
        Killed,
    }

    /// A supervisor in a simulated world: processes exist when it says so, and what it says is checked.
    struct World {
        supervisor: Supervisor,
        now: Now,
        processes: BTreeMap<i32, Life>,
        next_pid: i32,
        spawned: u32,
        fork_fails: bool,
        notes: Vec<Note>,
        exited: Option<bool>,
    }

    impl World {
        fn new(policy: Policy) -> Self {
            let mut world = Self {
                supervisor: Supervisor::new(policy),
                now: Now::ZERO,
                processes: BTreeMap::new(),
                next_pid: 100,
                spawned: 0,
                fork_fails: false,
                notes: Vec::new(),
                exited: None,
            };
            world.feed(Event::Tick);
            world
        }

        fn feed(&mut self, event: Event) {
            let mut queue = std::collections::VecDeque::from(self.supervisor.step(event, self.now));
            while let Some(action) = queue.pop_front() {
                assert_eq!(self.exited, None, "{action:?} after the end");
                let answer = match action {
                    Action::Spawn { slot, .. } => self.spawn(slot),
                    Action::Terminate { pid } | Action::Remind { pid } => self.signal(pid, Life::Leaving),
                    Action::Kill { pid } => self.signal(pid, Life::Killed),
                    Action::Note(note) => {
                        self.notes.push(note);
                        None
                    }
                    Action::Exit { success } => {
                        assert!(self.processes.is_empty(), "orphans: {:?}", self.processes);
                        self.exited = Some(success);
                        None
                    }
                };
                if let Some(answer) = answer {
                    queue.extend(self.supervisor.step(answer, self.now));
                }
            }
            if let Some(deadline) = self.supervisor.next_deadline() {
                assert!(deadline > self.now, "a deadline in the past is a busy loop");
            }
            self.check();
        }

        fn spawn(&mut self, slot: u32) -> Option<Event> {
            if self.fork_fails {
                return Some(Event::SpawnFailed { slot });
            }
            self.next_pid += 1;
            self.spawned += 1;
            let taken = self.processes.keys().filter_map(|&pid| self.supervisor.place_of(Pid::from_raw(pid)));
            assert!(taken.map(|(slot, _)| slot).all(|other| other != slot), "slot {slot} given twice");
            self.processes.insert(self.next_pid, Life::Starting);
            Some(Event::Spawned { slot, pid: Pid::from_raw(self.next_pid) })
        }

        fn signal(&mut self, pid: Pid, fate: Life) -> Option<Event> {
            let process = self.processes.get_mut(&pid.as_raw()).expect("a signal to a process that is gone");
            if *process != Life::Killed {
                *process = fate;
            }
            None
        }

        fn check(&self) {
            let policy = self.supervisor.policy;
            assert!(self.processes.len() <= policy.slots as usize);
            let serving = self.processes.values().filter(|&&life| matches!(life, Life::Starting | Life::Ready)).count();
            assert!(
                serving <= self.supervisor.target as usize + 1,
                "{serving} serve, {} wanted",
                self.supervisor.target
            );
            for &pid in self.processes.keys() {
                assert!(self.supervisor.place_of(Pid::from_raw(pid)).is_some(), "{pid} was forgotten");
            }
        }

        fn pick(&self, random: &mut fastrand::Rng, life: Life) -> Option<Pid> {
            let of_kind: Vec<i32> = self.processes.iter().filter(|(_, l)| **l == life).map(|(pid, _)| *pid).collect();
            random.choice(of_kind).map(Pid::from_raw)
        }

        fn die(&mut self, pid: Pid, wish: Wish) {
            assert!(self.processes.remove(&pid.as_raw()).is_some());
            self.feed(Event::Exited { pid, wish });
        }

        fn become_ready(&mut self, pid: Pid) {
            self.processes.insert(pid.as_raw(), Life::Ready);
            self.feed(Event::Ready { pid });
        }

        /// Lets time pass up to the next deadline, and everybody do as told.
        fn settle(&mut self) {
            for _ in 0..10_000 {
                let Some((&pid, &life)) = self.processes.iter().find(|(_, life)| **life != Life::Ready) else {
                    match self.supervisor.next_deadline() {
                        Some(deadline) => {
                            self.now = deadline;
                            self.feed(Event::Tick);
                            continue;
                        }
                        None => return,
                    }
                };
                match life {
                    Life::Starting => self.become_ready(Pid::from_raw(pid)),
                    Life::Leaving | Life::Killed => self.die(Pid::from_raw(pid), Wish::Replace),
                    Life::Ready => unreachable!(),
                }
            }
            panic!("never settles: {:?}", self.supervisor);
        }

        fn ready(&self) -> usize {
            self.processes.values().filter(|&&life| life == Life::Ready).count()
        }

        fn random_event(&mut self, random: &mut fastrand::Rng) {
            match random.u32(0..100) {
                0..30 => {
                    if let Some(pid) = self.pick(random, Life::Starting) {
                        self.become_ready(pid);
                    }
                }
                30..40 => {
                    let life = random.choice([Life::Starting, Life::Ready, Life::Leaving]).unwrap();
                    if let Some(pid) = self.pick(random, life) {
                        let wish = match random.u32(0..20) {
                            0 => Wish::Retire,
                            1..10 => Wish::Renew,
                            _ => Wish::Replace,
                        };
                        self.die(pid, wish);
                    }
                }
                40..60 => {
                    let life = random.choice([Life::Leaving, Life::Killed]).unwrap();
                    if let Some(pid) = self.pick(random, life) {
                        self.die(pid, Wish::Replace);
                    }
                }
                60..85 => {
                    self.now += MS * random.u32(0..700);
                    self.feed(Event::Tick);
                }
                85..88 => self.fork_fails = !self.fork_fails,
                88..91 => self.feed(Event::Command(Command::Reload)),
                91..94 => self.feed(Event::Command(Command::Add)),
                94..97 => self.feed(Event::Command(Command::Remove)),
                97..98 => self.feed(Event::Ready { pid: Pid::from_raw(1) }),
                _ => self.feed(Event::Exited { pid: Pid::from_raw(1), wish: Wish::Retire }),
            }
        }
    }

    #[test]
    fn random_histories_always_lead_back_to_full_strength() {
        for seed in 0..400 {
            let outcome = std::panic::catch_unwind(|| {
                let mut random = fastrand::Rng::with_seed(seed);
                let mut world = World::new(policy(random.u32(1..6)));
                for _ in 0..random.u32(1..600) {
                    world.random_event(&mut random);
                    if world.supervisor.mode != Mode::Running {
                        break; // all have retired
                    }
                }
                world.fork_fails = false;
                world.settle();
                if world.supervisor.target == 0 {
                    assert_eq!((world.exited, world.ready()), (Some(false), 0));
                    return;
                }
                assert_eq!(world.ready(), world.supervisor.target as usize);
                let last = random.choice([Command::Drain, Command::Halt]).unwrap();
                world.feed(Event::Command(last));
                world.settle();
                assert_eq!(world.exited, Some(true));
            });
            assert!(outcome.is_ok(), "seed {seed}");
        }
    }

    #[test]
    fn a_crash_after_ready_is_replaced_at_once() {
        let mut world = World::new(policy(2));
        world.settle();
        assert_eq!(world.notes, [Note::FullStrength]);
        let spawned = world.spawned;
        let pid = *world.processes.keys().next().unwrap();
        world.die(Pid::from_raw(pid), Wish::Replace);
        assert_eq!(world.spawned, spawned + 1, "in the same instant");
    }

    #[test]
    fn a_storm_of_crashes_is_throttled() {
        let mut world = World::new(policy(2));
        world.settle();
        let start = (world.spawned, world.now);
        while world.now < start.1 + 10_000 * MS {
            // Each dies the moment it is ready.
            let mut random = fastrand::Rng::with_seed(1);
            if let Some(pid) = world.pick(&mut random, Life::Starting) {
                world.become_ready(pid);
            } else if let Some(pid) = world.pick(&mut random, Life::Ready) {
                world.die(pid, Wish::Replace);
            } else {
                world.now = world.supervisor.next_deadline().unwrap();
                world.feed(Event::Tick);
            }
        }
        let in_ten_seconds = world.spawned - start.0;
        assert!((80..=90).contains(&in_ten_seconds), "8 a second and 8 at once, got {in_ten_seconds}");
    }

    #[test]
    fn failing_starts_back_off_and_one_alone_tries() {
        let mut world = World::new(policy(4));
        let mut spawned_at = Vec::new();
        while spawned_at.len() < 12 {
            let before = world.spawned;
            let starting: Vec<i32> = world.processes.keys().copied().collect();
            if starting.is_empty() {
                world.now = world.supervisor.next_deadline().unwrap();
                world.feed(Event::Tick);
                assert_eq!(world.spawned, before + 1, "one alone tries");
                spawned_at.push(world.now);
            }
            for pid in starting {
                world.die(Pid::from_raw(pid), Wish::Replace);
            }
        }
        let gaps: Vec<u128> = spawned_at.windows(2).map(|pair| (pair[1] - pair[0]).as_millis()).collect();
        assert_eq!(gaps, [200, 400, 800, 1600, 3200, 6400, 12_800, 25_600, 30_000, 30_000, 30_000]);
        world.settle();
        assert_eq!(world.ready(), 4);
    }

    #[test]
    fn a_process_that_overruns_its_start_is_killed_and_counts_as_failed() {
        let mut world = World::new(policy(1));
        world.now = 1000 * MS;
        world.feed(Event::Tick);
        let (&pid, &life) = world.processes.iter().next().unwrap();
        assert_eq!(life, Life::Killed);
        world.die(Pid::from_raw(pid), Wish::Replace);
        assert!(
            matches!(world.notes[..], [Note::StartTimeout { .. }, Note::Failing { failures: 1, .. }]),
            "{:?}",
            world.notes
        );
    }

    #[test]
    fn a_reload_replaces_one_by_one_and_never_serves_with_fewer() {
        let mut world = World::new(policy(3));
        world.settle();
        world.feed(Event::Command(Command::Reload));
        let mut random = fastrand::Rng::with_seed(1);
        while let Some(pid) = world.pick(&mut random, Life::Starting) {
            assert!(world.ready() >= 3);
            assert_eq!(world.processes.values().filter(|&&life| life == Life::Starting).count(), 1);
            world.become_ready(pid);
        }
        assert!(world.notes.contains(&Note::ReloadDone { generation: 2 }));
        world.settle();
        for &pid in world.processes.keys() {
            assert_eq!(world.supervisor.place_of(Pid::from_raw(pid)).unwrap().1, 2);
        }
    }

    #[test]
    fn a_reload_whose_first_process_dies_keeps_the_old_ones() {
        let mut world = World::new(policy(3));
        world.settle();
        let old: Vec<i32> = world.processes.keys().copied().collect();
        world.feed(Event::Command(Command::Reload));
        let new = *world.processes.keys().next_back().unwrap();
        world.die(Pid::from_raw(new), Wish::Replace);
        assert!(world.notes.contains(&Note::ReloadFailed { generation: 2 }));
        world.settle();
        assert_eq!(world.processes.keys().copied().collect::<Vec<_>>(), old);
    }

    #[test]
    fn a_process_that_will_not_leave_is_asked_again_and_then_killed() {
        let mut world = World::new(policy(1));
        world.settle();
        world.feed(Event::Command(Command::Drain));
        let mut asked = 0;
        while world.processes.values().all(|&life| life == Life::Leaving) {
            world.now = world.supervisor.next_deadline().unwrap();
            asked += 1;
            world.feed(Event::Tick);
        }
        assert_eq!((asked, world.now), (5, 5000 * MS));
        world.settle();
        assert_eq!(world.exited, Some(true));
    }

    #[test]
    fn a_process_that_ends_well_before_it_was_seen_ready_has_failed_only_if_none_ever_was() {
        let mut world = World::new(policy(1));
        let pid = *world.processes.keys().next().unwrap();
        world.die(Pid::from_raw(pid), Wish::Renew);
        assert!(matches!(world.notes[..], [Note::Failing { .. }]), "{:?}", world.notes);
        world.settle();
        let pid = *world.processes.keys().next().unwrap();
        world.die(Pid::from_raw(pid), Wish::Renew);
        let pid = *world.processes.keys().next().expect("it is replaced at once");
        world.die(Pid::from_raw(pid), Wish::Renew);
        assert_eq!(world.processes.len(), 1, "and so is one that nobody saw ready");
        assert_eq!(world.notes.len(), 2, "{:?}", world.notes);
    }

    #[test]
    fn a_reload_whose_new_processes_retire_keeps_the_old_ones() {
        let mut world = World::new(policy(3));
        world.settle();
        let old: Vec<i32> = world.processes.keys().copied().collect();
        world.feed(Event::Command(Command::Reload));
        let new = *world.processes.keys().next_back().unwrap();
        world.die(Pid::from_raw(new), Wish::Retire);
        world.settle();
        assert_eq!(world.processes.keys().copied().collect::<Vec<_>>(), old);
        assert_eq!(world.supervisor.target, 3);
    }

    #[test]
    fn when_every_worker_retires_the_master_fails() {
        let mut world = World::new(policy(2));
        world.settle();
        for pid in world.processes.keys().copied().collect::<Vec<_>>() {
            world.die(Pid::from_raw(pid), Wish::Retire);
        }
        assert_eq!(world.exited, Some(false));
        assert_eq!(world.spawned, 2);
    }
}
