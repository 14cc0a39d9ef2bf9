//! Defines the supervisor's input and output: policy, events, commands, actions and notices.
//!
//! Values only: nothing here decides.

use std::time::Duration;

use nix::unistd::Pid;

/// The operator's settings.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Policy {
    /// Minimum and maximum number of workers. Demand changes the number within these limits.
    pub(crate) workers: (u32, u32),
    /// Number of requests that a worker is meant to serve at a time.
    pub(crate) per_worker: u32,
    /// How long a worker must not have been needed before it may be removed.
    pub(crate) scale_down_after: Duration,
    /// Maximum number of workers that are being replaced at a time, for any reason.
    pub(crate) max_unavailable: Budget,
    /// Maximum number of processes at a time, including draining ones.
    pub(crate) slots: u32,
    pub(crate) start_timeout: Duration,
    pub(crate) drain_timeout: Duration,
    /// How long the first new process of a reload must stay ready before an old process is replaced.
    pub(crate) settle: Duration,
    pub(crate) respawn_rate: u32,
    /// How long processes may fail to start while none ever became ready; zero for no limit.
    pub(crate) give_up_after: Duration,
}

/// A number of workers, or a percentage of them. At least one.
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

#[derive(Clone, Debug)]
pub(crate) enum SupervisorEvent {
    /// Time has passed: a deadline may have been reached.
    Tick,
    /// The process for [`Action::Spawn`] exists.
    Spawned { slot: u32, pid: Pid },
    /// The process for [`Action::Spawn`] could not be created.
    SpawnFailed { slot: u32 },
    /// A process has reported that it serves.
    Ready { pid: Pid },
    /// A process has reached the end of its lifetime. It continues until a new process replaces it.
    Recycle { pid: Pid },
    /// The event loop of a process hangs: the process is alive, but does not serve.
    Hung { pid: Pid },
    /// The reply to [`Action::Sample`].
    Demand(Demand),
    /// A connection is waiting, and there is no worker to accept it: see [`Supervisor::awaits_arrival`].
    ///
    /// [`Supervisor::awaits_arrival`]: super::Supervisor::awaits_arrival
    Arrival,
    /// A child was reaped.
    Exited { pid: Pid, after_exit: AfterExit },
    /// The reply to [`Action::Close`], repeated until no connection is waiting. `waits` is true if queued connections
    /// are waiting to be accepted.
    Queue { waits: bool },
    /// The operator has given a command.
    Command(Command),
    /// The operator has changed the settings. The maximum number of processes stays as it was.
    Policy(Policy),
}

/// The demand at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Demand {
    /// The slots of processes that serve a request or hold an event stream.
    pub(crate) busy: Vec<u32>,
    /// Number of requests in flight in all processes.
    pub(crate) in_flight: u32,
    /// Number of connections that are waiting to be accepted.
    pub(crate) waiting: u32,
    /// Number of connections that workers hold, in use or not.
    pub(crate) connections: u32,
}

/// The reaction to the exit status or signal of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum AfterExit {
    /// The process crashed: replace it.
    Replace,
    /// The process exited with 0 after it had done its share of work: replace it. This is not a failure, even if the
    /// process has never been seen to be ready, as long as other processes have been seen to be ready.
    Restart,
    /// Like [`AfterExit::Restart`], and the process is known to have served requests.
    Done,
    /// The process exited with 125: do not replace it.
    StayDown,
}

/// A command from an operator, by signal or over the control socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Command {
    /// Let all processes finish their work, then stop.
    Drain,
    /// Stop now.
    Halt,
    /// Replace all processes, one by one.
    Reload,
    /// Add one worker.
    Add,
    /// Remove one worker.
    Remove,
    /// Run exactly this many workers.
    Scale(u32),
    /// Replace this process with another build of the program.
    Upgrade,
}

impl Command {
    /// Returns a description for the log.
    pub(crate) fn verb(self) -> &'static str {
        match self {
            Self::Drain => "drain and stop",
            Self::Halt => "stop immediately",
            Self::Reload => "reload",
            Self::Add => "add a worker",
            Self::Remove => "remove a worker",
            Self::Scale(_) => "change the number of workers",
            Self::Upgrade => "upgrade",
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// Start a process for this slot, and report [`SupervisorEvent::Spawned`] or [`SupervisorEvent::SpawnFailed`].
    Spawn { slot: u32, generation: u64 },
    /// Ask the process to finish and exit.
    Terminate { pid: Pid },
    /// The process has not exited yet: ask it again if it may have missed the signal.
    Remind { pid: Pid },
    /// Kill the process.
    Kill { pid: Pid },
    /// Measure the demand, and report [`SupervisorEvent::Demand`].
    Sample,
    /// The process hangs: make it log where it hangs, and kill it.
    Abort { pid: Pid },
    /// Check whether the program's new build can take over. If it can, let it take over.
    Upgrade,
    /// The server stops. No further connection may be accepted, except those that are already queued; if `at_once`, not
    /// even these. This action precedes the requests to exit. The reply is [`SupervisorEvent::Queue`].
    Close { at_once: bool },
    /// Log a notice for the operator.
    Notice(Notice),
    /// The last process has ended: end the master.
    Exit { success: bool },
}

/// A notice for the operator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Notice {
    /// For the first time, the target number of processes is ready.
    FullStrength,
    /// This many consecutive processes died before they were ready. The next attempt follows after `delay`.
    Failing {
        failures: u32,
        delay: Duration,
    },
    /// No process became ready within this time: the server stops.
    GivenUp {
        after: Duration,
    },
    /// Too many processes die, so the replacement of this one is delayed.
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
    /// The target number of workers has changed to this value.
    Target(u32),
    /// The target number of workers is at a limit, and stays at this value.
    TargetLimit(u32),
    /// Demand has changed the target number of workers.
    Scaled {
        from: u32,
        to: u32,
        in_flight: u32,
        waiting: u32,
    },
    /// Demand exceeds what the maximum number of workers can serve. Sent at most once a minute.
    Saturated {
        workers: u32,
        in_flight: u32,
        waiting: u32,
    },
    /// A reload has begun. If another reload was still under way, this one replaces it, and no further notice is sent
    /// for the other.
    ReloadStarted {
        generation: u64,
    },
    ReloadDone {
        generation: u64,
    },
    /// A new worker failed, and the old workers keep running. `pid` is `None` if the worker could not be created.
    ReloadFailed {
        generation: u64,
        slot: u32,
        pid: Option<Pid>,
        failure: RollFailure,
    },
}

/// Why a new worker made a reload fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RollFailure {
    /// It did not become ready.
    NeverReady,
    /// It died soon after it was ready.
    DiedSoon,
}
