//! Reads the part of a request body that the application has left unread, up to a limit. Some clients do not read the
//! response before they have sent the whole body, and hyper closes a connection whose body is dropped.

use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, Waker, ready};

use bytes::Bytes;
use http_body::Body as HttpBody;
use hyper::body::Incoming;
use tokio::sync::oneshot;
use tokio::time::sleep;

use crate::app::body;
use crate::request::activity::Activity;
use crate::worker::conn::linger::{DiscardLimits, QUIET_TIMEOUT};

/// Maximum number of unread body bytes that are read to keep the connection.
const WORTH_READING: u64 = 64 << 10;

pub(super) struct UnreadBodyReader {
    left: oneshot::Receiver<body::UnreadBody>,
    /// Whether the client waits for a 100 response before it sends the body.
    is_awaited: bool,
    activity: Arc<Activity>,
    state: State,
}

enum State {
    /// The application still holds the body.
    Held,
    Reading {
        incoming: Incoming,
        limits: DiscardLimits,
    },
    /// The body was read to its end.
    Over,
    /// The remainder of the body is not read.
    Cut,
}

impl UnreadBodyReader {
    pub(super) fn new(left: oneshot::Receiver<body::UnreadBody>, is_awaited: bool, activity: &Arc<Activity>) -> Self {
        Self { left, is_awaited, activity: Arc::clone(activity), state: State::Held }
    }

    /// Whether the connection will be closed, as far as is known, because the body is not read to its end.
    pub(super) fn ends_connection(&mut self) -> bool {
        // The next poll registers a real waker.
        let _ = self.poll(&mut Context::from_waker(Waker::noop()));
        match &self.state {
            State::Held | State::Over => false,
            State::Cut => true,
            State::Reading { incoming, .. } => {
                self.is_awaited || incoming.size_hint().exact().is_none_or(|left| left > WORTH_READING)
            }
        }
    }

    fn begin(&mut self, body::UnreadBody { incoming, is_broken }: body::UnreadBody) {
        self.state = if is_broken { State::Cut } else { State::Reading { incoming, limits: DiscardLimits::begin() } };
    }

    /// Whether the body was read to its end.
    pub(super) fn is_over(&self) -> bool {
        matches!(self.state, State::Over)
    }

    /// Whether the remainder of the body stays unread.
    pub(super) fn is_cut(&self) -> bool {
        matches!(self.state, State::Cut)
    }

    /// Stops reading the body.
    pub(super) fn cut(&mut self) {
        self.state = State::Cut;
    }

    /// Reads the body before the connection switches protocols, because the other protocol's bytes follow the body.
    /// hyper sends the 100 response for which the client may be waiting. An application may keep the body for as long
    /// as it has the upgrade.
    pub(super) async fn read(&mut self) {
        let mut held_too_long = pin!(sleep(QUIET_TIMEOUT));
        poll_fn(|context| match self.poll(context) {
            Poll::Pending if matches!(self.state, State::Held) => held_too_long.as_mut().poll(context),
            read => read,
        })
        .await;
    }

    /// Reads the available part of the body. Becomes ready when no more needs to be read.
    pub(super) fn poll(&mut self, context: &mut Context<'_>) -> Poll<()> {
        loop {
            self.state = match &mut self.state {
                State::Over | State::Cut => return Poll::Ready(()),
                State::Held => match ready!(Pin::new(&mut self.left).poll(context)) {
                    Ok(rest) => {
                        self.begin(rest);
                        continue;
                    }
                    Err(_) => State::Over,
                },
                // The data comes first: if the event loop was busy for long, data may have arrived in time.
                State::Reading { incoming, limits } => match Pin::new(incoming).poll_frame(context) {
                    Poll::Ready(None) => State::Over,
                    Poll::Ready(Some(Err(_))) => State::Cut,
                    Poll::Ready(Some(Ok(frame))) => {
                        let bytes = frame.data_ref().map_or(0, Bytes::len);
                        self.activity.held().taken(bytes);
                        if limits.received(bytes) {
                            continue;
                        }
                        State::Cut
                    }
                    Poll::Pending => {
                        ready!(limits.poll_end(context));
                        State::Cut
                    }
                },
            };
        }
    }
}
