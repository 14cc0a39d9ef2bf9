//! The output of a program in CGI form, while it arrives: the head, and the part of the body that has not been passed on.
//!
//! A short response is held until it is complete (see [`HOLD_SIZE`]).

use bytes::Bytes;

use super::attempt::{Attempt, HOLD_SIZE, Response};
use super::is_streamed;
use crate::protocol::cgi::parse_response::{ResponseHead, ResponseHeadParser};

#[derive(Debug)]
pub(super) struct CgiOutput {
    parser: ResponseHeadParser,
    /// The head, until it is passed on.
    head: Option<ResponseHead>,
    has_begun: bool,
    /// The part of the body that has not been passed on.
    arrived: Vec<Bytes>,
    /// Whether the head was held for as long as it may be.
    pub(super) was_held: bool,
}

impl CgiOutput {
    pub(super) fn new(max_head: usize) -> Self {
        let parser = ResponseHeadParser::new(max_head);
        Self { parser, head: None, has_begun: false, arrived: Vec::new(), was_held: false }
    }

    /// Takes output. Returns a message if it does not begin with a valid head.
    pub(super) fn take(&mut self, bytes: Bytes) -> Result<(), String> {
        if self.has_begun {
            self.arrived.push(bytes);
        } else if let Some((head, rest)) = self.parser.feed(bytes).map_err(|error| error.to_string())? {
            self.has_begun = true;
            self.head = Some(head);
            self.arrived.push(rest);
        }
        Ok(())
    }

    /// Returns a message if the head is not complete.
    pub(super) fn expect_head(&self) -> Result<(), String> {
        if self.has_begun { Ok(()) } else { Err(self.parser.finish().to_string()) }
    }

    /// Returns the head until it is passed on.
    pub(super) fn head(&self) -> Option<&ResponseHead> {
        self.head.as_ref()
    }

    /// Returns the number of bytes of the body that have not been passed on.
    pub(super) fn len_arrived(&self) -> usize {
        self.arrived.iter().map(Bytes::len).sum()
    }

    /// Discards what exceeds this number of bytes of the body. Returns the number of bytes that are left.
    pub(super) fn truncate(&mut self, most: u64) -> u64 {
        let mut left = usize::try_from(most).unwrap_or(usize::MAX);
        for chunk in &mut self.arrived {
            chunk.truncate(left);
            left -= chunk.len();
        }
        self.len_arrived() as u64
    }

    /// Whether the client does not need the response yet.
    pub(super) fn can_be_held(&self) -> bool {
        let is_short = self.len_arrived() < HOLD_SIZE;
        !self.was_held && is_short && self.head.as_ref().is_some_and(|head| !is_streamed(&head.headers))
    }

    /// Passes on what has arrived, if the head is complete.
    pub(super) fn pass_on(&mut self, attempt: &Attempt, response: &Response<'_>, is_complete: bool) {
        let arrived = joined(std::mem::take(&mut self.arrived));
        match self.head.take() {
            Some(head) => {
                attempt.answered();
                response.begin(head, arrived, is_complete);
            }
            None => response.push(arrived),
        }
        if is_complete {
            response.finish(None);
        }
    }
}

/// Joins chunks, of which there is usually one.
fn joined(mut chunks: Vec<Bytes>) -> Bytes {
    if chunks.len() <= 1 { chunks.pop().unwrap_or_default() } else { chunks.concat().into() }
}
