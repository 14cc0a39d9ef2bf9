//! HTTP as bytes on a connection: requests that are served, requests that are rejected, and how hyper handles input that different parsers
//! interpret differently.

#![allow(clippy::unwrap_used, reason = "a failing test reports its location")]

mod common;

use std::io::{Read as _, Write as _};
use std::process::Command;

use common::http::Client;
use common::limit::InTime as _;
use common::{Server, http2};

const ONE_WORKER: [&str; 4] = ["--bind", "http:127.0.0.1:0", "--workers", "1"];
/// The request that an attacker tries to smuggle.
const NEXT: &str = "GET /next HTTP/1.1\r\nHost: x\r\n\r\n";

fn start(name: &str, arguments: &[&str]) -> Server {
    Server::start(name, &[&ONE_WORKER[..], arguments].concat())
}

/// Sends these bytes followed by [`NEXT`], and expects these statuses. If `open`, the last status must be that of the response to [`NEXT`];
/// otherwise the connection must be closed without such a response.
#[track_caller]
fn answered(address: &str, bytes: &str, statuses: &[u16], open: bool) {
    let mut client = Client::connect(address).unwrap();
    client.stream.get_mut().write_all(format!("{bytes}{NEXT}").as_bytes()).unwrap();
    let mut last = String::new();
    for status in statuses {
        let response = client.response(false).unwrap_or_else(|error| panic!("no {status} to {bytes:?}: {error}"));
        assert_eq!(response.status, *status, "{bytes:?}");
        last = response.text();
    }
    assert_eq!(last.starts_with("GET /next "), open, "{bytes:?} got {last:?}");
    if !open {
        let mut rest = Vec::new();
        // If the server left data unread, the close is a reset.
        let _ = client.stream.read_to_end(&mut rest);
        assert!(rest.is_empty(), "{bytes:?} was followed by {}", String::from_utf8_lossy(&rest));
    }
}

#[test]
fn an_ambiguous_message_is_rejected_or_is_the_last_on_its_connection() {
    let mut server = start("mirror", &[]);
    let post = "POST / HTTP/1.1\r\nHost: x\r\n";
    for (head, status) in [
        ("Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd", 400),
        ("Content-Length: 3, 3\r\n\r\nabc", 400),
        ("Content-Length: +3\r\n\r\nabc", 400),
        ("Content-Length: 0x3\r\n\r\nabc", 400),
        ("Content-Length: -1\r\n\r\nabc", 400),
        ("Content-Length: 3\r\n X: folded\r\n\r\nabc", 400),
        ("X: a\rb\r\n\r\n", 400),
        ("X: a\0b\r\n\r\n", 400),
        ("X : a\r\n\r\n", 400),
        ("no colon\r\n\r\n", 400),
        (": no name\r\n\r\n", 400),
        ("Transfer-Encoding: identity\r\n\r\n", 400),
        ("Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", 400),
        ("Transfer-Encoding: \u{b}chunked\r\n\r\n0\r\n\r\n", 400),
        ("Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n", 400),
        ("Transfer-Encoding: identity, chunked\r\n\r\n0\r\n\r\n", 501),
        ("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 501),
        // RFC 9112, section 6.1: Transfer-Encoding overrides Content-Length, and the server closes the connection.
        ("Content-Length: 60\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 200),
        ("Transfer-Encoding: chunked\r\nContent-Length: 60\r\n\r\n0\r\n\r\n", 200),
    ] {
        answered(&server.http(), &format!("{post}{head}"), &[status], false);
    }
    answered(&server.http(), "POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", &[400], false);
    // These requests are unambiguous.
    answered(&server.http(), &format!("{post}Content-Length: 3\r\nContent-Length: 3\r\n\r\nabc"), &[200, 200], true);
    answered(&server.http(), "GET / HTTP/1.1\nHost: x\n\n", &[200, 200], true);
    answered(&server.http(), "\r\nGET / HTTP/1.1\r\nHost: x\r\n\r\n", &[200, 200], true);
    server.stop();
}

#[test]
fn chunks_are_read_strictly() {
    let mut server = start("mirror", &[]);
    let post = "POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n";
    for chunks in ["3\r\nabc\r\n0\r\n\r\n", "3;a=b;c=\"d\"\r\nabc\r\n00\r\n\r\n", "1\r\na\r\n2 \r\nbc\r\n0\r\n\r\n"] {
        let mut client = Client::connect(&server.http()).unwrap();
        client.stream.get_mut().write_all(format!("{post}{chunks}{NEXT}").as_bytes()).unwrap();
        assert!(client.response(false).unwrap().text().ends_with("\n\nabc"), "{chunks:?}");
        assert!(client.response(false).unwrap().text().starts_with("GET /next "), "{chunks:?}");
    }
    let long = format!("3;{}\r\nabc\r\n0\r\n\r\n", "x".repeat(40 << 10));
    for chunks in [
        "3;a\nabc\r\n0\r\n\r\n",
        "3\nabc\n0\n\n",
        "3\r\nabcd\r\n0\r\n\r\n",
        "0x3\r\nabc\r\n0\r\n\r\n",
        "-1\r\nabc\r\n0\r\n\r\n",
        "10000000000000000\r\nabc\r\n0\r\n\r\n",
        "\r\nabc\r\n0\r\n\r\n",
        &long,
    ] {
        let mut client = Client::connect(&server.http()).unwrap();
        client.stream.get_mut().write_all(format!("{post}{chunks}{NEXT}").as_bytes()).unwrap();
        assert_eq!(client.response(false).unwrap().text(), "the body was cut off\n", "{chunks:?}");
        let mut rest = Vec::new();
        let _ = client.stream.read_to_end(&mut rest);
        assert!(rest.is_empty(), "{chunks:?}");
    }
    server.stop();
}

#[test]
fn targets_and_hosts_are_validated() {
    let mut server = start("mirror", &[]);
    let get = |line: &str, rest: &str| format!("{line}\r\n{rest}\r\n");
    for (line, rest, status, open) in [
        ("GET / HTTP/1.1", "", 400, false),
        ("GET / HTTP/1.1", "Host: a\r\nHost: a\r\n", 400, false),
        ("GET / HTTP/1.1", "Host: a/b\r\n", 400, false),
        ("GET / HTTP/1.1", "Host:\r\n", 200, true),
        ("GET / HTTP/1.0", "", 200, false),
        ("GET / HTTP/1.0", "Connection: keep-alive\r\n", 200, true),
        // The server ignores a request to upgrade to HTTP/2: the response is HTTP/1.
        (
            "GET / HTTP/1.1",
            "Host: x\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n",
            200,
            true,
        ),
        ("GET relative HTTP/1.1", "Host: x\r\n", 400, false),
        ("GET /\u{b} HTTP/1.1", "Host: x\r\n", 400, false),
        ("CONNECT x:80 HTTP/1.1", "Host: x\r\n", 501, false),
        ("GET / HTTP/1.2", "Host: x\r\n", 400, false),
        ("GET / HTTP/2.0", "Host: x\r\n", 400, false),
        ("GE(T / HTTP/1.1", "Host: x\r\n", 400, false),
    ] {
        answered(
            &server.http(),
            &get(line, rest),
            if open { &[200, 200] } else { std::slice::from_ref(&status) },
            open,
        );
    }
    for (line, seen) in [
        ("GET http://y:80/a?b HTTP/1.1", "GET /a?b HTTP/1.1"),
        ("GET http://y:80 HTTP/1.1", "GET / HTTP/1.1"),
        ("OPTIONS * HTTP/1.1", "OPTIONS * HTTP/1.1"),
        ("TRACE / HTTP/1.1", "TRACE / HTTP/1.1"),
        ("BREW /tea HTTP/1.1", "BREW /tea HTTP/1.1"),
    ] {
        let mut client = Client::connect(&server.http()).unwrap();
        client.stream.get_mut().write_all(get(line, "Host: x\r\n").as_bytes()).unwrap();
        let text = client.response(false).unwrap().text();
        assert_eq!(text.lines().next(), Some(seen));
        let host = if line.contains("http:") { "\nhost: y:80\n" } else { "\nhost: x\n" };
        assert!(text.contains(host), "{text}");
    }
    server.stop();
}

#[test]
fn a_head_beyond_the_limits_is_rejected() {
    let mut server = start(
        "mirror",
        &["--max-headers", "20", "--max-uri", "100", "--max-params", "8K", "--max-body", "10", "--log-level", "debug"],
    );
    let head = |target: usize, count: usize, value: usize| {
        let (target, value) = ("a".repeat(target), "v".repeat(value));
        format!("GET /{target} HTTP/1.1\r\nHost: x\r\n{}\r\n", format!("h: {value}\r\n").repeat(count))
    };
    answered(&server.http(), &head(99, 19, 0), &[200, 200], true);
    answered(&server.http(), &head(100, 0, 0), &[414, 200], true);
    answered(&server.http(), &head(66_000, 0, 0), &[431], false);
    answered(&server.http(), &head(0, 20, 0), &[431], false);
    server.wait_for("an HTTP connection ended: message head is too large");
    answered(&server.http(), &head(0, 1, 9000), &[431], false);
    answered(&server.http(), "GET / HTTP/9.9\r\n\r\n", &[400], false);
    server.wait_for("an HTTP connection ended: invalid HTTP version parsed");
    answered(&server.http(), "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 11\r\n\r\n01234567890", &[413, 200], true);
    server.stop();

    // FastCGI has the same limits.
    let mut server = Server::start(
        "mirror",
        &["--bind", "fastcgi:127.0.0.1:0", "--workers", "1", "--max-headers", "2", "--max-uri", "100"],
    );
    let mut client = common::fastcgi::Client::connect(&server.binds[0]).unwrap();
    assert_eq!(client.request("GET", &format!("/{}", "a".repeat(99)), b"").unwrap().status(), 200);
    assert_eq!(client.request("GET", &format!("/{}", "a".repeat(100)), b"").unwrap().status(), 414);
    let mut params = common::fastcgi::head(1, true, "GET", "/", None);
    let more: Vec<u8> = ["HTTP_A", "HTTP_B"].iter().flat_map(|name| common::fastcgi::pair(name, "x")).collect();
    params.insert(2, common::fastcgi::record(common::fastcgi::PARAMS, 1, &more, 0));
    params.push(common::fastcgi::record(common::fastcgi::STDIN, 1, b"", 0));
    client.send(&params).unwrap();
    assert_eq!(client.response(1).unwrap().status(), 431);
    drop(client);
    server.stop();
}

#[test]
fn a_hundred_and_one_headers_are_too_many_by_default_and_can_be_allowed() {
    let head = format!("GET / HTTP/1.1\r\nHost: x\r\n{}\r\n", "h: v\r\n".repeat(100));
    let mut server = start("mirror", &[]);
    answered(&server.http(), &head, &[431], false);
    server.stop();
    let mut server = start("mirror", &["--max-headers", "101"]);
    answered(&server.http(), &head, &[200, 200], true);
    server.stop();
}

#[test]
fn a_client_that_expects_100_continue_gets_it() {
    let mut server = start("mirror", &[]);
    let mut client = Client::connect(&server.http()).unwrap();
    let head = "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\n";
    client.stream.get_mut().write_all(head.as_bytes()).unwrap();
    assert_eq!(client.head().unwrap().0, 100);
    client.stream.get_mut().write_all(b"abc").unwrap();
    assert!(client.response(false).unwrap().text().ends_with("\n\nabc"));
    drop(client);
    server.stop();
}

#[test]
fn an_http_1_0_client_gets_no_chunks() {
    let mut server = start("scenarios", &[]);
    for (target, length) in [("/stream/1000", None), ("/bytes/1000", Some("1000"))] {
        for keep in ["", "Connection: keep-alive\r\n"] {
            let mut client = Client::connect(&server.http()).unwrap();
            let head = format!("GET {target} HTTP/1.0\r\n{keep}\r\n");
            client.stream.get_mut().write_all(head.as_bytes()).unwrap();
            let response = client.response(false).unwrap();
            assert_eq!((response.status, response.body.len()), (200, 1000), "{target}");
            assert_eq!((response.header("transfer-encoding"), response.header("content-length")), (None, length));
        }
    }
    server.stop();
}

#[test]
fn trailers_go_both_ways() {
    let mut server = start("mirror", &[]);
    for (te, sent) in [("TE: trailers\r\n", true), ("", false)] {
        let mut client = Client::connect(&server.http()).unwrap();
        let head = format!("POST / HTTP/1.1\r\nHost: x\r\n{te}Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n");
        let body = "3\r\nabc\r\n0\r\nX-Sum: 7\r\n\r\n";
        client.stream.get_mut().write_all(format!("{head}{body}").as_bytes()).unwrap();
        let mut response = String::new();
        client.stream.read_to_string(&mut response).unwrap();
        assert!(response.contains("\nabc\nx-sum: 7\n"), "the application receives the trailers: {response}");
        assert_eq!(response.ends_with("0\r\nx-sum: 7\r\n\r\n"), sent, "{response}");
        assert_eq!(response.ends_with("0\r\n\r\n"), !sent, "{response}");
    }
    server.stop();
}

#[test]
fn a_connection_closes_after_the_maximum_number_of_requests() {
    let mut server = start("mirror", &["--max-requests-per-connection", "2"]);
    let mut client = Client::connect(&server.http()).unwrap();
    client.stream.get_mut().write_all(NEXT.repeat(3).as_bytes()).unwrap();
    assert_eq!(client.response(false).unwrap().header("connection"), None);
    assert_eq!(client.response(false).unwrap().header("connection"), Some("close"));
    let mut rest = Vec::new();
    let _ = client.stream.read_to_end(&mut rest);
    assert!(rest.is_empty(), "{}", String::from_utf8_lossy(&rest));

    let mut client = http2::Client::connect(&server.http()).unwrap();
    for stream in [1, 3] {
        client.send(&http2::head(stream, http2::END_STREAM, "GET", "/", &[])).unwrap();
        assert_eq!(client.next(http2::HEADERS).unwrap().stream, stream);
    }
    client.next(http2::GOAWAY).unwrap();
    server.stop();
}

fn curl(arguments: &[&str]) -> String {
    let output =
        Command::new("curl").args(["-sS", "--http2-prior-knowledge"]).args(arguments).output_in_time().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn http_2_without_tls_is_served_on_the_same_port() {
    let mut server = start("mirror", &["--max-params", "8K", "--max-uri", "1000", "--max-body", "1000"]);
    let url = format!("http://{}/a?b", server.http());
    let seen = curl(&["-i", "-d", "hello", "-H", "cookie: a=1", "-H", "cookie: b=2", &url]);
    for words in ["HTTP/2 200", "POST /a?b HTTP/2.0\n", "peer=127.0.0.1:", "\ncookie: a=1; b=2\n", "\n\nhello"] {
        assert!(seen.contains(words), "no {words:?} in {seen}");
    }
    assert!(seen.contains(&format!("\nhost: {}\n", server.http())), "{seen}");
    let status = |arguments: &[&str]| curl(&[arguments, &["-o", "/dev/null", "-w", "%{http_code}"]].concat());
    assert_eq!(status(&["-H", &format!("x: {}", "v".repeat(9000)), &url]), "431");
    assert_eq!(status(&[&format!("{url}{}", "c".repeat(1000))]), "414");
    // CONNECT has no path (RFC 9113, section 8.5). curl cannot send such a request.
    let mut client = http2::Client::connect(&server.http()).unwrap();
    let connect = b"\x02\x07CONNECT\x01\x04x:80";
    client.send(&http2::frame(http2::HEADERS, http2::END_HEADERS | http2::END_STREAM, 1, connect)).unwrap();
    assert!(client.next(http2::HEADERS).unwrap().payload.starts_with(http2::status(501)));
    // The server does not wait for the body of a rejected request. It sends RST_STREAM, so that the client need not send the body.
    client.send(&http2::head(3, 0, "POST", "/", &[("content-length", "1001")])).unwrap();
    assert!(client.next(http2::HEADERS).unwrap().payload.starts_with(http2::status(413)));
    let reset = client.next(http2::RST_STREAM).unwrap();
    assert_eq!((reset.stream, reset.payload), (3, vec![0; 4]), "NO_ERROR");
    drop(client);
    server.stop();
}

#[test]
fn a_preface_sent_in_parts_is_recognized() {
    let mut server = start("mirror", &[]);
    let mut stream = common::connect_tcp(server.http()).unwrap();
    stream.set_nodelay(true).unwrap();
    stream.set_read_timeout(Some(common::PATIENCE)).unwrap();
    for byte in [http2::PREFACE, &http2::frame(http2::SETTINGS, 0, 0, b"")].concat() {
        stream.write_all(&[byte]).unwrap();
    }
    let mut client = http2::Client { stream };
    client.send(&http2::head(1, http2::END_STREAM, "GET", "/", &[])).unwrap();
    assert!(client.next(http2::HEADERS).unwrap().payload.starts_with(http2::status(200)));
    drop(client);
    // Bytes that begin like the HTTP/2 preface and then differ from it are parsed as HTTP/1.
    answered(&server.http(), "PRI * HTTP/2.0\r\n\r\nSO\r\n\r\n", &[400], false);
    answered(&server.http(), "PRINT /paper HTTP/1.1\r\nHost: x\r\n\r\n", &[200, 200], true);
    server.stop();
}

#[test]
fn a_client_that_resets_streams_rapidly_is_disconnected() {
    let mut server = start("crashy", &["--log-level", "debug,h2=info,hyper=info"]);
    let mut client = http2::Client::connect(&server.http()).unwrap();
    let mut flood = Vec::new();
    for stream in (1..4000).step_by(2) {
        flood.extend(http2::head(stream, http2::END_STREAM, "GET", "/slow/60000", &[]));
        flood.extend(http2::frame(http2::RST_STREAM, 0, stream, &8_u32.to_be_bytes()));
    }
    let _ = client.send(&flood); // the server may close the connection
    server.wait_for("an HTTP connection ended: http2 error: connection error detected: detected excessive load");
    // The GOAWAY may be lost, because the close is a reset if the server left data unread.
    while client.frame().is_ok() {}
    server.stop();
}

#[test]
fn streams_beyond_the_limit_wait_or_are_refused() {
    let mut server = start("mirror", &["--max-multiplexed", "3"]);
    let mut client = http2::Client::connect(&server.http()).unwrap();
    let settings = client.next(http2::SETTINGS).unwrap().payload;
    let streams = settings.chunks(6).find(|setting| setting.starts_with(&[0, 3])).expect("MAX_CONCURRENT_STREAMS");
    assert_eq!(streams.get(2..), Some(&[0, 0, 0, 3][..]));
    for stream in [1, 3, 5, 7] {
        client.send(&http2::head(stream, 0, "POST", "/", &[])).unwrap();
    }
    let refused = client.next(http2::RST_STREAM).unwrap();
    assert_eq!((refused.stream, refused.payload), (7, 7_u32.to_be_bytes().to_vec()), "REFUSED_STREAM");
    for stream in [1, 3, 5] {
        client.send(&http2::frame(http2::DATA, http2::END_STREAM, stream, b"x")).unwrap();
        assert_eq!(client.next(http2::HEADERS).unwrap().stream, stream);
    }
    drop(client);
    server.stop();
}

#[test]
fn a_drain_finishes_the_streams_that_have_begun() {
    let mut server = start("crashy", &[]);
    let mut client = http2::Client::connect(&server.http()).unwrap();
    client.send(&http2::head(1, 0, "POST", "/echo", &[])).unwrap();
    client.send(&http2::frame(http2::DATA, 0, 1, b"one")).unwrap();
    assert_eq!(client.next(http2::DATA).unwrap().payload, b"one");
    server.signal(nix::sys::signal::Signal::SIGTERM);
    client.next(http2::GOAWAY).unwrap();
    client.send(&http2::frame(http2::DATA, http2::END_STREAM, 1, b"two")).unwrap();
    let mut body = Vec::new();
    loop {
        let frame = client.next(http2::DATA).unwrap();
        body.extend(frame.payload);
        if frame.flags & http2::END_STREAM != 0 {
            break;
        }
    }
    assert_eq!(body, b"two");
    while let Ok(frame) = client.next(http2::PING) {
        assert_eq!(frame.flags & http2::ACK, 0);
    }
    assert_eq!(server.wait_end(), Some(0), "{}", server.log());
}

#[test]
fn a_drain_does_not_wait_for_a_client_whose_protocol_is_still_unknown() {
    let mut server = start("mirror", &["--trust", "127.0.0.1"]);
    let mut half = common::connect_tcp(server.http()).unwrap();
    half.write_all(b"PR").unwrap(); // may become PRI, PROXY or PROPFIND
    common::http::get(&server.http(), "/").unwrap(); // the worker has accepted the first connection as well
    server.stop();
    drop(half);
}

#[test]
fn a_client_that_is_too_slow_is_disconnected_and_one_that_is_served_slowly_is_not() {
    let short = ["--idle-timeout", "1s", "--header-timeout", "1s", "--body-timeout", "1s"];
    let mut server = start("crashy", &[&short[..], &["--log-level", "debug,hyper=info,h2=info"]].concat());
    // No data, part of a preface, and half a head, each on a new connection and, except for the preface, after a first request.
    let cases = [("", ""), ("", "PRI"), ("", "GET / HTT"), (NEXT, ""), (NEXT, "GET / HTT")];
    let clients = cases.map(|(first, then)| {
        let mut client = Client::connect(&server.http()).unwrap();
        client.stream.get_mut().write_all(first.as_bytes()).unwrap();
        if first == NEXT {
            assert_eq!(client.response(false).unwrap().status, 404);
        }
        client.stream.get_mut().write_all(then.as_bytes()).unwrap();
        client
    });
    for (mut client, (_, then)) in clients.into_iter().zip(cases) {
        let mut rest = String::new();
        let _ = client.stream.read_to_string(&mut rest);
        let is_answered = rest.starts_with("HTTP/1.1 408 ");
        assert!(if then.is_empty() { rest.is_empty() } else { is_answered }, "{then:?}: {rest}");
    }
    let count = |what: &str| server.log().matches(&format!("cut off a connection: {what}")).count();
    let counts = || Some((count("it was idle (--idle-timeout)"), count("the client sent a request head too slowly")));
    common::wait_until("two clients were idle, and three had sent part of a head", || {
        counts().filter(|all| *all == (2, 3))
    });
    let mut client = Client::connect(&server.http()).unwrap();
    client.stream.get_mut().write_all(b"POST /count HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nhalf").unwrap();
    assert_eq!(client.response(false).unwrap().status, 408);

    // The application may take longer than these timeouts. The requests last longer than two ticks of the watchdog.
    assert_eq!(common::http::get(&server.http(), "/slow/2500").unwrap().status, 200);
    let mut client = http2::Client::connect(&server.http()).unwrap();
    client.send(&http2::head(1, http2::END_STREAM, "GET", "/slow/2500", &[])).unwrap();
    assert!(client.next(http2::HEADERS).unwrap().payload.starts_with(http2::status(200)));
    // From here on the client only replies to the server's frames.
    while client.next(http2::DATA).is_ok() {}
    server.wait_for("cut off a connection: it was idle (--idle-timeout)");
    server.stop();
}
