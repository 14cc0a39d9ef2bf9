//! SCGI on the wire, on Unix sockets and over TCP, with the tests' own client, and behind nginx and lighttpd.

#![allow(clippy::unwrap_used, reason = "a failing test reports its location")]

mod common;
#[path = "common/fronts/mod.rs"]
mod fronts;

use std::io::{self, Read as _, Write as _};

use common::scgi::{Client, head, netstring, request};
use common::{Server, http, wait_until};
use fronts::WebServer;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const MIB: usize = 1 << 20;

/// A server with one worker that runs `crashy`, on a Unix socket and on a TCP port.
struct Fixture {
    server: Server,
    _directory: tempfile::TempDir,
}

fn start(arguments: &[&str]) -> Fixture {
    let directory = tempfile::tempdir().unwrap();
    let socket = format!("scgi:unix:{}", directory.path().join("a.sock").display());
    let binds = ["--bind", &socket, "--bind", "scgi:127.0.0.1:0", "--workers", "1", "--log-level", "debug"];
    let server = Server::start("crashy", &[&binds, arguments].concat());
    assert_eq!(server.binds[0], socket, "the banner shows the socket");
    Fixture { server, _directory: directory }
}

impl Fixture {
    fn client(&self) -> Client {
        Client::connect(&self.server.binds[0]).unwrap()
    }

    fn clients(&self) -> [Client; 2] {
        [&self.server.binds[0], &self.server.binds[1]].map(|address| Client::connect(address).unwrap())
    }

    /// Checks that the worker still serves requests, and stops the server.
    fn end(mut self) {
        for client in self.clients() {
            assert_eq!(client.request("GET", "/ok", b"").unwrap().text(), "ok\n");
        }
        self.server.stop();
        for words in ["worker died", "did not finish in time"] {
            assert!(!self.server.log().contains(words), "{}", self.server.log());
        }
    }
}

#[test]
fn requests_are_answered() {
    let fixture = start(&[]);
    let large = vec![b'y'; 3 * MIB + 5];
    for (method, target, body, status, answer) in [
        ("GET", "/ok", &b""[..], 200, &b"ok\n"[..]),
        ("HEAD", "/ok", b"", 200, b""),
        ("POST", "/count", b"", 200, b"0\n"),
        ("POST", "/count", b"1", 200, b"1\n"),
        ("POST", "/count", &large, 200, b"3145733\n"),
        ("POST", "/echo", b"the body", 200, b"the body"),
        ("GET", "/panic", b"", 500, b"500 Internal Server Error\n"),
        ("GET", "/nowhere", b"", 404, b""),
        ("GET", "/bytes/16", b"", 200, &vec![b'x'; 16 * MIB]),
        ("HEAD", "/bytes/16", b"", 200, b""),
    ] {
        for client in fixture.clients() {
            let response = client.request(method, target, body).unwrap();
            assert_eq!(response.status(), status, "{method} {target}");
            assert!(response.body == answer, "{method} {target}: {} bytes", response.body.len());
        }
    }
    let head = fixture.client().request("HEAD", "/ok", b"").unwrap().head;
    assert!(head.contains("\r\ncontent-length: 3"), "{head}");
    fixture.end();
}

#[test]
fn a_request_sent_byte_by_byte_is_served() {
    let fixture = start(&[]);
    for mut client in fixture.clients() {
        for byte in request("POST", "/echo", b"the body") {
            client.stream.write_all(&[byte]).unwrap();
        }
        assert_eq!(client.response().unwrap().text(), "the body");
    }
    fixture.end();
}

#[test]
fn a_body_streams_in_both_directions_at_the_same_time() {
    let fixture = start(&[]);
    for mut client in fixture.clients() {
        client.stream.write_all(&head("POST", "/echo", "8")).unwrap();
        client.stream.write_all(b"1234").unwrap();
        let mut came = Vec::new();
        while !came.ends_with(b"\r\n\r\n1234") {
            let mut byte = [0];
            client.stream.read_exact(&mut byte).unwrap();
            came.push(byte[0]);
        }
        client.stream.write_all(b"5678").unwrap();
        let mut rest = Vec::new();
        client.stream.read_to_end(&mut rest).unwrap();
        assert_eq!(rest, b"5678");
    }
    fixture.end();
}

#[test]
fn a_body_of_unknown_length_ends_with_the_stream() {
    let fixture = start(&[]);
    for mut client in fixture.clients() {
        client.stream.write_all(&[&head("POST", "/echo", "-1")[..], b"as long as it is"].concat()).unwrap();
        client.end_writing().unwrap();
        assert_eq!(client.response().unwrap().text(), "as long as it is");
    }
    fixture.end();
}

#[test]
fn the_response_arrives_complete_even_if_the_body_is_not_read() {
    let fixture = start(&[]);
    let body = vec![0; 8 * MIB];
    for client in fixture.clients() {
        let response = client.request("POST", "/ok", &body).unwrap();
        assert_eq!((response.status(), response.text()), (200, "ok\n".to_owned()));
    }
    fixture.end();
}

#[test]
fn requests_beyond_limits_and_malformed_requests_are_answered() {
    let fixture = start(&["--max-params", "8K", "--max-body", "100"]);
    let long = "v".repeat(9000);
    for (bytes, status) in [
        (request("POST", "/count", &[0; 101]), 413),
        (request("POST", "/count", &[0; 100]), 200),
        (netstring(&[("CONTENT_LENGTH", "0"), ("SCGI", "1"), ("LONG", &long)]), 431),
        (b"99999999999999999999:".to_vec(), 431),
        (b"GET / HTTP/1.1\r\n\r\n".to_vec(), 400),
        (b"024:CONTENT_LENGTH\x000\0SCGI\x001\0,".to_vec(), 400),
        (b"24:CONTENT_LENGTH\x000\0SCGI\x001\0.".to_vec(), 400),
        (netstring(&[("CONTENT_LENGTH", "0"), ("REQUEST_METHOD", "GET")]), 400),
        (netstring(&[("CONTENT_LENGTH", ""), ("SCGI", "1"), ("REQUEST_METHOD", "GET")]), 400),
        (netstring(&[("CONTENT_LENGTH", "0"), ("SCGI", "1")]), 400),
    ] {
        for mut client in fixture.clients() {
            client.stream.write_all(&bytes).unwrap();
            let response = client.response().unwrap();
            assert_eq!(response.status(), status, "{}", String::from_utf8_lossy(&bytes));
        }
    }
    for mut client in fixture.clients() {
        client.stream.write_all(&[&head("POST", "/count", "-1")[..], &[0; 101]].concat()).unwrap();
        client.end_writing().unwrap();
        assert_eq!(client.response().unwrap().status(), 413);
    }
    fixture.end();
}

/// Expects a reset. By a reset, a web server detects that a response without a length is incomplete.
fn expect_reset(client: &mut Client, what: &str) {
    let mut bytes = Vec::new();
    let error = client.stream.read_to_end(&mut bytes).expect_err(what);
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset, "{what}: {error}");
}

#[test]
fn an_incomplete_response_resets_the_connection() {
    let fixture = start(&[]);
    for mut client in fixture.clients() {
        client.stream.write_all(&request("GET", "/break", b"")).unwrap();
        expect_reset(&mut client, "a body that broke off");
    }
    fixture.end();
}

#[test]
fn a_worker_that_dies_resets_its_connections() {
    let fixture = start(&[]);
    for body in [&b""[..], b"a body that was read"] {
        let mut clients = fixture.clients();
        let worker = wait_until("there is a worker", || fixture.server.workers().first().copied());
        for client in &mut clients {
            client.stream.write_all(&request("GET", "/bytes/64", body)).unwrap();
            client.stream.read_exact(&mut vec![0; MIB]).unwrap();
        }
        kill(Pid::from_raw(worker), Signal::SIGKILL).unwrap();
        for client in &mut clients {
            expect_reset(client, "a response whose worker died");
        }
    }
    for client in fixture.clients() {
        assert_eq!(client.request("GET", "/ok", b"").unwrap().text(), "ok\n", "the next worker answers");
    }
}

#[test]
fn a_disconnect_cancels_the_request() {
    let mut fixture = start(&[]);
    for mut client in fixture.clients() {
        client.stream.write_all(&request("GET", "/slow/600000", b"")).unwrap();
        // The test cannot observe when the request starts, but a later request is answered only after this request has started.
        for other in fixture.clients() {
            other.request("GET", "/ok", b"").unwrap();
        }
        drop(client);
        fixture.server.wait_for("the peer disconnected before it had received its response");
    }
    // No request is in flight, so the drain completes immediately.
    fixture.end();
}

#[test]
fn a_truncated_body_is_an_error_for_the_application() {
    let mut fixture = start(&[]);
    for mut client in fixture.clients() {
        client.stream.write_all(&[&head("POST", "/count", "10")[..], b"12345"].concat()).unwrap();
        client.end_writing().unwrap();
        assert_eq!(client.response().unwrap().text(), "5\n", "the example counts up to the error");
    }
    for mut client in fixture.clients() {
        client.stream.write_all(&[&head("POST", "/echo", "10")[..], b"12345"].concat()).unwrap();
        client.end_writing().unwrap();
        let mut bytes = Vec::new();
        let _ = client.stream.read_to_end(&mut bytes); // depending on the kernel, the client observes a reset or the end of the stream
        assert!(!bytes.ends_with(b"\r\n\r\n1234512345"));
    }
    fixture.server.wait_for("refused requests: an incomplete or malformed body status=400 protocol=scgi");
    fixture.end();
}

#[test]
fn a_drain_finishes_the_requests_that_have_begun() {
    let mut fixture = start(&[]);
    let idle = fixture.clients();
    let mut clients = fixture.clients();
    for client in &mut clients {
        client.stream.write_all(&head("POST", "/count", "4")).unwrap();
        client.stream.write_all(b"12").unwrap();
    }
    fixture.server.signal(Signal::SIGTERM);
    fixture.server.wait_for("signal to drain and stop");
    for client in &mut clients {
        client.stream.write_all(b"34").unwrap();
        assert_eq!(client.response().unwrap().text(), "4\n");
    }
    assert_eq!(fixture.server.wait_end(), Some(0));
    drop(idle);
}

/// Checks that the error is not a timeout of the client itself.
fn expect_an_end(error: &io::Error) {
    assert!(!matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut), "{error}");
}

/// Runs the checks that apply to every web server. `address` is the address of the web server in front of `server`.
fn check_front(address: &str, server: &Server) {
    assert_eq!(http::get(address, "/ok").unwrap().text(), "ok\n");
    assert_eq!(http::get(address, "/panic").unwrap().status, 500);
    assert_eq!(http::post(address, "/count", &vec![b'y'; MIB]).unwrap().text(), "1048576\n");
    assert_eq!(http::post(address, "/echo", b"").unwrap().body, b"");
    assert_eq!(http::post(address, "/ok", &vec![b'y'; MIB]).unwrap().text(), "ok\n");
    assert_eq!(http::get(address, "/bytes/16").unwrap().body.len(), 16 * MIB);
    let head = http::Client::connect(address).unwrap().request("HEAD", "/ok", b"").unwrap();
    assert_eq!((head.status, head.header("content-length")), (200, Some("3")));

    match http::get(address, "/break") {
        Ok(response) => {
            assert!(response.status >= 500, "an incomplete response was accepted as complete: {response:?}")
        }
        Err(error) => expect_an_end(&error),
    }
    let mut client = http::Client::connect(address).unwrap();
    client.stream.get_mut().write_all(b"GET /bytes/64 HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
    client.stream.read_exact(&mut vec![0; MIB]).unwrap();
    let worker = wait_until("there is a worker", || server.workers().first().copied());
    kill(Pid::from_raw(worker), Signal::SIGKILL).unwrap();
    let mut rest = Vec::new();
    if let Err(error) = client.stream.read_to_end(&mut rest) {
        expect_an_end(&error);
    }
    assert!(!rest.ends_with(b"0\r\n\r\n"), "a response whose worker died was accepted as complete");
    wait_until("the next worker serves", || http::get(address, "/ok").ok().filter(|response| response.status == 200));
}

#[test]
fn behind_nginx() {
    let fixture = start(&[]);
    let directory = fronts::shared_directory();
    for bind in &fixture.server.binds {
        let to = bind.strip_prefix("scgi:").unwrap();
        let location = format!(
            "scgi_pass {to};
             scgi_param REQUEST_METHOD $request_method; scgi_param REQUEST_URI $request_uri;
             scgi_param QUERY_STRING $query_string; scgi_param CONTENT_TYPE $content_type;
             scgi_param DOCUMENT_URI $document_uri; scgi_param SCGI 1;
             scgi_param SERVER_PROTOCOL $server_protocol; scgi_param REMOTE_ADDR $remote_addr;"
        );
        let config = |port| {
            format!("server {{ listen 127.0.0.1:{port}; client_max_body_size 64m; location / {{ {location} }} }}")
        };
        let (_nginx, address) = fronts::start_with(WebServer::Nginx, directory.path(), config);
        check_front(&address, &fixture.server);
    }
}

#[test]
fn behind_lighttpd() {
    let fixture = start(&[]);
    let directory = fronts::shared_directory();
    let socket = fixture.server.binds[0].strip_prefix("scgi:unix:").unwrap();
    for streaming in ["", "server.stream-request-body = 1\nserver.stream-response-body = 1"] {
        let rest = format!(
            "server.modules += (\"mod_scgi\")
             {streaming}
             scgi.server = (\"/\" => ((\"socket\" => \"{socket}\", \"check-local\" => \"disable\")))"
        );
        let (_lighttpd, address) = fronts::start_with(WebServer::Lighttpd, directory.path(), |_| rest.clone());
        // When lighttpd streams request bodies, it answers 411 to an incomplete chunked body.
        if streaming.is_empty() {
            let mut client = http::Client::connect(&address).unwrap();
            let chunked = "POST /echo HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n";
            for piece in [chunked, "3\r\none\r\n", "5\r\n, two\r\n", "0\r\n\r\n"] {
                client.stream.get_mut().write_all(piece.as_bytes()).unwrap();
            }
            assert_eq!(client.response(false).unwrap().text(), "one, two");
        }
        check_front(&address, &fixture.server);
    }
}
