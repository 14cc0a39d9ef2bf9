//! Decides how many workers there should be, between two limits, from samples of the demand.
//!
//! - Workers needed: one for each `per_worker` requests that are in flight or waiting, and one more for the next
//!   request.
//! - Too few workers: add 1, 2, 4, … up to 32 workers per sample; the rate returns to 1 when there are enough workers.
//!   If no connection is waiting yet, workers are added only when two consecutive samples find too few.
//! - Too many workers: for each rank (first worker, second worker, …), the time at which a worker of this rank was last
//!   needed is recorded. When the worker of the highest rank has not been needed for `after`, one worker is removed per
//!   sample.
//! - No flapping: if another worker is needed soon after one was removed, `after` doubles, up to eight times its value.
//!   It halves again if no removal turns out to be a mistake for some time.
//! - If the lower limit is 0, the last worker is removed too, but only when it has no connections, because no other
//!   worker could take them over. The next connection starts a worker again.

use std::time::Duration;

use super::Uptime;
use super::messages::Demand;

/// Sample intervals with and without demand.
const BUSY: Duration = Duration::from_millis(250);
const QUIET: Duration = Duration::from_secs(1);
/// Maximum number of workers that are added at a time.
const RATE: u32 = 32;
const PENALTY: u32 = 8;
/// The penalty (the factor of `after`) halves if no removal was a mistake for this many times `after`.
const FORGIVEN: u32 = 10;
/// Minimum interval between two reports that the maximum number of workers is not enough.
const LOG_INTERVAL: Duration = Duration::from_secs(60);

/// Computes the number of workers.
#[derive(Debug)]
pub(super) struct Scaler {
    min: u32,
    max: u32,
    per_worker: u32,
    after: Duration,
    /// Number of workers that are added next time.
    rate: u32,
    /// Whether the last sample found too few workers.
    pressed: bool,
    /// For each rank, when a worker of that rank was last needed.
    needed_at: Vec<Uptime>,
    penalty: u32,
    /// When the penalty last changed.
    penalty_since: Uptime,
    lowered_at: Option<Uptime>,
    sample_at: Uptime,
    /// When demand was last reported to exceed the maximum number of workers.
    said_saturated: Option<Uptime>,
}

/// The result of a sample.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Verdict {
    pub(super) target: u32,
    /// Whether demand exceeds what the maximum number of workers can serve.
    pub(super) is_saturated: bool,
}

impl Scaler {
    pub(super) fn new((min, max): (u32, u32), per_worker: u32, after: Duration) -> Self {
        Self {
            min,
            max: max.max(min),
            per_worker: per_worker.max(1),
            after,
            rate: 1,
            pressed: false,
            needed_at: Vec::new(),
            penalty: 1,
            penalty_since: Uptime::ZERO,
            lowered_at: None,
            sample_at: Uptime::ZERO,
            said_saturated: None,
        }
    }

    pub(super) fn limits(&self) -> (u32, u32) {
        (self.min, self.max)
    }

    pub(super) fn set_pace(&mut self, per_worker: u32, after: Duration) {
        (self.per_worker, self.after) = (per_worker.max(1), after);
    }

    /// Sets new limits. Returns the target, adjusted to these limits.
    pub(super) fn set_limits(&mut self, (min, max): (u32, u32), target: u32, now: Uptime) -> u32 {
        (self.min, self.max) = (min, max.max(min));
        let target = target.clamp(self.min, self.max);
        // Prevents the operator's choice from being undone immediately.
        self.need(target, now);
        target
    }

    /// Returns the time of the next sample, or `None` if the number of workers cannot change.
    pub(super) fn sample_at(&self, target: u32) -> Option<Uptime> {
        (self.min < self.max && target > 0).then_some(self.sample_at)
    }

    /// Postpones the next sample, because one is being taken.
    pub(super) fn sampled(&mut self, now: Uptime) {
        self.sample_at = now + BUSY;
    }

    /// Handles a connection that arrived while there was no worker. Returns the target.
    pub(super) fn arrival(&mut self, now: Uptime) -> u32 {
        self.sample_at = now + BUSY;
        self.regret(now);
        self.need(1, now);
        1.min(self.max)
    }

    /// Evaluates a sample. `may_grow` is true if processes that are started do become ready.
    pub(super) fn decide(&mut self, demand: &Demand, target: u32, may_grow: bool, now: Uptime) -> Verdict {
        let requests = demand.in_flight.saturating_add(demand.waiting);
        let at_work = requests.div_ceil(self.per_worker).max(u32::try_from(demand.busy.len()).unwrap_or(u32::MAX));
        let spare = u32::from(at_work > 0);
        let needed = at_work.saturating_add(spare).max(u32::from(demand.connections > 0)).clamp(self.min, self.max);
        self.sample_at = now + if at_work > 0 || target > self.min { BUSY } else { QUIET };
        self.need(needed, now);
        self.forgive(now);
        let is_saturated = self.is_saturated(demand, target, now);
        let mut verdict = Verdict { target, is_saturated };
        if needed > target {
            if (self.pressed || demand.waiting > 0) && may_grow {
                verdict.target = target + self.rate.min(needed - target);
                self.rate = (self.rate * 2).min(RATE);
                self.regret(now);
            }
            self.pressed = true;
            return verdict;
        }
        (self.rate, self.pressed) = (1, false);
        let last = target.checked_sub(1).and_then(|rank| self.needed_at.get(rank as usize));
        let idle = last.map_or(now, |&last| now.saturating_sub(last));
        if target > needed && idle >= self.after.saturating_mul(self.penalty) {
            verdict.target = target - 1;
            self.lowered_at = Some(now);
        }
        verdict
    }

    fn need(&mut self, needed: u32, now: Uptime) {
        let needed = needed as usize;
        self.needed_at.resize(self.needed_at.len().max(needed), now);
        self.needed_at[..needed].fill(now);
    }

    /// Records that workers are added. If a worker was removed shortly before, its removal was a mistake.
    fn regret(&mut self, now: Uptime) {
        let soon = self.after.saturating_mul(self.penalty);
        if self.lowered_at.take().is_some_and(|at| now.saturating_sub(at) < soon) {
            self.penalty = (self.penalty * 2).min(PENALTY);
            self.penalty_since = now;
        }
    }

    fn forgive(&mut self, now: Uptime) {
        if self.penalty > 1 && now.saturating_sub(self.penalty_since) >= self.after.saturating_mul(FORGIVEN) {
            self.penalty /= 2;
            self.penalty_since = now;
        }
    }

    /// Whether the maximum number of workers is reached, all of them are working, and connections are waiting.
    fn is_saturated(&mut self, demand: &Demand, target: u32, now: Uptime) -> bool {
        let said = self.said_saturated.is_some_and(|at| now.saturating_sub(at) < LOG_INTERVAL);
        let all_work = target >= self.max && demand.in_flight >= self.max.saturating_mul(self.per_worker);
        let saturated = all_work && demand.waiting > 0 && !said;
        if saturated {
            self.said_saturated = Some(now);
        }
        saturated
    }
}
