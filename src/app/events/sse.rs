//! Sends a subscription as a response: as a `text/event-stream` until one side disconnects, or as one batch of events
//! if the client uses long polling. `docs/events.md` describes the protocol.
//!
//! No function blocks: the response is created immediately, on any thread, and the connection then polls the response's
//! body.

use std::convert::Infallible;
use std::fmt;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::header::{ACCEPT, CACHE_CONTROL, CONTENT_TYPE, HeaderName, RETRY_AFTER};
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, Uri};
use http_body::Frame;
use tokio::time::{Instant, Sleep, sleep_until};

use super::frame::{COMMENT, put_event, put_id, put_retry};
use super::{Event, Events, EventsError, Message, Published, Subscription, name};
use crate::app::body::Body;
use crate::config::millis;
use crate::protocol::query;

/// Content type of these responses.
pub(crate) const TYPE: &str = "text/event-stream";
/// Response extension for a response that ends when its worker drains and that the client resumes at another worker. An
/// event stream that the application produces itself does not carry this extension.
#[derive(Clone, Copy, Debug)]
pub(crate) struct EndsWithWorker;
const LAST_EVENT_ID: &str = "last-event-id";
const SIMULATE: &str = "x-event-source-simulate";
/// Range of the random reconnection delay of a draining worker's clients.
const BACK_AFTER_DRAIN_MS: (u64, u64) = (100, 2000);
/// Number of filtered messages after which the stream yields to other tasks.
const HELD_BACK: usize = 64;
/// Number of bytes at which the batch for a poll is full. The last message of the batch may exceed this number.
const BATCH: usize = 64 << 10;

/// Answers a request with the events in some topics: as Server-Sent Events or, if the client uses long polling, with
/// the next events only.
///
/// The client resumes where it left off if the request carries the id of the last event that the client received, in
/// the header `Last-Event-ID` or in the query as `lastEventId` or `last-event-id`.
///
/// ```no_run
/// use forkyard::http::{Request, Response};
/// use forkyard::{Body, sse};
///
/// fn main() -> std::process::ExitCode {
///     forkyard::run(|cx| {
///         let events = cx.events();
///         forkyard::blocking(move |request: Request<Body>| match request.uri().path() {
///             "/events" => sse(&request, &events, ["news"]).response(),
///             path => {
///                 let said = events.publish("news", format!("request for {path}"));
///                 Response::new(Body::from(said.map_or_else(|why| why.to_string(), |id| format!("event {id}\n"))))
///             }
///         })
///     })
/// }
/// ```
pub fn sse<B, T>(request: &Request<B>, events: &Events, topics: T) -> Sse
where
    T: IntoIterator<Item: AsRef<str>>,
{
    sse_for(request.headers(), request.uri(), events, topics)
}

/// Like [`sse`], for a request whose body has been taken.
pub(crate) fn sse_for<T>(headers: &HeaderMap, uri: &Uri, events: &Events, topics: T) -> Sse
where
    T: IntoIterator<Item: AsRef<str>>,
{
    let of_header = headers.get(LAST_EVENT_ID).map(|value| String::from_utf8_lossy(value.as_bytes()));
    let of_query = || {
        let mut pairs = query::pairs(uri.query()?);
        pairs.find_map(|(name, value)| matches!(&*name, "lastEventId" | LAST_EVENT_ID).then_some(value))
    };
    let last_event_id = of_header.filter(|id| !id.is_empty()).or_else(of_query).filter(|id| !id.is_empty());
    Sse {
        subscription: events.subscribe(topics, last_event_id.as_deref()),
        polls: polls(headers),
        retry: Duration::from_secs(2),
        keep_alive: Duration::from_secs(15),
        poll_timeout: Duration::from_secs(25),
        choice: Choice { filter: None, map: None },
    }
}

/// Whether the client uses long polling.
fn polls(headers: &HeaderMap) -> bool {
    let simulates = headers.get(SIMULATE).is_some_and(|how| how.as_bytes().eq_ignore_ascii_case(b"long-polling"));
    let mut accepted = headers.get_all(ACCEPT).iter().peekable();
    let says = accepted.peek().is_some();
    let streams = accepted.any(|types| types.to_str().is_ok_and(|types| types.to_ascii_lowercase().contains(TYPE)));
    simulates || (says && !streams)
}

/// Builds the response to a subscriber. Created by [`sse`].
#[must_use = "it is `response()` that answers"]
#[derive(Debug)]
pub struct Sse {
    subscription: Result<Subscription, EventsError>,
    polls: bool,
    retry: Duration,
    keep_alive: Duration,
    poll_timeout: Duration,
    choice: Choice,
}

/// Selects and changes the events that this client receives.
struct Choice {
    filter: Option<Box<Filter>>,
    map: Option<Box<Map>>,
}

type Filter = dyn FnMut(&Published) -> bool + Send;
type Map = dyn FnMut(&Published) -> Option<Event> + Send;

impl fmt::Debug for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Choice").field("filter", &self.filter.is_some()).field("map", &self.map.is_some()).finish()
    }
}

impl Sse {
    /// Sets how long a browser waits before it reconnects after the connection breaks (default 2 s). Each client is
    /// given a random time between half and one and a half times this value, so that clients do not all reconnect at
    /// the same moment.
    pub fn retry(self, retry: Duration) -> Self {
        Self { retry, ..self }
    }

    /// Sets how long a stream may be silent before a comment is sent (default 15 s). The comments keep intermediaries
    /// from treating the connection as dead. Zero disables the comments.
    pub fn keep_alive(self, keep_alive: Duration) -> Self {
        Self { keep_alive, ..self }
    }

    /// Sets the long-poll timeout: how long a polling client waits for an event (default 25 s).
    pub fn poll_timeout(self, poll_timeout: Duration) -> Self {
        Self { poll_timeout, ..self }
    }

    /// Omits the events for which `filter` returns false. The filter runs on the event loop, once for each event and
    /// client.
    pub fn filter(mut self, filter: impl FnMut(&Published) -> bool + Send + 'static) -> Self {
        self.choice.filter = Some(Box::new(filter));
        self
    }

    /// Replaces each event with the event that `map` returns, or omits the event if `map` returns `None`. Ids do not
    /// change.
    ///
    /// `map` runs on the event loop, once for each event and client. Events that are not mapped are encoded once for
    /// all clients of a worker.
    pub fn map(mut self, map: impl FnMut(&Published) -> Option<Event> + Send + 'static) -> Self {
        self.choice.map = Some(Box::new(map));
        self
    }

    /// Returns why the subscription failed, if it did.
    pub(crate) fn error(&self) -> Option<&EventsError> {
        self.subscription.as_ref().err()
    }

    /// Creates the response. If the subscription fails, the response is a 503, with `Retry-After` if retrying may help,
    /// and the reason is logged.
    #[must_use]
    pub fn response(self) -> Response<Body> {
        let subscription = match self.subscription {
            Ok(subscription) => subscription,
            Err(error) => return refusal(&error),
        };
        let mut stream = Stream {
            subscription,
            choice: self.choice,
            every: if self.polls { self.poll_timeout } else { self.keep_alive },
            polls: self.polls,
            stage: if self.polls { Stage::Going } else { Stage::Opening { retry: self.retry } },
            alarm: None,
            sent_at: None,
            is_id_due: false,
        };
        let at_once = if self.polls { stream.batch(None) } else { BytesMut::new() };
        let mut response = if at_once.is_empty() {
            let mut response = Response::new(Body::new(stream));
            response.extensions_mut().insert(EndsWithWorker);
            response
        } else {
            Response::new(Body::from(at_once.freeze()))
        };
        let headers = [
            (CONTENT_TYPE, TYPE),
            (CACHE_CONTROL, "no-cache, no-transform"),
            (HeaderName::from_static("x-accel-buffering"), "no"),
        ];
        for (name, value) in headers {
            response.headers_mut().insert(name, HeaderValue::from_static(value));
        }
        response
    }
}

fn refusal(error: &EventsError) -> Response<Body> {
    match error {
        EventsError::TooManySubscribers { .. } => log::warn!("refused a subscriber: {error}"),
        _ => log::error!("cannot subscribe to events: {error}"),
    }
    let mut response = Response::new(Body::from("503: no events are available now\n"));
    *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
    if matches!(error, EventsError::TooManySubscribers { .. } | EventsError::Thread(_)) {
        response.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("5"));
    }
    response
}

/// The response body.
struct Stream {
    subscription: Subscription,
    choice: Choice,
    /// The keep-alive interval, or the time limit of a poll.
    every: Duration,
    polls: bool,
    stage: Stage,
    alarm: Option<Pin<Box<Sleep>>>,
    sent_at: Option<Instant>,
    /// Whether the subscriber's position is ahead of the last id that was sent to the client.
    is_id_due: bool,
}

#[derive(Clone, Copy, Debug)]
enum Stage {
    /// Nothing has been sent yet.
    Opening {
        retry: Duration,
    },
    Going,
    Over,
}

impl Stream {
    fn next(&mut self, context: &mut Context<'_>) -> Poll<Option<Bytes>> {
        match self.stage {
            Stage::Over => return Poll::Ready(None),
            Stage::Opening { retry } => {
                self.stage = Stage::Going;
                let mut bytes = BytesMut::new();
                let ms = millis(retry);
                put_retry(&mut bytes, between(ms / 2, ms.saturating_add(ms / 2)));
                self.put_whole_id(&mut bytes);
                return self.send(bytes.freeze());
            }
            Stage::Going if self.polls => {
                let batch = self.batch(Some(context));
                if !batch.is_empty() {
                    self.stage = Stage::Over;
                    return self.send(batch.freeze());
                }
            }
            Stage::Going => {
                for _ in 0..HELD_BACK {
                    match self.subscription.poll(context) {
                        Poll::Ready(Some(message)) => {
                            if let Some(bytes) = self.encode(&message) {
                                return self.send(bytes);
                            }
                        }
                        Poll::Ready(None) => {
                            self.stage = Stage::Over;
                            let farewell = self.farewell();
                            return self.send(farewell);
                        }
                        Poll::Pending => return self.poll_alarm(context),
                    }
                }
                context.waker().wake_by_ref();
            }
        }
        self.poll_alarm(context)
    }

    /// Collects the available events for a poll. The result is empty if there are none.
    fn batch(&mut self, context: Option<&Context<'_>>) -> BytesMut {
        let mut bytes = BytesMut::new();
        let mut held_back = 0;
        while bytes.len() < BATCH {
            match self.subscription.advance(context) {
                Poll::Ready(Some(message)) => match self.encode(&message) {
                    Some(frame) => bytes.extend_from_slice(&frame),
                    // Filtering still more messages would delay other tasks. Send the position, and let the client poll
                    // again for the remaining events.
                    None if held_back == 16 * HELD_BACK => {
                        self.put_whole_id(&mut bytes);
                        break;
                    }
                    None => held_back += 1,
                },
                Poll::Ready(None) if bytes.is_empty() => {
                    self.put_whole_id(&mut bytes);
                    break;
                }
                Poll::Ready(None) | Poll::Pending => break,
            }
        }
        bytes
    }

    /// Sends a keep-alive comment, or ends the poll, when that is due. Called when there is nothing else to send.
    fn poll_alarm(&mut self, context: &mut Context<'_>) -> Poll<Option<Bytes>> {
        if self.every.is_zero() && !self.polls {
            return Poll::Pending;
        }
        loop {
            let since = *self.sent_at.get_or_insert_with(Instant::now);
            let Some(due) = since.checked_add(self.every) else { return Poll::Pending };
            let alarm = self.alarm.get_or_insert_with(|| Box::pin(sleep_until(due)));
            if alarm.as_mut().poll(context).is_pending() {
                return Poll::Pending;
            }
            if alarm.deadline() >= due {
                break;
            }
            alarm.as_mut().reset(due); // something was sent since the alarm was set
        }
        self.alarm = None;
        if self.polls {
            self.stage = Stage::Over;
        }
        if self.polls || self.is_id_due {
            let mut bytes = BytesMut::new();
            self.put_whole_id(&mut bytes);
            return self.send(bytes.freeze());
        }
        self.send(Bytes::from_static(COMMENT))
    }

    fn send(&mut self, bytes: Bytes) -> Poll<Option<Bytes>> {
        self.sent_at = Some(Instant::now());
        Poll::Ready(Some(bytes))
    }

    /// Encodes a message for the client; `None` if it is filtered out.
    fn encode(&mut self, message: &Message) -> Option<Bytes> {
        let bytes = match message {
            Message::Event(event) => self.encode_event(event),
            Message::Gap { topic, missed } => {
                let missed = missed.map_or_else(|| "?".to_owned(), |missed| missed.to_string());
                Some(self.encode_as(name::GAP, format!("{missed} {topic}").as_bytes()))
            }
        };
        self.is_id_due = bytes.is_none();
        bytes
    }

    fn encode_event(&mut self, event: &Published) -> Option<Bytes> {
        if let Some(filter) = &mut self.choice.filter
            && !filter(event)
        {
            return None;
        }
        if let Some(map) = &mut self.choice.map {
            let Event { name, data } = map(event)?;
            return Some(self.encode_as(&name, &data));
        }
        Some(match self.subscription.topics() {
            [_] => event.frame().whole(),
            _ => event.frame().with_id(self.subscription.cursor()),
        })
    }

    fn encode_as(&self, name: &str, data: &[u8]) -> Bytes {
        let mut bytes = BytesMut::new();
        put_id(&mut bytes, self.subscription.cursor());
        put_event(&mut bytes, name, data);
        bytes.freeze()
    }

    /// Writes the position, without an event.
    fn put_whole_id(&mut self, bytes: &mut BytesMut) {
        self.is_id_due = false;
        put_id(bytes, self.subscription.cursor());
        bytes.extend_from_slice(b"\n");
    }

    /// Returns the bytes that end the stream before the worker exits.
    fn farewell(&mut self) -> Bytes {
        let mut bytes = BytesMut::new();
        put_retry(&mut bytes, between(BACK_AFTER_DRAIN_MS.0, BACK_AFTER_DRAIN_MS.1));
        self.put_whole_id(&mut bytes);
        bytes.freeze()
    }
}

/// Returns a random number from `least` to `most`.
fn between(least: u64, most: u64) -> u64 {
    // If no random numbers are available, all clients reconnect at the same time. This is no reason to fail.
    let random = getrandom::u64().unwrap_or(0);
    least + random % (most - least).saturating_add(1)
}

impl http_body::Body for Stream {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        self.next(context).map(|bytes| bytes.map(|bytes| Ok(Frame::data(bytes))))
    }

    fn is_end_stream(&self) -> bool {
        matches!(self.stage, Stage::Over)
    }
}
