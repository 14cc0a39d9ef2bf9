//! Yields the events of a subscriber's topics, each once and in order, from the subscriber's
//! position.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use futures_core::Stream;
use tokio::task::coop::poll_proceed;

use super::cursor::Cursor;
use super::feeds::Key;
use super::hub::{Hub, NextEvents};
use super::{EventsError, Message, Published};
use crate::protocol::topics::{MAX_TOPICS, is_topic};

/// Maximum number of events taken at a time from the worker's memory, and in the first read from
/// the log.
const MAX_BATCH: usize = 16;
/// Maximum number of bytes and of events in one read from the log. The copies are for this subscriber alone, so they
/// must stay small.
const COPIED: (usize, usize) = (64 << 10, 256);

/// The events of some topics, as a [`Stream`]. The stream ends when the worker is about to exit. Dropping the stream
/// ends the subscription.
#[derive(Debug)]
pub struct Subscription {
    hub: Arc<Hub>,
    key: Key,
    topics: Box<[Arc<str>]>,
    /// The topics, each with the id of the last event taken from it.
    taken: Vec<(Arc<str>, u64)>,
    /// Messages taken and not yet yielded, each with its topic's number and the position in the
    /// topic after the message.
    waiting: VecDeque<(usize, u64, Message)>,
    /// The subscriber's position after the messages yielded so far.
    cursor: Cursor,
    /// Number of the topic that is read first.
    turn: usize,
    /// Number of events requested in one read from the log.
    stride: usize,
    /// For each topic, where the last read from the log ended; empty until the first read.
    places: Vec<u64>,
}

impl Subscription {
    pub(super) fn new(
        hub: &Arc<Hub>,
        topics: Box<[Arc<str>]>,
        last_event_id: Option<&str>,
    ) -> Result<Self, EventsError> {
        if hub.log().is_none() {
            return Err(EventsError::NoLog);
        }
        if topics.is_empty() || topics.len() > MAX_TOPICS {
            return Err(EventsError::TopicCount);
        }
        let is_bad = |(index, topic): &(usize, &Arc<str>)| !is_topic(topic) || topics[..*index].contains(topic);
        if let Some((_, topic)) = topics.iter().enumerate().find(is_bad) {
            return Err(EventsError::Topic { topic: topic.to_string() });
        }
        let (key, ends) = hub.subscribe(&topics)?;
        let epoch = hub.epoch();
        let is_known = |cursor: &Cursor| {
            cursor.epoch == epoch
                && cursor.ids.len() == ends.len()
                && cursor.ids.iter().zip(&ends).all(|(id, end)| id <= end)
        };
        let mut waiting = VecDeque::new();
        let ids = match last_event_id.map(|text| Cursor::parse(text).filter(is_known)) {
            None => ends,
            Some(Some(Cursor { ids, .. })) => ids,
            Some(None) => {
                let gap = |topic: &Arc<str>| Message::Gap { topic: Arc::clone(topic), missed: None };
                waiting.extend((0..).zip(&topics).map(|(number, topic)| (number, ends[number], gap(topic))));
                ends
            }
        };
        let taken = topics.iter().cloned().zip(ids.iter().copied()).collect();
        let cursor = Cursor { epoch, ids };
        Ok(Self {
            hub: Arc::clone(hub),
            key,
            topics,
            taken,
            waiting,
            cursor,
            turn: 0,
            stride: MAX_BATCH,
            places: Vec::new(),
        })
    }

    /// Returns the subscriber's position after the messages yielded so far, to be passed to
    /// [`Events::subscribe`](super::Events::subscribe) in any worker.
    #[must_use]
    pub fn last_event_id(&self) -> String {
        self.cursor.to_string()
    }

    pub(super) fn cursor(&self) -> &Cursor {
        &self.cursor
    }

    pub(super) fn topics(&self) -> &[Arc<str>] {
        &self.topics
    }

    /// Returns the next message to a task. After many messages in one poll of the task, returns Pending although more
    /// messages are available, so that other tasks can run; tokio's budget determines when.
    pub(super) fn poll(&mut self, context: &mut Context<'_>) -> Poll<Option<Message>> {
        let turn = ready!(poll_proceed(context));
        let message = self.advance(Some(context));
        if message.is_ready() {
            turn.made_progress();
        }
        message
    }

    /// Returns the next message, or Pending if there is none. With `context`, the next message then wakes the task.
    pub(super) fn advance(&mut self, context: Option<&Context<'_>>) -> Poll<Option<Message>> {
        loop {
            if let Some((number, at, message)) = self.waiting.pop_front() {
                self.cursor.ids[number] = at;
                return Poll::Ready(Some(message));
            }
            match self.hub.look(self.key, &self.taken, (self.turn, MAX_BATCH), context) {
                NextEvents::Nothing => return Poll::Pending,
                NextEvents::Over => return Poll::Ready(None),
                NextEvents::Events(number, events) => self.take(number, events),
                NextEvents::InLog(number, end) => self.read_log(number, end),
            }
        }
    }

    fn take(&mut self, number: usize, events: impl IntoIterator<Item = Published>) {
        self.turn = number + 1;
        for event in events {
            self.taken[number].1 = event.id();
            self.waiting.push_back((number, event.id(), Message::Event(event)));
        }
    }

    /// Reads from the log, because the next event in this topic is not in the worker's memory. `end` is the id of the
    /// latest event in the topic.
    fn read_log(&mut self, number: usize, end: u64) {
        let (topic, after) = (Arc::clone(&self.taken[number].0), self.taken[number].1);
        self.places.resize(self.taken.len(), 0);
        let since = self.hub.log().since_at(&topic, after, self.stride, &mut self.places[number]);
        let first = since.events.first().map_or(end, |event| event.id - 1);
        if first > after {
            let gap = Message::Gap { topic, missed: Some(first - after) };
            self.waiting.push_back((number, first, gap));
            self.taken[number].1 = first;
        }
        let bytes: usize = since.events.iter().map(|event| event.data.len()).sum();
        if let Some(average) = bytes.checked_div(since.events.len()) {
            self.stride = (COPIED.0 / average.max(1)).clamp(1, COPIED.1);
        }
        let epoch = self.hub.epoch();
        self.take(number, since.events.into_iter().map(|event| Published::new(event, epoch)));
    }
}

impl Stream for Subscription {
    type Item = Message;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Message>> {
        self.poll(context)
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        self.hub.leave(self.key, &self.topics);
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use forkyard_shm::{Plan, Segment};

    use super::super::Events;
    use super::*;
    use crate::config::events::EventsConfig;

    fn events() -> Events {
        let segment = Segment::create(&Plan { rows: 1, events_bytes: 4 << 20, ..Plan::default() }).unwrap();
        Events::new(&segment, EventsConfig { bytes: 4 << 20, backlog: 256, max_subscribers: 4 })
    }

    /// Returns all messages that a subscriber receives in one poll of its task.
    async fn turn(subscription: &mut Subscription) -> Vec<(String, u64)> {
        poll_fn(|context| {
            let mut got = Vec::new();
            while let Poll::Ready(message) = subscription.poll(context) {
                let Some(Message::Event(event)) = message else { panic!("{message:?}") };
                got.push((event.topic().to_owned(), event.id()));
            }
            Poll::Ready(got)
        })
        .await
    }

    #[tokio::test(flavor = "current_thread")]
    async fn who_is_far_behind_gets_all_in_many_turns_from_all_topics() {
        const COUNT: u64 = 3000;
        let events = events();
        for id in 1..=COUNT {
            for topic in ["a", "b"] {
                assert_eq!(events.publish(topic, id.to_string()).unwrap(), id);
            }
        }
        let beginning = format!("{:08x}-0.0", events.hub.epoch());
        let mut subscription = events.subscribe(["a", "b"], Some(&beginning)).unwrap();
        let mut next = [1, 1];
        let mut turns = 0;
        while next != [COUNT + 1; 2] {
            let got = turn(&mut subscription).await;
            assert!(got.len() < 500, "{} in one turn", got.len());
            for (topic, id) in got {
                let next = &mut next[usize::from(topic == "b")];
                assert_eq!(id, *next);
                *next += 1;
            }
            turns += 1;
            tokio::task::yield_now().await;
        }
        assert!(turns > 10);
    }
}
