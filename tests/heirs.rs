//! The effect of a worker's death on its clients: each request in flight gets a 502, and all other clients are not affected. docs/heirs.md
//! describes heirs.

#![allow(clippy::unwrap_used, reason = "a failing test reports its location")]

mod common;

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use common::{Process, Server, children_of, fastcgi, http, http2, is_gone, process, processes, scgi, wait_until};
use forkyard_shm::State;
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const ALL: [&str; 6] = ["--bind", "http:127.0.0.1:0", "--bind", "fastcgi:127.0.0.1:0", "--bind", "scgi:127.0.0.1:0"];

struct Fixture {
    server: Server,
    http: String,
    fastcgi: String,
    scgi: String,
}

fn start(arguments: &[&str]) -> Fixture {
    let server = Server::start("crashy", &[&ALL[..], arguments].concat());
    let (http, fastcgi, scgi) = (server.http(), server.binds[1].clone(), server.binds[2].clone());
    Fixture { server, http, fastcgi, scgi }
}

impl Fixture {
    /// Returns the pid of the only worker.
    fn worker(&self) -> Pid {
        let workers = self.server.workers();
        Pid::from_raw(*workers.first().filter(|_| workers.len() == 1).expect("there is one worker"))
    }

    /// Waits until `count` requests are in flight.
    fn serves(&self, count: u32) {
        let board = self.server.segment().scoreboard();
        let rows = || (0..board.rows()).filter_map(|slot| board.read(slot));
        wait_until("all requests are in flight", || {
            (rows().map(|row| row.in_flight).sum::<u32>() == count).then_some(())
        });
    }

    fn kill(&mut self) {
        kill(self.worker(), Signal::SIGKILL).unwrap();
    }
}

/// Returns the heir of a running worker.
fn heir_of(worker: Pid) -> Pid {
    wait_until("each worker has an heir", || {
        let is_heir = |process: &Process| process.parent == worker.as_raw() && process.name == "heir";
        processes().into_iter().find(is_heir).map(|heir| Pid::from_raw(heir.pid))
    })
}

#[test]
fn requests_of_a_killed_worker_get_502_and_its_idle_connections_continue() {
    let mut at = start(&["--workers", "1"]);
    let mut idle_http = http::Client::connect(&at.http).unwrap();
    assert_eq!(idle_http.request("GET", "/ok", b"").unwrap().status, 200);
    let mut idle_fastcgi = fastcgi::Client::connect(&at.fastcgi).unwrap();
    assert_eq!(idle_fastcgi.request("GET", "/ok", b"").unwrap().status(), 200);
    let mut fresh = http::Client::connect(&at.http).unwrap();

    let mut slow_http = http::Client::connect(&at.http).unwrap();
    slow_http.stream.get_mut().write_all(b"GET /slow/60000 HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
    // Several requests on one connection, one of which gets a response without a body.
    let mut slow_fastcgi = fastcgi::Client::connect(&at.fastcgi).unwrap();
    for (id, method) in [(1, "GET"), (7, "HEAD"), (2, "GET")] {
        slow_fastcgi.send(&fastcgi::request(id, true, method, "/slow/60000", b"")).unwrap();
    }
    let mut slow_scgi = scgi::Client::connect(&at.scgi).unwrap();
    slow_scgi.stream.write_all(&scgi::request("GET", "/slow/60000", b"")).unwrap();
    at.serves(5);
    at.kill();

    let sorry = slow_http.response(false).unwrap();
    assert_eq!((sorry.status, sorry.text().as_str()), (502, "502 Bad Gateway\n"));
    let mut answered = Vec::new();
    while answered.len() < 3 {
        let record = slow_fastcgi.record().unwrap();
        if record.kind == fastcgi::END {
            answered.push(record.id);
        } else if !record.content.is_empty() {
            let text = String::from_utf8_lossy(&record.content).into_owned();
            assert!(text.starts_with("Status: 502 ") || text.starts_with("status: 502 "), "{text}");
            assert_eq!(text.ends_with("502 Bad Gateway\n"), record.id != 7, "{text}");
        }
    }
    answered.sort_unstable();
    assert_eq!(answered, [1, 2, 7]);
    assert_eq!(slow_scgi.response().unwrap().status(), 502);

    // The next worker now has all connections.
    assert_eq!(slow_fastcgi.request("GET", "/ok", b"").unwrap().status(), 200);
    assert_eq!(idle_fastcgi.request("GET", "/ok", b"").unwrap().status(), 200);
    assert_eq!(idle_http.request("GET", "/ok", b"").unwrap().status, 200);
    assert_eq!(fresh.request("GET", "/ok", b"").unwrap().status, 200);
    let line = at.server.wait_for("took over the connections of a dead worker");
    assert!(line.contains("answered=5 cut=0 passed_on=4"), "{line}");
    at.server.stop();
}

/// The heir must not respond to an aborted request, because the client would mistake the response for that to the next request.
#[test]
fn a_connection_whose_requests_were_aborted_is_idle() {
    let mut at = start(&["--workers", "1"]);
    let abort = |id| vec![fastcgi::record(fastcgi::ABORT, id, b"", 0)];
    let half_upload = || {
        let mut records = fastcgi::head(1, true, "POST", "/echo", Some(9));
        records.push(fastcgi::record(fastcgi::STDIN, 1, b"part", 0));
        records
    };
    let slow = || fastcgi::request(1, true, "GET", "/slow/60000", b"");
    let mut clients: Vec<_> = (0..4).map(|_| fastcgi::Client::connect(&at.fastcgi).unwrap()).collect();
    let [unread, waiting, begun, broken] = &mut clients[..] else { unreachable!("there are four clients") };

    // The abort arrives in the same read as the request. The head of the response waits for the first part of the body.
    unread.send(&[half_upload(), abort(1)].concat()).unwrap();
    unread.response(1).unwrap();

    waiting.send(&slow()).unwrap();
    at.serves(1);
    waiting.send(&abort(1)).unwrap();
    waiting.response(1).unwrap();

    begun.send(&half_upload()).unwrap();
    assert_eq!(begun.record().unwrap().kind, fastcgi::STDOUT);
    begun.send(&abort(1)).unwrap();
    begun.response(1).unwrap();

    // The response to request 2 fails. The connection stays open for request 1.
    broken.send(&[slow(), fastcgi::request(2, true, "GET", "/break", b"")].concat()).unwrap();
    let mut part = Vec::new();
    while !part.ends_with(b"a part\n") {
        part.extend(broken.record().unwrap().content);
    }
    for id in [2, 1] {
        broken.send(&abort(id)).unwrap();
        broken.response(id).unwrap();
    }

    at.kill();
    let line = at.server.wait_for("took over the connections of a dead worker");
    assert!(line.contains("answered=0 cut=0 passed_on=4"), "{line}");
    for client in &mut clients {
        assert_eq!(client.request("GET", "/ok", b"").unwrap().status(), 200);
    }
    at.server.stop();
}

#[test]
fn an_incomplete_request_gets_502_and_an_incomplete_response_ends_early() {
    let mut at = start(&["--workers", "1"]);
    let mut half = http::Client::connect(&at.http).unwrap();
    half.stream.get_mut().write_all(b"GET /ok HTTP/1.1\r\nHost").unwrap();
    let mut half_fastcgi = fastcgi::Client::connect(&at.fastcgi).unwrap();
    let records = fastcgi::request(9, true, "GET", "/ok", b"").concat();
    half_fastcgi.stream.write_all(&records[..40]).unwrap();
    // The head is sent in two parts, so that the first part is not the last data that the worker has read.
    let mut stream = common::connect_tcp(&at.http).unwrap();
    stream.write_all(b"GET /bytes/64 HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
    let mut begun = [0; 1000];
    stream.read_exact(&mut begun).unwrap();
    // Once these requests are answered, the data that was sent before them has been read.
    assert_eq!(http::get(&at.http, "/ok").unwrap().status, 200);
    half.stream.get_mut().write_all(b": a\r\n").unwrap();
    assert_eq!(http::get(&at.http, "/ok").unwrap().status, 200);
    at.kill();

    assert_eq!(half.response(false).unwrap().status, 502);
    assert_eq!(half_fastcgi.response(9).unwrap().status(), 502);
    let mut rest = Vec::new();
    let ended = stream.read_to_end(&mut rest);
    assert!(ended.is_err() || rest.len() < 64 << 20, "a truncated response does not look complete");
    at.server.stop();
}

#[test]
fn an_http2_connection_is_sent_a_goaway() {
    let mut at = start(&["--workers", "1"]);
    let mut client = http2::Client::connect(&at.http).unwrap();
    while client.next(http2::SETTINGS).unwrap().flags & http2::ACK == 0 {}
    at.kill();
    client.next(http2::GOAWAY).unwrap();
    assert_eq!(client.stream.read(&mut [0]).unwrap(), 0);
    at.server.stop();
}

#[test]
fn a_worker_whose_heir_died_is_replaced_and_its_connections_continue() {
    let mut at = start(&["--workers", "1"]);
    let worker = at.worker();
    let mut kept = fastcgi::Client::connect(&at.fastcgi).unwrap();
    assert_eq!(kept.request("GET", "/ok", b"").unwrap().status(), 200);
    kill(heir_of(worker), Signal::SIGKILL).unwrap();
    at.server.wait_for("its heir died");
    wait_until("the worker is replaced", || {
        (process(worker.as_raw()).is_none() && at.server.workers().len() == 1).then_some(())
    });
    assert_eq!(kept.request("GET", "/ok", b"").unwrap().status(), 200);
    heir_of(at.worker());
    at.server.stop();
}

#[test]
fn heirs_exit_with_their_workers() {
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGKILL] {
        let mut at = start(&["--workers", "1"]);
        let heir = heir_of(at.worker());
        let mut kept = http::Client::connect(&at.http).unwrap();
        assert_eq!(kept.request("GET", "/ok", b"").unwrap().status, 200);
        at.server.signal(signal);
        at.server.wait_end();
        if signal != Signal::SIGKILL {
            assert!(is_gone(heir.as_raw()), "{signal}: the heir exits with the master");
        }
        wait_until("the heir is gone", || is_gone(heir.as_raw()).then_some(()));
    }
}

/// The master recognizes heirs by their process names. It would mistake a new heir with a different name for a process that a program has
/// left behind, and would kill the heir during a shutdown.
#[test]
fn an_heir_has_its_name_before_it_runs() {
    let mut at = start(&["--workers", "1"]);
    // On a single CPU, a new process runs only after its parent.
    let allowed = sched_getaffinity(at.server.pid()).unwrap();
    let first = (0..CpuSet::count()).find(|&cpu| allowed.is_set(cpu).unwrap()).unwrap();
    let mut one = CpuSet::new();
    one.set(first).unwrap();
    sched_setaffinity(at.server.pid(), &one).unwrap();
    for _ in 0..20 {
        let old = at.worker();
        kill(old, Signal::SIGKILL).unwrap();
        let worker = wait_until("a new worker starts", || {
            children_of(at.server.pid()).into_iter().find(|&pid| pid != old.as_raw())
        });
        let name = wait_until("the worker has a child", || {
            let children = format!("/proc/{worker}/task/{worker}/children");
            let first_child = || std::fs::read_to_string(&children).ok()?.trim().parse().ok();
            process((0..1000).find_map(|_| first_child())?).map(|process| process.name)
        });
        assert_eq!(name, "heir", "the heir's name when it is first seen");
        wait_until("the worker is ready", || {
            let board = at.server.segment().scoreboard();
            let mut rows = (0..board.rows()).filter_map(|slot| board.read(slot));
            rows.any(|row| row.pid == worker.cast_unsigned() && row.state == State::Ready).then_some(())
        });
    }
    at.server.stop();
}

/// Returns whether a shutdown completes immediately, rather than after the two seconds that clients otherwise have to read the end of the
/// connection. On a busy machine, any step may take two seconds, so there are several attempts. `hold` opens the connections that stay open
/// during the shutdown; `after` receives these connections afterwards.
fn stops_at_once(hold: impl Fn(&Fixture) -> Vec<TcpStream>, after: impl Fn(Vec<TcpStream>)) -> bool {
    (0..10).any(|_| {
        let mut at = start(&["--workers", "1"]);
        let held = hold(&at);
        let begun = Instant::now();
        at.server.signal(Signal::SIGINT);
        at.server.wait_end();
        let took = begun.elapsed();
        after(held);
        took < Duration::from_secs(2)
    })
}

#[test]
fn an_immediate_stop_does_not_wait_for_clients_that_keep_connections_open() {
    let idle_http2 = |at: &Fixture| {
        let mut client = http2::Client::connect(&at.http).unwrap();
        while client.next(http2::SETTINGS).unwrap().flags & http2::ACK == 0 {}
        vec![client.stream]
    };
    assert!(stops_at_once(idle_http2, drop), "an idle HTTP/2 connection");
    // More connections than fit into the channel to the other workers.
    let many_idle = |at: &Fixture| {
        let mut clients: Vec<_> = (0..400).map(|_| http::Client::connect(&at.http).unwrap()).collect();
        for client in &mut clients {
            assert_eq!(client.request("GET", "/ok", b"").unwrap().status, 200);
        }
        clients.into_iter().map(|client| client.stream.into_inner()).collect()
    };
    assert!(stops_at_once(many_idle, drop), "many idle connections");
    let in_flight = |at: &Fixture| {
        let mut stream = common::connect_tcp(&at.http).unwrap();
        stream.write_all(b"GET /slow/60000 HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
        at.serves(1);
        vec![stream]
    };
    let is_told = |mut held: Vec<TcpStream>| {
        let mut text = String::new();
        held[0].read_to_string(&mut text).unwrap();
        assert!(text.starts_with("HTTP/1.1 502 "), "{text}");
    };
    assert!(stops_at_once(in_flight, is_told), "a request in flight");
}

#[test]
fn a_reload_closes_no_connection() {
    let mut at = start(&["--workers", "2"]);
    let mut https: Vec<_> = (0..20).map(|_| http::Client::connect(&at.http).unwrap()).collect();
    let mut fastcgis: Vec<_> = (0..20).map(|_| fastcgi::Client::connect(&at.fastcgi).unwrap()).collect();
    for generation in 2..6 {
        for client in &mut https {
            let response = client.request("GET", "/ok", b"").unwrap();
            assert_eq!((response.status, response.header("connection")), (200, None));
        }
        for client in &mut fastcgis {
            assert_eq!(client.request("GET", "/ok", b"").unwrap().status(), 200);
        }
        at.server.signal(Signal::SIGHUP);
        at.server.wait_for(&format!("reload done gen={generation}"));
    }
    // A connection on which part of a head has arrived is also passed on.
    let (begun, rest) = (b"GET /ok HTTP/1.1\r\nHo", b"st: a\r\n\r\n");
    for client in &mut https {
        client.stream.get_mut().write_all(begun).unwrap();
    }
    assert_eq!(http::get(&at.http, "/slow/50").unwrap().status, 200);
    at.server.signal(Signal::SIGHUP);
    at.server.wait_for("reload done gen=6");
    for client in &mut https {
        client.stream.get_mut().write_all(rest).unwrap();
        assert_eq!(client.response(false).unwrap().status, 200);
    }
    at.server.stop();
}

/// Bytes that a client could send as the rest of a body, and that another worker must not parse as a request.
const SMUGGLED: &str = "GET /status/418 HTTP/1.1\r\nHost: a\r\n\r\n";

#[test]
fn the_rest_of_a_body_is_never_mistaken_for_a_request() {
    let mut at = start(&["--workers", "1"]);
    // The response is sent before the whole body has arrived. Then the worker is reloaded or killed. In the third case, the worker is
    // killed, and the length of the body exceeds 32 bits.
    for (length, kills) in [(5000 + SMUGGLED.len(), false), (5000 + SMUGGLED.len(), true), (1 << 32, true)] {
        let mut client = http::Client::connect(&at.http).unwrap();
        let head = format!("POST /ok HTTP/1.1\r\nHost: a\r\nContent-Length: {length}\r\n\r\n");
        let begun = if length < 1 << 32 { 5000 } else { 0 };
        client.stream.get_mut().write_all(&[head.as_bytes(), &vec![b'x'; begun]].concat()).unwrap();
        assert!(matches!(client.response(false).unwrap().status, 200 | 413));
        replace(&mut at, kills);
        let _ = client.stream.get_mut().write_all(SMUGGLED.as_bytes());
        assert!(client.response(false).map_or(true, |answer| answer.status != 418), "{length} {kills}");
    }
    // The body ends within a FastCGI record of a finished request.
    for kills in [false, true] {
        let mut client = fastcgi::Client::connect(&at.fastcgi).unwrap();
        client.send(&fastcgi::head(1, true, "POST", "/ok", Some(70_000))).unwrap();
        assert_eq!(client.response(1).unwrap().status(), 200);
        let smuggled = fastcgi::request(1, true, "GET", "/status/418", b"").concat();
        let mut record = fastcgi::record(fastcgi::STDIN, 1, &[&vec![b'x'; 5000], &smuggled[..]].concat(), 0);
        let rest = record.split_off(5008);
        client.stream.write_all(&record).unwrap();
        // Once a later request is answered, the data that was sent before it has been read.
        assert_eq!(http::get(&at.http, "/slow/50").unwrap().status, 200);
        replace(&mut at, kills);
        let _ = client.stream.write_all(&rest);
        let _ = client.send(&fastcgi::request(2, true, "GET", "/ok", b""));
        let answer = client.response(2);
        assert!(answer.as_ref().map_or(true, |answer| answer.status() == 200), "{:?}", answer.map(|a| a.status()));
    }
    at.server.stop();
}

/// Replaces the only worker.
fn replace(at: &mut Fixture, kills: bool) {
    let old = at.worker();
    if kills {
        kill(old, Signal::SIGKILL).unwrap();
    } else {
        at.server.signal(Signal::SIGHUP);
    }
    wait_until("the worker is replaced", || {
        let workers = at.server.workers();
        (workers.len() == 1 && !workers.contains(&old.as_raw())).then_some(())
    });
}

#[test]
fn a_head_too_large_to_pass_on_is_served_by_its_worker() {
    let mut at = start(&["--workers", "1"]);
    let mut client = http::Client::connect(&at.http).unwrap();
    let long = format!("GET /ok HTTP/1.1\r\nHost: a\r\nX-Long: {}", "x".repeat(90_000));
    client.stream.get_mut().write_all(long.as_bytes()).unwrap();
    assert_eq!(http::get(&at.http, "/slow/50").unwrap().status, 200);
    at.server.signal(Signal::SIGHUP);
    at.server.wait_for("reload done gen=2");
    let _ = client.stream.get_mut().write_all(b"\r\n\r\n");
    let answer = client.response(false);
    assert!(answer.as_ref().map_or(true, |answer| answer.status == 200), "a response is complete or absent");
    at.server.stop();
}
