//! What the application leaves of a request's body. It is read, up to a limit: the peer may not look for the response before it has
//! sent all, and hyper closes a connection on which a body is dropped.

use std::pin::Pin;
use std::task::{Context, Poll, Waker, ready};

use bytes::Bytes;
use http_body::Body as HttpBody;
use hyper::body::Incoming;
use tokio::sync::oneshot;
use tokio::time::Sleep;

use crate::app::body;
use crate::worker::conn::linger::LINGER;

/// Bytes of a body that are read for the sake of the connection.
const WORTH_READING: u64 = 64 << 10;

pub(super) struct Rest {
    left: oneshot::Receiver<body::Rest>,
    /// The client waits for a 100 before it sends the body.
    is_awaited: bool,
    state: State,
}

enum State {
    /// The application has it.
    Held,
    Reading {
        incoming: Incoming,
        bytes: u64,
        end: Pin<Box<Sleep>>,
    },
    /// All of the body was read.
    Over,
    /// Nothing more is read, though there is more.
    Cut,
}

impl Rest {
    pub(super) fn new(left: oneshot::Receiver<body::Rest>, is_awaited: bool) -> Self {
        Self { left, is_awaited, state: State::Held }
    }

    /// Whether the connection will be closed because the body is not read to its end, as far as that is known.
    pub(super) fn ends_connection(&mut self) -> bool {
        // Whoever polls next is woken.
        let _ = self.poll(&mut Context::from_waker(Waker::noop()));
        match &self.state {
            State::Held | State::Over => false,
            State::Cut => true,
            State::Reading { incoming, .. } => {
                self.is_awaited || incoming.size_hint().exact().is_none_or(|left| left > WORTH_READING)
            }
        }
    }

    fn begin(&mut self, body::Rest { incoming, is_broken }: body::Rest) {
        let (time, bytes) = LINGER;
        self.state = if is_broken {
            State::Cut
        } else {
            State::Reading { incoming, bytes, end: Box::pin(tokio::time::sleep(time)) }
        };
    }

    /// Whether all of it was read.
    pub(super) fn is_over(&self) -> bool {
        matches!(self.state, State::Over)
    }

    /// Whether there may be more, which nobody reads.
    pub(super) fn is_cut(&self) -> bool {
        matches!(self.state, State::Cut)
    }

    /// Nothing more is to be read.
    pub(super) fn cut(&mut self) {
        self.state = State::Cut;
    }

    /// Reads as much as is there. Ready when nothing more is to be read.
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
                State::Reading { incoming, bytes, end } => {
                    if end.as_mut().poll(context).is_ready() {
                        self.state = State::Cut;
                        continue;
                    }
                    match ready!(Pin::new(incoming).poll_frame(context)) {
                        None => State::Over,
                        Some(Err(_)) => State::Cut,
                        Some(Ok(frame)) => match bytes.checked_sub(frame.data_ref().map_or(0, Bytes::len) as u64) {
                            None => State::Cut,
                            Some(left) => {
                                *bytes = left;
                                continue;
                            }
                        },
                    }
                }
            };
        }
    }
}
