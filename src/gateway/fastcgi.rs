//! The exchange of a request and its response with an app process over FastCGI.
//!
//! The response is complete only with END_REQUEST.
//!
//! The connection is kept for the next request, together with the unit (see `queue.rs`). Only requests with idempotent
//! methods use a kept connection, because the app process may close it at the moment at which the request is sent, and it
//! would then be unknown whether the request was begun.

use std::io;
use std::pin::pin;

use bytes::{Buf as _, Bytes, BytesMut};
use tokio::io::AsyncWriteExt as _;
use tokio::time::Instant;

use super::app_stream::AppStream;
use super::attempt::{Attempt, Failure, HOLD_TIME, Response, until};
use super::cgi_output::CgiOutput;
use super::spool::{SpoolError, Spooled};
use crate::protocol::fastcgi::MAX_CONTENT;
use crate::protocol::fastcgi::client::{self, ParamsWriter, ResponseDecoder, ResponseEvent};

/// The only request on a connection.
const REQUEST_ID: u16 = 1;
/// Bodies up to this size are sent together with the head of the request.
const SMALL_BODY: u64 = 16 << 10;

/// A request.
#[derive(Debug)]
pub(super) struct Message {
    /// The first bytes to send.
    first: Bytes,
    /// The body, if it is not part of `first`.
    body: Option<Spooled>,
    /// Whether the request may be sent on a connection that was kept.
    may_reuse: bool,
}

impl Message {
    /// Creates a request. `variables` passes its parameters, in order.
    ///
    /// # Errors
    /// Fails if the temporary file of the body cannot be read.
    pub(super) fn new(
        may_reuse: bool,
        variables: impl FnOnce(&mut dyn FnMut(&[u8], &[u8])),
        body: Spooled,
    ) -> Result<Self, SpoolError> {
        let mut first = BytesMut::with_capacity(2048);
        client::begin_request(&mut first, REQUEST_ID, true);
        let mut params = ParamsWriter::new(&mut first, REQUEST_ID);
        variables(&mut |name, value| params.pair(name, value));
        params.end();
        if body.len() > SMALL_BODY {
            return Ok(Self { first: first.freeze(), body: Some(body), may_reuse });
        }
        let mut reader = body.reader();
        while let Some(chunk) = reader.next_chunk()? {
            put_stdin(&mut first, &chunk);
        }
        client::stdin_end(&mut first, REQUEST_ID);
        Ok(Self { first: first.freeze(), body: None, may_reuse })
    }

    /// Sends the request and takes the response. Returns the connection if it can be kept.
    ///
    /// # Errors
    /// Returns the reason why the exchange has not been completed.
    pub(super) async fn exchange(
        &self,
        attempt: &Attempt,
        response: &Response<'_>,
    ) -> Result<Option<AppStream>, Failure> {
        if let Some(kept) = self.kept(attempt) {
            attempt.uses(&kept);
            match self.exchange_on(kept.clone(), attempt, response).await {
                // The app process had closed the connection without a word, so it has not begun the request.
                Err(Failure::Broken(_)) if !kept.has_received() => attempt.shared.note_kept(false),
                Err(Failure::Died) if !kept.has_received() => return Err(Failure::Ended),
                outcome => {
                    attempt.shared.note_kept(true);
                    return outcome;
                }
            }
        }
        attempt.await_keeper().await?;
        self.exchange_on(attempt.connect().await?, attempt, response).await
    }

    /// Returns the connection that was kept to the app process, if it can be used. Otherwise closes it.
    fn kept(&self, attempt: &Attempt) -> Option<AppStream> {
        let stream = attempt.unit.take_kept().filter(|_| self.may_reuse)?;
        stream.reset();
        if !stream.is_known_quiet() {
            attempt.shared.note_kept(false);
            return None;
        }
        Some(stream)
    }

    async fn exchange_on(
        &self,
        stream: AppStream,
        attempt: &Attempt,
        response: &Response<'_>,
    ) -> Result<Option<AppStream>, Failure> {
        let connection = stream.clone();
        let (mut from, mut to) = (stream.clone(), stream);
        let mut sending = pin!(self.send(&mut to));
        let (mut is_sent, mut hold) = (false, None);
        let mut incoming = Incoming::new(response.max_head());
        let (mut input, mut is_long) = (BytesMut::new(), false);
        loop {
            tokio::select! {
                biased;
                sent = sending.as_mut(), if !is_sent => {
                    is_sent = true;
                    // If the app process has closed the connection, its response or its death is read next.
                    if let Err(error) = sent && error.kind() == io::ErrorKind::Other {
                        return Err(Failure::NotSent(error));
                    }
                }
                read = from.read_response(&mut input, is_long) => {
                    is_long = true;
                    if connection.is_turned_away() {
                        return Err(Failure::NotBegun);
                    }
                    if !matches!(read, Ok(count) if count > 0) {
                        return Err(attempt.why_ended(response).await);
                    }
                    let is_complete = incoming.take(&mut input, response).map_err(Failure::Broken)?;
                    if !is_complete && self.may_reuse && incoming.output.can_be_held() {
                        hold = hold.or(Some(Instant::now() + HOLD_TIME));
                        continue;
                    }
                    hold = None;
                    incoming.output.pass_on(attempt, response, is_complete);
                    if is_complete {
                        let is_clean = is_sent && incoming.decoder.is_clean(&input);
                        return Ok(Some(connection).filter(|_| is_clean && attempt.shared.keeps_connections()));
                    }
                    response.wait_for_room().await;
                }
                () = until(hold), if hold.is_some() => {
                    (hold, incoming.output.was_held) = (None, true);
                    incoming.output.pass_on(attempt, response, false);
                }
            }
        }
    }

    async fn send(&self, to: &mut AppStream) -> io::Result<()> {
        to.write_all(&self.first).await?;
        let Some(body) = &self.body else { return Ok(()) };
        let mut reader = body.reader();
        while let Some(mut chunk) = reader.next_chunk().map_err(io::Error::other)? {
            while !chunk.is_empty() {
                let content = chunk.split_to(chunk.len().min(MAX_CONTENT));
                let header = Bytes::copy_from_slice(&stdin_header(&content));
                to.write_all_buf(&mut header.chain(content)).await?;
            }
        }
        let mut end = BytesMut::new();
        client::stdin_end(&mut end, REQUEST_ID);
        to.write_all(&end).await
    }
}

fn stdin_header(content: &[u8]) -> [u8; 8] {
    client::stdin_header(u16::try_from(content.len()).unwrap_or(0), REQUEST_ID)
}

fn put_stdin(out: &mut BytesMut, bytes: &[u8]) {
    for content in bytes.chunks(MAX_CONTENT) {
        out.extend_from_slice(&stdin_header(content));
        out.extend_from_slice(content);
    }
}

/// Decodes a response.
#[derive(Debug)]
struct Incoming {
    decoder: ResponseDecoder,
    output: CgiOutput,
}

impl Incoming {
    fn new(max_head: usize) -> Self {
        Self { decoder: ResponseDecoder::new(REQUEST_ID), output: CgiOutput::new(max_head) }
    }

    /// Takes what has arrived. Returns whether the response is complete.
    fn take(&mut self, input: &mut BytesMut, response: &Response<'_>) -> Result<bool, String> {
        while let Some(event) = self.decoder.decode(input).map_err(|error| error.to_string())? {
            match event {
                ResponseEvent::Stdout(bytes) => self.output.take(bytes)?,
                ResponseEvent::Stderr(bytes) => log_lines(&bytes, response),
                ResponseEvent::End { app_status, protocol_status } => {
                    if protocol_status != 0 {
                        return Err(format!("the app process refused the request (protocol status {protocol_status})"));
                    }
                    if app_status != 0 {
                        log::debug!(status = app_status, request = response.what(); "app process reported a status");
                    }
                    return self.output.expect_head().map(|()| true);
                }
            }
        }
        Ok(false)
    }
}

fn log_lines(bytes: &[u8], response: &Response<'_>) {
    let (slot, pid) = response.process();
    let text = String::from_utf8_lossy(bytes);
    for line in text.lines().filter(|line| !line.trim().is_empty()) {
        log::warn!(target: "forkyard::app", slot, pid, request = response.what(); "{line}");
    }
}
