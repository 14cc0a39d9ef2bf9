//! Passes the body of a response, together with its request, to a connection.

use std::pin::Pin;
use std::task::{Context, Poll, Waker, ready};

use bytes::{Buf, Bytes};
use http_body::{Body as HttpBody, Frame, SizeHint};
use pin_project_lite::pin_project;

use super::client::ClientFaults;
use super::{ResponseBody, catch_panic};
use crate::app::body::BodyError;
use crate::sys::BoxError;
use crate::worker::service::request_guard::RequestGuard;

pin_project! {
    /// The body of a response. It owns the request, which ends when this value is dropped.
    pub(crate) struct Served<B> {
        #[pin]
        pub(super) content: Content<B>,
        // `None` if the request continues as an upgraded connection.
        pub(super) guard: Option<RequestGuard>,
    }
}

pin_project! {
    #[project = Projected]
    pub(super) enum Content<B> {
        /// `left` is the part of the `Content-Length` that has not been produced yet, if the response has one.
        App { #[pin] body: B, left: Option<u64> },
        Canned { text: Bytes },
        // The response has no body, and an unknown length.
        Nothing,
        // The first frame has already been polled.
        Begun { first: Option<Result<Frame<Bytes>, BodyError>>, rest: Pin<Box<Content<B>>> },
    }
}

impl<B> Served<B> {
    /// Wraps a body from the application.
    pub(super) fn app(body: B, left: Option<u64>, guard: RequestGuard) -> Self {
        Self { content: Content::App { body, left }, guard: Some(guard) }
    }

    pub(super) fn canned(text: Bytes, mut guard: RequestGuard) -> Self {
        guard.is_no_stream();
        Self { content: Content::Canned { text }, guard: Some(guard) }
    }

    /// Wraps a body whose first frame has already been polled.
    pub(super) fn begun(
        first: Option<Result<Frame<Bytes>, BodyError>>,
        rest: Pin<Box<Content<B>>>,
        guard: RequestGuard,
    ) -> Self {
        Self { content: Content::Begun { first, rest }, guard: Some(guard) }
    }

    /// Drops the body.
    pub(super) fn emptied(mut self) -> Self {
        self.guard.iter_mut().for_each(RequestGuard::is_no_stream);
        Self { content: Content::Nothing, guard: self.guard }
    }

    /// Takes the request out of a response that switches protocols.
    pub(crate) fn switch(self) -> (Self, Option<RequestGuard>) {
        (Self { content: Content::Nothing, guard: None }, self.guard)
    }

    /// Returns the request, unless it continues as an upgraded connection.
    pub(crate) fn guard_mut(&mut self) -> Option<&mut RequestGuard> {
        self.guard.as_mut()
    }

    /// Like [`Self::guard_mut`].
    pub(crate) fn guard_pinned(self: Pin<&mut Self>) -> Option<&mut RequestGuard> {
        self.project().guard.as_mut()
    }

    /// Takes the request out of a response that is broken off.
    pub(crate) fn take_guard(self: Pin<&mut Self>) -> Option<RequestGuard> {
        self.project().guard.take()
    }

    /// Whether the client can make the body fail: the request has a body that has not been read to its end.
    pub(super) fn depends_on_client(&self) -> bool {
        let client = self.guard.as_ref().and_then(RequestGuard::client);
        matches!(self.content, Content::App { .. }) && client.is_some_and(|client| client.outcome.may_still_fail())
    }
}

impl<B> Served<B>
where
    B: ResponseBody,
{
    /// Logs a body that is longer than its `Content-Length`. For a connection that does not poll the body beyond this
    /// length.
    pub(crate) fn check_end(self: Pin<&mut Self>) {
        if self.content.may_be_too_long() {
            let _ = self.poll_frame(&mut Context::from_waker(Waker::noop()));
        }
    }
}

impl<B> Content<B>
where
    B: ResponseBody,
{
    /// Whether the whole `Content-Length` was sent but the body has not ended.
    fn may_be_too_long(&self) -> bool {
        match self {
            Self::App { left, body } => *left == Some(0) && !body.is_end_stream(),
            Self::Begun { first: None, rest } => rest.may_be_too_long(),
            Self::Begun { .. } | Self::Canned { .. } | Self::Nothing => false,
        }
    }

    pub(super) fn poll_frame(
        mut self: Pin<&mut Self>,
        guard: &mut RequestGuard,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let (body, left) = match self.as_mut().project() {
            Projected::App { body, left } => (body, left),
            Projected::Nothing => return Poll::Ready(None),
            Projected::Begun { first, rest } => {
                return match first.take() {
                    Some(first) => Poll::Ready(Some(first)),
                    None => rest.as_mut().poll_frame(guard, context),
                };
            }
            Projected::Canned { text } if text.is_empty() => return Poll::Ready(None),
            Projected::Canned { text } => {
                let frame = Frame::data(std::mem::take(text));
                guard.sent(&frame);
                return Poll::Ready(Some(Ok(frame)));
            }
        };
        let error: BoxError = match catch_panic(|| guard.run(|| body.poll_frame(context))) {
            Ok(frame) => match ready!(frame) {
                None => match left.take() {
                    None | Some(0) => return Poll::Ready(None),
                    Some(missing) => format!("it ended {missing} bytes before its Content-Length").into(),
                },
                Some(Ok(frame)) => {
                    let frame = frame.map_data(|mut data| data.copy_to_bytes(data.remaining()));
                    let (frame, is_cut) = within_length(frame, left, guard);
                    frame.iter().for_each(|frame| guard.sent(frame));
                    if is_cut {
                        self.set(Self::Canned { text: Bytes::new() });
                    }
                    return Poll::Ready(frame.map(Ok));
                }
                Some(Err(error)) => error.into(),
            },
            Err(panic) => panic.into(),
        };
        if guard.client().and_then(ClientFaults::fault).is_none() {
            log::error!(request = guard.what(); "a response body failed: {error}");
        }
        Poll::Ready(Some(Err(BodyError::Other(error))))
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::App { body, left } => left.unwrap_or(0) == 0 && body.is_end_stream(),
            Self::Canned { text } => text.is_empty(),
            Self::Nothing => true,
            Self::Begun { first, rest } => first.is_none() && rest.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::App { body, left } => left.map_or_else(|| body.size_hint(), SizeHint::with_exact),
            Self::Canned { text } => SizeHint::with_exact(text.len() as u64),
            Self::Nothing => SizeHint::new(),
            Self::Begun { first, rest } => {
                let first =
                    first.as_ref().and_then(|first| first.as_ref().ok()?.data_ref()).map_or(0, Bytes::len) as u64;
                let rest = rest.size_hint();
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

impl<B> HttpBody for Served<B>
where
    B: ResponseBody,
{
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let served = self.project();
        match served.guard {
            Some(guard) => served.content.poll_frame(guard, context),
            None => Poll::Ready(None),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.content.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.content.size_hint()
    }
}

/// Truncates a frame at the end of the response's `Content-Length`, and logs the truncation. Returns what remains of
/// the frame, if anything, and whether the frame was truncated.
fn within_length(frame: Frame<Bytes>, left: &mut Option<u64>, guard: &RequestGuard) -> (Option<Frame<Bytes>>, bool) {
    let (Some(promised), Some(data)) = (left.as_mut(), frame.data_ref()) else { return (Some(frame), false) };
    let length = data.len() as u64;
    if length <= *promised {
        *promised -= length;
        return (Some(frame), false);
    }
    log::error!(request = guard.what(); "truncated a response that is longer than its Content-Length");
    let room = usize::try_from(std::mem::take(promised)).unwrap_or(usize::MAX);
    ((room > 0).then(|| frame.map_data(|mut data| data.split_to(room))), true)
}
