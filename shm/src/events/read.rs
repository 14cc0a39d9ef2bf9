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

impl Events {
    /// The id of the latest event of a topic. Of one that the log does not know it is the highest that any topic had which
    /// was given up, for this one may be of those: 0 as long as there was none.
    pub fn last_id(&self, topic: &str) -> u64 {
        let Some(log) = Log::of(&self.segment) else { return 0 };
        // First, for what is published later needs not be known.
        let unlinked = log.unlinked(topic, 0);
        let known = log.last(topic).0;
        unlinked.last().map_or(known, |event| known.max(event.id))
    }

    /// The topics, each with the id of its latest event.
    pub fn topics(&self) -> Vec<(String, u64)> {
        let Some(log) = Log::of(&self.segment) else { return Vec::new() };
        let known = |name: String| log.topics.last(&name).map(|(id, _)| (name, id));
        log.topics.names().filter_map(known).collect()
    }

    /// The events of a topic whose ids are above `after`, at most `most` of them: the oldest.
    ///
    /// It walks back over all of them, and so costs as much as there are: who wants them piece by piece has
    /// [`Events::since_at`].
    pub fn since(&self, topic: &str, after: u64, most: usize) -> Since {
        self.since_at(topic, after, most, &mut 0)
    }

    /// As [`Events::since`], for who asks again and again, each time for what came after the last answer: `place` says where
    /// in the log that ended, so that this one goes on there. 0 at first; any other number that it was not set to does no harm.
    pub fn since_at(&self, topic: &str, after: u64, most: usize, place: &mut u64) -> Since {
        let Some(log) = Log::of(&self.segment) else { return Since::default() };
        if let Some((events, last)) = log.onwards(topic, after, most, *place) {
            *place = last;
            return Since { events, missed: 0 };
        }
        let lost = || Since { events: Vec::new(), missed: self.last_id(topic).saturating_sub(after) };
        *place = 0;
        log.since(topic, after, most, place).unwrap_or_else(lost)
    }

    /// A reader of what is published from now on.
    pub fn tail(&self) -> Tail {
        let position = self.segment.events_head().map_or(0, |head| head.head.load(Ordering::Acquire));
        Tail { events: self.clone(), position }
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
}

impl Log<'_> {
    /// The floor, after all that was read so far.
    fn floor_now(&self) -> u64 {
        fence(Ordering::Acquire);
        self.head.floor.load(Ordering::Acquire)
    }

    /// A copy of an event. It counts if the floor does not pass it meanwhile.
    pub(super) fn event(&self, position: u64, lies: &Lies) -> Option<Event> {
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
            let record = self.ring.record(at, head);
            let event = match record {
                Some(Record::Event(lies)) if lies.id > after && self.ring.is_of(at, &lies, topic) => {
                    self.event(at, &lies)
                }
                _ => None,
            };
            if self.floor_now() > at {
                break; // so its cell knows of it by now; and what was read may be anything
            }
            events.extend(event);
            let Some(record) = record else { break };
            at += record.size();
        }
        events
    }

    /// The id of a topic's latest event, and the position of that one or of a later one; 0 if there is none.
    fn last(&self, topic: &str) -> (u64, u64) {
        // First: a topic that comes into being meanwhile begins above it.
        let retired = self.head.retired.load(Ordering::Acquire);
        self.topics.last(topic).unwrap_or((retired, 0))
    }

    /// When the oldest event was published; 0 if there is none.
    pub(super) fn oldest_us(&self) -> u64 {
        let mut at = self.head.floor.load(Ordering::Acquire);
        loop {
            let record = self.ring.record(at, self.head.head.load(Ordering::Acquire));
            let floor = self.floor_now();
            match record {
                _ if floor > at => at = floor,
                Some(Record::Pad { size }) => at += size,
                Some(Record::Event(lies)) => return lies.published_us,
                None => return 0,
            }
        }
    }

    /// What lies at a position, if that is an event of this topic.
    fn lies(&self, at: u64, topic: &str) -> Option<Lies> {
        match self.ring.record(at, self.head.head.load(Ordering::Acquire))? {
            Record::Event(lies) if self.ring.is_of(at, &lies, topic) => Some(lies),
            _ => None,
        }
    }

    /// The events of a topic after an id, whose own event, or one before it, is at `place`; and where the last of them is. `None`
    /// if they are not to be had from there on, or there are none.
    fn onwards(&self, topic: &str, after: u64, most: usize, place: u64) -> Option<(Vec<Event>, u64)> {
        let (mut at, mut last) = (place, place);
        let head = self.head.head.load(Ordering::Acquire);
        let mut events = Vec::new();
        while place != 0 && at < head && events.len() < most {
            let record = self.ring.record(at, head)?;
            let event = match &record {
                Record::Event(lies) if lies.id > after && self.ring.is_of(at, lies, topic) => {
                    Some(self.event(at, lies)?)
                }
                _ => None,
            };
            if self.floor_now() > at {
                return None; // what was read may be anything
            }
            if let Some(event) = event {
                if event.id != after + 1 + events.len() as u64 {
                    return None; // the topic was given up meanwhile; or this was no place of its events
                }
                last = at;
                events.push(event);
            }
            at += record.size();
        }
        (!events.is_empty()).then_some((events, last))
    }

    /// By the links from each event to the one before it. Sets `place` to that of the last of them. `None` if what is there
    /// makes no sense.
    fn since(&self, topic: &str, after: u64, most: usize, place: &mut u64) -> Option<Since> {
        // First: what is told to its cell meanwhile is found twice, and not missed.
        let unlinked = self.unlinked(topic, after);
        let (last_id, mut at) = self.last(topic);
        let mut places = Vec::new();
        while at != 0 && at >= self.head.floor.load(Ordering::Acquire) {
            let lies = self.lies(at, topic);
            if self.floor_now() > at {
                break; // it has made room meanwhile, and so have those before it
            }
            let lies = lies?;
            if lies.id <= after {
                break;
            }
            places.push(at);
            at = lies.before;
        }
        let mut events = Vec::new();
        for at in places.into_iter().rev() {
            if events.len() == most {
                break;
            }
            let event = self.lies(at, topic).and_then(|lies| self.event(at, &lies));
            if self.floor_now() > at {
                events.clear(); // this one and those before it have made room
                continue;
            }
            events.push(event?);
            *place = at;
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
