//! Requests that take too long, requests that wait, and clients that are slow: app processes are replaced, requests are
//! refused or forgotten, and an app process never waits for a client.

#![allow(clippy::unwrap_used, reason = "a failing test reports its location")]

mod common;

use std::io::{Read as _, Write as _};

use common::gateway::Site;
use common::{connect_tcp, is_gone, wait_until};

// ---- --request-timeout ----

#[test]
fn a_process_that_does_not_answer_is_replaced_with_its_group_and_the_queue_is_served() {
    let mut site = Site::faulty(&["--workers", "1", "--request-timeout", "1s"]);
    let (mut client, pid) = site.hold("a", "/hold-with-child");
    let child: i32 = std::fs::read_to_string(site.path("a.child")).unwrap().trim().parse().unwrap();
    let mut waiting: Vec<_> = (0..3).map(|number| site.send("POST", &format!("/once?waits{number}"))).collect();
    assert_eq!(client.response(false).unwrap().status, 504);
    for client in &mut waiting {
        assert_eq!(client.response(false).unwrap().text(), "1\n");
    }
    wait_until("the process and its child are gone", || (is_gone(pid) && is_gone(child)).then_some(()));
    let line = site.server.logged("has not answered in time");
    assert!(line.contains(&format!("pid={pid}")) && line.contains("GET /hold-with-child"), "{line}");
    site.at_rest();
    assert_eq!(site.apps().len(), 1);
    site.server.stop();
}

#[test]
fn a_process_that_ignores_sigterm_is_killed_after_the_timeout() {
    let place = common::gateway::Place::new();
    let ignores = format!("trap '' TERM; exec {}", common::program("faulty").display());
    let options = ["--workers", "1", "--request-timeout", "1s"];
    let mut command = place.run(&options, &["sh", "-c", &ignores]);
    let site = place.start(&mut command);
    let (mut client, pid) = site.hold("a", "/hold");
    assert_eq!(client.response(false).unwrap().status, 504);
    wait_until("the process is gone", || is_gone(pid).then_some(()));
    assert_eq!(site.get("/pid").status, 200);
}

#[test]
fn after_a_burst_of_requests_that_time_out_others_are_served_and_nothing_is_left() {
    let options = ["--workers", "4", "--request-timeout", "100ms", "--quarantine", "0", "--respawn-rate", "1000"];
    let mut site = Site::faulty(&[&options[..], &["--queue-timeout", "0"]].concat());
    let mut clients: Vec<_> = (0..200).map(|number| site.send("GET", &format!("/hold?burst{number}"))).collect();
    for client in &mut clients {
        assert_eq!(client.response(false).unwrap().status, 504);
    }
    drop(clients);
    site.at_rest();
    wait_until("there are four processes", || (site.apps().len() == 4).then_some(()));
    for number in 0..50 {
        // On a busy machine, a process may need more than the timeout: such a request is not executed twice either.
        let status = site.post(&format!("/once?after{number}"), b"").status;
        assert!([200, 504].contains(&status), "{status}");
        assert!(site.executions(&format!("after{number}")) <= 1);
    }
    site.at_rest();
    site.server.stop();
}

// ---- the queue ----

#[test]
fn a_full_queue_refuses_requests_and_serves_those_that_wait() {
    let site = Site::faulty(&["--workers", "1", "--gateways", "1", "--queue", "2"]);
    let (mut client, _) = site.hold("a", "/hold");
    let mut waiting: Vec<_> = (0..2).map(|number| site.send("POST", &format!("/once?waits{number}"))).collect();
    site.queued(2);
    let refused = site.post("/once?refused", b"");
    assert_eq!(refused.status, 503, "{refused:?}");
    assert!(refused.header("retry-after").is_some(), "{refused:?}");
    assert!(site.server.logged("--queue)").contains("POST /once?refused"));
    site.release("a");
    assert_eq!(client.response(false).unwrap().status, 200);
    for client in &mut waiting {
        assert_eq!(client.response(false).unwrap().status, 200);
    }
    site.at_rest();
    assert_eq!(site.executions("refused"), 0);
}

#[test]
fn a_request_that_waits_too_long_is_refused_and_not_executed() {
    let site = Site::faulty(&["--workers", "1", "--queue-timeout", "300ms"]);
    let (mut client, _) = site.hold("a", "/hold");
    let refused = site.post("/once?late", b"");
    assert_eq!(refused.status, 503, "{refused:?}");
    assert!(refused.header("retry-after").is_some(), "{refused:?}");
    assert!(site.server.logged("--queue-timeout").contains("POST /once?late"));
    site.release("a");
    assert_eq!(client.response(false).unwrap().status, 200);
    site.at_rest();
    assert_eq!(site.get("/pid").status, 200);
    assert_eq!(site.executions("late"), 0);
}

#[test]
fn the_request_of_a_client_that_has_left_is_not_executed() {
    let site = Site::faulty(&["--workers", "1"]);
    let (mut client, _) = site.hold("a", "/hold");
    let mut stays = site.send("POST", "/once?stays");
    site.queued(1);
    let waiting: Vec<_> = (0..10).map(|number| site.send("POST", &format!("/once?left{number}"))).collect();
    site.queued(11);
    drop(waiting);
    site.queued(1);
    site.release("a");
    assert_eq!(client.response(false).unwrap().status, 200);
    assert_eq!(stays.response(false).unwrap().status, 200);
    site.at_rest();
    assert_eq!(site.get("/pid").status, 200);
    (0..10).for_each(|number| assert_eq!(site.executions(&format!("left{number}")), 0, "request {number}"));
}

/// The app process does not notice that its client has left. It is used again when it has finished.
#[test]
fn a_client_that_leaves_in_the_middle_does_not_disturb_the_next_one() {
    let site = Site::faulty(&["--workers", "1"]);
    let (client, pid) = site.hold("a", "/hold");
    drop(client);
    let mut next = site.send("GET", "/pid");
    site.queued(1);
    site.release("a");
    assert_eq!(next.response(false).unwrap().text(), format!("{pid}\n"));
    site.at_rest();
}

// ---- slow clients ----

const SLOW: usize = 20;
const LARGE: usize = 8 << 20;

/// Waits until no app process serves a request, although clients are still sending or receiving.
fn processes_are_idle(site: &Site) {
    wait_until("the app processes are idle", || {
        let status = site.status();
        let apps = status["workers"].as_array().unwrap();
        apps.iter().all(|app| app["in_flight"] == 0).then_some(())
    });
}

#[test]
fn clients_that_send_slowly_occupy_no_process() {
    let mut site = Site::faulty(&["--body-timeout", "1h"]);
    let body = b"twenty bytes of body";
    let head = format!("POST /length HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\n\r\n", body.len());
    let mut clients: Vec<_> = (0..SLOW).map(|_| connect_tcp(site.server.http()).unwrap()).collect();
    clients.iter_mut().for_each(|client| client.write_all(head.as_bytes()).unwrap());
    for byte in body {
        processes_are_idle(&site);
        (0..5).for_each(|_| assert_eq!(site.get("/pid").status, 200));
        clients.iter_mut().for_each(|client| client.write_all(&[*byte]).unwrap());
    }
    for client in clients {
        let mut client = common::http::Client { stream: std::io::BufReader::new(client) };
        assert_eq!(client.response(false).unwrap().text(), format!("{}\n", body.len()));
    }
    site.at_rest();
    site.server.stop();
}

#[test]
fn clients_that_do_not_read_occupy_no_process() {
    let mut site = Site::faulty(&["--write-timeout", "1h"]);
    let clients: Vec<_> = (0..SLOW).map(|_| site.send("GET", &format!("/large?{LARGE}"))).collect();
    let counted = |site: &Site| -> u64 {
        let status = site.status();
        status["workers"].as_array().unwrap().iter().map(|app| app["requests"].as_u64().unwrap()).sum()
    };
    wait_until("all requests have been sent to app processes", || (counted(&site) >= SLOW as u64).then_some(()));
    processes_are_idle(&site);
    (0..20).for_each(|_| assert_eq!(site.get("/pid").status, 200));
    let status = site.status();
    let in_flight: u64 =
        status["gateways"].as_array().unwrap().iter().map(|gateway| gateway["in_flight"].as_u64().unwrap()).sum();
    assert_eq!(in_flight, SLOW as u64, "the gateways still serve the slow clients: {status}");
    for mut client in clients {
        let response = client.response(false).unwrap();
        assert!(response.body == vec![b'x'; LARGE], "{} bytes", response.body.len());
    }
    site.at_rest();
    site.server.stop();
}

#[test]
fn a_client_that_leaves_in_a_large_response_frees_everything() {
    let site = Site::faulty(&[]);
    for _ in 0..10 {
        let mut client = site.send("GET", &format!("/large?{LARGE}"));
        let mut some = [0; 1000];
        client.stream.read_exact(&mut some).unwrap();
    }
    site.at_rest();
    assert_eq!(site.get("/pid").status, 200);
}
