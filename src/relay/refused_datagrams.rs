//! Reports datagrams that were not published, with at most one line a second. Each line contains the number of
//! datagrams since the previous line.
//!
//! No I/O and no clock.

use std::fmt::Display;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Minimum time between two lines.
const LOG_INTERVAL: Duration = Duration::from_secs(1);

/// The relay's report about datagrams, as a line of JSON to the master.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct RefusedDatagrams {
    /// Number of datagrams since the previous report.
    pub(crate) count: u64,
    /// Number of datagrams since the relay was started.
    pub(crate) total: u64,
    /// Why the last of these datagrams was not published.
    pub(crate) last: String,
}

/// The datagrams that have not been reported yet. All times are relative to one arbitrary start.
#[derive(Debug, Default)]
pub(super) struct Complaints {
    unreported: u64,
    total: u64,
    last: String,
    not_before: Duration,
}

impl Complaints {
    /// Counts a datagram that was not published.
    pub(super) fn add(&mut self, why: impl Display) {
        self.unreported += 1;
        self.total += 1;
        self.last = why.to_string();
    }

    /// Returns the time until the next line is due, if no further datagram is refused.
    pub(super) fn due_in(&self, now: Duration) -> Option<Duration> {
        (self.unreported > 0).then(|| self.not_before.saturating_sub(now))
    }

    /// Returns the report if it is due.
    pub(super) fn take(&mut self, now: Duration) -> Option<RefusedDatagrams> {
        self.due_in(now).filter(Duration::is_zero)?;
        self.not_before = now + LOG_INTERVAL;
        let count = std::mem::take(&mut self.unreported);
        Some(RefusedDatagrams { count, total: self.total, last: std::mem::take(&mut self.last) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_is_told_at_once_and_those_that_follow_together() {
        let ms = Duration::from_millis;
        let mut complaints = Complaints::default();
        assert_eq!((complaints.due_in(ms(5)), complaints.take(ms(5))), (None, None));
        complaints.add("one");
        assert_eq!(complaints.due_in(ms(5)), Some(Duration::ZERO));
        assert_eq!(complaints.take(ms(5)), Some(RefusedDatagrams { count: 1, total: 1, last: "one".to_owned() }));
        for _ in 0..1000 {
            complaints.add("a \"line\"\n");
        }
        assert_eq!((complaints.due_in(ms(6)), complaints.take(ms(6))), (Some(ms(999)), None));
        let last = "a \"line\"\n".to_owned();
        assert_eq!(complaints.take(ms(1005)), Some(RefusedDatagrams { count: 1000, total: 1001, last }));
        assert_eq!((complaints.due_in(ms(9000)), complaints.take(ms(9000))), (None, None));
    }
}
