//! Requests and responses, in the same form for all protocols.

use std::io::{self, Read, Write};
use std::net::TcpListener;
use std::sync::Arc;
use std::time::Duration;

use crate::common::accepted;

/// Number of bytes that are written or read at a time.
pub(crate) const PIECE: usize = 64 << 10;

#[derive(Clone, Debug)]
pub(crate) struct Ask {
    pub(crate) method: &'static str,
    /// The target, in which `{gate}` is replaced with the port of a [`Gate`].
    pub(crate) target: String,
    pub(crate) headers: Vec<(&'static str, &'static [u8])>,
    pub(crate) body: Sent,
    pub(crate) pace: Pace,
    /// Whether the client connected over TLS. Only protocols with CGI variables can report this to the server.
    pub(crate) is_tls: bool,
}

#[derive(Clone, Debug)]
pub(crate) enum Sent {
    Nothing,
    /// A body with a declared length.
    Known(Arc<[u8]>),
    /// A body that is sent in chunks.
    Chunked(Arc<[u8]>),
}

impl Sent {
    pub(crate) fn bytes(&self) -> &[u8] {
        match self {
            Self::Nothing => &[],
            Self::Known(bytes) | Self::Chunked(bytes) => bytes,
        }
    }

    pub(crate) fn length(&self) -> Option<usize> {
        match self {
            Self::Known(bytes) => Some(bytes.len()),
            Self::Nothing | Self::Chunked(_) => None,
        }
    }
}

/// Speed of the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pace {
    Even,
    /// Sends the request in 50 parts.
    SlowSender,
    SlowReader,
    /// Over HTTP, sends the body only after the server's 100 Continue.
    AwaitsContinue,
}

#[derive(Debug, Default)]
pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(String, Vec<u8>)>,
    pub(crate) body: Taken,
    /// Statuses of the interim responses (1xx) that preceded the response.
    pub(crate) interim: Vec<u16>,
}

impl Reply {
    pub(crate) fn all(&self, name: &str) -> Vec<&[u8]> {
        let named = self.headers.iter().filter(|(other, _)| other.eq_ignore_ascii_case(name));
        named.map(|(_, value)| value.as_slice()).collect()
    }

    pub(crate) fn shown(&self, name: &str) -> String {
        let values: Vec<_> = self.all(name).into_iter().map(String::from_utf8_lossy).collect();
        format!("{name}: {values:.200?}")
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.all(name).first().and_then(|value| str::from_utf8(value).ok())
    }
}

const XS: [u8; 4096] = [b'x'; 4096];

/// The body of a response. If all bytes are `x`, only the length is stored.
#[derive(Debug, Default)]
pub(crate) struct Taken {
    pub(crate) length: u64,
    pub(crate) bytes: Vec<u8>,
    pub(crate) is_all_x: bool,
}

impl Taken {
    pub(crate) fn nothing() -> Self {
        Self { is_all_x: true, ..Self::default() }
    }

    pub(crate) fn add(&mut self, piece: &[u8]) -> io::Result<()> {
        let before = usize::try_from(self.length).map_err(io::Error::other)?;
        self.length += piece.len() as u64;
        // Whole slices are compared, because comparing a 4 GiB response byte by byte takes minutes in an unoptimized test.
        let is_all_x = || piece.chunks(XS.len()).all(|piece| Some(piece) == XS.get(..piece.len()));
        if self.is_all_x && !is_all_x() {
            self.bytes.resize(before, b'x');
            self.is_all_x = false;
        }
        if !self.is_all_x {
            self.bytes.extend_from_slice(piece);
        }
        Ok(())
    }
}

/// Reads a body at the client's pace. Opens the gate once the first bytes have arrived.
pub(crate) fn take(from: &mut impl Read, pace: Pace, gate: &mut Gate) -> io::Result<Taken> {
    let mut taken = Taken::nothing();
    let mut buffer = vec![0; PIECE];
    loop {
        let count = from.read(&mut buffer)?;
        if count == 0 {
            return Ok(taken);
        }
        gate.open();
        taken.add(&buffer[..count])?;
        if pace == Pace::SlowReader {
            std::thread::park_timeout(Duration::from_millis(1));
        }
    }
}

/// Sends a request at the client's pace. Write errors are ignored, because a server may respond and close before it has read everything.
pub(crate) fn give(to: &mut impl Write, bytes: &[u8], pace: Pace) {
    let piece = if pace == Pace::SlowSender { bytes.len().div_ceil(50).max(1) } else { PIECE };
    for piece in bytes.chunks(piece) {
        if to.write_all(piece).and_then(|()| to.flush()).is_err() {
            return;
        }
        if pace == Pace::SlowSender {
            std::thread::park_timeout(Duration::from_millis(1));
        }
    }
}

/// Blocks the application in the middle of its response: the application connects to the gate, and continues when the connection is closed.
#[derive(Debug)]
pub(crate) struct Gate(Option<TcpListener>);

impl Gate {
    /// Returns a gate for a request whose target contains `{gate}`.
    pub(crate) fn of(ask: &mut Ask) -> Self {
        if !ask.target.contains("{gate}") {
            return Self(None);
        }
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port is free");
        let port = listener.local_addr().expect("the socket is bound").port();
        ask.target = ask.target.replace("{gate}", &port.to_string());
        Self(Some(listener))
    }

    pub(crate) fn none() -> Self {
        Self(None)
    }

    /// Waits for the application's connection, and lets the application continue.
    pub(crate) fn open(&mut self) {
        if let Some(listener) = self.0.take() {
            drop(accepted(&listener, "the application connects to the gate"));
        }
    }
}
