//! What a connection is at: told by its protocol and by the bodies of its requests, looked at by the worker's watchdog
//! (`worker/lifecycle/watchdog.rs`), which cuts off whoever takes too long.
//!
//! It counts what is under way, so that several requests of one connection do not speak over each other. That is a few
//! stores per request, and nothing to wait for: whoever tells may be on any thread.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use http::Request;
use tokio::sync::Notify;

use super::body_wait::SlowBody;
use super::buffered::{Held, SMALL};
use super::queue_time::WaitedInKernel;

/// What a connection's reads wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    /// The next request; nothing of it has come.
    Idle,
    /// The rest of a request's head.
    Head,
    /// A piece of a request's body, for somebody who wants to read it.
    Body,
    /// Nothing that the peer owes us: the application is at work, or its response is on its way.
    Answering,
}

/// A connection's pulse.
#[derive(Debug, Default)]
pub(crate) struct Activity {
    /// Requests whose response is not complete.
    under_way: AtomicU32,
    /// Bodies of which somebody waits for a piece.
    bodies: AtomicU32,
    /// Those, and others of which somebody has waited for a piece.
    slow_bodies: Mutex<Vec<Arc<SlowBody>>>,
    /// Responses for which the peer gives no room in their streams (HTTP/2).
    held_back: AtomicU32,
    /// Streams that end with the worker among the requests under way.
    streams: AtomicU32,
    /// The last request was for an event stream, and when that began all else had been written, as far as is known.
    ends_in_stream: AtomicBool,
    /// Something of a head has come.
    head_begun: AtomicBool,
    /// The protocol tells about heads itself, since it sends more than requests.
    knows_heads: AtomicBool,
    is_writing: AtomicBool,
    /// These wrap around.
    requests: AtomicU32,
    written: AtomicU32,
    has_expired: AtomicBool,
    is_closed: AtomicBool,
    /// Milliseconds that the first bytes had waited in the kernel; for the first request to take.
    waited_ms: AtomicU32,
    /// Of what has come.
    held: Held,
    /// The protocol has a way to say that the connection ends.
    says_goodbye: AtomicBool,
    has_said_goodbye: AtomicBool,
    goodbye: Notify,
}

impl Activity {
    pub(crate) fn stage(&self) -> Stage {
        if self.bodies.load(Relaxed) > 0 {
            Stage::Body
        } else if self.under_way.load(Relaxed) > 0 || self.is_writing.load(Relaxed) {
            Stage::Answering
        } else if self.head_begun.load(Relaxed) {
            Stage::Head
        } else {
            Stage::Idle
        }
    }

    /// The first bytes had waited in the kernel for so long.
    pub(crate) fn set_waited(&self, time: Duration) {
        self.waited_ms.store(u32::try_from(time.as_millis()).unwrap_or(u32::MAX), Relaxed);
    }

    /// Tells the first request how long it has waited.
    pub(crate) fn tell_waited<B>(&self, request: &mut Request<B>) {
        if self.waited_ms.load(Relaxed) > 0 {
            let waited = WaitedInKernel(Duration::from_millis(self.waited_ms.swap(0, Relaxed).into()));
            request.extensions_mut().insert(waited);
        }
    }

    /// The head of a request is complete.
    pub(crate) fn request_came(&self) {
        step(&self.under_way, 1);
        self.ends_in_stream.store(false, Relaxed);
        self.head_begun.store(false, Relaxed);
        add(&self.requests, 1);
    }

    /// The response to a request is complete, or will never be.
    pub(crate) fn request_over(&self) {
        self.held.one_of(self.under_way());
        step(&self.under_way, -1);
    }

    /// How many bodies somebody waits for a piece of.
    pub(super) fn bodies(&self) -> &AtomicU32 {
        &self.bodies
    }

    /// The bodies of which somebody has waited for a piece.
    pub(super) fn slow_bodies(&self) -> MutexGuard<'_, Vec<Arc<SlowBody>>> {
        // No code that can panic runs under the lock.
        self.slow_bodies.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the wait for each body of which `is_over` says so. Returns how many there were.
    pub(crate) fn expire_bodies(&self, is_over: impl Fn(&SlowBody) -> bool) -> usize {
        if self.bodies.load(Relaxed) == 0 {
            return 0;
        }
        let over: Vec<_> =
            self.slow_bodies().iter().filter(|body| body.is_waited_for() && is_over(body)).cloned().collect();
        over.iter().for_each(|body| body.expire()); // after the lock is given back
        over.len()
    }

    /// For how many ticks the slowest body has been waited for.
    pub(crate) fn slowest_body(&self) -> u32 {
        self.slow_bodies().iter().map(|body| body.ticks()).max().unwrap_or_default()
    }

    pub(crate) fn under_way(&self) -> u32 {
        self.under_way.load(Relaxed)
    }

    /// Whether all that is under way is event streams. What was answered before may still be on its way.
    pub(crate) fn is_streaming(&self) -> bool {
        let streams = self.streams.load(Relaxed);
        streams > 0 && streams == self.under_way()
    }

    /// Whether nothing is on its way but event streams, or their ends.
    pub(crate) fn ends_in_stream(&self) -> bool {
        self.ends_in_stream.load(Relaxed)
    }

    /// How many requests there were.
    pub(crate) fn requests(&self) -> u32 {
        self.requests.load(Relaxed)
    }

    /// From now on [`Activity::set_head_begun`] tells about heads. Otherwise whatever comes between requests begins one.
    pub(crate) fn set_knows_heads(&self) {
        self.knows_heads.store(true, Relaxed);
        self.set_head_begun(false);
    }

    /// A part of a request's head has come, or none.
    pub(crate) fn set_head_begun(&self, has: bool) {
        self.head_begun.store(has, Relaxed);
    }

    /// So many bytes came from the peer.
    pub(crate) fn add_read(&self, bytes: usize) {
        if bytes >= SMALL || self.held.bytes() > 0 || self.stage() != Stage::Idle {
            self.held.add(bytes);
        }
        if self.under_way.load(Relaxed) == 0 && !self.knows_heads.load(Relaxed) {
            self.set_head_begun(true);
        }
    }

    /// What is held in memory of what has come.
    pub(crate) fn held(&self) -> &Held {
        &self.held
    }

    /// So many bytes went to the peer.
    pub(crate) fn add_written(&self, bytes: usize) {
        add(&self.written, bytes);
    }

    pub(crate) fn written(&self) -> u32 {
        self.written.load(Relaxed)
    }

    /// A write waits for the peer to read, or does so no longer.
    pub(crate) fn set_writing(&self, waits: bool) {
        self.is_writing.store(waits, Relaxed);
    }

    /// Whether a response waits for the peer.
    pub(crate) fn is_writing(&self) -> bool {
        self.is_writing.load(Relaxed) || self.held_back.load(Relaxed) > 0
    }

    /// The peer took too long, and is cut off.
    pub(crate) fn expire(&self) {
        self.has_expired.store(true, Relaxed);
    }

    pub(crate) fn has_expired(&self) -> bool {
        self.has_expired.load(Relaxed)
    }

    /// From now on [`Activity::say_goodbye`] ends the connection in good order.
    pub(crate) fn set_says_goodbye(&self) {
        self.says_goodbye.store(true, Relaxed);
    }

    pub(crate) fn says_goodbye(&self) -> bool {
        self.says_goodbye.load(Relaxed)
    }

    /// Has the connection end in good order, as soon as what has begun is over. False if its protocol knows no such thing.
    pub(crate) fn say_goodbye(&self) -> bool {
        let can = self.says_goodbye();
        if can {
            self.goodbye.notify_one();
        }
        can
    }

    /// The peer has been told that the connection ends, for whatever reason.
    pub(crate) fn set_said_goodbye(&self) {
        self.has_said_goodbye.store(true, Relaxed);
    }

    pub(crate) fn has_said_goodbye(&self) -> bool {
        self.has_said_goodbye.load(Relaxed)
    }

    /// Returns when the connection is to end.
    pub(crate) async fn goodbye(&self) {
        self.goodbye.notified().await;
    }

    /// The connection is at its end.
    pub(crate) fn close(&self) {
        self.held.clear();
        self.is_closed.store(true, Relaxed);
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.is_closed.load(Relaxed)
    }
}

/// Counts, in a word that one thread writes: that of the connection.
fn add(word: &AtomicU32, count: usize) {
    let count = u32::try_from(count).unwrap_or(u32::MAX);
    word.store(word.load(Relaxed).wrapping_add(count), Relaxed);
}

/// Counts up or down, likewise.
fn step(word: &AtomicU32, by: i32) {
    word.store(word.load(Relaxed).saturating_add_signed(by), Relaxed);
}

/// One of those who may wait for a connection's peer. Dropped, it waits no more.
#[derive(Debug)]
pub(crate) struct Wait {
    activity: Arc<Activity>,
    counter: fn(&Activity) -> &AtomicU32,
    waits: bool,
}

impl Wait {
    /// For room in a stream.
    pub(crate) fn for_room(activity: &Arc<Activity>) -> Self {
        Self { activity: Arc::clone(activity), counter: |activity| &activity.held_back, waits: false }
    }

    /// For events to send: of the request under way that has come last, say.
    pub(crate) fn for_events(activity: &Arc<Activity>) -> Self {
        let mut stream = Self { activity: Arc::clone(activity), counter: |activity| &activity.streams, waits: false };
        stream.set(true);
        activity.ends_in_stream.store(activity.is_streaming() && !activity.is_writing(), Relaxed);
        stream
    }

    pub(crate) fn set(&mut self, waits: bool) {
        if std::mem::replace(&mut self.waits, waits) != waits {
            let counter = (self.counter)(&self.activity);
            if waits {
                counter.fetch_add(1, Relaxed);
            } else {
                counter.fetch_sub(1, Relaxed);
            }
        }
    }
}

impl Drop for Wait {
    fn drop(&mut self) {
        self.set(false);
    }
}
