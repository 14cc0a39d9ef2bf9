//! Shared memory that a process has written over, or whose file it has truncated: noticed once a second, told once, and
//! replaced by the next reload.
//!
//! The workers go on by themselves: of what lies there they believe nothing that could harm them. But pages are not
//! cached, events are not delivered, and the scoreboard says nothing. The new generation gets new memory; the old workers keep
//! theirs until they have left.
//!
//! May not: lock anything there, or write to it.

use std::time::Duration;

use forkyard_shm::Segment;

use super::supervisor::Now;
use super::{Master, memory};
use crate::startup::systemd;

const CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// What is known of the memory.
#[derive(Debug, Default)]
pub(super) struct Damage {
    looked_at: Now,
    found: Option<&'static str>,
    /// Parts that were emptied because they contradicted themselves.
    restarts: u64,
}

impl Damage {
    pub(super) fn new(segment: &Segment) -> Self {
        Self { restarts: segment.restarts(), ..Self::default() }
    }

    pub(super) fn next_deadline(&self) -> Option<Now> {
        self.found.is_none().then(|| self.looked_at + CHECK_INTERVAL)
    }

    /// Looks, and returns what is to be told.
    fn look(&mut self, segment: &Segment, now: Now) -> Option<String> {
        self.looked_at = now;
        if self.found.is_some() {
            return None;
        }
        self.found = segment.damage();
        if let Some(why) = self.found {
            return Some(format!(
                "the shared memory is damaged: {why}; some process wrote over it or truncated its file (FORKYARD_SHM, \
                 --cache-file, or a wild pointer). Requests are answered, but pages are not cached and events not \
                 delivered until new memory takes its place: find that process, and then reload"
            ));
        }
        let before = std::mem::replace(&mut self.restarts, segment.restarts());
        let emptied = self.restarts.wrapping_sub(before);
        (emptied > 0).then(|| {
            format!(
                "parts of the shared memory contradicted themselves and were emptied count={emptied}: some process that has \
                 it may write where it should not"
            )
        })
    }
}

impl Master {
    /// Looks whether the shared memory is still what it was.
    pub(super) fn check_memory_damage(&mut self) {
        let now = self.now();
        if self.damage.next_deadline().is_some_and(|deadline| now >= deadline)
            && let Some(what) = self.damage.look(&self.spawner.segment, now)
        {
            log::error!("{what}");
        }
    }

    /// Why nobody should use the shared memory, in words for the operator.
    pub(super) fn why_not_use_memory(&self) -> Option<String> {
        let why = self.spawner.segment.damage()?;
        Some(format!(
            "the shared memory is damaged: {why}; some process wrote over it or truncated its file (a reload replaces it)"
        ))
    }

    /// Gives the processes to come new memory if that of those before is damaged. Returns what is to be told.
    pub(super) fn replace_damaged_memory(&mut self) -> Option<String> {
        let why = self.spawner.segment.damage()?;
        let config = &self.spawner.config;
        let segment = match memory::renew(config) {
            Ok(segment) => segment,
            Err(error) => {
                let text =
                    format!("the shared memory is damaged ({why}) and stays so: {error} (stop and start instead)");
                log::error!("{text}");
                return Some(text);
            }
        };
        if memory::is_worth_storing(config) {
            self.notify.store(systemd::SEGMENT, segment.fd());
        }
        self.scoreboard = segment.scoreboard();
        self.faults.move_to(segment.quarantine(), self.begun.elapsed());
        self.sidecars.move_to(segment.clone());
        self.spawner.segment = segment;
        self.relay.renew(self.begun.elapsed());
        self.renew_guard(); // it holds on to the memory that was there when it was forked
        self.damage = Damage { looked_at: self.begun.elapsed(), ..Damage::new(&self.spawner.segment) };
        let text = format!(
            "the shared memory was damaged ({why}), and new memory takes its place: the cache starts empty, and \
             subscribers see a gap"
        );
        log::warn!("{text}");
        Some(text)
    }
}

#[cfg(test)]
mod tests {
    use forkyard_shm::Plan;

    use super::*;

    #[test]
    fn sound_memory_is_looked_at_once_a_second_and_nothing_is_told() {
        let segment = Segment::create(&Plan { rows: 1, ..Plan::default() }).unwrap();
        let mut damage = Damage::new(&segment);
        for second in 1..4 {
            assert_eq!(damage.next_deadline(), Some(CHECK_INTERVAL * second));
            assert_eq!(damage.look(&segment, CHECK_INTERVAL * second), None);
        }
    }
}
