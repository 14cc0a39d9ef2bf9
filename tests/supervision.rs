//! How the master and the other workers react when a process dies or is asked to exit.

#![allow(clippy::unwrap_used, reason = "a failing test reports its location")]

mod common;

use std::collections::BTreeSet;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use common::http::{self, Client};
use common::{Server, StopOnDrop, descriptors_of, is_gone, process, program, wait_until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const HTTP: [&str; 2] = ["--bind", "http:127.0.0.1:0"];

fn crashy(arguments: &[&str]) -> Server {
    Server::start("crashy", &[&HTTP, arguments].concat())
}

/// Stops the only worker with SIGSTOP. From then on, data sent to the worker waits in the kernel.
fn stop_worker(server: &Server) -> Pid {
    let worker = Pid::from_raw(*server.workers().first().unwrap());
    common::stop(worker);
    worker
}

/// Sends a request from each client while the worker is stopped and asked to drain. Then resumes the worker, which must answer all
/// requests.
fn drains_with(server: &mut Server, worker: Pid, clients: Vec<Client>) {
    server.signal(Signal::SIGTERM);
    server.wait_for("signal to drain");
    std::thread::scope(|scope| {
        let ask = |mut client: Client| scope.spawn(move || client.request("GET", "/ok", b""));
        let waiting: Vec<_> = clients.into_iter().map(ask).collect();
        kill(worker, Signal::SIGCONT).unwrap();
        for client in waiting {
            assert_eq!(client.join().unwrap().unwrap().text(), "ok\n");
        }
    });
    assert_eq!(server.wait_end(), Some(0));
}

#[test]
fn the_cache_survives_two_hundred_kills_under_load() {
    let mut server =
        Server::start("pages", &[&HTTP[..], &["--workers", "2", "--respawn-rate", "1000", "--cache", "2M"]].concat());
    let address = server.http();
    let segment = server.segment();
    let descriptors = descriptors_of(server.pid().as_raw());
    let (stop, good) = (AtomicBool::new(false), AtomicUsize::new(0));

    std::thread::scope(|scope| {
        let _clients_end = StopOnDrop(&stop);
        for thread in 0..4 {
            let (address, stop, good) = (&address, &stop, &good);
            scope.spawn(move || {
                let mut random = fastrand::Rng::with_seed(thread);
                while !stop.load(Ordering::Relaxed) {
                    let mut client = Client::connect(address).unwrap();
                    for _ in 0..random.u32(1..20) {
                        let number = random.u32(0..300);
                        let response = if random.u32(0..10) == 0 {
                            client.request("POST", &format!("/purge/page-{number}"), b"")
                        } else {
                            client.request("GET", &format!("/page/{number}"), b"")
                        };
                        let response = response.expect("a kill closes no connection, and every request is answered");
                        if response.status == 502 {
                            break; // the request was in flight
                        }
                        if response.status == 200 {
                            assert_eq!(response.body.len(), 16 << 10);
                            assert!(response.text().contains(&format!("<title>Page {number}</title>")));
                        } else {
                            assert_eq!(response.status, 204);
                        }
                        good.fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
        }
        for round in 0..200 {
            let before = good.load(Ordering::Relaxed);
            // A worker that has exited since it was listed is not killed. Its replacement is in the next list.
            let victim = wait_until("there is a worker to kill", || {
                let victim = *server.workers().iter().nth(round % 2)?;
                kill(Pid::from_raw(victim), Signal::SIGKILL).ok().map(|()| victim)
            });
            server.renewed(2, &BTreeSet::from([victim]));
            wait_until("requests are answered", || (good.load(Ordering::Relaxed) > before).then_some(()));
        }
    });

    for _ in 0..200 {
        let line = server.wait_for("worker died");
        assert!(line.contains("signal=KILL") && line.contains("served="), "{line}");
    }
    segment.cache().audit().expect("the cache is consistent");
    let stats = segment.cache().stats();
    assert_eq!((stats.used_bytes + stats.free_bytes, stats.lost), (stats.capacity, 0), "{stats:?}");
    assert!(stats.stores > 0 && stats.hits > 0 && stats.entries > 0, "{stats:?}");

    let before = segment.cache().stats();
    for _ in 0..2 {
        assert_eq!(http::get(&address, "/page/1000").unwrap().status, 200);
    }
    let after = segment.cache().stats();
    assert!(after.stores > before.stores && after.hits > before.hits, "the cache still stores and returns pages");

    assert!(server.children().iter().all(|&pid| process(pid).is_some_and(|child| child.state != 'Z')), "no zombies");
    let as_before = || (descriptors_of(server.pid().as_raw()) == descriptors).then_some(());
    wait_until("the master has as many descriptors as before", as_before);
    let of_workers: BTreeSet<usize> = server.workers().iter().map(|&pid| descriptors_of(pid)).collect();
    assert!(of_workers.iter().all(|&count| count < 30), "{of_workers:?}");
    server.stop();
}

#[test]
fn a_death_is_logged_in_one_line_with_the_request() {
    let mut server = crashy(&["--workers", "2"]);
    let address = server.http();
    for (path, ending) in [("/segv", "signal=SEGV"), ("/abort", "signal=ABRT"), ("/exit/3", "status=3")] {
        assert_eq!(http::get(&address, path).unwrap().status, 502, "{path} kills its worker");
        let line = server.wait_for("worker died");
        for words in [ending, "slot=", "pid=", "gen=1", "served=", &format!("GET {path} ")] {
            assert!(line.contains(words), "no {words:?} in {line:?}");
        }
        wait_until("the server answers", || http::get(&address, "/ok").ok());
    }
    server.stop();
}

#[test]
fn a_panic_fails_one_request_with_500() {
    let mut server = crashy(&["--workers", "1"]);
    let children = server.workers();
    let mut client = Client::connect(&server.http()).unwrap();
    assert_eq!(client.request("GET", "/panic", b"").unwrap().status, 500);
    assert_eq!(client.request("GET", "/ok", b"").unwrap().text(), "ok\n", "the same connection is still usable");
    let line = server.wait_for("a request panicked");
    assert!(line.contains("asked to") && line.contains("GET /panic"), "{line}");
    server.has_only(&children);
    drop(client);
    server.stop();
}

#[test]
fn sigterm_drains_and_sigint_does_not() {
    for (signal, answered) in [(Signal::SIGTERM, true), (Signal::SIGINT, false), (Signal::SIGQUIT, false)] {
        let mut server = crashy(&["--workers", "2"]);
        let mut client = Client::connect(&server.http()).unwrap();
        let mut idle = Client::connect(&server.http()).unwrap();
        idle.request("GET", "/ok", b"").unwrap();
        let segment = server.segment();
        std::thread::scope(|scope| {
            // A request that must be cut off must not complete earlier on its own.
            let target = if answered { "/slow/3000" } else { "/slow/600000" };
            let slow = scope.spawn(move || client.request("GET", target, b""));
            wait_until("the request is in flight", || {
                let rows = (0..segment.scoreboard().rows()).filter_map(|slot| segment.scoreboard().read(slot));
                rows.into_iter().any(|row| row.in_flight > 0).then_some(())
            });
            server.signal(signal);
            assert_eq!(server.wait_end(), Some(0));
            let status = slow.join().unwrap().unwrap().status;
            assert_eq!(status, if answered { 200 } else { 502 }, "{signal}");
        });
    }
}

#[test]
fn connections_waiting_to_be_accepted_are_served_before_a_worker_exits() {
    let mut server = crashy(&["--workers", "1"]);
    let worker = stop_worker(&server);
    let clients = (0..20).map(|_| Client::connect(&server.http()).unwrap()).collect();
    drains_with(&mut server, worker, clients);
}

#[test]
fn a_client_that_disconnected_in_the_queue_does_not_affect_others() {
    use nix::sys::socket::{setsockopt, sockopt};
    let mut server = crashy(&["--workers", "1"]);
    let worker = stop_worker(&server);
    let gone = Client::connect(&server.http()).unwrap();
    // The connection is reset, so accept(2) or getpeername(2) fails.
    setsockopt(gone.stream.get_ref(), sockopt::Linger, &libc::linger { l_onoff: 1, l_linger: 0 }).unwrap();
    drop(gone);
    let clients = (0..5).map(|_| Client::connect(&server.http()).unwrap()).collect();
    drains_with(&mut server, worker, clients);
}

#[test]
fn a_drain_that_takes_too_long_ends_in_a_kill() {
    let mut server = crashy(&["--workers", "1", "--drain-timeout", "200ms"]);
    let mut client = Client::connect(&server.http()).unwrap();
    std::thread::scope(|scope| {
        let slow = scope.spawn(move || client.request("GET", "/slow/600000", b"").unwrap().status);
        let segment = server.segment();
        wait_until("the request is in flight", || (segment.scoreboard().read(0)?.in_flight > 0).then_some(()));
        server.signal(Signal::SIGTERM);
        server.wait_for("worker killed: it did not finish in time (--drain-timeout)");
        let line = server.wait_for("worker exited");
        assert!(line.contains("signal=KILL") && line.contains("GET /slow/600000"), "{line}");
        assert_eq!(slow.join().unwrap(), 502);
        assert_eq!(server.wait_end(), Some(0));
    });
}

#[test]
fn sighup_replaces_every_worker_and_no_request_fails() {
    let directory = tempfile::tempdir().unwrap();
    let socket = format!("fastcgi:unix:{}", directory.path().join("a.sock").display());
    let mut server = crashy(&["--workers", "3", "--bind", &socket]);
    let (address, stop, count) = (server.http(), AtomicBool::new(false), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        let _clients_end = StopOnDrop(&stop);
        for thread in 0..6 {
            let (address, socket, stop, count) = (&address, &socket, &stop, &count);
            scope.spawn(move || {
                let mut kept = Client::connect(address).unwrap();
                while !stop.load(Ordering::Relaxed) {
                    if thread % 3 == 0 {
                        assert_eq!(http::get(address, "/slow/1").unwrap().status, 200);
                    } else if thread % 3 == 1 {
                        // A keep-alive connection is closed after a response that announces the close.
                        let response = kept.request("GET", "/slow/1", b"").unwrap();
                        assert_eq!(response.status, 200);
                        if response.header("connection") == Some("close") {
                            kept = Client::connect(address).unwrap();
                        }
                    } else {
                        let mut client = common::fastcgi::Client::connect(socket).unwrap();
                        client.send(&common::fastcgi::request(1, false, "GET", "/slow/1", b"")).unwrap();
                        assert_eq!(client.response(1).unwrap().status(), 200);
                    }
                    count.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        for generation in 2..6 {
            let old = server.workers();
            let before = count.load(Ordering::Relaxed);
            server.signal(Signal::SIGHUP);
            server.wait_for(&format!("reload done gen={generation}"));
            server.renewed(3, &old);
            wait_until("requests are answered", || (count.load(Ordering::Relaxed) > before + 20).then_some(()));
        }
    });
    server.stop();
}

#[test]
fn a_reload_that_cannot_start_keeps_the_old_workers_and_a_later_reload_recovers() {
    let directory = tempfile::tempdir().unwrap();
    let broken = directory.path().join("broken");
    let mut server = Server::start_command(
        Command::new(program("crashy")).args(HTTP).args(["--workers", "2"]).env("CRASHY_BROKEN", &broken),
    );
    let old = server.workers();
    std::fs::write(&broken, "").unwrap();
    server.signal(Signal::SIGHUP);
    let line = server.wait_for("worker died");
    assert!(line.contains("broken on purpose") && line.contains("gen=2"), "its last words: {line}");
    assert!(server.wait_for("reload failed: ").contains(" gen=2 "));
    server.has_only(&old);
    assert_eq!(http::get(&server.http(), "/ok").unwrap().status, 200);

    std::fs::remove_file(&broken).unwrap();
    server.signal(Signal::SIGHUP);
    server.wait_for("reload done gen=3");
    server.renewed(2, &old);
    server.stop();
}

#[test]
fn workers_that_cannot_start_are_retried_with_increasing_delays_and_the_master_survives() {
    let directory = tempfile::tempdir().unwrap();
    let broken = directory.path().join("broken");
    std::fs::write(&broken, "").unwrap();
    let mut server = Server::launch(
        Command::new(program("crashy")).args(HTTP).args(["--workers", "4"]).env("CRASHY_BROKEN", &broken),
    );
    for (failures, delay) in [(1, 100), (2, 200), (3, 400)] {
        server.wait_for(&format!(
            "workers die before they are ready (see the lines above) failures={failures} next_try={delay}ms"
        ));
    }
    std::fs::remove_file(&broken).unwrap();
    server.wait_for("ready in ");
    let workers = server.workers();
    assert_eq!(workers.len(), 4);
    server.has_only(&workers);
    server.stop();
}

#[test]
fn a_worker_that_never_becomes_ready_is_killed_and_the_others_serve() {
    let directory = tempfile::tempdir().unwrap();
    let broken = directory.path().join("broken");
    let mut server = Server::start_command(
        Command::new(program("crashy"))
            .args(HTTP)
            .args(["--workers", "1", "--start-timeout", "3s"])
            .env("CRASHY_BROKEN", &broken),
    );
    let old = server.workers();
    std::fs::write(&broken, "hang").unwrap();
    server.signal(Signal::SIGHUP);
    server.wait_for("worker killed: it was not ready in time (--start-timeout)");
    assert!(server.wait_for("reload failed: ").contains(" gen=2 "));
    server.has_only(&old);
    assert_eq!(http::get(&server.http(), "/ok").unwrap().status, 200);
    server.stop();
}

#[test]
fn sigttin_and_sigttou_change_the_number_of_workers() {
    let mut server = crashy(&["--workers", "2"]);
    server.signal(Signal::SIGTTIN);
    server.wait_for("workers=3");
    server.renewed(3, &BTreeSet::new());
    for expected in [2, 1] {
        server.signal(Signal::SIGTTOU);
        server.wait_for(&format!("workers={expected}"));
        server.renewed(expected, &BTreeSet::new());
    }
    server.signal(Signal::SIGTTOU);
    server.wait_for("it is at its limit workers=1");
    server.signal(Signal::SIGUSR1);
    server.wait_for("log files reopened errors=0");
    assert_eq!(http::get(&server.http(), "/ok").unwrap().status, 200);
    server.stop();
}

#[test]
fn workers_that_ask_not_to_be_replaced_are_not() {
    let mut server = crashy(&["--workers", "2"]);
    let address = server.http();
    assert_eq!(http::get(&address, "/exit/125").unwrap().status, 502);
    server.wait_for("worker exited and asked not to be replaced");
    server.wait_for("workers=1");
    assert_eq!(http::get(&address, "/ok").unwrap().status, 200);
    assert_eq!(http::get(&address, "/exit/125").unwrap().status, 502);
    assert_eq!(server.wait_end(), Some(1));
    server.wait_for("every worker asked not to be replaced");
}

#[test]
fn a_worker_that_exits_with_125_before_it_is_ready_has_failed_to_start() {
    let arguments = ["--bind", "http:127.0.0.1:0", "--workers", "2", "--health-path", "/exit/125"];
    let mut server = Server::launch(Command::new(program("crashy")).args(arguments));
    server.wait_for("worker died");
    server.wait_for("workers die before they are ready (see the lines above) failures=3 ");
    server.stop();
    assert!(!server.log().contains("worker exited and asked not to be replaced"), "{}", server.log());
}

#[test]
fn no_process_outlives_a_killed_master_and_its_requests_are_finished() {
    let mut server = crashy(&["--workers", "3", "--drain-timeout", "5s"]);
    let address = server.http();
    let workers = server.workers();
    let segment = server.segment();
    let in_flight = || {
        let rows = (0..segment.scoreboard().rows()).filter_map(|slot| segment.scoreboard().read(slot));
        rows.map(|row| row.in_flight).sum::<u32>()
    };
    std::thread::scope(|scope| {
        // A worker whose event loop hangs cannot drain, so the alarm kills it. The other workers serve the remaining requests.
        let mut hanging = Client::connect(&address).unwrap();
        let hung = scope.spawn(move || hanging.request("GET", "/hang", b"").unwrap().status);
        wait_until("the event loop hangs", || (in_flight() == 1).then_some(()));
        let slow = scope.spawn({
            let address = address.clone();
            move || {
                // A connection may be waiting in the hung worker. Such a connection is closed, and the request is repeated with another
                // worker.
                wait_until("a slow request is answered", || {
                    http::get(&address, "/slow/2000").ok().filter(|slow| slow.status == 200)
                })
            }
        });
        wait_until("the slow request is in flight", || (in_flight() >= 2).then_some(()));
        server.signal(Signal::SIGKILL);
        assert_eq!(server.wait_end(), None);
        assert_eq!(slow.join().unwrap().status, 200);
        assert_eq!(hung.join().unwrap(), 502);
    });
    wait_until("all workers are gone", || workers.iter().all(|&pid| is_gone(pid)).then_some(()));
}

#[test]
fn signals_to_a_worker_do_not_affect_the_master() {
    let mut server = crashy(&["--workers", "2"]);
    let worker = Pid::from_raw(*server.workers().first().unwrap());
    for signal in [Signal::SIGHUP, Signal::SIGUSR1, Signal::SIGTTIN] {
        kill(worker, signal).unwrap(); // this signal has no effect on a worker
    }
    assert_eq!(http::get(&server.http(), "/ok").unwrap().status, 200);
    kill(worker, Signal::SIGTERM).unwrap();
    let line = server.wait_for("worker exited on its own");
    assert!(line.contains(&format!("pid={worker}")), "{line}");
    server.renewed(2, &BTreeSet::from([worker.as_raw()]));
    assert!(!server.log().contains("a signal to"), "the master is not affected by the signals");
    server.stop();
}

#[test]
fn process_1_reaps_orphans_and_stops_on_sigterm() {
    let directory = tempfile::tempdir().unwrap();
    let bind = format!("fastcgi:unix:{}", directory.path().join("a.sock").display());
    let mut command = Command::new("unshare");
    if !nix::unistd::geteuid().is_root() {
        command.args(["--user", "--map-root-user"]);
    }
    command.args(["--pid", "--fork", "--kill-child", "--mount-proc"]).arg(program("forkyard"));
    command.args(["run", "--direct", "--bind", &bind, "--workers", "1", "--settle", "10ms", "--log-level", "debug"]);
    // The program leaves an orphan behind, and continues to run.
    command.args(["--", "sh", "-c", "(exit 7 &) ; exec sleep 600"]);
    let mut server = Server::start_command(&mut command);
    let master = *server.children().first().unwrap();
    let line =
        if server.log().contains("reaped an orphan") { server.log() } else { server.wait_for("reaped an orphan") };
    assert!(line.contains("status=7") && line.contains("[1]"), "it is pid 1 there: {line}");
    kill(Pid::from_raw(master), Signal::SIGTERM).unwrap();
    assert!(server.wait_for("worker exited").contains("signal=TERM"), "a program gets the TERM that it is sent");
    assert_eq!(server.wait_end(), Some(0));
}
