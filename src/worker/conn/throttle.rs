//! Lines of the log that clients can cause: one now and then, in which the others are counted.

use std::cell::Cell;
use std::time::{Duration, Instant};

/// Lines are so far apart.
const APART: Duration = Duration::from_secs(60);

#[derive(Debug, Default)]
pub(crate) struct Throttle {
    untold: Cell<usize>,
    last_told: Cell<Option<Instant>>,
}

impl Throttle {
    /// So many more have happened. If it is time for a line, how many that were since the last one.
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
