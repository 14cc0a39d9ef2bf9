//! Queues the requests of this gateway that wait for an app process, and claims app processes for them.
//!
//! The order is that of arrival. The gateways share the claims table (`forkyard_shm::Claims`): a process that becomes
//! idle is claimed by the gateway whose oldest request has waited longest. That gateway is woken through its event
//! descriptor. A gateway that waits also looks every [`LOOK_INTERVAL`], because the gateway that was woken may be stopped.
//!
//! A request whose client has left is removed from the queue at once, and costs nothing.
//!
//! A gateway with waiting requests uses an app process again, together with its connection, when a request has ended, unless
//! a request of another gateway has waited for several milliseconds longer. App processes therefore do not change between
//! busy gateways after each request, which would cost a new connection each time.
//!
//! This gateway keeps the connections to app processes for further requests. An app process that serves one connection at
//! a time accepts no other one meanwhile. A gateway that claims such a process wakes the gateway that keeps the connection,
//! which then closes it; so does the master when it drains the process.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::io;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::time::Duration;

use forkyard_shm::{HeldUnit, KeptConnection, Wake};
use tokio::io::Interest;
use tokio::sync::futures::Notified;
use tokio::sync::{Notify, oneshot};

use super::app_stream::AppStream;
use crate::net::app_channel::{AppChannel, now_us};
use crate::sys;

/// Interval at which a waiting gateway looks for idle app processes without having been woken.
const LOOK_INTERVAL: Duration = Duration::from_millis(20);
/// With `--max-requests`, a gateway wakes the master once for this number of claims of an app process, so that the master can
/// count them.
const CLAIMS_PER_COUNT: u64 = 16;

/// The queue of one gateway.
#[derive(Debug)]
pub(super) struct Queue {
    channel: Arc<AppChannel>,
    /// The slot of this gateway.
    slot: u32,
    /// Maximum number of waiting requests.
    limit: usize,
    /// Whether the master counts the requests of app processes.
    is_counted: bool,
    waiting: RefCell<Waiting>,
    /// The kept connections, by app process and unit.
    kept: RefCell<HashMap<(u32, usize), Kept>>,
    /// Wakes the attempts that wait until another gateway has closed its connection.
    woken: Notify,
    /// Wakes [`Queue::run`] when this gateway has released an app process that it waits for itself.
    released: Notify,
}

#[derive(Debug)]
struct Kept {
    connection: KeptConnection,
    stream: AppStream,
}

#[derive(Debug, Default)]
struct Waiting {
    /// The waiting requests by number, in the order of their arrival.
    requests: BTreeMap<u64, Request>,
    next: u64,
}

#[derive(Debug)]
struct Request {
    since_us: u64,
    unit: oneshot::Sender<AppUnit>,
}

/// Why a request got no app process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum QueueError {
    /// Too many requests wait (`--queue`).
    Full,
    /// The request has waited too long (`--queue-timeout`).
    TimedOut,
}

/// The right to send one request to an app process. Dropping it releases the app process.
#[derive(Debug)]
pub(super) struct AppUnit {
    /// `None` only during the drop.
    unit: Option<HeldUnit>,
    /// The connection of the request that has used the unit before.
    passed_on: RefCell<Option<AppStream>>,
    /// The connection to keep.
    keeps: Option<AppStream>,
    queue: Rc<Queue>,
}

impl AppUnit {
    pub(super) fn unit(&self) -> Option<&HeldUnit> {
        self.unit.as_ref()
    }

    /// Returns the connection that this gateway has kept to the app process, if there is one.
    pub(super) fn take_kept(&self) -> Option<AppStream> {
        if let Some(stream) = self.passed_on.take() {
            return Some(stream);
        }
        let unit = self.unit.as_ref()?;
        let kept = self.queue.kept.borrow_mut().remove(&(unit.process(), unit.unit()))?;
        (kept.connection.epoch() == unit.epoch()).then_some(kept.stream)
    }

    /// Passes the app process and this connection on to the request that waits next, or releases the app process and keeps
    /// the connection. The connection must be ready for the next request.
    pub(super) fn keep(mut self, stream: AppStream) {
        let Some(unit) = self.unit.take() else { return };
        match self.queue.pass_on(unit) {
            Ok((unit, request)) => {
                let (passed_on, queue) = (RefCell::new(Some(stream)), Rc::clone(&self.queue));
                // If the client has left, this releases the app process.
                drop(request.unit.send(Self { unit: Some(unit), passed_on, keeps: None, queue }));
            }
            Err(unit) => (self.unit, self.keeps) = (Some(unit), Some(stream)),
        }
    }

    /// Records the request that the unit is used for, for the status and for the log line of the process's death.
    pub(super) fn begin_request(&self, what: &str) {
        if let Some(unit) = &self.unit {
            self.queue.channel.claims().begin_request(unit, what, now_us());
        }
    }

    /// Completes when this gateway is woken, perhaps because another gateway has closed its connection. Wake-ups count from the
    /// call of this function.
    pub(super) fn woken(&self) -> Notified<'_> {
        self.queue.woken.notified()
    }

    /// Returns the slot and the pid of another gateway that keeps a connection to the app process.
    pub(super) fn other_keeper(&self) -> Option<(u32, u32)> {
        let claims = self.queue.channel.claims();
        let keeper = claims.keeper(self.unit.as_ref()?).filter(|&keeper| keeper != self.queue.slot)?;
        Some((keeper, claims.gateway(keeper)?.0))
    }

    pub(super) fn slot(&self) -> u32 {
        self.unit.as_ref().map_or(u32::MAX, HeldUnit::process)
    }

    pub(super) fn pid(&self) -> i32 {
        self.unit.as_ref().map_or(0, |unit| unit.pid().cast_signed())
    }
}

impl Drop for AppUnit {
    fn drop(&mut self) {
        let Some(unit) = self.unit.take() else { return };
        let claims = self.queue.channel.claims();
        let wake = match self.keeps.take() {
            None => claims.release(unit, now_us()),
            Some(stream) => {
                let place = (unit.process(), unit.unit());
                let (connection, wake) = claims.release_kept(unit, now_us());
                match connection {
                    Some(connection) if wake != Wake::Nobody && wake != Wake::Gateway(self.queue.slot) => {
                        drop(stream); // the app process is draining, or another gateway needs it
                        self.queue.channel.wake(claims.forget(connection));
                    }
                    Some(connection) => drop(self.queue.kept.borrow_mut().insert(place, Kept { connection, stream })),
                    None => drop(stream), // the app process has been replaced
                }
                wake
            }
        };
        match wake {
            Wake::Gateway(slot) if slot == self.queue.slot => self.queue.released.notify_one(),
            wake => self.queue.channel.wake(wake),
        }
    }
}

/// Removes a request from the queue when it no longer waits.
struct Place {
    queue: Rc<Queue>,
    number: u64,
}

impl Drop for Place {
    fn drop(&mut self) {
        let request = self.queue.waiting.borrow_mut().requests.remove(&self.number);
        if request.is_some() {
            self.queue.publish(); // the client has left, or the time is over
        }
    }
}

impl Queue {
    /// Creates the queue of the gateway in `slot`.
    pub(super) fn new(channel: Arc<AppChannel>, slot: u32, limit: usize, is_counted: bool) -> Rc<Self> {
        channel.claims().gateway_started(slot, std::process::id());
        let (waiting, kept) = (RefCell::default(), RefCell::default());
        let (woken, released) = (Notify::new(), Notify::new());
        Rc::new(Self { channel, slot, limit, is_counted, waiting, kept, woken, released })
    }

    pub(super) fn channel(&self) -> &AppChannel {
        &self.channel
    }

    /// Claims an app process, after the requests that have waited longer. `timeout` is zero if there is no limit.
    ///
    /// # Errors
    /// Fails if the queue is full, or after `timeout`.
    pub(super) async fn claim(self: &Rc<Self>, timeout: Duration) -> Result<AppUnit, QueueError> {
        if self.waiting.borrow().requests.is_empty()
            && let Some(unit) = self.try_claim()
        {
            return Ok(unit);
        }
        let (unit, mut claimed) = oneshot::channel();
        let place = {
            let mut waiting = self.waiting.borrow_mut();
            if waiting.requests.len() >= self.limit {
                return Err(QueueError::Full);
            }
            let number = waiting.next;
            waiting.next += 1;
            waiting.requests.insert(number, Request { since_us: now_us(), unit });
            Place { queue: Rc::clone(self), number }
        };
        self.serve();
        if !self.channel.serves() {
            self.channel.wake(Wake::Master); // it starts an app process if there is none
        }
        let unit = if timeout.is_zero() {
            (&mut claimed).await.ok()
        } else {
            tokio::time::timeout(timeout, &mut claimed).await.ok().and_then(Result::ok)
        };
        drop(place);
        // An app process may have been claimed just as the time was over.
        unit.or_else(|| claimed.try_recv().ok()).ok_or(QueueError::TimedOut)
    }

    /// Gives app processes to waiting requests until none is idle, and stores how many requests wait.
    fn serve(self: &Rc<Self>) {
        // First, the other processes must be able to see that this gateway waits.
        self.publish();
        let mut changed = false;
        while !self.waiting.borrow().requests.is_empty() {
            let Some(unit) = self.try_claim() else { break };
            let Some((_, request)) = self.waiting.borrow_mut().requests.pop_first() else { break };
            changed = true;
            drop(request.unit.send(unit)); // if the client has left, this releases the app process
        }
        if changed {
            self.publish();
        }
    }

    /// Takes the request that waits next from the queue, if it may use the unit of a request that has ended.
    fn pass_on(&self, unit: HeldUnit) -> Result<(HeldUnit, Request), HeldUnit> {
        let (unit, request) = {
            let mut waiting = self.waiting.borrow_mut();
            let Some(next) = waiting.requests.first_entry() else { return Err(unit) };
            (self.channel.claims().reuse(unit, next.get().since_us, now_us())?, next.remove())
        };
        if self.must_count(&unit) {
            self.channel.wake(Wake::Master);
        }
        self.publish();
        Ok((unit, request))
    }

    fn try_claim(self: &Rc<Self>) -> Option<AppUnit> {
        let attempt = self.channel.claims().claim(self.slot, now_us());
        if attempt.wake_master || attempt.unit.as_ref().is_some_and(|unit| self.must_count(unit)) {
            self.channel.wake(Wake::Master);
        }
        let unit = attempt.unit?;
        if let Some(keeper) = unit.keeper().filter(|&keeper| keeper != self.slot) {
            self.channel.wake(Wake::Gateway(keeper));
        }
        Some(AppUnit { unit: Some(unit), passed_on: RefCell::default(), keeps: None, queue: Rc::clone(self) })
    }

    fn must_count(&self, unit: &HeldUnit) -> bool {
        self.is_counted && unit.begun().is_multiple_of(CLAIMS_PER_COUNT)
    }

    /// Closes the kept connections that are in the way of other processes.
    fn close_unwanted(&self) {
        let claims = self.channel.claims();
        let unwanted =
            self.kept.borrow_mut().extract_if(|_, kept| !claims.may_keep(&kept.connection)).collect::<Vec<_>>();
        for (_, Kept { connection, stream }) in unwanted {
            drop(stream);
            self.channel.wake(claims.forget(connection));
        }
    }

    fn publish(&self) {
        let (count, oldest) = {
            let requests = &self.waiting.borrow().requests;
            let oldest = requests.values().next().map_or(0, |request| request.since_us);
            (u32::try_from(requests.len()).unwrap_or(u32::MAX), oldest)
        };
        if let Some(other) = self.channel.claims().set_waiting(self.slot, count, oldest, now_us()) {
            self.channel.wake(Wake::Gateway(other));
        }
    }
}

/// Serves waiting requests whenever an app process becomes idle, as long as the queue exists.
///
/// # Errors
/// Fails if the event descriptor cannot be watched.
pub(super) async fn run(queue: Weak<Queue>) -> io::Result<()> {
    let Some(event) = queue.upgrade().map(|queue| queue.channel.wakes_gateway(queue.slot)).transpose()? else {
        return Ok(());
    };
    let event = sys::register(event, Interest::READABLE)?;
    while let Some(queue) = queue.upgrade() {
        queue.close_unwanted();
        if !queue.waiting.borrow().requests.is_empty() {
            queue.serve();
        }
        let waits = !queue.waiting.borrow().requests.is_empty();
        tokio::select! {
            readable = event.readable() => {
                let mut counter = [0; 8];
                let _ = nix::unistd::read(event.get_ref(), &mut counter); // this resets the counter
                readable?.clear_ready();
                queue.woken.notify_waiters();
            }
            () = queue.released.notified() => {}
            () = tokio::time::sleep(LOOK_INTERVAL), if waits => {}
        }
    }
    Ok(())
}
