//! Reads events without a lock: the events of one topic after an id, or the events of all topics in the order of publication.
//!
//! Bytes that were read are valid if the floor has not passed them since, because only bytes below the floor are overwritten.
//!
//! Must not write to shared memory or wait. Must not return an event without checking the floor afterwards.

use std::sync::atomic::{Ordering, fence};

use super::ring::{Lies, Record};
use super::{Events, Log};

/// A published event.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Event {
    /// The topic to which the event was published.
    pub topic: Box<str>,
    /// The number of the event in its topic, counting from 1.
    pub id: u64,
    /// The kind of event; may be empty.
    pub name: Box<str>,
    /// The content, which may be any bytes.
    pub data: Vec<u8>,
    /// When the event was published, in microseconds since 1970, according to the system's clock.
    pub published_us: u64,
}

/// The events of a topic after some id.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Since {
    /// The events, oldest first, with consecutive ids.
    pub events: Vec<Event>,
    /// The number of events between the requested id and the first of `events` that are no longer in the log. If the topic was replaced and
    /// created again after the requested event, this is an upper bound.
    pub missed: u64,
}

/// A reader of the events of all topics, in the order of publication.
#[derive(Clone, Debug)]
pub struct Tail {
    events: Events,
    position: u64,
}

/// The result of [`Tail::next`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Tailed {
    /// An event.
    Event(Event),
    /// The next events are no longer in the log. The ids of the following events show how many are missing from each
    /// topic.
    Gap,
    /// There are no more events yet.
    CaughtUp,
}

impl Events {
    /// Returns the id of a topic's latest event. For a topic that is not in the table, returns the highest id of any replaced topic,
    /// because this topic may be one of them. Returns 0 if no topic has been replaced.
    pub fn last_id(&self, topic: &str) -> u64 {
        let Some(log) = Log::of(&self.segment) else { return 0 };
        // This must be read first. An event that is published later need not be included.
        let unlinked = log.unlinked(topic, 0);
        let known = log.last(topic).0;
        unlinked.last().map_or(known, |event| known.max(event.id))
    }

    /// Returns the topics, each with the id of its latest event.
    pub fn topics(&self) -> Vec<(String, u64)> {
        let Some(log) = Log::of(&self.segment) else { return Vec::new() };
        let known = |name: String| log.topics.last(&name).map(|(id, _)| (name, id));
        log.topics.names().filter_map(known).collect()
    }

    /// Returns the events of a topic whose ids are above `after`, oldest first, up to `most` of them.
    ///
    /// Walks back over all events after `after`, so the cost is proportional to their number. To read the events in chunks, use
    /// [`Events::since_at`].
    pub fn since(&self, topic: &str, after: u64, most: usize) -> Since {
        self.since_at(topic, after, most, &mut 0)
    }

    /// Like [`Events::since`], for repeated calls that each return the events after the previous result. `place` contains the position in
    /// the log at which the previous result ended, so that the next call continues there. Its initial value is 0; any other value is
    /// harmless.
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

    /// Returns a reader of the events that are published after this call.
    pub fn tail(&self) -> Tail {
        let position = self.segment.events_head().map_or(0, |head| head.head.load(Ordering::Acquire));
        Tail { events: self.clone(), position }
    }
}

impl Tail {
    /// Returns the next event, if there is one.
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
                // Either the floor has passed the position, or the log was overwritten. The loop must terminate even if the log was
                // overwritten.
                _ => {
                    self.position = if floor > self.position && self.position < head { floor } else { head };
                    return Tailed::Gap;
                }
            }
        }
    }
}

impl Log<'_> {
    /// Returns the floor, loaded after everything that has been read so far.
    fn floor_now(&self) -> u64 {
        fence(Ordering::Acquire);
        self.head.floor.load(Ordering::Acquire)
    }

    /// Copies an event. The copy is valid if the floor has not passed the event by the end of the copy.
    pub(super) fn event(&self, position: u64, lies: &Lies) -> Option<Event> {
        let bytes = self.ring.copy(position, lies)?;
        let (topic, rest) = bytes.split_at_checked(usize::try_from(lies.topic_len).ok()?)?;
        let (name, data) = rest.split_at_checked(usize::try_from(lies.name_len).ok()?)?;
        let text = |bytes| std::str::from_utf8(bytes).ok().map(Box::from);
        let (topic, name) = (text(topic)?, text(name)?);
        Some(Event { topic, id: lies.id, name, data: data.to_vec(), published_us: lies.published_us })
    }

    /// Returns the events of a topic above an id that may not be in the topic's cell yet. There is at most one such event, unless a
    /// publisher has died.
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
                break; // the floor has passed, so the cell is up to date, and the bytes read may be invalid
            }
            events.extend(event);
            let Some(record) = record else { break };
            at += record.size();
        }
        events
    }

    /// Returns the id of a topic's latest event, and the position of that event or of a later one. Returns 0 if there is none.
    fn last(&self, topic: &str) -> (u64, u64) {
        // Must be read before the table, because a topic that is created in between starts above this id.
        let retired = self.head.retired.load(Ordering::Acquire);
        self.topics.last(topic).unwrap_or((retired, 0))
    }

    /// Returns when the oldest event was published, or 0 if there is none.
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

    /// Returns the event at a position, if it belongs to this topic.
    fn lies(&self, at: u64, topic: &str) -> Option<Lies> {
        match self.ring.record(at, self.head.head.load(Ordering::Acquire))? {
            Record::Event(lies) if self.ring.is_of(at, &lies, topic) => Some(lies),
            _ => None,
        }
    }

    /// Returns the events of a topic after an id, searched forward from `place`, the position of the event with this id or of an earlier
    /// event. Also returns the position of the last event found. Returns `None` if there are no such events, or if they cannot be read from
    /// `place` on.
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
                return None; // the bytes read may be invalid
            }
            if let Some(event) = event {
                if event.id != after + 1 + events.len() as u64 {
                    return None; // the topic was replaced, or `place` was not the position of one of its events
                }
                last = at;
                events.push(event);
            }
            at += record.size();
        }
        (!events.is_empty()).then_some((events, last))
    }

    /// Follows the links from each event to the previous one. Sets `place` to the position of the last event. Returns `None` if the links
    /// are inconsistent.
    fn since(&self, topic: &str, after: u64, most: usize, place: &mut u64) -> Option<Since> {
        // Must be read before the topic's cell. An event that is added to the cell in between is then found twice rather than missed.
        let unlinked = self.unlinked(topic, after);
        let (last_id, mut at) = self.last(topic);
        let mut places = Vec::new();
        while at != 0 && at >= self.head.floor.load(Ordering::Acquire) {
            let lies = self.lies(at, topic);
            if self.floor_now() > at {
                break; // evicted in the meantime, and so are the events before it
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
                events.clear(); // this event and those before it were evicted
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
