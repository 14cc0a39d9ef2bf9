//! Tracks the activity of a connection. The protocol and the request bodies record it, and the
//! worker's watchdog (`worker/lifecycle/watchdog.rs`) reads it to cut off clients that take too
//! long.
//!
//! The state counts the requests under way, so that several requests of one connection do not overwrite each other's
//! state. Recording activity costs a few stores per request and never blocks. Any thread may record activity.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Waker;
use std::time::Duration;

use http::Request;
use tokio::sync::Notify;

use super::body_wait::SlowBody;
use super::buffered::{Held, SMALL};
use super::queue_time::WaitedInKernel;

/// What a connection's reads wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    /// The next request; no part of it has arrived.
    Idle,
    /// The rest of a request's head.
    Head,
    /// A chunk of a request's body that a reader waits for.
    Body,
    /// Nothing from the peer: the application is working, or its response is being sent.
    Answering,
}

/// The activity of a connection.
#[derive(Debug, Default)]
pub(crate) struct Activity {
    /// Number of requests whose response is not complete.
    under_way: AtomicU32,
    /// Number of bodies with a waiting reader.
    bodies: AtomicU32,
    /// The bodies for which a reader is waiting, or has waited before.
    slow_bodies: Mutex<Vec<Arc<SlowBody>>>,
    /// Number of responses that wait for flow-control window in their streams (HTTP/2).
    held_back: AtomicU32,
    /// Number of requests under way whose responses are streams that end when the worker drains.
    streams: AtomicU32,
    /// Whether the last request was for an event stream and, as far as is known, all earlier responses had been written
    /// when that request began.
    ends_in_stream: AtomicBool,
    /// Whether part of a request head has arrived.
    head_begun: AtomicBool,
    /// Whether the protocol itself reports heads, because it also receives input other than requests.
    knows_heads: AtomicBool,
    is_writing: AtomicBool,
    /// Number of requests; wraps around.
    requests: AtomicU32,
    /// Number of bytes written; wraps around.
    written: AtomicU32,
    has_expired: AtomicBool,
    is_closed: AtomicBool,
    /// How long the first bytes waited in the kernel, in milliseconds. The first request takes this value.
    waited_ms: AtomicU32,
    /// Received bytes that are held in memory.
    held: Held,
    /// Whether the protocol can announce the end of the connection.
    says_goodbye: AtomicBool,
    has_said_goodbye: AtomicBool,
    goodbye: Notify,
    /// Whether the connection is asked to free its buffers.
    rest_asked: AtomicBool,
    /// Wakes the task of a connection that can free its buffers.
    rest_waker: Mutex<Option<Waker>>,
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

    /// Sets how long the first bytes waited in the kernel.
    pub(crate) fn set_waited(&self, time: Duration) {
        self.waited_ms.store(u32::try_from(time.as_millis()).unwrap_or(u32::MAX), Relaxed);
    }

    /// Adds the time that the first bytes waited to the extensions of the first request.
    pub(crate) fn tell_waited<B>(&self, request: &mut Request<B>) {
        if self.waited_ms.load(Relaxed) > 0 {
            let waited = WaitedInKernel(Duration::from_millis(self.waited_ms.swap(0, Relaxed).into()));
            request.extensions_mut().insert(waited);
        }
    }

    /// Records that the head of a request is complete.
    pub(crate) fn request_came(&self) {
        step(&self.under_way, 1);
        self.ends_in_stream.store(false, Relaxed);
        self.head_begun.store(false, Relaxed);
        add(&self.requests, 1);
    }

    /// Records that the response to a request is complete, or will never be complete.
    pub(crate) fn request_over(&self) {
        self.held.one_of(self.under_way());
        step(&self.under_way, -1);
    }

    /// Returns the number of bodies with a waiting reader.
    pub(super) fn bodies(&self) -> &AtomicU32 {
        &self.bodies
    }

    /// Returns the bodies that a reader has waited for.
    pub(super) fn slow_bodies(&self) -> MutexGuard<'_, Vec<Arc<SlowBody>>> {
        lock(&self.slow_bodies)
    }

    /// Ends the wait for each body for which `is_over` returns true. Returns the number of these bodies.
    pub(crate) fn expire_bodies(&self, is_over: impl Fn(&SlowBody) -> bool) -> usize {
        if self.bodies.load(Relaxed) == 0 {
            return 0;
        }
        let over: Vec<_> =
            self.slow_bodies().iter().filter(|body| body.is_waited_for() && is_over(body)).cloned().collect();
        over.iter().for_each(|body| body.expire()); // after the lock is released
        over.len()
    }

    /// Returns the number of ticks for which a reader has waited for the slowest body.
    pub(crate) fn slowest_body(&self) -> u32 {
        self.slow_bodies().iter().map(|body| body.ticks()).max().unwrap_or_default()
    }

    pub(crate) fn under_way(&self) -> u32 {
        self.under_way.load(Relaxed)
    }

    /// Whether all requests under way are event streams. Earlier responses may still be in transit.
    pub(crate) fn is_streaming(&self) -> bool {
        let streams = self.streams.load(Relaxed);
        streams > 0 && streams == self.under_way()
    }

    /// Whether only event streams, or the ends of event streams, remain to be sent.
    pub(crate) fn ends_in_stream(&self) -> bool {
        self.ends_in_stream.load(Relaxed)
    }

    pub(crate) fn requests(&self) -> u32 {
        self.requests.load(Relaxed)
    }

    /// Makes [`Activity::set_head_begun`] the only way to record heads. Before this call, any bytes that arrive between
    /// requests count as the beginning of a head.
    pub(crate) fn set_knows_heads(&self) {
        self.knows_heads.store(true, Relaxed);
        self.set_head_begun(false);
    }

    /// Records whether part of a request head has arrived.
    pub(crate) fn set_head_begun(&self, has: bool) {
        self.head_begun.store(has, Relaxed);
    }

    /// Records bytes read from the peer.
    pub(crate) fn add_read(&self, bytes: usize) {
        if bytes >= SMALL || self.held.bytes() > 0 || self.stage() != Stage::Idle {
            self.held.add(bytes);
        }
        if self.under_way.load(Relaxed) == 0 && !self.knows_heads.load(Relaxed) {
            self.set_head_begun(true);
        }
    }

    pub(crate) fn held(&self) -> &Held {
        &self.held
    }

    /// Records bytes written to the peer.
    pub(crate) fn add_written(&self, bytes: usize) {
        add(&self.written, bytes);
    }

    pub(crate) fn written(&self) -> u32 {
        self.written.load(Relaxed)
    }

    /// Records whether a write waits for the peer to read.
    pub(crate) fn set_writing(&self, waits: bool) {
        self.is_writing.store(waits, Relaxed);
    }

    /// Whether a response waits for the peer.
    pub(crate) fn is_writing(&self) -> bool {
        self.is_writing.load(Relaxed) || self.held_back.load(Relaxed) > 0
    }

    /// Records that the peer took too long and is being cut off.
    pub(crate) fn expire(&self) {
        self.has_expired.store(true, Relaxed);
    }

    pub(crate) fn has_expired(&self) -> bool {
        self.has_expired.load(Relaxed)
    }

    /// Records that the protocol can announce the end of the connection, so that [`Activity::say_goodbye`] works.
    pub(crate) fn set_says_goodbye(&self) {
        self.says_goodbye.store(true, Relaxed);
    }

    pub(crate) fn says_goodbye(&self) -> bool {
        self.says_goodbye.load(Relaxed)
    }

    /// Ends the connection gracefully when the requests that have begun are complete. Returns false if the protocol
    /// does not support this.
    pub(crate) fn say_goodbye(&self) -> bool {
        let can = self.says_goodbye();
        if can {
            self.goodbye.notify_one();
        }
        can
    }

    /// Records that the end of the connection was announced to the peer, for any reason.
    pub(crate) fn set_said_goodbye(&self) {
        self.has_said_goodbye.store(true, Relaxed);
    }

    pub(crate) fn has_said_goodbye(&self) -> bool {
        self.has_said_goodbye.load(Relaxed)
    }

    /// Returns when the connection must end.
    pub(crate) async fn goodbye(&self) {
        self.goodbye.notified().await;
    }

    /// Sets the task that [`Activity::ask_to_rest`] wakes.
    pub(crate) fn can_rest(&self, waker: &Waker) {
        *lock(&self.rest_waker) = Some(waker.clone());
    }

    /// Asks an idle connection to free the buffers of its protocol until the next request. Returns false if the protocol
    /// does not support this.
    pub(crate) fn ask_to_rest(&self) -> bool {
        let Some(waker) = lock(&self.rest_waker).clone() else { return false };
        self.rest_asked.store(true, Relaxed);
        waker.wake();
        true
    }

    /// Whether the connection was asked to free its buffers since the last call.
    pub(crate) fn is_asked_to_rest(&self) -> bool {
        self.rest_asked.load(Relaxed) && self.rest_asked.swap(false, Relaxed)
    }

    /// Records that the connection has ended.
    pub(crate) fn close(&self) {
        self.held.clear();
        *lock(&self.rest_waker) = None; // it keeps the memory of the task
        self.is_closed.store(true, Relaxed);
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.is_closed.load(Relaxed)
    }
}

/// Locks a mutex. No code under these locks can panic.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Adds to a counter that only one thread writes: the connection's thread.
fn add(word: &AtomicU32, count: usize) {
    let count = u32::try_from(count).unwrap_or(u32::MAX);
    word.store(word.load(Relaxed).wrapping_add(count), Relaxed);
}

/// Increments or decrements a counter that only the connection's thread writes.
fn step(word: &AtomicU32, by: i32) {
    word.store(word.load(Relaxed).saturating_add_signed(by), Relaxed);
}

/// A wait for the connection's peer. Dropping this value ends the wait.
#[derive(Debug)]
pub(crate) struct Wait {
    activity: Arc<Activity>,
    counter: fn(&Activity) -> &AtomicU32,
    waits: bool,
}

impl Wait {
    /// Begins a wait for flow-control window in a stream.
    pub(crate) fn for_room(activity: &Arc<Activity>) -> Self {
        Self { activity: Arc::clone(activity), counter: |activity| &activity.held_back, waits: false }
    }

    /// Begins a wait for events to send. The wait is assumed to belong to the last request that has begun.
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
