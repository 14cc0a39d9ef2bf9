//! Logs the supervisor's decisions for the operator: one line for each notice.

use super::Master;
use super::death_log::DeathRecord;
use super::supervisor::Notice;

impl Master {
    /// Reports to systemd the notices that concern it.
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

    /// The hint in the death record of the last process that ended; with `pid`, only if that process was `pid`.
    fn hint_of(&self, pid: Option<nix::unistd::Pid>) -> String {
        let DeathRecord { hint, pid: of, .. } = &self.death_record;
        let is_that = !hint.is_empty() && (pid.is_none() || pid == *of);
        if is_that { format!(" hint={hint:?}") } else { String::new() }
    }

    pub(super) fn log(&mut self, notice: Notice) {
        self.notify_systemd(notice);
        match notice {
            Notice::FullStrength => crate::startup::banner::ready(self.begun.elapsed()),
            Notice::Failing { failures, delay } => log::error!(
                "workers die before they are ready: {failures} in a row, next try in {}ms (see the lines above for why){}",
                delay.as_millis(),
                self.hint_of(None)
            ),
            Notice::GivenUp { after } => {
                self.gave_up = true;
                log::error!(
                    "no worker ever became ready: the server stops failing_for={}s (the lines above say why the last one \
                     ended; --start-timeout if they need longer; --give-up-after 0 to try for ever)",
                    after.as_secs()
                );
            }
            Notice::Throttled { slot, delay } => {
                log::warn!(
                    "workers end too often: slot={slot} is filled again in {}ms (--respawn-rate)",
                    delay.as_millis()
                )
            }
            Notice::StartTimeout { slot, pid } => {
                log::warn!("worker slot={slot} pid={pid} is not ready in time (--start-timeout): killed");
            }
            Notice::DrainTimeout { slot, pid } => {
                log::warn!("worker slot={slot} pid={pid} does not finish in time (--drain-timeout): killed");
            }
            Notice::Target(target) => log::info!("workers={target}"),
            Notice::TargetLimit(target) => log::warn!("workers={target} is the limit: left as it is"),
            Notice::Scaled { from, to, in_flight, waiting } => {
                log::info!("scaled workers={to} from={from} in_flight={in_flight} waiting={waiting}");
            }
            Notice::Saturated { workers, in_flight, waiting } => log::warn!(
                "there is more to do than the most workers can do (--workers): workers={workers} \
                 in_flight={in_flight} waiting={waiting}"
            ),
            Notice::ReloadStarted { generation } => log::info!("reload begins gen={generation}"),
            Notice::ReloadDone { generation } => log::info!("reload done gen={generation}"),
            Notice::ReloadFailed { generation, slot, pid } => {
                let said = Some(&self.death_record)
                    .filter(|death_record| death_record.pid == pid && !death_record.last_words.is_empty());
                let said = said.map_or_else(String::new, |death_record| format!(" said={:?}", death_record.last_words));
                let hint = self.hint_of(pid);
                let pid = pid.map_or_else(String::new, |pid| format!(" pid={pid}"));
                log::error!(
                    "reload failed gen={generation}: a new worker died before it was ready; the old ones stay \
                     slot={slot}{pid}{said}{hint}"
                );
            }
        }
    }
}
