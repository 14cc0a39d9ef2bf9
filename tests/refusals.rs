//! Requests that cannot be parsed, over each protocol: the access log contains the client's address, and the log gives the reason for the
//! rejection.

#![allow(clippy::unwrap_used, reason = "a failing test reports its location")]

mod common;

use std::io::{Read as _, Write as _};
use std::path::Path;

use common::raw::connect;
use common::{Server, fastcgi, http2};
use tempfile::TempDir;

/// Starts a server with an access log in `directory`.
fn start(directory: &TempDir, bind: &str, arguments: &[&str]) -> Server {
    let log = directory.path().join("access");
    let common = ["--workers", "1", "--bind", bind, "--access-log", log.to_str().unwrap()];
    Server::start("mirror", &[&common, arguments].concat())
}

/// Sends bytes on a new connection, and returns all data that the server sends.
fn exchange(bind: &str, bytes: &[u8]) -> String {
    let mut stream = connect(bind);
    let mut write = stream.try_clone().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(move || drop(write.write_all(bytes))); // the server may stop reading early
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        let _ = stream.shutdown(std::net::Shutdown::Both);
        String::from_utf8_lossy(&answer).into_owned()
    })
}

/// Returns the statuses of the access log entries without a request line, sorted. Checks that each entry contains the client's address.
fn unread(directory: &Path) -> Vec<u16> {
    let lines = std::fs::read_to_string(directory.join("access")).unwrap();
    let rest = lines.lines().filter_map(|line| Some((line, line.split_once("] \"-\" ")?.1)));
    let mut statuses: Vec<u16> = rest
        .map(|(line, rest)| {
            assert!(line.starts_with("127.0.0.1 - - ["), "{line}");
            rest.split(' ').next().unwrap().parse().unwrap()
        })
        .collect();
    statuses.sort_unstable();
    statuses
}

#[test]
fn malformed_http_requests_are_in_both_logs() {
    let directory = tempfile::tempdir().unwrap();
    let mut server = start(&directory, "http:127.0.0.1:0", &[]);
    let get = |target: &str, headers: &str| format!("GET {target} HTTP/1.1\r\nHost: x\r\n{headers}\r\n").into_bytes();
    let long = |length| "x".repeat(length);
    let cases = [
        (get("/a<b", ""), 400, "invalid URI"),
        (
            b"\x16\x03\x01\x00\xf4\x01\x00\x00\xf0\x03\x03".to_vec(),
            400,
            "a TLS handshake on a port that speaks plain HTTP",
        ),
        (get("/", &format!("Cookie: {}\r\n", long(200 << 10))), 431, "a head larger than --max-params"),
        (get("/", "Content-Length: 18446744073709551615\r\n"), 431, "with a Content-Length above 2^64 - 3"),
        (get("/", "Content-Length: 3, 3\r\n"), 400, "invalid content-length"),
        (get(&format!("/{}", long(70 << 10)), ""), 414, "a target longer than --max-uri"),
        (get("/", "No colon\r\n"), 400, "invalid HTTP header"),
        (b"GET / HTTP/1.1\r\n\r\n".to_vec(), 400, "refused requests: no Host status"),
        (get("/", "Expect: a-miracle\r\n"), 417, "an Expect other than 100-continue"),
    ];
    for (bytes, status, why) in &cases {
        let answer = exchange(&server.binds[0], bytes);
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{why}: {answer}");
        let line = server.wait_for(why);
        assert!(line.contains("INFO") && line.contains("refused requests: ") && line.ends_with(" count=1"), "{line}");
        assert!(line.contains(&format!(" status={status} protocol=http from=127.0.0.1:")), "{line}");
    }
    for _ in 0..3 {
        exchange(&server.binds[0], &get("/", &"H: v\r\n".repeat(101)));
    }
    server.stop();
    let log = server.log();
    let is_combined = |line: &str| {
        line.contains("refused requests: a head larger than --max-params, or with more headers")
            && line.contains(" last_from=127.0.0.1:")
            && line.ends_with(" count=3")
    };
    assert!(log.lines().any(is_combined), "{log}");
    assert_eq!(unread(directory.path()), [400, 400, 400, 400, 400, 414, 417, 431, 431, 431, 431, 431]);
}

#[test]
fn malformed_http_2_requests_are_in_both_logs() {
    let directory = tempfile::tempdir().unwrap();
    let mut server = start(&directory, "http:127.0.0.1:0", &["--max-params", "8K"]);
    // The client sends a head that exceeds the limit and whose request line can be parsed, followed by a frame that is invalid in this
    // state.
    let mut client = http2::Client::connect(&server.http()).unwrap();
    let cookies: Vec<String> = (0..80).map(|number| format!("{number}{}", "v".repeat(100))).collect();
    let fields: Vec<(&str, &str)> = cookies.iter().map(|cookie| ("x", cookie.as_str())).collect();
    client.send(&http2::head(1, http2::END_STREAM, "GET", "/large", &fields)).unwrap();
    assert_eq!(client.next(http2::HEADERS).unwrap().stream, 1);
    server.wait_for("refused requests: headers larger than --max-params status=431");
    client.send(&http2::frame(http2::DATA, 0, 0, b"on the connection itself")).unwrap();
    while client.next(http2::GOAWAY).is_ok() {}
    server.wait_for("refused requests: http2 error: connection error detected");
    server.stop();
    assert_eq!(unread(directory.path()), [400]);
    let lines = std::fs::read_to_string(directory.path().join("access")).unwrap();
    assert!(lines.contains("\"GET /large HTTP/2.0\" 431 "), "{lines}");
}

#[test]
fn malformed_fastcgi_and_scgi_requests_are_in_both_logs() {
    let directory = tempfile::tempdir().unwrap();
    let mut server = start(&directory, "fastcgi:127.0.0.1:0,scgi:127.0.0.1:0", &["--max-params", "8K"]);
    let with_params = |params: &[u8]| {
        let mut records = fastcgi::head(1, false, "GET", "/", None);
        records.insert(2, fastcgi::record(fastcgi::PARAMS, 1, params, 0));
        records.push(fastcgi::record(fastcgi::STDIN, 1, b"", 0));
        records.concat()
    };
    let scgi = |pairs: &str| format!("{}:{pairs},", pairs.len()).into_bytes();
    let injected = "CONTENT_LENGTH\x000\0SCGI\x001\0REQUEST_METHOD\0GET\0REQUEST_URI\0/\0HTTP_X\0a\r\nb\0";
    for (bind, bytes, answer, why) in [
        (
            0,
            with_params(&fastcgi::pair("HTTP_X", "a\r\nX-Injected: b")),
            "Status: 400 ",
            "a header has an invalid value",
        ),
        (0, with_params(&[9, 9, b'x']), "Status: 400 ", "malformed parameters"),
        (0, with_params(&fastcgi::pair("X", &"x".repeat(9000))), "Status: 431 ", "parameters larger than --max-params"),
        (0, vec![7; 64], "", "the peer sent a record of version 7"),
        (1, b"this is not a netstring".to_vec(), "Status: 400 ", "the peer sent"),
        (1, scgi(injected), "Status: 400 ", "a header has an invalid value"),
        (1, b"9999999:".to_vec(), "Status: 431 ", "the peer sent"),
    ] {
        let came = exchange(&server.binds[bind], &bytes);
        assert!(came.contains(answer) && !came.contains("njected"), "{why}: {came}");
        let line = server.wait_for(why);
        let protocol = ["fastcgi", "scgi"][bind];
        assert!(
            line.contains("refused requests: ") && line.contains(&format!("protocol={protocol} from=127.")),
            "{line}"
        );
    }
    server.stop();
    assert_eq!(unread(directory.path()), [400, 400, 400, 400, 400, 431, 431]);
}

#[test]
fn a_head_that_does_not_arrive_in_time_is_answered_if_possible_and_logged() {
    let directory = tempfile::tempdir().unwrap();
    let bind = "http:127.0.0.1:0,fastcgi:127.0.0.1:0,scgi:127.0.0.1:0";
    let mut server = start(&directory, bind, &["--header-timeout", "1s"]);
    for (bind, bytes) in [(0, "GET / HT"), (0, "P"), (1, "\x01\x01\x00"), (2, "40:CONT")] {
        let answer = exchange(&server.binds[bind], bytes.as_bytes());
        if bind == 0 {
            assert!(answer.starts_with("HTTP/1.1 408 Request Timeout\r\n"), "{bytes:?}: {answer}");
            assert!(answer.contains("connection: close\r\n") && answer.contains("\r\ndate: "), "{answer}");
        } else {
            assert_eq!(answer, "");
        }
    }
    // A connection without any data is not counted as a request.
    server.stop();
    assert!(server.log().contains("within --header-timeout status=408 protocol=http from=127.0.0.1:"));
    assert_eq!(unread(directory.path()), [408; 4]);
}

#[test]
fn a_malformed_proxy_header_is_in_both_logs() {
    let directory = tempfile::tempdir().unwrap();
    let mut server = start(&directory, "http:127.0.0.1:0", &["--proxy-protocol", "127.0.0.1"]);
    assert_eq!(exchange(&server.binds[0], b"PROXY TCP4 nonsense\r\nGET / HTTP/1.1\r\nHost: x\r\n\r\n"), "");
    server.wait_for("refused requests: an invalid PROXY header (--proxy-protocol): the PROXY header is malformed");
    server.stop();
    assert_eq!(unread(directory.path()), [400]);
}
