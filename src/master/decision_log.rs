//! Logs the supervisor's decisions for the operator: one line for each notice.

use nix::unistd::Pid;

use super::Master;
use super::apps::Which;
use super::pool::death_log::DeathRecord;
use super::pool::plural;
use super::pool::supervisor::{Notice, RollFailure};
use crate::config::in_ms;

// These events are also reported to control clients.
pub(super) const START_TIMEOUT: &str = "killed: it was not ready in time (--start-timeout)";
pub(super) const DRAIN_TIMEOUT: &str = "killed: it did not finish in time (--drain-timeout)";
pub(super) const DIED_SOON: &str = "died too soon after it was ready (--settle)";
pub(super) const RELOAD_STARTED: &str = "reload started";
pub(super) const RELOAD_DONE: &str = "reload done";

impl Master {
    /// Reports a notice to systemd if it concerns systemd.
    fn notify_systemd(&mut self, notice: Notice) {
        match notice {
            Notice::FullStrength | Notice::ReloadDone { .. } => self.notify.ready("serving"),
            Notice::ReloadStarted { .. } => self.notify.reloading(),
            Notice::ReloadFailed { .. } => self.notify.ready("serving with the old workers: the last reload failed"),
            Notice::Failing { .. } => self.notify.status("workers die before they are ready: see the log"),
            Notice::Target(_)
            | Notice::TargetLimit(_)
            | Notice::Scaled { .. }
            | Notice::GivenUp { .. }
            | Notice::Saturated { .. }
            | Notice::Throttled { .. }
            | Notice::StartTimeout { .. }
            | Notice::DrainTimeout { .. } => {}
        }
    }

    /// Returns the hint in the latest death record. If `pid` is given, returns the hint only if the record describes
    /// that process.
    fn hint_of(&self, which: Which, pid: Option<Pid>) -> Option<&str> {
        let DeathRecord { hint, pid: of, .. } = &self.pool_of(which).death_record;
        Some(hint.as_str()).filter(|hint| !hint.is_empty() && (pid.is_none() || pid == *of))
    }

    pub(super) fn log(&mut self, which: Which, notice: Notice) {
        let noun = self.pool_of(which).noun;
        let pool = self.apps.is_some().then(|| plural(noun));
        if notice == Notice::FullStrength {
            let are_up = self.pools().all(|pool| pool.supervisor.is_up());
            if !are_up || std::mem::replace(&mut self.was_ready, true) {
                return; // the other pool is still starting, or has been the last one
            }
        }
        // systemd takes the reloads of app processes and of gateways for one.
        let is_half = match notice {
            Notice::ReloadDone { .. } => which == Which::Apps,
            Notice::ReloadStarted { .. } => which == Which::Front && self.apps.is_some(),
            _ => false,
        };
        if !is_half {
            self.notify_systemd(notice);
        }
        match notice {
            Notice::FullStrength => crate::startup::banner::ready(self.begun.elapsed()),
            Notice::Failing { failures, delay } => log::error!(
                failures, next_try = in_ms(delay), hint = self.hint_of(which, None);
                "{} die before they are ready (see the lines above)", plural(noun)
            ),
            Notice::GivenUp { after } => {
                self.gave_up = true;
                log::error!(
                    failing_for:% = format_args!("{}s", after.as_secs());
                    "no {noun} ever became ready: the server stops (see the lines above; --start-timeout if they need \
                     longer; --give-up-after 0 to retry indefinitely)"
                );
            }
            Notice::Throttled { slot, delay } => {
                log::warn!(
                    slot, delay = in_ms(delay);
                    "{} exit too often: a replacement is delayed (--respawn-rate)", plural(noun)
                );
            }
            Notice::StartTimeout { slot, pid } => {
                let cause =
                    self.pool_of(which).why_not_ready(pid).map(|cause| format!(": {cause}")).unwrap_or_default();
                log::warn!(slot, pid = pid.as_raw(); "{noun} {START_TIMEOUT}{cause}");
            }
            Notice::DrainTimeout { slot, pid } => log::warn!(slot, pid = pid.as_raw(); "{noun} {DRAIN_TIMEOUT}"),
            Notice::Target(workers) => log::info!(workers; "the number of workers was changed"),
            Notice::TargetLimit(workers) => {
                log::warn!(workers; "the number of workers was not changed: it is at its limit");
            }
            Notice::Scaled { from, to, in_flight, waiting } => {
                log::info!(workers = to, from, in_flight, waiting; "scaled");
            }
            Notice::Saturated { workers, in_flight, waiting } => log::warn!(
                workers, in_flight, waiting;
                "all workers are busy and connections are waiting (--workers sets the maximum)"
            ),
            Notice::ReloadStarted { generation } => log::info!("gen" = generation, pool; "{RELOAD_STARTED}"),
            Notice::ReloadDone { generation } => log::info!("gen" = generation, pool; "{RELOAD_DONE}"),
            Notice::ReloadFailed { generation, slot, pid, failure } => {
                self.log_failed_reload(which, (generation, slot, pid), failure);
            }
        }
    }

    fn log_failed_reload(&self, which: Which, (generation, slot, pid): (u64, u32, Option<Pid>), failure: RollFailure) {
        let (noun, record) = (self.pool_of(which).noun, &self.pool_of(which).death_record);
        let DeathRecord { pid: of, last_words, last_lines, .. } = record;
        let is_last_line = last_lines.last().is_some_and(|line| line.starts_with(last_words));
        let said = if is_last_line { last_lines.join(" | ") } else { last_words.clone() };
        let said = Some(said).filter(|said| *of == pid && !said.is_empty());
        let what = match failure {
            RollFailure::NeverReady => "did not become ready",
            RollFailure::DiedSoon => DIED_SOON,
        };
        log::error!(
            "gen" = generation, slot, pid = pid.map(Pid::as_raw), said, hint = self.hint_of(which, pid);
            "reload failed: a new {noun} {what}; the old workers stay"
        );
    }
}
