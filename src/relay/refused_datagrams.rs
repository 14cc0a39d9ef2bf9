//! Reports datagrams that were not published: at most one line a second, with the number of datagrams since the line
//! before.
//!
//! No I/O and no clock.

use std::fmt::Display;
use std::time::Duration;

/// Minimum time between two lines.
const LOG_INTERVAL: Duration = Duration::from_secs(1);

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

    /// Time until the next line is due, if nothing more happens.
    pub(super) fn due_in(&self, now: Duration) -> Option<Duration> {
        (self.unreported > 0).then(|| self.not_before.saturating_sub(now))
    }

    /// Returns the line if it is due.
    pub(super) fn take(&mut self, now: Duration) -> Option<String> {
        self.due_in(now).filter(Duration::is_zero)?;
        self.not_before = now + LOG_INTERVAL;
        let unreported = std::mem::take(&mut self.unreported);
        Some(format!("datagrams not published count={unreported} total={} last={:?}", self.total, self.last))
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
        assert_eq!(complaints.take(ms(5)).unwrap(), "datagrams not published count=1 total=1 last=\"one\"");
        for _ in 0..1000 {
            complaints.add("a \"line\"\n");
        }
        assert_eq!((complaints.due_in(ms(6)), complaints.take(ms(6))), (Some(ms(999)), None));
        let line = complaints.take(ms(1005)).unwrap();
        assert_eq!(line, "datagrams not published count=1000 total=1001 last=\"a \\\"line\\\"\\n\"");
        assert_eq!((complaints.due_in(ms(9000)), complaints.take(ms(9000))), (None, None));
    }
}
