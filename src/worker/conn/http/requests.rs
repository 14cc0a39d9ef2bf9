//! Counts the requests of an HTTP connection for its drain and its limits, and records them in the heir's journal.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Waker};

use http::{Method, Request, Version};
use http_body::Body as HttpBody;
use hyper::body::Incoming;
use tokio::sync::Notify;

use super::connection_header::request_closes;
use super::upgrade::AcceptedUpgrade;
use crate::heir::journal::{ConnHandle, READ_BUFFER, RequestIndex};
use crate::request::activity::{Activity, Stage};
use crate::worker::conn::under_way::UnderWay;

/// Longest body whose end can be stored as a position. Positions wrap around.
const MAX_BODY: u32 = 1 << 30;

pub(super) struct Requests {
    activity: Arc<Activity>,
    conn: ConnHandle,
    /// Number of requests without a response yet: their responses can announce the end of the connection.
    unanswered: Cell<u32>,
    begun: Notify,
    count: Cell<u32>,
    /// Maximum number of requests; 0 means no limit.
    limit: u32,
    last_begun: Notify,
    /// Whether the end of some request in the input is unknown.
    end_is_unknown: Cell<bool>,
    /// Whether the input after a request stays unread, because the request's body is not read to its end.
    left_unread: Cell<bool>,
    /// Whether the connection ends after the requests that have begun or, if none has begun, after the next request.
    is_closing: Cell<bool>,
    /// Number of bodies that are still being read although the response is complete.
    open_bodies: Cell<u32>,
    /// Woken when a body ends.
    waker: Cell<Option<Waker>>,
    /// Number of requests that may still switch protocols.
    offers: Cell<u32>,
    no_offers: Notify,
    /// The upgrade that an HTTP/1 connection switched to.
    upgrade: RefCell<Option<AcceptedUpgrade>>,
}

impl Requests {
    pub(super) fn new(limit: u32, activity: Arc<Activity>, conn: ConnHandle) -> Self {
        let (unanswered, count) = (Cell::new(0), Cell::new(0));
        let (begun, last_begun, end_is_unknown) = (Notify::new(), Notify::new(), Cell::new(false));
        let (offers, no_offers, upgrade) = (Cell::new(0), Notify::new(), RefCell::new(None));
        let (left_unread, is_closing) = (Cell::new(false), Cell::new(false));
        let (open_bodies, waker) = (Cell::new(0), Cell::new(None));
        Self {
            activity,
            conn,
            unanswered,
            begun,
            count,
            limit,
            last_begun,
            end_is_unknown,
            left_unread,
            is_closing,
            open_bodies,
            waker,
            offers,
            no_offers,
            upgrade,
        }
    }

    pub(super) fn begin(self: &Rc<Self>, request: &Request<Incoming>) -> (UnderWay, OpenRequest) {
        let index = (request.version() != Version::HTTP_2).then(|| self.enter(request));
        let under_way = UnderWay::begin_http(&self.activity, &self.conn, index);
        self.unanswered.set(self.unanswered.get() + 1);
        self.count.set(self.count.get().saturating_add(1));
        self.begun.notify_waiters();
        if self.are_enough() {
            self.last_begun.notify_one();
        }
        let is_last = self.are_enough();
        (under_way, OpenRequest { requests: Rc::clone(self), is_last, is_answered: false, offers: false })
    }

    /// Records an HTTP/1 request in the journal, with its end if the end is known.
    fn enter(&self, request: &Request<Incoming>) -> RequestIndex {
        let look = || self.conn.look_at_fresh(|position, bytes| Some((position, head_length(bytes)?)));
        let head = if self.end_is_unknown.get() { None } else { look() };
        let is_last = request_closes(request.version(), request.headers());
        self.is_closing.set(self.is_closing.get() || is_last);
        let index = self.conn.begin(1, request.method() == Method::HEAD, is_last);
        let body = request.body().size_hint().exact().and_then(|length| u32::try_from(length).ok());
        match (head, body.filter(|&length| length <= MAX_BODY)) {
            (Some((position, head)), Some(body)) => {
                self.conn.clean_up_to(position.wrapping_add(head).wrapping_add(body));
            }
            _ => self.end_is_unknown.set(true),
        }
        index
    }

    /// Whether no request has begun.
    pub(super) fn are_none(&self) -> bool {
        self.count.get() == 0
    }

    /// Whether the connection has reached its limit of requests.
    pub(super) fn are_enough(&self) -> bool {
        self.limit > 0 && self.count.get() >= self.limit
    }

    /// Whether another worker can continue, because the unfinished bytes fit into a handoff message and it is known
    /// where the next request begins.
    pub(super) fn can_go_on_elsewhere(&self) -> bool {
        let unfinished = usize::try_from(self.conn.unfinished());
        !self.are_enough() && !self.end_is_unknown.get() && unfinished.is_ok_and(|length| length <= READ_BUFFER)
    }

    /// Whether all responses have been written and all bodies read.
    pub(super) fn are_over(&self) -> bool {
        self.activity.under_way() == 0 && !self.activity.is_writing() && self.open_bodies.get() == 0
    }

    /// Whether nothing is under way, but only hyper knows how many bytes of the next request have been read.
    pub(super) fn are_to_be_settled(&self) -> bool {
        self.end_is_unknown.get() && self.are_over() && !self.left_unread.get() && !self.is_closing.get()
    }

    /// Whether nothing is under way, and the watchdog has asked the connection to free its buffers.
    pub(super) fn are_to_rest(&self) -> bool {
        self.activity.is_asked_to_rest()
            && self.activity.stage() == Stage::Idle
            && self.are_over()
            && !self.left_unread.get()
            && !self.is_closing.get()
    }

    /// Records that nothing is under way, and that `unread` bytes of the next request have been read.
    pub(super) fn settle(&self, unread: usize) {
        self.conn.clean_except(unread);
        self.activity.set_head_begun(unread > 0);
        self.end_is_unknown.set(false);
    }

    /// Counts a body that is still being read although its response is complete.
    pub(super) fn open_body(self: &Rc<Self>) -> OpenBody {
        self.open_bodies.set(self.open_bodies.get() + 1);
        OpenBody(Rc::clone(self))
    }

    /// Wakes this task when the next body ends.
    pub(super) fn await_bodies(&self, context: &Context<'_>) {
        if self.open_bodies.get() > 0 {
            self.waker.set(Some(context.waker().clone()));
        }
    }

    pub(super) fn activity(&self) -> &Arc<Activity> {
        &self.activity
    }

    /// Stops reading from the connection.
    pub(super) fn leave_unread(&self) {
        self.left_unread.set(true);
    }

    pub(super) fn left_unread(&self) -> bool {
        self.left_unread.get()
    }

    /// Whether the number of requests is limited.
    pub(super) fn are_limited(&self) -> bool {
        self.limit > 0
    }

    /// Records that the connection is about to be closed: the next response is the last one.
    pub(super) fn close(&self) {
        self.is_closing.set(true);
    }

    pub(super) fn are_closing(&self) -> bool {
        self.is_closing.get()
    }

    /// Returns when the last request that the limit allows has begun.
    pub(super) async fn last_begun(&self) {
        self.last_begun.notified().await;
    }

    /// Waits until no request can switch protocols.
    pub(super) async fn no_upgrade_offered(&self) {
        while self.offers.get() > 0 {
            self.no_offers.notified().await;
        }
    }

    /// Stores the upgrade to which the connection has switched.
    pub(super) fn set_upgrade(&self, upgrade: AcceptedUpgrade) {
        self.upgrade.replace(Some(upgrade));
    }

    /// Takes the upgrade to which the connection has switched.
    pub(super) fn take_upgrade(&self) -> Option<AcceptedUpgrade> {
        self.upgrade.take()
    }

    pub(super) async fn one_under_way(&self) {
        if self.unanswered.get() == 0 {
            self.begun.notified().await;
        }
    }
}

/// A body that is still being read.
pub(super) struct OpenBody(Rc<Requests>);

impl OpenBody {
    /// Records that the body was read to its end or, with `is_cut`, that the remainder stays unread.
    pub(super) fn end(self, is_cut: bool) {
        if is_cut {
            self.0.leave_unread();
        }
        self.0.open_bodies.set(self.0.open_bodies.get() - 1);
        self.0.waker.take().into_iter().for_each(Waker::wake);
    }
}

/// A request that is counted on its connection until this value is dropped.
pub(super) struct OpenRequest {
    requests: Rc<Requests>,
    /// Whether this is the last request on the connection.
    pub(super) is_last: bool,
    is_answered: bool,
    /// Whether the request may switch protocols, or has switched.
    offers: bool,
}

impl OpenRequest {
    /// Records that the application has answered.
    pub(super) fn is_answered(&mut self) {
        if !std::mem::replace(&mut self.is_answered, true) {
            self.requests.unanswered.set(self.requests.unanswered.get() - 1);
        }
    }

    /// Records that the protocol was switched: from now on, input is passed on as it arrives and is not counted as
    /// held.
    pub(super) fn is_upgraded(&self) {
        self.requests.activity.held().stop();
    }

    /// Sets whether the request may switch protocols.
    pub(super) fn offers_upgrade(&mut self, offers: bool) {
        let requests = &self.requests;
        match (std::mem::replace(&mut self.offers, offers), offers) {
            (false, true) => requests.offers.set(requests.offers.get() + 1),
            (true, false) => {
                requests.offers.set(requests.offers.get() - 1);
                requests.no_offers.notify_one();
            }
            (false, false) | (true, true) => {}
        }
    }
}

impl Drop for OpenRequest {
    fn drop(&mut self) {
        self.is_answered();
        self.offers_upgrade(false);
    }
}

/// Returns the length of the head at the beginning of `input`, if it is complete and each of its lines ends in CRLF.
/// hyper also accepts other line terminators.
fn head_length(input: &[u8]) -> Option<u32> {
    let mut from = 0;
    loop {
        let end = from + input.get(from..)?.iter().position(|&byte| byte == b'\n')?;
        let line = input.get(from..end)?.strip_suffix(b"\r")?;
        from = end + 1;
        if line.is_empty() {
            // An empty line before the head is not part of the request.
            return u32::try_from(from).ok().filter(|&length| length > 2);
        }
    }
}
