//! The body of a gateway's response.

use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};

use super::spool::{SpoolError, SpoolReader};

#[derive(Debug)]
pub(crate) enum GatewayBody {
    /// A body that had already arrived when the response began.
    Whole(Bytes),
    Spooled(SpoolReader),
}

impl Body for GatewayBody {
    type Data = Bytes;
    type Error = SpoolError;

    fn poll_frame(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, SpoolError>>> {
        match self.get_mut() {
            Self::Whole(bytes) if bytes.is_empty() => Poll::Ready(None),
            Self::Whole(bytes) => Poll::Ready(Some(Ok(Frame::data(std::mem::take(bytes))))),
            Self::Spooled(reader) => Pin::new(reader).poll_frame(context),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Whole(bytes) => bytes.is_empty(),
            Self::Spooled(reader) => reader.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Whole(bytes) => SizeHint::with_exact(bytes.len() as u64),
            Self::Spooled(reader) => reader.size_hint(),
        }
    }
}
