//! The order to leave, as the worker's own tasks see it, and where the connections go that outlive the worker.
//!
//! A worker that leaves closes nothing that could go on: a connection on which nothing is under way is passed on to a
//! sibling, with whatever is on its way in it, and its peer notices nothing. If all workers leave there is nobody to pass it
//! on to: then it gets a little time for one more request, and is closed.

use std::cell::Cell;
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

/// How long an idle connection that nobody takes over is kept for a request that may be on its way, but no longer than half of
/// the drain: the worker has to leave before it is killed.
const LAST_REQUEST: Duration = Duration::from_secs(1);

/// Between two tries to pass a connection on when too many are on their way.
const CROWDED: Duration = Duration::from_millis(5);

/// The last three parts of a drain are so long each, at most: one for the application's last words on what cannot be passed on, one
/// for the client to take them, and one for the worker to leave before it is killed.
const FAREWELL: Duration = Duration::from_secs(1);

/// Who was asked to be woken: to ask once is enough, as long as it is the same task. (To ask each time would cost a tenth of a
/// request.)
#[derive(Debug, Default)]
pub(crate) struct Asked(Option<Waker>);

impl Asked {
    /// True for a task that has not asked before.
    pub(crate) fn is_new(&mut self, context: &Context<'_>) -> bool {
        if self.0.as_ref().is_some_and(|waker| waker.will_wake(context.waker())) {
            return false;
        }
        self.0 = Some(context.waker().clone());
        true
    }
}

/// The order to drain. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Drain(Rc<State>);

#[derive(Debug)]
struct State {
    flag: Arc<AtomicBool>,
    begun: Notify,
    channel: Arc<Channel>,
    scoreboard: Scoreboard,
    slot: u32,
    /// A connection was passed on when the last sibling had left as well.
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

    /// True once the order has come.
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

    /// Returns when the order has come.
    pub(crate) async fn wait(&self) {
        let begun = self.0.begun.notified();
        if !self.has_begun() {
            begun.await;
        }
    }

    /// Returns when the order has come, and an idle connection has had its time for one more request.
    ///
    /// Who has just connected, or had a response a moment ago, may be about to send: to close on him would be to
    /// fail a request.
    pub(crate) async fn wait_for_last_request(&self) {
        self.wait().await;
        tokio::time::sleep(self.last_request()).await;
    }

    fn last_request(&self) -> Duration {
        LAST_REQUEST.min(self.0.timeout / 2)
    }

    /// Returns when the drain has gone on for nearly as long as it may (`--drain-timeout`), and upgraded connections have
    /// to end.
    pub(crate) async fn wait_for_end(&self) {
        self.wait_until_left(self.farewell() * 3).await;
    }

    /// Returns when all that waits for its client has to be cut off, for the worker to leave by itself.
    pub(crate) async fn wait_for_cutoff(&self) {
        self.wait_until_left(self.farewell()).await;
    }

    /// Returns when so much of the drain is left.
    async fn wait_until_left(&self, left: Duration) {
        self.wait().await;
        if let Some(begun) = self.0.begun_at.get() {
            tokio::time::sleep_until(begun + self.0.timeout.saturating_sub(left)).await;
        }
    }

    /// How long the last words may take, and for how long the client may take them.
    pub(crate) fn farewell(&self) -> Duration {
        FAREWELL.min(self.0.timeout / 8)
    }

    /// Whether there is a sibling to take connections over.
    pub(crate) fn has_sibling(&self) -> bool {
        self.0.scoreboard.freest(self.0.slot).is_some()
    }

    /// Returns when the order has come and a connection that has not begun can be passed on, or has had its time.
    pub(crate) async fn wait_to_move(&self) {
        self.wait().await;
        if !self.has_sibling() {
            tokio::time::sleep(self.last_request()).await;
        }
    }

    /// Passes a connection on, with `early`, which was read of it and not dealt with. If nobody is there to take it, it is
    /// closed.
    pub(crate) async fn hand_over(&self, socket: Socket, early: &[u8]) {
        let early = [early, socket.early()].concat();
        while self.has_sibling() && early.len() <= READ_BUFFER {
            match socket.conn().hand_off(self.0.channel.sender(), &early) {
                Ok(()) => {
                    self.0.passed_on.set(self.0.passed_on.get() + 1);
                    // Those that had not begun to leave before the message was there will find it; if none is left, it is
                    // ours again.
                    if !self.has_sibling() {
                        self.0.stranded.notify_one();
                    }
                    return;
                }
                // Many leave at a time, and the siblings are about to take them. `--drain-timeout` bounds that.
                Err(error) if handover::is_for_later(&error) => tokio::time::sleep(CROWDED).await,
                Err(error) => return log::debug!("a connection cannot be passed on: {error}"),
            }
        }
    }

    /// Returns when a connection was passed on that nobody will take.
    pub(crate) async fn stranded(&self) {
        self.0.stranded.notified().await;
    }

    /// How many connections were passed on.
    pub(crate) fn passed_on(&self) -> u64 {
        self.0.passed_on.get()
    }
}
