//! Logs the supervisor's decisions for the operator: one line for each notice.

use nix::unistd::Pid;

use super::Master;
use super::pool::death_log::DeathRecord;
use super::pool::supervisor::Notice;
use crate::config::in_ms;

// These events are also reported to control clients.
pub(super) const START_TIMEOUT: &str = "worker killed: it was not ready in time (--start-timeout)";
pub(super) const DRAIN_TIMEOUT: &str = "worker killed: it did not finish in time (--drain-timeout)";
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
    fn hint_of(&self, pid: Option<Pid>) -> Option<&str> {
        let DeathRecord { hint, pid: of, .. } = &self.pool.death_record;
        Some(hint.as_str()).filter(|hint| !hint.is_empty() && (pid.is_none() || pid == *of))
    }

    pub(super) fn log(&mut self, notice: Notice) {
        self.notify_systemd(notice);
        match notice {
            Notice::FullStrength => crate::startup::banner::ready(self.begun.elapsed()),
            Notice::Failing { failures, delay } => log::error!(
                failures, next_try = in_ms(delay), hint = self.hint_of(None);
                "workers die before they are ready (see the lines above)"
            ),
            Notice::GivenUp { after } => {
                self.gave_up = true;
                log::error!(
                    failing_for:% = format_args!("{}s", after.as_secs());
                    "no worker ever became ready: the server stops (see the lines above; --start-timeout if workers need \
                     longer; --give-up-after 0 to retry indefinitely)"
                );
            }
            Notice::Throttled { slot, delay } => {
                log::warn!(
                    slot, delay = in_ms(delay);
                    "workers exit too often: a replacement is delayed (--respawn-rate)"
                );
            }
            Notice::StartTimeout { slot, pid } => log::warn!(slot, pid = pid.as_raw(); "{START_TIMEOUT}"),
            Notice::DrainTimeout { slot, pid } => log::warn!(slot, pid = pid.as_raw(); "{DRAIN_TIMEOUT}"),
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
            Notice::ReloadStarted { generation } => log::info!("gen" = generation; "{RELOAD_STARTED}"),
            Notice::ReloadDone { generation } => log::info!("gen" = generation; "{RELOAD_DONE}"),
            Notice::ReloadFailed { generation, slot, pid } => {
                let DeathRecord { pid: of, last_words, .. } = &self.pool.death_record;
                let said = Some(last_words).filter(|last_words| *of == pid && !last_words.is_empty());
                log::error!(
                    "gen" = generation, slot, pid = pid.map(Pid::as_raw), said, hint = self.hint_of(pid);
                    "reload failed: a new worker did not become ready; the old workers stay"
                );
            }
        }
    }
}
