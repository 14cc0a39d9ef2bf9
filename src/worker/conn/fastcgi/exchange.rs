//! Advances one request of a FastCGI connection and writes its response as records.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::{Bytes, BytesMut};
use http::{Request, Response};
use http_body::Body as HttpBody;
use pin_project_lite::pin_project;
use tower_service::Service;

use super::super::outbox::Outbox;
use super::OUTBOX_LIMIT;
use crate::app::body::{Body, pipe};
use crate::protocol::cgi;
use crate::protocol::fastcgi::{self, MAX_CONTENT, RequestId};
use crate::protocol::role::AppStatus;
use crate::worker::service::request_guard::RequestGuard;
use crate::worker::service::serve::{AppService, ResponseBody, ResponseFuture, Served};

pub(super) struct Exchange<S: Service<Request<Body>>, B> {
    pub(super) id: RequestId,
    pub(super) keep_connection: bool,
    pub(super) is_head: bool,
    /// Pipe of the request body, until the body ends or the application may no longer read it.
    pub(super) stdin: Option<pipe::Writer>,
    /// Pipe of a filter's file, until the file ends or the application may no longer read it.
    pub(super) data: Option<pipe::Writer>,
    pub(super) app_status: u32,
    /// The work of the exchange, pinned in a heap allocation that the next exchange reuses.
    pub(super) work: Pin<Box<Work<S, B>>>,
}

pin_project! {
    #[project = Working]
    pub(super) enum Work<S: Service<Request<Body>>, B> {
        Answering { #[pin] answer: ResponseFuture<S, B> },
        Sending { #[pin] body: Served<B> },
        Ended,
        /// The response failed. Nothing more is sent for it until the connection is closed.
        BrokenOff { guard: Option<RequestGuard> },
    }
}

impl<S, B> Exchange<S, B>
where
    S: AppService<B>,
    B: ResponseBody,
{
    /// Advances until the exchange waits, has ended, or has filled the output.
    ///
    /// # Errors
    /// Fails if the response has failed. The failure has already been logged; only closing the connection signals it to
    /// the peer.
    pub(super) fn poll(
        &mut self,
        context: &mut Context<'_>,
        outbox: &mut Outbox,
        head: &mut BytesMut,
    ) -> io::Result<()> {
        while outbox.len() < OUTBOX_LIMIT {
            match self.work.as_mut().project() {
                Working::Answering { answer } => {
                    let Poll::Ready(mut response) = answer.poll(context) else { return Ok(()) };
                    if let Some(guard) = response.body_mut().guard_mut() {
                        guard.response_begins(outbox.len());
                    }
                    self.send_head(response, context, outbox, head)?;
                }
                Working::Sending { mut body } => match body.as_mut().poll_frame(context) {
                    Poll::Pending => return Ok(()),
                    Poll::Ready(Some(frame)) => {
                        if let Ok(data) = frame.map_err(io::Error::other)?.into_data() {
                            let ended = body.is_end_stream();
                            self.send(data, outbox);
                            if ended {
                                self.end(outbox);
                            }
                        }
                    }
                    Poll::Ready(None) => self.end(outbox),
                },
                Working::Ended | Working::BrokenOff { .. } => return Ok(()),
            }
        }
        Ok(())
    }

    /// Writes the head and, in the same record, the available part of the body.
    fn send_head(
        &mut self,
        response: Response<Served<B>>,
        context: &mut Context<'_>,
        outbox: &mut Outbox,
        head: &mut BytesMut,
    ) -> io::Result<()> {
        let (parts, body) = response.into_parts();
        self.app_status = parts.extensions.get().map_or(0, |&AppStatus(status)| status);
        let status = parts.status;
        let bodiless = cgi::has_no_body(status);
        let length = body.size_hint().exact().filter(|_| !bodiless);
        head.clear();
        cgi::response_head(head, status, &parts.headers, length);

        let mut first = Bytes::new();
        let mut ended = bodiless || self.is_head || body.is_end_stream();
        self.work.set(Work::Sending { body });
        if let Working::Sending { mut body } = self.work.as_mut().project()
            && !ended
        {
            match body.as_mut().poll_frame(context) {
                Poll::Ready(Some(frame)) => {
                    first = frame.map_err(io::Error::other)?.into_data().unwrap_or_default();
                    ended = body.is_end_stream();
                }
                Poll::Ready(None) => ended = true,
                Poll::Pending => {}
            }
        }
        if head.len() > MAX_CONTENT {
            self.send(head.split().freeze(), outbox);
        } else {
            let with_head = first.split_to(first.len().min(MAX_CONTENT - head.len()));
            fastcgi::stdout_header(outbox.tail(), self.id, head.len() + with_head.len());
            outbox.tail().extend_from_slice(head);
            outbox.push(with_head);
        }
        self.send(first, outbox);
        if ended {
            self.end(outbox);
        }
        Ok(())
    }

    fn send(&self, mut data: Bytes, outbox: &mut Outbox) {
        while !data.is_empty() {
            let content = data.split_to(data.len().min(MAX_CONTENT));
            fastcgi::stdout_header(outbox.tail(), self.id, content.len());
            outbox.push(content);
        }
    }

    /// Ends the response, whether it is complete or not.
    pub(super) fn end(&mut self, outbox: &mut Outbox) {
        fastcgi::stdout_end(outbox.tail(), self.id, self.app_status);
        let guard = match self.work.as_mut().project() {
            Working::Answering { answer } => answer.guard(),
            Working::Sending { body } => body.guard_pinned(),
            Working::BrokenOff { guard } => guard.as_mut(),
            Working::Ended => None,
        };
        if let Some(guard) = guard {
            guard.response_ends(outbox.len());
        }
        self.work.set(Work::Ended);
        (self.stdin, self.data) = (None, None);
    }

    /// Abandons the response, without a record that ends it.
    pub(super) fn break_off(&mut self) {
        let guard = match self.work.as_mut().project() {
            Working::Sending { body } => body.take_guard(),
            Working::Answering { .. } | Working::Ended | Working::BrokenOff { .. } => None,
        };
        self.work.set(Work::BrokenOff { guard });
        (self.stdin, self.data) = (None, None);
    }
}
