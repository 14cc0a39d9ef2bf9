//! Detects damage to the shared memory: a process may have overwritten the memory or truncated its file. The check runs
//! once a second and logs damage once; the next reload replaces the memory.
//!
//! The workers continue to serve, because they do not trust values in the memory that could harm them. But pages are
//! not cached, events are not delivered, and the scoreboard is not available. The new generation uses new memory; the
//! old workers keep theirs until they have exited.
//!
//! This module must not take a lock in the memory, or write to it.

use std::time::Duration;

use forkyard_shm::Segment;

use super::pool::supervisor::Uptime;
use super::{Master, memory};
use crate::startup::systemd;

const CHECK_INTERVAL: Duration = Duration::from_secs(1);

#[derive(Debug, Default)]
pub(super) struct Damage {
    looked_at: Uptime,
    found: Option<&'static str>,
    /// The number of times that a part of the memory was emptied because it was inconsistent.
    restarts: u64,
}

impl Damage {
    pub(super) fn new(segment: &Segment) -> Self {
        Self { restarts: segment.restarts(), ..Self::default() }
    }

    pub(super) fn next_deadline(&self) -> Option<Uptime> {
        self.found.is_none().then(|| self.looked_at + CHECK_INTERVAL)
    }

    /// Checks the memory, and logs what it finds.
    fn look(&mut self, segment: &Segment, now: Uptime) {
        self.looked_at = now;
        if self.found.is_some() {
            return;
        }
        self.found = segment.damage();
        if let Some(why) = self.found {
            log::error!(
                "the shared memory is damaged: {why}; a process overwrote it or truncated its file (FORKYARD_SHM, \
                 --cache-file, or a wild pointer). Requests are still answered, but pages are not cached and events \
                 are not delivered until a reload replaces the memory (find that process, then reload)"
            );
            return;
        }
        let before = std::mem::replace(&mut self.restarts, segment.restarts());
        let count = self.restarts.wrapping_sub(before);
        if count > 0 {
            log::error!(
                count;
                "parts of the shared memory were inconsistent and have been emptied: a process that has the memory \
                 mapped may be writing to the wrong addresses"
            );
        }
    }
}

impl Master {
    pub(super) fn check_memory_damage(&mut self) {
        let now = self.now();
        if self.damage.next_deadline().is_some_and(|deadline| now >= deadline) {
            self.damage.look(&self.pool.spawner.segment, now);
        }
    }

    /// Returns the reason, for the operator, why the shared memory must not be used, or `None` if it is not damaged.
    pub(super) fn why_not_use_memory(&self) -> Option<String> {
        let why = self.pool.spawner.segment.damage()?;
        Some(format!(
            "the shared memory is damaged: {why}; a process overwrote it or truncated its file (a reload replaces it)"
        ))
    }

    /// Replaces damaged memory for new processes. Returns the message for the operator, if any.
    pub(super) fn replace_damaged_memory(&mut self) -> Option<String> {
        let why = self.pool.spawner.segment.damage()?;
        let config = &self.pool.spawner.config;
        let segment = match memory::renew(config) {
            Ok(segment) => segment,
            Err(error) => {
                let text = format!(
                    "cannot replace the damaged shared memory ({why}): {error} (stop and start the server instead)"
                );
                log::error!("{text}");
                return Some(text);
            }
        };
        if memory::is_worth_storing(config) {
            self.notify.store(systemd::SEGMENT, segment.fd());
        }
        self.pool.scoreboard = segment.scoreboard();
        self.pool.faults.move_to(segment.quarantine(), self.begun.elapsed());
        self.sidecars.move_to(segment.clone());
        self.pool.spawner.segment = segment;
        self.relay.renew(self.begun.elapsed());
        self.renew_guard(); // the old guard still has the memory that existed when it was forked
        self.damage = Damage { looked_at: self.begun.elapsed(), ..Damage::new(&self.pool.spawner.segment) };
        let text = format!(
            "replaced the damaged shared memory ({why}): the cache starts empty, and subscribers receive a gap"
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
    fn sound_memory_is_checked_once_a_second_and_never_found_damaged() {
        let segment = Segment::create(&Plan { rows: 1, ..Plan::default() }).unwrap();
        let mut damage = Damage::new(&segment);
        for second in 1..4 {
            assert_eq!(damage.next_deadline(), Some(CHECK_INTERVAL * second));
            damage.look(&segment, CHECK_INTERVAL * second);
            assert_eq!((damage.found, damage.restarts), (None, segment.restarts()));
        }
    }
}
