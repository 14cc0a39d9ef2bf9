//! How connections end: a response after which the connection is closed says so, and a body that the client breaks off is not logged
//! as an error of ours.

#![allow(clippy::unwrap_used, reason = "a test that fails here says where")]

mod common;

use std::io::{Read as _, Write as _};
use std::process::{Command, Stdio};

use common::fastcgi::{STDIN, record};
use common::http::{Client, Response};
use common::limit;
use common::{Server, fastcgi, http2, program, scgi};

const CHUNKED: &str = "Transfer-Encoding: chunked\r\n";
const BROKEN_OFF: &str = "refused: a body that broke off, or cannot be read status=400 protocol=";

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

/// Sends these bytes, and returns the response and what comes after it up to the end of the connection.
fn last_response(address: &str, bytes: &str) -> (Response, Vec<u8>) {
    let mut client = Client::connect(address).unwrap();
    send(&mut client, bytes);
    let response = client.response(false).unwrap_or_else(|error| panic!("no response to {bytes:.200?}: {error}"));
    let mut rest = Vec::new();
    let _ = client.stream.read_to_end(&mut rest); // with bytes of ours unread, it may be a reset
    (response, rest)
}

#[test]
fn a_response_after_which_the_connection_is_closed_says_so() {
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
        // Nobody asks this client for its body, so what follows the head is not known to be a body.
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

#[test]
fn a_small_body_that_nobody_reads_costs_no_connection() {
    let mut server = start(&["--max-body", "10"]);
    let mut client = Client::connect(&server.http()).unwrap();
    for (target, body, status) in [("/ok", "12345", 200), ("/nowhere", "12345", 404), ("/ok", "12345678901", 413)] {
        let response = client.request("POST", target, body.as_bytes()).unwrap();
        assert_eq!((response.status, response.header("connection")), (status, None), "{target} {body}");
    }
    // Nor if it comes after the response.
    send(&mut client, &head("/nowhere", "Content-Length: 5\r\n"));
    let response = client.response(false).unwrap();
    assert_eq!((response.status, response.header("connection")), (404, None));
    send(&mut client, "12345");
    assert_eq!(client.request("GET", "/ok", b"").unwrap().text(), "ok\n");
    drop(client);
    server.stop();
}

#[test]
fn a_broken_body_that_the_application_passes_on_is_a_400_and_no_error_of_ours() {
    let mut server = start(&[]);
    // Nothing of the response has been sent.
    let (response, _) = last_response(&server.http(), &format!("{}x\r\n", head("/echo", CHUNKED)));
    assert_eq!(response.status, 400);
    let mut client = fastcgi::Client::connect(&server.binds[1]).unwrap();
    let whole = [fastcgi::head(1, true, "POST", "/echo", Some(10)), vec![record(STDIN, 1, b"", 0)]].concat();
    client.send(&whole).unwrap(); // all at once: as soon as the worker waits for more, the response begins
    assert_eq!(client.response(1).unwrap().status(), 400);
    assert_eq!(client.request("GET", "/ok", b"").unwrap().body(), b"ok\n", "the connection is kept");
    server.wait_for(&format!("{BROKEN_OFF}fastcgi"));
    let mut client = scgi::Client::connect(&server.binds[2]).unwrap();
    client.stream.write_all(&scgi::head("POST", "/echo", "10")).unwrap();
    client.end_writing().unwrap();
    let mut bytes = Vec::new();
    let _ = client.stream.read_to_end(&mut bytes);
    server.wait_for(&format!("{BROKEN_OFF}scgi"));

    // A part of the response has been sent: the connection ends, and over HTTP/2 the stream.
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
fn a_broken_body_in_a_cgi_call_is_no_error_of_ours() {
    let mut command = Command::new(program("crashy"));
    command.env_clear().envs([("GATEWAY_INTERFACE", "CGI/1.1"), ("REQUEST_METHOD", "POST"), ("REQUEST_URI", "/echo")]);
    command.env("CONTENT_LENGTH", "10").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"abc").unwrap();
    let output = limit::output_of(child, "the program");
    let errors = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "a part of the response is all that there is");
    assert!(errors.contains("1 request refused: a body that broke off") && !errors.contains("ERROR"), "{errors}");
}

#[test]
fn no_100_follows_a_final_status() {
    let mut server = start(&[]);
    for target in ["/echo", "/count", "/ok", "/nowhere"] {
        let mut client = Client::connect(&server.http()).unwrap();
        send(&mut client, &head(target, "Content-Length: 3\r\nExpect: 100-continue\r\nConnection: close\r\n"));
        let first = client.head().unwrap().0;
        let _ = client.stream.get_mut().write_all(b"abc"); // it may have been closed
        let mut rest = String::new();
        let _ = client.stream.read_to_string(&mut rest);
        let final_heads = rest.matches("HTTP/1.1 ").count();
        assert!(!rest.contains("HTTP/1.1 100 "), "{target}: {first}, then {rest}");
        assert_eq!(final_heads, usize::from(first == 100), "{target}: {first}, then {rest}");
    }
    server.stop();
}
