//! A stopped process holds the lock of the event log. Datagrams that arrive while the process is stopped wait, or are dropped and counted,
//! as docs/events-from-other-languages.md describes.

#![allow(clippy::unwrap_used, reason = "a failing test reports its location")]

mod common;

use std::io::Write as _;
use std::os::unix::net::UnixDatagram;

use common::{Server, is_gone, process, raw, stop, wait_until};
use forkyard_shm::PublishError;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

struct Place {
    server: Server,
    sender: UnixDatagram,
    _directory: TempDir,
}

impl Place {
    fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("events");
        let socket = path.display().to_string();
        let arguments = ["--bind", "http:127.0.0.1:0", "--workers", "1", "--cache", "0", "--events", "64M"];
        let server =
            Server::start("stream", &[&arguments[..], &["--hang-timeout", "0", "--events-socket", &socket]].concat());
        let sender = UnixDatagram::unbound().unwrap();
        sender.set_write_timeout(Some(common::PATIENCE)).unwrap();
        sender.connect(path).unwrap();
        Self { server, sender, _directory: directory }
    }

    /// Stops a worker while it holds the log's lock, and returns the worker. The worker is publishing large events. It holds the lock while
    /// it copies an event, and each copy takes a while.
    fn hold(&self) -> Pid {
        let worker = wait_until("there is a worker", || self.server.workers().first().copied());
        let worker = Pid::from_raw(worker);
        let mut client = raw::connect(&self.server.binds[0]);
        let length = "Content-Length: 0\r\n";
        client
            .write_all(format!("POST /flood/large/100000/8000000 HTTP/1.1\r\nHost: a\r\n{length}\r\n").as_bytes())
            .unwrap();
        let log = self.server.segment().events();
        wait_until("the worker publishes", || (log.last_id("large") > 0).then_some(()));
        wait_until("the worker is stopped while it holds the lock", || {
            stop(worker);
            let held = log.publish("probe", "", b"") == Err(PublishError::Busy);
            if !held {
                kill(worker, Signal::SIGCONT).unwrap();
            }
            held.then_some(worker)
        })
    }

    /// Kills the worker, so that the lock is released.
    fn release(worker: Pid) {
        kill(worker, Signal::SIGKILL).unwrap();
        wait_until("the worker is dead", || is_gone(worker.as_raw()).then_some(()));
    }

    fn send(&self, number: usize) {
        self.sender.send(format!("n\n\n{number}").as_bytes()).unwrap();
    }

    /// Returns the published numbers that the large events have not evicted from the log.
    fn published(&self) -> Vec<usize> {
        let since = self.server.segment().events().since("n", 0, usize::MAX);
        since.events.iter().map(|event| std::str::from_utf8(&event.data).unwrap().parse().unwrap()).collect()
    }

    fn last_id(&self) -> u64 {
        self.server.segment().events().last_id("n")
    }

    fn wait_for_relay(&self) {
        let is_relay = |pid: &i32| process(*pid).is_some_and(|one| one.name == "relay");
        wait_until("there is a relay", || self.server.children().iter().any(is_relay).then_some(()));
    }
}

#[test]
fn datagrams_wait_while_the_log_is_locked_and_are_dropped_after_a_timeout_until_it_is_free() {
    let mut place = Place::start();
    let worker = place.hold();
    (0..10).for_each(|number| place.send(number));
    place.wait_for_relay();
    assert_eq!(place.last_id(), 0);
    Place::release(worker);
    wait_until("all datagrams are published", || (place.last_id() == 10).then_some(()));
    assert_eq!(place.published(), (0..10).collect::<Vec<_>>());
    assert!(!place.server.log().contains("not published"), "{}", place.server.log());

    let worker = place.hold();
    (100..110).for_each(|number| place.send(number));
    let line = place.server.wait_for("datagrams not published count=");
    assert!(line.contains("another process holds the event log (try again)"), "{line}");
    // The first datagram waited for the full timeout; the later datagrams were dropped without waiting.
    if !line.contains("total=10 ") {
        place.server.wait_for("total=10 ");
    }
    Place::release(worker);
    wait_until("the relay has the lock again", || {
        place.send(10);
        (place.last_id() > 10).then_some(())
    });
    assert!(place.published().iter().all(|number| *number <= 10), "no dropped datagram is published later");
    place.server.stop();
}

#[test]
fn an_upgrade_while_the_log_is_locked_leaves_waiting_datagrams_to_the_next_relay() {
    let mut place = Place::start();
    place.send(0);
    wait_until("the relay publishes", || (place.last_id() == 1).then_some(()));
    let worker = place.hold();
    (1..=10).for_each(|number| place.send(number));
    place.server.signal(Signal::SIGUSR2);
    place.server.wait_for("upgraded version=");
    Place::release(worker);
    place.send(11);
    wait_until("the last datagram is published", || place.published().contains(&11).then_some(()));
    let published: Vec<_> = place.published().into_iter().filter(|number| *number > 0).collect();
    assert!(published.is_sorted_by(|one, other| one < other), "{published:?}");
    assert!(published.len() >= 10, "at most the datagram that the relay was publishing is lost: {published:?}");
    place.server.stop();
}
