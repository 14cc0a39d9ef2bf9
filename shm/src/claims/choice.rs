//! Chooses the app process that serves the next request.
//!
//! The process with the fewest busy units is chosen; among those, one to which no other gateway keeps a connection, because that connection
//! would have to be closed first; among those, the process that has been idle longest. Every process therefore receives
//! its share of the requests. (If the first process in the table with a free unit were chosen, the first few processes would serve nearly
//! all requests, and would grow.) Between equal processes, the first candidate is chosen, so the caller must not always begin with the same
//! process.
//!
//! Pure: no access to shared memory, and no clock.

/// An app process that has a free unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Candidate {
    pub(crate) process: u32,
    /// Number of units that gateways hold.
    pub(crate) busy: u32,
    /// Whether another gateway keeps a connection that is in the way.
    pub(crate) is_kept_elsewhere: bool,
    /// Time since one of the process's free units was last in use.
    pub(crate) idle_us: u64,
    /// The content of the door.
    pub(crate) door: u64,
    /// A free unit, and its content.
    pub(crate) unit: usize,
    pub(crate) word: u64,
}

/// Chooses one of the candidates.
pub(crate) fn choose(candidates: impl Iterator<Item = Candidate>) -> Option<Candidate> {
    candidates.reduce(|best, next| {
        let rank = |one: &Candidate| (one.busy, one.is_kept_elsewhere, u64::MAX - one.idle_us);
        if rank(&next) < rank(&best) { next } else { best }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidate(process: u32, busy: u32, idle_us: u64) -> Candidate {
        Candidate { process, busy, is_kept_elsewhere: false, idle_us, door: 0, unit: 0, word: 0 }
    }

    fn chosen(candidates: &[Candidate]) -> Option<u32> {
        choose(candidates.iter().copied()).map(|candidate| candidate.process)
    }

    #[test]
    fn the_fewest_busy_units_come_first_then_the_longest_idle_time() {
        assert_eq!(chosen(&[]), None);
        assert_eq!(
            chosen(&[candidate(0, 2, 900), candidate(1, 1, 5), candidate(2, 1, 7), candidate(3, 3, 999)]),
            Some(2)
        );
        assert_eq!(chosen(&[candidate(5, 1, 7), candidate(2, 1, 7)]), Some(5), "between equals, the first");
        let kept = Candidate { is_kept_elsewhere: true, ..candidate(4, 1, 900) };
        assert_eq!(chosen(&[kept, candidate(2, 1, 7), candidate(3, 2, 999)]), Some(2));
        assert_eq!(chosen(&[candidate(3, 2, 999), kept]), Some(4));
    }

    /// Processes with one unit or several, and the requests that they serve.
    struct Simulation {
        random: fastrand::Rng,
        units: usize,
        /// For each process: its unfinished requests, by the time at which they end.
        ends: Vec<Vec<u64>>,
        last_used: Vec<u64>,
        served: Vec<u32>,
        now: u64,
    }

    impl Simulation {
        fn of(seed: u64, processes: usize, units: usize) -> Simulation {
            let random = fastrand::Rng::with_seed(seed);
            let (ends, last_used) = (vec![Vec::new(); processes], vec![0; processes]);
            Simulation { random, units, ends, last_used, served: vec![0; processes], now: 0 }
        }

        fn finish_requests(&mut self) {
            let now = self.now;
            for (ends, last_used) in self.ends.iter_mut().zip(&mut self.last_used) {
                *last_used = ends.iter().copied().filter(|&end| end <= now).fold(*last_used, u64::max);
                ends.retain(|&end| end > now);
            }
        }

        /// Serves one request, if a process has a free unit.
        fn serve(&mut self, start: usize) {
            let count = self.ends.len();
            let order = (0..count).map(|n| (start + n) % count);
            let free = order.filter(|&process| self.ends[process].len() < self.units);
            let candidates: Vec<Candidate> = free
                .map(|process| {
                    let busy = u32::try_from(self.ends[process].len()).unwrap();
                    candidate(u32::try_from(process).unwrap(), busy, self.now - self.last_used[process])
                })
                .collect();
            let Some(best) = choose(candidates.iter().copied()) else { return };
            assert!(candidates.contains(&best), "a process without a free unit was chosen");
            assert!(
                candidates
                    .iter()
                    .all(|other| (best.busy, other.idle_us) <= (other.busy, best.idle_us) || best.busy < other.busy)
            );
            let process = best.process as usize;
            self.served[process] += 1;
            self.ends[process].push(self.now + self.random.u64(1..2000));
        }
    }

    #[test]
    fn every_process_receives_its_share_at_any_load() {
        let seed = fastrand::u64(..);
        for (round, load) in (0..60).zip([5, 20, 60, 90].into_iter().cycle()) {
            let seed = seed.wrapping_add(round);
            let mut random = fastrand::Rng::with_seed(seed);
            let (processes, units) = (random.usize(2..20), [1, 1, 4][random.usize(0..3)]);
            let mut simulation = Simulation::of(seed, processes, units);
            let requests = 400 * processes;
            // A request takes 1000 us on average.
            let pause = 2 * 1000 * 100 / (load * (processes * units) as u64);
            for start in 0..requests {
                simulation.now += simulation.random.u64(0..=pause);
                simulation.finish_requests();
                simulation.serve(start);
            }
            let (min, max) = (simulation.served.iter().min().unwrap(), simulation.served.iter().max().unwrap());
            assert!(*max <= 2 * *min, "seed {seed}, {processes} x {units}, {load} %: {:?}", simulation.served);
        }
    }

    #[test]
    fn processes_that_are_opened_one_after_the_other_do_not_pile_up_requests() {
        // After a rolling restart, all processes are idle, and each became idle at a different time.
        let seed = fastrand::u64(..);
        let mut simulation = Simulation::of(seed, 8, 1);
        simulation.now = 8000;
        simulation.last_used = (0..8).map(|process| process * 1000).collect();
        for _ in 0..4000 {
            // 60 % load: a request takes 1000 us on average.
            simulation.now += simulation.random.u64(0..=2 * 1000 * 100 / (60 * 8));
            simulation.finish_requests();
            simulation.serve(0);
        }
        let (min, max) = (simulation.served.iter().min().unwrap(), simulation.served.iter().max().unwrap());
        assert!(*max <= 2 * *min, "seed {seed}: {:?}", simulation.served);
    }
}
