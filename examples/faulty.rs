//! A FastCGI program that violates the protocol on demand, to test gateways. It accepts from descriptor 0, and serves one
//! request at a time.
//!
//! `forkyard run --bind http:127.0.0.1:8080 --workers 2 -- target/debug/examples/faulty`, then
//! `curl http://127.0.0.1:8080/garbage`
//!
//! FAULTY_DIR is the directory of the files for `/once` and `/hold`. The codec of the server is not used.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

const BEGIN: u8 = 1;
const END: u8 = 3;
const PARAMS: u8 = 4;
const STDIN: u8 = 5;
const STDOUT: u8 = 6;
const STDERR: u8 = 7;

fn main() -> ExitCode {
    let listener = match io::stdin().as_fd().try_clone_to_owned() {
        Ok(descriptor) => UnixListener::from(descriptor),
        Err(_) => return ExitCode::FAILURE,
    };
    loop {
        let Ok((connection, _)) = listener.accept() else { return ExitCode::FAILURE };
        let mut stream = Stream(connection);
        if let Ok(Some(request)) = stream.request() {
            let _ = stream.answer(&request); // fails if the gateway has closed the connection
        }
    }
}

struct Request {
    params: BTreeMap<String, String>,
    body: Vec<u8>,
}

impl Request {
    fn param(&self, name: &str) -> &str {
        self.params.get(name).map_or("", String::as_str)
    }

    /// Returns a path in FAULTY_DIR.
    fn file(&self, suffix: &str) -> PathBuf {
        let directory = std::env::var_os("FAULTY_DIR").unwrap_or_default();
        PathBuf::from(directory).join(format!("{}{suffix}", self.param("QUERY_STRING")))
    }
}

struct Stream(UnixStream);

impl Stream {
    /// Reads a request. Returns `None` if the connection ends before the request.
    fn request(&mut self) -> io::Result<Option<Request>> {
        let (mut params, mut body) = (Vec::new(), Vec::new());
        loop {
            let mut header = [0; 8];
            if let Err(error) = self.0.read_exact(&mut header) {
                return if error.kind() == io::ErrorKind::UnexpectedEof { Ok(None) } else { Err(error) };
            }
            let [_, kind, _, _, high, low, padding, _] = header;
            let length = usize::from(u16::from_be_bytes([high, low]));
            let mut content = vec![0; length + usize::from(padding)];
            self.0.read_exact(&mut content)?;
            content.truncate(length);
            match kind {
                PARAMS => params.extend(content),
                STDIN if content.is_empty() => return Ok(Some(Request { params: pairs(&params), body })),
                STDIN => body.extend(content),
                BEGIN => {}
                kind => return Err(io::Error::other(format!("a record of type {kind}"))),
            }
        }
    }

    fn record(&mut self, kind: u8, content: &[u8]) -> io::Result<()> {
        self.0.write_all(&record(kind, content)?)
    }

    fn out(&mut self, bytes: impl AsRef<[u8]>) -> io::Result<()> {
        bytes.as_ref().chunks(0x8000).try_for_each(|piece| self.record(STDOUT, piece))
    }

    fn end(&mut self, protocol_status: u8) -> io::Result<()> {
        self.record(END, &[0, 0, 0, 0, protocol_status, 0, 0, 0])
    }

    /// Writes a whole response. A short one is written at once, as by php-cgi and libfcgi, so that a process that is killed
    /// has written all of it or nothing.
    fn page(&mut self, body: impl AsRef<[u8]>) -> io::Result<()> {
        let output = [b"Content-Type: text/plain\r\n\r\n", body.as_ref()].concat();
        let mut records = Vec::new();
        for piece in output.chunks(0x8000) {
            records.extend(record(STDOUT, piece)?);
        }
        records.extend(record(END, &[0; 8])?);
        self.0.write_all(&records)
    }

    fn answer(&mut self, request: &Request) -> io::Result<()> {
        let path = request.param("REQUEST_URI").split('?').next().unwrap_or_default();
        match path {
            "/pid" => self.page(format!("{}\n", std::process::id())),
            "/length" => self.page(format!("{}\n", request.body.len())),
            "/params" => {
                let lines = request.params.iter().map(|(name, value)| format!("{name}={value}\n"));
                self.page(lines.collect::<String>())
            }
            "/large" => self.page(vec![b'x'; request.param("QUERY_STRING").parse().unwrap_or(1 << 20)]),
            "/once" => self.once(request),
            "/hold" => self.hold(request),
            "/hold-with-child" => {
                let child = Command::new("sleep").arg("600").stdout(Stdio::null()).spawn()?;
                fs::write(request.file(".child"), child.id().to_string())?;
                self.hold(request)
            }
            "/exit" => std::process::exit(request.param("QUERY_STRING").parse().unwrap_or(1)),
            "/signal" => {
                let signal = format!("-{}", request.param("QUERY_STRING"));
                Command::new("kill").args([&signal, &std::process::id().to_string()]).status()?;
                loop {
                    std::thread::park();
                }
            }
            "/abort" => std::process::abort(),
            path => self.violate(path),
        }
    }

    /// Counts the executions of a request: each one creates another file.
    fn once(&mut self, request: &Request) -> io::Result<()> {
        for count in 1.. {
            match fs::File::options().write(true).create_new(true).open(request.file(&format!(".{count}"))) {
                Ok(_) => return self.page(format!("{count}\n")),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Creates a file with the pid of the process, and answers when the test has created another one.
    fn hold(&mut self, request: &Request) -> io::Result<()> {
        fs::write(request.file(".new"), std::process::id().to_string())?;
        fs::rename(request.file(".new"), request.file(".in"))?;
        while !request.file(".go").exists() {
            std::thread::sleep(Duration::from_millis(2));
        }
        fs::write(request.file(".out"), "")?;
        self.page("held\n")
    }

    fn violate(&mut self, path: &str) -> io::Result<()> {
        const HEAD: &[u8] = b"Content-Type: text/plain\r\n\r\n";
        match path {
            "/garbage" => self.0.write_all(&[b'?'; 100]),
            "/http" => self.0.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nok\n"),
            "/other-version" => self.0.write_all(&[2, STDOUT, 0, 1, 0, 0, 0, 0]),
            "/other-request" => self.0.write_all(&[1, STDOUT, 0, 2, 0, 1, 0, 0, b'x']),
            "/other-type" => self.record(BEGIN, &[0, 1, 0, 0, 0, 0, 0, 0]),
            "/malformed-header" => self.out("Content-Type text/plain\r\n\r\nbody\n").and_then(|()| self.end(0)),
            "/malformed-status" => self.out("Status: none\r\n\r\nbody\n").and_then(|()| self.end(0)),
            "/no-head" => self.out("no head").and_then(|()| self.end(0)),
            "/nothing" => self.end(0),
            "/huge-head" => self.huge_head(),
            "/overloaded" => self.end(2),
            "/close" => Ok(()),
            "/close-in-record" => self.0.write_all(&[1, STDOUT, 0, 1, 0]),
            "/close-in-head" => self.out("Content-Type: text/pl"),
            "/close-after-head" => self.out(HEAD),
            "/close-in-body" => self.out([HEAD, &[b'x'; 100_000]].concat()),
            "/close-in-last-record" => {
                self.out([HEAD, &[b'x'; 10]].concat())?;
                self.0.write_all(&[1, STDOUT, 0, 1, 0, 10, 0, 0, b'x'])
            }
            "/close-before-end" => {
                self.out([HEAD, &[b'x'; 10]].concat())?;
                self.record(STDOUT, b"")
            }
            "/close-complete-length" => self.out(b"Content-Length: 10\r\n\r\nxxxxxxxxxx"),
            "/too-short" => self.out("Content-Length: 100\r\n\r\nshort").and_then(|()| self.end(0)),
            "/too-long" => self.out("Content-Length: 3\r\n\r\ntoo long").and_then(|()| self.end(0)),
            "/garbage-in-body" => {
                self.out([HEAD, &[b'x'; 100_000]].concat())?;
                self.0.write_all(&[b'?'; 100])
            }
            "/exit-in-body" => {
                self.out([HEAD, &[b'x'; 100_000]].concat())?;
                std::process::exit(3)
            }
            "/stderr" => {
                (0..32).try_for_each(|_| self.record(STDERR, "complaint\n".repeat(3276).as_bytes()))?;
                self.page("complained\n")
            }
            _ => self.out("Status: 404 Not Found\r\n\r\nno such page\n").and_then(|()| self.end(0)),
        }
    }

    /// Writes 64 MiB of headers.
    fn huge_head(&mut self) -> io::Result<()> {
        let header = format!("X-Large: {}\r\n", "x".repeat(1000));
        let piece = header.repeat(32);
        (0..(64 << 20) / piece.len()).try_for_each(|_| self.record(STDOUT, piece.as_bytes()))?;
        self.page("end\n")
    }
}

fn record(kind: u8, content: &[u8]) -> io::Result<Vec<u8>> {
    let [high, low] = u16::try_from(content.len()).map_err(io::Error::other)?.to_be_bytes();
    Ok([&[1, kind, 0, 1, high, low, 0, 0], content].concat())
}

/// Decodes name-value pairs.
fn pairs(mut bytes: &[u8]) -> BTreeMap<String, String> {
    let mut pairs = BTreeMap::new();
    while let Some((name, value)) = pair(&mut bytes) {
        pairs.insert(name, value);
    }
    pairs
}

fn pair(bytes: &mut &[u8]) -> Option<(String, String)> {
    let (name, value) = (length(bytes)?, length(bytes)?);
    let mut take = |count: usize| {
        let (text, rest) = bytes.split_at_checked(count)?;
        *bytes = rest;
        Some(String::from_utf8_lossy(text).into_owned())
    };
    Some((take(name)?, take(value)?))
}

fn length(bytes: &mut &[u8]) -> Option<usize> {
    let (&first, rest) = bytes.split_first()?;
    if first < 128 {
        *bytes = rest;
        return Some(usize::from(first));
    }
    let (four, rest) = bytes.split_first_chunk::<4>()?;
    *bytes = rest;
    usize::try_from(u32::from_be_bytes(*four) & 0x7fff_ffff).ok()
}
