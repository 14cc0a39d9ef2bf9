//! Reloads the configuration: reads and checks the whole configuration, and then applies either all of it or nothing.
//!
//! ```text
//! read ─▶ prepare: users, programs, log files ──▶ take over ─▶ roll ─▶ done: daemons, jobs and the relay change too
//!   └────────────┴─ invalid: nothing has changed                 └───▶ failed: new processes use the old settings
//! ```
//!
//! - Settings of the master itself (number of workers, timeouts, the log) take effect immediately.
//! - Settings of the serving processes take effect for the new generation. Processes that replace older ones use the
//!   old settings until a process of the new generation has become ready, and again if the reload has failed.
//! - Settings that cannot change are logged ([`crate::config::control::reloaded`]).

use std::io;
use std::os::fd::AsFd as _;
use std::sync::Arc;

use nix::unistd::Uid;

use super::apps::Which;
use super::control::Waiting;
use super::pool::supervisor::{Command, Notice, SupervisorEvent};
use super::pool::{Pool, policy};
use super::sidecars::Sidecars;
use super::{Master, Reloaded};
use crate::config::privileges::{Owner, PrivilegesConfig};
use crate::control::wire::ControlReply;
use crate::logging::files::LogFiles;
use crate::startup::conflicts::{self, Conflict};
use crate::{logging, privileges};

impl Master {
    /// Rereads the configuration and replaces the workers.
    ///
    /// # Errors
    /// Returns a message for the operator if the configuration is invalid. In this case nothing has changed.
    pub(super) fn reload(&mut self) -> Result<(), String> {
        let running = Arc::clone(&self.application_pool().spawner.config);
        let read = (self.reread)(&running).and_then(|read| read.map_or(Ok(()), |read| self.take_over(read)));
        if let Err(why) = read {
            log::error!("reload refused; the workers stay as they are: {why}");
            return Err(format!("the workers stay as they are: {why}"));
        }
        if let Some(text) = self.replace_damaged_memory() {
            self.reply_to_waiting(Waiting::Reload, &ControlReply::Progress { text });
        }
        self.obey(Command::Reload);
        Ok(())
    }

    /// Applies a configuration. After the first change, no step can fail.
    fn take_over(&mut self, read: Reloaded) -> Result<(), String> {
        let Reloaded { config, program, fixed } = read;
        let conflicts = conflicts::find_among_files(&config);
        if !conflicts.is_empty() {
            return Err(Conflict::join(&conflicts));
        }
        let (front, config) = (Arc::new(config.of_gateways()), Arc::new(config));
        let events = self.relay.seen_by_programs(&config);
        let mut settings = self.pool.spawner.prepare(&front, program.clone())?;
        let mut of_apps = self.apps.as_ref().map(|apps| apps.spawner.prepare(&config, program)).transpose()?;
        [&mut settings].into_iter().chain(&mut of_apps).for_each(|settings| settings.events.clone_from(&events));
        let sidecars = Sidecars::prepare(&config, events)?;
        let log = logging::prepare(&self.pool.spawner.config.logs, &config.logs)?;

        let log_moved = logging::change(log);
        if !fixed.is_empty() {
            let text = format!("these settings take effect only after a restart: {}", fixed.join(", "));
            log::warn!("{text}");
            self.reply_to_waiting(Waiting::Reload, &ControlReply::Progress { text });
        }
        self.pool.spawner.adopt(settings);
        if let (Some(apps), Some(of_apps)) = (&mut self.apps, of_apps) {
            apps.spawner.adopt(of_apps);
            apps.recycling.set_limits(&config.scaling);
        }
        self.sidecars.expect(sidecars);
        if log_moved {
            self.hand_out_log_files();
            self.renew_guard();
        }
        self.pool.recycling.set_limits(&front.scaling);
        self.pool.faults.set_limits(&front.failures);
        self.step(Which::Front, SupervisorEvent::Policy(policy(&front)));
        if self.apps.is_some() {
            self.step(Which::Apps, SupervisorEvent::Policy(policy(&config)));
        }
        self.describe_settings();
        Ok(())
    }

    /// Applies or discards settings as the reload proceeds.
    pub(super) fn follow_reload(&mut self, which: Which, notice: Notice) {
        match notice {
            Notice::ReloadStarted { generation } => self.reload_began(which, generation),
            Notice::ReloadDone { .. } => self.reload_done(which),
            Notice::ReloadFailed { .. } => self.reload_failed(which),
            Notice::FullStrength
            | Notice::Failing { .. }
            | Notice::Throttled { .. }
            | Notice::Target(_)
            | Notice::TargetLimit(_)
            | Notice::Scaled { .. }
            | Notice::Saturated { .. }
            | Notice::GivenUp { .. }
            | Notice::StartTimeout { .. }
            | Notice::DrainTimeout { .. } => {}
        }
    }

    /// Handles the start of the new generation.
    fn reload_began(&mut self, which: Which, generation: u64) {
        let spawner = &mut self.pool_mut(which).spawner;
        let before = Arc::clone(&spawner.current.config);
        let now = Arc::clone(&spawner.config);
        // The processes of the application are replaced first.
        if spawner.begin(generation) && (which == Which::Apps || self.apps.is_none()) {
            // The first new process may publish events immediately, so the owner of the socket must change now.
            self.give_files(&before.privileges, &now.privileges);
        }
    }

    /// Handles the completion of a reload: all processes of the pool are of the new generation.
    fn reload_done(&mut self, which: Which) {
        if which == Which::Apps {
            self.pool_mut(which).spawner.finish();
            return; // the gateways are next
        }
        self.sidecars.reloaded();
        if let Some(before) = self.pool.spawner.finish()
            && before.config.privileges != self.pool.spawner.current.config.privileges
        {
            self.relay.renew(self.now());
        }
        self.describe_sidecars();
    }

    /// Handles the failure of a reload: the old processes keep running.
    fn reload_failed(&mut self, which: Which) {
        self.sidecars.forget();
        let spawner = &mut self.pool_mut(which).spawner;
        let (tried, now) = (spawner.give_up(), Arc::clone(&spawner.current.config));
        if which == Which::Apps {
            self.pool.spawner.forget_read();
        }
        if let Some(tried) = tried.filter(|_| which == Which::Apps || self.apps.is_none()) {
            self.give_files(&tried.config.privileges, &now.privileges);
        }
    }

    /// Logs the settings that each part of the master uses.
    pub(super) fn describe_settings(&self) {
        let Pool { supervisor, recycling, faults, spawner, .. } = &self.pool;
        let config = &spawner.config;
        log::debug!(part = "supervisor", policy:? = supervisor.policy(); "settings");
        recycling.log_settings();
        faults.log_settings();
        let (queue, output_rate) = (logging::queue_limit(), logging::output_rate());
        log::debug!(part = "log", queue, output_rate; "settings");
        let program = &self.application_pool().spawner.config.program;
        log::debug!(part = "master", program:?, upgrade:? = config.upgrade; "settings");
    }

    /// Logs the settings of daemons and jobs.
    pub(super) fn describe_sidecars(&self) {
        log::debug!(part = "sidecars", sidecars = self.sidecars.describe(); "settings");
    }

    /// Changes the owner of the socket files and the cache file, if the user of the processes has changed.
    fn give_files(&self, before: &PrivilegesConfig, now: &PrivilegesConfig) {
        let ours = || Owner { user: nix::unistd::geteuid(), group: nix::unistd::getegid() };
        let changed = |before: Option<Owner>, now: Option<Owner>| {
            (before != now).then(|| (before.unwrap_or_else(ours).user, now.unwrap_or_else(ours)))
        };
        if let Some((from, to)) = changed(before.owner_of_sockets(), now.owner_of_sockets()) {
            let given = self.pool.spawner.listeners.iter().map(|listener| listener.give_file_of(from, to));
            given.filter_map(Result::err).for_each(|error| log::warn!("{error}"));
        }
        if let Some((from, to)) = changed(before.owner_of_files(), now.owner_of_files()) {
            self.give_publish_socket(from, to);
            if let Some(file) = &self.pool.spawner.config.cache.file
                && let Err(error) = privileges::give_of(self.pool.spawner.segment.fd(), from, to)
            {
                log::warn!(
                    file:% = file.display();
                    "cannot change the owner of the cache file: {error} (restart the server after a change of --user)"
                );
            }
        }
    }

    fn give_publish_socket(&self, from: Uid, to: Owner) {
        if let Err(error) = self.relay.give_socket(from, to) {
            log::warn!("cannot change the owner of the publish socket: {error} (--events-socket)");
        }
    }

    /// Reopens the log files, and passes them to the workers.
    pub(super) fn reopen_logs(&mut self) -> Vec<String> {
        let log = self.pool.spawner.config.logs.file.as_deref().map_or(Ok(()), logging::reopen);
        let access = self.log_files().into_iter().map(|files| files.reopen_access());
        let errors: Vec<String> = [log].into_iter().chain(access).filter_map(Result::err).collect();
        self.hand_out_log_files();
        self.renew_guard();
        errors.iter().for_each(|error| log::error!("{error}"));
        log::info!(errors = errors.len(); "log files reopened");
        errors
    }

    /// Returns the log files of running workers and of future processes, without duplicates.
    fn log_files(&self) -> Vec<Arc<LogFiles>> {
        let to_come = self.pool.spawner.in_use().map(|settings| &settings.log_files);
        let living = self.pool.children.values().filter_map(|child| child.log_files.as_ref());
        let mut all: Vec<Arc<LogFiles>> = Vec::new();
        for files in to_come.chain(living) {
            if !all.iter().any(|known| Arc::ptr_eq(known, files)) {
                all.push(Arc::clone(files));
            }
        }
        all
    }

    fn hand_out_log_files(&self) {
        for (pid, child) in &self.pool.children {
            let Some(channel) = &child.files else { continue };
            let files = child.log_files.as_ref().unwrap_or(&self.pool.spawner.current.log_files);
            // A worker that is about to exit does not receive files.
            if let Err(error) = files.hand_out(channel.as_fd())
                && error.kind() != io::ErrorKind::BrokenPipe
            {
                log::warn!(
                    slot = child.slot, pid = pid.as_raw();
                    "cannot pass the log files to a worker, which continues with its old ones: {error}"
                );
            }
        }
    }
}
