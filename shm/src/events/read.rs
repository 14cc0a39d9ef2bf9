//! Reading, without a lock: by topic, from an id on, and all topics as they come.
//!
//! What was read counts if the floor has not passed it until then: only what lies below the floor is ever written again.
//!
//! May not: write anything shared, wait, or hand out what has not been looked at again.

use std::sync::atomic::{Ordering, fence};

use super::ring::{Lies, Record};
use super::{Events, Log};

/// Something that was published.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Event {
    /// Where.
    pub topic: Box<str>,
    /// The how-manieth of its topic; counts from 1.
    pub id: u64,
    /// What kind of event; may be empty.
    pub name: Box<str>,
    /// Any bytes.
    pub data: Vec<u8>,
    /// Microseconds since 1970, by the clock of the machine.
    pub published_us: u64,
}

/// The events of a topic after some id.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Since {
    /// The oldest first, their ids without a gap.
    pub events: Vec<Event>,
    /// So many between the id and the first of these are in the log no more: at most so many, if the topic was given up
    /// meanwhile and has come back.
    pub missed: u64,
}

/// Reads the events of all topics as they come.
#[derive(Clone, Debug)]
pub struct Tail {
    events: Events,
    position: u64,
}

/// What comes next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Tailed {
    /// An event.
    Event(Event),
    /// Events that came next are in the log no more: the ids of those that follow tell how many of each topic.
    Gap,
    /// There is nothing yet.
    CaughtUp,
}

/// A walk is begun again when the log has moved on under it, so many times at most.
const TRIES: usize = 8;

impl Events {
    /// The id of the latest event of a topic; 0 if there was none.
    pub fn last_id(&self, topic: &str) -> u64 {
        let Some(log) = Log::of(&self.segment) else { return 0 };
        // First, for what is published later needs not be known.
        let unlinked = log.unlinked(topic, 0);
        let known = log.topics.find(topic).map_or(0, |(_, cell)| cell.last_id.load(Ordering::Acquire));
        unlinked.last().map_or(known, |event| known.max(event.id))
    }

    /// The topics, each with the id of its latest event.
    pub fn topics(&self) -> Vec<(String, u64)> {
        let Some(log) = Log::of(&self.segment) else { return Vec::new() };
        log.topics.living().map(|(cell, name)| (name, cell.last_id.load(Ordering::Acquire))).collect()
    }

    /// The events of a topic whose ids are above `after`, at most `most` of them: the oldest.
    pub fn since(&self, topic: &str, after: u64, most: usize) -> Since {
        let Some(log) = Log::of(&self.segment) else { return Since::default() };
        for _ in 0..TRIES {
            if let Some(since) = log.since(topic, after, most) {
                return since;
            }
        }
        // Publishers were faster each time: so all that we looked for is gone, or going.
        let last = self.last_id(topic);
        Since { events: Vec::new(), missed: last.saturating_sub(after) }
    }

    /// A reader of what is published from now on.
    pub fn tail(&self) -> Tail {
        let position = self.segment.events_head().map_or(0, |head| head.head.load(Ordering::Acquire));
        Tail { events: self.clone(), position }
    }

    /// Whether the log is in order: the ids of each topic are dense, and all that is said of records is true. For a time when
    /// nobody publishes, who would change it meanwhile.
    ///
    /// # Errors
    /// What is wrong.
    pub fn audit(&self) -> Result<(), String> {
        let Some(log) = Log::of(&self.segment) else { return Ok(()) };
        let (floor, head) = (log.head.floor.load(Ordering::Acquire), log.head.head.load(Ordering::Acquire));
        let mut last = std::collections::HashMap::new();
        let mut at = floor;
        while at < head {
            let record = log.ring.record(at, head).ok_or_else(|| format!("no record at {at} of {floor}..{head}"))?;
            if let Record::Event(lies) = record {
                let event = log.event(at, &lies).ok_or_else(|| format!("no event at {at}"))?;
                match last.insert(event.topic.clone(), (event.id, at)) {
                    Some(before) if (event.id - 1, lies.before) != before => {
                        return Err(format!(
                            "{} {} follows {before:?}, and knows {}",
                            event.topic, event.id, lies.before
                        ));
                    }
                    None if lies.before >= floor => return Err(format!("{} follows nothing", event.id)),
                    Some(_) | None => {}
                }
            }
            at += record.size();
        }
        for (topic, (id, at)) in last {
            let cell = log.topics.find(&topic).ok_or_else(|| format!("{topic} is in no cell"))?.1;
            let known = (cell.last_id.load(Ordering::Acquire), cell.last_at.load(Ordering::Acquire));
            let is_linked = log.head.linked.load(Ordering::Acquire) > at;
            if is_linked && known != (id, at) {
                return Err(format!("{topic} is at {known:?} and not at {:?}", (id, at)));
            }
        }
        Ok(())
    }
}

impl Tail {
    /// What comes next.
    #[expect(clippy::should_implement_trait, reason = "it never ends")]
    pub fn next(&mut self) -> Tailed {
        let Some(log) = Log::of(&self.events.segment) else { return Tailed::CaughtUp };
        loop {
            let head = log.head.head.load(Ordering::Acquire);
            if self.position == head {
                return Tailed::CaughtUp;
            }
            let record = log.ring.record(self.position, head);
            let read = record.and_then(|record| match record {
                Record::Pad { size } => Some((size, None)),
                Record::Event(lies) => Some((lies.size, Some(log.event(self.position, &lies)?))),
            });
            let floor = log.floor_now();
            match read {
                Some((size, event)) if floor <= self.position && self.position < head => {
                    self.position += size;
                    if let Some(event) = event {
                        return Tailed::Event(event);
                    }
                }
                // Overtaken; or somebody has written over the log, who would keep us here for ever.
                _ => {
                    self.position = if floor > self.position && self.position < head { floor } else { head };
                    return Tailed::Gap;
                }
            }
        }
    }

    /// Where it is in the log, which has endless positions.
    pub fn position(&self) -> u64 {
        self.position
    }
}

impl Log<'_> {
    /// The floor, after all that was read so far.
    fn floor_now(&self) -> u64 {
        fence(Ordering::Acquire);
        self.head.floor.load(Ordering::Acquire)
    }

    /// A copy of an event. It counts if the floor does not pass it meanwhile.
    fn event(&self, position: u64, lies: &Lies) -> Option<Event> {
        let bytes = self.ring.copy(position, lies)?;
        let (topic, rest) = bytes.split_at_checked(usize::try_from(lies.topic_len).ok()?)?;
        let (name, data) = rest.split_at_checked(usize::try_from(lies.name_len).ok()?)?;
        let text = |bytes| std::str::from_utf8(bytes).ok().map(Box::from);
        let (topic, name) = (text(topic)?, text(name)?);
        Some(Event { topic, id: lies.id, name, data: data.to_vec(), published_us: lies.published_us })
    }

    /// The events of a topic above an id that its cell may not know of yet: one, but for a dead publisher's.
    fn unlinked(&self, topic: &str, after: u64) -> Vec<Event> {
        let mut at = self.head.linked.load(Ordering::Acquire);
        let head = self.head.head.load(Ordering::Acquire);
        let mut events = Vec::new();
        while at < head {
            let Some(record) = self.ring.record(at, head) else { break };
            if let Record::Event(lies) = record
                && lies.id > after
                && self.ring.is_of(at, &lies, topic)
                && let Some(event) = self.event(at, &lies)
                && self.floor_now() <= at
            {
                events.push(event);
            }
            at += record.size();
        }
        events
    }

    /// `None` if the log has moved on meanwhile, in a way that asks for another look.
    fn since(&self, topic: &str, after: u64, most: usize) -> Option<Since> {
        let unlinked = self.unlinked(topic, after);
        let mut places = Vec::new();
        let known = self.topics.find(topic).map(|(_, cell)| cell);
        let mut at = known.map_or(0, |cell| cell.last_at.load(Ordering::Acquire));
        let last_id = known.map_or(0, |cell| cell.last_id.load(Ordering::Acquire));
        while at != 0 && at >= self.head.floor.load(Ordering::Acquire) {
            let record = self.ring.record(at, self.head.head.load(Ordering::Acquire));
            let here = match record {
                Some(Record::Event(lies)) if self.ring.is_of(at, &lies, topic) => Some(lies),
                _ => None,
            };
            if self.floor_now() > at {
                break; // it has made room meanwhile, and so have those before it
            }
            let lies = here?; // the cell has another topic now
            if lies.id <= after {
                break;
            }
            places.push((at, lies));
            at = lies.before;
        }
        let mut events = Vec::new();
        for (at, lies) in places.iter().rev() {
            if events.len() == most {
                break;
            }
            let event = self.event(*at, lies);
            if self.floor_now() > *at {
                events.clear(); // this one and those before it have made room
                continue;
            }
            events.push(event?);
        }
        let next = |events: &[Event]| events.last().map_or(after, |event| event.id) + 1;
        for event in unlinked {
            if events.len() < most && (events.is_empty() || event.id == next(&events)) {
                events.push(event);
            }
        }
        let missed = match events.first() {
            Some(first) => first.id - after - 1,
            None if most == 0 => 0,
            None => last_id.saturating_sub(after),
        };
        Some(Since { events, missed })
    }
}
