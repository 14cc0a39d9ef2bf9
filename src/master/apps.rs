//! Runs two pools: the gateways, which serve clients, and the app processes behind them.
//!
//! A server without gateways has one pool ([`Master::pool`]), and nothing in this file has an effect. With gateways,
//! that pool consists of the gateways, and [`Master::apps`] of the app processes. The rules:
//!
//! - The number of processes (`--workers`, `scale`, SIGTTIN) is that of the app processes.
//! - A reload replaces the app processes first. The gateways follow when this has succeeded, so a broken application
//!   leaves the whole server as it was.
//! - A stop drains the gateways first, because their requests need app processes. The app processes follow when the last
//!   gateway has ended. If one pool ends on its own, the other one is stopped.

use std::collections::VecDeque;
use std::sync::Arc;

use super::Master;
use super::pool::Pool;
use super::pool::supervisor::{Action, Command, Notice, SupervisorEvent};

/// One of the pools.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Which {
    /// The processes that serve clients: workers, programs or gateways.
    Front,
    /// The app processes behind gateways.
    Apps,
}

impl Master {
    /// Returns the pool of this name; the front one if there are no app processes.
    pub(super) fn pool_of(&self, which: Which) -> &Pool {
        match which {
            Which::Front => &self.pool,
            Which::Apps => self.apps.as_ref().unwrap_or(&self.pool),
        }
    }

    pub(super) fn pool_mut(&mut self, which: Which) -> &mut Pool {
        match which {
            Which::Front => &mut self.pool,
            Which::Apps => self.apps.as_mut().unwrap_or(&mut self.pool),
        }
    }

    /// Returns both pools.
    pub(super) fn pools(&self) -> impl Iterator<Item = &Pool> {
        [&self.pool].into_iter().chain(&self.apps)
    }

    /// Returns the pool that runs the application, which the operator scales.
    pub(super) fn application_pool(&self) -> &Pool {
        self.pool_of(Which::Apps)
    }

    /// Passes an event to the supervisor of a pool and carries out the resulting actions, until none are left.
    pub(super) fn step(&mut self, which: Which, event: SupervisorEvent) {
        let now = self.now();
        let mut actions = VecDeque::from(self.pool_mut(which).supervisor.step(event, now));
        while let Some(action) = actions.pop_front() {
            if let Some(answer) = self.act(which, action) {
                let now = self.now();
                actions.extend(self.pool_mut(which).supervisor.step(answer, now));
            }
        }
    }

    fn act(&mut self, which: Which, action: Action) -> Option<SupervisorEvent> {
        match action {
            Action::Notice(notice) => self.note(which, notice),
            Action::Upgrade => self.begin_upgrade(),
            Action::Exit { success } => self.pool_emptied(which, success),
            Action::Spawn { .. }
            | Action::Terminate { .. }
            | Action::Remind { .. }
            | Action::Kill { .. }
            | Action::Abort { .. }
            | Action::Close { .. }
            | Action::Sample => {}
        }
        match which {
            Which::Apps => self.apps.as_mut()?.act(action, &self.signals),
            Which::Front => self.pool.act(action, &self.signals),
        }
    }

    fn note(&mut self, which: Which, notice: Notice) {
        self.follow_reload(which, notice);
        self.log(which, notice);
        // The reload of the gateways completes the reload of the app processes.
        let is_half = match notice {
            Notice::ReloadDone { .. } => which == Which::Apps,
            Notice::ReloadStarted { .. } => which == Which::Front,
            _ => false,
        };
        if let (Which::Front, Notice::ReloadDone { .. }, Some(apps)) = (which, notice, &self.apps) {
            // Clients have read that the reload of the app processes has started.
            let generation = apps.supervisor.view().generation;
            self.report_to_clients(which, Notice::ReloadDone { generation });
        } else if self.apps.is_none() || !is_half {
            self.report_to_clients(which, notice);
        }
        if let (Which::Apps, Notice::ReloadDone { .. }) = (which, notice) {
            self.step(Which::Front, SupervisorEvent::Command(Command::Reload));
        }
    }

    /// Carries out a command.
    pub(super) fn command(&mut self, command: Command) {
        let which = match command {
            _ if self.apps.is_none() => Which::Front,
            Command::Drain | Command::Upgrade => Which::Front,
            Command::Halt => {
                self.step(Which::Front, SupervisorEvent::Command(command));
                Which::Apps
            }
            Command::Add | Command::Remove | Command::Scale(_) | Command::Reload => Which::Apps,
        };
        self.step(which, SupervisorEvent::Command(command));
    }

    /// Records that the last process of a pool has ended. `success` is true if the operator has asked for this.
    fn pool_emptied(&mut self, which: Which, success: bool) {
        if self.apps.is_none() {
            self.emptied = Some(success);
            return;
        }
        let other = match which {
            Which::Front => Which::Apps,
            Which::Apps => Which::Front,
        };
        match self.emptied_first {
            None => {
                self.emptied_first = Some((which, success));
                self.step(other, SupervisorEvent::Command(Command::Drain));
            }
            Some((first, first_success)) if first != which => self.emptied = Some(success && first_success),
            Some(_) => {}
        }
    }

    /// Observes the app processes, and carries out what their supervisor decides.
    pub(super) fn observe_apps(&mut self) {
        let now = self.now();
        let Some(apps) = &mut self.apps else { return };
        if let Some(channel) = apps.channel() {
            channel.master_is_awake();
        }
        apps.read_children();
        apps.orphaned_outputs.read(now);
        apps.check_apps();
        apps.recycle();
        if apps.supervisor.awaits_arrival() && apps.channel().is_some_and(|channel| channel.demand().waiting > 0) {
            apps.observe_arrival();
        }
        apps.check_hangs_and_quarantine();
        self.attribute_faults();
        for request in self.apps.iter_mut().flat_map(|apps| apps.culprits.drain(..)) {
            self.pool.accuse(&request); // the gateways refuse quarantined requests
        }
        self.feed_observed(Which::Apps);
    }

    /// Passes the gateways' reports, as far as they have been read, to the pool of the app processes.
    pub(super) fn attribute_faults(&mut self) {
        let Some(apps) = &mut self.apps else { return };
        for fault in self.pool.app_faults.drain(..) {
            apps.attribute(fault);
        }
    }

    /// Releases the claims of the gateway in `slot`, which has died.
    pub(super) fn gateway_died(&mut self, slot: u32) {
        let Some(apps) = &mut self.apps else { return };
        let Some(channel) = apps.channel().map(Arc::clone) else { return };
        for process in channel.gateway_died(slot) {
            apps.await_end_of_request(&channel, process);
        }
    }

    /// Passes what a pool has observed to its supervisor.
    pub(super) fn feed_observed(&mut self, which: Which) {
        while let Some(event) = self.pool_mut(which).next_observed() {
            if let SupervisorEvent::Ready { pid } = event {
                self.report_ready(which, pid);
            }
            self.step(which, event);
        }
    }
}
