//! What the supervisor is told, and what it says: policy, events, commands, actions and notes.
//!
//! Values only: nothing here decides.

use std::time::Duration;

use nix::unistd::Pid;

/// What the operator chose.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Policy {
    /// How many workers there may be: between these, as demand goes.
    pub(crate) workers: (u32, u32),
    /// Requests that a worker is meant to serve at a time.
    pub(crate) per_worker: u32,
    /// How long a worker was not needed when it may leave.
    pub(crate) scale_down_after: Duration,
    /// How many workers are being replaced at a time, for whatever reason.
    pub(crate) max_unavailable: Budget,
    /// How many processes there can be at once, draining ones included.
    pub(crate) slots: u32,
    pub(crate) start_timeout: Duration,
    pub(crate) drain_timeout: Duration,
    pub(crate) respawn_rate: u32,
    /// How long processes may fail to start, while none ever became ready; zero is for ever.
    pub(crate) give_up_after: Duration,
}

/// A number of workers, or a part of them, which is one at least.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Budget {
    Number(u32),
    Percent(u32),
}

impl Budget {
    pub(super) fn of(self, workers: u32) -> u32 {
        match self {
            Self::Number(number) => number.max(1),
            Self::Percent(percent) => (workers.saturating_mul(percent) / 100).max(1),
        }
    }
}

/// What happened.
#[derive(Clone, Debug)]
pub(crate) enum Event {
    /// The clock: something may be due.
    Tick,
    /// The process asked for with [`Action::Spawn`] exists.
    Spawned { slot: u32, pid: Pid },
    /// It could not be made.
    SpawnFailed { slot: u32 },
    /// A process says that it is serving.
    Ready { pid: Pid },
    /// A process has served its time, and goes on until another has taken its place.
    Recycle { pid: Pid },
    /// The event loop of a process hangs: it serves no more, though it lives.
    Hung { pid: Pid },
    /// The answer to [`Action::Sample`].
    Demand(Demand),
    /// A connection waits, and there was nobody to accept it: see [`Supervisor::awaits_arrival`].
    ///
    /// [`Supervisor::awaits_arrival`]: super::Supervisor::awaits_arrival
    Arrival,
    /// A child was reaped.
    Exited { pid: Pid, after_exit: AfterExit },
    /// The answer to [`Action::Close`], and from then on again and again until none does: whether connections wait that are to be
    /// accepted.
    Queue { waits: bool },
    /// The operator wants something.
    Command(Command),
    /// The operator has chosen anew. How many processes there can be at once stays as it was.
    Policy(Policy),
}

/// How much there is to do, at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Demand {
    /// The slots of processes that serve something.
    pub(crate) busy: Vec<u32>,
    /// Requests being served in all of them.
    pub(crate) in_flight: u32,
    /// Connections that nobody has accepted yet.
    pub(crate) waiting: u32,
    /// Connections that workers hold, in use or not.
    pub(crate) connections: u32,
}

/// What the way in which a process ended asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum AfterExit {
    /// It crashed: replace it.
    Replace,
    /// It exited with 0, having done its share of work: replace it. That is no failure, not even of a process
    /// that was never seen to be ready, if others of its kind were.
    Restart,
    /// It exited with 125: do not replace it.
    StayDown,
}

/// What an operator can ask for, by a signal or otherwise.
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
    /// So many workers, neither more nor less.
    Scale(u32),
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
            Self::Scale(_) => "change the number of workers",
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
    /// Find out how much there is to do, and report [`Event::Demand`].
    Sample,
    /// It hangs: have it tell where, and end it.
    Abort { pid: Pid },
    /// See whether the program's new build can take over, and let it.
    Upgrade,
    /// Everything is being stopped: no further connection is to be accepted but those that are queued; not even these if
    /// `at_once`. Comes before the processes are asked to leave. The answer is [`Event::Queue`].
    Close { at_once: bool },
    /// Tell the operator.
    Notice(Notice),
    /// The last process is gone: end the master.
    Exit { success: bool },
}

/// What an operator should know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Notice {
    /// As many processes are ready as there should be, for the first time.
    FullStrength,
    /// So many processes in a row died before they were ready; the next try comes after `delay`.
    Failing {
        failures: u32,
        delay: Duration,
    },
    /// None ever became ready, for so long: everything is being stopped.
    GivenUp {
        after: Duration,
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
    /// Demand changed it.
    Scaled {
        from: u32,
        to: u32,
        in_flight: u32,
        waiting: u32,
    },
    /// There is more to do than the most workers allowed can do; said once a minute at most.
    Saturated {
        workers: u32,
        in_flight: u32,
        waiting: u32,
    },
    /// Begins, and takes the place of a reload that was still under way: of that one nothing more is said.
    ReloadStarted {
        generation: u64,
    },
    ReloadDone {
        generation: u64,
    },
    /// A new worker did not get ready, and the old ones stay. No `pid`: it could not even be made.
    ReloadFailed {
        generation: u64,
        slot: u32,
        pid: Option<Pid>,
    },
}
