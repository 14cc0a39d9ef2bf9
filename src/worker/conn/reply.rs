//! A response as CGI has it: a head, and then the body as it comes, up to the end. For SCGI and CGI, which have no
//! frames around it.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Bytes, BytesMut};
use http::Response;
use http_body::Body as HttpBody;

use crate::protocol::cgi;
use crate::worker::service::serve::{BoxError, Served};

/// The body of a response whose head is written.
pub(crate) struct Reply<B> {
    body: Pin<Box<Served<B>>>,
    over: bool,
}

impl<B> Reply<B>
where
    B: HttpBody,
    B::Error: Into<BoxError>,
{
    /// Writes the head of the response to `head`; the rest of it is the reply. It has no body if the request was for the
    /// head alone.
    pub(crate) fn begin(response: Response<Served<B>>, is_head: bool, head: &mut BytesMut) -> Self {
        let (parts, body) = response.into_parts();
        let status = parts.status;
        let bodiless = cgi::has_no_body(status);
        let length = body.size_hint().exact().filter(|_| !bodiless);
        cgi::response_head(head, status, &parts.headers, length);
        let over = bodiless || is_head || body.is_end_stream();
        Self { body: Box::pin(body), over }
    }

    /// The next piece of the body; `None` at its end.
    ///
    /// # Errors
    /// If the body breaks off. That is in the log already.
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
