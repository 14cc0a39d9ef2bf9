//! Hung requests are logged and terminated, slow requests are logged, and an idle server uses no CPU time.

#![allow(clippy::unwrap_used, reason = "a failing test reports its location")]

mod common;

use std::io::Write as _;

use common::http::{self, Client};
use common::raw::{self, ALL, Protocol};
use common::{Server, fastcgi, http2, program, status_number, wait_until};
use nix::sys::signal::Signal;

/// A drain timeout longer than the test.
const FOR_EVER: [&str; 2] = ["--drain-timeout", "1h"];

const HTTP: [&str; 2] = ["--bind", "http:127.0.0.1:0"];

fn crashy(arguments: &[&str]) -> Server {
    Server::start("crashy", &[&HTTP, arguments].concat())
}

#[test]
fn a_request_that_takes_too_long_gets_504_over_each_protocol_and_the_worker_survives() {
    for protocol in ALL {
        let mut server = protocol.start("crashy", &["--workers", "1", "--request-timeout", "1s"]);
        let worker = server.workers();
        let target = "/slow/60000?a=b";
        for target in [target, "/thread/sleep-3000"] {
            let (status, _) = raw::ask(&mut raw::connect(&server.binds[0]), &protocol.head("GET", target, 0));
            assert_eq!(status, 504, "{protocol:?} {target}");
            let line = server.wait_for("a request timed out: answered 504 (--request-timeout)");
            assert!(line.contains(&format!("request=\"GET {target}\"")), "{line}");
        }
        let (status, _) = raw::ask(&mut raw::connect(&server.binds[0]), &protocol.head("GET", "/ok", 0));
        assert_eq!((status, server.workers()), (200, worker), "{protocol:?}");
        server.stop();
    }
}

#[test]
fn a_worker_whose_event_loop_hangs_is_logged_killed_and_replaced() {
    let mut server = crashy(&["--workers", "1", "--hang-timeout", "400ms"]);
    let (address, worker) = (server.http(), server.workers());
    let asked = std::thread::spawn({
        let address = address.clone();
        move || http::get(&address, "/hang")
    });
    let line = server.wait_for("worker hangs");
    assert!(line.contains("in_flight=\"GET /hang "), "{line}");
    let line = server.wait_for("worker died");
    assert!(line.contains("signal=ABRT") && line.contains("crashed_in=\"GET /hang\""), "{line}");
    let names = server.wait_for("backtrace slot=");
    assert!(names.contains("crashy::hang"), "{names}");
    assert_eq!(asked.join().unwrap().unwrap().status, 502);
    wait_until("another worker answers", || http::get(&address, "/ok").ok());
    assert!(server.workers().is_disjoint(&worker));
    server.stop();
}

#[test]
fn a_worker_whose_thread_hangs_after_its_504_requests_its_replacement() {
    // The function must have begun by the time the timeout expires, even on a busy machine.
    let more = ["--workers", "1", "--request-timeout", "3s", "--hang-timeout", "500ms"];
    let mut server = Server::start("hooks", &[&HTTP[..], &FOR_EVER, &more].concat());
    let worker = server.workers();
    assert_eq!(http::get(&server.http(), "/hang").unwrap().status, 504);
    let line = server.wait_for("a blocking function hangs");
    assert!(line.contains("request=\"GET /hang\""), "{line}");
    let line = server.wait_for("reason=hung-thread");
    assert!(line.contains("request=\"GET /hang\""), "{line}");
    // The master does not wait for the hung function, and the worker exits normally.
    server.wait_for("worker exits while blocking functions are still running");
    server.wait_for("hook: on_exit slot=0");
    assert!(server.wait_for("worker exited").contains(" status=0 "));
    assert!(server.workers().is_disjoint(&worker));
    assert_eq!(http::get(&server.http(), "/").unwrap().status, 200);
    server.stop();
}

#[test]
fn a_worker_with_a_hung_thread_is_replaced_even_if_the_client_left_before_the_504() {
    let more = ["--workers", "1", "--request-timeout", "2s", "--hang-timeout", "500ms"];
    let http2 = |what: &[u8]| [http2::PREFACE, &http2::frame(http2::SETTINGS, 0, 0, b""), what].concat();
    let head_of_http2 = http2(&http2::head(1, http2::END_STREAM, "GET", "/thread/hang", &[]));
    let gone = |protocol: Protocol, method: &'static str| {
        (protocol, protocol.head(method, "/thread/hang", 0), format!("{method} /thread/hang"), Vec::new())
    };
    let (http, fastcgi) = (Protocol::Http, Protocol::FastCgi);
    let cases = [
        gone(http, "GET"),
        gone(http, "HEAD"),
        gone(fastcgi, "GET"),
        gone(Protocol::Scgi, "GET"),
        (http, head_of_http2.clone(), "GET /thread/hang".to_owned(), Vec::new()),
        // These requests use keep-alive connections.
        (
            http,
            head_of_http2,
            "GET /thread/hang".to_owned(),
            http2::frame(http2::RST_STREAM, 0, 1, &8_u32.to_be_bytes()),
        ),
        (
            fastcgi,
            fastcgi.head("GET", "/thread/hang", 0),
            "GET /thread/hang".to_owned(),
            fastcgi::record(fastcgi::ABORT, 1, b"", 0),
        ),
    ];
    for (protocol, request, what, end) in cases {
        let mut server = protocol.start("crashy", &[&FOR_EVER[..], &more].concat());
        let mut client = raw::connect(&server.binds[0]);
        client.write_all(&request).unwrap();
        await_thread(&server, &what);
        client.write_all(&end).unwrap();
        let kept = (!end.is_empty()).then_some(client);
        let line = server.wait_for("reason=hung-thread");
        assert!(line.contains(&format!("request={what:?}")), "{line}");
        drop(kept);
        server.wait_for("worker exits while blocking functions are still running");
        server.wait_for("worker exited");
        server.stop();
    }
}

/// Waits until a thread has begun this request. Until the event loop goes to sleep, it also shows the request for a moment.
fn await_thread(server: &Server, request: &str) {
    let board = server.segment().scoreboard();
    let is_at_it = || board.read(0).is_some_and(|row| row.running == [request]);
    let is_asleep = || board.read(0).is_some_and(|row| row.busy_since_ms.is_none());
    wait_until("a thread executes the request", || (is_at_it() && is_asleep() && is_at_it()).then_some(()));
}

#[test]
fn a_hung_function_without_a_client_does_not_delay_a_draining_worker() {
    for protocol in ALL {
        for signal in [Signal::SIGHUP, Signal::SIGTERM] {
            let more = [&["--workers", "1", "--hang-timeout", "500ms"], &FOR_EVER[..]].concat();
            let mut server = protocol.start("crashy", &more);
            let mut client = raw::connect(&server.binds[0]);
            client.write_all(&protocol.head("GET", "/thread/hang", 0)).unwrap();
            await_thread(&server, "GET /thread/hang");
            drop(client);
            server.signal(signal);
            assert!(server.wait_for("worker exited").contains(" status=0 "), "{protocol:?} {signal}");
            server.stop();
        }
    }
}

#[test]
fn a_function_that_ends_within_the_hang_timeout_is_waited_for() {
    let mut server = crashy(&[&["--workers", "1"], &FOR_EVER[..]].concat());
    let mut client = raw::connect(&server.binds[0]);
    client.write_all(&raw::Protocol::Http.head("GET", "/thread/sleep-5000", 0)).unwrap();
    await_thread(&server, "GET /thread/sleep-5000");
    let begun = std::time::Instant::now();
    drop(client);
    server.signal(Signal::SIGTERM);
    server.wait_for("worker exited");
    assert!(begun.elapsed().as_millis() > 500, "the server did not wait for the function");
    server.wait_end();
}

#[test]
fn requests_to_a_worker_whose_threads_are_all_hung_get_503_and_not_504_until_it_is_replaced() {
    let directory = tempfile::tempdir().unwrap();
    let broken = directory.path().join("broken");
    let more = ["--workers", "1", "--request-timeout", "3s", "--hang-timeout", "300ms"];
    let mut command = std::process::Command::new(program("crashy"));
    let mut server =
        Server::start_command(command.args([&HTTP[..], &FOR_EVER, &more].concat()).env("CRASHY_BROKEN", &broken));
    let address = server.http();
    std::fs::write(&broken, "").unwrap();
    assert_eq!(http::get(&address, "/thread/hang").unwrap().status, 504);
    for _ in ["a waiting request", "a new request"] {
        let response = http::get(&address, "/thread/ok").unwrap();
        assert_eq!((response.status, response.header("retry-after")), (503, Some("1")));
    }
    server.wait_for("all threads for blocking functions hang");
    assert_eq!(http::get(&address, "/ok").unwrap().status, 200, "a request that needs no thread is answered");
    std::fs::remove_file(&broken).unwrap();
    server.wait_for("worker exited");
    assert_eq!(http::get(&address, "/thread/ok").unwrap().status, 200);
    server.stop();
}

#[test]
fn a_failed_startup_does_not_wait_for_threads_of_the_application() {
    let more = ["--workers", "1", "--health-path", "/outside/hang", "--start-timeout", "1h"];
    let mut server = Server::launch(std::process::Command::new(program("crashy")).args([&HTTP[..], &more].concat()));
    let line = server.wait_for("worker died");
    assert!(line.contains(" status=1 ") && line.contains("health check"), "{line}");
    server.signal(Signal::SIGINT);
    server.wait_end();
}

#[test]
fn long_work_outside_the_event_loop_is_not_a_hang() {
    let mut server = crashy(&["--workers", "1", "--hang-timeout", "1s"]);
    for path in ["/slow/3000", "/thread/sleep-3000"] {
        assert_eq!(http::get(&server.http(), path).unwrap().status, 200, "{path}");
    }
    assert!(!server.log().contains("worker hangs"));
    server.stop();
}

#[test]
fn a_slow_request_is_logged_once_with_the_functions_of_its_thread() {
    let mut server = crashy(&["--workers", "1", "--slow-request", "1s"]);
    let mut client = Client::connect(&server.http()).unwrap();
    for (path, at) in [("/thread/sleep-3000", "sleep_in_a_thread"), ("/slow/3000", "thread=none")] {
        assert_eq!(client.request("GET", path, b"").unwrap().status, 200);
        let line = server.wait_for("slow request (--slow-request) request=");
        assert!(line.contains(&format!("\"GET {path}\"")) && line.contains(at), "{line}");
    }
    assert_eq!(client.request("GET", "/ok", b"").unwrap().status, 200);
    drop(client);
    server.stop();
    assert_eq!(server.log().matches("slow request (--slow-request)").count(), 2, "each slow request is logged once");
}

#[test]
fn an_idle_worker_sleeps_however_often_the_master_checks_it() {
    let mut server = crashy(&["--workers", "1", "--hang-timeout", "100ms"]);
    assert_eq!(http::get(&server.http(), "/ok").unwrap().status, 200);
    let worker = *server.workers().first().unwrap();
    let switches = |pid| status_number(pid, "voluntary_ctxt_switches").unwrap();
    let master = server.pid().as_raw();
    let threads: Vec<i32> = std::fs::read_dir(format!("/proc/{worker}/task"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_str().unwrap().parse().unwrap())
        .collect();
    // Wait until the end of the connection has been processed. By then, the thread of a cache sweep has exited.
    let idle = || threads.iter().filter_map(|&thread| status_number(thread, "voluntary_ctxt_switches")).sum::<u64>();
    let looks = |count| {
        let before = switches(master);
        wait_until("the master checks its workers", || (switches(master) >= before + count).then_some(()));
    };
    wait_until("the worker has nothing to do", || {
        let before = idle();
        looks(60); // long enough to include a tick that was due when the client disconnected
        (idle() == before).then_some(())
    });
    let before = idle();
    looks(40);
    assert_eq!(idle(), before, "the idle worker was woken");
    server.stop();
}
