//! A client for server-sent events over every protocol. It parses a stream event by event, as browsers do (HTML standard, 9.2.6).

use std::collections::VecDeque;
use std::io::{self, BufRead as _, BufReader, Read, Write as _};
use std::time::Instant;

use super::raw::{self, Protocol};
use super::{PATIENCE, awaited, fastcgi, http, http2, scgi};

/// An event that a browser would dispatch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    pub id: String,
    pub name: String,
    pub data: String,
}

impl Event {
    /// Returns the number in the id of an event from a single topic.
    pub fn number(&self) -> u64 {
        self.id.split_once('-').and_then(|(_, id)| id.parse().ok()).unwrap_or_else(|| panic!("{self:?}"))
    }
}

/// The four kinds of connection to a worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    Http,
    Http2,
    FastCgi,
    Scgi,
}

pub const WAYS: [Way; 4] = [Way::Http, Way::Http2, Way::FastCgi, Way::Scgi];

impl Way {
    /// Returns the protocol for `--bind`.
    pub fn protocol(self) -> Protocol {
        match self {
            Self::Http | Self::Http2 => Protocol::Http,
            Self::FastCgi => Protocol::FastCgi,
            Self::Scgi => Protocol::Scgi,
        }
    }
}

/// An open stream.
pub struct Source {
    lines: BufReader<Box<dyn Read + Send>>,
    events: VecDeque<Event>,
    /// The id that a browser would send when it reconnects.
    pub last_id: String,
    pub retries: Vec<u64>,
    pub comments: usize,
    pub head: String,
}

impl Source {
    /// Opens a stream at `bind`, an address from the banner. Sends a `Last-Event-ID` header if `last_id` is not empty. Returns when the
    /// head and the first lines have arrived.
    pub fn open(way: Way, bind: &str, target: &str, last_id: &str) -> io::Result<Self> {
        let (head, body): (String, Box<dyn Read + Send>) = match way {
            Way::Http => {
                let id = if last_id.is_empty() { String::new() } else { format!("Last-Event-ID: {last_id}\r\n") };
                let address = bind.trim_start_matches("http:").trim_start_matches("//");
                let mut client = http::Client::connect(address)?;
                let request =
                    format!("GET {target} HTTP/1.1\r\nHost: localhost\r\nAccept: text/event-stream\r\n{id}\r\n");
                client.stream.get_mut().write_all(request.as_bytes())?;
                let (status, headers) = client.head()?;
                let head = headers.iter().fold(format!("{status}\n"), |text, (name, value)| {
                    format!("{text}{}: {value}\n", name.to_ascii_lowercase())
                });
                (head, Box::new(Chunks { stream: client.stream, left: 0, over: false }))
            }
            Way::Http2 => {
                let address = bind.trim_start_matches("http:").trim_start_matches("//");
                let mut client = http2::Client::connect(address)?;
                let mut fields = vec![("accept", "text/event-stream")];
                if !last_id.is_empty() {
                    fields.push(("last-event-id", last_id));
                }
                client.send(&http2::head(1, http2::END_STREAM | http2::END_HEADERS, "GET", target, &fields))?;
                let head = client.next(http2::HEADERS)?;
                let head = if head.payload.starts_with(http2::status(200)) { "200\n" } else { "?\n" };
                (head.to_owned(), Box::new(Frames { client, piece: Vec::new(), over: false }))
            }
            Way::FastCgi => {
                let mut client = fastcgi::Client::connect(bind)?;
                client.send(&fastcgi::head(1, true, "GET", &with_id(target, last_id), None))?;
                client.send(&[fastcgi::record(fastcgi::STDIN, 1, b"", 0)])?;
                cgi_head(Box::new(Records { client, piece: Vec::new() }))?
            }
            Way::Scgi => {
                let mut stream = raw::connect(bind);
                stream.write_all(&scgi::head("GET", &with_id(target, last_id), "0"))?;
                cgi_head(Box::new(stream))?
            }
        };
        if !head.starts_with("200\n") {
            return Err(io::Error::other(head));
        }
        let lines = BufReader::new(body);
        let mut source = Self {
            lines,
            events: VecDeque::new(),
            last_id: last_id.to_owned(),
            retries: Vec::new(),
            comments: 0,
            head,
        };
        source.block()?;
        Ok(source)
    }

    /// Returns the next event, or `None` if the stream has ended properly. Fails if no event arrives in time; keep-alive comments do not
    /// count as events.
    pub fn event(&mut self) -> io::Result<Option<Event>> {
        let deadline = Instant::now() + PATIENCE;
        while self.events.is_empty() {
            if Instant::now() >= deadline {
                let text = format!("no event in {PATIENCE:?} after {:?}, {} comments", self.last_id, self.comments);
                return Err(io::Error::new(io::ErrorKind::TimedOut, text));
            }
            if !self.block()? {
                return Ok(None);
            }
        }
        Ok(self.events.pop_front())
    }

    /// Returns the next event. Panics if none arrives.
    pub fn next(&mut self) -> Event {
        let event = self.event().unwrap_or_else(|error| panic!("the next event: {error}"));
        event.expect("the stream continues")
    }

    /// Reads up to the next empty line. Returns false at the end of the stream.
    pub fn block(&mut self) -> io::Result<bool> {
        let (mut name, mut data) = (String::new(), Vec::new());
        let mut id = self.last_id.clone();
        loop {
            let mut line = String::new();
            let count = self.lines.read_line(&mut line);
            if count.map_err(|error| awaited("a line of an event stream", error))? == 0 {
                return Ok(false);
            }
            let line = line.trim_end_matches('\n');
            let (field, value) = line.split_once(": ").or_else(|| line.split_once(':')).unwrap_or((line, ""));
            match field {
                "" if line.is_empty() => break,
                "" => self.comments += 1,
                "id" => value.clone_into(&mut id),
                "event" => value.clone_into(&mut name),
                "data" => data.push(value.to_owned()),
                "retry" => self.retries.push(value.parse().map_err(io::Error::other)?),
                other => return Err(io::Error::other(format!("a field {other:?}"))),
            }
        }
        self.last_id = id;
        if !data.is_empty() {
            self.events.push_back(Event { id: self.last_id.clone(), name, data: data.join("\n") });
        }
        Ok(true)
    }
}

fn with_id(target: &str, last_id: &str) -> String {
    if last_id.is_empty() {
        return target.to_owned();
    }
    format!("{target}{}lastEventId={last_id}", if target.contains('?') { '&' } else { '?' })
}

/// Reads the head of a CGI response and converts it to the form of an HTTP head.
fn cgi_head(mut body: Box<dyn Read + Send>) -> io::Result<(String, Box<dyn Read + Send>)> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        body.read_exact(&mut byte)?;
        head.push(byte[0]);
    }
    let head = String::from_utf8_lossy(&head).replace("\r\n", "\n");
    let status = head.strip_prefix("Status: ").and_then(|rest| rest.get(..3)).unwrap_or("200").to_owned();
    let rest = head.lines().skip(usize::from(head.starts_with("Status: ")));
    let head = rest.fold(format!("{status}\n"), |text, line| format!("{text}{}\n", line.to_ascii_lowercase()));
    Ok((head, body))
}

/// The body of a chunked response.
struct Chunks<S> {
    stream: BufReader<S>,
    left: usize,
    over: bool,
}

impl<S: Read> Read for Chunks<S> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.over {
            return Ok(0);
        }
        if self.left == 0 {
            let mut line = String::new();
            if self.stream.read_line(&mut line)? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            self.left = usize::from_str_radix(line.trim_end(), 16).map_err(io::Error::other)?;
            if self.left == 0 {
                self.over = true;
                return Ok(0);
            }
        }
        let room = self.left.min(buffer.len());
        let count = self.stream.read(&mut buffer[..room])?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.left -= count;
        if self.left == 0 {
            self.stream.read_line(&mut String::new())?;
        }
        Ok(count)
    }
}

/// The DATA frames of stream 1.
struct Frames {
    client: http2::Client,
    piece: Vec<u8>,
    over: bool,
}

impl Read for Frames {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.piece.is_empty() {
            if self.over {
                return Ok(0);
            }
            let frame = self.client.frame()?;
            match frame.kind {
                http2::SETTINGS | http2::PING if frame.flags & http2::ACK == 0 => {
                    let payload: &[u8] = if frame.kind == http2::PING { &frame.payload } else { b"" };
                    let _ = self.client.send(&http2::frame(frame.kind, http2::ACK, 0, payload));
                }
                http2::DATA => {
                    // Sends WINDOW_UPDATE for the connection and for the stream.
                    let count = u32::try_from(frame.payload.len()).unwrap().to_be_bytes();
                    self.over = frame.flags & http2::END_STREAM != 0;
                    let updates = [http2::frame(8, 0, 0, &count), http2::frame(8, 0, 1, &count)].concat();
                    if !frame.payload.is_empty() {
                        let _ = self.client.send(&updates);
                    }
                    self.piece = frame.payload;
                }
                http2::RST_STREAM => return Err(io::ErrorKind::ConnectionReset.into()),
                _ => {}
            }
        }
        let count = self.piece.len().min(buffer.len());
        buffer[..count].copy_from_slice(&self.piece[..count]);
        self.piece.drain(..count);
        Ok(count)
    }
}

/// The standard output of request 1.
struct Records {
    client: fastcgi::Client,
    piece: Vec<u8>,
}

impl Read for Records {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.piece.is_empty() {
            let record = self.client.record()?;
            match record.kind {
                fastcgi::STDOUT => self.piece = record.content,
                fastcgi::END if record.content[..5] == [0; 5] => return Ok(0),
                kind => return Err(io::Error::other(format!("a record of type {kind}: {:?}", record.content))),
            }
        }
        let count = self.piece.len().min(buffer.len());
        buffer[..count].copy_from_slice(&self.piece[..count]);
        self.piece.drain(..count);
        Ok(count)
    }
}
