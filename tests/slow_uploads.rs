//! A stalled upload fails, and affects no other request.

#![allow(clippy::unwrap_used, reason = "a failing test reports its location")]

mod common;

use std::collections::BTreeMap;
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use common::fastcgi::{END, STDIN, STDOUT, record};
use common::raw::{self, Protocol};
use common::{Server, accepted, fastcgi, http2, read_all};

/// Time between two pieces of a body that is sent slowly. The server waits for two seconds.
const PACE: Duration = Duration::from_millis(200);

/// Starts a server with an access log and a body timeout of one second.
fn start(protocol: Protocol) -> (Server, tempfile::TempDir) {
    let directory = tempfile::tempdir().unwrap();
    let log = directory.path().join("access.log");
    let times = ["--body-timeout", "1s", "--header-timeout", "1s"];
    let arguments = [&["--workers", "1", "--access-log", log.to_str().unwrap()], &times[..]].concat();
    (protocol.start("scenarios", &arguments), directory)
}

/// Returns the status of each request in the access log of a server that has stopped.
fn statuses(directory: &tempfile::TempDir) -> BTreeMap<String, String> {
    let lines = std::fs::read_to_string(directory.path().join("access.log")).unwrap();
    let fields = |line: &str| {
        let mut fields = line.split(['"', ' ']).filter(|field| !field.is_empty()).skip(6);
        let (target, _, status) = (fields.next()?, fields.next()?, fields.next()?);
        Some((target.to_owned(), status.to_owned()))
    };
    lines.lines().map(|line| fields(line).unwrap_or_else(|| panic!("{line}"))).collect()
}

/// Returns a target whose request blocks until the returned stream is dropped.
fn gate() -> (String, impl FnOnce() -> TcpStream) {
    let gate = TcpListener::bind("127.0.0.1:0").unwrap();
    let target = format!("/gate/{}", gate.local_addr().unwrap().port());
    (target, move || accepted(&gate, "the held request has begun"))
}

#[test]
fn a_stalled_upload_over_http2_fails_alone_and_is_logged_alone() {
    let (mut server, directory) = start(Protocol::Http);
    let mut client = http2::Client::connect(server.binds[0].trim_start_matches("http://")).unwrap();
    let (held, held_begins) = gate();
    client.send(&http2::head(1, http2::END_STREAM, "GET", &held, &[])).unwrap();
    let held_begins = held_begins();
    for (stream, target) in [(3, "/whole"), (5, "/echo")] {
        client.send(&http2::head(stream, 0, "POST", target, &[])).unwrap();
        client.send(&http2::frame(http2::DATA, 0, stream, b"abc")).unwrap();
    }
    let (mut answered, mut reset) = (false, false);
    while !(answered && reset) {
        let frame = client.frame().unwrap();
        match (frame.kind, frame.stream) {
            (http2::HEADERS, 3) => {
                assert!(frame.payload.starts_with(http2::status(408)), "{frame:?}");
                answered = true;
            }
            (http2::HEADERS, 5) => assert!(frame.payload.starts_with(http2::status(200)), "{frame:?}"),
            (http2::RST_STREAM, 5) => reset = true,
            (http2::RST_STREAM, 1) | (http2::GOAWAY, _) => panic!("{frame:?}"),
            _ => {}
        }
    }
    drop(held_begins);
    client.send(&http2::head(7, http2::END_STREAM, "GET", "/empty", &[])).unwrap();
    let (mut last, mut next) = (false, false);
    while !(last && next) {
        let frame = client.frame().unwrap();
        match (frame.kind, frame.stream) {
            (http2::DATA, 1) => last |= frame.payload == b"last\n",
            (http2::HEADERS, 7) => next = frame.payload.starts_with(http2::status(200)),
            (http2::RST_STREAM, 1) | (http2::GOAWAY, _) => panic!("{frame:?}"),
            _ => {}
        }
    }
    server.wait_for("a body that arrived too slowly (--body-timeout) status=408");
    drop(client);
    server.stop();
    let expected = [(&*held, "200"), ("/whole", "408"), ("/echo", "200"), ("/empty", "200")];
    assert_eq!(statuses(&directory), expected.map(|(target, status)| (target.to_owned(), status.to_owned())).into());
}

#[test]
fn uploads_that_wait_for_a_thread_leave_window_for_the_one_that_is_read() {
    let mut server = Protocol::Http.start("holds", &["--workers", "1", "--threads", "1"]);
    let mut client = http2::Client::connect(server.binds[0].trim_start_matches("http://")).unwrap();
    let update = client.next(http2::WINDOW_UPDATE).unwrap();
    assert_eq!(update.stream, 0, "the window update is for the connection");
    let mut window = 65_535 + u32::from_be_bytes(update.payload.try_into().unwrap());
    client.send(&http2::head(1, 0, "POST", "/count", &[])).unwrap();
    // The client sends all data that the server's window allows, except for one byte.
    let waiting: Vec<u32> = (3..128).step_by(2).collect();
    for &stream in &waiting {
        client.send(&http2::head(stream, 0, "POST", "/count", &[])).unwrap();
        for _ in 0..4 {
            let piece = (window - 1).min(16 << 10);
            if piece > 0 {
                window -= piece;
                client.send(&http2::frame(http2::DATA, 0, stream, &vec![b'x'; piece as usize])).unwrap();
            }
        }
    }
    let mut seen = Vec::new();
    for &stream in [1].iter().chain(&waiting) {
        assert!(window > 1, "the client cannot send data to the function that reads");
        client.send(&http2::frame(http2::DATA, http2::END_STREAM, stream, b"")).unwrap();
        seen.push(client.next(http2::HEADERS).unwrap());
    }
    assert!(seen.iter().all(|head| head.payload.starts_with(http2::status(200))), "{seen:?}");
    drop(client);
    server.stop();
}

#[test]
fn a_stalled_upload_over_multiplexed_fastcgi_fails_alone() {
    let (mut server, directory) = start(Protocol::FastCgi);
    let mut client = fastcgi::Client::connect(&server.binds[0]).unwrap();
    let (held, held_begins) = gate();
    client.send(&fastcgi::request(1, true, "GET", &held, b"")).unwrap();
    let held_begins = held_begins();
    client.send(&fastcgi::head(2, true, "POST", "/whole", Some(10))).unwrap();
    client.send(&[record(STDIN, 2, b"abc", 0)]).unwrap();
    let ended = |client: &mut fastcgi::Client, id| {
        let mut output = Vec::new();
        loop {
            let record = client.record().unwrap();
            match record.kind {
                STDOUT if record.id == id => output.extend(record.content),
                END if record.id == id => return String::from_utf8(output).unwrap(),
                _ => assert_eq!((record.id, record.kind), (1, STDOUT)),
            }
        }
    };
    let stalled = ended(&mut client, 2);
    assert!(stalled.starts_with("Status: 408"), "{stalled}");
    // Data of the failed request that arrives later is discarded.
    client.send(&[record(STDIN, 2, b"defghij", 0), record(STDIN, 2, b"", 0)]).unwrap();
    client.send(&fastcgi::request(3, true, "POST", "/whole", b"next")).unwrap();
    let next = ended(&mut client, 3);
    assert!(next.starts_with("Status: 200") && next.ends_with("next"), "{next}");
    drop(held_begins);
    assert!(ended(&mut client, 1).ends_with("last\n"));
    drop(client);
    server.stop();
    assert_eq!(statuses(&directory)[&held], "200");
}

#[test]
fn a_body_that_stalls_within_a_fastcgi_record_is_logged_as_one_request() {
    let (mut server, directory) = start(Protocol::FastCgi);
    let mut stream = raw::connect(&server.binds[0]);
    let (status, _) = raw::ask(&mut stream, &Protocol::FastCgi.head("POST", "/whole", 9000));
    assert_eq!(status, 408);
    let _ = read_all(&mut stream, &mut Vec::new()); // until the server closes the connection
    server.stop();
    assert!(!server.log().contains("--header-timeout"), "{}", server.log());
    assert_eq!(statuses(&directory), [("/whole".to_owned(), "408".to_owned())].into());
}

#[test]
fn an_idle_http2_connection_is_sent_a_goaway_before_it_closes() {
    let mut server = Protocol::Http.start("scenarios", &["--workers", "1", "--idle-timeout", "1s"]);
    let mut idle = http2::Client::connect(server.binds[0].trim_start_matches("http://")).unwrap();
    idle.send(&http2::head(1, http2::END_STREAM, "GET", "/empty", &[])).unwrap();
    assert!(idle.next(http2::HEADERS).unwrap().payload.starts_with(http2::status(200)));
    let goaway = idle.next(http2::GOAWAY).unwrap();
    assert_eq!(goaway.payload[4..8], [0; 4], "NO_ERROR");
    // The client answers PINGs until the connection closes.
    assert_eq!(idle.next(http2::DATA + 100).unwrap_err().kind(), ErrorKind::UnexpectedEof);
    // A connection whose client does not process the GOAWAY is closed too.
    let mut deaf = http2::Client::connect(server.binds[0].trim_start_matches("http://")).unwrap();
    while deaf.frame().is_ok() {}
    server.stop();
}

/// Sends a body steadily for longer than the server waits for a client that is silent, and then reads the response. Returns false if this
/// client was itself silent for too long, because the machine is busy.
fn sends_steadily_and_is_answered(protocol: Protocol, server: &Server) -> bool {
    let mut client = raw::connect(&server.binds[0]);
    client.write_all(&protocol.head("POST", "/early", 1_000_000)).unwrap();
    let (_silent, never) = std::sync::mpsc::channel::<()>();
    let (mut sent, mut longest) = (Ok(()), Duration::ZERO);
    for _ in 0..12 {
        let begun = Instant::now();
        let _ = never.recv_timeout(PACE);
        sent = sent.and_then(|()| client.write_all(&[b'x'; 64]));
        longest = longest.max(begun.elapsed());
    }
    if longest > 5 * PACE {
        return false;
    }
    sent.unwrap_or_else(|error| panic!("{protocol:?}: {error}"));
    let mut response = Vec::new();
    while !String::from_utf8_lossy(&response).contains("the body was not read\n") {
        let mut piece = [0; 4096];
        let count = client.read(&mut piece).unwrap_or_else(|error| panic!("{protocol:?}: {error}"));
        assert!(count > 0, "{protocol:?}: {}", String::from_utf8_lossy(&response));
        response.extend_from_slice(&piece[..count]);
    }
    true
}

/// Many clients send the whole body, at their own speed, before they read the response.
#[test]
fn a_response_to_a_body_that_is_not_read_reaches_a_client_that_is_still_sending() {
    std::thread::scope(|scope| {
        for protocol in raw::ALL {
            scope.spawn(move || {
                let mut server = protocol.start("scenarios", &["--workers", "1"]);
                let is_answered = (0..10).any(|_| sends_steadily_and_is_answered(protocol, &server));
                assert!(is_answered, "{protocol:?}: the machine was too busy ten times");
                server.stop();
            });
        }
    });
}
