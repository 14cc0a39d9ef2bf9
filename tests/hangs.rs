//! What hangs is named and ended; what is slow is named; and what is idle costs nothing.

#![allow(clippy::unwrap_used, reason = "a test that fails here says where")]

mod common;

use common::http::{self, Client};
use common::raw::{self, ALL};
use common::{Server, status_number, wait_until};

const HTTP: [&str; 2] = ["--bind", "http:127.0.0.1:0"];

fn crashy(arguments: &[&str]) -> Server {
    Server::start("crashy", &[&HTTP, arguments].concat())
}

#[test]
fn a_request_that_takes_too_long_gets_504_over_each_protocol_and_the_worker_lives() {
    for protocol in ALL {
        let mut server = protocol.start("crashy", &["--workers", "1", "--request-timeout", "1s"]);
        let worker = server.workers();
        let target = "/slow/60000?a=b";
        for target in [target, "/thread/sleep-3000"] {
            let (status, _) = raw::ask(&mut raw::connect(&server.binds[0]), &protocol.head("GET", target, 0));
            assert_eq!(status, 504, "{protocol:?} {target}");
            let line = server.wait_for("a request takes too long");
            assert!(line.contains(&format!("request=\"GET {target}\"")), "{line}");
        }
        let (status, _) = raw::ask(&mut raw::connect(&server.binds[0]), &protocol.head("GET", "/ok", 0));
        assert_eq!((status, server.workers()), (200, worker), "{protocol:?}");
        server.stop();
    }
}

#[test]
fn a_loop_that_hangs_is_named_ended_and_replaced() {
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
    wait_until("another answers", || http::get(&address, "/ok").ok());
    assert!(server.workers().is_disjoint(&worker));
    server.stop();
}

#[test]
fn a_thread_that_hangs_after_its_504_has_its_worker_ask_for_a_successor() {
    let more = ["--workers", "1", "--request-timeout", "100ms", "--hang-timeout", "1s", "--drain-timeout", "1s"];
    let mut server = crashy(&more);
    assert_eq!(http::get(&server.http(), "/thread/hang").unwrap().status, 504);
    let line = server.wait_for("a function still runs");
    assert!(line.contains("request=\"GET /thread/hang\""), "{line}");
    server.wait_for("reason=hung thread");
    server.stop();
}

#[test]
fn work_that_takes_long_but_not_on_the_loop_is_no_hang() {
    let mut server = crashy(&["--workers", "1", "--hang-timeout", "1s"]);
    for path in ["/slow/3000", "/thread/sleep-3000"] {
        assert_eq!(http::get(&server.http(), path).unwrap().status, 200, "{path}");
    }
    assert!(!server.log().contains("worker hangs"));
    server.stop();
}

#[test]
fn a_slow_request_is_named_once_with_what_its_thread_is_at() {
    let mut server = crashy(&["--workers", "1", "--slow-request", "1s"]);
    let mut client = Client::connect(&server.http()).unwrap();
    for (path, at) in [("/thread/sleep-3000", "sleep_in_a_thread"), ("/slow/3000", "thread=none")] {
        assert_eq!(client.request("GET", path, b"").unwrap().status, 200);
        let line = server.wait_for("slow request=");
        assert!(line.contains(&format!("\"GET {path}\"")) && line.contains(at), "{line}");
    }
    assert_eq!(client.request("GET", "/ok", b"").unwrap().status, 200);
    drop(client);
    server.stop();
    assert_eq!(server.log().matches("slow request=").count(), 2, "each is told once");
}

#[test]
fn an_idle_worker_sleeps_however_often_the_master_looks() {
    let mut server = crashy(&["--workers", "1", "--hang-timeout", "100ms"]);
    assert_eq!(http::get(&server.http(), "/ok").unwrap().status, 200);
    let worker = *server.workers().first().unwrap();
    let switches = |pid| status_number(pid, "voluntary_ctxt_switches").unwrap();
    let master = server.pid().as_raw();
    let threads: Vec<i32> = std::fs::read_dir(format!("/proc/{worker}/task"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_str().unwrap().parse().unwrap())
        .collect();
    // The connection's end is dealt with first.
    let idle = || threads.iter().map(|&thread| switches(thread)).sum::<u64>();
    let looks = |count| {
        let before = switches(master);
        wait_until("the master looks", || (switches(master) >= before + count).then_some(()));
    };
    wait_until("it has nothing to do", || {
        let before = idle();
        looks(60); // of which a tick that was due when the client left would be one
        (idle() == before).then_some(())
    });
    let before = idle();
    looks(40);
    assert_eq!(idle(), before, "it was woken");
    server.stop();
}
