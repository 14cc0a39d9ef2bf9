//! Writes a response in CGI form: a head, then the body as it is produced, until it ends. Used for SCGI and CGI, which
//! do not frame the response.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Bytes, BytesMut};
use http::Response;
use http_body::Body as HttpBody;

use crate::protocol::cgi;
use crate::worker::service::request_guard::RequestGuard;
use crate::worker::service::serve::{ResponseBody, Served};

/// The body of a response whose head was written.
pub(crate) struct CgiResponseBody<B> {
    body: Pin<Box<Served<B>>>,
    over: bool,
}

impl<B> CgiResponseBody<B>
where
    B: ResponseBody,
{
    /// Writes the head of the response to `head`. The reply has no body if the request was a HEAD
    /// request.
    pub(crate) fn begin(response: Response<Served<B>>, is_head: bool, head: &mut BytesMut) -> Self {
        let (parts, body) = response.into_parts();
        let status = parts.status;
        let bodiless = cgi::has_no_body(status);
        let length = body.size_hint().exact().filter(|_| !bodiless);
        cgi::response_head(head, status, &parts.headers, length);
        let over = bodiless || is_head || body.is_end_stream();
        Self { body: Box::pin(body), over }
    }

    /// Returns the request that this reply answers.
    pub(crate) fn guard(&mut self) -> Option<&mut RequestGuard> {
        self.body.as_mut().guard_pinned()
    }

    /// Returns the next chunk of the body, or `None` at its end.
    ///
    /// # Errors
    /// Fails if the body fails. The failure has already been logged.
    pub(crate) fn poll_piece(&mut self, context: &mut Context<'_>) -> Poll<Option<io::Result<Bytes>>> {
        while !self.over {
            match ready!(self.body.as_mut().poll_frame(context)) {
                None => self.over = true,
                Some(Err(error)) => return Poll::Ready(Some(Err(io::Error::other(error)))),
                Some(Ok(frame)) => {
                    self.over = self.body.is_end_stream();
                    if let Ok(data) = frame.into_data() {
                        return Poll::Ready(Some(Ok(data)));
                    }
                }
            }
        }
        Poll::Ready(None)
    }
}
