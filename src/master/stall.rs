//! Decides from periodic checks whether a process makes progress while work is waiting for it.
//!
//! Must not do I/O or read a clock: the caller passes in the observations.

use std::time::Duration;

use super::pool::supervisor::Uptime;

/// Time until the next check: the first value if the last check found no work waiting, the second if it found some.
const APART: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(1));
/// Number of consecutive checks after which a process counts as stalled, if each of them finds work waiting and `work`
/// unchanged since the previous check.
const LOOKS: u32 = 3;

#[derive(Debug)]
pub(super) struct Stall {
    next_look: Uptime,
    /// The work count at the last check, if work was waiting then.
    work: Option<u64>,
    in_vain: u32,
}

impl Stall {
    pub(super) fn new(now: Uptime) -> Self {
        Self { next_look: now + APART.0, work: None, in_vain: 0 }
    }

    pub(super) fn next_look(&self) -> Uptime {
        self.next_look
    }

    /// Records a check. `work` is a number that changes whenever the process does something, or `None` if that number
    /// is unknown. Returns true if the process is stalled.
    pub(super) fn look(&mut self, now: Uptime, something_waits: bool, work: Option<u64>) -> bool {
        self.next_look = now + if something_waits { APART.1 } else { APART.0 };
        let work = work.filter(|_| something_waits);
        self.in_vain = if work.is_some() && self.work == work { self.in_vain + 1 } else { 0 };
        self.work = work;
        self.in_vain >= LOOKS
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns the index and the time of the check at which the process is found to be stalled.
    fn stalled_at(looks: &[(bool, Option<u64>)]) -> Option<(usize, Uptime)> {
        let mut stall = Stall::new(Duration::ZERO);
        looks.iter().enumerate().find_map(|(index, &(something_waits, work))| {
            let now = stall.next_look();
            stall.look(now, something_waits, work).then_some((index, now))
        })
    }

    #[test]
    fn a_process_that_does_nothing_while_work_waits_is_stalled() {
        let waits = (true, Some(7));
        assert_eq!(stalled_at(&[waits; 9]), Some((3, Duration::from_secs(8))));
        assert_eq!(stalled_at(&[(false, Some(7)); 9]), None, "no work waits");
        assert_eq!(stalled_at(&[(true, None); 9]), None, "its work is unknown");
        let works: Vec<_> = (0..9).map(|work| (true, Some(work))).collect();
        assert_eq!(stalled_at(&works), None);
        assert_eq!(
            stalled_at(&[waits, waits, waits, (false, Some(7)), waits, waits, waits]),
            None,
            "all work was accepted"
        );
        assert_eq!(
            stalled_at(&[waits, waits, waits, (true, Some(8)), waits, waits, waits]),
            None,
            "it works now and then"
        );
    }
}
