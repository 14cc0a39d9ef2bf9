//! Checks that a shard is consistent. Used in tests, and after the death of a process that may have corrupted the memory.
//!
//! The audit walks the logs from floor to head, then all slots, and compares the result with the accounting. Each slot must lead to a
//! record in a log, and no two slots may lead to the same record. This shows that no entry is lost or counted twice.
//!
//! Must not change anything.

use std::collections::HashSet;
use std::sync::atomic::Ordering;

use super::index::{Place, Ring};
use super::shard::{Books, Corrupt, LockedShard, NotLocked};
use crate::cache::Cache;

impl Cache {
    /// Locks one shard after another and checks that each is consistent.
    ///
    /// # Errors
    /// Returns a description of the first shard that is inconsistent or could not be locked.
    pub fn audit(&self) -> Result<(), String> {
        for shard in self.shards() {
            let checked = match shard.lock() {
                Ok(locked) => audit(&locked, |key| self.key(key).hash),
                Err(NotLocked) => Err("could not be locked".to_owned()),
            };
            checked.map_err(|why| format!("shard {} {why}", shard.number))?;
        }
        Ok(())
    }
}

/// Checks one shard. `hash_of` computes the hash under which keys were stored.
fn audit(shard: &LockedShard<'_>, hash_of: impl Fn(&[u8]) -> u64) -> Result<(), String> {
    if shard.shard.head.intent.armed.load(Ordering::Relaxed) != 0 {
        return Err("is marked as being changed though its lock was free".to_owned());
    }
    let mut logged = HashSet::new();
    for ring in Ring::BOTH {
        walk_log(shard, ring, &mut logged)?;
    }
    let mut found = Books::default();
    let mut keys = HashSet::new();
    let index = shard.shard.index;
    for slot in (0..index.len()).filter_map(|number| index.slot(number)) {
        let word = slot.word.load(Ordering::Relaxed);
        let lead =
            shard.follow(slot, word).map_err(|Corrupt| format!("has a slot {} that leads astray", slot.number))?;
        let Some(lead) = lead else { continue };
        let Place { ring, position } = lead.place;
        let mut key = Vec::with_capacity(lead.entry.key_len());
        if !logged.remove(&(ring == Ring::Main, position)) {
            return Err(format!("has no record at {position}, where slot {} leads", slot.number));
        }
        if lead.entry.copy_key(&mut key).is_none() || hash_of(&key) != lead.entry.hash() {
            return Err(format!("has an entry at {position} whose hash is not that of its key"));
        }
        if !index.candidates(lead.entry.hash()).any(|candidate| candidate.number == slot.number) {
            return Err(format!("has an entry at {position} in slot {}, where none would look for it", slot.number));
        }
        if !keys.insert(key) {
            return Err(format!("has the key of the entry at {position} twice"));
        }
        found.add(ring, lead.entry.size);
    }
    let claimed = shard.shard.books();
    if found == claimed { Ok(()) } else { Err(format!("claims {claimed:?} and has {found:?}")) }
}

/// Checks that each record of a ring ends where the next one begins, and collects the positions of entries.
fn walk_log(shard: &LockedShard<'_>, ring: Ring, logged: &mut HashSet<(bool, u64)>) -> Result<(), String> {
    let (floor, head) = shard.bounds(ring).map_err(|Corrupt| format!("has an impossible {ring:?} ring"))?;
    let bytes = shard.shard.bytes(ring);
    let mut at = floor;
    while at < head {
        let record = bytes.record(at).ok_or_else(|| format!("has no record at {at} of the {ring:?} ring"))?;
        if record.is_entry {
            logged.insert((ring == Ring::Main, at));
        }
        at += record.size;
    }
    if at == head { Ok(()) } else { Err(format!("has a record that crosses the head of the {ring:?} ring")) }
}
