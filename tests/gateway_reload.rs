//! Reloads, scaling, recycling and stops under load. No request fails. A broken command leaves the server as it was.

#![allow(clippy::unwrap_used, reason = "a failing test reports its location")]

mod common;

use common::gateway::{Load, Place, Site, Tolerance, scaled};
use common::limit::InTime as _;
use common::{is_gone, program, wait_until};
use nix::sys::signal::Signal;

const CLIENTS: usize = 6;
const BINDS: [&str; 4] = ["--bind", "http:127.0.0.1:0", "--bind", "fastcgi:127.0.0.1:0"];

fn options<'a>(more: &[&'a str]) -> Vec<&'a str> {
    [&BINDS, &["--respawn-rate", "1000"][..], more].concat()
}

#[test]
fn no_request_fails_while_php_processes_and_gateways_are_reloaded() {
    let mut site = Site::php(&options(&[]), &[]);
    let load = Load::new(Tolerance::Nothing);
    load.run(&site, CLIENTS, || {
        for _ in 0..scaled(20) {
            let old = site.processes();
            let output = site.control(&["reload"]);
            assert!(output.status.success(), "{output:?}");
            wait_until("the old processes have exited", || {
                (old.iter().all(|&pid| is_gone(pid)) || load.has_failed()).then_some(())
            });
            if !load.answered(10) {
                break;
            }
        }
    });
    site.at_rest();
    assert_eq!((site.apps().len(), site.gateways().len()), (2, 2));
    site.server.stop();
    assert!(!site.server.log().contains("died"), "{}", site.server.log());
}

/// systemd and operators rely on this line: from then on, requests are served.
#[test]
fn the_server_is_ready_once_and_not_before_its_app_processes() {
    let place = Place::new();
    let waits =
        format!("while [ ! -e {} ]; do sleep 0.01; done; exec {}", place.text("go"), program("faulty").display());
    let mut command = place.run(&[], &["sh", "-c", &waits]);
    let mut server = common::Server::launch(&mut command);
    let status = || {
        let mut command = std::process::Command::new(program("forkyard"));
        let output =
            command.args(["status", "--json", "--control"]).arg(place.path("control")).output_in_time().unwrap();
        serde_json::from_slice::<serde_json::Value>(&output.stdout).ok()
    };
    wait_until("both gateways are ready", || {
        let ready = status()?["gateways"].as_array()?.iter().filter(|gateway| gateway["state"] == "ready").count();
        (ready == 2).then_some(())
    });
    assert!(!server.log().contains("ready in "), "{}", server.log());
    std::fs::write(place.path("go"), "").unwrap();
    server.wait_for("ready in ");
    server.stop();
    assert_eq!(server.log().matches("ready in ").count(), 1, "{}", server.log());
}

#[test]
fn the_server_is_ready_once_if_both_pools_become_ready_at_the_same_time() {
    for _ in 0..10 {
        let mut site = Site::faulty(&[]);
        site.server.stop();
        assert_eq!(site.server.log().matches("ready in ").count(), 1, "{}", site.server.log());
    }
}

#[test]
fn a_reload_with_a_broken_command_leaves_the_old_processes_in_service() {
    let place = Place::new();
    let faulty = program("faulty");
    let (file, works) = (place.path("forkyard.toml"), format!("['{}']", faulty.display()));
    let text = |command: &str| format!("command = {command}\nstart-timeout = '2s'\n");
    std::fs::write(&file, text(&works)).unwrap();
    let mut command = place.run(&options(&["--config", &file.to_string_lossy()]), &[]);
    let mut site = place.start(&mut command);
    let old = site.processes();
    let load = Load::new(Tolerance::Nothing);
    load.run(&site, CLIENTS, || {
        for broken in ["['false']", "['true']", "['sleep', '600']", "['/no/such/program']"] {
            std::fs::write(&file, text(broken)).unwrap();
            let output = site.control(&["reload"]);
            assert!(!output.status.success(), "{broken}: {output:?}");
            assert!(!output.stderr.is_empty(), "{broken}");
            assert_eq!(site.processes(), old, "{broken}");
            assert!(load.answered(10), "{broken}");
        }
        std::fs::write(&file, text(&works)).unwrap();
        let output = site.control(&["reload"]);
        assert!(output.status.success(), "{output:?}");
        wait_until("the old processes have exited", || old.iter().all(|&pid| is_gone(pid)).then_some(()));
        assert!(load.answered(10));
    });
    site.at_rest();
    site.server.stop();
}

#[test]
fn no_request_fails_while_the_server_is_upgraded_in_place() {
    let mut site = Site::php(&options(&[]), &[]);
    let master = site.status()["pid"].clone();
    let load = Load::new(Tolerance::Nothing);
    load.run(&site, CLIENTS, || {
        for _ in 0..scaled(10) {
            let old = site.processes();
            let output = site.control(&["upgrade"]);
            assert!(output.status.success(), "{output:?}");
            wait_until("the old processes have exited", || {
                (old.iter().all(|&pid| is_gone(pid)) || load.has_failed()).then_some(())
            });
            if !load.answered(10) {
                break;
            }
        }
    });
    site.at_rest();
    assert_eq!(site.status()["pid"], master);
    assert_eq!((site.apps().len(), site.gateways().len()), (2, 2));
    let output = site.control(&["scale", "3"]);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(site.apps().len(), 3);
    site.server.stop();
    assert!(!site.server.log().contains("died"), "{}", site.server.log());
}

#[test]
fn the_first_request_starts_a_process_if_there_is_none() {
    let mut site = Site::faulty(&options(&["--workers", "0..2", "--scale-down-after", "0"]));
    for _ in 0..2 {
        wait_until("there is no app process", || site.apps().is_empty().then_some(()));
        assert_eq!(site.get("/pid").status, 200);
    }
    site.server.stop();
}

#[test]
fn no_request_fails_while_the_number_of_processes_is_changed() {
    let mut site = Site::faulty(&options(&["--workers", "1"]));
    let load = Load::new(Tolerance::Nothing);
    load.run(&site, CLIENTS, || {
        for round in 0..scaled(20) {
            let count = [4, 1, 3, 2][usize::try_from(round).unwrap() % 4];
            let output = site.control(&["scale", &count.to_string()]);
            assert!(output.status.success(), "{output:?}");
            wait_until("there are this many processes", || (site.apps().len() == count).then_some(()));
            if !load.answered(20) {
                break;
            }
        }
    });
    site.server.stop();
    assert!(!site.server.log().contains("died"), "{}", site.server.log());
}

#[test]
fn processes_are_added_while_requests_wait_and_removed_when_they_are_idle() {
    let mut site = Site::faulty(&options(&["--workers", "1..4", "--scale-down-after", "1s"]));
    assert_eq!(site.apps().len(), 1);
    let mut clients = Vec::new();
    for number in 0..4 {
        clients.push(site.hold(&number.to_string(), "/hold").0);
    }
    assert_eq!(site.apps().len(), 4);
    (0..4).for_each(|number| site.release(&number.to_string()));
    for mut client in clients {
        assert_eq!(client.response(false).unwrap().text(), "held\n");
    }
    wait_until("the idle processes are removed", || (site.apps().len() == 1).then_some(()));
    assert_eq!(site.get("/pid").status, 200);
    site.server.stop();
}

#[test]
fn no_request_fails_while_processes_are_recycled() {
    let mut site = Site::php(&options(&["--workers", "3", "--max-requests", "50~10"]), &[]);
    let load = Load::new(Tolerance::Nothing);
    load.run(&site, CLIENTS, || {
        load.answered(scaled(4000));
    });
    site.at_rest();
    let status = site.status();
    let gateways = status["gateways"].as_array().unwrap();
    assert!(gateways.iter().all(|gateway| gateway["requests"].as_u64().unwrap() > 100), "{status}");
    site.server.stop();
    let log = site.server.log();
    let recycled = log.matches("app process exited").count() as u64;
    assert!(recycled >= scaled(4000) / 100, "{recycled}\n{log}");
    assert!(!log.contains("died"), "{log}");
}

#[test]
fn a_stop_and_a_reload_wait_for_the_requests_of_clients_that_have_left() {
    let mut site = Site::faulty(&options(&["--workers", "2"]));
    let cases = [
        ("a", "GET", Signal::SIGHUP, "reload started gen=2 pool="),
        ("b", "POST", Signal::SIGHUP, "reload started gen=3 pool="),
        ("c", "POST", Signal::SIGTERM, "new connections are refused"),
    ];
    for (name, method, signal, line) in cases {
        let client = site.send(method, &format!("/hold?{name}"));
        wait_until("an app process has begun the request", || site.path(&format!("{name}.in")).exists().then_some(()));
        drop(client);
        wait_until("the gateways have noticed", || {
            let status = site.status();
            let mut gateways = status["gateways"].as_array().unwrap().iter();
            gateways.all(|gateway| gateway["in_flight"] == 0).then_some(())
        });
        let old = site.gateways();
        site.server.signal(signal);
        site.server.logged(line);
        site.release(name);
        wait_until("the old gateways have exited", || old.iter().all(|&pid| is_gone(pid)).then_some(()));
        assert!(site.path(&format!("{name}.out")).exists(), "the request {name} was interrupted");
    }
    assert_eq!(site.server.wait_end(), Some(0), "{}", site.server.log());
}

#[test]
fn a_stop_finishes_the_requests_in_flight_and_in_the_queue() {
    let mut site = Site::faulty(&options(&[]));
    let mut clients: Vec<_> = ["a", "b"].into_iter().map(|name| site.hold(name, "/hold").0).collect();
    clients.extend((0..4).map(|number| site.send("POST", &format!("/once?waits{number}"))));
    site.queued(4);
    site.server.signal(Signal::SIGTERM);
    site.server.logged("signal to");
    ["a", "b"].into_iter().for_each(|name| site.release(name));
    for mut client in clients {
        let response = client.response(false).unwrap();
        assert_eq!(response.status, 200, "{response:?}");
    }
    assert_eq!(site.server.wait_end(), Some(0), "{}", site.server.log());
    (0..4).for_each(|number| assert_eq!(site.executions(&format!("waits{number}")), 1));
}
