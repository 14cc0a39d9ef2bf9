//! The exchange of a request and its response with an app process over SCGI.
//!
//! SCGI has no end of a response except the end of the connection, which a process that dies ends as well. A response is
//! complete when its announced length has arrived. Without a length, it is complete if the app process is not exiting
//! when the connection ends. The check covers the process that the master has started, and not its children.
//!
//! A connection carries one request. The app process is busy until it has closed the connection, so the unit is held for
//! up to [`CLOSE_TIMEOUT`] after a response that is complete because of its length.

use std::io;
use std::pin::pin;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::time::{Instant, timeout};

use super::app_stream::AppStream;
use super::attempt::{Attempt, Failure, HOLD_TIME, Response, until};
use super::cgi_output::CgiOutput;
use super::spool::{SpoolError, Spooled};
use crate::protocol::cgi::has_no_body;
use crate::protocol::scgi::client;

/// Bodies up to this size are sent together with the variables.
const SMALL_BODY: u64 = 16 << 10;
/// How long a complete response waits for the app process to close the connection.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

/// A request.
#[derive(Debug)]
pub(super) struct Message {
    /// The first bytes to send.
    first: Bytes,
    /// The body, if it is not part of `first`.
    body: Option<Spooled>,
    is_head: bool,
    /// Whether the request may be sent to another app process.
    may_repeat: bool,
}

impl Message {
    /// Creates a request. `variables` passes its variables, in order.
    ///
    /// # Errors
    /// Fails if the temporary file of the body cannot be read.
    pub(super) fn new(
        method: &http::Method,
        variables: impl FnOnce(&mut dyn FnMut(&[u8], &[u8])),
        body: Spooled,
    ) -> Result<Self, SpoolError> {
        let mut first = BytesMut::with_capacity(2048);
        client::request(&mut first, body.len(), variables);
        let (is_head, may_repeat) = (method == http::Method::HEAD, method.is_idempotent());
        if body.len() > SMALL_BODY {
            return Ok(Self { first: first.freeze(), body: Some(body), is_head, may_repeat });
        }
        let mut reader = body.reader();
        while let Some(chunk) = reader.next_chunk()? {
            first.extend_from_slice(&chunk);
        }
        Ok(Self { first: first.freeze(), body: None, is_head, may_repeat })
    }

    /// Sends the request and takes the response.
    ///
    /// # Errors
    /// Returns the reason why the exchange has not been completed.
    pub(super) async fn exchange(&self, attempt: &Attempt, response: &Response<'_>) -> Result<(), Failure> {
        let stream = attempt.connect().await?;
        let connection = stream.clone();
        let (mut from, mut to) = (stream.clone(), stream);
        let mut sending = pin!(self.send(&mut to));
        let (mut is_sent, mut hold) = (false, None);
        let mut incoming = Incoming::new(response.max_head(), self.is_head);
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
                        if read.is_err() || incoming.is_short() || attempt.is_exiting() {
                            return Err(attempt.why_ended(response).await);
                        }
                        incoming.output.pass_on(attempt, response, true);
                        return Ok(());
                    }
                    let is_complete = incoming.take(input.split().freeze()).map_err(Failure::Broken)?;
                    if !is_complete && self.may_repeat && incoming.output.can_be_held() {
                        hold = hold.or(Some(Instant::now() + HOLD_TIME));
                        continue;
                    }
                    hold = None;
                    incoming.pass_on(attempt, response, is_complete);
                    if is_complete {
                        let _ = timeout(CLOSE_TIMEOUT, read_to_end(&mut from)).await;
                        return Ok(());
                    }
                    response.wait_for_room().await;
                }
                () = until(hold), if hold.is_some() => {
                    (hold, incoming.output.was_held) = (None, true);
                    incoming.pass_on(attempt, response, false);
                }
            }
        }
    }

    async fn send(&self, to: &mut AppStream) -> io::Result<()> {
        to.write_all(&self.first).await?;
        let Some(body) = &self.body else { return Ok(()) };
        let mut reader = body.reader();
        while let Some(chunk) = reader.next_chunk().map_err(io::Error::other)? {
            to.write_all(&chunk).await?;
        }
        Ok(())
    }
}

/// Reads and discards bytes until the connection ends.
async fn read_to_end(from: &mut AppStream) {
    let mut discarded = vec![0; 4096]; // on the heap, not in the future of every request
    while matches!(from.read(&mut discarded).await, Ok(count) if count > 0) {}
}

/// A response while it arrives.
#[derive(Debug)]
struct Incoming {
    output: CgiOutput,
    is_head: bool,
    /// The number of bytes of the body that are still to come, once the head is complete and if it announces a length.
    to_come: Option<u64>,
    has_head: bool,
}

impl Incoming {
    fn new(max_head: usize, is_head: bool) -> Self {
        Self { output: CgiOutput::new(max_head), is_head, to_come: None, has_head: false }
    }

    /// Takes what has arrived. Returns whether the response is complete because of its length.
    fn take(&mut self, mut bytes: Bytes) -> Result<bool, String> {
        if let Some(to_come) = &mut self.to_come {
            bytes.truncate(usize::try_from(*to_come).unwrap_or(usize::MAX));
            *to_come -= bytes.len() as u64;
            self.output.take(bytes)?;
        } else {
            self.output.take(bytes)?;
            if !self.has_head
                && let Some(head) = self.output.head()
            {
                self.has_head = true;
                let has_body = !self.is_head && !has_no_body(head.status);
                self.to_come = head.content_length.filter(|_| has_body);
                if let Some(to_come) = &mut self.to_come {
                    let arrived = self.output.truncate(*to_come);
                    *to_come -= arrived;
                }
            }
        }
        Ok(self.to_come == Some(0))
    }

    /// Whether the response is not complete if the connection ends now.
    fn is_short(&self) -> bool {
        !self.has_head || self.to_come.is_some_and(|to_come| to_come > 0)
    }

    fn pass_on(&mut self, attempt: &Attempt, response: &Response<'_>, is_complete: bool) {
        if self.has_head {
            self.output.pass_on(attempt, response, is_complete);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take(parts: &[&'static str], is_head: bool) -> (bool, bool, usize) {
        let mut incoming = Incoming::new(1024, is_head);
        let mut is_complete = false;
        for part in parts {
            is_complete = incoming.take(Bytes::from_static(part.as_bytes())).unwrap();
        }
        (is_complete, incoming.is_short(), incoming.output.len_arrived())
    }

    #[test]
    fn a_response_ends_with_its_length_or_with_the_connection() {
        for (parts, is_head, expected) in [
            (&["A: 1\r\n"][..], false, (false, true, 0)),
            (&["A: 1\r\n\r\n", "ab"], false, (false, false, 2)),
            (&["Content-Length: 3\r\n\r\nab"], false, (false, true, 2)),
            (&["Content-Length: 3\r\n\r\nab", "c"], false, (true, false, 3)),
            (&["Content-Length: 3\r\n\r\nabcd"], false, (true, false, 3)),
            (&["Content-Length: 3\r\n\r\nab", "cd"], false, (true, false, 3)),
            (&["Content-Length: 0\r\n\r\n"], false, (true, false, 0)),
            (&["Content-Length: 3\r\n\r\n"], true, (false, false, 0)),
            (&["Status: 304 Not Modified\r\nContent-Length: 3\r\n\r\n"], false, (false, false, 0)),
        ] {
            assert_eq!(take(parts, is_head), expected, "{parts:?}");
        }
    }
}
