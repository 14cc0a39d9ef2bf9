//! Bodies of 100 MiB, exchanged with slow peers in bounded memory.

#![allow(clippy::unwrap_used, reason = "a failing test reports its location")]

mod common;

use std::io::{self, Read as _, Write as _};
use std::net::TcpStream;
use std::time::Duration;

use common::fastcgi::{STDIN, head, record};
use common::{Server, fastcgi, http, status_number};

const MIB: usize = 1 << 20;
const SIZE: usize = 100 * MIB;
/// Maximum growth of the worker's peak resident size.
const ALLOWED_KIB: u64 = 8 << 10;

struct Fixture {
    server: Server,
    worker: i32,
    before: u64,
}

/// Starts one worker, sends it a request, and records its peak resident size.
fn start() -> Fixture {
    let server =
        Server::start("crashy", &["--bind", "http:127.0.0.1:0", "--bind", "fastcgi:127.0.0.1:0", "--workers", "1"]);
    let worker = *server.workers().first().unwrap();
    http::post(&server.http(), "/echo", &[b'x'; 300_000]).unwrap();
    fastcgi::Client::connect(&server.binds[1]).unwrap().request("POST", "/echo", &[b'x'; 300_000]).unwrap();
    let before = status_number(worker, "VmHWM").unwrap();
    Fixture { server, worker, before }
}

impl Fixture {
    fn end(mut self) {
        // The kernel sums per-CPU counters without synchronization, so the value may be slightly lower than an earlier value.
        let grown = status_number(self.worker, "VmHWM").unwrap().saturating_sub(self.before);
        assert!(grown < ALLOWED_KIB, "the worker grew by {grown} KiB");
        self.server.stop();
    }
}

/// Pauses after each MiB, like a slow peer.
fn dawdle(done: usize) {
    if done.is_multiple_of(MIB) {
        std::thread::park_timeout(Duration::from_millis(2));
    }
}

/// Reads `size` bytes slowly, and checks that all are `x`.
fn read_slowly(mut from: impl io::Read, size: usize) {
    let mut buffer = vec![0; 64 << 10];
    let mut done = 0;
    while done < size {
        let room = buffer.len().min(size - done).min(MIB - done % MIB);
        let count = from.read(&mut buffer[..room]).unwrap();
        assert!(count > 0, "the body ends after {done} bytes");
        assert!(buffer[..count].iter().all(|&byte| byte == b'x'));
        done += count;
        dawdle(done);
    }
}

#[test]
fn a_large_upload_over_http() {
    let fixture = start();
    let mut client = http::Client::connect(&fixture.server.http()).unwrap();
    let socket = client.stream.get_mut();
    write!(socket, "POST /count HTTP/1.1\r\nHost: x\r\nContent-Length: {SIZE}\r\n\r\n").unwrap();
    for done in (0..SIZE).step_by(64 << 10) {
        socket.write_all(&[b'x'; 64 << 10]).unwrap();
        dawdle(done);
    }
    assert_eq!(client.response(false).unwrap().text(), format!("{SIZE}\n"));
    drop(client);
    fixture.end();
}

#[test]
fn a_large_download_over_http() {
    let fixture = start();
    let mut client = http::Client::connect(&fixture.server.http()).unwrap();
    let socket = client.stream.get_mut();
    // Over HTTP/1.0, the body is not chunked, and the end of the connection marks the end of the body.
    write!(socket, "GET /bytes/100 HTTP/1.0\r\n\r\n").unwrap();
    assert_eq!(client.head().unwrap().0, 200);
    read_slowly(&mut client.stream, SIZE);
    assert_eq!(client.stream.read(&mut [0]).unwrap(), 0);
    fixture.end();
}

#[test]
fn a_large_echo_over_http_to_a_client_that_reads_slowly() {
    let fixture = start();
    let mut client = http::Client::connect(&fixture.server.http()).unwrap();
    let mut sender: TcpStream = client.stream.get_ref().try_clone().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            write!(sender, "POST /echo HTTP/1.0\r\nContent-Length: {SIZE}\r\n\r\n").unwrap();
            for _ in 0..SIZE / MIB {
                sender.write_all(&[b'x'; MIB]).unwrap(); // as fast as the server accepts it
            }
        });
        assert_eq!(client.head().unwrap().0, 200);
        read_slowly(&mut client.stream, SIZE);
    });
    drop(client);
    fixture.end();
}

#[test]
fn a_large_upload_over_fastcgi() {
    let fixture = start();
    let mut client = fastcgi::Client::connect(&fixture.server.binds[1]).unwrap();
    client.send(&head(1, true, "POST", "/count", Some(SIZE))).unwrap();
    for done in (0..SIZE).step_by(32 << 10) {
        client.send(&[record(STDIN, 1, &[b'x'; 32 << 10], 0)]).unwrap();
        dawdle(done);
    }
    client.send(&[record(STDIN, 1, b"", 0)]).unwrap();
    assert_eq!(client.response(1).unwrap().body(), format!("{SIZE}\n").as_bytes());
    drop(client);
    fixture.end();
}

#[test]
fn a_large_download_over_fastcgi() {
    let fixture = start();
    let mut client = fastcgi::Client::connect(&fixture.server.binds[1]).unwrap();
    client.send(&fastcgi::request(1, true, "GET", "/bytes/100", b"")).unwrap();
    receive_slowly(&mut client);
    drop(client);
    fixture.end();
}

#[test]
fn a_large_echo_over_fastcgi_to_a_client_that_reads_slowly() {
    let fixture = start();
    let address = fixture.server.binds[1].strip_prefix("fastcgi:").unwrap();
    let stream = common::connect_tcp(address).unwrap();
    let mut sender = stream.try_clone().unwrap();
    let mut client = fastcgi::Client { stream: Box::new(stream) };
    std::thread::scope(|scope| {
        scope.spawn(move || {
            sender.write_all(&head(1, true, "POST", "/echo", Some(SIZE)).concat()).unwrap();
            for _ in 0..SIZE / (32 << 10) {
                sender.write_all(&record(STDIN, 1, &[b'x'; 32 << 10], 0)).unwrap();
            }
            sender.write_all(&record(STDIN, 1, b"", 0)).unwrap();
        });
        receive_slowly(&mut client);
    });
    drop(client);
    fixture.end();
}

/// Reads the records of a response whose body is [`SIZE`] bytes of `x`.
fn receive_slowly(client: &mut fastcgi::Client) {
    let mut head_length = None;
    let mut received = 0;
    loop {
        let record = client.record().unwrap();
        if record.kind == fastcgi::END {
            break;
        }
        let start = match head_length {
            Some(_) => 0,
            None => {
                let end = record.content.windows(4).position(|four| four == b"\r\n\r\n").unwrap() + 4;
                *head_length.insert(end)
            }
        };
        assert!(record.content[start..].iter().all(|&byte| byte == b'x'));
        let before = received;
        received += record.content.len() - start;
        if received / MIB > before / MIB {
            dawdle(MIB);
        }
    }
    assert_eq!(received, SIZE);
}
