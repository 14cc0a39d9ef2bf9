//! The body of a gateway's response.

use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};

use super::files::FileBody;
use super::spool::SpoolReader;
use crate::app::body::Body as EventsBody;
use crate::sys::BoxError;

#[derive(Debug)]
pub(crate) enum GatewayBody {
    /// A body that had already arrived when the response began.
    Whole(Bytes),
    Spooled(SpoolReader),
    /// Parts of a file.
    File(FileBody),
    /// The events of a subscriber.
    Events(EventsBody),
}

impl Body for GatewayBody {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        match self.get_mut() {
            Self::Whole(bytes) if bytes.is_empty() => Poll::Ready(None),
            Self::Whole(bytes) => Poll::Ready(Some(Ok(Frame::data(std::mem::take(bytes))))),
            Self::Spooled(reader) => Pin::new(reader).poll_frame(context).map_err(BoxError::from),
            Self::File(file) => file.poll_piece(context).map_ok(Frame::data).map_err(BoxError::from),
            Self::Events(body) => Pin::new(body).poll_frame(context).map_err(BoxError::from),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Whole(bytes) => bytes.is_empty(),
            Self::Spooled(reader) => reader.is_end_stream(),
            Self::File(file) => file.left() == 0,
            Self::Events(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Whole(bytes) => SizeHint::with_exact(bytes.len() as u64),
            Self::Spooled(reader) => reader.size_hint(),
            Self::File(file) => SizeHint::with_exact(file.left()),
            Self::Events(body) => body.size_hint(),
        }
    }
}
