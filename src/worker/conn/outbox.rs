//! Queues the output of a connection.
//!
//! Small chunks are copied together. Large chunks are not copied: one vectored call writes them together with the
//! chunks before and after them.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf as _, Bytes, BytesMut};
use tokio::io::AsyncWrite;

/// Size from which a chunk is not copied.
const WORTH_SHARING: usize = 2048;
/// Maximum number of slices in one vectored call.
const SLICES: usize = 32;

#[derive(Debug, Default)]
pub(crate) struct Outbox {
    queue: VecDeque<Bytes>,
    queued: usize,
    /// Small chunks, which are written after the queue.
    tail: BytesMut,
}

impl Outbox {
    pub(crate) fn len(&self) -> usize {
        self.queued + self.tail.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns the buffer for small chunks.
    pub(crate) fn tail(&mut self) -> &mut BytesMut {
        &mut self.tail
    }

    pub(crate) fn push(&mut self, bytes: Bytes) {
        if bytes.len() < WORTH_SHARING {
            self.tail.extend_from_slice(&bytes);
            return;
        }
        for part in [self.tail.split().freeze(), bytes] {
            self.queued += part.len();
            if !part.is_empty() {
                self.queue.push_back(part);
            }
        }
    }

    /// Writes until everything is written or the socket is full.
    ///
    /// # Errors
    /// Returns the error from the socket, or `WriteZero` if the socket accepts no byte.
    pub(crate) fn poll_write<W: AsyncWrite>(
        &mut self,
        mut socket: Pin<&mut W>,
        context: &mut Context<'_>,
    ) -> Poll<io::Result<()>> {
        while !self.is_empty() {
            let written = if self.queue.is_empty() {
                ready!(socket.as_mut().poll_write(context, &self.tail))?
            } else {
                let mut slices = [IoSlice::new(&[]); SLICES];
                let parts = self.queue.iter().map(Bytes::as_ref).chain([self.tail.as_ref()]);
                let mut count = 0;
                for (slice, part) in slices.iter_mut().zip(parts) {
                    *slice = IoSlice::new(part);
                    count += 1;
                }
                ready!(socket.as_mut().poll_write_vectored(context, &slices[..count]))?
            };
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.advance(written);
        }
        Poll::Ready(Ok(()))
    }

    fn advance(&mut self, mut written: usize) {
        while let Some(first) = self.queue.front_mut() {
            let step = written.min(first.len());
            first.advance(step);
            self.queued -= step;
            written -= step;
            if !first.is_empty() {
                return;
            }
            self.queue.pop_front();
        }
        self.tail.advance(written);
        if self.tail.is_empty() {
            self.tail.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(flavor = "current_thread")]
    async fn pieces_of_all_sizes_leave_in_order_however_little_the_socket_takes() {
        let (client, server) = tokio::io::duplex(777);
        let mut expected = Vec::new();
        let mut output = Outbox::default();
        for length in (0..9000).step_by(450) {
            let piece = vec![u8::try_from(length % 251).unwrap(); length];
            output.tail().extend_from_slice(b"head");
            output.push(Bytes::from(piece.clone()));
            expected.extend([b"head".to_vec(), piece].concat());
        }
        assert_eq!(output.len(), expected.len());
        let mut server = Box::pin(server);
        let writing = std::future::poll_fn(move |context| output.poll_write(server.as_mut(), context));
        let reading = async {
            let (mut client, mut all) = (client, Vec::new());
            tokio::io::AsyncReadExt::read_to_end(&mut client, &mut all).await.unwrap();
            all
        };
        let (written, read) = tokio::join!(writing, reading);
        written.unwrap();
        assert!(read == expected);
    }
}
