//! The body of a gateway's response.

use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};

use super::spool::{SpoolError, SpoolReader};
use crate::app::body::Body as EventsBody;

#[derive(Debug)]
pub(crate) enum GatewayBody {
    /// A body that had already arrived when the response began.
    Whole(Bytes),
    Spooled(SpoolReader),
    /// The events of a subscriber.
    Events(EventsBody),
}

impl Body for GatewayBody {
    type Data = Bytes;
    type Error = SpoolError;

    fn poll_frame(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, SpoolError>>> {
        match self.get_mut() {
            Self::Whole(bytes) if bytes.is_empty() => Poll::Ready(None),
            Self::Whole(bytes) => Poll::Ready(Some(Ok(Frame::data(std::mem::take(bytes))))),
            Self::Spooled(reader) => Pin::new(reader).poll_frame(context),
            // An event stream has no errors.
            Self::Events(body) => Pin::new(body)
                .poll_frame(context)
                .map(|frame| frame.map(|frame| frame.map_err(|_| SpoolError::BrokenOff))),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Whole(bytes) => bytes.is_empty(),
            Self::Spooled(reader) => reader.is_end_stream(),
            Self::Events(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Whole(bytes) => SizeHint::with_exact(bytes.len() as u64),
            Self::Spooled(reader) => reader.size_hint(),
            Self::Events(body) => body.size_hint(),
        }
    }
}
