//! An HTTP/1.1 client that accepts any byte in a header, and that sends and reads concurrently.

use std::io::{self, BufReader, Read};
use std::net::{Shutdown, TcpStream};

use super::ask::{Ask, Gate, Pace, Reply, Sent, give, take};

pub(crate) struct Connection {
    stream: BufReader<TcpStream>,
}

impl Connection {
    pub(crate) fn open(address: &str) -> io::Result<Self> {
        let stream = crate::common::connect_tcp(address)?;
        stream.set_nodelay(true)?;
        Ok(Self { stream: BufReader::with_capacity(super::ask::PIECE, stream) })
    }

    /// Sends the request. Returns the response, and the connection if it can be reused.
    pub(crate) fn ask(mut self, ask: &Ask, gate: &mut Gate) -> io::Result<(Reply, Option<Self>)> {
        let mut sent = head(ask);
        let body = body(&ask.body);
        let mut to = self.stream.get_ref().try_clone()?;
        let mut interim = Vec::new();
        if ask.pace == Pace::AwaitsContinue {
            give(&mut to, &sent, ask.pace);
            let reply = self.head()?;
            if reply.status != 100 {
                return Ok((reply, None));
            }
            interim.push(reply.status);
            sent = body;
        } else {
            sent.extend(body);
        }
        let (mut reply, sent_all) = std::thread::scope(|scope| {
            let sender = scope.spawn(|| give(&mut to, &sent, ask.pace));
            let reply = self.reply(ask, gate, &mut interim);
            let sent_all = sender.is_finished();
            if !sent_all || reply.is_err() {
                // Stops the sending thread, because the response has arrived.
                let _ = self.stream.get_ref().shutdown(Shutdown::Both);
            }
            reply.map(|reply| (reply, sent_all))
        })?;
        reply.interim = interim;
        let closes = reply.header("connection").is_some_and(|value| value.eq_ignore_ascii_case("close"));
        let framed = !reply.all("content-length").is_empty() || !reply.all("transfer-encoding").is_empty();
        let reusable = sent_all && !closes && (framed || matches!(reply.status, 204 | 304));
        Ok((reply, reusable.then_some(self)))
    }

    fn reply(&mut self, ask: &Ask, gate: &mut Gate, interim: &mut Vec<u16>) -> io::Result<Reply> {
        let mut reply = self.head()?;
        while reply.status < 200 {
            interim.push(reply.status);
            reply = self.head()?;
        }
        if ask.method == "HEAD" || matches!(reply.status, 204 | 304) {
            return Ok(reply);
        }
        let stream = &mut self.stream;
        reply.body = if let Some(length) = reply.header("content-length") {
            let length: u64 = length.parse().map_err(io::Error::other)?;
            let taken = take(&mut stream.take(length), ask.pace, gate)?;
            if taken.length < length {
                return Err(io::Error::other(format!("{} of {length} bytes arrived", taken.length)));
            }
            taken
        } else if reply.header("transfer-encoding") == Some("chunked") {
            take(&mut Chunks { stream, left: 0, ended: false }, ask.pace, gate)?
        } else {
            take(stream, ask.pace, gate)?
        };
        Ok(reply)
    }

    fn head(&mut self) -> io::Result<Reply> {
        let first = line(&mut self.stream)?;
        let first = String::from_utf8_lossy(&first);
        let status = first.split(' ').nth(1).and_then(|word| word.parse().ok());
        let status = status.ok_or_else(|| io::Error::other(format!("not a status line: {first:?}")))?;
        Ok(Reply { status, headers: headers(&mut self.stream)?, ..Reply::default() })
    }
}

/// Reads header lines up to the empty line.
pub(crate) fn headers(from: &mut impl io::BufRead) -> io::Result<Vec<(String, Vec<u8>)>> {
    let mut headers = Vec::new();
    loop {
        let line = line(from)?;
        if line.is_empty() {
            return Ok(headers);
        }
        let colon = line
            .iter()
            .position(|&byte| byte == b':')
            .ok_or_else(|| io::Error::other(format!("not a header: {}", String::from_utf8_lossy(&line))))?;
        let name = String::from_utf8(line[..colon].to_vec()).map_err(io::Error::other)?;
        headers.push((name, line[colon + 1..].trim_ascii().to_vec()));
    }
}

fn line(from: &mut impl io::BufRead) -> io::Result<Vec<u8>> {
    let mut line = Vec::new();
    from.read_until(b'\n', &mut line)?;
    if line.pop() != Some(b'\n') {
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, String::from_utf8_lossy(&line)));
    }
    if line.last() == Some(&b'\r') {
        line.pop();
    }
    Ok(line)
}

fn head(ask: &Ask) -> Vec<u8> {
    let mut head = format!("{} {} HTTP/1.1\r\nHost: localhost\r\n", ask.method, ask.target).into_bytes();
    for (name, value) in &ask.headers {
        head.extend([name.as_bytes(), b": ", value, b"\r\n"].concat());
    }
    if ask.pace == Pace::AwaitsContinue {
        head.extend(b"Expect: 100-continue\r\n");
    }
    match &ask.body {
        Sent::Nothing => {}
        Sent::Known(bytes) => head.extend(format!("Content-Length: {}\r\n", bytes.len()).into_bytes()),
        Sent::Chunked(_) => head.extend(b"Transfer-Encoding: chunked\r\n"),
    }
    head.extend(b"\r\n");
    head
}

fn body(body: &Sent) -> Vec<u8> {
    match body {
        Sent::Nothing => Vec::new(),
        Sent::Known(bytes) => bytes.to_vec(),
        Sent::Chunked(bytes) => {
            let mut chunks = Vec::with_capacity(bytes.len() + bytes.len() / 512 + 16);
            for chunk in bytes.chunks(10_000) {
                chunks.extend(format!("{:x}\r\n", chunk.len()).into_bytes());
                chunks.extend_from_slice(chunk);
                chunks.extend(b"\r\n");
            }
            chunks.extend(b"0\r\n\r\n");
            chunks
        }
    }
}

/// Reads a chunked body (RFC 9112, section 7.1).
struct Chunks<'a> {
    stream: &'a mut BufReader<TcpStream>,
    left: u64,
    ended: bool,
}

impl Read for Chunks<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.left == 0 && !self.ended {
            let size = line(self.stream)?;
            let size = size.split(|&byte| byte == b';').next().unwrap_or_default();
            let size = str::from_utf8(size).map_err(io::Error::other)?.trim();
            self.left = u64::from_str_radix(size, 16).map_err(io::Error::other)?;
            if self.left == 0 {
                self.ended = true;
                headers(self.stream)?;
            }
        }
        if self.ended {
            return Ok(0);
        }
        let count = (&mut *self.stream).take(self.left).read(buffer)?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.left -= count as u64;
        if self.left == 0 {
            line(self.stream)?;
        }
        Ok(count)
    }
}
