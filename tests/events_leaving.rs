//! Workers that exit while event streams are open. The streams end immediately, whatever their clients do. A client that reconnects during
//! reloads and upgrades misses no event.

#![allow(clippy::unwrap_used, reason = "a failing test reports its location")]

mod common;

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use common::http2;
use common::raw::Protocol;
use common::sse::{Source, WAYS, Way};
use common::{Server, StopOnDrop, http, wait_until};
use nix::sys::signal::Signal;

const TARGET: &str = "/events?topics=news";

/// Starts the example, listening for every protocol. All timeouts for streams exceed the duration of this test, so only the exit of the
/// worker can end a stream.
fn start(arguments: &[&str]) -> Server {
    let times = ["--drain-timeout", "10m", "--write-timeout", "10m", "--idle-timeout", "10m"];
    let binds = ["http", "fastcgi", "scgi"].map(|protocol| format!("{protocol}:127.0.0.1:0"));
    let binds = binds.iter().flat_map(|bind| ["--bind", bind]);
    Server::start("stream", &binds.chain(times).chain(arguments.iter().copied()).collect::<Vec<_>>())
}

fn bind(server: &Server, way: Way) -> String {
    let number = [Protocol::Http, Protocol::FastCgi, Protocol::Scgi].iter().position(|one| *one == way.protocol());
    server.binds[number.unwrap()].clone()
}

fn open(server: &Server, way: Way) -> Source {
    Source::open(way, &bind(server, way), TARGET, "").unwrap_or_else(|error| panic!("{way:?}: {error}"))
}

/// Publishes more than the kernel and the protocols buffer for a client that does not read.
fn flood(server: &Server) {
    for _ in 0..10 {
        assert_eq!(http::post(&server.http(), "/flood/news/100/20000", b"").unwrap().status, 200);
    }
}

#[test]
fn a_stop_does_not_wait_for_clients_that_do_not_read() {
    let mut server = start(&["--workers", "1"]);
    let clients = WAYS.map(|way| open(&server, way));
    flood(&server);
    server.stop();
    drop(clients);
}

#[test]
fn a_stop_does_not_wait_for_silent_clients() {
    let mut server = start(&["--workers", "1"]);
    // Over HTTP/2, a client that does not read does not answer the PING with which the server checks that the client has read everything.
    let clients = WAYS.map(|way| open(&server, way));
    server.stop();
    drop(clients);
}

/// The client reads, and answers PINGs, but does not open the window for a response, neither for the stream nor for the connection.
#[test]
fn a_stop_does_not_wait_for_a_closed_http_2_window() {
    let mut server = start(&["--workers", "1"]);
    let mut client = http2::Client::connect(&server.http()).unwrap();
    let accept = [("accept", "text/event-stream")];
    client.send(&http2::head(1, http2::END_STREAM | http2::END_HEADERS, "GET", TARGET, &accept)).unwrap();
    client.next(http2::DATA).unwrap();
    let reading = std::thread::spawn(move || while client.next(http2::DATA).is_ok() {});
    flood(&server);
    server.stop();
    reading.join().unwrap();
}

/// An event stream that the application produces itself is an ordinary response, so it is sent completely.
#[test]
fn a_stop_waits_for_a_stream_that_the_application_produces_itself() {
    let mut server = start(&["--workers", "1"]);
    let streams = WAYS.map(|way| {
        let source = Source::open(way, &bind(&server, way), "/answer/6", "");
        (way, source.unwrap_or_else(|error| panic!("{way:?}: {error}")))
    });
    server.signal(Signal::SIGTERM);
    for (way, mut source) in streams {
        for left in (0..6).rev() {
            assert_eq!(source.next().data, left.to_string(), "{way:?}");
        }
        assert_eq!(source.event().unwrap(), None, "{way:?}: the stream ends properly");
    }
    assert_eq!(server.wait_end(), Some(0));
}

/// Reads every event from the first one on, reconnecting as needed, until an event announces the end. Counts the connections.
fn follow(way: Way, bind: &str, connections: &AtomicUsize) {
    let (mut last_id, mut next) = (String::new(), 1);
    loop {
        let open = || Source::open(way, bind, TARGET, &last_id).ok();
        let mut source = wait_until("a worker resumes the stream", open);
        connections.fetch_add(1, Ordering::SeqCst);
        while let Some(event) =
            source.event().unwrap_or_else(|error| panic!("{way:?}: the stream is incomplete: {error}"))
        {
            assert_eq!((event.number(), event.name.as_str()), (next, ""), "{way:?}: lost or duplicated: {event:?}");
            next += 1;
            if event.data == "the end" {
                return;
            }
        }
        last_id.clone_from(&source.last_id);
    }
}

#[test]
fn upgrades_and_reloads_neither_lose_nor_duplicate_events() {
    const ROUNDS: usize = 4;
    let mut server = start(&["--workers", "2"]);
    let log = server.segment().events();
    let epoch = log.epoch();
    let binds = WAYS.map(|way| bind(&server, way));
    let (connections, over) = (WAYS.map(|_| AtomicUsize::new(0)), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let publisher_ends = StopOnDrop(&over);
        let following: Vec<_> = WAYS
            .iter()
            .zip(&binds)
            .zip(&connections)
            .map(|((way, bind), connections)| scope.spawn(|| follow(*way, bind, connections)))
            .collect();
        let counts = || connections.iter().map(|count| count.load(Ordering::SeqCst));
        wait_until("all clients have connected", || counts().all(|count| count > 0).then_some(()));
        scope.spawn(|| {
            while !over.load(Ordering::SeqCst) {
                log.publish("news", "", b"on and on").unwrap();
                std::thread::park_timeout(Duration::from_millis(1));
            }
            log.publish("news", "", b"the end").unwrap();
        });
        for round in 0..ROUNDS {
            let before: Vec<usize> = counts().collect();
            if round % 2 == 0 {
                server.signal(Signal::SIGUSR2);
                server.wait_for("upgraded version=");
            } else {
                server.signal(Signal::SIGHUP);
            }
            server.wait_for("reload done");
            // Each client's worker has exited, so each client must reconnect to another worker.
            wait_until(&format!("all clients have reconnected, after {before:?}"), || {
                counts().zip(&before).all(|(count, before)| count > *before).then_some(())
            });
        }
        drop(publisher_ends);
        following.into_iter().for_each(|following| following.join().unwrap());
    });
    assert_eq!(server.segment().events().epoch(), epoch, "the event log is still the same");
    server.stop();
}
