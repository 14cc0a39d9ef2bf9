//! A worker's one reader of the event log, for all subscribers that it has.
//!
//! With the first subscription a thread begins to sleep until something is published, and leaves within a second of the
//! last one's end. It wakes the event loop and then waits until that has read: so a busy loop is woken once, and publishers
//! find nobody to wake. The loop reads each event once, in batches, between which subscribers get their turn.
//!
//! The lock is of this process alone. The event loop has it for a batch or a look; who subscribes on a thread, for a moment.

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

/// For so long the thread sleeps at most: a publisher may have died before it woke anybody.
const POLL_INTERVAL: Duration = Duration::from_secs(1);
/// Events that are read before subscribers get their turn, at most.
const BATCH: usize = 64;

#[derive(Debug)]
pub(super) struct Hub {
    log: Log,
    epoch: u32,
    max_subscribers: u32,
    batch: usize,
    state: Mutex<State>,
    /// There may be something to read.
    due: Notify,
    /// The loop has read all there was.
    has_read: Condvar,
}

#[derive(Debug)]
struct State {
    feeds: Feeds,
    /// While there are subscribers.
    tail: Option<Tail>,
    /// There is a thread.
    is_watched: bool,
    /// The loop was woken, and has not read all yet.
    is_due: bool,
    /// The log's sequence when that was last so.
    seen: u32,
    is_over: bool,
}

/// What a subscriber finds.
pub(super) enum Look {
    Nothing,
    /// Of the topic with this number.
    Events(usize, Vec<Published>),
    /// Up to this event of that topic, as far as the log has them yet.
    InLog(usize, u64),
    /// Nothing, for ever: the worker drains.
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

    /// A further subscriber: what is published from now on, it will find. And where each of the topics stands now.
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
        // After the tail, and under the lock by which it is read.
        let last_ids = topics.iter().map(|topic| self.log.last_id(topic)).collect();
        Ok((state.feeds.add(topics, |topic| self.log.last_id(topic)), last_ids))
    }

    pub(super) fn leave(&self, key: Key, topics: &[Arc<str>]) {
        self.state().feeds.remove(key, topics);
    }

    /// What there is for a subscriber, in the first of its topics that has something, from number `first` on. If there is
    /// nothing, it is woken when there is.
    pub(super) fn look(
        &self,
        key: Key,
        topics: &[(Arc<str>, u64)],
        (first, most): (usize, usize),
        context: Option<&Context<'_>>,
    ) -> Look {
        let mut state = self.state();
        if state.is_over {
            return Look::Over;
        }
        for turn in 0..topics.len() {
            let number = (first + turn) % topics.len();
            let (topic, after) = &topics[number];
            match state.feeds.find(topic, *after, most) {
                Found::Nothing => {}
                Found::Events(events) => return Look::Events(number, events),
                Found::InLog(end) => return Look::InLog(number, end),
            }
        }
        if let Some(context) = context {
            state.feeds.wait(key, context);
        }
        Look::Nothing
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

    /// Reads a batch. False if that was all.
    fn read(&self) -> bool {
        let mut wakers = Vec::new();
        let mut state = self.state();
        let State { feeds, tail, .. } = &mut *state;
        let seen = self.log.sequence(); // what comes after this changes it
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

    /// The thread's life.
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
        // Nothing of the application's runs under it.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
