//! Limits log lines that clients can cause to one per [`APART`], with a count of the events since the previous line.

use std::cell::Cell;
use std::time::{Duration, Instant};

/// Minimum time between two lines.
const APART: Duration = Duration::from_secs(60);

#[derive(Debug, Default)]
pub(crate) struct Throttle {
    unreported: Cell<usize>,
    last_line: Cell<Option<Instant>>,
}

impl Throttle {
    /// Counts `more` events. If a line is due, returns the number of events since the last line.
    pub(crate) fn add(&self, more: usize) -> Option<usize> {
        self.unreported.set(self.unreported.get() + more);
        if self.last_line.get().is_some_and(|line| line.elapsed() < APART) {
            return None;
        }
        self.last_line.set(Some(Instant::now()));
        Some(self.unreported.take())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_is_reported_at_once_and_those_that_follow_are_counted() {
        let throttle = Throttle::default();
        assert_eq!((throttle.add(1), throttle.add(2), throttle.add(1)), (Some(1), None, None));
        throttle.last_line.set(Instant::now().checked_sub(APART));
        assert_eq!((throttle.add(1), throttle.add(1)), (Some(4), None));
    }
}
