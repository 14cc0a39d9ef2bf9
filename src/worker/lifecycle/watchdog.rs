//! Cuts off connections whose clients take too long.
//!
//! Once a second the [`Watchdog`] checks every connection that had to wait: its [`Stage`], and the bytes moved since
//! the last check. This costs a request a few stores, and needs no timer per connection.

use std::cell::RefCell;
use std::os::fd::{AsRawFd as _, BorrowedFd, RawFd};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use nix::sys::socket::Shutdown;
use tokio::sync::Notify;
use tokio::time::{MissedTickBehavior, interval};

use crate::config::Timeouts;
use crate::request::activity::{Activity, Stage};
use crate::request::buffered;
use crate::sys;
use crate::worker::conn::reclaim::{self, Holder, Idle};
use crate::worker::conn::socket::shut;
use crate::worker::conn::throttle::Throttle;

/// Interval between two checks.
const TICK: Duration = Duration::from_secs(1);
/// How long the end of an event stream may take to be sent after the worker has begun to drain.
const LAST_EVENTS: Duration = Duration::from_secs(2);
/// Number of ticks that a connection may last without a request after its end was requested. In this time, the end of
/// the last response is written (it may still be unwritten when the request is over), and the client can react.
const GOODBYE: u32 = 1;
/// Number of ticks after which an idle connection is asked to free its buffers.
const REST: u32 = 2;
/// Number of connections that have freed their buffers, about 4 MiB, before free memory is returned to the kernel.
const RESTED: u32 = 256;
/// Minimum number of ticks between two returns of free memory, because each takes some milliseconds of a large heap.
const RETURN: u32 = 5;
/// Minimum number of bytes of a request body or of a response that must move within the timeout, unless fewer are left.
const PROGRESS: u32 = 4 << 10;

#[derive(Debug)]
pub(crate) struct Watchdog {
    timeouts: Timeouts,
    /// Whether the worker is draining.
    drains: Arc<AtomicBool>,
    watched: RefCell<Vec<Watched>>,
    some: Notify,
    /// Counts the connections that were cut off because they held too much memory.
    shed: Throttle,
}

/// A connection as it was at the last tick.
#[derive(Debug)]
struct Watched {
    fd: RawFd,
    activity: Arc<Activity>,
    stage: Stage,
    requests: u32,
    /// Number of ticks in this stage.
    waited: u32,
    /// Whether the socket is shut down for reading.
    is_deaf: bool,
    /// Whether the socket is shut down in both directions.
    is_cut: bool,
    /// Number of ticks for which a write has been waiting.
    unread: u32,
    written: u32,
    /// Number of ticks of a drain in which only the end of an event stream was left.
    leaving: u32,
    /// Number of ticks without a request since the end of the connection was requested.
    goodbye: Option<u32>,
}

impl Watchdog {
    pub(crate) fn new(timeouts: Timeouts, drains: Arc<AtomicBool>) -> Rc<Self> {
        Rc::new(Self { timeouts, drains, watched: RefCell::default(), some: Notify::new(), shed: Throttle::default() })
    }

    pub(crate) fn watch(&self, fd: BorrowedFd<'_>, activity: &Arc<Activity>) {
        let mut watched = self.watched.borrow_mut();
        if watched.is_empty() {
            self.some.notify_one();
        }
        watched.push(Watched::new(fd.as_raw_fd(), Arc::clone(activity)));
    }

    /// Closes up to `most` idle connections, because other clients are waiting to be accepted. Returns the number of
    /// closed connections.
    pub(crate) fn make_room(&self, most: usize) -> usize {
        let mut watched = self.watched.borrow_mut();
        let idle = |(index, watched): (usize, &Watched)| {
            let ticks = watched.idle_ticks()?;
            Some(Idle { index, ticks })
        };
        let chosen = reclaim::choose(watched.iter().enumerate().filter_map(idle).collect(), most);
        for &index in &chosen {
            if let Some(watched) = watched.get_mut(index) {
                watched.end("it was idle while other clients waited");
            }
        }
        chosen.len()
    }

    /// Cuts off connections, because together they hold more memory than allowed: first those that have been waiting
    /// for their peers the longest, then the largest.
    pub(crate) fn shed(&self) {
        let mut watched = self.watched.borrow_mut();
        let holder = |(index, watched): (usize, &Watched)| {
            let (activity, bytes) = (&watched.activity, watched.activity.held().bytes());
            let (is_waited_for, ticks) = match activity.stage() {
                Stage::Answering => (false, 0),
                Stage::Body => (true, activity.slowest_body()),
                Stage::Idle | Stage::Head => (true, watched.waited),
            };
            (bytes > 0 && !activity.is_closed()).then_some(Holder { index, bytes, is_waited_for, ticks })
        };
        let chosen = reclaim::heaviest(watched.iter().enumerate().filter_map(holder).collect(), buffered::too_much());
        for &index in &chosen {
            if let Some(watched) = watched.get_mut(index) {
                watched.cut_off("it held too much memory (--max-buffered)", Shutdown::Both);
                watched.activity.held().clear(); // the connection's task frees the memory when it next runs
            }
        }
        if !chosen.is_empty()
            && let Some(count) = self.shed.add(chosen.len())
        {
            log::warn!(count; "cut off connections whose unfinished requests held too much memory (--max-buffered)");
        }
    }

    /// Cuts off connections that wait for a client, because the drain is nearly over. After that, only the
    /// application's own work can delay the worker's exit.
    pub(crate) fn end_drain(&self) {
        let cut_off = self.watched.borrow_mut().iter_mut().filter_map(Watched::end_drain).count();
        if cut_off > 0 {
            log::info!(
                count = cut_off;
                "cut off connections whose clients neither read nor sent until the end of the drain (--drain-timeout)"
            );
        }
    }

    /// Checks the connections forever. Sleeps while there are none.
    pub(crate) async fn run(&self) {
        loop {
            self.some.notified().await;
            let mut ticks = interval(TICK);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            ticks.tick().await; // the first tick is immediate
            let (mut rested, mut since_return) = (0, 0);
            while !self.watched.borrow().is_empty() {
                ticks.tick().await;
                since_return += 1;
                if rested >= RESTED && since_return >= RETURN {
                    sys::return_free_memory();
                    (rested, since_return) = (0, 0);
                }
                let count = self.tick();
                if count > 0 {
                    log::debug!(count; "idle connections free their buffers");
                }
                rested += count;
            }
        }
    }

    /// Checks each connection. Returns the number of idle connections that free their buffers.
    fn tick(&self) -> u32 {
        let (drains, mut rest) = (self.drains.load(Relaxed), 0);
        self.watched.borrow_mut().retain_mut(|watched| {
            let stays = watched.tick(&self.timeouts, drains);
            rest += u32::from(stays && watched.rest());
            stays
        });
        rest
    }
}

impl Watched {
    fn new(fd: RawFd, activity: Arc<Activity>) -> Self {
        let (stage, is_deaf, is_cut) = (Stage::Idle, false, false);
        let goodbye = None;
        Self {
            fd,
            activity,
            stage,
            requests: 0,
            waited: 0,
            is_deaf,
            is_cut,
            unread: 0,
            written: 0,
            leaving: 0,
            goodbye,
        }
    }

    /// Returns the number of ticks for which nothing was under way, not counting the first one, which came soon after
    /// the connection was last used. Returns `None` if something is under way, or if the connection is already ending.
    fn idle_ticks(&self) -> Option<u32> {
        let activity = &self.activity;
        let is_idle =
            activity.stage() == Stage::Idle && self.stage == Stage::Idle && activity.requests() == self.requests;
        (is_idle && !activity.is_closed() && !self.is_deaf && self.goodbye.is_none())
            .then(|| self.waited.saturating_sub(1))
    }

    /// Ends an idle connection, gracefully if its protocol allows. If the peer does not react, later ticks cut it off.
    fn end(&mut self, why: &str) {
        self.goodbye = Some(0);
        if !self.activity.say_goodbye() {
            self.cut_off(why, Shutdown::Read);
        }
    }

    /// Cuts off a connection that waits for its client. Returns `None` if the connection does not wait, or if it can
    /// still be handed over.
    fn end_drain(&mut self) -> Option<()> {
        let activity = &self.activity;
        let how = match activity.stage() {
            _ if activity.is_closed() => return None,
            _ if activity.is_writing() => Shutdown::Both,
            // Only the bodies are cut off; the other streams continue.
            Stage::Body if activity.says_goodbye() => return (activity.expire_bodies(|_| true) > 0).then_some(()),
            Stage::Body | Stage::Head => Shutdown::Read, // the request can still be answered
            // Over HTTP/2, the response is waiting for window.
            Stage::Idle if activity.says_goodbye() => Shutdown::Both,
            Stage::Idle | Stage::Answering => return None,
        };
        if self.is_cut || self.is_deaf && how == Shutdown::Read {
            return None;
        }
        self.cut_off("the drain is nearly over (--drain-timeout)", how);
        Some(())
    }

    /// Accounts for one more second. Returns false if the connection needs no further checks.
    fn tick(&mut self, timeouts: &Timeouts, drains: bool) -> bool {
        if self.activity.is_closed() {
            return false;
        }
        // hyper may still hold the end of a response whose request is over.
        let has_written = self.activity.written() != self.written;
        let stage = self.count(has_written);
        let (why, limit) = match stage {
            Stage::Idle => ("it was idle (--idle-timeout)", timeouts.idle),
            Stage::Head => ("the client sent a request head too slowly (--header-timeout)", timeouts.header),
            Stage::Body | Stage::Answering => ("", Duration::ZERO),
        };
        // Each body has its own timeout. The code that reads the body then responds to the request.
        if self.activity.expire_bodies(|body| is_over(body.tick(PROGRESS), timeouts.body)) > 0 {
            log::debug!("cut off a request: the client sent its body too slowly (--body-timeout)");
        }
        if self.activity.has_said_goodbye() {
            self.goodbye.get_or_insert(0);
        }
        if let Some(ticks) = &mut self.goodbye {
            *ticks = if stage == Stage::Idle && !has_written { *ticks + 1 } else { 0 };
            if *ticks > GOODBYE {
                self.cut_off("the client did not close it in time", Shutdown::Both);
                return false;
            }
        }
        if is_over(self.unread, timeouts.write) {
            self.cut_off("the client read a response too slowly (--write-timeout)", Shutdown::Both);
            return false;
        }
        if drains && self.outstays() {
            self.cut_off("the client read the end of an event stream too slowly", Shutdown::Both);
            return false;
        }
        if !self.is_deaf && self.goodbye.is_none() && is_over(self.waited, limit) {
            if stage == Stage::Idle {
                self.end(why);
            } else {
                self.cut_off(why, Shutdown::Read); // the request can still be answered
            }
        }
        true
    }

    /// Asks a connection that has just become idle for long enough to free its buffers. Returns whether it does.
    fn rest(&self) -> bool {
        self.idle_ticks().is_some() && self.waited == REST && self.activity.ask_to_rest()
    }

    fn count(&mut self, has_written: bool) -> Stage {
        let activity = &self.activity;
        let (stage, requests, written) = (activity.stage(), activity.requests(), activity.written());
        if requests != self.requests || stage != self.stage || stage == Stage::Idle && has_written {
            self.waited = 0;
        }
        (self.stage, self.requests) = (stage, requests);
        self.waited += u32::from(matches!(stage, Stage::Idle | Stage::Head));

        let writing = activity.is_writing();
        if !writing || written.wrapping_sub(self.written) >= PROGRESS {
            (self.unread, self.written) = (0, written);
        }
        self.unread += u32::from(writing);
        stage
    }

    /// Whether the connection is open only for event streams although the worker is draining. The clients of these
    /// streams have received a reconnection time and may have reconnected to another worker. They lose no event,
    /// because each client keeps its position in the stream.
    fn outstays(&mut self) -> bool {
        self.leaving = if self.activity.ends_in_stream() { self.leaving + 1 } else { 0 };
        is_over(self.leaving, LAST_EVENTS) || self.activity.is_streaming() && is_over(self.unread, LAST_EVENTS)
    }

    fn cut_off(&mut self, why: &str, how: Shutdown) {
        log::debug!("cut off a connection: {why}");
        self.activity.expire();
        self.is_deaf = true;
        self.is_cut |= how == Shutdown::Both;
        let _ = shut(self.fd, how); // the peer may have closed it
    }
}

/// Applies the timeout to bodies that do not come from one of the worker's connections (CGI).
pub(crate) async fn watch_bodies(activity: Arc<Activity>, timeout: Duration) {
    let mut ticks = interval(TICK);
    loop {
        ticks.tick().await;
        activity.expire_bodies(|body| is_over(body.tick(PROGRESS), timeout));
    }
}

/// Whether `ticks` have certainly lasted at least as long as `limit`. A limit of zero is never reached.
fn is_over(ticks: u32, limit: Duration) -> bool {
    !limit.is_zero() && TICK * ticks.saturating_sub(1) >= limit
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use std::task::{Context, Waker};

    use super::*;
    use crate::request::activity::Wait;
    use crate::request::body_wait::BodyWait;

    const TIMEOUTS: Timeouts = Timeouts {
        idle: Duration::from_secs(9),
        header: Duration::from_secs(3),
        body: Duration::from_secs(4),
        write: Duration::from_secs(5),
        upgraded: Duration::ZERO,
    };

    /// Returns the number of ticks that a connection survives if `each` runs before each tick; 100 if it survives them
    /// all.
    fn ticks(mut each: impl FnMut(&Activity)) -> u32 {
        ticks_of(move |activity| each(activity))
    }

    fn ticks_of(each: impl FnMut(&Arc<Activity>)) -> u32 {
        ticks_with(false, each)
    }

    fn ticks_with(drains: bool, mut each: impl FnMut(&Arc<Activity>)) -> u32 {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let mut watched = Watched::new(ours.as_raw_fd(), Arc::default());
        let mut lives = || {
            each(&watched.activity);
            watched.tick(&TIMEOUTS, drains) && !watched.is_deaf
        };
        (0..100).take_while(|_| lives()).map(|_| 1).sum()
    }

    #[test]
    fn whoever_takes_too_long_is_cut_off() {
        assert_eq!(ticks(|_| ()), 9, "idle");
        let answering = |activity: &Activity| {
            if activity.requests() == 0 {
                activity.request_came();
            }
        };
        assert_eq!(ticks(answering), 100, "the application may take its time");
        assert_eq!(ticks(|activity| activity.add_read(2000)), 3, "a head is not allowed to trickle");
        let write = |bytes| {
            move |activity: &Activity| {
                activity.set_writing(true);
                activity.add_written(bytes);
            }
        };
        assert_eq!(ticks(write(1)), 5);
        assert_eq!(ticks(write(1024)), 100, "it is slow, but it gets on: that is not idle");
    }

    /// Returns the number of ticks for which a reader may wait for a body if this many bytes and further requests
    /// arrive before each tick; 100 if the body survives them all. The connection continues.
    fn body_ticks(bytes: usize, others: u32, waits: impl Fn(u32) -> bool) -> u32 {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let mut watched = Watched::new(ours.as_raw_fd(), Arc::default());
        watched.activity.request_came();
        let (mut body, mut other) = (BodyWait::new(&watched.activity), BodyWait::new(&watched.activity));
        let context = Context::from_waker(Waker::noop());
        let lasts = |turn: &u32| {
            body.end();
            body.taken(bytes);
            let is_over = waits(*turn) && body.begin(&context);
            other.end();
            other.taken(5000);
            assert!(!other.begin(&context), "each body has its own time");
            (0..others).for_each(|_| watched.activity.request_came());
            assert!(watched.tick(&TIMEOUTS, false) && !watched.is_deaf);
            !is_over
        };
        (0..100).take_while(lasts).map(|_| 1).sum()
    }

    #[test]
    fn a_body_may_be_slow_but_has_to_get_on_whatever_else_is_under_way() {
        assert_eq!(body_ticks(1, 0, |_| true), 5);
        assert_eq!(body_ticks(1, 1, |_| true), 5);
        assert_eq!(body_ticks(1024, 0, |_| true), 100);
        assert_eq!(body_ticks(0, 0, |turn| turn % 2 == 0), 10, "every second tick finds somebody waiting");
        let dropped = ticks_of(|activity| {
            if activity.requests() == 0 {
                activity.request_came();
                assert!(!BodyWait::new(activity).begin(&Context::from_waker(Waker::noop())));
            }
        });
        assert_eq!(dropped, 100, "nobody waits for a body that was given up");
    }

    #[test]
    fn each_request_has_its_own_time() {
        let requests = ticks(|activity| {
            activity.add_read(100);
            activity.request_came();
            activity.request_over();
        });
        assert_eq!(requests, 100);
    }

    #[test]
    fn a_response_that_gets_no_room_in_its_stream_is_not_read() {
        let mut reply = None;
        let held_back = ticks_of(move |activity| {
            reply
                .get_or_insert_with(|| {
                    activity.request_came();
                    Wait::for_room(activity)
                })
                .set(true);
        });
        assert_eq!(held_back, 5);
    }

    #[test]
    fn a_drain_waits_for_answers_and_not_for_event_streams() {
        let ticks = |requests: u32, streams: u32, writing: Option<usize>| {
            let mut waits = Vec::new();
            ticks_with(true, move |activity| {
                if activity.requests() == 0 {
                    (0..requests).for_each(|_| activity.request_came());
                    waits.extend((0..streams).map(|_| Wait::for_events(activity)));
                }
                activity.set_writing(writing.is_some());
                activity.add_written(writing.unwrap_or_default());
            })
        };
        assert_eq!(ticks(1, 0, None), 100, "an answer");
        assert_eq!(ticks(2, 1, None), 100, "an answer and a stream");
        assert_eq!(ticks(2, 1, Some(0)), 5, "likewise, to who does not read");
        for writing in [None, Some(0), Some(5000)] {
            assert_eq!(ticks(2, 2, writing), 2, "{writing:?}");
        }
        let mut ended = false;
        let after_its_end = ticks_with(true, |activity| {
            if !std::mem::replace(&mut ended, true) {
                activity.request_came();
                drop(Wait::for_events(activity));
                activity.request_over();
            }
        });
        assert_eq!(after_its_end, 2);
        let mut stream = None;
        let beside_an_answer_on_its_way = ticks_with(true, |activity| {
            if activity.requests() == 0 {
                activity.set_writing(true);
                activity.request_came();
                stream = Some(Wait::for_events(activity));
            }
            activity.add_written(5000);
        });
        assert_eq!(beside_an_answer_on_its_way, 100);
    }

    #[test]
    fn one_that_makes_room_is_asked_first_if_its_protocol_can_and_then_cut_off() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let mut watched = Watched::new(ours.as_raw_fd(), Arc::default());
        let tick = |watched: &mut Watched| watched.tick(&TIMEOUTS, false);
        assert!(tick(&mut watched) && watched.idle_ticks() == Some(0), "it was used a moment ago");
        assert!(tick(&mut watched) && watched.idle_ticks() == Some(1));
        watched.activity.request_came();
        assert_eq!(watched.idle_ticks(), None, "something is under way");
        watched.activity.request_over();
        assert_eq!(watched.idle_ticks(), None, "it was used since the last tick");
        assert!(tick(&mut watched) && watched.idle_ticks() == Some(0));
        watched.activity.set_says_goodbye();
        watched.end("");
        assert_eq!((watched.is_deaf, watched.idle_ticks()), (false, None), "its end has begun");
        watched.activity.request_came();
        assert!((0..9).all(|_| tick(&mut watched)), "a request that came before its peer knew is answered");
        watched.activity.request_over();
        assert!(
            tick(&mut watched) && !watched.activity.has_expired(),
            "the end of its response may not be written yet"
        );
        assert!(!tick(&mut watched) && watched.activity.has_expired());

        let mut watched = Watched::new(ours.as_raw_fd(), Arc::default());
        watched.end("");
        assert!(watched.is_deaf && watched.activity.has_expired());
    }

    #[test]
    fn an_idle_connection_is_asked_once_to_free_its_buffers() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let mut watched = Watched::new(ours.as_raw_fd(), Arc::default());
        let asked = |watched: &mut Watched| -> Vec<u32> {
            (1..9).filter(|_| watched.tick(&TIMEOUTS, false) && watched.rest()).collect()
        };
        assert!(asked(&mut watched).is_empty(), "its protocol has no buffers");
        watched.activity.can_rest(Waker::noop());
        watched.activity.request_came();
        assert!(asked(&mut watched).is_empty(), "it is in use");
        watched.activity.request_over();
        assert_eq!(asked(&mut watched), vec![REST]);
        assert!(watched.activity.is_asked_to_rest() && !watched.activity.is_asked_to_rest());
    }

    #[test]
    fn a_closed_connection_is_forgotten() {
        assert_eq!(ticks(|activity| activity.close()), 0);
    }
}
