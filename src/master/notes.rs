//! What the operator is told of the supervisor's decisions: a line of the log for each note.

use super::Master;
use super::obituary::Obituary;
use super::supervisor::Note;

impl Master {
    /// Tells the service manager what concerns it.
    fn notify_of(&mut self, note: Note) {
        match note {
            Note::FullStrength | Note::ReloadDone { .. } => self.notify.ready("serving"),
            Note::ReloadStarted { .. } => self.notify.reloading(),
            Note::ReloadFailed { .. } => self.notify.ready("serving with the old workers: the last reload failed"),
            Note::Failing { .. } => self.notify.status("workers die before they are ready: see the log"),
            Note::Target(_)
            | Note::TargetLimit(_)
            | Note::Scaled { .. }
            | Note::GivenUp { .. }
            | Note::Saturated { .. }
            | Note::Throttled { .. }
            | Note::StartTimeout { .. }
            | Note::DrainTimeout { .. } => {}
        }
    }

    /// What an operator should know of the last end, or of that of `pid` if it was the last one.
    fn hint_of(&self, pid: Option<nix::unistd::Pid>) -> String {
        let Obituary { hint, pid: of, .. } = &self.obituary;
        let is_that = !hint.is_empty() && (pid.is_none() || pid == *of);
        if is_that { format!(" hint={hint:?}") } else { String::new() }
    }

    pub(super) fn tell(&mut self, note: Note) {
        self.notify_of(note);
        match note {
            Note::FullStrength => crate::startup::banner::ready(self.begun.elapsed()),
            Note::Failing { failures, delay } => log::error!(
                "workers die before they are ready: {failures} in a row, next try in {}ms (see the lines above for why){}",
                delay.as_millis(),
                self.hint_of(None)
            ),
            Note::GivenUp { after } => {
                self.gave_up = true;
                log::error!(
                    "no worker ever became ready: the server stops failing_for={}s (the lines above say why the last one \
                     ended; --start-timeout if they need longer; --give-up-after 0 to try for ever)",
                    after.as_secs()
                );
            }
            Note::Throttled { slot, delay } => {
                log::warn!(
                    "workers end too often: slot={slot} is filled again in {}ms (--respawn-rate)",
                    delay.as_millis()
                )
            }
            Note::StartTimeout { slot, pid } => {
                log::warn!("worker slot={slot} pid={pid} is not ready in time (--start-timeout): killed");
            }
            Note::DrainTimeout { slot, pid } => {
                log::warn!("worker slot={slot} pid={pid} does not finish in time (--drain-timeout): killed");
            }
            Note::Target(target) => log::info!("workers={target}"),
            Note::TargetLimit(target) => log::warn!("workers={target} is the limit: left as it is"),
            Note::Scaled { from, to, in_flight, waiting } => {
                log::info!("scaled workers={to} from={from} in_flight={in_flight} waiting={waiting}");
            }
            Note::Saturated { workers, in_flight, waiting } => log::warn!(
                "there is more to do than the most workers can do (--workers): workers={workers} \
                 in_flight={in_flight} waiting={waiting}"
            ),
            Note::ReloadStarted { generation } => log::info!("reload begins gen={generation}"),
            Note::ReloadDone { generation } => log::info!("reload done gen={generation}"),
            Note::ReloadFailed { generation, slot, pid } => {
                let said =
                    Some(&self.obituary).filter(|obituary| obituary.pid == pid && !obituary.last_words.is_empty());
                let said = said.map_or_else(String::new, |obituary| format!(" said={:?}", obituary.last_words));
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
