//! Signals a worker's tasks to drain, and hands the worker's connections over to siblings.
//!
//! A draining worker closes no connection that a sibling can continue. A connection with no request under way is handed
//! over to a sibling, together with any bytes in transit, and the peer does not notice. If all workers are draining, no
//! sibling can continue: the connection is then kept for a short time for one more request, and closed.

use std::cell::Cell;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Waker};
use std::time::Duration;

use forkyard_shm::Scoreboard;
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::heir::journal::READ_BUFFER;
use crate::net::handover::{self, Channel};
use crate::worker::conn::socket::Socket;

/// How long an idle connection that no sibling takes over is kept for a request that may be in transit. This time is
/// limited to half of the drain timeout, because the worker has to exit before it is killed.
const LAST_REQUEST: Duration = Duration::from_secs(1);

/// Time between two attempts to hand a connection over while too many are in transit.
const CROWDED: Duration = Duration::from_millis(5);

/// Maximum length of each of the last three phases of a drain: one for the application's last output on connections
/// that cannot be handed over, one for the client to read it, and one for the worker to exit before it is killed.
const FAREWELL: Duration = Duration::from_secs(1);

/// Remembers which task has registered to be woken, because one registration per task is enough. (Registering on each
/// poll would add a tenth to the time that a request takes.)
#[derive(Debug, Default)]
pub(crate) struct WakerRegistration(Option<Waker>);

impl WakerRegistration {
    /// Returns true if the task has not registered before.
    pub(crate) fn is_new(&mut self, context: &Context<'_>) -> bool {
        if self.0.as_ref().is_some_and(|waker| waker.will_wake(context.waker())) {
            return false;
        }
        self.0 = Some(context.waker().clone());
        true
    }
}

/// The signal to drain. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Drain(Rc<State>);

#[derive(Debug)]
struct State {
    flag: Arc<AtomicBool>,
    begun: Notify,
    channel: Arc<Channel>,
    scoreboard: Scoreboard,
    slot: u32,
    /// Signals that a connection was handed over although the last sibling had also begun to drain.
    stranded: Notify,
    passed_on: Cell<u64>,
    timeout: Duration,
    begun_at: Cell<Option<Instant>>,
}

impl Drain {
    pub(crate) fn new(channel: Arc<Channel>, scoreboard: Scoreboard, slot: u32, timeout: Duration) -> Self {
        let (begun, stranded) = (Notify::new(), Notify::new());
        Self(Rc::new(State {
            flag: Arc::default(),
            begun,
            channel,
            scoreboard,
            slot,
            stranded,
            passed_on: Cell::new(0),
            timeout,
            begun_at: Cell::new(None),
        }))
    }

    /// Returns a flag that is true once the drain has begun.
    pub(crate) fn flag(&self) -> &Arc<AtomicBool> {
        &self.0.flag
    }

    pub(crate) fn begin(&self) {
        self.0.begun_at.set(Some(Instant::now()));
        self.0.flag.store(true, Ordering::Relaxed);
        self.0.begun.notify_waiters();
    }

    pub(crate) fn has_begun(&self) -> bool {
        self.0.flag.load(Ordering::Relaxed)
    }

    /// Returns when the drain has begun.
    pub(crate) async fn wait(&self) {
        let begun = self.0.begun.notified();
        if !self.has_begun() {
            begun.await;
        }
    }

    /// Returns when the drain has begun and the time in which an idle connection may send one more request has passed.
    ///
    /// A client that has just connected, or has just received a response, may be about to send a request. That request
    /// would fail if the connection were closed.
    pub(crate) async fn wait_for_last_request(&self) {
        self.wait().await;
        tokio::time::sleep(self.last_request()).await;
    }

    fn last_request(&self) -> Duration {
        LAST_REQUEST.min(self.0.timeout / 2)
    }

    /// Returns when the drain has nearly reached its limit (`--drain-timeout`) and upgraded connections therefore have
    /// to end.
    pub(crate) async fn wait_for_end(&self) {
        self.wait_until_left(self.farewell() * 3).await;
    }

    /// Returns when connections that wait for their clients must be cut off, so that the worker can exit on its own.
    pub(crate) async fn wait_for_cutoff(&self) {
        self.wait_until_left(self.farewell()).await;
    }

    /// Returns when only `left` of the drain remains.
    async fn wait_until_left(&self, left: Duration) {
        self.wait().await;
        if let Some(begun) = self.0.begun_at.get() {
            tokio::time::sleep_until(begun + self.0.timeout.saturating_sub(left)).await;
        }
    }

    /// Returns how long the application's last output may take, and how long the client may take to read it.
    pub(crate) fn farewell(&self) -> Duration {
        FAREWELL.min(self.0.timeout / 8)
    }

    /// Whether a sibling can take connections over.
    pub(crate) fn has_sibling(&self) -> bool {
        self.0.scoreboard.freest(self.0.slot).is_some()
    }

    /// Returns when the drain has begun and a connection without a request can be handed over, or has been kept long
    /// enough.
    pub(crate) async fn wait_to_move(&self) {
        self.wait().await;
        if !self.has_sibling() {
            tokio::time::sleep(self.last_request()).await;
        }
    }

    /// Hands a connection over, with `early`, the bytes that have been read from it but not processed. Closes the
    /// connection if no sibling can take it.
    ///
    /// The future is boxed, so that it does not make the task of every connection larger.
    pub(crate) fn hand_over(&self, socket: Socket, early: &[u8]) -> Pin<Box<impl Future<Output = ()>>> {
        let early = [early, socket.early()].concat();
        Box::pin(async move {
            while self.has_sibling() && early.len() <= READ_BUFFER {
                match socket.conn().hand_off(self.0.channel.sender(), &early) {
                    Ok(()) => {
                        self.0.passed_on.set(self.0.passed_on.get() + 1);
                        // A sibling that had not begun to drain before the message was sent receives the message. If no
                        // sibling remains, this worker takes the connection back.
                        if !self.has_sibling() {
                            self.0.stranded.notify_one();
                        }
                        return;
                    }
                    // Many connections are in transit, and siblings will take them soon. `--drain-timeout` limits the
                    // wait.
                    Err(error) if handover::is_for_later(&error) => tokio::time::sleep(CROWDED).await,
                    Err(error) => return log::debug!("cannot hand a connection over: {error}"),
                }
            }
        })
    }

    /// Returns when a connection has been handed over that no sibling will take.
    pub(crate) async fn stranded(&self) {
        self.0.stranded.notified().await;
    }

    /// Returns the number of connections that have been handed over.
    pub(crate) fn passed_on(&self) -> u64 {
        self.0.passed_on.get()
    }
}
