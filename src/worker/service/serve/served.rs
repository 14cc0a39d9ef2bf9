//! Passes the body of a response to a connection.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker, ready};

use bytes::{Buf, Bytes};
use forkyard_shm::InFlight;
use http::StatusCode;
use http_body::{Body as HttpBody, Frame, SizeHint};
use pin_project_lite::pin_project;

use super::client::Client;
use super::{BoxError, Kind, Serving, catch_panic};
use crate::app::body::BodyError;
use crate::diagnostics::current_request;
use crate::request::activity::{Activity, Wait};

pin_project! {
    /// The body of a response. It keeps the request's entry in the scoreboard until it is dropped.
    #[project = Projected]
    #[project_replace = Replaced]
    pub(crate) enum Served<B> {
        /// `left` is the part of the `Content-Length` that is still to come, if the response has
        /// one.
        App { #[pin] body: B, in_flight: Serving, left: Option<u64> },
        Canned { text: Bytes, in_flight: Serving },
        // A response without a body. `in_flight` is `None` if its request continues in an upgrade.
        Nothing { in_flight: Option<Serving> },
        // The first frame was already polled.
        Begun { first: Option<Result<Frame<Bytes>, BodyError>>, body: Pin<Box<Served<B>>> },
    }
}

impl<B> Served<B> {
    /// Drops the body.
    pub(super) fn emptied(self) -> Self {
        Self::Nothing { in_flight: self.taken() }
    }

    /// Takes the request out of a response that switches protocols.
    pub(crate) fn switch(self) -> (Self, Option<Serving>) {
        (Self::Nothing { in_flight: None }, self.taken())
    }

    fn taken(self) -> Option<Serving> {
        match self {
            Self::App { in_flight, .. } | Self::Canned { in_flight, .. } => Some(in_flight),
            Self::Nothing { in_flight } => in_flight,
            Self::Begun { mut body, .. } => body.as_mut().take_serving(),
        }
    }

    /// Drops a pinned body and returns its request.
    pub(super) fn take_serving(self: Pin<&mut Self>) -> Option<Serving> {
        match self.project_replace(Self::Nothing { in_flight: None }) {
            Replaced::App { in_flight, .. } | Replaced::Canned { in_flight, .. } => Some(in_flight),
            Replaced::Nothing { in_flight } => in_flight,
            Replaced::Begun { mut body, .. } => body.as_mut().take_serving(),
        }
    }

    /// If the body failed because of the client, drops it and returns the request with the status
    /// of the response.
    pub(super) fn take_faulty(mut self: Pin<&mut Self>) -> Option<(StatusCode, Serving)> {
        let status = match self.as_mut().project() {
            Projected::App { in_flight, .. } => in_flight.client.as_ref()?.trouble.cause()?.0,
            Projected::Canned { .. } | Projected::Nothing { .. } | Projected::Begun { .. } => return None,
        };
        Some((status, self.take_serving()?))
    }

    /// A body that has ended.
    pub(super) fn ended(in_flight: Serving) -> Self {
        Self::Canned { text: Bytes::new(), in_flight }
    }

    /// Logs that the body is longer than its `Content-Length`, for a connection that does not poll the body beyond that.
    pub(crate) fn check_end(self: Pin<&mut Self>)
    where
        B: HttpBody,
        B::Error: Into<BoxError>,
    {
        let body = match &*self {
            Self::Begun { first: None, body } => &**body,
            body => body,
        };
        if matches!(body, Self::App { left: Some(0), .. }) && !body.is_end_stream() {
            let _ = self.poll_frame(&mut Context::from_waker(Waker::noop()));
        }
    }

    /// Whether the client can make the body fail: the request has a body that is not read to its
    /// end.
    pub(super) fn depends_on_client(&self) -> bool {
        let Self::App { in_flight, .. } = self else { return false };
        in_flight.client.as_ref().is_some_and(|client| client.trouble.is_possible())
    }

    /// If this is a stream that ends with the worker, marks that on its connection.
    pub(crate) fn set_activity(&mut self, activity: &Arc<Activity>) {
        let in_flight = match self {
            Self::App { in_flight, .. } => in_flight,
            Self::Begun { body, .. } => match body.as_mut().project() {
                Projected::App { in_flight, .. } => in_flight,
                Projected::Canned { .. } | Projected::Nothing { .. } | Projected::Begun { .. } => return,
            },
            Self::Canned { .. } | Self::Nothing { .. } => return,
        };
        if let Kind::Events(wait) = &mut in_flight.kind {
            *wait = Some(Wait::for_events(activity));
        }
    }
}

impl<B> HttpBody for Served<B>
where
    B: HttpBody,
    B::Error: Into<BoxError>,
{
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let (body, in_flight, left) = match self.as_mut().project() {
            Projected::App { body, in_flight, left } => (body, in_flight, left),
            Projected::Nothing { .. } => return Poll::Ready(None),
            Projected::Begun { first, body } => {
                return match first.take() {
                    Some(first) => Poll::Ready(Some(first)),
                    None => body.as_mut().poll_frame(context),
                };
            }
            Projected::Canned { text, .. } if text.is_empty() => return Poll::Ready(None),
            Projected::Canned { text, in_flight } => {
                let frame = Frame::data(std::mem::take(text));
                in_flight.sent(Some(&frame));
                return Poll::Ready(Some(Ok(frame)));
            }
        };
        in_flight.beat();
        let error: BoxError =
            match catch_panic(|| current_request::enter(Some(in_flight.cell()), || body.poll_frame(context))) {
                Ok(frame) => match ready!(frame) {
                    None => match left.take() {
                        None | Some(0) => return Poll::Ready(None),
                        Some(missing) => format!("it ended {missing} bytes before its Content-Length").into(),
                    },
                    Some(Ok(frame)) => {
                        let frame = frame.map_data(|mut data| data.copy_to_bytes(data.remaining()));
                        let (frame, is_cut) = within_length(frame, left, in_flight);
                        in_flight.sent(frame.as_ref());
                        if is_cut && let Some(in_flight) = self.as_mut().take_serving() {
                            self.set(Self::ended(in_flight));
                        }
                        return Poll::Ready(frame.map(Ok));
                    }
                    Some(Err(error)) => error.into(),
                },
                Err(panic) => panic.into(),
            };
        if in_flight.client.as_deref().and_then(Client::fault).is_none() {
            log::error!("a response broke off: {error} request={:?}", in_flight.what());
        }
        Poll::Ready(Some(Err(BodyError::Other(error))))
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::App { body, left, .. } => left.unwrap_or(0) == 0 && body.is_end_stream(),
            Self::Canned { text, .. } => text.is_empty(),
            Self::Nothing { .. } => true,
            Self::Begun { first, body } => first.is_none() && body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::App { body, left, .. } => left.map_or_else(|| body.size_hint(), SizeHint::with_exact),
            Self::Canned { text, .. } => SizeHint::with_exact(text.len() as u64),
            Self::Nothing { .. } => SizeHint::new(), // the length is unknown
            Self::Begun { first, body } => {
                let first =
                    first.as_ref().and_then(|first| first.as_ref().ok()?.data_ref()).map_or(0, Bytes::len) as u64;
                let rest = body.size_hint();
                let mut hint = SizeHint::new();
                hint.set_lower(rest.lower() + first);
                if let Some(upper) = rest.upper() {
                    hint.set_upper(upper + first);
                }
                hint
            }
        }
    }
}

/// Cuts a frame at the end of the response's `Content-Length`, and logs that. Returns what is left of the frame, if anything,
/// and whether it was cut.
fn within_length(frame: Frame<Bytes>, left: &mut Option<u64>, in_flight: &InFlight) -> (Option<Frame<Bytes>>, bool) {
    let (Some(promised), Some(data)) = (left.as_mut(), frame.data_ref()) else { return (Some(frame), false) };
    let length = data.len() as u64;
    if length <= *promised {
        *promised -= length;
        return (Some(frame), false);
    }
    log::error!("a response is longer than its Content-Length, and was cut there request={:?}", in_flight.what());
    let room = usize::try_from(std::mem::take(promised)).unwrap_or(usize::MAX);
    ((room > 0).then(|| frame.map_data(|mut data| data.split_to(room))), true)
}
