//! Detects hanging workers from their rows in the scoreboard, without a system call.
//!
//! An event loop records when it starts work and when it sleeps, and counts its progress. The event loop hangs if five
//! consecutive checks, a quarter of the timeout apart, find it at the same work without progress. The module counts
//! checks instead of measuring time, so that no worker appears to hang after the machine has been suspended.

use std::collections::HashMap;
use std::time::Duration;

use nix::unistd::Pid;

use super::supervisor::Uptime;

/// Number of consecutive checks, after the first one, that must find the worker unchanged.
const LOOKS: u32 = 4;
/// Time between SIGABRT, which makes a hanging worker log its position and terminate, and SIGKILL.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// The state of a worker according to its row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Work {
    /// Start of the event loop's current work; `None` if the loop sleeps, or the worker is exempt.
    pub(crate) since_ms: Option<u64>,
    pub(crate) pulse: u32,
}

#[derive(Debug)]
pub(crate) struct Hangs {
    /// The time after which a worker without progress counts as hanging; zero disables the check.
    timeout: Duration,
    next_look: Uptime,
    seen: HashMap<Pid, (Work, u32)>,
    /// Workers that have been sent SIGABRT, and the time at which to kill them.
    dying: HashMap<Pid, Uptime>,
}

impl Hangs {
    pub(crate) fn new(timeout: Duration) -> Self {
        Self { timeout, next_look: Uptime::ZERO, seen: HashMap::new(), dying: HashMap::new() }
    }

    pub(crate) fn timeout(&self) -> Duration {
        self.timeout
    }

    pub(crate) fn set_timeout(&mut self, timeout: Duration) {
        self.timeout = timeout;
    }

    /// Returns the time at which [`Hangs::is_due`] or [`Hangs::overdue`] next has a result.
    pub(crate) fn next_deadline(&self) -> Option<Uptime> {
        let look = (!self.timeout.is_zero()).then_some(self.next_look);
        self.dying.values().copied().chain(look).min()
    }

    pub(crate) fn is_due(&self, now: Uptime) -> bool {
        !self.timeout.is_zero() && now >= self.next_look
    }

    /// Evaluates the rows of all workers. Returns the workers that hang.
    pub(crate) fn look(&mut self, rows: impl IntoIterator<Item = (Pid, Work)>, now: Uptime) -> Vec<Pid> {
        self.next_look = now + self.timeout / LOOKS;
        let mut before = std::mem::take(&mut self.seen);
        for (pid, work) in rows {
            let same = before.remove(&pid).filter(|(seen, _)| *seen == work && work.since_ms.is_some());
            self.seen.insert(pid, (work, same.map_or(0, |(_, looks)| looks + 1)));
        }
        let dying = &self.dying;
        let hangs = self.seen.iter().filter(|(pid, (_, looks))| *looks >= LOOKS && !dying.contains_key(pid));
        hangs.map(|(&pid, _)| pid).collect()
    }

    /// Records that the worker was sent SIGABRT.
    pub(crate) fn told_to_die(&mut self, pid: Pid, now: Uptime) {
        self.dying.insert(pid, now + LAST_WORDS);
    }

    /// Returns workers that should be dead by now. A worker that stays alive is returned again later.
    pub(crate) fn overdue(&mut self, now: Uptime) -> Vec<Pid> {
        let overdue = self.dying.iter_mut().filter(|(_, until)| **until <= now);
        overdue
            .map(|(&pid, until)| {
                *until = now + LAST_WORDS;
                pid
            })
            .collect()
    }

    /// Records the death of a worker. Returns true if the worker had been sent SIGABRT.
    pub(crate) fn ended(&mut self, pid: Pid) -> bool {
        self.seen.remove(&pid);
        self.dying.remove(&pid).is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMEOUT: Duration = Duration::from_secs(30);

    fn pid(number: i32) -> Pid {
        Pid::from_raw(number)
    }

    #[test]
    fn a_worker_that_makes_progress_or_sleeps_hangs_in_no_history() {
        for seed in 0..500 {
            let mut random = fastrand::Rng::with_seed(seed);
            let mut hangs = Hangs::new(TIMEOUT);
            let mut now = Duration::from_secs(random.u64(1..1000));
            let mut work: Vec<Work> = vec![Work { since_ms: None, pulse: 0 }; 8];
            // Number of times that each worker was seen at the same work.
            let mut stuck = [0_u32; 8];
            for _ in 0..300 {
                now += Duration::from_millis(random.u64(0..20_000));
                for (index, work) in work.iter_mut().enumerate() {
                    let before = *work;
                    match random.u32(0..12) {
                        0 => work.since_ms = None,
                        1 => work.since_ms = Some(random.u64(1..1_000_000)),
                        2 => work.pulse = work.pulse.wrapping_add(1),
                        _ => {}
                    }
                    if *work != before || work.since_ms.is_none() {
                        stuck[index] = 0;
                    }
                }
                if !hangs.is_due(now) {
                    continue;
                }
                let rows = (1..).zip(&work).map(|(number, work)| (pid(number), *work));
                let mut found = hangs.look(rows, now);
                found.sort_unstable();
                let expected = (1..).zip(work.iter().zip(&stuck));
                let expected = expected.filter(|(_, (work, stuck))| work.since_ms.is_some() && **stuck > LOOKS - 1);
                let expected: Vec<Pid> = expected.map(|(number, _)| pid(number)).collect();
                assert!(found.iter().all(|pid| expected.contains(pid)), "seed {seed}: {found:?} {expected:?}");
                stuck.iter_mut().for_each(|looks| *looks += 1);
            }
        }
    }

    #[test]
    fn a_hang_is_found_after_the_timeout_and_its_worker_killed_a_second_later() {
        let mut hangs = Hangs::new(TIMEOUT);
        let work = Work { since_ms: Some(17), pulse: 4 };
        let mut looks = 0;
        let found = loop {
            let now = hangs.next_deadline().unwrap();
            assert!(hangs.is_due(now));
            let found = hangs.look([(pid(7), work)], now);
            looks += 1;
            if !found.is_empty() {
                assert!(now >= TIMEOUT && now < TIMEOUT * 2, "{now:?}");
                hangs.told_to_die(pid(7), now);
                break found;
            }
        };
        assert_eq!((found, looks), (vec![pid(7)], 5));
        let now = hangs.next_deadline().unwrap();
        assert_eq!(hangs.look([(pid(7), work)], now), [], "it was already returned");
        assert_eq!(hangs.overdue(now), [pid(7)]);
        assert_eq!(hangs.overdue(now), []);
        assert!(hangs.ended(pid(7)) && !hangs.ended(pid(7)));
        assert_eq!(Hangs::new(Duration::ZERO).next_deadline(), None);
    }

    #[test]
    fn no_worker_hangs_because_the_machine_was_suspended() {
        let mut hangs = Hangs::new(TIMEOUT);
        let work = Work { since_ms: Some(17), pulse: 4 };
        assert_eq!(hangs.look([(pid(7), work)], Duration::from_secs(1)), []);
        assert_eq!(hangs.look([(pid(7), work)], Duration::from_secs(100_000)), []);
    }
}
