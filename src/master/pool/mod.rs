//! Manages the pool (the processes that serve requests) and makes all decisions about it.
//!
//! The master passes events to the pool's [`supervisor`] and carries out the resulting actions. The pool carries out
//! those that concern its own processes; the master carries out the others (notices for operators, upgrades). What the
//! pool observes (a process is ready, hangs, is too old, has exited) is kept as events, which the master feeds to the
//! supervisor.
//!
//! Modules that decide, without a system call:
//! - [`supervisor`]: which processes should run.
//! - [`hangs`] and [`quarantine`]: which workers hang, and which requests kill their workers. [`faults`] collects the
//!   evidence for both, and [`oom`] determines whether the kernel killed a worker because memory ran out.
//! - [`demand`] and [`recycling`]: how much work there is, and which workers have reached the end of their lifetime.
//!
//! Modules that act:
//! - [`spawn`] starts workers and programs, [`child`] contains the state of one of them, and [`death_log`] writes the log line of their death.
//! - [`apps`] supervises app processes, the programs behind gateways.
//! - [`programs`] observes external programs through [`procfs`](crate::master::procfs), [`ready_descriptor`] reads whether
//!   they have declared themselves ready, and [`idle_stop`] asks them to exit while they serve no request.
//! - [`close_listeners`] closes the listening sockets when the server stops.
//! - [`symbolizer`] runs the process that names the functions in a crash.

pub(in crate::master) mod apps;
pub(in crate::master) mod cgi_apps;
pub(in crate::master) mod child;
mod close_listeners;
pub(in crate::master) mod death_log;
mod demand;
pub(crate) mod faults;
mod hangs;
pub(in crate::master) mod http_apps;
mod idle_stop;
mod oom;
pub(in crate::master) mod programs;
mod quarantine;
mod ready_check;
pub(in crate::master) mod ready_descriptor;
mod recycling;
pub(in crate::master) mod spawn;
pub(in crate::master) mod supervisor;
pub(crate) mod symbolizer;

use std::collections::{HashMap, VecDeque};
use std::io;
use std::time::{Duration, Instant};

use forkyard_shm::Scoreboard;
use log::kv::Value;
use nix::unistd::Pid;

use self::apps::{AppFault, AppFaultKind, RecentCrashes};
use self::child::{Child, EndBy};
use self::close_listeners::Closing;
use self::death_log::DeathRecord;
use self::faults::Faults;
use self::programs::Programs;
use self::recycling::Recycling;
use self::spawn::{Launch, Spawner};
use self::supervisor::{Action, AfterExit, Budget, Policy, Supervisor, SupervisorEvent};
use super::SignalInbox;
use super::output::{self, OrphanedOutputs};
use super::status::line_of;
use crate::app::hooks::{WorkerExit, WorkerId};
use crate::config::programs::ProgramConfig;
use crate::config::{Config, Share, in_ms};
use crate::inherited_by_workers::Report;
use crate::net::queue_depth::QueueDepth;
use crate::sys::{self, Ending};

/// The exit status with which a worker requests not to be replaced.
pub(in crate::master) const STAY_DOWN: i32 = 125;

pub(in crate::master) struct Pool {
    pub(in crate::master) supervisor: Supervisor,
    /// What one of the processes is called in the log.
    pub(in crate::master) noun: &'static str,
    /// What the pool has observed and the supervisor has not been told yet.
    observed: VecDeque<SupervisorEvent>,
    pub(in crate::master) spawner: Spawner,
    pub(in crate::master) children: HashMap<Pid, Child>,
    pub(in crate::master) scoreboard: Scoreboard,
    pub(in crate::master) programs: Programs,
    pub(in crate::master) recycling: Recycling,
    pub(in crate::master) faults: Faults,
    pub(in crate::master) queue_depth: QueueDepth,
    pub(in crate::master) closing: Closing,
    /// Outputs of dead processes whose children may still write.
    pub(in crate::master) orphaned_outputs: OrphanedOutputs,
    /// What gateways have reported about app processes. Only a pool of gateways has any.
    pub(in crate::master) app_faults: Vec<AppFault>,
    /// Requests that have killed app processes. Only a pool of app processes has any.
    pub(in crate::master) culprits: Vec<String>,
    recent_crashes: RecentCrashes,
    /// The latest death record. Clients that wait for a reload receive it as the reason if the reload fails.
    pub(in crate::master) death_record: DeathRecord,
    /// When the master started.
    begun: Instant,
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

/// Returns the part of the configuration that the supervisor needs.
pub(in crate::master) fn policy(config: &Config) -> Policy {
    Policy {
        workers: (config.workers.min, config.workers.max),
        // A program that accepts connections itself is assumed to serve one request at a time.
        per_worker: config.gateway.as_ref().map_or(config.threads, |gateway| gateway.concurrency).max(1),
        scale_down_after: config.scaling.scale_down_after,
        max_unavailable: match config.scaling.max_unavailable {
            Share::Number(number) => Budget::Number(number),
            Share::Percent(percent) => Budget::Percent(percent),
        },
        slots: config.slots(),
        start_timeout: config.start_timeout,
        drain_timeout: config.drain_timeout,
        settle: config.program.as_ref().map_or(Duration::ZERO, ProgramConfig::settle),
        respawn_rate: config.respawn_rate,
        give_up_after: config.scaling.give_up_after,
    }
}

impl Pool {
    /// Creates a pool without processes.
    pub(in crate::master) fn new(spawner: Spawner, noun: &'static str, begun: Instant) -> Self {
        let (config, segment) = (&spawner.config, &spawner.segment);
        Self {
            supervisor: Supervisor::new(policy(config)),
            noun,
            observed: VecDeque::new(),
            scoreboard: segment.scoreboard(),
            recycling: Recycling::new(&config.scaling),
            faults: Faults::new(&config.failures, segment.quarantine()),
            spawner,
            children: HashMap::new(),
            programs: Programs::default(),
            queue_depth: QueueDepth::new(),
            closing: Closing::default(),
            orphaned_outputs: OrphanedOutputs::default(),
            app_faults: Vec::new(),
            culprits: Vec::new(),
            recent_crashes: RecentCrashes::default(),
            death_record: DeathRecord::default(),
            begun,
        }
    }

    pub(in crate::master) fn now(&self) -> Duration {
        self.begun.elapsed()
    }

    /// Whether the processes are programs that accept clients' connections themselves.
    pub(in crate::master) fn runs_programs(&self) -> bool {
        matches!(self.spawner.launch, Launch::Program(_))
    }

    /// Returns the next event that the pool has observed, for the supervisor.
    pub(in crate::master) fn next_observed(&mut self) -> Option<SupervisorEvent> {
        self.observed.pop_front()
    }

    /// Carries out an action that concerns only the pool's processes. Returns the supervisor's next event, if the action
    /// results in one.
    pub(in crate::master) fn act(&mut self, action: Action, signals: &SignalInbox) -> Option<SupervisorEvent> {
        match action {
            Action::Spawn { slot, generation } => return Some(self.spawn(slot, generation, signals)),
            Action::Terminate { pid } => self.terminate(pid),
            Action::Remind { pid } => self.remind_or_end(pid),
            Action::Kill { pid } => self.signal(pid, EndBy::Kill),
            Action::Abort { pid } => self.abort(pid),
            Action::Close { at_once } => {
                self.close_sockets(at_once);
                return Some(SupervisorEvent::Queue { waits: !self.closing.is_dry() });
            }
            Action::Sample => {
                if let Some(channel) = self.channel() {
                    return Some(SupervisorEvent::Demand(self.demand_on_apps(channel)));
                }
                let Self { children, supervisor, scoreboard, queue_depth, spawner, .. } = self;
                let demand = demand::sample(children, supervisor, scoreboard, queue_depth, &spawner.listeners);
                return Some(SupervisorEvent::Demand(demand));
            }
            Action::Exit { .. } => self.close_sockets(true),
            Action::Notice(_) | Action::Upgrade => {}
        }
        None
    }

    fn spawn(&mut self, slot: u32, generation: u64, signals: &SignalInbox) -> SupervisorEvent {
        let mended = self.mend_socket().map_err(io::Error::other);
        match mended.and_then(|()| self.spawner.spawn(slot, generation, signals)) {
            Ok((pid, child)) => {
                log::debug!(slot, pid = pid.as_raw(), "gen" = generation; "{} spawned", self.noun);
                self.children.insert(pid, child);
                self.recycling.spawned(pid, Duration::ZERO, self.now());
                SupervisorEvent::Spawned { slot, pid }
            }
            Err(error) => {
                let event = format!("cannot start {}: {}", with_article(self.noun), sys::explain(&error));
                log::error!(slot, "gen" = generation; "{event}");
                let line = line_of(&event, &[("slot", Value::from(slot)), ("gen", generation.into())]);
                self.death_record = DeathRecord { line, ..DeathRecord::default() };
                SupervisorEvent::SpawnFailed { slot }
            }
        }
    }

    /// Reads the reports and the output of all processes.
    pub(in crate::master) fn read_children(&mut self) {
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
                Report::Ready => self.observed.push_back(SupervisorEvent::Ready { pid }),
                Report::Recycle(reason) => self.wear_out(pid, EndOfLife::because(&reason)),
                Report::HungThread(request) => self.hung_thread(pid, &request),
                Report::AppHung { slot, pid, connection, request } => {
                    let kind = AppFaultKind::Hung { connection };
                    self.app_faults.push(AppFault { kind, slot, pid: Pid::from_raw(pid), request });
                }
                Report::GatewayStuck { slot, pid } => self.kill_stuck(slot, Pid::from_raw(pid.cast_signed())),
                Report::ChildrenDied { slot, pid, request } => {
                    let kind = AppFaultKind::ChildrenDied;
                    self.app_faults.push(AppFault { kind, slot, pid: Pid::from_raw(pid), request });
                }
                Report::AppDied { slot, pid, request } => {
                    self.app_faults.push(AppFault { kind: AppFaultKind::Died, slot, pid: Pid::from_raw(pid), request });
                }
                Report::LastWords(_) | Report::Trace(_) | Report::SentBy(_) => {}
            }
        }
    }

    /// Finds workers that have reached the end of their lifetime.
    pub(in crate::master) fn recycle(&mut self) {
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
        let (slot, lived, noun) = (child.slot, in_ms(child.since.elapsed()), self.noun);
        let memory = memory.map(|bytes| format!("{}K", bytes >> 10));
        log::info!(
            slot, pid = pid.as_raw(), lived, reason, memory, request;
            "{noun} will be replaced"
        );
        self.observed.push_back(SupervisorEvent::Recycle { pid });
    }

    /// Handles the exit of one of the pool's processes, which has been reaped. The new death record is in
    /// `death_record`.
    pub(in crate::master) fn ended(&mut self, pid: Pid, ending: Ending, signals: &SignalInbox) {
        self.read_child(pid, 0);
        let Some(mut child) = self.children.remove(&pid) else { return };
        let now = self.now();
        let mut has_served = false;
        if let Some(channel) = self.channel() {
            has_served = child.has_served(channel);
            child.note_requests(channel);
            channel.close(child.slot);
            self.app_ended(pid, &mut child, ending);
        }
        if let Some(output) = child.output.take() {
            child.last_lines = self.orphaned_outputs.adopt(output, pid, now);
        }
        let (program, stop_signal) = (child.program(), child.stop_signal);
        let (slot, generation, since, asked) = (child.slot, child.generation, child.since, child.asked_to_leave);
        self.recycling.died(pid);
        let is_starting = death_log::is_starting(pid, &child, &self.scoreboard);
        self.scoreboard.mark_dead(slot, pid.as_raw().cast_unsigned());
        let unasked = child.is_worker() && !child.asked_to_leave && !child.hung;
        let was_killed = unasked && ending == Ending::Signaled(libc::SIGKILL);
        let no_memory = if was_killed { self.faults.ran_out_of_memory(now) } else { None };
        if !is_starting && program.is_none() && matches!(ending, Ending::Signaled(_)) {
            // Its row shows that it was ready. It may have been killed before its report.
            self.observed.push_back(SupervisorEvent::Ready { pid });
        }
        let limits = is_starting.then_some(self.spawner.config.privileges.limits.as_slice());
        let mut postmortem = death_log::publish(pid, ending, child, no_memory, &self.scoreboard, limits, self.noun);
        self.death_record = std::mem::take(&mut postmortem.death_record);
        if let Launch::Worker(_, hooks) = &self.spawner.launch {
            let worker = WorkerId { slot, generation };
            let (pid, served, lived) = (pid.as_raw().cast_unsigned(), postmortem.served, since.elapsed());
            let exit = WorkerExit { worker, pid, status: ending.status(), asked, served, lived };
            hooks.of_master.on_worker_exit(exit);
        }
        self.take_evidence(slot, pid, postmortem, signals);
        match program {
            Some(program) => self.program_ended(program, stop_signal, ending),
            None if !asked => self.look_whether_sockets_listen(),
            None => {}
        }
        self.check_closing(); // the process may have exited because the queue is empty
        self.observed
            .push_back(SupervisorEvent::Exited { pid, after_exit: after_exit(ending, !is_starting, has_served) });
    }
}

/// Returns the plural of a noun.
pub(in crate::master) fn plural(noun: &str) -> String {
    format!("{noun}{}", if noun.ends_with('s') { "es" } else { "s" })
}

/// Returns a noun with its indefinite article.
pub(in crate::master) fn with_article(noun: &str) -> String {
    let article = if noun.starts_with(['a', 'e', 'i', 'o', 'u']) { "an" } else { "a" };
    format!("{article} {noun}")
}

/// Returns the reaction to the end of a process. A program may be a wrapper: `env`, `timeout` and `docker run` return
/// 125 when they themselves fail. Status 125 therefore takes effect only for a process that was ready. `has_served` is
/// true if the process is known to have served requests.
pub(in crate::master) fn after_exit(ending: Ending, was_ready: bool, has_served: bool) -> AfterExit {
    match ending {
        Ending::Exited(0) if has_served => AfterExit::Done,
        Ending::Exited(0) => AfterExit::Restart,
        Ending::Exited(STAY_DOWN) if was_ready => AfterExit::StayDown,
        Ending::Exited(_) | Ending::Signaled(_) => AfterExit::Replace,
    }
}

#[cfg(test)]
mod tests {
    use super::programs::hint;
    use super::*;

    #[test]
    fn status_125_is_a_failure_unless_the_process_was_ready() {
        assert_eq!(after_exit(Ending::Exited(125), false, false), AfterExit::Replace);
        assert_eq!(after_exit(Ending::Exited(125), true, false), AfterExit::StayDown);
        assert_eq!(after_exit(Ending::Exited(0), false, false), AfterExit::Restart);
        assert!([125, 126, 127].iter().all(|&status| hint(Ending::Exited(status)).contains(&status.to_string())));
    }
}
