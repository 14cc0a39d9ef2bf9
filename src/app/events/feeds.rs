//! Holds a worker's latest events in its own memory, and the subscribers that wait for further
//! events.
//!
//! An event is stored once, however many subscribers receive it. A subscriber has no queue, only a position from which
//! it reads on. If events at that position are no longer stored here, the subscriber reads them from the log. A
//! subscriber that does not read therefore costs nothing.
//!
//! Makes no system call and uses no clock or shared memory: the caller passes in the events of the
//! log.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::task::{Context, Waker};

use super::Published;

/// Identifies a subscriber.
pub(super) type Key = u32;

/// Limits of the stored events.
#[derive(Clone, Copy, Debug)]
pub(super) struct Room {
    pub(super) events: usize,
    pub(super) bytes: u64,
}

#[derive(Debug)]
pub(super) struct Feeds {
    room: Room,
    topics: HashMap<Arc<str>, Feed>,
    /// All stored events, the oldest first.
    order: VecDeque<Published>,
    bytes: u64,
    /// Indexed by key; `None` for a free key.
    subscribers: Vec<Option<Subscriber>>,
    free: Vec<Key>,
}

/// A topic with at least one subscriber in this worker.
#[derive(Debug, Default)]
struct Feed {
    /// Id of the latest known event.
    last: u64,
    /// The event after the event with id `leap.0` has id `leap.1 + 1`: the log had dropped the topic in between.
    leap: (u64, u64),
    /// Consecutive events with ids up to `last`.
    recent: VecDeque<Published>,
    subscribers: Vec<Key>,
}

#[derive(Debug, Default)]
struct Subscriber {
    waker: Option<Waker>,
}

/// The result of a subscriber's read of one topic.
#[derive(Debug)]
pub(super) enum Found {
    /// There is no further event.
    Nothing,
    Events(Vec<Published>),
    /// The subscriber is too far behind to read from memory. The log may still contain the events up to this id.
    InLog(u64),
}

impl Feeds {
    pub(super) fn new(room: Room) -> Self {
        Self {
            room,
            topics: HashMap::new(),
            order: VecDeque::new(),
            bytes: 0,
            subscribers: Vec::new(),
            free: Vec::new(),
        }
    }

    pub(super) fn count(&self) -> usize {
        self.subscribers.len() - self.free.len()
    }

    /// Adds a subscriber. `last_id` returns a topic's latest id.
    pub(super) fn add(&mut self, topics: &[Arc<str>], last_id: impl Fn(&str) -> u64) -> Key {
        let key = self.free.pop().unwrap_or_else(|| {
            self.subscribers.push(None);
            Key::try_from(self.subscribers.len() - 1).unwrap_or(Key::MAX)
        });
        if let Some(place) = self.subscribers.get_mut(key as usize) {
            *place = Some(Subscriber::default());
        }
        for topic in topics {
            let new = || Feed { last: last_id(topic), ..Feed::default() };
            self.topics.entry(Arc::clone(topic)).or_insert_with(new).subscribers.push(key);
        }
        key
    }

    pub(super) fn remove(&mut self, key: Key, topics: &[Arc<str>]) {
        for topic in topics {
            let Some(feed) = self.topics.get_mut(topic) else { continue };
            if let Some(index) = feed.subscribers.iter().position(|&other| other == key) {
                feed.subscribers.swap_remove(index);
            }
            if feed.subscribers.is_empty() {
                self.topics.remove(topic);
            }
        }
        if self.subscribers.get_mut(key as usize).and_then(Option::take).is_some() {
            self.free.push(key);
        }
        if self.count() == 0 {
            *self = Self::new(self.room);
        }
    }

    /// Whether a topic has subscribers.
    pub(super) fn wants(&self, topic: &str) -> bool {
        self.topics.contains_key(topic)
    }

    /// Stores the next event from the log. Adds the wakers of its subscribers to `wakers`.
    pub(super) fn take(&mut self, event: Published, wakers: &mut Vec<Waker>) {
        let Some(feed) = self.topics.get_mut(event.topic()) else { return };
        if event.id() <= feed.last {
            return; // published before the first subscription, whose position includes it
        }
        if event.id() != feed.last + 1 {
            feed.recent.clear();
            feed.leap = (feed.last, event.id() - 1);
        }
        feed.last = event.id();
        feed.recent.push_back(event.clone());
        wake(&mut self.subscribers, &feed.subscribers, wakers);
        self.bytes += size(&event);
        self.order.push_back(event);
        while self.order.len() > self.room.events || self.bytes > self.room.bytes {
            let Some(oldest) = self.order.pop_front() else { break };
            self.bytes -= size(&oldest);
            if let Some(feed) = self.topics.get_mut(oldest.topic())
                && feed.recent.front().is_some_and(|first| first.id() == oldest.id())
            {
                feed.recent.pop_front();
            }
        }
    }

    /// Handles missed events: subscribers read the new events of their topics from the log.
    pub(super) fn skip(&mut self, last_id: impl Fn(&str) -> u64, wakers: &mut Vec<Waker>) {
        self.order.clear();
        self.bytes = 0;
        for (topic, feed) in &mut self.topics {
            feed.recent.clear();
            feed.last = feed.last.max(last_id(topic));
            wake(&mut self.subscribers, &feed.subscribers, wakers);
        }
    }

    /// Returns up to `most` events of a topic after the id `after`.
    pub(super) fn find(&self, topic: &str, after: u64, most: usize) -> Found {
        let Some(feed) = self.topics.get(topic) else { return Found::Nothing };
        if after >= feed.last {
            return Found::Nothing;
        }
        let after = if (feed.leap.0..feed.leap.1).contains(&after) { feed.leap.1 } else { after };
        let Some(first) = feed.recent.front().map(Published::id).filter(|&first| first <= after + 1) else {
            return Found::InLog(feed.last);
        };
        let from = usize::try_from(after + 1 - first).unwrap_or(usize::MAX);
        Found::Events(feed.recent.iter().skip(from).take(most).cloned().collect())
    }

    /// Wakes the subscriber at its next event.
    pub(super) fn wait(&mut self, key: Key, context: &Context<'_>) {
        if let Some(Some(subscriber)) = self.subscribers.get_mut(key as usize) {
            match &mut subscriber.waker {
                Some(waker) => waker.clone_from(context.waker()),
                waker => *waker = Some(context.waker().clone()),
            }
        }
    }

    /// Collects the wakers of all waiting subscribers.
    pub(super) fn wake_all(&mut self, wakers: &mut Vec<Waker>) {
        wakers.extend(self.subscribers.iter_mut().flatten().filter_map(|subscriber| subscriber.waker.take()));
    }
}

fn wake(subscribers: &mut [Option<Subscriber>], keys: &[Key], wakers: &mut Vec<Waker>) {
    let waker = |&key: &Key| subscribers.get_mut(key as usize)?.as_mut()?.waker.take();
    wakers.extend(keys.iter().filter_map(waker));
}

fn size(event: &Published) -> u64 {
    (event.topic().len() + event.name().len() + event.data().len()) as u64
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn event(topic: &str, id: u64) -> Published {
        Published::for_test(topic, id, &id.to_string())
    }

    fn context() -> Context<'static> {
        Context::from_waker(Waker::noop())
    }

    fn ids(found: Found) -> Vec<u64> {
        match found {
            Found::Events(events) => events.iter().map(Published::id).collect(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn who_is_near_reads_here_and_who_is_far_reads_the_log() {
        let mut feeds = Feeds::new(Room { events: 4, bytes: 1 << 20 });
        let topics = [Arc::from("a")];
        let key = feeds.add(&topics, |_| 7);
        assert!(matches!(feeds.find("a", 7, 9), Found::Nothing));
        assert!(matches!(feeds.find("a", 5, 9), Found::InLog(7)), "what was there before");
        let mut wakers = Vec::new();
        feeds.wait(key, &context());
        for id in 6..=13 {
            feeds.take(event("a", id), &mut wakers);
            feeds.take(event("nobody's", id), &mut wakers);
        }
        assert_eq!(wakers.len(), 1, "woken once, until it waits again");
        assert_eq!(ids(feeds.find("a", 9, 9)), [10, 11, 12, 13]);
        assert_eq!(ids(feeds.find("a", 10, 2)), [11, 12]);
        assert!(matches!(feeds.find("a", 8, 9), Found::InLog(13)));
        feeds.take(event("a", 20), &mut wakers);
        assert!(matches!(feeds.find("a", 12, 9), Found::InLog(20)));
        assert_eq!(ids(feeds.find("a", 13, 9)), [20], "the topic was given up and has come back: nothing is missing");
        assert_eq!(ids(feeds.find("a", 19, 9)), [20]);
        feeds.skip(|_| 30, &mut wakers);
        assert!(matches!(feeds.find("a", 20, 9), Found::InLog(30)));
        feeds.remove(key, &topics);
        assert_eq!((feeds.count(), feeds.wants("a")), (0, false));
    }

    #[test]
    fn large_events_push_out_the_others() {
        let mut feeds = Feeds::new(Room { events: 1000, bytes: 100 });
        feeds.add(&[Arc::from("a")], |_| 0);
        for id in 1..=3 {
            feeds.take(Published::for_test("a", id, &"x".repeat(60)), &mut Vec::new());
        }
        assert_eq!((feeds.order.len(), feeds.bytes), (1, 61));
        assert!(matches!(feeds.find("a", 1, 9), Found::InLog(3)));
    }

    /// Subscribers are added, read, wait and are removed while events are published; some events are missed. Each
    /// subscriber receives every event once, and waiting subscribers are woken.
    #[test]
    fn in_any_history_each_gets_every_event_once() {
        for seed in 0..200 {
            let mut random = fastrand::Rng::with_seed(seed);
            let names: Vec<Arc<str>> = ["a", "b", "c"].map(Arc::from).into();
            let mut feeds = Feeds::new(Room { events: random.usize(1..8), bytes: 1 << 20 });
            let mut log: BTreeMap<Arc<str>, u64> = names.iter().map(|name| (Arc::clone(name), 0)).collect();
            // Events that have been published but not yet taken from the log.
            let mut unread: VecDeque<(Arc<str>, u64)> = VecDeque::new();
            let mut readers: Vec<(Key, Vec<Arc<str>>, Vec<u64>)> = Vec::new();
            for _ in 0..300 {
                match random.u8(0..10) {
                    0..4 => {
                        let name = &names[random.usize(0..names.len())];
                        let id = log.get_mut(name).unwrap();
                        *id += 1;
                        unread.push_back((Arc::clone(name), *id));
                    }
                    4..6 => {
                        for _ in 0..random.usize(0..4) {
                            let Some((name, id)) = unread.pop_front() else { break };
                            feeds.take(event(&name, id), &mut Vec::new());
                        }
                    }
                    6 if random.u8(0..4) == 0 => {
                        unread.clear();
                        feeds.skip(|name| log[name], &mut Vec::new());
                    }
                    7 => {
                        let count = random.usize(1..=names.len());
                        let topics = random.choose_multiple(names.iter().cloned(), count);
                        let at = topics.iter().map(|name| log[name] - random.u64(0..=log[name].min(3))).collect();
                        readers.push((feeds.add(&topics, |name| log[name]), topics, at));
                    }
                    8 if !readers.is_empty() => {
                        let (key, topics, _) = readers.swap_remove(random.usize(0..readers.len()));
                        feeds.remove(key, &topics);
                    }
                    _ => {
                        for (_, topics, at) in &mut readers {
                            read(&feeds, &log, topics, at, random.usize(1..4), seed);
                        }
                    }
                }
                assert_eq!(feeds.count(), readers.len());
                assert!(feeds.order.len() <= feeds.room.events);
            }
            let mut wakers = Vec::new();
            for (key, ..) in &readers {
                feeds.wait(*key, &context());
            }
            let subscribed = readers.iter().filter(|(_, topics, _)| topics.contains(&names[0])).count();
            while let Some((name, id)) = unread.pop_front() {
                feeds.take(event(&name, id), &mut Vec::new());
            }
            feeds.wake_all(&mut Vec::new());
            readers.iter().for_each(|(key, ..)| feeds.wait(*key, &context()));
            feeds.take(event("a", log["a"] + 1), &mut wakers);
            assert_eq!(wakers.len(), subscribed, "seed {seed}");
            *log.get_mut("a").unwrap() += 1;
            for (_, topics, at) in &mut readers {
                while read(&feeds, &log, topics, at, 2, seed) {}
                let ends: Vec<u64> = topics.iter().map(|name| log[name]).collect();
                assert_eq!(*at, ends, "seed {seed}");
            }
        }
    }

    /// Performs one read of a subscriber. Returns true if the read found something.
    fn read(
        feeds: &Feeds,
        log: &BTreeMap<Arc<str>, u64>,
        topics: &[Arc<str>],
        at: &mut [u64],
        most: usize,
        seed: u64,
    ) -> bool {
        let mut any = false;
        for (name, at) in topics.iter().zip(at) {
            match feeds.find(name, *at, most) {
                Found::Nothing => {}
                Found::InLog(end) => {
                    assert!(*at < end && end <= log[name], "seed {seed}");
                    (*at, any) = (*at + 1, true); // the log contains every event
                }
                Found::Events(events) => {
                    for event in events {
                        assert_eq!((event.topic(), event.id()), (&**name, *at + 1), "seed {seed}");
                        (*at, any) = (event.id(), true);
                    }
                }
            }
        }
        any
    }
}
