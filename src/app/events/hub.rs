//! Reads the event log once for all subscribers of a worker.
//!
//! The first subscription starts a thread that sleeps until something is published, and that exits within a second of
//! the end of the last subscription. The thread wakes the event loop and then waits until the loop has read the log. A
//! busy loop is therefore woken only once, and publishers need no system call to wake the loop. The loop reads each
//! event once, in batches; subscribers run between batches.
//!
//! The lock is local to this process. The event loop holds the lock for one batch or lookup at a time; a subscription
//! on another thread holds it only briefly.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Waker};
use std::thread;
use std::time::Duration;

use forkyard_shm::{Events as Log, Tail, Tailed};
use tokio::sync::Notify;

use super::feeds::{Feeds, Found, Key, Room};
use super::{EventsError, Published};
use crate::config::events::EventsConfig;
use crate::diagnostics::crash;

/// Longest sleep of the thread, in case a publisher dies before it wakes the readers.
const POLL_INTERVAL: Duration = Duration::from_secs(1);
/// Maximum number of events that are read before subscribers run.
const BATCH: usize = 64;

#[derive(Debug)]
pub(super) struct Hub {
    log: Log,
    epoch: u32,
    max_subscribers: u32,
    batch: usize,
    state: Mutex<State>,
    /// Signals that there may be something to read.
    due: Notify,
    /// Signals that the loop has read the whole log.
    has_read: Condvar,
}

#[derive(Debug)]
struct State {
    feeds: Feeds,
    /// Present while there are subscribers.
    tail: Option<Tail>,
    /// Whether the thread is running.
    is_watched: bool,
    /// Whether the loop was woken and has not read the whole log yet.
    is_due: bool,
    /// The log's sequence number when the loop last finished reading the whole log.
    seen: u32,
    is_over: bool,
}

/// The next events for a subscriber, or where to find them.
pub(super) enum NextEvents {
    Nothing,
    /// Events of the topic with this number.
    Events(usize, Vec<Published>),
    /// The log may contain events of the topic with this number, up to this id.
    InLog(usize, u64),
    /// There will be no more events: the worker is draining.
    Over,
}

impl Hub {
    pub(super) fn new(log: Log, config: EventsConfig) -> Self {
        let events = config.backlog as usize;
        let feeds = Feeds::new(Room { events, bytes: config.bytes });
        let state = State { feeds, tail: None, is_watched: false, is_due: false, seen: 0, is_over: false };
        Self {
            epoch: log.epoch(),
            log,
            max_subscribers: config.max_subscribers,
            batch: (events / 2).clamp(1, BATCH),
            state: Mutex::new(state),
            due: Notify::new(),
            has_read: Condvar::new(),
        }
    }

    pub(super) fn log(&self) -> &Log {
        &self.log
    }

    pub(super) fn epoch(&self) -> u32 {
        self.epoch
    }

    pub(super) fn subscribers(&self) -> usize {
        self.state().feeds.count()
    }

    /// Adds a subscriber, which receives all events published from now on. Also returns the latest id of each topic.
    pub(super) fn subscribe(self: &Arc<Self>, topics: &[Arc<str>]) -> Result<(Key, Vec<u64>), EventsError> {
        let mut state = self.state();
        if state.feeds.count() >= self.max_subscribers as usize {
            return Err(EventsError::TooManySubscribers { most: self.max_subscribers });
        }
        if !state.is_watched {
            let hub = Arc::clone(self);
            let thread = thread::Builder::new().name("events".to_owned());
            thread.spawn(move || hub.watch()).map_err(EventsError::Thread)?;
            state.is_watched = true;
        }
        if state.tail.is_none() {
            state.seen = self.log.sequence();
            state.tail = Some(self.log.tail());
        }
        // The tail must be set before the ids are read, and the lock that guards reads from the tail must be held, so
        // that no event is missed.
        let last_ids = topics.iter().map(|topic| self.log.last_id(topic)).collect();
        Ok((state.feeds.add(topics, |topic| self.log.last_id(topic)), last_ids))
    }

    pub(super) fn leave(&self, key: Key, topics: &[Arc<str>]) {
        self.state().feeds.remove(key, topics);
    }

    /// Returns the next events for a subscriber, from the first of its topics that has any,
    /// starting with topic number `first`. If there are none, the next event wakes the subscriber.
    pub(super) fn look(
        &self,
        key: Key,
        topics: &[(Arc<str>, u64)],
        (first, most): (usize, usize),
        context: Option<&Context<'_>>,
    ) -> NextEvents {
        let mut state = self.state();
        if state.is_over {
            return NextEvents::Over;
        }
        for turn in 0..topics.len() {
            let number = (first + turn) % topics.len();
            let (topic, after) = &topics[number];
            match state.feeds.find(topic, *after, most) {
                Found::Nothing => {}
                Found::Events(events) => return NextEvents::Events(number, events),
                Found::InLog(end) => return NextEvents::InLog(number, end),
            }
        }
        if let Some(context) = context {
            state.feeds.wait(key, context);
        }
        NextEvents::Nothing
    }

    pub(super) fn drain(&self) {
        let mut wakers = Vec::new();
        let mut state = self.state();
        state.is_over = true;
        state.feeds.wake_all(&mut wakers);
        drop(state);
        wakers.into_iter().for_each(Waker::wake);
    }

    pub(super) async fn deliver(&self) {
        loop {
            self.due.notified().await;
            while self.read() {
                tokio::task::yield_now().await;
            }
        }
    }

    /// Reads a batch. Returns false if the whole log has been read.
    fn read(&self) -> bool {
        let mut wakers = Vec::new();
        let mut state = self.state();
        let State { feeds, tail, .. } = &mut *state;
        let seen = self.log.sequence(); // any later event changes the sequence number
        let mut is_all = tail.is_none();
        for _ in 0..self.batch {
            match tail.as_mut().map(Tail::next) {
                Some(Tailed::Event(event)) if feeds.wants(&event.topic) => {
                    feeds.take(Published::new(event, self.epoch), &mut wakers);
                }
                Some(Tailed::Event(_)) => {}
                Some(Tailed::Gap) => feeds.skip(|topic| self.log.last_id(topic), &mut wakers),
                Some(Tailed::CaughtUp) | None => {
                    is_all = true;
                    break;
                }
            }
        }
        if is_all {
            (state.seen, state.is_due) = (seen, false);
            self.has_read.notify_one();
        }
        drop(state);
        wakers.into_iter().for_each(Waker::wake);
        !is_all
    }

    /// Runs the thread that waits for events.
    fn watch(&self) {
        crash::give_stack();
        let mut seen = self.state().seen;
        loop {
            self.log.wait(seen, POLL_INTERVAL);
            let mut state = self.state();
            if state.feeds.count() == 0 {
                (state.tail, state.is_watched) = (None, false);
                return;
            }
            state.is_due = true;
            self.due.notify_one();
            while state.is_due {
                state = self.has_read.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            seen = state.seen;
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // No application code runs under the lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
