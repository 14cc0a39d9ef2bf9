//! Closes a connection whose peer may still be sending: reads and discards input for a while first, because closing a
//! socket with unread bytes would destroy output in transit.
//!
//! Many clients and web servers send the whole body before they read the response, at whatever speed. They are waited
//! for as long as they make progress, within limits.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _};
use tokio::time::{Instant, Sleep, sleep, timeout};

use super::socket::Socket;
use crate::worker::lifecycle::drain::Drain;

/// Maximum time without input from the peer.
pub(crate) const QUIET_TIMEOUT: Duration = Duration::from_secs(2);
/// Maximum time in all.
const TIMEOUT: Duration = Duration::from_secs(30);
/// Maximum number of bytes.
const MAX_BYTES: u64 = 64 << 20;

/// Shuts down the write side and reads until the peer closes, a limit is reached, or the drain is nearly over.
///
/// The future is boxed, so that it does not make the task of every connection larger.
pub(crate) fn linger(mut socket: Socket, drain: &Drain) -> Pin<Box<impl Future<Output = ()>>> {
    Box::pin(async move {
        if socket.shutdown().await.is_ok() {
            // What is discarded takes up no memory, and is not the head of a request.
            socket.activity().held().stop();
            socket.activity().set_knows_heads();
            tokio::select! {
                () = discard(socket, TIMEOUT) => {}
                () = drain.wait_for_cutoff() => {}
            }
        }
    })
}

/// Reads until the peer closes or a limit is reached, for at most `time`.
pub(crate) async fn discard(input: impl AsyncRead + Unpin, time: Duration) {
    let mut input = input.take(MAX_BYTES);
    let mut bytes = vec![0; 8 << 10];
    let until_quiet = async { while let Ok(Ok(1..)) = timeout(QUIET_TIMEOUT, input.read(&mut bytes)).await {} };
    let _ = timeout(time.min(TIMEOUT), until_quiet).await;
}

/// The limits on input that is read and discarded, for a reader that is polled.
pub(crate) struct DiscardLimits {
    bytes: u64,
    latest: Instant,
    /// When the peer has been quiet for too long, or has been sending for too long.
    end: Pin<Box<Sleep>>,
}

impl DiscardLimits {
    pub(crate) fn begin() -> Self {
        Self { bytes: MAX_BYTES, latest: Instant::now() + TIMEOUT, end: Box::pin(sleep(QUIET_TIMEOUT)) }
    }

    /// Becomes ready when a time limit has been reached.
    pub(crate) fn poll_end(&mut self, context: &mut Context<'_>) -> Poll<()> {
        self.end.as_mut().poll(context)
    }

    /// Records that the peer has sent `bytes`. Returns false if the peer has sent too much, or for too long.
    pub(crate) fn received(&mut self, bytes: usize) -> bool {
        let now = Instant::now();
        let Some(left) = self.bytes.checked_sub(bytes as u64).filter(|_| now < self.latest) else { return false };
        self.bytes = left;
        self.end.as_mut().reset(self.latest.min(now + QUIET_TIMEOUT));
        true
    }
}
