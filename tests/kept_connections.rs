//! An idle connection survives the replacement of its worker, however the earlier requests on it arrived.

#![allow(clippy::unwrap_used, reason = "a failing test reports its location")]

mod common;

use std::io::Write as _;

use common::http::Client;
use common::{Server, fastcgi, http, scgi, wait_until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const BINDS: [&str; 6] = ["--bind", "http:127.0.0.1:0", "--bind", "fastcgi:127.0.0.1:0", "--bind", "scgi:127.0.0.1:0"];

fn start() -> Server {
    start_with(&[])
}

fn start_with(options: &[&str]) -> Server {
    Server::start("crashy", &[&BINDS[..], &["--workers", "1", "--log-level", "debug"], options].concat())
}

fn worker(server: &Server) -> i32 {
    wait_until("there is one worker", || {
        let workers = server.workers();
        workers.first().copied().filter(|_| workers.len() == 1)
    })
}

/// How a worker is replaced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum By {
    Reload,
    Death,
}

impl By {
    fn begin(self, server: &Server) -> i32 {
        let old = worker(server);
        match self {
            Self::Reload => server.signal(Signal::SIGHUP),
            Self::Death => kill(Pid::from_raw(old), Signal::SIGKILL).unwrap(),
        }
        old
    }

    fn replace(self, server: &Server) {
        let old = self.begin(server);
        left(server, old);
    }
}

fn left(server: &Server, old: i32) {
    wait_until("the worker is replaced", || (!server.workers().contains(&old) && worker(server) != old).then_some(()));
}

/// Returns when all data sent before this call has been read. This is certain once a later request is answered, because the event loop
/// reads it in a later iteration.
fn is_read(server: &Server) {
    assert_eq!(http::get(&server.http(), "/slow/1").unwrap().status, 200);
}

const HEAD: &str = "GET /ok HTTP/1.1\r\nHost: a\r\n\r\n";
const CHUNKED: &str = "POST /count HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n";
const LENGTH: &str = "POST /count HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n";

/// Returns requests in parts that are read one by one, and the number of requests in them.
fn ways() -> Vec<(&'static str, Vec<String>, usize)> {
    let pieces = |pieces: &[&str]| pieces.iter().map(|&piece| piece.to_owned()).collect::<Vec<_>>();
    vec![
        ("nothing", pieces(&[]), 0),
        ("whole", pieces(&[HEAD]), 1),
        ("in two pieces", pieces(&["GET /ok HT", "TP/1.1\r\nHost: a\r\n\r\n"]), 1),
        ("in three pieces", pieces(&["GET /ok HT", "TP/1.1\r\nHost: a\r\n", "\r\n"]), 1),
        ("in pieces, then whole", pieces(&["G", &HEAD[1..], HEAD]), 2),
        ("a long head", vec![format!("GET /ok HTTP/1.1\r\nHost: a\r\nX: {}\r\n\r\n", "x".repeat(20_000))], 1),
        ("bare line feeds", pieces(&["GET /ok HTTP/1.1\nHost: a\n\n"]), 1),
        ("pipelined", pieces(&[&HEAD.repeat(3)]), 3),
        ("pipelined, in pieces", pieces(&[&[HEAD, "GET /o"].concat(), "k HTTP/1.1\r\nHost: a\r\n\r\n"]), 2),
        ("chunked", pieces(&[&[CHUNKED, "3\r\nabc\r\n0\r\n\r\n"].concat()]), 1),
        ("chunked, its end by itself", pieces(&[&[CHUNKED, "3\r\nabc\r\n"].concat(), "0\r\n\r\n"]), 1),
        ("chunked, pipelined", pieces(&[&[CHUNKED, "3\r\nabc\r\n0\r\n\r\n", HEAD].concat()]), 2),
        ("a body by itself", pieces(&[&[LENGTH, "\r\n"].concat(), "abc"]), 1),
        ("after 100 Continue", pieces(&[&[LENGTH, "Expect: 100-continue\r\n\r\n"].concat(), "abc"]), 1),
    ]
}

fn responses(client: &mut Client, count: usize, way: &str) {
    for _ in 0..count {
        let response = client.response(false);
        let response = response.unwrap_or_else(|error| panic!("{way}: {error}"));
        assert_eq!((response.status, response.header("connection")), (200, None), "{way}");
    }
}

/// Sends requests in parts, and reads the responses.
fn request(server: &Server, client: &mut Client, pieces: &[String], count: usize, way: &str) {
    for piece in pieces {
        client.stream.get_mut().write_all(piece.as_bytes()).unwrap();
        is_read(server);
    }
    if way == "after 100 Continue" {
        assert_eq!(client.head().unwrap().0, 100);
    }
    responses(client, count, way);
}

/// Returns the number of open connections.
fn connections(server: &Server) -> usize {
    let board = server.segment().scoreboard();
    (0..board.rows()).filter_map(|slot| board.read(slot)).map(|row| row.connections as usize).sum()
}

/// Returns when all HTTP connections that have had a request have been idle for some seconds.
fn buffers_are_freed(server: &Server) {
    let with_request = ways().iter().filter(|(_, _, count)| *count > 0).count();
    wait_until("the buffers of idle connections are freed", || {
        let log = server.log();
        let lines = log.lines().filter(|line| line.contains("idle connections free their buffers"));
        let count: usize = lines.filter_map(|line| line.rsplit_once("count=")?.1.parse::<usize>().ok()).sum();
        (count >= with_request).then_some(())
    });
}

#[test]
fn an_idle_connection_survives_its_worker_however_its_requests_arrived() {
    an_idle_connection_survives_its_worker(|_| ());
}

#[test]
fn an_idle_connection_survives_its_worker_after_its_buffers_were_freed() {
    an_idle_connection_survives_its_worker(buffers_are_freed);
}

fn an_idle_connection_survives_its_worker(wait: fn(&Server)) {
    for by in [By::Reload, By::Death] {
        let mut server = start();
        let mut clients: Vec<_> = ways()
            .into_iter()
            .map(|(way, pieces, count)| {
                let mut client = Client::connect(&server.http()).unwrap();
                request(&server, &mut client, &pieces, count, way);
                (client, way)
            })
            .collect();
        let mut fastcgis: Vec<_> = (0..3).map(|_| fastcgi::Client::connect(&server.binds[1]).unwrap()).collect();
        assert_eq!(fastcgis[0].request("GET", "/ok", b"").unwrap().status(), 200);
        for piece in fastcgi::request(1, true, "POST", "/count", b"abc").concat().chunks(7) {
            fastcgis[1].stream.write_all(piece).unwrap();
            is_read(&server);
        }
        assert_eq!(fastcgis[1].response(1).unwrap().status(), 200);
        let fresh = scgi::Client::connect(&server.binds[2]).unwrap();
        is_read(&server);
        wait(&server);
        // The worker is replaced twice, so that the workers that received the connections also pass them on.
        for _ in 0..2 {
            by.replace(&server);
            for (client, way) in &mut clients {
                let sent = client.stream.get_mut().write_all(HEAD.as_bytes());
                sent.unwrap_or_else(|error| panic!("{by:?}, {way}: {error}"));
                responses(client, 1, &format!("{by:?}, {way}"));
            }
            for client in &mut fastcgis {
                assert_eq!(client.request("GET", "/ok", b"").unwrap().status(), 200, "{by:?}");
            }
        }
        assert_eq!(fresh.request("GET", "/ok", b"").unwrap().status(), 200, "{by:?}");
        server.stop();
    }
}

#[test]
fn a_partial_later_request_moves_with_its_connection_or_gets_502() {
    let mut server = start();
    for is_lost in [true, false] {
        let mut client = Client::connect(&server.http()).unwrap();
        client.stream.get_mut().write_all(HEAD.as_bytes()).unwrap();
        responses(&mut client, 1, "whole");
        client.stream.get_mut().write_all(&HEAD.as_bytes()[..9]).unwrap();
        if is_lost {
            is_read(&server); // a later request
        }
        By::Death.replace(&server);
        if is_lost {
            assert_eq!(client.response(false).unwrap().status, 502);
        } else {
            client.stream.get_mut().write_all(&HEAD.as_bytes()[9..]).unwrap();
            responses(&mut client, 1, "in pieces");
        }
    }
    server.stop();
}

#[test]
fn a_connection_in_use_during_a_reload_continues_after_its_requests() {
    let mut server = start();
    let slow = HEAD.replace("/ok", "/slow/1000");
    let body = CHUNKED.replace("/count", "/echo");
    let ways = [
        ("whole", vec![slow.clone()], 1, vec![]),
        ("in pieces", vec![slow[..9].to_owned(), slow[9..].to_owned()], 1, vec![]),
        ("pipelined", vec![[slow.as_str(), HEAD].concat()], 2, vec![]),
        ("pipelined, half of the second", vec![[slow.as_str(), &HEAD[..9]].concat()], 2, vec![HEAD[9..].to_owned()]),
        ("chunked", vec![body], 1, vec!["3\r\nabc\r\n".to_owned(), "0\r\n\r\n".to_owned()]),
    ];
    let mut clients: Vec<_> = ways
        .into_iter()
        .map(|(way, pieces, count, later)| {
            let mut client = Client::connect(&server.http()).unwrap();
            for piece in pieces {
                client.stream.get_mut().write_all(piece.as_bytes()).unwrap();
                is_read(&server);
            }
            (client, way, count, later)
        })
        .collect();
    let old = By::Reload.begin(&server);
    server.wait_for("reload done gen=2");
    for (client, way, count, later) in &mut clients {
        for piece in later {
            client.stream.get_mut().write_all(piece.as_bytes()).unwrap();
        }
        responses(client, *count, way);
    }
    left(&server, old);
    for (client, way, ..) in &mut clients {
        client.stream.get_mut().write_all(HEAD.as_bytes()).unwrap();
        responses(client, 1, way);
    }
    server.stop();
}

#[test]
fn an_idle_connection_continues_after_its_buffers_were_freed() {
    let mut server = start();
    let mut clients: Vec<_> = ways()
        .into_iter()
        .filter(|(_, _, count)| *count > 0)
        .map(|way| {
            let mut client = Client::connect(&server.http()).unwrap();
            client.stream.get_mut().write_all(HEAD.as_bytes()).unwrap();
            responses(&mut client, 1, "first");
            (client, way)
        })
        .collect();
    let mut leaver = Client::connect(&server.http()).unwrap();
    leaver.stream.get_mut().write_all(HEAD.as_bytes()).unwrap();
    responses(&mut leaver, 1, "first");
    buffers_are_freed(&server);
    drop(leaver);
    for (client, (way, pieces, count)) in &mut clients {
        request(&server, client, pieces, *count, way);
    }
    let open = clients.len();
    wait_until("only the other clients are connected", || (connections(&server) == open).then_some(()));
    server.stop();
}

#[test]
fn an_idle_connection_without_buffers_is_closed_after_the_idle_timeout() {
    let mut server = start_with(&["--idle-timeout", "5s"]);
    let mut client = Client::connect(&server.http()).unwrap();
    assert_eq!(client.request("GET", "/ok", b"").unwrap().status, 200);
    server.logged("idle connections free their buffers");
    assert_eq!(std::io::Read::read(&mut client.stream, &mut [0]).unwrap(), 0);
    server.stop();
}
