//! Limits log lines that clients can cause to one per [`APART`], with a count of the events in
//! between.

use std::cell::Cell;
use std::time::{Duration, Instant};

/// Minimum time between two lines.
const APART: Duration = Duration::from_secs(60);

#[derive(Debug, Default)]
pub(crate) struct Throttle {
    untold: Cell<usize>,
    last_told: Cell<Option<Instant>>,
}

impl Throttle {
    /// Counts `more` events. If a line is due, returns the number of events since the last line.
    pub(crate) fn add(&self, more: usize) -> Option<usize> {
        self.untold.set(self.untold.get() + more);
        if self.last_told.get().is_some_and(|told| told.elapsed() < APART) {
            return None;
        }
        self.last_told.set(Some(Instant::now()));
        Some(self.untold.take())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_is_told_at_once_and_those_that_follow_are_counted() {
        let throttle = Throttle::default();
        assert_eq!((throttle.add(1), throttle.add(2), throttle.add(1)), (Some(1), None, None));
        throttle.last_told.set(Instant::now().checked_sub(APART));
        assert_eq!((throttle.add(1), throttle.add(1)), (Some(4), None));
    }
}
