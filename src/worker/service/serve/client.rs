//! Handles responses that fail because of the client's input. Such a failure is not the application's fault. It is
//! counted like a refused request, and the request is answered like a refused one if the response head has not been
//! sent.

use std::net::SocketAddr;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use http::response::Parts;
use http::{Response, StatusCode};
use http_body::Body as HttpBody;

use super::served::{Content, Served};
use super::{ResponseBody, refusal};
use crate::app::body::BodyOutcome;
use crate::config::address::Protocol;
use crate::worker::conn::refusals::Refusals;
use crate::worker::service::request_guard::RequestGuard;

/// Detects and counts failures of a request that its client caused.
#[derive(Clone, Debug)]
pub(crate) struct ClientFaults {
    pub(super) outcome: Arc<BodyOutcome>,
    pub(super) refusals: Rc<Refusals>,
    pub(super) protocol: Protocol,
    pub(super) from: Option<SocketAddr>,
}

impl ClientFaults {
    /// Counts the failure if the body failed because of the client. In this case, returns the status of the response.
    pub(super) fn fault(&self) -> Option<StatusCode> {
        let (status, why) = self.outcome.cause()?;
        self.refusals.note(self.protocol, status, self.from, why);
        Some(status)
    }

    /// Like [`ClientFaults::fault`], for a body that was too long or too slow: the returned status replaces any response
    /// of the application.
    pub(super) fn breach(&self) -> Option<StatusCode> {
        self.outcome.status().and_then(|_| self.fault())
    }
}

/// A response whose head is delayed until the first chunk of its body is available, but by at most one poll. This is
/// long enough to read the part of the request that has arrived.
pub(super) struct Begun<B> {
    head: Parts,
    content: Pin<Box<Content<B>>>,
    pub(super) guard: RequestGuard,
    was_polled: bool,
}

impl<B> Begun<B>
where
    B: ResponseBody,
{
    /// Whether the client can make this response fail: the request's body has not been read to its end, and the
    /// response has a body.
    pub(super) fn is_needed(response: &Response<Served<B>>) -> bool {
        response.body().depends_on_client() && !response.body().is_end_stream()
    }

    /// Delays the head of `response`. Returns `None` if the request continues as an upgraded connection.
    pub(super) fn new(response: Response<Served<B>>) -> Option<Box<Self>> {
        let (head, Served { content, guard }) = response.into_parts();
        Some(Box::new(Self { head, content: Box::pin(content), guard: guard?, was_polled: false }))
    }

    pub(super) fn poll(this: &mut Option<Box<Self>>, context: &mut Context<'_>) -> Poll<Response<Served<B>>> {
        let Some(begun) = this else { return Poll::Pending };
        let first = match begun.content.as_mut().poll_frame(&mut begun.guard, context) {
            Poll::Pending if !begun.was_polled => {
                begun.was_polled = true;
                context.waker().wake_by_ref();
                return Poll::Pending;
            }
            Poll::Pending => None,
            Poll::Ready(first) => Some(first),
        };
        let Some(begun) = this.take() else { return Poll::Pending };
        let Self { head, content, guard, .. } = *begun;
        let body = match first {
            // The body must not be polled again.
            Some(None) => Served::canned(Bytes::new(), guard),
            Some(Some(Err(error))) => {
                if let Some((status, _)) = guard.client().and_then(|client| client.outcome.cause()) {
                    return Poll::Ready(refusal(status, guard));
                }
                Served::begun(Some(Err(error)), content, guard)
            }
            Some(first) => Served::begun(first, content, guard),
            None => Served::begun(None, content, guard),
        };
        Poll::Ready(Response::from_parts(head, body))
    }
}
