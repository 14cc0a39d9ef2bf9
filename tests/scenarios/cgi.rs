//! Clients for the protocols with CGI variables (RFC 3875). They send what a web server sends, and parse responses as a web server does.

use std::ffi::OsStr;
use std::io::{self, BufReader, Read};
use std::net::{Shutdown, TcpStream};
use std::os::unix::ffi::OsStrExt as _;
use std::process::{Command, Stdio};

use super::ask::{Ask, Gate, PIECE, Reply, Sent, give, take};
use super::http::headers;
use crate::common::fastcgi::{END, PARAMS, STDIN, STDOUT, begin, record};
use crate::common::limit::{Pipe, end_of};
use crate::common::program;

type Variables = Vec<(String, Vec<u8>)>;

/// Returns the variables of a request (section 4.1).
pub(crate) fn variables(ask: &Ask) -> Variables {
    let (path, query) = ask.target.split_once('?').unwrap_or((&ask.target, ""));
    let mut all: Variables = [
        ("REQUEST_METHOD", ask.method),
        ("REQUEST_URI", &ask.target),
        ("SCRIPT_NAME", ""),
        ("QUERY_STRING", query),
        ("SERVER_PROTOCOL", "HTTP/1.1"),
        ("GATEWAY_INTERFACE", "CGI/1.1"),
        ("SERVER_NAME", "localhost"),
        ("SERVER_PORT", if ask.is_tls { "443" } else { "80" }),
        ("REMOTE_ADDR", "127.0.0.1"),
        ("REMOTE_PORT", "4711"),
        ("HTTP_HOST", "localhost"),
    ]
    .map(|(name, value)| (name.to_owned(), value.as_bytes().to_vec()))
    .into();
    all.push(("PATH_INFO".to_owned(), decoded(path)));
    if ask.is_tls {
        all.push(("HTTPS".to_owned(), b"on".to_vec()));
    }
    if let Some(length) = ask.body.length() {
        all.push(("CONTENT_LENGTH".to_owned(), length.to_string().into_bytes()));
    }
    for (name, value) in &ask.headers {
        let glue: &[u8] = if *name == "Cookie" { b"; " } else { b", " };
        let name = match *name {
            "Content-Type" => "CONTENT_TYPE".to_owned(),
            name => format!("HTTP_{}", name.to_ascii_uppercase().replace('-', "_")),
        };
        // Multiple headers with the same name form one variable (4.1.18).
        match all.iter_mut().find(|(other, _)| *other == name) {
            Some((_, before)) => before.extend([glue, value].concat()),
            None => all.push((name, value.to_vec())),
        }
    }
    all
}

fn decoded(path: &str) -> Vec<u8> {
    let mut rest = path.as_bytes();
    let mut decoded = Vec::new();
    while let Some((&byte, tail)) = rest.split_first() {
        let code = tail.get(..2).and_then(|digits| u8::from_str_radix(str::from_utf8(digits).ok()?, 16).ok());
        rest = match code.filter(|_| byte == b'%') {
            Some(code) => {
                decoded.push(code);
                &tail[2..]
            }
            None => {
                decoded.push(byte);
                tail
            }
        };
    }
    decoded
}

/// Parses a CGI response (section 6).
pub(crate) fn reply(from: impl Read, ask: &Ask, gate: &mut Gate) -> io::Result<Reply> {
    let mut from = BufReader::with_capacity(PIECE, from);
    let headers = headers(&mut from)?;
    let mut reply = Reply { status: 200, headers, ..Reply::default() };
    if let Some(status) = reply.header("status") {
        reply.status =
            status.get(..3).and_then(|code| code.parse().ok()).ok_or_else(|| io::Error::other("no status"))?;
    }
    reply.body = take(&mut from, ask.pace, gate)?;
    if let Some(length) = reply.header("content-length").filter(|_| ask.method != "HEAD") {
        let length: u64 = length.parse().map_err(io::Error::other)?;
        if length != reply.body.length {
            return Err(io::Error::other(format!("{} of {length} bytes arrived", reply.body.length)));
        }
    }
    Ok(reply)
}

pub(crate) struct FastCgi {
    stream: TcpStream,
}

impl FastCgi {
    /// Connects to `address`, in the form used by the startup banner: `fastcgi:HOST:PORT`.
    pub(crate) fn open(address: &str) -> io::Result<Self> {
        let stream = crate::common::connect_tcp(address.strip_prefix("fastcgi:").unwrap_or(address))?;
        Ok(Self { stream })
    }

    /// Sends the request, and returns the response. If `keep`, the connection stays open; otherwise the server must close it.
    pub(crate) fn ask(mut self, ask: &Ask, gate: &mut Gate, keep: bool) -> io::Result<(Reply, Option<Self>)> {
        let pairs: Vec<u8> = variables(ask).iter().flat_map(|(name, value)| pair(name, value)).collect();
        let mut sent = [begin(1, 1, keep), record(PARAMS, 1, &pairs, 0), record(PARAMS, 1, b"", 0)].concat();
        for piece in ask.body.bytes().chunks(65_535) {
            sent.extend(record(STDIN, 1, piece, 0));
        }
        sent.extend(record(STDIN, 1, b"", 0));
        let mut to = self.stream.try_clone()?;
        let (reply, sent_all) = std::thread::scope(|scope| {
            let sender = scope.spawn(|| give(&mut to, &sent, ask.pace));
            let mut stdout = Stdout { stream: &mut self.stream, left: 0, padding: 0, ended: false };
            let reply = reply(&mut stdout, ask, gate);
            let ended = stdout.ended;
            let sent_all = sender.is_finished();
            if !sent_all || reply.is_err() {
                let _ = self.stream.shutdown(Shutdown::Both);
            }
            assert!(ended || reply.is_err(), "the response ends with the request's end record");
            reply.map(|reply| (reply, sent_all))
        })?;
        if !keep && sent_all && self.stream.read(&mut [0])? != 0 {
            return Err(io::Error::other("data arrived after the end of the request"));
        }
        Ok((reply, (keep && sent_all).then_some(self)))
    }
}

/// An SCGI connection, which serves one request.
pub(crate) struct Scgi {
    stream: TcpStream,
}

impl Scgi {
    /// Connects to `address`, in the form used by the startup banner: `scgi:HOST:PORT`.
    pub(crate) fn open(address: &str) -> io::Result<Self> {
        let stream = crate::common::connect_tcp(address.strip_prefix("scgi:").unwrap_or(address))?;
        Ok(Self { stream })
    }

    pub(crate) fn ask(mut self, ask: &Ask, gate: &mut Gate) -> io::Result<Reply> {
        let mut all = vec![("CONTENT_LENGTH".to_owned(), ask.body.bytes().len().to_string().into_bytes())];
        all.push(("SCGI".to_owned(), b"1".to_vec()));
        all.extend(variables(ask).into_iter().filter(|(name, _)| name != "CONTENT_LENGTH"));
        let strings: Vec<u8> =
            all.iter().flat_map(|(name, value)| [name.as_bytes(), b"\0", value, b"\0"].concat()).collect();
        let sent = [format!("{}:", strings.len()).as_bytes(), &strings, b",", ask.body.bytes()].concat();
        let mut to = self.stream.try_clone()?;
        std::thread::scope(|scope| {
            scope.spawn(|| give(&mut to, &sent, ask.pace));
            let reply = reply(&mut self.stream, ask, gate);
            let _ = self.stream.shutdown(Shutdown::Both); // stops the sending thread once the response has arrived
            reply
        })
    }
}

/// Runs the application as a CGI program.
pub(crate) fn call(ask: &Ask, gate: &mut Gate) -> io::Result<Reply> {
    let mut command = Command::new(program("scenarios"));
    command.env_clear().stdin(Stdio::piped()).stdout(Stdio::piped());
    for (name, value) in variables(ask) {
        command.env(name, OsStr::from_bytes(&value));
    }
    if let Sent::Chunked(bytes) = &ask.body {
        command.env("CONTENT_LENGTH", bytes.len().to_string()); // CGI requires the length
    }
    let mut child = command.spawn()?;
    let (mut stdin, mut stdout) = (child.stdin.take().expect("a pipe"), Pipe::of(child.stdout.take().expect("a pipe")));
    let reply = std::thread::scope(|scope| {
        scope.spawn(move || give(&mut stdin, ask.body.bytes(), ask.pace));
        let reply = reply(&mut stdout, ask, gate);
        drop(stdout);
        reply
    });
    let status = end_of(&mut child, "the application");
    if status.success() { reply } else { Err(io::Error::other(status.to_string())) }
}

fn pair(name: &str, value: &[u8]) -> Vec<u8> {
    let length = |length: usize| (u32::try_from(length).expect("the length is short") | 0x8000_0000).to_be_bytes();
    [&length(name.len())[..], &length(value.len()), name.as_bytes(), value].concat()
}

/// Reads the content of a request's STDOUT records.
struct Stdout<'a> {
    stream: &'a mut TcpStream,
    left: usize,
    padding: usize,
    ended: bool,
}

impl Read for Stdout<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.left == 0 && !self.ended {
            let mut rest = vec![0; self.padding];
            self.stream.read_exact(&mut rest)?;
            let mut header = [0; 8];
            self.stream.read_exact(&mut header)?;
            let [1, kind, 0, 1, high, low, padding, _] = header else {
                return Err(io::Error::other(format!("not a record of this request: {header:?}")));
            };
            (self.left, self.padding) = (usize::from(u16::from_be_bytes([high, low])), padding.into());
            match kind {
                STDOUT => {}
                END => {
                    let mut body = [0; 8];
                    self.stream.read_exact(&mut body)?;
                    if body[..5] != [0; 5] {
                        return Err(io::Error::other(format!("the request ended badly: {body:?}")));
                    }
                    (self.left, self.ended) = (0, true);
                }
                kind => return Err(io::Error::other(format!("a record of type {kind}"))),
            }
        }
        if self.ended {
            return Ok(0);
        }
        let room = buffer.len().min(self.left);
        let count = self.stream.read(&mut buffer[..room])?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.left -= count;
        Ok(count)
    }
}
