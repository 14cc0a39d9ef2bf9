//! How connections end: the last response on a connection announces that the connection will be closed, and a request body that the client
//! does not complete is not logged as a server error.

#![allow(clippy::unwrap_used, reason = "a failing test reports its location")]

mod common;

use std::io::{Read as _, Write as _};
use std::process::{Command, Stdio};

use common::fastcgi::{STDIN, record};
use common::http::{Client, Response};
use common::limit::{self, InTime as _};
use common::{Server, fastcgi, http, http2, program, scgi, wait_until};
use nix::sys::signal::Signal;

const CHUNKED: &str = "Transfer-Encoding: chunked\r\n";
const BROKEN_OFF: &str = "refused requests: an incomplete or malformed body status=400 protocol=";

fn start(arguments: &[&str]) -> Server {
    let bind = "http:127.0.0.1:0,fastcgi:127.0.0.1:0,scgi:127.0.0.1:0";
    Server::start("crashy", &[&["--workers", "1", "--bind", bind], arguments].concat())
}

fn head(target: &str, fields: &str) -> String {
    format!("POST {target} HTTP/1.1\r\nHost: x\r\n{fields}\r\n")
}

fn send(client: &mut Client, bytes: &str) {
    client.stream.get_mut().write_all(bytes.as_bytes()).unwrap();
}

/// Sends these bytes. Returns the response, and all data that follows the response up to the end of the connection.
fn last_response(address: &str, bytes: &str) -> (Response, Vec<u8>) {
    let mut client = Client::connect(address).unwrap();
    send(&mut client, bytes);
    let response = client.response(false).unwrap_or_else(|error| panic!("no response to {bytes:.200?}: {error}"));
    let mut rest = Vec::new();
    let _ = client.stream.read_to_end(&mut rest); // if the server left data unread, the close is a reset
    (response, rest)
}

#[test]
fn a_response_before_a_close_announces_the_close() {
    let mut server = start(&["--max-body", "200K", "--body-timeout", "1s"]);
    let large = "Content-Length: 150000\r\n";
    let beyond = format!("{}40000\r\n{}", head("/count", CHUNKED), "x".repeat(210_000));
    let cases = [
        (head("/ok", large), 200),
        (head("/nowhere", large), 404),
        (head("/status/503", large).replace("POST", "GET"), 503),
        (head("/ok", CHUNKED), 200),
        (head("/ok", "Content-Length: 300000\r\n"), 413),
        (beyond, 413),
        (head("/count", "Content-Length: 5\r\n"), 408),
        // The server does not request the body from this client, so the bytes after the head may be anything.
        (head("/ok", "Content-Length: 5\r\nExpect: 100-continue\r\n"), 200),
        (head("/ok", "Content-Length: 300000\r\nExpect: 100-continue\r\n"), 413),
        (format!("{}x\r\n", head("/count", CHUNKED)), 200),
        (format!("{}x\r\n", head("/echo", CHUNKED)), 400),
        (head("/ok", &format!("Content-Length: 5\r\n{CHUNKED}")) + "0\r\n\r\n", 200),
        (head("/ok", "Host: y\r\n"), 400),
        (head("/ok", "Expect: a-miracle\r\n"), 417),
        (head("/ok", "No colon\r\n"), 400),
        (head("/ok", &format!("X: {}\r\n", "x".repeat(200 << 10))), 431),
        ("CONNECT x:80 HTTP/1.1\r\nHost: x:80\r\n\r\n".to_owned(), 501),
        (head("/ok", "Connection: close\r\n"), 200),
    ];
    let address = &server.http();
    std::thread::scope(|scope| {
        for (bytes, status) in &cases {
            scope.spawn(move || {
                let (response, rest) = last_response(address, bytes);
                assert_eq!((response.status, response.header("connection")), (*status, Some("close")), "{bytes:.200?}");
                assert_eq!(String::from_utf8_lossy(&rest), "", "{bytes:.200?}");
            });
        }
    });
    server.stop();

    let mut server = start(&["--request-timeout", "1s"]);
    let (response, _) = last_response(&server.http(), &head("/count", CHUNKED));
    assert_eq!((response.status, response.header("connection")), (504, Some("close")));
    server.stop();
}

/// Returns all values of `Connection` in a response.
fn connection(response: &Response) -> Vec<&str> {
    let headers = response.headers.iter().filter(|(name, _)| name == "connection");
    headers.map(|(_, value)| value.as_str()).collect()
}

#[test]
fn an_http_1_0_response_announces_whether_the_connection_stays_open() {
    let mut server = Server::start("scenarios", &["--bind", "http:127.0.0.1:0", "--workers", "1", "--max-uri", "1000"]);
    let long = format!("GET /{} HTTP/1.0", "x".repeat(2000));
    let post = "POST /early HTTP/1.0\r\nContent-Length: 100000";
    for (head, status, is_kept) in [
        ("GET /method HTTP/1.0", 200, true),
        ("GET /raw/204 HTTP/1.0", 204, true),
        ("GET /raw/304 HTTP/1.0", 304, true),
        ("HEAD /method HTTP/1.0", 200, true),
        ("GET /nowhere HTTP/1.0", 404, true),
        ("GET /raw-stream/200?content-length=5 HTTP/1.0", 200, true),
        ("GET /raw/200?connection=keep-alive HTTP/1.0", 200, true),
        (&long, 414, true),
        // These responses have no body, so the connection need not close to mark the end of a body.
        ("HEAD /raw-stream/200 HTTP/1.0", 200, true),
        ("GET /raw-stream/204 HTTP/1.0", 204, true),
        // Only the end of the connection marks the end of this body.
        ("GET /raw-stream/200 HTTP/1.0", 200, false),
        ("GET /raw-stream/200?connection=keep-alive HTTP/1.0", 200, false),
        ("GET /raw/200?connection=close HTTP/1.0", 200, false),
        ("HEAD /raw/200?connection=close HTTP/1.0", 200, false),
        ("GET /raw/204?connection=close HTTP/1.0", 204, false),
        ("GET /raw/200?connection=keep-alive&connection=close HTTP/1.0", 200, false),
        ("GET /method HTTP/1.0\r\nConnection: close", 200, false),
        ("GET /raw/200?connection=keep-alive HTTP/1.0\r\nConnection: close", 200, false),
        (post, 200, false),
        ("GET /method HTTP/1.0\r\nHost: a b", 400, false),
        ("CONNECT x:80 HTTP/1.0", 501, false),
        // The application sets a `Connection` option that does not concern keep-alive.
        ("GET /raw/200?connection=x-a HTTP/1.0\r\nConnection: close", 200, false),
    ] {
        let mut client = Client::connect(&server.http()).unwrap();
        send(&mut client, &format!("{head}\r\nConnection: keep-alive\r\n\r\n"));
        let response = client.response(head.starts_with("HEAD")).unwrap();
        assert_eq!(response.status, status, "{head:.200}");
        let expected = match (is_kept, head.contains("x-a")) {
            (_, true) => "x-a, close",
            (true, false) => "keep-alive",
            (false, false) => "close",
        };
        assert_eq!(connection(&response), [expected], "{head:.200}");
        if is_kept {
            assert_eq!(client.request("GET", "/method", b"").unwrap().text(), "GET", "{head:.200}");
        } else {
            let mut rest = Vec::new();
            let _ = client.stream.read_to_end(&mut rest); // if the server left data unread, the close is a reset
            assert_eq!(String::from_utf8_lossy(&rest), "", "{head:.200}");
        }
    }
    server.stop();

    let mut server = start(&["--max-requests-per-connection", "3"]);
    let mut client = Client::connect(&server.http()).unwrap();
    for expected in ["keep-alive", "keep-alive", "close"] {
        send(&mut client, "GET /ok HTTP/1.0\r\nConnection: keep-alive\r\n\r\n");
        assert_eq!(connection(&client.response(false).unwrap()), [expected]);
    }
    assert_eq!(client.stream.read(&mut [0]).unwrap(), 0);
    server.stop();
}

#[test]
fn an_application_cannot_override_the_servers_connection_header() {
    let mut server = Server::start("scenarios", &["--bind", "http:127.0.0.1:0", "--workers", "1"]);
    for (target, fields, expected) in [
        ("/raw/200?connection=keep-alive", "", &[][..]),
        ("/raw/200?connection=keep-alive", "Connection: keep-alive\r\n", &[]),
        ("/raw/200?connection=keep-alive", "Connection: close\r\n", &["close"]),
        ("/raw/200?connection=close", "Connection: keep-alive\r\n", &["close"]),
        ("/raw/200?connection=close", "Connection: close\r\n", &["close"]),
        ("/raw/200?connection=x-a", "", &["x-a"]),
        ("/raw/200?connection=x-a,%20keep-alive", "Connection: close\r\n", &["x-a, close"]),
        ("/raw/426?connection=close&upgrade=echo", "", &["upgrade, close"]),
    ] {
        let mut client = Client::connect(&server.http()).unwrap();
        send(&mut client, &head(target, fields));
        assert_eq!(connection(&client.response(false).unwrap()), expected, "{target} {fields}");
        if expected.iter().any(|options| options.ends_with("close")) {
            assert_eq!(client.stream.read(&mut [0]).unwrap(), 0, "{target} {fields}");
        } else {
            assert_eq!(client.request("GET", "/method", b"").unwrap().text(), "GET", "{target} {fields}");
        }
    }
    server.stop();
}

#[test]
fn the_last_response_in_a_drain_announces_the_close() {
    for request in ["GET /ok HTTP/1.1\r\nHost: x\r\n\r\n", "GET /ok HTTP/1.0\r\nConnection: keep-alive\r\n\r\n"] {
        let last = wait_until("a request arrives before the idle connection is closed", || {
            let mut server = start(&[]);
            let mut client = Client::connect(&server.http()).unwrap();
            send(&mut client, request);
            assert_eq!(client.response(false).unwrap().text(), "ok\n");
            server.signal(Signal::SIGTERM);
            wait_until("the worker is draining", || {
                let row = server.segment().scoreboard().read(0)?;
                (row.state == forkyard_shm::State::Draining).then_some(())
            });
            let mut last = None;
            while client.stream.get_mut().write_all(request.as_bytes()).is_ok()
                && let Ok(response) = client.response(false)
            {
                last = Some(response);
            }
            assert_eq!(server.wait_end(), Some(0));
            last
        });
        assert_eq!(connection(&last), ["close"], "{request}");
    }
}

#[test]
fn an_unread_small_body_does_not_close_the_connection() {
    let mut server = start(&["--max-body", "10"]);
    let mut client = Client::connect(&server.http()).unwrap();
    for (target, body, status) in [("/ok", "12345", 200), ("/nowhere", "12345", 404), ("/ok", "12345678901", 413)] {
        let response = client.request("POST", target, body.as_bytes()).unwrap();
        assert_eq!((response.status, response.header("connection")), (status, None), "{target} {body}");
    }
    // A body that arrives after the response does not cause the server to close the connection.
    send(&mut client, &head("/nowhere", "Content-Length: 5\r\n"));
    let response = client.response(false).unwrap();
    assert_eq!((response.status, response.header("connection")), (404, None));
    send(&mut client, "12345");
    assert_eq!(client.request("GET", "/ok", b"").unwrap().text(), "ok\n");
    drop(client);
    server.stop();
}

#[test]
fn an_incomplete_body_that_the_application_passes_on_gets_400_and_logs_no_error() {
    let mut server = start(&[]);
    // No part of the response had been sent when the error occurred.
    let (response, _) = last_response(&server.http(), &format!("{}x\r\n", head("/echo", CHUNKED)));
    assert_eq!(response.status, 400);
    let mut client = fastcgi::Client::connect(&server.binds[1]).unwrap();
    let whole = [fastcgi::head(1, true, "POST", "/echo", Some(10)), vec![record(STDIN, 1, b"", 0)]].concat();
    client.send(&whole).unwrap(); // all at once: the response begins as soon as the worker waits for more
    assert_eq!(client.response(1).unwrap().status(), 400);
    assert_eq!(client.request("GET", "/ok", b"").unwrap().body(), b"ok\n", "the connection stays open");
    server.wait_for(&format!("{BROKEN_OFF}fastcgi"));
    let mut client = scgi::Client::connect(&server.binds[2]).unwrap();
    client.stream.write_all(&scgi::head("POST", "/echo", "10")).unwrap();
    client.end_writing().unwrap();
    let mut bytes = Vec::new();
    let _ = client.stream.read_to_end(&mut bytes);
    server.wait_for(&format!("{BROKEN_OFF}scgi"));

    // Part of the response had been sent, so the error closes the connection or, over HTTP/2, the stream.
    let mut client = Client::connect(&server.http()).unwrap();
    send(&mut client, &format!("{}3\r\nabc\r\n", head("/echo", CHUNKED)));
    assert_eq!(client.head().unwrap().0, 200);
    send(&mut client, "x\r\n");
    let mut rest = String::new();
    let _ = client.stream.read_to_string(&mut rest);
    assert_eq!(rest, "3\r\nabc\r\n");
    for (fields, sent) in [
        (&[][..], http2::frame(http2::RST_STREAM, 0, 1, &8_u32.to_be_bytes())),
        (&[("content-length", "10")], http2::frame(http2::DATA, http2::END_STREAM, 1, b"de")),
    ] {
        let mut client = http2::Client::connect(&server.http()).unwrap();
        client.send(&http2::head(1, 0, "POST", "/echo", fields)).unwrap();
        client.send(&http2::frame(http2::DATA, 0, 1, b"abc")).unwrap();
        assert_eq!(client.next(http2::DATA).unwrap().payload, b"abc");
        client.send(&sent).unwrap();
        client.send(&http2::head(3, http2::END_STREAM, "GET", "/ok", &[])).unwrap();
        while client.next(http2::DATA).unwrap().stream != 3 {}
    }
    let mut client = fastcgi::Client::connect(&server.binds[1]).unwrap();
    client.send(&fastcgi::head(1, true, "POST", "/echo", Some(10))).unwrap();
    client.send(&[record(STDIN, 1, b"abc", 0)]).unwrap();
    assert!(client.record().unwrap().content.ends_with(b"\r\n\r\nabc"));
    client.send(&[record(fastcgi::ABORT, 1, b"", 0)]).unwrap();
    assert_eq!(client.response(1).unwrap().protocol_status, 0);
    let mut client = fastcgi::Client::connect(&server.binds[1]).unwrap();
    client.send(&fastcgi::head(1, true, "POST", "/echo", Some(10))).unwrap();
    client.send(&[record(STDIN, 1, b"abc", 0)]).unwrap();
    assert!(client.record().unwrap().content.ends_with(b"\r\n\r\nabc"));
    client.send(&[record(STDIN, 1, b"", 0)]).unwrap();
    assert!(client.record().is_err());
    server.stop();
    let log = server.log();
    assert!(log.contains(&format!("{BROKEN_OFF}http")), "{log}");
    assert!(!log.contains("ERROR"), "{log}");
}

#[test]
fn an_incomplete_body_in_a_cgi_call_logs_no_error() {
    let mut command = Command::new(program("crashy"));
    command.env_clear().envs([("GATEWAY_INTERFACE", "CGI/1.1"), ("REQUEST_METHOD", "POST"), ("REQUEST_URI", "/echo")]);
    command.env("CONTENT_LENGTH", "10").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"abc").unwrap();
    let output = limit::output_of(child, "the program");
    let errors = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "only part of the response was written");
    assert!(
        errors.contains("refused requests: an incomplete or malformed body") && !errors.contains("ERROR"),
        "{errors}"
    );
}

#[test]
fn no_100_follows_a_final_status() {
    let mut server = start(&[]);
    for target in ["/echo", "/count", "/ok", "/nowhere"] {
        let mut client = Client::connect(&server.http()).unwrap();
        send(&mut client, &head(target, "Content-Length: 3\r\nExpect: 100-continue\r\nConnection: close\r\n"));
        let first = client.head().unwrap().0;
        let _ = client.stream.get_mut().write_all(b"abc"); // the server may have closed the connection
        let mut rest = String::new();
        let _ = client.stream.read_to_string(&mut rest);
        let final_heads = rest.matches("HTTP/1.1 ").count();
        assert!(!rest.contains("HTTP/1.1 100 "), "{target}: {first}, then {rest}");
        assert_eq!(final_heads, usize::from(first == 100), "{target}: {first}, then {rest}");
    }
    server.stop();
}

#[test]
fn a_response_longer_than_its_length_is_logged_once_over_each_protocol() {
    let mut server = start(&["--log-rate", "0"]);
    // The announced length ends within a chunk of 5 bytes, between two chunks, and before the first chunk.
    for (target, body) in [("/claim/7/5000", "xxxxxxx"), ("/claim/5/50", "xxxxx"), ("/claim/0/5", "")] {
        let asked = |protocol: &str| format!("{target}?{protocol}");
        assert_eq!(http::get(&server.http(), &asked("http")).unwrap().text(), body, "{target}");
        let mut client = fastcgi::Client::connect(&server.binds[1]).unwrap();
        assert_eq!(client.request("GET", &asked("fastcgi"), b"").unwrap().body(), body.as_bytes(), "{target}");
        let mut stream = common::raw::connect(&server.binds[2]);
        assert_eq!(common::raw::ask(&mut stream, &scgi::head("GET", &asked("scgi"), "0")).0, 200, "{target}");
        let mut client = http2::Client::connect(&server.http()).unwrap();
        client.send(&http2::head(1, http2::END_STREAM, "GET", &asked("h2"), &[])).unwrap();
        let mut received = Vec::new();
        while let Ok(frame) = client.next(http2::DATA) {
            received.extend(frame.payload);
            if frame.flags & http2::END_STREAM != 0 {
                break;
            }
        }
        assert_eq!(String::from_utf8_lossy(&received), body, "{target}");
        let mut command = Command::new(program("crashy"));
        command.env_clear().env("GATEWAY_INTERFACE", "CGI/1.1").env("REQUEST_METHOD", "GET");
        let output = command.env("REQUEST_URI", target).env("SERVER_PROTOCOL", "HTTP/1.1").output_in_time().unwrap();
        assert!(String::from_utf8_lossy(&output.stdout).ends_with(&format!("\r\n\r\n{body}")), "{target}");
        assert_eq!(String::from_utf8_lossy(&output.stderr).matches("longer than its").count(), 1, "{target}");
    }
    server.stop();
    let log = server.log();
    for target in ["/claim/7/5000", "/claim/5/50", "/claim/0/5"] {
        for protocol in ["http", "fastcgi", "scgi", "h2"] {
            let request = format!("request=\"GET {target}?{protocol}\"");
            let lines = log.lines().filter(|line| line.contains("longer than its") && line.contains(&request));
            assert_eq!(lines.count(), 1, "{target} {protocol}:\n{log}");
        }
    }
}
