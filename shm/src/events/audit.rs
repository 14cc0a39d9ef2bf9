//! Checks the log for consistency. Used in tests, and for a file that was not closed.
//!
//! Must not write. The result is valid only if no process publishes during the audit.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::Ordering;

use super::ring::Record;
use super::{Events, Log};

/// The id of each topic's latest event, and its position.
type Latest = HashMap<Box<str>, (u64, u64)>;

impl Events {
    /// Checks that the log is consistent: the ids of each topic have no gaps, and all records are valid. Must not run while another
    /// process publishes.
    ///
    /// # Errors
    /// Returns a description of the inconsistency.
    pub fn audit(&self) -> Result<(), String> {
        let Some(log) = Log::of(&self.segment) else { return Ok(()) };
        let [floor, linked, head] =
            [&log.head.floor, &log.head.linked, &log.head.head].map(|position| position.load(Ordering::Acquire));
        if !(floor <= linked && linked <= head && head - floor <= log.ring.len()) {
            return Err(format!("the topics know of the events up to {linked}, of {floor}..{head}"));
        }
        let (known, latest) = log.audit_ring(floor, linked, head)?;
        log.audit_topics(floor, &known, &latest)
    }
}

impl Log<'_> {
    /// Returns the latest event of each topic up to `linked`, and up to `head`.
    fn audit_ring(&self, floor: u64, linked: u64, head: u64) -> Result<(Latest, Latest), String> {
        let (mut known, mut latest) = (Latest::new(), Latest::new());
        let mut at = floor;
        while at < head {
            if at == linked {
                known.clone_from(&latest);
            }
            let record = self.ring.record(at, head).ok_or_else(|| format!("no record at {at} of {floor}..{head}"))?;
            if let Record::Event(lies) = record {
                let event = self.event(at, &lies).ok_or_else(|| format!("no event at {at}"))?;
                let follows = match latest.insert(event.topic.clone(), (event.id, at)) {
                    // The topic was replaced, and has been created again.
                    Some((id, _)) if lies.before == 0 => id < event.id,
                    Some((id, before)) => id.checked_add(1) == Some(event.id) && before == lies.before,
                    None => event.id > 0 && lies.before < floor,
                };
                if !follows {
                    return Err(format!("{} {} at {at} follows nothing at {}", event.topic, event.id, lies.before));
                }
            }
            at += record.size();
        }
        if linked == head {
            known.clone_from(&latest);
        }
        Ok((known, latest))
    }

    fn audit_topics(&self, floor: u64, known: &Latest, latest: &Latest) -> Result<(), String> {
        let mut names = HashSet::new();
        for name in self.topics.names() {
            let (id, at) = self.topics.last(&name).ok_or_else(|| format!("{name} is where nobody finds it"))?;
            // If a topic was created again and has no event yet, its cell does not contain the position of the topic's former events.
            let is_at = |events: &Latest| {
                events.get(&*name).map_or(at < floor, |event| *event == (id, at) || at == 0 && event.0 <= id)
            };
            let newest = latest.get(&*name).filter(|newest| known.get(&*name) != Some(newest));
            // A publisher that died may have stored the position but not the id.
            let is_half_stored = newest.is_some_and(|&(newest, place)| place == at && newest == id + 1);
            if !(is_at(known) || is_at(latest) || is_half_stored) {
                return Err(format!("{name} is at {:?} and not at {:?}", latest.get(&*name), (id, at)));
            }
            if !names.insert(name.clone()) {
                return Err(format!("{name} is there twice"));
            }
        }
        let retired = self.head.retired.load(Ordering::Acquire);
        match latest.iter().find(|(name, (id, _))| !names.contains(&***name) && *id > retired) {
            Some((name, (id, _))) => {
                Err(format!("{name} has event {id}, is in no cell, and was not given up ({retired})"))
            }
            None => Ok(()),
        }
    }
}
