//! The body of a response, on its way to a connection.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};
use forkyard_shm::InFlight;
use http_body::{Body as HttpBody, Frame, SizeHint};
use pin_project_lite::pin_project;

use super::{BoxError, Kind, Serving, catch_panic};
use crate::at_work;
use crate::body::BodyError;
use crate::pulse::{Pulse, Wait};

pin_project! {
    /// The body of a response, with the request's place in the scoreboard, which it keeps until it is dropped.
    #[project = Projected]
    pub(crate) enum Served<B> {
        /// `left` is what its `Content-Length` still promises, if it has one.
        App { #[pin] body: B, in_flight: Serving, left: Option<u64> },
        Canned { text: Bytes, in_flight: Serving },
        // The head is all of the response. Without `in_flight` its request lives on behind an upgrade.
        Nothing { in_flight: Option<Serving> },
    }
}

impl<B> Served<B> {
    /// Leaves the body out.
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
        }
    }

    /// If this is a stream that ends with the worker, has its connection know.
    pub(crate) fn tell(&mut self, pulse: &Arc<Pulse>) {
        if let Self::App { in_flight: Serving { kind: Kind::Events(told), .. }, .. } = self {
            *told = Some(Wait::for_events(pulse));
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

    fn poll_frame(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let (body, in_flight, left) = match self.project() {
            Projected::App { body, in_flight, left } => (body, in_flight, left),
            Projected::Nothing { .. } => return Poll::Ready(None),
            Projected::Canned { text, .. } if text.is_empty() => return Poll::Ready(None),
            Projected::Canned { text, in_flight } => {
                let frame = Frame::data(std::mem::take(text));
                in_flight.sent(Some(&frame));
                return Poll::Ready(Some(Ok(frame)));
            }
        };
        in_flight.beat();
        let error: BoxError = match catch_panic(|| at_work::on(Some(in_flight.cell()), || body.poll_frame(context))) {
            Ok(frame) => match ready!(frame) {
                None => match left {
                    None | Some(0) => return Poll::Ready(None),
                    Some(missing) => format!("it ended {missing} bytes before its Content-Length").into(),
                },
                Some(Ok(frame)) => {
                    let frame = frame.map_data(|mut data| data.copy_to_bytes(data.remaining()));
                    let frame = within_length(frame, left, in_flight);
                    in_flight.sent(frame.as_ref());
                    return Poll::Ready(frame.map(Ok));
                }
                Some(Err(error)) => error.into(),
            },
            Err(panic) => panic.into(),
        };
        log::error!("a response broke off: {error} request={:?}", in_flight.what());
        Poll::Ready(Some(Err(BodyError::Other(error))))
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::App { body, left, .. } => left.unwrap_or(0) == 0 && body.is_end_stream(),
            Self::Canned { text, .. } => text.is_empty(),
            Self::Nothing { .. } => true,
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::App { body, left, .. } => left.map_or_else(|| body.size_hint(), SizeHint::with_exact),
            Self::Canned { text, .. } => SizeHint::with_exact(text.len() as u64),
            Self::Nothing { .. } => SizeHint::new(), // it says nothing of a length
        }
    }
}

/// Cuts a response where its `Content-Length` ends. `None` if nothing is left of the frame.
fn within_length(frame: Frame<Bytes>, left: &mut Option<u64>, in_flight: &InFlight) -> Option<Frame<Bytes>> {
    let (Some(promised), Some(data)) = (left.as_mut(), frame.data_ref()) else { return Some(frame) };
    let length = data.len() as u64;
    if length <= *promised {
        *promised -= length;
        return Some(frame);
    }
    log::error!("a response is longer than its Content-Length, and was cut there request={:?}", in_flight.what());
    let room = usize::try_from(std::mem::take(promised)).unwrap_or(usize::MAX);
    (room > 0).then(|| frame.map_data(|mut data| data.split_to(room)))
}
