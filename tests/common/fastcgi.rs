//! A FastCGI client that is based on the specification and shares no code with the server's codec. It can send malformed records, and reads
//! responses record by record.

use std::io::{self, Read, Write};

use super::{Server, awaited, connect_tcp, connect_unix};

pub const BEGIN: u8 = 1;
pub const ABORT: u8 = 2;
pub const END: u8 = 3;
pub const PARAMS: u8 = 4;
pub const STDIN: u8 = 5;
pub const STDOUT: u8 = 6;
pub const DATA: u8 = 8;
pub const GET_VALUES: u8 = 9;
pub const GET_VALUES_RESULT: u8 = 10;
pub const UNKNOWN_TYPE: u8 = 11;

pub trait Stream: Read + Write + Send {}
impl<T: Read + Write + Send> Stream for T {}

#[derive(Debug, PartialEq, Eq)]
pub struct Record {
    pub kind: u8,
    pub id: u16,
    pub content: Vec<u8>,
}

/// The output of the application, and how the request ended.
#[derive(Debug, Default)]
pub struct Response {
    pub stdout: Vec<u8>,
    pub application_status: u32,
    pub protocol_status: u8,
}

impl Response {
    pub fn head(&self) -> String {
        let end = self.stdout.windows(4).position(|four| four == b"\r\n\r\n").expect("the response has a head");
        String::from_utf8_lossy(&self.stdout[..end]).into_owned()
    }

    pub fn status(&self) -> u16 {
        let head = self.head();
        let status = head.lines().find_map(|line| line.strip_prefix("Status: "));
        status.and_then(|status| status[..3].parse().ok()).expect("the head has a status")
    }

    pub fn body(&self) -> &[u8] {
        &self.stdout[self.head().len() + 4..]
    }
}

pub struct Client {
    pub stream: Box<dyn Stream>,
}

impl Client {
    /// Connects to `address`, in the form used by the startup banner: `fastcgi:unix:/path` or `fastcgi:HOST:PORT`.
    pub fn connect(address: &str) -> io::Result<Self> {
        let address = address.strip_prefix("fastcgi:").unwrap_or(address);
        Ok(match address.strip_prefix("unix:") {
            Some(path) => Self { stream: Box::new(connect_unix(path)?) },
            None => Self { stream: Box::new(connect_tcp(address)?) },
        })
    }

    pub fn send(&mut self, records: &[Vec<u8>]) -> io::Result<()> {
        self.stream.write_all(&records.concat())
    }

    /// Sends a whole request on a keep-alive connection, and reads the response.
    pub fn request(&mut self, method: &str, target: &str, body: &[u8]) -> io::Result<Response> {
        self.send(&request(1, true, method, target, body))?;
        self.response(1)
    }

    /// Reads until the request ends. A record of a different request is an error.
    pub fn response(&mut self, id: u16) -> io::Result<Response> {
        let mut response = Response::default();
        loop {
            let record = self.record()?;
            if record.id != id {
                return Err(io::Error::other(format!("a record of request {}", record.id)));
            }
            match record.kind {
                STDOUT => response.stdout.extend(record.content),
                END => {
                    response.application_status = u32::from_be_bytes(record.content[..4].try_into().unwrap());
                    response.protocol_status = record.content[4];
                    return Ok(response);
                }
                kind => return Err(io::Error::other(format!("a record of type {kind}"))),
            }
        }
    }

    pub fn record(&mut self) -> io::Result<Record> {
        let mut header = [0; 8];
        self.stream.read_exact(&mut header).map_err(|error| awaited("a FastCGI record", error))?;
        let [1, kind, id_high, id_low, length_high, length_low, padding, _] = header else {
            return Err(io::Error::other(format!("not a record: {header:?}")));
        };
        let length = usize::from(u16::from_be_bytes([length_high, length_low]));
        let mut content = vec![0; length + usize::from(padding)];
        self.stream.read_exact(&mut content).map_err(|error| awaited("the rest of a FastCGI record", error))?;
        content.truncate(length);
        Ok(Record { kind, id: u16::from_be_bytes([id_high, id_low]), content })
    }

    /// Returns whether the server has closed the connection.
    pub fn is_closed(&mut self) -> bool {
        let mut byte = [0];
        match self.stream.read(&mut byte) {
            Ok(0) => true,
            Ok(_) => false,
            Err(error) => error.kind() == io::ErrorKind::ConnectionReset,
        }
    }
}

pub fn record(kind: u8, id: u16, content: &[u8], padding: u8) -> Vec<u8> {
    let length = u16::try_from(content.len()).expect("the content fits into a record").to_be_bytes();
    let id = id.to_be_bytes();
    let header = [1, kind, id[0], id[1], length[0], length[1], padding, 0];
    [&header[..], content, &vec![0xAA; usize::from(padding)]].concat()
}

pub fn begin(id: u16, role: u16, keep: bool) -> Vec<u8> {
    let [high, low] = role.to_be_bytes();
    record(BEGIN, id, &[high, low, u8::from(keep), 0, 0, 0, 0, 0], 0)
}

pub fn pair(name: &str, value: &str) -> Vec<u8> {
    let length = |text: &str| match u8::try_from(text.len()) {
        Ok(short) if short < 128 => vec![short],
        _ => (u32::try_from(text.len()).unwrap() | 0x8000_0000).to_be_bytes().to_vec(),
    };
    [length(name), length(value), name.into(), value.into()].concat()
}

/// Returns the records of a whole request, as nginx sends it.
pub fn request(id: u16, keep: bool, method: &str, target: &str, body: &[u8]) -> Vec<Vec<u8>> {
    let mut records = head(id, keep, method, target, Some(body.len()));
    records.extend(body.chunks(32 << 10).map(|piece| record(STDIN, id, piece, 0)));
    records.push(record(STDIN, id, b"", 0));
    records
}

/// Returns the records of a request, without its body.
pub fn head(id: u16, keep: bool, method: &str, target: &str, length: Option<usize>) -> Vec<Vec<u8>> {
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let length = length.filter(|&length| length > 0).map_or(String::new(), |length| length.to_string());
    let params = [
        pair("QUERY_STRING", query),
        pair("REQUEST_METHOD", method),
        pair("CONTENT_TYPE", ""),
        pair("CONTENT_LENGTH", &length),
        pair("SCRIPT_NAME", path),
        pair("REQUEST_URI", target),
        pair("SERVER_PROTOCOL", "HTTP/1.1"),
        pair("REMOTE_ADDR", "127.0.0.1"),
        pair("REMOTE_PORT", "4711"),
        pair("HTTP_HOST", "localhost"),
    ];
    vec![begin(id, 1, keep), record(PARAMS, id, &params.concat(), 0), record(PARAMS, id, b"", 0)]
}

/// A server with one worker that runs an example, on a Unix socket.
pub struct Fixture {
    pub server: Server,
    pub socket: String,
    _directory: tempfile::TempDir,
}

impl Fixture {
    pub fn start(example: &str, arguments: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = format!("fastcgi:unix:{}", directory.path().join("a.sock").display());
        let server = Server::start(example, &[&["--bind", &socket, "--workers", "1"], arguments].concat());
        Self { server, socket, _directory: directory }
    }

    pub fn client(&self) -> Client {
        Client::connect(&self.socket).unwrap()
    }

    pub fn worker(&self) -> i32 {
        *self.server.workers().first().unwrap()
    }

    /// Checks that the worker still serves requests, and stops the server.
    pub fn end(mut self) {
        assert_eq!(self.client().request("GET", "/ok", b"").unwrap().status(), 200);
        self.server.stop();
        for words in ["worker died", "did not finish in time"] {
            assert!(!self.server.log().contains(words), "{}", self.server.log());
        }
    }
}
