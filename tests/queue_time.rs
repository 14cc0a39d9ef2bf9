//! Requests that have waited too long before the application could begin are shed with 503. No other requests are shed.

#![allow(clippy::unwrap_used, reason = "a failing test reports its location")]

mod common;

use std::io::Write as _;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use common::http::{self, Client, Response};
use common::raw::{self, ALL};
use common::{Server, wait_until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const LIMIT: Duration = Duration::from_secs(1);

fn crashy(arguments: &[&str]) -> Server {
    let common = ["--bind", "http:127.0.0.1:0", "--workers", "1", "--max-queue-time", "1s"];
    Server::start("crashy", &[&common, arguments].concat())
}

#[track_caller]
fn assert_shed(response: &Response) {
    assert_eq!((response.status, response.header("retry-after")), (503, Some("1")), "{}", response.text());
}

/// Returns when a request sent before the call has waited for longer than the limit.
fn too_late() {
    let begun = Instant::now();
    wait_until("the limit has passed", || (begun.elapsed() > LIMIT * 2).then_some(()));
}

#[test]
fn a_request_that_waits_too_long_for_a_thread_is_shed_while_the_thread_is_busy() {
    let mut server = crashy(&[]);
    let address = server.http();
    let mut first = Client::connect(&address).unwrap();
    let long = b"GET /thread/sleep-6000 HTTP/1.1\r\nHost: a\r\n\r\n";
    first.stream.get_mut().write_all(long).unwrap();
    // The first request occupies the only thread, or gets the thread before the other requests, because these arrive on a later connection.
    let mut second = Client::connect(&address).unwrap();
    assert_shed(&second.request("GET", "/thread/", b"").unwrap());
    assert_eq!(second.request("GET", "/ok", b"").unwrap().status, 200, "a request that needs no thread does not wait");
    assert_eq!(
        first.response(false).unwrap().status,
        200,
        "a request that began in time may take longer than the limit"
    );
    assert_eq!(second.request("GET", "/thread/", b"").unwrap().status, 200);
    server.wait_for("requests waited too long and got 503 (--max-queue-time) count=1");
    server.stop();
}

#[test]
fn the_wait_in_the_kernel_counts_for_the_first_request_of_a_connection() {
    for protocol in ALL {
        let mut server = protocol.start("crashy", &["--workers", "1", "--max-queue-time", "1s"]);
        let worker = Pid::from_raw(server.workers().into_iter().next().unwrap());
        let head = protocol.head("GET", "/ok", 0);
        let mut silent = raw::connect(&server.binds[0]);
        common::stop(worker);
        let mut stream = raw::connect(&server.binds[0]);
        stream.write_all(&head).unwrap();
        too_late();
        kill(worker, Signal::SIGCONT).unwrap();
        assert_eq!(raw::ask(&mut stream, b"").0, 503, "{protocol:?}");
        assert_eq!(
            raw::ask(&mut silent, &head).0,
            200,
            "{protocol:?}: the wait of the connection without a request does not count"
        );
        assert_eq!(raw::ask(&mut raw::connect(&server.binds[0]), &head).0, 200, "{protocol:?}");
        server.stop();
    }
}

#[test]
fn the_start_time_from_a_trusted_proxy_is_used() {
    let ask = |server: &Server, start: &str| {
        let mut client = Client::connect(&server.http()).unwrap();
        let head = format!("GET /ok HTTP/1.1\r\nHost: a\r\nX-Request-Start: {start}\r\n\r\n");
        client.stream.get_mut().write_all(head.as_bytes()).unwrap();
        client.response(false).unwrap()
    };
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let old = now - Duration::from_secs(60);
    let old = [
        format!("t={}.{:03}", old.as_secs(), old.subsec_millis()),
        old.as_millis().to_string(),
        format!("t={}", old.as_micros()),
    ];
    let mut trusting = crashy(&["--trust", "127.0.0.1"]);
    for start in &old {
        assert_shed(&ask(&trusting, start));
    }
    let later = now + Duration::from_secs(60);
    for start in [format!("t={}", later.as_secs()), "t=soon".to_owned(), "0".to_owned()] {
        assert_eq!(ask(&trusting, &start).status, 200, "{start}");
    }
    trusting.stop();
    let mut doubting = crashy(&[]);
    for start in &old {
        assert_eq!(ask(&doubting, start).status, 200, "a header from an untrusted client is ignored");
    }
    assert_eq!(http::get(&doubting.http(), "/ok").unwrap().status, 200);
    doubting.stop();
}
