//! The last bytes of a connection: what its peer still sends after our last word is listened to for a while. Closing a
//! socket with bytes unread in it would destroy what we wrote on its way.

use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::socket::Socket;
use crate::worker::lifecycle::drain::Drain;

/// How long, and for how many bytes, a peer that still sends is listened to.
pub(crate) const LINGER: (Duration, u64) = (Duration::from_secs(2), 64 << 20);

/// Says that nothing more will come, and listens until the peer has heard, or the drain is nearly over.
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
