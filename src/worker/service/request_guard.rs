//! Follows a request from the moment its head is known until its response is complete or abandoned. Each request begins
//! once and ends once.
//!
//! A request is recorded in several places, because different processes need different information about it:
//!
//! | record | read by | after a SIGKILL |
//! |---|---|---|
//! | its cell in the scoreboard | the master: `forkyard status`, hangs, recycling by number of requests | still readable |
//! | the thread slot of the thread that runs it | the master: which request killed the worker | still readable |
//! | its entry in the connection's journal | the heir, which answers in place of the worker | still readable |
//! | its connection's activity | the watchdog, the drain | gone |
//! | its entry in the access log | operators | written by the heir, if it was complete |
//!
//! [`RequestGuard`] begins all records, and dropping it ends all records. It moves with the request: from the
//! connection into the response's future, and from there into the response's body or into an upgraded connection.
//!
//! Counts that only HTTP connections need (requests without a response, open upgrades) are in `conn/http/requests.rs`.

use std::net::SocketAddr;
use std::rc::Rc;

use bytes::Bytes;
use forkyard_shm::{InFlight, Row};
use http::{Request, StatusCode};
use http_body::Frame;

use super::access_log::{AccessLog, AccessLogEntry};
use super::serve::ClientFaults;
use crate::app::body::Body;
use crate::config::address::Protocol;
use crate::diagnostics::current_request;
use crate::request::activity::Wait;
use crate::worker::conn::under_way::UnderWay;

/// A request that is being served. Dropping it ends the request.
#[derive(Debug)]
pub(crate) struct RequestGuard {
    // Dropped in this order.
    in_flight: InFlight,
    log_entry: Option<Box<AccessLogEntry>>,
    kind: Kind,
    /// Present if the request has a body, because reading the body may fail.
    client: Option<Box<ClientFaults>>,
    /// `None` in CGI mode and in a health check, which have no connection.
    under_way: Option<UnderWay>,
}

/// The kind of the response.
#[derive(Debug)]
enum Kind {
    Ordinary,
    /// Events, which end when the worker drains. The [`Wait`] records this on the connection.
    Events(Option<Wait>),
}

impl RequestGuard {
    /// Begins a request. `under_way` is `None` for a request that has no connection.
    pub(super) fn begin(
        row: &Row,
        log: Option<&Rc<AccessLog>>,
        protocol: Protocol,
        request: &Request<Body>,
        under_way: Option<UnderWay>,
    ) -> Self {
        let target = request.uri().path_and_query().map_or("/", |target| target.as_str());
        Self {
            in_flight: row.begin(request.method().as_str(), target),
            log_entry: log.map(|log| AccessLogEntry::begin(log, protocol, Some(request))),
            kind: Kind::Ordinary,
            client: None,
            under_way,
        }
    }

    /// Begins a request that could not be read. `from` is the peer, which may be a proxy.
    pub(crate) fn begin_unread(
        row: &Row,
        log: Option<(&Rc<AccessLog>, Protocol, Option<SocketAddr>)>,
        under_way: Option<UnderWay>,
    ) -> Self {
        let log_entry = log.map(|(log, protocol, from)| AccessLogEntry::of_unread(log, protocol, from));
        Self { in_flight: row.begin("-", "-"), log_entry, kind: Kind::Ordinary, client: None, under_way }
    }

    /// Runs application code. If this code kills the worker, this request is identified as the culprit.
    pub(super) fn run<T>(&self, code: impl FnOnce() -> T) -> T {
        self.in_flight.beat();
        current_request::enter(Some(self.in_flight.cell()), code)
    }

    /// Returns the request as shown in messages: "GET /path".
    pub(crate) fn what(&self) -> String {
        self.in_flight.what()
    }

    /// Records the status of the response.
    pub(super) fn answered(&mut self, status: StatusCode) {
        if let Some(entry) = &mut self.log_entry {
            entry.answered(status);
        }
    }

    /// Counts a frame of the response's body.
    pub(super) fn sent(&mut self, frame: &Frame<Bytes>) {
        if let Some(data) = frame.data_ref() {
            self.carried(data.len());
        }
    }

    /// Counts bytes sent to the client, including those of an upgraded connection.
    pub(crate) fn carried(&mut self, bytes: usize) {
        if let Some(entry) = &mut self.log_entry {
            entry.sent(bytes);
        }
    }

    /// Records that the response is a stream or an upgraded connection, so that the request no longer counts as in
    /// flight.
    pub(super) fn becomes_stream(&mut self) {
        self.in_flight.becomes_stream();
    }

    /// Records that the response consists of events, which end when the worker drains.
    pub(super) fn ends_with_worker(&mut self) {
        self.kind = Kind::Events(None);
    }

    /// Records that the response has no body, or a body that the application did not create.
    pub(super) fn is_no_stream(&mut self) {
        self.kind = Kind::Ordinary;
    }

    /// Records that the head of the response is about to be sent, after `waiting` bytes of output that have not been
    /// written yet.
    pub(crate) fn response_begins(&mut self, waiting: usize) {
        let Some(under_way) = &mut self.under_way else { return };
        under_way.response_begins(waiting);
        if let Kind::Events(wait) = &mut self.kind {
            *wait = Some(Wait::for_events(under_way.activity()));
        }
    }

    /// Records that the response ends after `waiting` bytes of output that have not been written yet.
    pub(crate) fn response_ends(&mut self, waiting: usize) {
        if let Some(under_way) = &mut self.under_way {
            under_way.response_ends(waiting);
        }
    }

    /// Records that the connection is closed after the response.
    pub(crate) fn is_last(&mut self) {
        if let Some(under_way) = &mut self.under_way {
            under_way.is_last();
        }
    }

    /// Returns the record of the client's faults, if the client can make the request fail.
    pub(super) fn client(&self) -> Option<&ClientFaults> {
        self.client.as_deref()
    }

    pub(super) fn set_client(&mut self, client: Option<Box<ClientFaults>>) {
        self.client = client;
    }
}
