//! Limits how fast processes are started: the circuit breaker limits restarts of processes that fail to start, and the
//! token bucket those of processes that die while they are serving.

use std::time::Duration;

use super::Uptime;

/// First and longest delay of the breaker.
const MIN_BACKOFF: Duration = Duration::from_millis(100);
const MAX_BACKOFF: Duration = Duration::from_secs(30);

/// A circuit breaker. It opens when a process dies before it is ready, each time for twice as long; after that time, a
/// single process may be tried.
#[derive(Debug, Default)]
pub(in crate::master) struct Breaker {
    /// Number of consecutive processes that died before they were ready.
    failures: u32,
    /// No process is spawned before this time.
    open_until: Uptime,
    /// When the first of these consecutive processes died.
    since: Option<Uptime>,
}

impl Breaker {
    pub(in crate::master) fn open_until(&self) -> Uptime {
        self.open_until
    }

    /// Whether a process may be spawned. `trying` is true if another process is starting.
    pub(super) fn permits(&self, trying: bool, now: Uptime) -> bool {
        now >= self.open_until && !(self.failures > 0 && trying)
    }

    pub(super) fn is_failing(&self) -> bool {
        self.failures > 0
    }

    pub(super) fn failing_since(&self) -> Option<Uptime> {
        self.since
    }

    /// Resets the breaker, because a process has become ready or the operator has requested a reload.
    pub(in crate::master) fn close(&mut self) {
        *self = Self::default();
    }

    /// Records a failure. Returns the number of consecutive failures and the delay, or `None` if the failure belongs to
    /// the previous one.
    pub(in crate::master) fn fail(&mut self, now: Uptime) -> Option<(u32, Duration)> {
        if now < self.open_until {
            return None; // a sibling that was started at the same time has failed
        }
        self.failures = self.failures.saturating_add(1);
        self.since.get_or_insert(now);
        let delay = MIN_BACKOFF.saturating_mul(1 << (self.failures - 1).min(16)).min(MAX_BACKOFF);
        self.open_until = now + delay;
        Some((self.failures, delay))
    }
}

/// A token bucket that permits a burst of `rate` restarts, and then `rate` restarts per second.
#[derive(Debug)]
pub(super) struct TokenBucket {
    rate: u32,
    /// When the bucket would be full if no more tokens were taken.
    full_at: Uptime,
}

impl TokenBucket {
    pub(super) fn full(rate: u32) -> Self {
        Self { rate: rate.max(1), full_at: Uptime::ZERO }
    }

    pub(super) fn set_rate(&mut self, rate: u32) {
        self.rate = rate.max(1);
    }

    /// Takes one token. If no token is available, returns the time at which one will be.
    pub(super) fn take(&mut self, now: Uptime) -> Option<Uptime> {
        self.full_at = self.full_at.max(now) + Duration::from_secs(1) / self.rate;
        let due = self.full_at.saturating_sub(Duration::from_secs(1));
        (due > now).then_some(due)
    }
}
