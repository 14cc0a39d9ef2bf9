//! App processes and gateways are killed, and exit on their own, under load. No POST is ever executed twice.

#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a failing test reports its location")]

mod common;

use std::collections::BTreeSet;
use std::sync::atomic::Ordering;

use common::gateway::{Load, Site, Tolerance, scaled};
use common::limit::InTime as _;
use common::{is_gone, wait_until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const CLIENTS: usize = 6;
const BINDS: [&str; 4] = ["--bind", "http:127.0.0.1:0", "--bind", "fastcgi:127.0.0.1:0"];

fn options<'a>(more: &[&'a str]) -> Vec<&'a str> {
    [&BINDS, &["--respawn-rate", "1000"][..], more].concat()
}

/// Kills app processes under load. Returns the number of requests that were answered with 502.
fn app_processes_are_killed(site: &Site) -> u64 {
    let load = Load::new(Tolerance::Posts);
    let mut random = fastrand::Rng::with_seed(7);
    load.run(site, CLIENTS, || {
        for _ in 0..scaled(200) {
            if !load.answered(random.u64(1..30)) {
                break;
            }
            site.kill_one(Site::apps, 3, &mut random);
        }
    });
    site.at_rest();
    load.sorry.load(Ordering::SeqCst)
}

#[test]
fn no_get_fails_and_no_post_runs_twice_while_php_processes_are_killed() {
    let mut site = Site::php(&options(&["--workers", "3"]), &[]);
    app_processes_are_killed(&site);
    site.server.stop();
    assert!(!site.server.log().contains("quarantined"), "{}", site.server.log());
}

#[test]
fn no_get_fails_and_no_post_runs_twice_while_fast_processes_are_killed() {
    let mut site = Site::faulty(&options(&["--workers", "3"]));
    app_processes_are_killed(&site);
    site.server.stop();
}

#[test]
fn no_request_fails_while_php_processes_exit_after_five_requests() {
    let mut site = Site::php(&options(&["--workers", "3"]), &[("PHP_FCGI_MAX_REQUESTS", "5")]);
    let load = Load::new(Tolerance::Nothing);
    load.run(&site, CLIENTS, || {
        load.answered(scaled(2000));
    });
    site.at_rest();
    site.server.stop();
    let log = site.server.log();
    assert!(log.matches("exited on its own").count() as u64 >= scaled(2000) / 5 - 3, "{log}");
}

#[test]
fn only_the_requests_of_a_killed_gateway_fail() {
    let mut site = Site::faulty(&options(&["--workers", "3"]));
    let load = Load::new(Tolerance::All);
    let mut random = fastrand::Rng::with_seed(7);
    let kills = scaled(200);
    let mut apps = BTreeSet::new();
    load.run(&site, CLIENTS, || {
        apps = site.apps();
        for _ in 0..kills {
            if !load.answered(random.u64(1..50)) {
                break;
            }
            site.kill_one(Site::gateways, 2, &mut random);
        }
    });
    site.at_rest();
    assert_eq!(site.apps(), apps, "no app process was replaced");
    let sorry = load.sorry.load(Ordering::SeqCst);
    // Each client has one request in flight.
    assert!(sorry <= kills * CLIENTS as u64, "{sorry}");
    site.server.stop();
}

/// The second gateway serves its request while the first one is killed.
#[test]
fn a_killed_gateway_interrupts_no_request_of_another_one() {
    let site = Site::faulty(&["--workers", "4"]);
    let mut clients = Vec::new();
    for number in 0..4 {
        clients.push(site.hold(&number.to_string(), "/hold").0);
    }
    let status = site.status();
    let busy = |gateway: &serde_json::Value| gateway["in_flight"].as_u64().unwrap();
    let gateways = status["gateways"].as_array().unwrap();
    assert_eq!(gateways.iter().map(busy).sum::<u64>(), 4, "{status}");
    let victim = i32::try_from(gateways[0]["pid"].as_i64().unwrap()).unwrap();
    kill(Pid::from_raw(victim), Signal::SIGKILL).unwrap();
    wait_until("the gateway is replaced", || (is_gone(victim) && site.gateways().len() == 2).then_some(()));
    (0..4).for_each(|number| site.release(&number.to_string()));
    let statuses: Vec<u16> = clients.into_iter().map(|mut client| client.response(false).unwrap().status).collect();
    let failed = statuses.iter().filter(|&&status| status == 502).count() as u64;
    assert_eq!(failed, busy(&gateways[0]), "{statuses:?} of {status}");
    assert!(statuses.iter().all(|status| [200, 502].contains(status)), "{statuses:?}");
    site.at_rest();
    assert_eq!(site.get("/pid").status, 200);
}

/// An app process that works for a dead gateway is not used before it has finished.
#[test]
fn a_process_whose_gateway_was_killed_is_used_again_when_it_is_idle() {
    let site = Site::faulty(&["--workers", "1", "--gateways", "1"]);
    let (mut client, pid) = site.hold("a", "/hold");
    let gateway = *site.gateways().first().unwrap();
    kill(Pid::from_raw(gateway), Signal::SIGKILL).unwrap();
    assert_eq!(client.response(false).unwrap().status, 502);
    wait_until("the gateway is replaced", || (is_gone(gateway) && site.gateways().len() == 1).then_some(()));
    let mut next = site.send("GET", "/pid");
    site.queued(1);
    site.release("a");
    assert_eq!(next.response(false).unwrap().text(), format!("{pid}\n"));
}

#[test]
fn a_get_is_repeated_until_the_retries_are_used_up_and_a_post_is_not_repeated() {
    let mut site = Site::faulty(&["--workers", "4", "--retries", "2", "--quarantine", "0"]);
    let deaths = |site: &Site| site.server.log().matches("] app process died").count();
    let response = site.get("/signal?KILL");
    assert_eq!(response.status, 502);
    wait_until("three processes have died", || (deaths(&site) == 3).then_some(()));
    wait_until("they are replaced", || (site.apps().len() == 4).then_some(()));
    assert_eq!(site.post("/signal?KILL", b"x").status, 502);
    wait_until("one more process has died", || (deaths(&site) == 4).then_some(()));
    let line = site.server.logged("answered 502");
    assert!(line.contains("slot=") && line.contains("pid=") && line.contains("request=\"GET /signal?KILL\""), "{line}");
    wait_until("it is replaced", || (site.apps().len() == 4).then_some(()));
    assert_eq!(deaths(&site), 4);
    site.server.stop();
}

#[test]
fn a_request_that_crashes_its_process_is_refused_after_three_deaths_while_others_are_served() {
    for (site, target) in [(Site::php(&[], &[]), "/segv"), (Site::faulty(&[]), "/abort")] {
        let mut site = site;
        // POST, so that each request kills one process.
        for _ in 0..3 {
            assert_eq!(site.post(target, b"").status, 502);
            assert_eq!(site.get("/pid").status, 200);
        }
        let line = site.server.logged("quarantined a request");
        assert!(line.contains(&format!("POST {target}")), "{line}");
        wait_until("the request is refused", || (site.post(target, b"").status == 503).then_some(()));
        wait_until("there are two processes", || (site.apps().len() == 2).then_some(()));
        assert_eq!(site.get("/pid").status, 200);
        site.server.stop();
        assert_eq!(site.server.log().matches("] app process died").count(), 3, "{}", site.server.log());
    }
}

/// A GET is repeated, so that one request may kill several processes, but not more than the quarantine allows.
#[test]
fn a_repeated_request_is_quarantined_too() {
    let mut site = Site::faulty(&["--workers", "6", "--retries", "100", "--quarantine", "3"]);
    let status = site.get("/abort").status;
    assert!([502, 503].contains(&status), "{status}");
    site.server.logged("quarantined a request");
    wait_until("there are six processes", || (site.apps().len() == 6).then_some(()));
    wait_until("the request is refused", || (site.get("/abort").status == 503).then_some(()));
    site.server.stop();
    let deaths = site.server.log().matches("] app process died").count();
    // The gateway may repeat the request once or twice before it has received the quarantine.
    assert!((3..=6).contains(&deaths), "{deaths} deaths\n{}", site.server.log());
}

#[test]
fn a_request_whose_processes_are_killed_is_not_quarantined() {
    let mut site = Site::faulty(&["--quarantine", "1"]);
    for round in 0..4 {
        let (mut client, pid) = site.hold(&format!("post{round}"), "/hold");
        kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
        // The request is repeated in the other process.
        site.release(&format!("post{round}"));
        assert_eq!(client.response(false).unwrap().text(), "held\n");
        wait_until("the process is replaced", || (is_gone(pid) && site.apps().len() == 2).then_some(()));
    }
    site.server.stop();
    assert!(!site.server.log().contains("quarantined"), "{}", site.server.log());
}

#[test]
fn no_app_process_outlives_a_killed_master() {
    let mut site = Site::php(&["--workers", "3"], &[]);
    let (client, pid) = site.hold("a", "/hold");
    let all: BTreeSet<i32> = site.apps().union(&site.gateways()).copied().collect();
    assert!(all.len() == 5 && all.contains(&pid));
    site.server.signal(Signal::SIGKILL);
    assert_eq!(site.server.wait_end(), None);
    wait_until("all processes are gone", || all.iter().all(|&pid| is_gone(pid)).then_some(()));
    drop(client);
    let left = std::process::Command::new("pgrep").args(["-f", &site.place.text("")]).output_in_time().unwrap();
    assert!(left.stdout.is_empty(), "{}", String::from_utf8_lossy(&left.stdout));
}

/// A gateway that keeps the connections to all app processes is stopped. The other gateway has it killed.
#[test]
fn a_stopped_gateway_does_not_keep_the_app_processes_from_the_others() {
    for options in [&["--workers", "1"][..], &["--workers", "3"]] {
        let mut site = Site::php(options, &[]);
        for pid in site.gateways() {
            (0..12).for_each(|_| assert_eq!(site.get("/pid").status, 200));
            common::stop(Pid::from_raw(pid));
            (0..6).for_each(|_| assert_eq!(site.get("/pid").status, 200));
            assert_eq!(site.post("/once?stopped", b"").status, 200);
            let _ = kill(Pid::from_raw(pid), Signal::SIGCONT); // it may have been killed
            wait_until("there are two gateways", || (site.gateways().len() == 2).then_some(()));
        }
        site.at_rest();
        site.server.stop();
        assert!(!site.server.log().contains("app process died"), "{}", site.server.log());
    }
}

#[test]
fn a_process_that_hangs_in_the_request_of_a_dead_gateway_is_replaced() {
    let mut site = Site::faulty(&["--gateways", "1", "--workers", "1", "--request-timeout", "1s"]);
    let (mut client, pid) = site.hold("a", "/hold");
    let gateway = *site.gateways().first().unwrap();
    kill(Pid::from_raw(gateway), Signal::SIGKILL).unwrap();
    assert_eq!(client.response(false).unwrap().status, 502);
    assert_eq!(site.get("/pid").status, 200);
    assert!(is_gone(pid));
    let line = site.server.logged("has not finished the request of a dead gateway");
    assert!(line.contains(&format!("pid={pid}")), "{line}");
    site.server.stop();
}
