//! Carries out the requests from the control socket and reports their outcome.
//!
//! A command is passed to the supervisor in the same form as a signal. The client waits until the supervisor's notices
//! or state show the outcome. If the client disconnects before that, the command continues.

use std::fmt::Write as _;
use std::os::fd::AsFd as _;

use log::kv::Value;
use nix::poll::PollFlags;
use nix::unistd::Pid;

use super::Master;
use super::apps::Which;
use super::control::{ClientId, Control, Waiting};
use super::decision_log::{DIED_SOON, DRAIN_TIMEOUT, RELOAD_DONE, RELOAD_STARTED, START_TIMEOUT};
use super::pool::spawn::to_pass;
use super::pool::supervisor::{Command, Notice, Phase, RollFailure};
use super::pool::with_article;
use super::status::line_of;
use crate::control::wire::{ControlReply, ControlRequest};

/// The latest death that was reported to clients.
#[derive(Debug, Default)]
pub(super) struct ReportedDeath {
    kind: String,
    /// Number of similar deaths since then.
    omitted: u32,
}

const STOPPING: &str = "the master is stopping";

impl Master {
    /// Reads the requests of the control clients and carries them out. `events` are the results of `poll` for the
    /// control socket and its clients.
    pub(super) fn read_operators(&mut self, events: &[PollFlags]) {
        let now = self.now();
        let Some(control) = &mut self.control else { return };
        for (client, request) in control.attend(events, now) {
            if request != ControlRequest::Status {
                log::info!(command = request.name(); "received a command on the control socket");
            }
            self.answer(client, request);
        }
        self.end_waits();
        // Clients that have just received their outcome are waiting for the connection to close. It is closed now,
        // because the next event may take long to arrive.
        let now = self.now();
        if let Some(control) = &mut self.control {
            control.sweep(now);
        }
    }

    fn answer(&mut self, client: ClientId, request: ControlRequest) {
        let stopping = self.pool.supervisor.view().phase == Phase::Stopping;
        match request {
            ControlRequest::Status => {
                let status = self.status();
                self.reply(client, &ControlReply::Status { status });
            }
            ControlRequest::Segment if self.pool.spawner.config.cache.bytes == 0 => {
                self.reply(
                    client,
                    &ControlReply::failed("there is no page cache (start with --cache SIZE to have one)"),
                );
            }
            ControlRequest::Events if self.pool.spawner.config.events.bytes == 0 => {
                self.reply(
                    client,
                    &ControlReply::failed("there is no event log (start with --events SIZE to have one)"),
                );
            }
            ControlRequest::Segment | ControlRequest::Events => self.hand_over_memory(client),
            ControlRequest::Stop { now } => {
                self.keep_waiting(client, Waiting::Stop);
                self.obey(if now { Command::Halt } else { Command::Drain });
            }
            ControlRequest::Reload | ControlRequest::Scale { .. } | ControlRequest::Upgrade if stopping => {
                log::info!(command = request.name(); "ignored a command, because the server is stopping");
                self.reply(client, &ControlReply::failed(STOPPING));
            }
            ControlRequest::Reload => {
                // Must come before the reload begins, so that this client receives all messages about the reload.
                self.keep_waiting(client, Waiting::Reload);
                if let Err(why) = self.reload() {
                    self.reply(client, &ControlReply::failed(why));
                }
            }
            ControlRequest::Scale { workers } => self.scale(client, workers),
            ControlRequest::Release { request: None } => {
                let released = self.pool.release_all();
                self.reply(client, &ControlReply::done(line_of("quarantine ended", &("requests", released))));
            }
            ControlRequest::Release { request: Some(request) } => {
                let answer = if self.pool.release(&request) {
                    ControlReply::done(line_of("quarantine ended", &("request", &request)))
                } else {
                    ControlReply::failed(format!("{request:?} is not quarantined (see: quarantine ls)"))
                };
                self.reply(client, &answer);
            }
            ControlRequest::Upgrade => {
                self.keep_waiting(client, Waiting::Upgrade);
                self.obey(Command::Upgrade);
            }
            ControlRequest::ReopenLogs => {
                let errors = self.reopen_logs();
                let answer = if errors.is_empty() {
                    ControlReply::done("log files reopened")
                } else {
                    ControlReply::failed(errors.join("; "))
                };
                self.reply(client, &answer);
            }
        }
    }

    fn hand_over_memory(&mut self, client: ClientId) {
        let now = self.now();
        if let Some(why) = self.why_not_use_memory() {
            return self.reply(client, &ControlReply::failed(why));
        }
        let segment = match to_pass(&self.pool.spawner.segment) {
            Ok(segment) => segment,
            Err(error) => {
                let why = format!("cannot duplicate the descriptor of the shared memory: {error}");
                return self.reply(client, &ControlReply::failed(why));
            }
        };
        let done = ControlReply::done("the descriptor of the shared memory is attached");
        if let Some(control) = &mut self.control {
            control.hand_over(client, segment.as_fd(), &done, now);
        }
    }

    fn scale(&mut self, client: ClientId, workers: u32) {
        let view = self.application_pool().supervisor.view();
        let most = view.most;
        if !(1..=most).contains(&workers) {
            let why = format!("cannot run {workers} workers: expected 1 to {most} (--workers can raise the limit)");
            self.reply(client, &ControlReply::failed(why));
            return;
        }
        self.keep_waiting(client, Waiting::Scale(workers));
        if view.limits != (workers, workers) {
            self.obey(Command::Scale(workers));
        }
    }

    /// Reports a process that has become ready, or that appears to be.
    pub(super) fn report_ready(&mut self, which: Which, pid: Pid) {
        let pool = self.pool_of(which);
        if let Some(child) = pool.children.get(&pid) {
            let (slot, generation) = (child.slot.into(), child.generation.into());
            let fields: [(&str, Value<'_>); 3] = [("slot", slot), ("pid", pid.as_raw().into()), ("gen", generation)];
            let line = line_of(&format!("{} ready", pool.noun), &fields);
            self.reply_to_movers(&line);
        }
    }

    /// Reports the latest death of a process.
    pub(super) fn report_death(&mut self, which: Which) {
        let record = &self.pool_of(which).death_record;
        let (text, kind) = (record.line.clone(), record.kind.clone());
        self.reply_to_waiting(Waiting::Stop, &ControlReply::Progress { text: text.clone() });
        if !self.waiting().iter().any(|(_, waiting)| matches!(waiting, Waiting::Reload | Waiting::Scale(_))) {
            self.reported_death = ReportedDeath::default();
        } else if !kind.is_empty() && kind == self.reported_death.kind {
            self.reported_death.omitted += 1;
        } else {
            self.reply_to_movers(&text);
            self.reported_death = ReportedDeath { kind, omitted: 0 };
        }
    }

    /// Reports a notice of the supervisor to the clients that wait for it.
    pub(super) fn report_to_clients(&mut self, which: Which, notice: Notice) {
        let noun = self.pool_of(which).noun;
        match notice {
            Notice::ReloadStarted { generation } => {
                let text = line_of(RELOAD_STARTED, &("gen", generation));
                self.reply_to_waiting(Waiting::Reload, &ControlReply::Progress { text });
            }
            Notice::ReloadDone { generation } => {
                let text = line_of(RELOAD_DONE, &("gen", generation));
                self.reply_to_waiting(Waiting::Reload, &ControlReply::done(text));
            }
            Notice::ReloadFailed { generation, pid, failure, .. } => {
                let record = &self.pool_of(which).death_record;
                let event = match failure {
                    RollFailure::NeverReady => "reload failed; the old workers stay".to_owned(),
                    RollFailure::DiedSoon => format!("reload failed: a new {noun} {DIED_SOON}; the old workers stay"),
                };
                let mut why = match record.line.as_str() {
                    "" => line_of(&event, &("gen", generation)),
                    death => format!("{event}: {death}"),
                };
                if record.pid == pid && !record.last_lines.is_empty() {
                    why += "\nits last output:";
                    record.last_lines.iter().for_each(|line| _ = write!(why, "\n  {line}"));
                }
                self.count_omitted_deaths();
                self.reply_to_waiting(Waiting::Reload, &ControlReply::failed(why));
            }
            Notice::Failing { .. } => {
                let death = &self.pool_of(which).death_record.line;
                let failed = ControlReply::failed(format!("{} did not become ready: {death}", with_article(noun)));
                for (client, waiting) in self.waiting() {
                    if matches!(waiting, Waiting::Scale(_)) {
                        self.reply(client, &failed);
                    }
                }
            }
            Notice::StartTimeout { slot, pid } => {
                let cause =
                    self.pool_of(which).why_not_ready(pid).map(|cause| format!(": {cause}")).unwrap_or_default();
                let text = line_of(
                    &format!("{noun} {START_TIMEOUT}{cause}"),
                    &[("slot", Value::from(slot)), ("pid", pid.as_raw().into())],
                );
                self.reply_to_movers(&text);
            }
            Notice::DrainTimeout { slot, pid } => {
                let text = line_of(
                    &format!("{noun} {DRAIN_TIMEOUT}"),
                    &[("slot", Value::from(slot)), ("pid", pid.as_raw().into())],
                );
                self.reply_to_movers(&text);
                self.reply_to_waiting(Waiting::Stop, &ControlReply::Progress { text });
            }
            Notice::FullStrength
            | Notice::Throttled { .. }
            | Notice::Target(_)
            | Notice::TargetLimit(_)
            | Notice::Scaled { .. }
            | Notice::GivenUp { .. }
            | Notice::Saturated { .. } => {}
        }
    }

    /// Sends the last replies, because the last process has ended.
    pub(super) fn farewell(&mut self) {
        for (client, waiting) in self.waiting() {
            let answer =
                if waiting == Waiting::Stop { ControlReply::done("stopped") } else { ControlReply::failed(STOPPING) };
            self.reply(client, &answer);
        }
    }

    /// Sends the outcome to clients that wait for a state rather than an event.
    fn end_waits(&mut self) {
        let waiting = self.waiting();
        if waiting.is_empty() {
            return;
        }
        let view = self.application_pool().supervisor.view();
        for (client, waiting) in waiting {
            let outcome = match waiting {
                Waiting::No | Waiting::Stop => None,
                Waiting::Reload | Waiting::Scale(_) | Waiting::Upgrade if view.phase == Phase::Stopping => {
                    Some(ControlReply::failed(STOPPING))
                }
                Waiting::Reload | Waiting::Upgrade => None,
                Waiting::Scale(workers) if view.target != workers => {
                    Some(ControlReply::failed(format!("superseded: the target is now {} workers", view.target)))
                }
                // The outcome: exactly this many workers are ready, and no other process is left.
                Waiting::Scale(workers) => {
                    let settled = view.ready() == workers as usize && view.slots.len() == workers as usize;
                    settled.then(|| ControlReply::done(line_of("scaled", &("workers", workers))))
                }
            };
            if let Some(outcome) = outcome {
                self.reply(client, &outcome);
            }
        }
    }

    /// Reports how many deaths were not reported one by one, because they were like the last one.
    fn count_omitted_deaths(&mut self) {
        let ReportedDeath { omitted, .. } = std::mem::take(&mut self.reported_death);
        if omitted > 0 {
            let times = if omitted == 1 { "time" } else { "times" };
            self.reply_to_movers(&format!("(the same {omitted} more {times})"));
        }
    }

    fn reply_to_movers(&mut self, text: &str) {
        self.count_omitted_deaths();
        for (client, waiting) in self.waiting() {
            if matches!(waiting, Waiting::Reload | Waiting::Scale(_)) {
                self.reply(client, &ControlReply::Progress { text: text.to_owned() });
            }
        }
    }

    fn waiting(&self) -> Vec<(ClientId, Waiting)> {
        self.control.as_ref().map(Control::waiting).unwrap_or_default()
    }

    fn keep_waiting(&mut self, client: ClientId, what: Waiting) {
        if let Some(control) = &mut self.control {
            control.set_waiting(client, what);
        }
    }

    fn reply(&mut self, client: ClientId, answer: &ControlReply) {
        let now = self.now();
        if let Some(control) = &mut self.control {
            control.reply(client, answer, now);
        }
    }

    pub(super) fn reply_to_waiting(&mut self, what: Waiting, answer: &ControlReply) {
        let now = self.now();
        if let Some(control) = &mut self.control {
            control.reply_to_waiting(what, answer, now);
        }
    }
}
