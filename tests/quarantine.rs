//! A request that kills workers is refused for some time, and all other requests are still answered.

#![allow(clippy::unwrap_used, reason = "a failing test reports its location")]

mod common;

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use common::http::{self, Client};
use common::raw::{self, ALL, Protocol};
use common::{Server, StopOnDrop, fastcgi, http2, wait_until};
use forkyard_shm::{Scoreboard, Snapshot, State};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

fn crashy(arguments: &[&str]) -> Server {
    Server::start("crashy", &[&["--bind", "http:127.0.0.1:0", "--workers", "3"], arguments].concat())
}

/// Sends a deadly request until the server refuses it. Returns the number of deaths.
fn poison(address: &str, mut path: impl FnMut(usize) -> String) -> usize {
    let refused = |path: &str| http::get(address, path).is_ok_and(|response| response.status == 503);
    let mut deaths = 0;
    wait_until("the request is refused", || {
        let is_refused = refused(&path(deaths));
        deaths += usize::from(!is_refused);
        is_refused.then_some(())
    });
    deaths
}

#[test]
fn a_deadly_request_is_refused_after_three_deaths_and_no_other_request_is() {
    let mut server = crashy(&[]);
    let address = server.http();
    let (stop, good) = (AtomicBool::new(false), AtomicUsize::new(0));
    let mut deaths = 0;
    std::thread::scope(|scope| {
        let _stop = StopOnDrop(&stop);
        // Requests for a popular route are always in flight, even in the workers that die.
        for _ in 0..4 {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let Ok(mut client) = Client::connect(&address) else { continue };
                    // When a worker dies, the request may be answered with 502, and its connection may be closed. Otherwise, the regular
                    // response is expected.
                    while let Ok(response) = client.request("GET", "/slow/5", b"") {
                        if response.status == 502 {
                            break;
                        }
                        assert_eq!(response.status, 200, "{}", response.text());
                        good.fetch_add(1, Ordering::Relaxed);
                        if stop.load(Ordering::Relaxed) {
                            break;
                        }
                    }
                }
            });
        }
        // A client may repeat the request before the master has quarantined it.
        deaths = poison(&address, |_| "/segv?once=more".to_owned());
        assert!(deaths >= 3);
        let line = server.wait_for("quarantined a request");
        assert!(line.contains("request=\"GET /segv\" lasts=60s times=1"), "{line}");
        let before = good.load(Ordering::Relaxed);
        for _ in 0..20 {
            let response = http::get(&address, "/segv").unwrap();
            let seconds: u64 = response.header("retry-after").unwrap().parse().unwrap();
            assert!(response.status == 503 && (1..=61).contains(&seconds), "{seconds}");
        }
        assert_eq!(http::get(&address, "/ok").unwrap().status, 200);
        wait_until("other requests are answered", || (good.load(Ordering::Relaxed) > before + 50).then_some(()));
    });
    server.stop();
    assert_eq!(server.log().matches("worker died").count(), deaths, "no worker has died since the request was refused");
}

#[test]
fn a_deadly_route_with_many_ids_is_refused_by_its_pattern() {
    let mut server = crashy(&[]);
    assert!(poison(&server.http(), |number| format!("/poison/{number}")) >= 3);
    assert!(server.wait_for("quarantined").contains("request=\"GET /poison/*\""));
    server.stop();

    let mut server = crashy(&["--quarantine-by", "path", "--quarantine", "2"]);
    assert!(poison(&server.http(), |_| "/poison/1".to_owned()) >= 2);
    assert!(server.wait_for("quarantined").contains("request=\"GET /poison/1\""));
    assert_eq!(
        http::get(&server.http(), "/poison/2").unwrap().status,
        502,
        "the request kills a worker, and is not refused"
    );
    server.stop();
}

#[test]
fn one_further_death_quarantines_a_request_again() {
    let mut server = crashy(&["--quarantine-time", "300ms"]);
    poison(&server.http(), |_| "/exit/3".to_owned());
    assert!(server.wait_for("quarantined").contains("times=1"));
    server.wait_for("quarantine ended request=\"GET /exit/3\"");
    // The workers read a coarse clock, which has the resolution of the kernel's ticks.
    wait_until("the request kills a worker again", || {
        (http::get(&server.http(), "/exit/3").unwrap().status == 502).then_some(())
    });
    assert!(server.wait_for("quarantined").contains("times=2"));
    server.stop();
}

#[test]
fn the_refusal_is_a_503_over_each_protocol() {
    for protocol in ALL {
        let mut server = protocol.start("crashy", &["--workers", "1", "--quarantine", "1"]);
        let ask = |server: &Server| raw::ask(&mut raw::connect(&server.binds[0]), &protocol.head("GET", "/abort", 0)).0;
        assert_eq!(ask(&server), 502, "{protocol:?}");
        server.wait_for("(--quarantine) request=\"GET /abort\"");
        assert_eq!(ask(&server), 503, "{protocol:?}");
        server.stop();
    }
}

#[test]
fn a_request_whose_functions_hang_is_refused_after_three_replaced_workers() {
    // The function must have begun by the time the timeout expires, even on a busy machine.
    let hangs = ["--threads", "2", "--request-timeout", "3s", "--hang-timeout", "300ms", "--drain-timeout", "1h"];
    let mut server = crashy(&hangs);
    let address = server.http();
    for _ in 0..3 {
        assert_eq!(http::get(&address, "/thread/hang?a=b").unwrap().status, 504);
        server.wait_for("reason=hung-thread");
        server.wait_for("worker exited"); // so that the next request hangs in another worker
    }
    let line = server.logged("quarantined a request");
    assert!(line.contains("request=\"GET /thread/hang\""), "{line}");
    wait_until("the request is refused", || (http::get(&address, "/thread/hang").ok()?.status == 503).then_some(()));
    assert_eq!(http::get(&address, "/thread/ok").unwrap().status, 200);
    server.stop();
    assert!(!server.log().contains("worker died"), "{}", server.log());
}

#[test]
fn hung_functions_in_one_worker_count_once() {
    let directory = tempfile::tempdir().unwrap();
    let broken = directory.path().join("broken");
    let mut command = std::process::Command::new(common::program("crashy"));
    // The function must have begun by the time the timeout expires, even on a busy machine.
    let hangs = ["--threads", "4", "--request-timeout", "3s", "--hang-timeout", "300ms", "--quarantine", "2"];
    let command = command.args(["--bind", "http:127.0.0.1:0", "--workers", "1"]).args(hangs);
    let mut server = Server::start_command(command.env("CRASHY_BROKEN", &broken));
    std::fs::write(&broken, "").unwrap(); // prevents a replacement, so that the worker keeps running
    for _ in 0..3 {
        assert_eq!(http::get(&server.http(), "/thread/hang").unwrap().status, 504);
        server.wait_for("reason=hung-thread");
    }
    server.stop();
    assert!(!server.log().contains("quarantined"), "{}", server.log());
}

#[test]
fn a_signal_from_another_process_implicates_no_request_and_its_sender_is_logged() {
    let mut server = Protocol::Http.start("crashy", &["--workers", "1", "--quarantine", "1"]);
    let own = std::process::id();
    for signal in [
        Signal::SIGSEGV,
        Signal::SIGBUS,
        Signal::SIGABRT,
        Signal::SIGFPE,
        Signal::SIGILL,
        Signal::SIGSYS,
        Signal::SIGTRAP,
        Signal::SIGXCPU,
    ] {
        let connections = send_among(Way::Apart(Protocol::Http), &server, &["/slow/600000"], "/thread/sleep-600000");
        let board = server.segment().scoreboard();
        let row = wait_until("both requests are in flight", || serving(&board).filter(|row| row.running.len() == 1));
        kill(Pid::from_raw(row.pid.cast_signed()), signal).unwrap();
        let line = server.wait_for("worker died");
        assert!(line.contains(&format!(" signal={} ", &signal.as_str()[3..])), "{line}");
        assert!(line.contains(&format!(" sent_by={own} ")) && !line.contains("crashed_in"), "{line}");
        drop(connections);
    }
    // A signal that a process sends to itself counts as a death caused by the request.
    wait_until("there is a worker", || (http::get(&server.http(), "/abort").ok()?.status == 502).then_some(()));
    server.wait_for("(--quarantine) request=\"GET /abort\"");
    server.stop();
    let log = server.log();
    assert_eq!(log.matches("quarantined").count(), 1, "{log}");
}

#[test]
fn quarantine_can_be_disabled() {
    let mut server = crashy(&["--quarantine", "0"]);
    for _ in 0..6 {
        assert_eq!(http::get(&server.http(), "/segv").unwrap().status, 502);
        server.wait_for("worker died");
    }
    server.stop();
}

/// How requests are distributed over connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// Each request on its own connection.
    Apart(Protocol),
    /// All requests on one connection.
    FastCgi,
    Http2,
}

impl Way {
    fn start(self, arguments: &[&str]) -> Server {
        let protocol = match self {
            Self::Apart(protocol) => protocol,
            Self::FastCgi => Protocol::FastCgi,
            Self::Http2 => Protocol::Http,
        };
        let arguments = [&["--workers", "1", "--quarantine", "3", "--max-multiplexed", "500"], arguments].concat();
        protocol.start("crashy", &arguments)
    }

    /// Sends these requests, and returns their connections. The last request is on the last connection.
    fn send(self, server: &Server, targets: &[&str]) -> Vec<UnixStream> {
        let together = |bytes: Vec<u8>| {
            let mut stream = raw::connect(&server.binds[0]);
            stream.write_all(&bytes).unwrap();
            vec![stream]
        };
        match self {
            Self::Apart(protocol) => {
                let one = |target: &&str| {
                    let mut stream = raw::connect(&server.binds[0]);
                    stream.write_all(&protocol.head("GET", target, 0)).unwrap();
                    stream
                };
                targets.iter().map(one).collect()
            }
            Self::FastCgi => {
                let requests =
                    targets.iter().zip(1..).map(|(target, id)| fastcgi::request(id, true, "GET", target, b""));
                together(requests.flatten().flatten().collect())
            }
            Self::Http2 => {
                let begin = [http2::PREFACE, &http2::frame(http2::SETTINGS, 0, 0, b"")].concat();
                let head = |(target, stream): (&&str, u32)| http2::head(stream, http2::END_STREAM, "GET", target, &[]);
                together([begin, targets.iter().zip((1..).step_by(2)).flat_map(head).collect()].concat())
            }
        }
    }

    /// Returns whether this is a response with this status.
    fn has_status(self, response: &[u8], status: u16) -> bool {
        match (self, status) {
            (Self::Http2, 502) => response.windows(4).any(|bytes| bytes == [0x48, 0x82, 0x6c, 0x02]),
            (Self::Http2, 503) => response.windows(5).any(|bytes| bytes == [0x48, 0x83, 0x6c, 0x0c, 0xff]),
            (Self::Http2, _) => panic!("this function has no encoding of {status}"),
            (Self::Apart(_) | Self::FastCgi, _) => raw::status(response) == Some(status),
        }
    }

    /// Reads until a response with this status has arrived.
    fn expect(self, mut stream: &UnixStream, status: u16) {
        let mut response = Vec::new();
        while !self.has_status(&response, status) {
            let mut piece = [0; 4096];
            let count = stream.read(&mut piece).unwrap();
            assert!(count > 0, "{self:?}: no {status} in {:?}", String::from_utf8_lossy(&response));
            response.extend_from_slice(&piece[..count]);
        }
    }
}

/// Returns the scoreboard row of the only worker, if the worker is ready. The row of a dead worker does not change until its replacement
/// has started.
fn serving(board: &Scoreboard) -> Option<Snapshot> {
    board.read(0).filter(|row| row.state == State::Ready)
}

/// Sends `others`, waits until the worker is serving them, and then sends `last` over the same kind of connection.
fn send_among(way: Way, server: &Server, others: &[&str], last: &str) -> Vec<UnixStream> {
    let board = server.segment().scoreboard();
    wait_until("the worker is ready", || serving(&board));
    let is_serving = || serving(&board).is_some_and(|row| row.in_flight as usize >= others.len());
    let mut connections = way.send(server, others);
    wait_until("all other requests are in flight", || is_serving().then_some(()));
    connections.extend(way.send(server, &[last]));
    connections
}

fn in_quotes<'a>(line: &'a str, key: &str) -> &'a str {
    let start = format!(" {key}=\"");
    line.split_once(&start).unwrap_or_else(|| panic!("no {key} in {line:?}")).1.split_once('"').unwrap().0
}

#[test]
fn a_deadly_request_among_a_hundred_others_is_refused_after_as_many_deaths_as_on_an_idle_worker() {
    let hundred = ["/slow/600000"; 100];
    // More threads are busy than the scoreboard has slots for.
    let busy = [&hundred[..], &["/thread/sleep-600000"; 18]].concat();
    let http = Way::Apart(Protocol::Http);
    for (way, poison, named, others) in [
        (http, "/segv", "crashed_in", &hundred[..]),
        (Way::Http2, "/segv", "crashed_in", &hundred),
        (Way::Apart(Protocol::FastCgi), "/segv", "crashed_in", &hundred),
        (Way::FastCgi, "/segv", "crashed_in", &hundred),
        (Way::Apart(Protocol::Scgi), "/segv", "crashed_in", &hundred),
        (http, "/thread/segv", "crashed_in", &busy),
        (http, "/exit/3", "exited_in", &busy),
        (http, "/exit-at-once/3", "at_work", &hundred),
    ] {
        let mut server = way.start(&["--threads", "20", "--drain-timeout", "1s"]);
        for _ in 0..3 {
            let connections = send_among(way, &server, others, poison);
            let line = server.wait_for("worker died");
            assert_eq!(in_quotes(&line, named), format!("GET {poison}"), "{way:?}: {line}");
            drop(connections);
        }
        server.wait_for(&format!("(--quarantine) request=\"GET {poison}\""));
        let connections = send_among(way, &server, others, poison);
        way.expect(connections.last().unwrap(), 503);
        let panicked = way.send(&server, &["/panic"]);
        assert!(server.wait_for("a request panicked").contains("request=\"GET /panic\""), "{way:?}");
        drop((connections, panicked));
        server.stop();
        let log = server.log();
        assert_eq!(log.matches("worker died").count(), 3, "{way:?}: {log}");
        assert!(!log.contains("request=\"\""), "{way:?}: {log}");
    }
}

#[test]
fn the_requests_of_a_killed_worker_are_logged_and_none_of_them_is_refused() {
    let mut server = Way::Apart(Protocol::Http).start(&[]);
    for _ in 0..4 {
        let others = ["/slow/600000"; 40];
        let connections = send_among(Way::Apart(Protocol::Http), &server, &others, "/kill");
        let line = server.wait_for("worker died");
        assert_eq!(in_quotes(&line, "at_work"), "GET /kill", "{line}");
        assert!(line.contains("signal=KILL"), "{line}");
        drop(connections);
    }
    server.stop();
    assert!(!server.log().contains("quarantined"), "{}", server.log());
}
