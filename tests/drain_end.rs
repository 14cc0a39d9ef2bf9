//! The end of a drain: clients that neither read nor send do not keep a worker running until it is killed.

#![allow(clippy::unwrap_used, reason = "a failing test reports its location")]

mod common;

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use common::raw::{self, Protocol};
use common::{Server, fastcgi, http2, wait_until};
use nix::sys::signal::Signal;

const BINDS: [(Protocol, &str); 3] = [
    (Protocol::Http, "http:127.0.0.1:0"),
    (Protocol::FastCgi, "fastcgi:127.0.0.1:0"),
    (Protocol::Scgi, "scgi:127.0.0.1:0"),
];
const LENGTH: &str = "67108864";

/// Starts the example with one worker, a short drain timeout, and an access log.
fn start(name: &str, directory: &tempfile::TempDir) -> (Server, std::path::PathBuf) {
    let log = directory.path().join("access");
    let mut arguments = vec!["--workers", "1", "--drain-timeout", "6s", "--access-log", log.to_str().unwrap()];
    arguments.extend(BINDS.iter().flat_map(|(_, bind)| ["--bind", bind]));
    (Server::start(name, &arguments), log)
}

/// Waits until the worker has `count` requests in flight.
fn wait_for_requests(server: &Server, count: usize) {
    wait_until("all requests are in flight", || {
        let row = server.segment().scoreboard().read(0)?;
        (row.in_flight + row.streams == u32::try_from(count).unwrap()).then_some(())
    });
}

/// Reloads the server. Checks that the old worker exits on its own and logs a line for each request.
fn leaves_by_itself(mut server: Server, log: &std::path::Path, requests: &[(&str, usize)]) {
    server.signal(Signal::SIGHUP);
    server.wait_for("worker exited");
    let all = server.log();
    assert!(!all.contains("did not finish in time") && !all.contains("KILL"), "{all}");
    let lines = std::fs::read_to_string(log).unwrap();
    for &(what, count) in requests {
        assert_eq!(lines.matches(what).count(), count, "{what}: {lines}");
    }
    server.stop();
}

/// Sends until the peer accepts no more data.
fn fill(stream: &mut UnixStream, bytes: &[u8]) {
    stream.set_write_timeout(Some(Duration::from_millis(300))).unwrap();
    while stream.write_all(bytes).is_ok() {}
}

#[test]
fn upgraded_connections_whose_clients_do_not_read_end_before_the_worker_would_be_killed() {
    let directory = tempfile::tempdir().unwrap();
    let (server, log) = start("scenarios", &directory);
    let head = b"GET /upgrade HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n";
    let open = || {
        let mut stream = raw::connect(&server.binds[0]);
        assert_eq!(raw::ask(&mut stream, head).0, 101);
        fill(&mut stream, &[b'x'; 64 << 10]);
        stream
    };
    let _streams: Vec<UnixStream> = (0..6).map(|_| open()).collect();
    wait_for_requests(&server, 6);
    leaves_by_itself(server, &log, &[("\"GET /upgrade HTTP/1.1\" 101 ", 6)]);
}

#[test]
fn a_websocket_over_http_2_whose_window_is_closed_ends_before_the_worker_would_be_killed() {
    let directory = tempfile::tempdir().unwrap();
    let (server, log) = start("websocket", &directory);
    let mut client = http2::Client::connect(&server.http()).unwrap();
    // SETTINGS_INITIAL_WINDOW_SIZE
    client.send(&http2::frame(http2::SETTINGS, 0, 0, &[0, 4, 0, 0, 0, 0])).unwrap();
    client.send(&http2::connect(1, "websocket", "/ws", &[("sec-websocket-version", "13")])).unwrap();
    assert!(client.next(http2::HEADERS).unwrap().payload.starts_with(http2::status(200)));
    let hello = [&[0x81, 0x85, 0, 0, 0, 0][..], b"hello"].concat();
    client.send(&http2::frame(http2::DATA, 0, 1, &hello)).unwrap();
    leaves_by_itself(server, &log, &[("\"CONNECT /ws HTTP/2.0\" 200 ", 1)]);
}

#[test]
fn unread_responses_end_before_the_worker_would_be_killed() {
    let directory = tempfile::tempdir().unwrap();
    let (server, log) = start("scenarios", &directory);
    let target = format!("/bytes/{LENGTH}");
    let mut streams = Vec::new();
    for (index, (protocol, _)) in BINDS.iter().enumerate() {
        let mut stream = raw::connect(&server.binds[index]);
        assert_eq!(raw::ask(&mut stream, &protocol.head("GET", &target, 0)).0, 200);
        streams.push(stream);
    }
    // The HTTP/2 windows stay closed, but the second response fits into the send buffer.
    let mut client = http2::Client::connect(&server.http()).unwrap();
    client.send(&http2::head(1, http2::END_STREAM, "GET", &target, &[])).unwrap();
    client.next(http2::DATA).unwrap();
    let mut small = http2::Client::connect(&server.http()).unwrap();
    small.send(&http2::head(1, http2::END_STREAM, "GET", "/bytes/100000", &[])).unwrap();
    small.next(http2::DATA).unwrap();
    wait_for_requests(&server, 5);
    leaves_by_itself(server, &log, &[(&format!("\"GET {target} HTTP/"), 4), ("\"GET /bytes/100000 HTTP/2.0\"", 1)]);
    drop((streams, client, small));
}

/// Opens idle connections to each bind, and connections whose requests were answered before their bodies were read.
fn idle_connections(server: &Server) -> (Vec<UnixStream>, fastcgi::Client) {
    let mut streams = Vec::new();
    for (index, (protocol, _)) in BINDS.iter().enumerate() {
        let bind = &server.binds[index];
        streams.push(raw::connect(bind)); // a new connection
        let mut unread = raw::connect(bind);
        assert_eq!(raw::ask(&mut unread, &protocol.head("POST", "/empty", 60000)).0, 200, "{protocol:?}");
        streams.push(unread);
    }
    let mut kept = raw::connect(&server.binds[0]);
    assert_eq!(raw::ask(&mut kept, &Protocol::Http.head("GET", "/empty", 0)).0, 200);
    let mut kept_fastcgi = fastcgi::Client::connect(&server.binds[1]).unwrap();
    kept_fastcgi.send(&fastcgi::head(1, true, "GET", "/empty", None)).unwrap();
    kept_fastcgi.send(&[fastcgi::record(fastcgi::STDIN, 1, b"", 0)]).unwrap();
    kept_fastcgi.response(1).unwrap();
    streams.extend([kept, raw::connect(&server.binds[0])]);
    (streams, kept_fastcgi)
}

/// Returns whether the worker exits on its own despite its idle connections.
fn leaves_its_idle_connections(signal: Signal, timeout: &str) -> bool {
    let binds = BINDS.iter().flat_map(|(_, bind)| ["--bind", bind]);
    let arguments: Vec<&str> = ["--workers", "1", "--drain-timeout", timeout].into_iter().chain(binds).collect();
    let mut server = Server::start("scenarios", &arguments);
    let streams = idle_connections(&server);
    server.signal(signal);
    let left = server.wait_for("worker exited");
    drop(streams);
    if signal == Signal::SIGHUP {
        server.stop();
    } else {
        assert_eq!(server.wait_end(), Some(0));
    }
    left.contains(" status=0 ")
}

#[test]
fn idle_connections_end_within_a_drain_timeout_shorter_than_their_grace() {
    for (signal, timeout) in [(Signal::SIGTERM, "1s"), (Signal::SIGHUP, "1s"), (Signal::SIGTERM, "2s")] {
        // On a busy machine, a worker may exceed the short timeout, but not in every attempt.
        assert!(
            (0..10).any(|_| leaves_its_idle_connections(signal, timeout)),
            "{signal} {timeout}: the worker was killed every time"
        );
    }
}

#[test]
fn an_unresponsive_idle_http_2_client_does_not_delay_a_drain() {
    let times = ["--drain-timeout", "1h", "--idle-timeout", "1h"];
    let mut server = Server::start("scenarios", &[&["--bind", BINDS[0].1, "--workers", "1"], &times[..]].concat());
    let mut deaf = http2::Client::connect(&server.http()).unwrap();
    deaf.send(&http2::head(1, http2::END_STREAM, "GET", "/empty", &[])).unwrap();
    while deaf.frame().unwrap().kind != http2::HEADERS {}
    server.signal(Signal::SIGHUP);
    assert!(server.wait_for("worker exited").contains(" status=0 "));
    while deaf.frame().unwrap().kind != http2::GOAWAY {}
    server.stop();
}

#[test]
fn stalled_uploads_are_answered_before_the_worker_would_be_killed() {
    let directory = tempfile::tempdir().unwrap();
    let (server, log) = start("scenarios", &directory);
    let mut streams = Vec::new();
    for (index, (protocol, _)) in BINDS.iter().enumerate() {
        let mut stream = raw::connect(&server.binds[index]);
        stream.write_all(&protocol.head("POST", "/sum", 9000)).unwrap();
        stream.write_all(&[b'x'; 100]).unwrap();
        streams.push(stream);
    }
    let mut http2 = http2::Client::connect(&server.http()).unwrap();
    http2.send(&http2::head(1, 0, "POST", "/sum", &[])).unwrap();
    http2.send(&http2::frame(http2::DATA, 0, 1, &[b'x'; 100])).unwrap();
    wait_for_requests(&server, 4);
    leaves_by_itself(server, &log, &[("\"POST /sum HTTP/1.1\" 408 ", 3), ("\"POST /sum HTTP/2.0\" 408 ", 1)]);
    assert!(http2.next(http2::HEADERS).unwrap().payload.starts_with(http2::status(408)));
    for (stream, (protocol, _)) in streams.iter_mut().zip(BINDS) {
        assert_eq!(raw::ask(stream, b"").0, 408, "{protocol:?}");
    }
}

/// Returns whether a client that reads slowly receives all of a response that the application has finished before the drain.
fn a_slow_reader_gets_it_all() -> bool {
    let directory = tempfile::tempdir().unwrap();
    let bind = format!("http:unix:{}", directory.path().join("a.sock").display());
    let mut server = Server::start("crashy", &["--bind", &bind, "--workers", "1"]);
    let mut stream = raw::connect(&server.binds[0]);
    let mut response = raw::ask(&mut stream, &Protocol::Http.head("GET", "/piece/4", 0)).1;
    wait_until("the application has finished", || {
        (server.segment().scoreboard().read(0)?.in_flight == 0).then_some(())
    });
    server.signal(Signal::SIGTERM);
    let mut part = [0; 64 << 10];
    // The reads take several seconds in total, so the worker checks its connections several times during this period.
    while let Ok(count @ 1..) = stream.read(&mut part) {
        response.extend_from_slice(&part[..count]);
        std::thread::sleep(Duration::from_millis(80));
    }
    assert_eq!(server.wait_end(), Some(0));
    let head = response.windows(4).position(|four| four == b"\r\n\r\n").unwrap();
    response.len() - head - 4 == 4 << 20
}

#[test]
fn a_response_that_is_still_being_read_is_not_cut_off_by_a_drain() {
    // On a busy machine, the client may read as little as a client that has stopped reading, but not in every attempt.
    assert!((0..5).any(|_| a_slow_reader_gets_it_all()), "the response was cut off every time");
}

/// The server reads the body before it sends the 101, and waits as long as the client is sending.
#[test]
fn an_upgrade_whose_body_arrives_slowly_ends_before_the_worker_would_be_killed() {
    let directory = tempfile::tempdir().unwrap();
    let (server, log) = start("scenarios", &directory);
    let mut stream = raw::connect(&server.binds[0]);
    let head =
        "POST /upgrade HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: echo\r\nContent-Length: 1000\r\n\r\n";
    stream.write_all(head.as_bytes()).unwrap();
    wait_for_requests(&server, 1);
    stream.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
    std::thread::scope(|scope| {
        // Sends a byte every half second, until there is a response.
        scope.spawn(|| while stream.write_all(b"x").is_ok() && stream.read(&mut [0; 64]).is_err_and(is_timeout) {});
        leaves_by_itself(server, &log, &[("\"POST /upgrade HTTP/1.1\" 400 ", 1)]);
    });
}

fn is_timeout(error: std::io::Error) -> bool {
    error.kind() == std::io::ErrorKind::WouldBlock
}
