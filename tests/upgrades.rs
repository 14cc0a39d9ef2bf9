//! Connections that switch to a different protocol: WebSockets with axum's handler, and other 101 responses.

#![allow(clippy::unwrap_used, reason = "a failing test reports its location")]

#[path = "common/browser.rs"]
mod browser;
mod common;

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{Shutdown, TcpStream};
use std::process::Command;

use common::limit::InTime as _;
use common::{Server, fastcgi, http, http2, program, scgi, wait_until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tungstenite::protocol::frame::coding::CloseCode;
use tungstenite::{Message, WebSocket};

const ONE_WORKER: [&str; 4] = ["--bind", "http:127.0.0.1:0", "--workers", "1"];

fn start(name: &str, arguments: &[&str]) -> Server {
    Server::start(name, &[&ONE_WORKER[..], arguments].concat())
}

fn websocket(server: &Server) -> WebSocket<TcpStream> {
    let stream = common::connect_tcp(server.http()).unwrap();
    tungstenite::client(format!("ws://{}/ws", server.http()), stream).unwrap().0
}

/// Requests an upgrade, with the bytes of `early` directly after the request, and reads the head of the response.
fn upgrade(server: &Server, target: &str, early: &str) -> (u16, TcpStream) {
    let mut client = http::Client::connect(&server.http()).unwrap();
    let request = format!("GET {target} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n{early}");
    client.stream.get_mut().write_all(request.as_bytes()).unwrap();
    let (status, headers) = client.head().unwrap();
    if status == 101 {
        let has = |name: &str, value: &str| headers.iter().any(|(n, v)| n == name && v.eq_ignore_ascii_case(value));
        assert!(has("connection", "upgrade") && has("upgrade", "echo"), "{headers:?}");
        assert!(
            !headers.iter().any(|(name, _)| name == "content-length" || name == "transfer-encoding"),
            "{headers:?}"
        );
    }
    let buffered = client.stream.buffer().to_vec();
    assert!(buffered.is_empty() || early.as_bytes().starts_with(&buffered) || status != 101);
    let mut stream = client.stream.get_ref().try_clone().unwrap();
    if status == 101 {
        let mut echo = vec![0; early.len() - buffered.len()];
        stream.read_exact(&mut echo).unwrap();
        assert_eq!([buffered, echo].concat(), early.as_bytes());
    }
    (status, stream)
}

#[track_caller]
fn echoes(stream: &mut TcpStream, text: &str) {
    stream.write_all(text.as_bytes()).unwrap();
    let mut echo = vec![0; text.len()];
    stream.read_exact(&mut echo).unwrap();
    assert_eq!(echo, text.as_bytes());
}

/// Returns the number of connections of the only worker, and the number of its requests that are streams, from the scoreboard.
fn counts(server: &Server) -> (u32, u32) {
    let row = server.segment().scoreboard().read(0).expect("the worker has a row");
    (row.connections, row.streams)
}

#[test]
fn an_axum_websocket_handler_works_unchanged() {
    let directory = tempfile::tempdir().unwrap();
    let log = directory.path().join("access");
    let mut server = start("websocket", &["--access-log", log.to_str().unwrap()]);
    let mut socket = websocket(&server);
    for message in [Message::text("hello"), Message::binary(vec![7; 1 << 20]), Message::text("")] {
        socket.send(message.clone()).unwrap();
        assert_eq!(socket.read().unwrap(), message);
    }
    socket.send(Message::Ping(b"x".as_slice().into())).unwrap();
    assert_eq!(socket.read().unwrap(), Message::Pong(b"x".as_slice().into()));
    assert_eq!(counts(&server), (1, 1), "the upgraded connection counts as a connection and a stream");
    socket.close(None).unwrap();
    assert!(matches!(socket.read(), Ok(Message::Close(_))));
    drop(socket);
    wait_until("the upgraded connection is closed", || (counts(&server) == (0, 0)).then_some(()));
    server.stop();
    let lines = std::fs::read_to_string(&log).unwrap();
    let (_, rest) = lines.split_once("\"GET /ws HTTP/1.1\" 101 ").expect(&lines);
    let bytes: usize = rest.split(' ').next().unwrap().parse().unwrap();
    assert!((1 << 20..(1 << 20) + 100).contains(&bytes), "the bytes sent to the client are logged: {lines}");
}

#[test]
fn a_browser_reconnects_its_websocket_after_a_reload() {
    let mut server = start("websocket", &[]);
    let mut browser = browser::Browser::start("");
    browser.open(&format!("http://{}/", server.http()));
    browser.wait_for("window.socket && socket.readyState == 1");
    browser.evaluate("socket.send('over and out')");
    browser.wait_for("document.querySelector('pre').textContent.includes('over and out')");
    // A reload makes the worker close the WebSocket (1001), and the page reconnects to the new worker.
    server.signal(Signal::SIGHUP);
    browser.wait_for("document.querySelector('pre').textContent.includes('closed: 1001')");
    browser.wait_for("socket.readyState == 1");
    drop(browser);
    server.stop();
}

#[test]
fn any_protocol_can_be_switched_to_and_each_direction_ends_separately() {
    let mut server = start("scenarios", &[]);
    let (status, mut stream) = upgrade(&server, "/upgrade", "what came with the request");
    assert_eq!(status, 101);
    let long = "0123456789".repeat(100_000);
    let mut write = stream.try_clone().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            write.write_all(long.as_bytes()).unwrap();
            write.shutdown(Shutdown::Write).unwrap();
        });
        let mut echo = String::new();
        stream.read_to_string(&mut echo).unwrap();
        assert!(echo == long, "{} bytes", echo.len());
    });
    // This client disconnects immediately.
    drop(upgrade(&server, "/upgrade", ""));
    wait_until("the upgraded connections are closed", || (counts(&server) == (0, 0)).then_some(()));
    server.stop();
}

#[test]
fn a_101_without_an_upgrade_request_is_an_error_with_a_reason() {
    let mut server = start("scenarios", &[]);
    for headers in ["", "Upgrade: echo\r\n", "Connection: Upgrade\r\n"] {
        let mut client = http::Client::connect(&server.http()).unwrap();
        for (target, status) in [("/switch", 500), ("/upgrade", 426)] {
            let request = format!("GET {target} HTTP/1.1\r\nHost: x\r\n{headers}\r\n");
            client.stream.get_mut().write_all(request.as_bytes()).unwrap();
            assert_eq!(client.response(false).unwrap().status, status, "{target} {headers}");
        }
        server.wait_for("cannot send a response with this status: the request does not offer an upgrade");
    }
    // HTTP/1.0 has no upgrades (RFC 9110, section 7.8).
    let mut client = http::Client::connect(&server.http()).unwrap();
    client
        .stream
        .get_mut()
        .write_all(b"GET /upgrade HTTP/1.0\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n")
        .unwrap();
    assert_eq!(client.response(false).unwrap().status, 426);
    // The response must contain the new protocol.
    assert_eq!(upgrade(&server, "/switch-to-nothing", "").0, 500);
    server.wait_for("a response has status 101 Switching Protocols but no Upgrade header");
    server.stop();
}

#[test]
fn a_response_that_switches_protocols_has_no_length() {
    let mut server = start("scenarios", &[]);
    for method in ["GET", "HEAD"] {
        let mut client = http::Client::connect(&server.http()).unwrap();
        let target = "/raw/101?upgrade=echo&content-length=5&transfer-encoding=chunked";
        let request = format!("{method} {target} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n");
        client.stream.get_mut().write_all(request.as_bytes()).unwrap();
        let (status, headers) = client.head().unwrap();
        assert_eq!(status, 101);
        assert!(
            !headers.iter().any(|(name, _)| name == "content-length" || name == "transfer-encoding"),
            "{headers:?}"
        );
    }
    let mut client = http2::Client::connect(&server.http()).unwrap();
    client.send(&http2::connect(1, "echo", "/raw/200?content-length=5&transfer-encoding=chunked", &[])).unwrap();
    assert!(client.next(http2::HEADERS).unwrap().payload.starts_with(http2::status(200)));
    server.stop();
}

#[test]
fn an_upgrade_begins_after_the_body_of_its_request() {
    let mut server = start("scenarios", &[]);
    let (length, chunked) = ("Content-Length: 5\r\n", "Transfer-Encoding: chunked\r\n");
    let expect = "Expect: 100-continue\r\n";
    for (fields, body, statuses) in [
        (expect.to_owned(), "", &[101][..]),
        (length.to_owned(), "hello", &[101]),
        (chunked.to_owned(), "5\r\nhello\r\n0\r\n\r\n", &[101]),
        (format!("{length}{expect}"), "hello", &[100, 101]),
        (format!("{chunked}{expect}"), "5\r\nhello\r\n0\r\n\r\n", &[100, 101]),
        // After such a body, it is unknown where the other protocol begins.
        (chunked.to_owned(), "x\r\n", &[400]),
        (length.to_owned(), "", &[400]),
        (format!("{length}{expect}"), "hell", &[100, 400]),
    ] {
        let mut client = http::Client::connect(&server.http()).unwrap();
        let head = format!("POST /upgrade HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: echo\r\n{fields}\r\n");
        client.stream.get_mut().write_all(head.as_bytes()).unwrap();
        let (last, interim) = statuses.split_last().unwrap();
        for status in interim {
            assert_eq!(client.head().unwrap().0, *status, "{fields}{body}");
        }
        client.stream.get_mut().write_all(body.as_bytes()).unwrap();
        if *last == 101 {
            assert_eq!(client.head().unwrap().0, 101, "{fields}{body}");
            echoes(client.stream.get_mut(), "the other protocol");
        } else {
            let response = client.response(false).unwrap();
            assert_eq!((response.status, response.header("connection")), (*last, Some("close")), "{fields}{body}");
        }
    }
    server.stop();
}

#[test]
fn over_fastcgi_scgi_and_cgi_no_upgrade_is_offered_to_the_application() {
    let wishes = [("HTTP_CONNECTION", "Upgrade"), ("HTTP_UPGRADE", "echo")];
    let mut server = Server::start("scenarios", &["--bind", "fastcgi:127.0.0.1:0,scgi:127.0.0.1:0", "--workers", "1"]);
    for (target, status) in [("/upgrade", 426), ("/switch", 500)] {
        let mut client = fastcgi::Client::connect(&server.binds[0]).unwrap();
        let mut records = fastcgi::head(1, true, "GET", target, None);
        let more: Vec<u8> = wishes.iter().flat_map(|(name, value)| fastcgi::pair(name, value)).collect();
        records.insert(2, fastcgi::record(fastcgi::PARAMS, 1, &more, 0));
        records.push(fastcgi::record(fastcgi::STDIN, 1, b"", 0));
        client.send(&records).unwrap();
        assert_eq!(client.response(1).unwrap().status(), status, "FastCGI {target}");

        let mut stream = common::raw::connect(&server.binds[1]);
        let response = common::raw::ask(&mut stream, &scgi::head("GET", target, "0"));
        assert_eq!(response.0, status, "SCGI {target}");

        let mut command = Command::new(program("scenarios"));
        command.env_clear().env("GATEWAY_INTERFACE", "CGI/1.1").env("REQUEST_METHOD", "GET").envs(wishes);
        let output = command.env("REQUEST_URI", target).env("SERVER_PROTOCOL", "HTTP/1.1").output_in_time().unwrap();
        assert!(output.stdout.starts_with(format!("Status: {status} ").as_bytes()), "CGI {target}");
        let why = "the request does not offer an upgrade";
        assert_eq!(String::from_utf8_lossy(&output.stderr).contains(why), status == 500);
        if status == 500 {
            server.wait_for(why);
        }
    }
    server.stop();
}

#[test]
fn a_drain_lets_upgraded_connections_continue_and_ends_them_without_a_reset() {
    for stops in [false, true] {
        let mut server = start("scenarios", &["--drain-timeout", "4s"]);
        let old = server.workers();
        let (_, mut stream) = upgrade(&server, "/upgrade", "");
        server.signal(if stops { Signal::SIGTERM } else { Signal::SIGHUP });
        if stops {
            wait_until("the worker is draining", || {
                let row = server.segment().scoreboard().read(0)?;
                (row.state == forkyard_shm::State::Draining).then_some(())
            });
        } else {
            wait_until("the new worker is ready", || (server.workers().len() == 2).then_some(()));
        }
        echoes(&mut stream, "still here");
        let mut rest = Vec::new();
        stream.read_to_end(&mut rest).expect("the stream ends without a reset");
        assert_eq!(rest, b"");
        drop(stream);
        if stops {
            assert_eq!(server.wait_end(), Some(0));
        } else {
            server.renewed(1, &old);
            server.stop();
        }
        assert!(!server.log().contains("KILL"), "it left by itself:\n{}", server.log());
    }
}

#[test]
fn a_websocket_handler_can_send_a_close_frame_when_its_worker_drains() {
    let mut server = start("websocket", &[]);
    let mut socket = websocket(&server);
    server.signal(Signal::SIGTERM);
    let Ok(Message::Close(Some(goodbye))) = socket.read() else { panic!("the client sent no close frame") };
    assert_eq!(goodbye.code, CloseCode::Away);
    while socket.read().is_ok() {}
    assert_eq!(server.wait_end(), Some(0));
}

#[test]
fn an_upgraded_connection_ends_when_its_worker_dies() {
    let mut server = start("scenarios", &[]);
    let old = server.workers();
    let (_, mut stream) = upgrade(&server, "/upgrade", "");
    echoes(&mut stream, "alive");
    old.iter().for_each(|&pid| kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap());
    match stream.read(&mut [0; 10]) {
        Ok(count) => assert_eq!(count, 0),
        Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset),
    }
    server.renewed(1, &old);
    let (_, mut stream) = upgrade(&server, "/upgrade", "");
    echoes(&mut stream, "the next worker");
    drop(stream);
    server.stop();
}

#[test]
fn request_timeouts_do_not_apply_to_upgraded_connections() {
    let short = ["--idle-timeout", "1s", "--header-timeout", "1s", "--body-timeout", "1s", "--request-timeout", "1s"];
    let mut server = start("scenarios", &short);
    let (_, mut upgraded) = upgrade(&server, "/upgrade", "");
    for round in 0..2 {
        // The closing of an idle connection shows that the timeout has passed.
        let mut idle = http::Client::connect(&server.http()).unwrap();
        idle.request("GET", "/empty", b"").unwrap();
        assert_eq!(idle.stream.read(&mut [0]).unwrap(), 0);
        echoes(&mut upgraded, &format!("round {round}"));
    }
    drop(upgraded);
    server.stop();

    let mut server = start("scenarios", &["--upgraded-timeout", "1s"]);
    let (_, mut upgraded) = upgrade(&server, "/upgrade", "");
    echoes(&mut upgraded, "and then nothing");
    assert_eq!(upgraded.read(&mut [0; 10]).unwrap(), 0, "the upgraded connection was idle for too long");
    server.stop();
}

#[test]
fn an_upgrade_may_be_the_last_allowed_request_on_a_connection() {
    let mut server = start("scenarios", &["--max-requests-per-connection", "1"]);
    let (status, mut stream) = upgrade(&server, "/upgrade", "");
    assert_eq!(status, 101);
    echoes(&mut stream, "x");
    drop(stream);
    server.stop();
}

/// Returns a frame from a client, masked with a zero mask.
fn masked(text: &str) -> Vec<u8> {
    [&[0x81, 0x80 | u8::try_from(text.len()).unwrap(), 0, 0, 0, 0][..], text.as_bytes()].concat()
}

#[test]
fn a_websocket_works_over_http_2() {
    let directory = tempfile::tempdir().unwrap();
    let log = directory.path().join("access");
    let mut server = start("websocket", &["--access-log", log.to_str().unwrap(), "--drain-timeout", "60s"]);
    let mut client = http2::Client::connect(&server.http()).unwrap();
    // RFC 8441: SETTINGS_ENABLE_CONNECT_PROTOCOL (8) is 1.
    let settings = client.frame().unwrap();
    assert_eq!(settings.kind, http2::SETTINGS);
    assert!(settings.payload.chunks(6).any(|setting| setting == [0, 8, 0, 0, 0, 1]), "{settings:?}");
    client.send(&http2::connect(1, "websocket", "/ws", &[("sec-websocket-version", "13")])).unwrap();
    assert!(client.next(http2::HEADERS).unwrap().payload.starts_with(http2::status(200)));
    client.send(&http2::frame(http2::DATA, 0, 1, &masked("hello"))).unwrap();
    assert_eq!(client.next(http2::DATA).unwrap().payload, b"\x81\x05hello");
    assert_eq!(counts(&server), (1, 1));
    // Other streams on the connection are not affected by the tunnel, and do not affect it.
    client.send(&http2::head(3, http2::END_STREAM, "GET", "/", &[])).unwrap();
    assert_eq!(client.next(http2::HEADERS).unwrap().stream, 3);
    client.send(&http2::frame(http2::DATA, 0, 1, &masked("again"))).unwrap();
    while client.next(http2::DATA).unwrap().payload != b"\x81\x05again" {}
    // When the worker exits, the application sends a close frame and the stream ends.
    server.signal(Signal::SIGTERM);
    let goodbye = client.next(http2::DATA).unwrap();
    assert_eq!((goodbye.stream, &goodbye.payload[2..4]), (1, &1001_u16.to_be_bytes()[..]));
    let last = client.next(http2::DATA).unwrap();
    assert_eq!((last.stream, last.flags & http2::END_STREAM), (1, http2::END_STREAM));
    client.send(&http2::frame(http2::DATA, http2::END_STREAM, 1, b"")).unwrap();
    while client.next(http2::GOAWAY).is_ok() {} // the client acknowledges the server's PING
    assert_eq!(server.wait_end(), Some(0));
    let lines = std::fs::read_to_string(&log).unwrap();
    assert!(lines.contains("\"CONNECT /ws HTTP/2.0\" 200 "), "{lines}");
}
