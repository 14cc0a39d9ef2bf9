//! Tracks a request on its connection. The watchdog and the drain depend on what the connection waits for; the heir
//! answers the request if this worker dies.

use std::sync::Arc;

use crate::heir::journal::{ConnHandle, RequestIndex};
use crate::request::activity::Activity;

/// A request that is under way on a connection until this value is dropped.
#[derive(Debug)]
pub(crate) struct UnderWay {
    activity: Arc<Activity>,
    conn: ConnHandle,
    /// `None` over HTTP/2, whose requests are not in the journal.
    index: Option<RequestIndex>,
    end: End,
}

/// Where the response ends in the connection's output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// Unknown until [`UnderWay::response_ends`] is called. Without that call, the response was broken off.
    Announced,
    /// After all output that is unwritten when the [`UnderWay`] is dropped, because hyper does not expose the position.
    Unwritten,
}

impl UnderWay {
    /// Begins a request whose protocol announces where the response ends.
    pub(crate) fn begin(activity: &Arc<Activity>, conn: &ConnHandle, index: RequestIndex) -> Self {
        activity.request_came();
        Self { activity: Arc::clone(activity), conn: *conn, index: Some(index), end: End::Announced }
    }

    /// Begins a request over HTTP, whose response ends when hyper drops it.
    pub(crate) fn begin_http(activity: &Arc<Activity>, conn: &ConnHandle, index: Option<RequestIndex>) -> Self {
        activity.request_came();
        Self { activity: Arc::clone(activity), conn: *conn, index, end: End::Unwritten }
    }

    /// Records that the response begins after `waiting` bytes of output that have not been written yet.
    pub(crate) fn response_begins(&mut self, waiting: usize) {
        if let Some(index) = self.index {
            self.conn.response_from(index, self.conn.output(waiting));
        }
    }

    /// Records that the response ends after `waiting` bytes of output that have not been written yet.
    pub(crate) fn response_ends(&mut self, waiting: usize) {
        if let Some(index) = self.index {
            self.conn.response_to(index, self.conn.output(waiting));
        }
    }

    pub(crate) fn activity(&self) -> &Arc<Activity> {
        &self.activity
    }

    /// Records that the connection is closed after the response.
    pub(crate) fn is_last(&mut self) {
        if let Some(index) = self.index {
            self.conn.is_last(index);
        }
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        if let (Some(index), End::Unwritten) = (self.index, self.end) {
            self.conn.response_over(index);
        }
        self.activity.request_over();
    }
}
