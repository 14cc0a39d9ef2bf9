//! Closes a connection whose peer may still be sending: reads and discards input for a while first, because closing a
//! socket with unread bytes would destroy output in transit.

use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::socket::Socket;
use crate::worker::lifecycle::drain::Drain;

/// Maximum time and maximum number of bytes for reading from a peer that is still sending.
pub(crate) const LINGER: (Duration, u64) = (Duration::from_secs(2), 64 << 20);

/// Shuts down the write side and reads until the peer closes, a limit is reached, or the drain is nearly over.
pub(crate) async fn linger(mut socket: Socket, drain: &Drain) {
    if socket.shutdown().await.is_ok() {
        let (time, bytes) = LINGER;
        let mut rest = socket.take(bytes);
        let mut sink = tokio::io::sink();
        tokio::select! {
            _ = tokio::time::timeout(time, tokio::io::copy(&mut rest, &mut sink)) => {}
            () = drain.wait_for_cutoff() => {}
        }
    }
}
