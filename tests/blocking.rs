//! A blocking function delays only its own request.

#![allow(clippy::unwrap_used, reason = "a failing test reports its location")]

mod common;

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use common::raw::{self, Protocol};
use common::{PATIENCE, Server, wait_until};

/// Number of consecutive quick calls. Fewer calls suffice to classify a function as quick.
const MANY: u32 = 300;

fn ask(protocol: Protocol, stream: &mut UnixStream, target: &str) -> (u16, i32) {
    let (status, response) = raw::ask(stream, &protocol.head("GET", target, 0));
    (status, pid_in(protocol, &response))
}

/// Returns the pid in the body of a response, or -1 if there is none.
fn pid_in(protocol: Protocol, response: &[u8]) -> i32 {
    let text = String::from_utf8_lossy(response);
    let body = text.split_once("\r\n\r\n").map_or("", |(_, body)| body);
    // Over FastCGI, another record follows the body.
    let digits = body.find(|c: char| !c.is_ascii_digit()).unwrap_or(body.len());
    assert!(protocol == Protocol::FastCgi || body.len() <= digits + 1, "{text:?}");
    body[..digits].parse().unwrap_or(-1)
}

/// Sends a request that blocks until the returned gate is dropped.
fn hold(protocol: Protocol, bind: &str, path: &str) -> (UnixStream, TcpStream) {
    let gate = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut held = raw::connect(bind);
    let target = format!("{path}/{}", gate.local_addr().unwrap().port());
    held.write_all(&protocol.head("GET", &target, 0)).unwrap();
    (held, common::accepted(&gate, "the function that holds has begun"))
}

#[test]
fn a_call_that_blocks_after_many_quick_calls_delays_no_other_request() {
    for protocol in [Protocol::Http, Protocol::FastCgi] {
        let mut server = protocol.start("holds", &["--workers", "1", "--threads", "2"]);
        let mut kept = raw::connect(&server.binds[0]);
        for _ in 0..MANY {
            assert_eq!(ask(protocol, &mut kept, "/").0, 200);
        }
        let (mut held, gate) = hold(protocol, &server.binds[0], "/hold");
        for target in ["/", "/loop/"] {
            assert_eq!(ask(protocol, &mut kept, target).0, 200, "{protocol:?} {target} on a keep-alive connection");
            let mut fresh = raw::connect(&server.binds[0]);
            assert_eq!(ask(protocol, &mut fresh, target).0, 200, "{protocol:?} {target} on a new connection");
        }
        drop(gate);
        assert_eq!(raw::ask(&mut held, b"").0, 200);
        drop((kept, held));
        server.stop();
    }
}

#[test]
fn a_blocked_call_gets_504_in_time_even_if_all_threads_are_occupied() {
    for protocol in raw::ALL {
        let mut server = protocol.start("holds", &["--workers", "1", "--threads", "1", "--request-timeout", "2s"]);
        for _ in 0..MANY {
            assert_eq!(ask(protocol, &mut raw::connect(&server.binds[0]), "/").0, 200);
        }
        let (mut held, gate) = hold(protocol, &server.binds[0], "/hold");
        // Only the function's own thread is occupied: the event loop still answers.
        assert_eq!(ask(protocol, &mut raw::connect(&server.binds[0]), "/loop/").0, 200);
        assert_eq!(raw::ask(&mut held, b"").0, 504, "{protocol:?}");
        drop((gate, held));
        server.stop();
    }
}

#[test]
fn waiting_for_a_page_from_another_worker_delays_no_other_request() {
    for protocol in [Protocol::Http, Protocol::FastCgi] {
        let mut server = protocol.start("holds", &["--workers", "2", "--threads", "1"]);
        let bind = server.binds[0].clone();
        let (mut renders, gate) = hold(protocol, &bind, "/page");
        let port = gate.local_addr().unwrap().port();
        // The other worker has a free thread, and the occupied worker leaves connections to it for a while. On a busy machine, the occupied
        // worker may still accept the connection; the test then retries.
        let renderer = occupied(&server);
        let connect = || {
            wait_until("the other worker accepts a connection", || {
                let mut stream = raw::connect(&bind);
                let (status, pid) = ask(protocol, &mut stream, "/loop/");
                (status == 200 && pid != renderer).then_some((stream, pid))
            })
        };
        let (mut kept, other) = connect();
        for _ in 0..MANY {
            assert_eq!(ask(protocol, &mut kept, "/"), (200, other));
        }
        let (mut beside, _) = connect();
        kept.write_all(&protocol.head("GET", &format!("/page/{port}"), 0)).unwrap();
        // The other worker waits for the page on its thread for blocking functions.
        wait_for_occupation(&server, other);
        assert_eq!(ask(protocol, &mut beside, "/loop/"), (200, other), "{protocol:?}");
        kept.set_nonblocking(true).unwrap();
        let waits = kept.read(&mut [0]).unwrap_err();
        assert_eq!(waits.kind(), ErrorKind::WouldBlock, "{protocol:?}: the page has not been rendered yet");
        kept.set_nonblocking(false).unwrap();
        drop(gate);
        let (_, page) = raw::ask(&mut renders, b"");
        let (status, same) = raw::ask(&mut kept, b"");
        assert_eq!(
            (status, pid_in(protocol, &page), pid_in(protocol, &same)),
            (200, renderer, renderer),
            "{protocol:?}"
        );
        drop((kept, beside, renders));
        server.stop();
    }
}

/// Returns the worker that is serving a request.
fn occupied(server: &Server) -> i32 {
    let segment = server.segment();
    let board = segment.scoreboard();
    wait_until("a worker is occupied", || {
        let mut rows = (0..board.rows()).filter_map(|slot| board.read(slot));
        rows.find(|row| !row.serving.is_empty()).and_then(|row| i32::try_from(row.pid).ok())
    })
}

/// Waits until this worker is serving a request.
fn wait_for_occupation(server: &Server, pid: i32) {
    let segment = server.segment();
    let board = segment.scoreboard();
    wait_until("the worker waits for the page", || {
        let rows = (0..board.rows()).filter_map(|slot| board.read(slot));
        let row = rows.into_iter().find(|row| i32::try_from(row.pid) == Ok(pid))?;
        (!row.serving.is_empty()).then_some(())
    });
}

#[test]
fn a_function_declared_quick_is_answered_like_any_other() {
    for protocol in raw::ALL {
        let mut server = protocol.start("quick", &["--workers", "1"]);
        for _ in 0..MANY {
            let (status, response) = raw::ask(&mut raw::connect(&server.binds[0]), &protocol.head("GET", "/", 0));
            assert_eq!(status, 200, "{protocol:?}");
            assert!(String::from_utf8_lossy(&response).contains("Hello, world"), "{protocol:?}");
        }
        server.stop();
    }
}

#[test]
fn requests_beyond_the_queue_limit_get_503_and_the_queued_ones_are_answered() {
    let mut server = Protocol::Http.start("holds", &["--workers", "1", "--threads", "1", "--queue", "3"]);
    let bind = server.binds[0].clone();
    let (mut held, gate) = hold(Protocol::Http, &bind, "/hold");
    let mut waiting: Vec<UnixStream> = (0..8).map(|_| raw::connect(&bind)).collect();
    for stream in &mut waiting {
        stream.write_all(&Protocol::Http.head("GET", "/", 0)).unwrap();
    }
    // Five of the requests do not fit into the queue.
    wait_until("five requests are refused", || {
        waiting.retain_mut(|stream| {
            stream.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
            let mut piece = [0; 1024];
            let Ok(count) = stream.read(&mut piece) else { return true };
            assert_eq!(raw::status(&piece[..count]), Some(503));
            false
        });
        (waiting.len() <= 3).then_some(())
    });
    assert_eq!(waiting.len(), 3);
    drop(gate);
    assert_eq!(raw::ask(&mut held, b"").0, 200);
    for stream in &mut waiting {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        assert_eq!(raw::ask(stream, b"").0, 200);
    }
    drop(waiting);
    server.stop();
}
