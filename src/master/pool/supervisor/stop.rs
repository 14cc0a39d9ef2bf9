//! Stops processes: single ones, and all of them when the server stops.
//!
//! When the server drains, the ready processes are asked to exit first; they accept the queued connections before they
//! exit. While connections are waiting in a queue ([`SupervisorEvent::Queue`]), a process that exits is replaced in its
//! slot, with the usual delays, and the replacement is asked to exit as soon as it is ready. When the server no longer
//! waits for any queue, starting processes are asked to exit too. All processes have the same deadline, regardless of
//! when they were started.
//!
//! [`SupervisorEvent::Queue`]: super::SupervisorEvent::Queue

use super::messages::Action;
use super::{Mode, State, Supervisor, TERMINATE_INTERVAL, Uptime};

impl Supervisor {
    /// Begins to drain the server. `success` is true if the operator requested this. Otherwise, no process can serve
    /// queued connections.
    pub(super) fn stop(&mut self, success: bool, now: Uptime) {
        self.mode = Mode::Stopping { success, until: now + self.policy.drain_timeout, queue: success };
        self.roll = None;
        self.actions.push(Action::Close { at_once: false });
        for index in 0..self.slots.len() {
            match self.slots[index].state {
                State::Ready { .. } => self.finish_queue(index, now),
                State::Starting { .. } | State::Backoff { .. } if success => {} // the reply to Close decides
                State::Starting { .. }
                | State::Backoff { .. }
                | State::Empty
                | State::Draining { .. }
                | State::Killing { .. } => self.drain(index, now),
            }
        }
    }

    /// Asks a ready process to exit while the server is stopping. The process first accepts the queued connections.
    pub(super) fn finish_queue(&mut self, index: usize, now: Uptime) {
        self.slots[index].serves_queue = true;
        self.drain(index, now);
    }

    /// Handles the state of the queues while the server is stopping. As long as connections are waiting, processes that
    /// have exited are replaced; when no connection is waiting, starting processes are asked to exit.
    pub(super) fn queue(&mut self, waits: bool, now: Uptime) {
        let Mode::Stopping { queue, .. } = &mut self.mode else { return };
        *queue &= waits;
        let serves = *queue;
        for index in 0..self.slots.len() {
            match self.slots[index].state {
                State::Backoff { until } if serves => {
                    if until <= now && self.breaker.permits(self.is_starting(), now) {
                        self.start(index, self.slots[index].generation, now);
                    }
                }
                State::Starting { .. } | State::Backoff { .. } if !serves => self.drain(index, now),
                State::Starting { .. }
                | State::Backoff { .. }
                | State::Empty
                | State::Ready { .. }
                | State::Draining { .. }
                | State::Killing { .. } => {}
            }
        }
    }

    /// Whether a process that has exited must be replaced.
    pub(super) fn replaces(&self) -> bool {
        match self.mode {
            Mode::Running => true,
            Mode::Stopping { queue, .. } => queue,
            Mode::Stopped => false,
        }
    }

    pub(super) fn halt(&mut self, now: Uptime) {
        self.mode = Mode::Stopping { success: true, until: now, queue: false };
        self.actions.push(Action::Close { at_once: true });
        for index in 0..self.slots.len() {
            self.kill(index);
        }
    }

    pub(super) fn drain(&mut self, index: usize, now: Uptime) {
        match self.slots[index].state {
            State::Starting { pid: Some(pid), .. } | State::Ready { pid } => {
                let deadline = match self.mode {
                    Mode::Stopping { until, .. } => until,
                    Mode::Running | Mode::Stopped => now + self.policy.drain_timeout,
                };
                self.slots[index].state = State::Draining { pid, deadline, ask_again: now + TERMINATE_INTERVAL };
                self.actions.push(Action::Terminate { pid });
            }
            State::Backoff { .. } => self.slots[index].state = State::Empty,
            // Without a pid, the process is being created: the master's loop reports the result of each Spawn before
            // the next event.
            State::Starting { pid: None, .. } | State::Empty | State::Draining { .. } | State::Killing { .. } => {}
        }
    }

    pub(super) fn kill(&mut self, index: usize) {
        match self.slots[index].state {
            State::Starting { pid: Some(pid), .. } | State::Ready { pid } | State::Draining { pid, .. } => {
                self.slots[index].state = State::Killing { pid, unready: false };
                self.actions.push(Action::Kill { pid });
            }
            State::Backoff { .. } => self.slots[index].state = State::Empty,
            State::Starting { pid: None, .. } | State::Empty | State::Killing { .. } => {}
        }
    }

    pub(super) fn finish(&mut self, success: bool) {
        if self.count(|state| *state != State::Empty) == 0 {
            self.mode = Mode::Stopped;
            self.actions.push(Action::Exit { success });
        }
    }
}
