//! Handles workers that hang and requests that kill workers: collects the evidence for [`hangs`](super::hangs) and
//! [`quarantine`](super::quarantine), and carries out their decisions.

use forkyard_shm::State;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::death_log::Postmortem;
use super::hangs::{Hangs, Work};
use super::oom::OomKills;
use super::quarantine::{Death, Listed, Quarantine, Verdict};
use super::supervisor::{SupervisorEvent, Uptime};
use super::symbolizer::Symbolizer;
use super::{EndOfLife, Pool};
use crate::config::failures::{Failures, QuarantineBy};
use crate::config::in_ms;
use crate::diagnostics::request_key::RequestKey;
use crate::master::SignalInbox;
use crate::sys;
use crate::upgrade::saved_state::SavedRefusal;

pub(crate) struct Faults {
    hangs: Hangs,
    quarantine: Quarantine,
    by: QuarantineBy,
    /// The list of refused requests that workers read.
    table: forkyard_shm::Quarantine,
    pub(crate) symbolizer: Symbolizer,
    oom_kills: OomKills,
}

impl Faults {
    pub(crate) fn new(failures: &Failures, table: forkyard_shm::Quarantine) -> Self {
        table.set([]);
        Self {
            hangs: Hangs::new(failures.hang_timeout),
            quarantine: Quarantine::new(failures.quarantine),
            by: failures.quarantine.by,
            table,
            symbolizer: Symbolizer::default(),
            oom_kills: OomKills::new(),
        }
    }

    /// Returns the saved form, for the next master during an upgrade.
    pub(crate) fn save(&self, now: Uptime) -> Vec<SavedRefusal> {
        self.quarantine.save(now)
    }

    /// Restores the requests that a former master has saved.
    pub(crate) fn restore(&mut self, saved: Vec<SavedRefusal>, now: Uptime) {
        self.quarantine.restore(saved, now);
        self.publish(now);
    }

    /// Records that a former master sent SIGABRT to this worker. The worker may be unable to react to the signal.
    pub(crate) fn told_to_die(&mut self, pid: Pid, now: Uptime) {
        self.hangs.told_to_die(pid, now);
    }

    /// Returns the cause for the log, if the kernel killed a worker that died of SIGKILL because memory ran out.
    pub(in crate::master) fn ran_out_of_memory(&mut self, now: Uptime) -> Option<&'static str> {
        self.oom_kills.explain(now)
    }

    /// Moves the list of refused requests to another table.
    pub(in crate::master) fn move_to(&mut self, table: forkyard_shm::Quarantine, now: Uptime) {
        self.table = table;
        self.publish(now);
    }

    /// Changes the limits. Requests that are already refused keep their time.
    pub(crate) fn set_limits(&mut self, failures: &Failures) {
        self.hangs.set_timeout(failures.hang_timeout);
        self.quarantine.set_limits(failures.quarantine);
        self.by = failures.quarantine.by;
    }

    pub(crate) fn log_settings(&self) {
        log::debug!(
            part = "faults", quarantine:? = self.quarantine.limits(), hang_timeout:? = self.hangs.timeout(), by:? = self.by;
            "settings"
        );
    }

    pub(crate) fn next_deadline(&self) -> Option<Uptime> {
        [self.hangs.next_deadline(), self.quarantine.next_deadline()].into_iter().flatten().min()
    }

    /// Publishes the list of refused requests to the workers, and then logs the verdicts: a line of the log is true when it
    /// is written.
    fn announce(&self, verdicts: &[Verdict], now: Uptime) {
        if !verdicts.is_empty() {
            self.publish(now);
        }
        for verdict in verdicts {
            match verdict {
                Verdict::Refused { key, time, times } => log::error!(
                    request = key, lasts:% = format_args!("{}s", time.as_secs()), times;
                    "quarantined a request: processes die of it or hang in it (--quarantine)"
                ),
                Verdict::Released { key } => log::warn!(request = key; "quarantine ended"),
            }
        }
    }

    fn publish(&self, now: Uptime) {
        let list = self.quarantine.list(now);
        self.table.set(list.iter().map(|listed| (listed.key.as_str(), listed.left)));
    }
}

impl Pool {
    /// Detects workers that hang, kills those that should have died, and releases requests whose quarantine is over.
    pub(in crate::master) fn check_hangs_and_quarantine(&mut self) {
        let now = self.now();
        let verdicts = self.faults.quarantine.tick(now);
        self.faults.announce(&verdicts, now);
        for pid in self.faults.hangs.overdue(now) {
            // SIGKILL during a core dump would truncate the dump.
            if self.children.contains_key(&pid) && sys::process_status(pid, "CoreDumping:").as_deref() != Some("1") {
                let _ = kill(pid, Signal::SIGKILL); // the child has not been reaped yet, so the pid is still its own
            }
        }
        if !self.faults.hangs.is_due(now) {
            return;
        }
        let rows: Vec<(Pid, Work)> =
            self.children.iter().filter_map(|(&pid, child)| Some((pid, self.work_of(pid, child.slot)?))).collect();
        for pid in self.faults.hangs.look(rows, now) {
            self.observed.push_back(SupervisorEvent::Hung { pid });
        }
    }

    fn work_of(&self, pid: Pid, slot: u32) -> Option<Work> {
        let row = self.scoreboard.read(slot).filter(|row| i32::try_from(row.pid) == Ok(pid.as_raw()))?;
        let is_serving = matches!(row.state, State::Ready | State::Draining);
        // A worker that a debugger has stopped does not hang.
        let is_stopped = || sys::process_status(pid, "State:").is_some_and(|state| state.starts_with(['T', 't']));
        let since_ms = row.busy_since_ms.filter(|_| is_serving && !is_stopped());
        Some(Work { since_ms, pulse: row.pulse })
    }

    /// Sends SIGABRT to a worker that hangs, so that it logs where it hangs and terminates.
    pub(in crate::master) fn abort(&mut self, pid: Pid) {
        let now = self.now();
        if self.channel().is_some() {
            self.abort_app(pid);
            return self.faults.hangs.told_to_die(pid, now);
        }
        let Some(child) = self.children.get_mut(&pid) else { return };
        child.hung = true;
        let row = self.scoreboard.read(child.slot);
        let serving = row.as_ref().map(|row| row.serving.as_slice()).unwrap_or_default();
        let serving: Vec<String> = serving.iter().map(|one| format!("{} {}", one.what, in_ms(one.since))).collect();
        log::error!(
            slot = child.slot, pid = pid.as_raw(), in_flight = serving.join(", ");
            "worker hangs: its event loop has not yielded for longer than --hang-timeout; it is killed and replaced"
        );
        // The event loop's thread hangs, so the signal is sent to that thread if the row contains its number.
        let thread = row.and_then(|row| i32::try_from(row.loop_thread).ok()).filter(|thread| *thread > 0);
        let is_signaled = thread.is_some_and(|thread| sys::signal_thread(pid, thread, libc::SIGABRT).is_ok());
        if !is_signaled && let Err(errno) = kill(pid, Signal::SIGABRT) {
            log::error!(slot = child.slot, pid = pid.as_raw(); "cannot send SIGABRT to a worker: {errno}");
        }
        self.faults.hangs.told_to_die(pid, now);
    }

    /// Handles a worker's report that a blocking function hangs. For the quarantine, the report counts as one death
    /// caused by `request`.
    pub(in crate::master) fn hung_thread(&mut self, pid: Pid, request: &str) {
        if let Some(child) = self.children.get_mut(&pid).filter(|child| child.is_worker() && !child.asked_to_leave)
            && !std::mem::replace(&mut child.has_hung_thread, true)
        {
            self.accuse(request);
        }
        self.wear_out(pid, EndOfLife { request: Some(request), ..EndOfLife::because("hung-thread") });
    }

    /// Counts a death, or a hang, of an app process against the request that it was serving.
    pub(in crate::master) fn accuse(&mut self, request: &str) {
        let culprit = Some(RequestKey::of(request, self.faults.by));
        let now = self.now();
        let verdicts = self.faults.quarantine.died(Death { culprit, by_itself: true, ..Death::default() }, now);
        self.faults.announce(&verdicts, now);
    }

    /// Evaluates the death of a process.
    pub(in crate::master) fn take_evidence(
        &mut self,
        slot: u32,
        pid: Pid,
        postmortem: Postmortem,
        signals: &SignalInbox,
    ) {
        let now = self.now();
        self.faults.hangs.ended(pid);
        if !postmortem.trace.is_empty() {
            self.faults.symbolizer.log(slot, pid, postmortem.trace, signals);
        }
        if !postmortem.is_crash {
            return;
        }
        let by = self.faults.by;
        let others = self.children.iter().filter(|(_, child)| child.is_worker() && !child.hung);
        let rows = others.filter_map(|(&pid, child)| {
            self.scoreboard.read(child.slot).filter(|row| i32::try_from(row.pid) == Ok(pid.as_raw()))
        });
        let rows: Vec<_> = rows.filter(|row| row.state == State::Ready).collect();
        let elsewhere = rows.iter().flat_map(|row| &row.serving).map(|one| RequestKey::of(&one.what, by)).collect();
        let in_flight = postmortem.in_flight.iter().map(|what| RequestKey::of(what, by)).collect();
        let culprit = postmortem.culprit.as_deref().map(|what| RequestKey::of(what, by));
        let running = postmortem.running.map(|running| running.iter().map(|what| RequestKey::of(what, by)).collect());
        // A scoreboard row lists a limited number of requests. If a worker serves more, the requests that its row does
        // not list are unknown.
        let all_known = rows.iter().all(|row| usize::try_from(row.in_flight) == Ok(row.serving.len()));
        let live_workers = if all_known { rows.len() } else { 0 };
        let (complete, by_itself) = (postmortem.complete, postmortem.by_itself);
        let death = Death { in_flight, complete, culprit, running, by_itself, live_workers, elsewhere };
        let verdicts = self.faults.quarantine.died(death, now);
        self.faults.announce(&verdicts, now);
    }

    /// Returns the requests that are refused now.
    pub(in crate::master) fn quarantined(&self) -> Vec<Listed> {
        self.faults.quarantine.list(self.now())
    }

    /// Releases one request, given its [`Listed::key`]. Returns false if it is not refused.
    pub(in crate::master) fn release(&mut self, key: &str) -> bool {
        let released = self.faults.quarantine.release(key);
        self.log_release(usize::from(released), key);
        released
    }

    /// Releases all requests. Returns their number.
    pub(in crate::master) fn release_all(&mut self) -> usize {
        let released = self.faults.quarantine.release_all();
        self.log_release(released, "*");
        released
    }

    fn log_release(&self, count: usize, key: &str) {
        if count > 0 {
            self.faults.publish(self.now());
            log::warn!(request = key, count; "quarantine ended by command");
        }
    }
}
