//! How many workers there should be, between two limits: demand in, a number out.
//!
//! - Needed is a worker for each `per_worker` requests that are served or wait, and one more to meet the next one.
//! - Too few: 1, 2, 4, … up to 32 more a sample; the rate begins anew when there are enough. If nothing waits yet, the
//!   second sample in a row decides.
//! - Too many: each worker, counted from the first, remembers when it was last needed. The last one leaves when that is
//!   `after` ago, one a sample.
//! - No flapping: if a worker is wanted again soon after one was let go, `after` doubles, up to eightfold, and comes back
//!   by halves in quiet times.
//! - With a lower limit of 0 the last worker leaves too, when it has no connections, which nobody could take over; the next
//!   connection brings it back.

use std::time::Duration;

use super::Now;
use super::messages::Demand;

/// How often demand is looked at, when there is some and when there is none.
const BUSY: Duration = Duration::from_millis(250);
const QUIET: Duration = Duration::from_secs(1);
/// The most workers that are added at a time.
const RATE: u32 = 32;
const PENALTY: u32 = 8;
/// In so many times `after` without regret, the penalty halves.
const FORGIVEN: u32 = 10;
/// How often it is said that the most workers are not enough.
const LOG_INTERVAL: Duration = Duration::from_secs(60);

/// Decides the number.
#[derive(Debug)]
pub(super) struct Scaler {
    min: u32,
    max: u32,
    per_worker: u32,
    after: Duration,
    /// How many are added at once, the next time.
    rate: u32,
    /// The last sample found too few.
    pressed: bool,
    /// When the worker of this rank was last needed.
    needed_at: Vec<Now>,
    penalty: u32,
    /// Since when the penalty is what it is.
    penalty_since: Now,
    lowered_at: Option<Now>,
    sample_at: Now,
    said_saturated: Option<Now>,
}

/// What a sample led to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Verdict {
    pub(super) target: u32,
    /// There is more to do than the most workers can do.
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
            penalty_since: Now::ZERO,
            lowered_at: None,
            sample_at: Now::ZERO,
            said_saturated: None,
        }
    }

    pub(super) fn limits(&self) -> (u32, u32) {
        (self.min, self.max)
    }

    pub(super) fn set_pace(&mut self, per_worker: u32, after: Duration) {
        (self.per_worker, self.after) = (per_worker.max(1), after);
    }

    /// Sets other limits, and returns the number within them.
    pub(super) fn set_limits(&mut self, (min, max): (u32, u32), target: u32, now: Now) -> u32 {
        (self.min, self.max) = (min, max.max(min));
        let target = target.clamp(self.min, self.max);
        // What the operator asked for is not taken back at once.
        self.need(target, now);
        target
    }

    /// When to look at demand; `None` if there is nothing to decide by it.
    pub(super) fn sample_at(&self, target: u32) -> Option<Now> {
        (self.min < self.max && target > 0).then_some(self.sample_at)
    }

    /// Puts off the next sample: one is on its way.
    pub(super) fn sampled(&mut self, now: Now) {
        self.sample_at = now + BUSY;
    }

    /// A connection has come while there was no worker.
    pub(super) fn arrival(&mut self, now: Now) -> u32 {
        self.sample_at = now + BUSY;
        self.regret(now);
        self.need(1, now);
        1.min(self.max)
    }

    /// `may_grow`: processes that are started do get ready.
    pub(super) fn decide(&mut self, demand: &Demand, target: u32, may_grow: bool, now: Now) -> Verdict {
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

    fn need(&mut self, needed: u32, now: Now) {
        let needed = needed as usize;
        self.needed_at.resize(self.needed_at.len().max(needed), now);
        self.needed_at[..needed].fill(now);
    }

    /// Workers are added: if one was let go a short time ago, that was a mistake.
    fn regret(&mut self, now: Now) {
        let soon = self.after.saturating_mul(self.penalty);
        if self.lowered_at.take().is_some_and(|at| now.saturating_sub(at) < soon) {
            self.penalty = (self.penalty * 2).min(PENALTY);
            self.penalty_since = now;
        }
    }

    fn forgive(&mut self, now: Now) {
        if self.penalty > 1 && now.saturating_sub(self.penalty_since) >= self.after.saturating_mul(FORGIVEN) {
            self.penalty /= 2;
            self.penalty_since = now;
        }
    }

    /// Whether there are as many workers as there may be, all of them are at work, and others wait.
    fn is_saturated(&mut self, demand: &Demand, target: u32, now: Now) -> bool {
        let said = self.said_saturated.is_some_and(|at| now.saturating_sub(at) < LOG_INTERVAL);
        let all_work = target >= self.max && demand.in_flight >= self.max.saturating_mul(self.per_worker);
        let saturated = all_work && demand.waiting > 0 && !said;
        if saturated {
            self.said_saturated = Some(now);
        }
        saturated
    }
}
