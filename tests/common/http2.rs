//! A small HTTP/2 client (RFC 9113) that sends and receives individual frames.

use std::io::{self, Read as _, Write as _};
use std::net::TcpStream;

use super::{awaited, connect_tcp};

pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

pub const DATA: u8 = 0;
pub const HEADERS: u8 = 1;
pub const RST_STREAM: u8 = 3;
pub const SETTINGS: u8 = 4;
pub const PING: u8 = 6;
pub const GOAWAY: u8 = 7;
pub const WINDOW_UPDATE: u8 = 8;

pub const END_STREAM: u8 = 1;
pub const END_HEADERS: u8 = 4;
pub const ACK: u8 = 1;

#[derive(Debug)]
pub struct Frame {
    pub kind: u8,
    pub flags: u8,
    pub stream: u32,
    pub payload: Vec<u8>,
}

pub struct Client {
    pub stream: TcpStream,
}

impl Client {
    /// Connects, and sends the connection preface and the client's settings.
    pub fn connect(address: &str) -> io::Result<Self> {
        let mut stream = connect_tcp(address)?;
        stream.set_nodelay(true)?;
        stream.write_all(&[PREFACE, &frame(SETTINGS, 0, 0, b"")].concat())?;
        Ok(Self { stream })
    }

    pub fn send(&mut self, frame: &[u8]) -> io::Result<()> {
        self.stream.write_all(frame)
    }

    /// Reads the next frame of any kind.
    pub fn frame(&mut self) -> io::Result<Frame> {
        let mut head = [0; 9];
        self.stream.read_exact(&mut head).map_err(|error| awaited("an HTTP/2 frame", error))?;
        let [a, b, c, kind, flags, d, e, f, g] = head;
        let mut payload = vec![0; u32::from_be_bytes([0, a, b, c]) as usize];
        self.stream.read_exact(&mut payload)?;
        Ok(Frame { kind, flags, stream: u32::from_be_bytes([d & 0x7f, e, f, g]), payload })
    }

    /// Reads the next frame of this kind. Skips other frames, and acknowledges SETTINGS and PING.
    pub fn next(&mut self, kind: u8) -> io::Result<Frame> {
        loop {
            let frame = self.frame()?;
            if matches!(frame.kind, SETTINGS | PING) && frame.flags & ACK == 0 {
                let payload: &[u8] = if frame.kind == PING { &frame.payload } else { b"" };
                // If the server has closed the connection, frames that it sent earlier can still be read.
                let _ = self.send(&self::frame(frame.kind, ACK, 0, payload));
            }
            if frame.kind == kind {
                return Ok(frame);
            }
        }
    }
}

/// Returns the first bytes of a response's HEADERS: the status in the server's encoding (name 8 in the static table, Huffman).
pub fn status(status: u16) -> &'static [u8] {
    match status {
        200 => &[0x88],
        400 => &[0x8c],
        408 => &[0x48, 0x83, 0x68, 0x0f, 0x7f],
        413 => &[0x48, 0x83, 0x68, 0x2c, 0xff],
        501 => &[0x48, 0x82, 0x6c, 0x01],
        other => panic!("this function has no encoding of {other}"),
    }
}

pub fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let [_, a, b, c] = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&[a, b, c, kind, flags][..], &stream.to_be_bytes(), payload].concat()
}

/// Returns a HEADERS frame that requests a tunnel for this protocol (RFC 8441, section 4).
pub fn connect(stream: u32, protocol: &str, path: &str, fields: &[(&str, &str)]) -> Vec<u8> {
    let mut block = Vec::new();
    let pseudo = [(":method", "CONNECT"), (":protocol", protocol), (":scheme", "http"), (":path", path)];
    for (name, value) in pseudo.iter().chain(&[(":authority", "localhost")]).chain(fields) {
        block.push(0);
        for text in [name, value] {
            block.push(u8::try_from(text.len()).ok().filter(|&length| length < 127).unwrap());
            block.extend_from_slice(text.as_bytes());
        }
    }
    frame(HEADERS, END_HEADERS, stream, &block)
}

/// Returns a HEADERS frame with a whole head: fields from HPACK's static table (RFC 7541, appendix A), and literals.
pub fn head(stream: u32, flags: u8, method: &str, path: &str, fields: &[(&str, &str)]) -> Vec<u8> {
    head_at(stream, flags, method, path, "localhost", fields)
}

/// Like [`head`], with a different `:authority`.
pub fn head_at(stream: u32, flags: u8, method: &str, path: &str, authority: &str, fields: &[(&str, &str)]) -> Vec<u8> {
    let mut block = vec![if method == "POST" { 0x83 } else { 0x82 }, 0x86];
    let text = |text: &str, block: &mut Vec<u8>| {
        // Lengths of 127 and above take several bytes, which this client does not support.
        block.push(u8::try_from(text.len()).ok().filter(|&length| length < 127).unwrap());
        block.extend_from_slice(text.as_bytes());
    };
    block.push(0x04);
    text(path, &mut block);
    block.push(0x01);
    text(authority, &mut block);
    for (name, value) in fields {
        block.push(0);
        text(name, &mut block);
        text(value, &mut block);
    }
    frame(HEADERS, flags | END_HEADERS, stream, &block)
}
