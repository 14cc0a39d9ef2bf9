//! An HTTP/2 client that sends and reads concurrently.

use std::cell::Cell;
use std::io;
use std::time::Duration;

use bytes::Bytes;
use h2::client::{ResponseFuture, SendRequest};
use h2::{RecvStream, SendStream};
use http::{HeaderName, HeaderValue, Request};
use tokio::net::TcpStream;
use tokio::runtime::Runtime;
use tokio::time::{Instant, sleep, sleep_until};

use super::ask::{Ask, Gate, PIECE, Pace, Reply, Sent, Taken};
use crate::common::PATIENCE;

/// Pause between two writes of a slow client.
const PAUSE: Duration = Duration::from_millis(1);

pub(crate) struct Connection {
    client: SendRequest<Bytes>,
    /// Runtime that drives the connection during a call.
    runtime: Runtime,
}

impl Connection {
    pub(crate) fn open(address: &str) -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let client = runtime.block_on(async {
            let stream = TcpStream::connect(address).await?;
            let mut builder = h2::client::Builder::new();
            builder.initial_window_size(1 << 20).initial_connection_window_size(1 << 20);
            let (client, connection) = builder.handshake(stream).await.map_err(io::Error::other)?;
            tokio::spawn(connection);
            Ok::<_, io::Error>(client)
        })?;
        Ok(Self { client, runtime })
    }

    /// Sends the request. Returns the response, and the connection, which can be reused.
    pub(crate) fn ask(self, ask: &Ask, gate: &mut Gate) -> io::Result<(Reply, Option<Self>)> {
        let Self { client, runtime } = self;
        let (reply, client) = runtime.block_on(exchange(client, ask, gate))?;
        Ok((reply, Some(Self { client, runtime })))
    }
}

async fn exchange(client: SendRequest<Bytes>, ask: &Ask, gate: &mut Gate) -> io::Result<(Reply, SendRequest<Bytes>)> {
    let mut client = client.ready().await.map_err(io::Error::other)?;
    let ends = matches!(ask.body, Sent::Nothing);
    let (response, stream) = client.send_request(head(ask)?, ends).map_err(io::Error::other)?;
    let moved = Cell::new(Instant::now());
    let (mut sending, mut is_sent) = (std::pin::pin!(send(stream, ask, &moved)), ends);
    let mut receiving = std::pin::pin!(receive(response, ask, gate, &moved));
    let reply = loop {
        tokio::select! {
            reply = &mut receiving => break reply?,
            () = &mut sending, if !is_sent => is_sent = true,
            () = sleep_until(moved.get() + PATIENCE) => {
                if moved.get().elapsed() >= PATIENCE {
                    return Err(io::Error::new(io::ErrorKind::TimedOut, "no further data arrived"));
                }
            }
        }
    };
    Ok((reply, client))
}

fn head(ask: &Ask) -> io::Result<Request<()>> {
    let mut request = Request::builder().method(ask.method).uri(format!("http://localhost{}", ask.target));
    for (name, value) in &ask.headers {
        let name = HeaderName::from_bytes(name.as_bytes()).map_err(io::Error::other)?;
        request = request.header(name, HeaderValue::from_bytes(value).map_err(io::Error::other)?);
    }
    if let Some(length) = ask.body.length() {
        request = request.header("content-length", length);
    }
    request.body(()).map_err(io::Error::other)
}

/// Sends the body. Errors are ignored, because a server that needs no more data resets the stream, and the test checks the response.
async fn send(mut stream: SendStream<Bytes>, ask: &Ask, moved: &Cell<Instant>) {
    let bytes = Bytes::copy_from_slice(ask.body.bytes());
    let piece = if ask.pace == Pace::SlowSender { bytes.len().div_ceil(50).max(1) } else { PIECE };
    let mut from = 0;
    while from < bytes.len() {
        let wanted = piece.min(bytes.len() - from);
        stream.reserve_capacity(wanted);
        let Some(Ok(room)) = std::future::poll_fn(|context| stream.poll_capacity(context)).await else { return };
        let to = from + room.min(wanted);
        if stream.send_data(bytes.slice(from..to), false).is_err() {
            return;
        }
        from = to;
        moved.set(Instant::now());
        if ask.pace == Pace::SlowSender {
            sleep(PAUSE).await;
        }
    }
    let _ = stream.send_data(Bytes::new(), true);
}

async fn receive(response: ResponseFuture, ask: &Ask, gate: &mut Gate, moved: &Cell<Instant>) -> io::Result<Reply> {
    let (head, mut body): (_, RecvStream) = response.await.map_err(io::Error::other)?.into_parts();
    let headers = head.headers.iter().map(|(name, value)| (name.to_string(), value.as_bytes().to_vec()));
    let mut reply = Reply { status: head.status.as_u16(), headers: headers.collect(), ..Reply::default() };
    let mut taken = Taken::nothing();
    while let Some(piece) = body.data().await {
        let piece = piece.map_err(io::Error::other)?;
        gate.open();
        taken.add(&piece)?;
        moved.set(Instant::now());
        body.flow_control().release_capacity(piece.len()).map_err(io::Error::other)?;
        if ask.pace == Pace::SlowReader {
            sleep(PAUSE).await;
        }
    }
    reply.body = taken;
    Ok(reply)
}
