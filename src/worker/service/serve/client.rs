//! A response that fails because of what the client sent, or did not send: no fault of the application's, so it is counted like a
//! refused request, and answered as one if its head has not been sent.

use std::net::SocketAddr;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};

use http::{Response, StatusCode};
use http_body::Body as HttpBody;

use super::{BoxError, Served, refusal};
use crate::app::body::Trouble;
use crate::config::address::Protocol;
use crate::worker::conn::refusals::Refusals;

/// The client of a request that has a body.
#[derive(Clone, Debug)]
pub(crate) struct Client {
    pub(super) trouble: Arc<Trouble>,
    pub(super) refusals: Rc<Refusals>,
    pub(super) protocol: Protocol,
    pub(super) from: Option<SocketAddr>,
}

impl Client {
    /// If the body failed because of the client, counts that, and returns the status that is the answer.
    pub(super) fn fault(&self) -> Option<StatusCode> {
        let (status, why) = self.trouble.cause()?;
        self.refusals.note(self.protocol, status, self.from, why);
        Some(status)
    }

    /// The same, of a body that was too long or came too slowly: that is the answer whatever the application made of it.
    pub(super) fn breach(&self) -> Option<StatusCode> {
        self.trouble.status().and_then(|_| self.fault())
    }
}

/// A response whose head waits for the first piece of its body, for as long as it takes to read what has come of the request.
pub(super) struct Begun<B> {
    response: Response<Pin<Box<Served<B>>>>,
    was_polled: bool,
}

impl<B> Begun<B>
where
    B: HttpBody,
    B::Error: Into<BoxError>,
{
    /// Whether the client can make this response fail: the request's body has not been read, and the response has a body.
    pub(super) fn is_needed(response: &Response<Served<B>>) -> bool {
        response.body().depends_on_client() && !response.body().is_end_stream()
    }

    pub(super) fn new(response: Response<Served<B>>) -> Box<Self> {
        Box::new(Self { response: response.map(Box::pin), was_polled: false })
    }

    pub(super) fn poll(this: &mut Option<Box<Self>>, context: &mut Context<'_>) -> Poll<Response<Served<B>>> {
        let Some(mut begun) = this.take() else { return Poll::Pending };
        let first = match begun.response.body_mut().as_mut().poll_frame(context) {
            Poll::Pending if !begun.was_polled => {
                begun.was_polled = true;
                *this = Some(begun);
                context.waker().wake_by_ref();
                return Poll::Pending;
            }
            Poll::Pending => None,
            Poll::Ready(None) => {
                // It must not be polled again.
                return Poll::Ready(begun.response.map(|mut body| match body.as_mut().take_serving() {
                    Some(serving) => Served::ended(serving),
                    None => Served::Nothing { in_flight: None },
                }));
            }
            Poll::Ready(Some(Err(error))) => {
                if let Some((status, serving)) = begun.response.body_mut().as_mut().take_faulty() {
                    return Poll::Ready(refusal(status, serving));
                }
                Some(Err(error))
            }
            Poll::Ready(first) => first,
        };
        Poll::Ready(begun.response.map(|body| Served::Begun { first, body }))
    }
}
