//! A small HTTP/1.1 client for tests that check every byte. It supports Content-Length and chunked bodies, and keeps its connection open.

use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::time::Instant;

use super::{PATIENCE, awaited, connect_tcp, read_all};

#[derive(Debug)]
pub struct Response {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Response {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(other, _)| other.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

pub struct Client {
    pub stream: BufReader<TcpStream>,
}

impl Client {
    pub fn connect(address: &str) -> io::Result<Self> {
        let stream = connect_tcp(address)?;
        stream.set_nodelay(true)?;
        Ok(Self { stream: BufReader::new(stream) })
    }

    pub fn request(&mut self, method: &str, target: &str, body: &[u8]) -> io::Result<Response> {
        let length = body.len();
        let head = format!("{method} {target} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n");
        self.stream.get_mut().write_all(&[head.as_bytes(), body].concat())?;
        self.response(method == "HEAD")
    }

    /// Like `request`, but sends the head in two parts and the body in chunks.
    pub fn request_in_pieces(&mut self, method: &str, target: &str, body: &[u8]) -> io::Result<Response> {
        let stream = self.stream.get_mut();
        stream.write_all(method.as_bytes())?;
        std::thread::yield_now();
        if body.is_empty() {
            stream.write_all(format!(" {target} HTTP/1.1\r\nHost: localhost\r\n\r\n").as_bytes())?;
        } else {
            let head = format!(" {target} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n");
            let chunk = [format!("{:x}\r\n", body.len()).as_bytes(), body, b"\r\n"].concat();
            stream.write_all(&[head.as_bytes(), &chunk].concat())?;
            std::thread::yield_now();
            stream.write_all(b"0\r\n\r\n")?;
        }
        self.response(method == "HEAD")
    }

    pub fn response(&mut self, is_head: bool) -> io::Result<Response> {
        let (status, headers) = self.head()?;
        let mut response = Response { status, headers, body: Vec::new() };
        if is_head || matches!(response.status, 204 | 304) {
            return Ok(response);
        }
        if let Some(length) = response.header("content-length") {
            let length: u64 = length.parse().map_err(io::Error::other)?;
            read_all(&mut (&mut self.stream).take(length), &mut response.body)?;
            if response.body.len() as u64 != length {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        } else if response.header("transfer-encoding") == Some("chunked") {
            self.chunks(&mut response.body)?;
        } else {
            read_all(&mut self.stream, &mut response.body)?;
        }
        Ok(response)
    }

    pub fn head(&mut self) -> io::Result<(u16, Vec<(String, String)>)> {
        let first = self.line()?;
        let status = first.split(' ').nth(1).and_then(|word| word.parse().ok());
        let status = status.ok_or_else(|| io::Error::other(format!("not a status line: {first:?}")))?;
        let mut headers = Vec::new();
        loop {
            let line = self.line()?;
            if line.is_empty() {
                return Ok((status, headers));
            }
            let (name, value) = line.split_once(':').ok_or_else(|| io::Error::other(line.clone()))?;
            headers.push((name.to_owned(), value.trim().to_owned()));
        }
    }

    fn chunks(&mut self, body: &mut Vec<u8>) -> io::Result<()> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if Instant::now() >= deadline {
                return Err(io::Error::new(io::ErrorKind::TimedOut, format!("no last chunk in {PATIENCE:?}")));
            }
            let length = u64::from_str_radix(&self.line()?, 16).map_err(io::Error::other)?;
            read_all(&mut (&mut self.stream).take(length), body)?;
            self.line()?;
            if length == 0 {
                return Ok(());
            }
        }
    }

    fn line(&mut self) -> io::Result<String> {
        let mut line = String::new();
        if self.stream.read_line(&mut line).map_err(|error| awaited("a line of a response", error))? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(line.trim_end().to_owned())
    }
}

/// Sends one request on a new connection.
pub fn get(address: &str, target: &str) -> io::Result<Response> {
    Client::connect(address)?.request("GET", target, b"")
}

pub fn post(address: &str, target: &str, body: &[u8]) -> io::Result<Response> {
    Client::connect(address)?.request("POST", target, body)
}
