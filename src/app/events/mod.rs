//! Delivers events from any publishing process to subscribers in every worker. `docs/events.md`
//! documents this for users.
//!
//! ```text
//! publish ─▶ the log in shared memory ─▶ a thread of each worker wakes its event loop, once
//!            ─▶ hub: the loop reads the log, once ─▶ feeds: recent events ─▶ each subscription ─▶ sse ─▶ the body
//! ```
//!
//! - [`name`] validates event names. [`cursor`] and [`frame`] encode ids and events. [`feeds`]
//!   holds recent events and waiting subscribers. All four are pure.
//! - [`hub`] contains the thread and the worker's only reader of the log.
//! - [`subscription`] yields the events of one subscriber. [`sse`] sends them as a response.

mod cursor;
mod feeds;
mod frame;
mod hub;
pub(crate) mod name;
mod sse;
mod subscription;

use std::fmt;
use std::io;
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use forkyard_shm::{PublishError, Segment};

use self::cursor::Cursor;
use self::frame::Frame;
use self::hub::Hub;
pub(crate) use self::sse::{EndsWithWorker, TYPE, sse_for};
pub use self::sse::{Sse, sse};
pub use self::subscription::Subscription;
use crate::config::events::EventsConfig;
use crate::protocol::topics::MAX_TOPICS;

/// Compiles the Rust examples of the document.
#[cfg(doctest)]
#[doc = include_str!("../../../docs/events.md")]
struct Document;

/// The event log that all workers share: an event published in any worker reaches the subscribers of all workers.
///
/// Cheap to clone, and usable on any thread.
#[derive(Clone, Debug)]
pub struct Events {
    hub: Arc<Hub>,
}

impl Events {
    pub(crate) fn new(segment: &Segment, config: EventsConfig) -> Self {
        Self { hub: Arc::new(Hub::new(segment.events(), config)) }
    }

    /// Publishes an event to `topic` and returns its id in that topic. Does not wait for subscribers.
    ///
    /// ```no_run
    /// # fn publish(cx: forkyard::Context) -> Result<(), forkyard::EventsError> {
    /// use forkyard::Event;
    ///
    /// cx.events().publish("news", "it rains")?;
    /// cx.events().publish("prices", Event::new("12.40").name("bid"))?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// Fails if there is no event log, if the name of the topic or of the event is invalid, if the event is too long,
    /// or if other processes hold the log's lock for too long.
    pub fn publish(&self, topic: &str, event: impl Into<Event>) -> Result<u64, EventsError> {
        let Event { name, data } = event.into();
        if name::fault(&name).is_some() {
            return Err(EventsError::Name { name });
        }
        self.hub.log().publish(topic, &name, &data).map_err(EventsError::NotPublished)
    }

    /// Returns the id of the most recent event in `topic`, or 0 if there is none.
    ///
    /// If the log has dropped topics, the result for a topic that is not in the log is the id after which the numbering
    /// of that topic would continue.
    #[must_use]
    pub fn last_id(&self, topic: &str) -> u64 {
        self.hub.log().last_id(topic)
    }

    /// Returns the number of subscribers in this worker.
    #[must_use]
    pub fn subscribers(&self) -> usize {
        self.hub.subscribers()
    }

    /// Subscribes to topics, starting with the next event, or with the first event after `last_event_id`.
    ///
    /// `last_event_id` is the result of [`Subscription::last_event_id`] for a subscription to the same topics in the
    /// same order.
    ///
    /// # Errors
    /// Fails if there is no event log, if a topic name is invalid or repeated, if no topics or more than 32 are given,
    /// or if the worker already has `--max-subscribers` subscribers.
    pub fn subscribe<T>(&self, topics: T, last_event_id: Option<&str>) -> Result<Subscription, EventsError>
    where
        T: IntoIterator<Item: AsRef<str>>,
    {
        Subscription::new(&self.hub, topics.into_iter().map(|topic| Arc::from(topic.as_ref())).collect(), last_event_id)
    }

    /// Delivers published events to this process's subscribers. Must run as a task of the event loop for as long as the
    /// process is running.
    pub(crate) async fn deliver(self) {
        self.hub.deliver().await;
    }

    /// Ends all subscriptions and prevents new ones.
    pub(crate) fn drain(&self) {
        self.hub.drain();
    }
}

/// An event to publish: its data, which should be UTF-8 text if browsers are to receive it, and an optional name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Event {
    name: String,
    data: Bytes,
}

impl Event {
    /// Creates an event without a name. Browsers deliver such an event as `message`.
    pub fn new(data: impl Into<Bytes>) -> Self {
        Self { name: String::new(), data: data.into() }
    }

    /// Sets the event's name, which is the event type that browsers pass to `addEventListener`.
    ///
    /// The name must not contain control characters and must not be `gap`: an event with this name notifies clients of
    /// missed events.
    #[must_use]
    pub fn name(self, name: impl Into<String>) -> Self {
        Self { name: name.into(), ..self }
    }
}

impl<D: Into<Bytes>> From<D> for Event {
    fn from(data: D) -> Self {
        Self::new(data)
    }
}

/// A published event. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Published(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    topic: Box<str>,
    id: u64,
    name: Box<str>,
    data: Bytes,
    epoch: u32,
    /// The frame for subscribers of this topic only, encoded when the first of them receives the
    /// event.
    frame: OnceLock<Frame>,
}

impl Published {
    fn new(event: forkyard_shm::Event, epoch: u32) -> Self {
        let forkyard_shm::Event { topic, id, name, data, .. } = event;
        Self(Arc::new(Inner { topic, id, name, data: data.into(), epoch, frame: OnceLock::new() }))
    }

    /// Returns the topic that the event was published to.
    #[must_use]
    pub fn topic(&self) -> &str {
        &self.0.topic
    }

    /// Returns the event's id, which is one more than the id of the previous event in the topic.
    #[must_use]
    pub fn id(&self) -> u64 {
        self.0.id
    }

    /// Returns the event's name; empty if it has none.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// Returns the event's data.
    #[must_use]
    pub fn data(&self) -> &Bytes {
        &self.0.data
    }

    fn frame(&self) -> &Frame {
        let id = || Cursor { epoch: self.0.epoch, ids: vec![self.id()] };
        self.0.frame.get_or_init(|| Frame::new(&id(), self.name(), self.data()))
    }
}

/// An item yielded by a [`Subscription`].
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Message {
    /// The next event of one of the topics.
    Event(Published),
    /// The log has dropped events of this topic that the subscriber has not received.
    Gap {
        /// The topic.
        topic: Arc<str>,
        /// The number of events missed; `None` if it is unknown.
        missed: Option<u64>,
    },
}

/// Why an event could not be published, or a subscription could not be created.
#[derive(Debug)]
#[non_exhaustive]
pub enum EventsError {
    /// There is no event log.
    NoLog,
    /// The topic name is invalid or repeated.
    Topic {
        /// The name.
        topic: String,
    },
    /// The event name is invalid.
    Name {
        /// The name.
        name: String,
    },
    /// The log rejected the event.
    NotPublished(PublishError),
    /// The subscription has no topics, or more than 32.
    TopicCount,
    /// The worker already has `--max-subscribers` subscribers.
    TooManySubscribers {
        /// The limit.
        most: u32,
    },
    /// The thread that waits for events could not be started.
    Thread(io::Error),
}

impl fmt::Display for EventsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoLog => f.write_str("there is no event log (--events gives it a size)"),
            Self::Topic { topic } => {
                write!(
                    f,
                    "{topic:?} cannot be a topic (1 to 128 bytes without control characters, and each topic once)"
                )
            }
            Self::Name { name } => {
                let why = name::fault(name).unwrap_or("is invalid");
                write!(f, "{name:?} cannot be the name of an event (it {why})")
            }
            Self::NotPublished(error @ (PublishError::TooLong { .. } | PublishError::TooManyTopics { .. })) => {
                write!(f, "{error}; --events sets the size of the log")
            }
            Self::NotPublished(error) => error.fmt(f),
            Self::TopicCount => write!(f, "a subscription has 1 to {MAX_TOPICS} topics"),
            Self::TooManySubscribers { most } => {
                write!(f, "this worker already has {most} subscribers (raise --max-subscribers, or run more workers)")
            }
            Self::Thread(error) => write!(f, "cannot start the thread that waits for events: {error}"),
        }
    }
}

impl std::error::Error for EventsError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::NotPublished(error) => Some(error),
            Self::Thread(error) => Some(error),
            _ => None,
        }
    }
}

#[cfg(test)]
impl Published {
    fn for_test(topic: &str, id: u64, data: &str) -> Self {
        let data = Bytes::copy_from_slice(data.as_bytes());
        Self(Arc::new(Inner { topic: topic.into(), id, name: "".into(), data, epoch: 1, frame: OnceLock::new() }))
    }
}
