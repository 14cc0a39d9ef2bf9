//! Over each protocol, a request that exceeds a limit is answered with the status for that limit.

#![allow(clippy::unwrap_used, reason = "a failing test reports its location")]

mod common;

use std::io::Write as _;
use std::net::Shutdown;

use common::raw::{self, ALL, Protocol};
use common::{fastcgi, scgi};

const LIMITS: [&str; 10] =
    ["--workers", "1", "--max-params", "8K", "--max-headers", "3", "--max-uri", "100", "--max-body", "1000"];

/// Returns a request with these headers and `Host`. Over SCGI, the request also contains the mandatory length, which counts as a header.
fn with_headers(protocol: Protocol, headers: &[(&str, &str)]) -> Vec<u8> {
    let variables = headers.iter().map(|(name, value)| (format!("HTTP_{name}"), *value));
    match protocol {
        Protocol::Http => {
            let lines: String = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
            format!("GET /ok HTTP/1.1\r\nHost: localhost\r\n{lines}\r\n").into_bytes()
        }
        Protocol::FastCgi => {
            let mut records = fastcgi::head(1, true, "GET", "/ok", None);
            let more: Vec<u8> = variables.flat_map(|(name, value)| fastcgi::pair(&name, value)).collect();
            records.insert(2, fastcgi::record(fastcgi::PARAMS, 1, &more, 0));
            records.push(fastcgi::record(fastcgi::STDIN, 1, b"", 0));
            records.concat()
        }
        Protocol::Scgi => {
            let variables: Vec<_> = variables.collect();
            let mut pairs =
                vec![("CONTENT_LENGTH", "0"), ("SCGI", "1"), ("REQUEST_METHOD", "GET"), ("REQUEST_URI", "/ok")];
            pairs.extend(variables.iter().map(|(name, value)| (name.as_str(), *value)));
            scgi::netstring(&pairs)
        }
    }
}

/// Returns a body of `length` bytes without a declared length, and the bytes that mark its end.
fn unannounced(protocol: Protocol, length: usize) -> (Vec<u8>, Vec<u8>) {
    let body = vec![b'x'; length];
    match protocol {
        Protocol::Http => {
            let head = "POST /count HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n";
            ([format!("{head}{length:x}\r\n").as_bytes(), &body, b"\r\n"].concat(), b"0\r\n\r\n".to_vec())
        }
        Protocol::FastCgi => {
            let mut records = fastcgi::head(1, true, "POST", "/count", None);
            records.push(fastcgi::record(fastcgi::STDIN, 1, &body, 0));
            (records.concat(), fastcgi::record(fastcgi::STDIN, 1, b"", 0))
        }
        // The end of the stream marks the end of the body.
        Protocol::Scgi => ([&scgi::head("POST", "/count", "-1"), &body[..]].concat(), Vec::new()),
    }
}

#[test]
fn a_request_beyond_a_limit_gets_the_status_for_the_limit() {
    let long = "v".repeat(8 << 10);
    let get = |protocol: Protocol, length: usize| protocol.head("GET", &format!("/{}", "a".repeat(length)), 0);
    for protocol in ALL {
        let mut server = protocol.start("crashy", &LIMITS);
        let status = |request: Vec<u8>| raw::ask(&mut raw::connect(&server.binds[0]), &request).0;
        let cases = [
            ("as many headers as there may be", with_headers(protocol, &[("A", "1"), ("B", "2")]), 200),
            ("one header more", with_headers(protocol, &[("A", "1"), ("B", "2"), ("C", "3")]), 431),
            ("a long header", with_headers(protocol, &[("A", &long)]), 431),
            ("as long a path as there may be", get(protocol, 99), 404),
            ("a longer one", get(protocol, 100), 414),
            ("a length that is too large", protocol.head("POST", "/count", 1001), 413),
        ];
        for (what, request, expected) in cases {
            assert_eq!(status(request), expected, "{protocol:?}: {what}");
        }
        for (length, expected) in [(1000, 200), (1001, 413)] {
            let mut stream = raw::connect(&server.binds[0]);
            let (begun, end) = unannounced(protocol, length);
            stream.write_all(&[begun, end].concat()).unwrap();
            if protocol == Protocol::Scgi {
                stream.shutdown(Shutdown::Write).unwrap();
            }
            let (status, _) = raw::ask(&mut stream, b"");
            assert_eq!(status, expected, "{protocol:?}: {length} bytes without a declared length");
        }
        // The rejected requests affected only their own connections.
        assert_eq!(status(protocol.head("GET", "/ok", 0)), 200, "{protocol:?}");
        server.stop();
    }
}

#[test]
fn a_body_whose_end_does_not_arrive_in_time_is_incomplete() {
    for protocol in ALL {
        let mut server = protocol.start("crashy", &["--workers", "1", "--body-timeout", "1s"]);
        let (begun, _) = unannounced(protocol, 3);
        let (status, _) = raw::ask(&mut raw::connect(&server.binds[0]), &begun);
        assert_eq!(status, 408, "{protocol:?}");
        server.wait_for("a body that arrived too slowly (--body-timeout) status=408");
        server.stop();
    }
}
