//! What `status` shows about app processes, and what the log says about the request of a process that dies.

#![allow(clippy::unwrap_used, reason = "a failing test reports its location")]

mod common;

use common::gateway::Site;
use common::wait_until;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

/// Returns the requests that the app process with this pid serves, and the gateways that have sent them.
fn serving(site: &Site, pid: i32) -> Vec<(String, u64)> {
    let status = site.status();
    let of = |process: &&Value| process["pid"].as_i64() == Some(pid.into());
    let process = status["workers"].as_array().unwrap().iter().find(of).unwrap();
    let requests = process["serving"].as_array().unwrap().iter();
    requests
        .map(|request| (request["what"].as_str().unwrap().to_owned(), request["gateway"].as_u64().unwrap()))
        .collect()
}

#[test]
fn status_shows_which_request_each_process_serves_until_it_ends() {
    let mut site = Site::faulty(&[]);
    let (mut first, first_pid) = site.hold("a", "/hold");
    let (mut second, second_pid) = site.hold("b", "/hold");
    for (name, pid) in [("a", first_pid), ("b", second_pid)] {
        let [(what, gateway)] = &serving(&site, pid)[..] else { panic!("{}", site.status()) };
        assert_eq!(what, &format!("GET /hold?{name}"));
        assert!(*gateway < 2);
    }
    // A request that waits is in a gateway only.
    let mut third = site.send("GET", "/pid?third");
    site.queued(1);
    assert!([first_pid, second_pid].iter().all(|&pid| !serving(&site, pid)[0].0.contains("third")));
    let text = String::from_utf8(site.control(&["status"]).stdout).unwrap();
    assert!(text.contains("GET /hold?a") && text.contains("GET /pid?third"), "{text}");
    ["a", "b"].into_iter().for_each(|name| site.release(name));
    for client in [&mut first, &mut second, &mut third] {
        assert_eq!(client.response(false).unwrap().status, 200);
    }
    site.at_rest();
    assert!([first_pid, second_pid].iter().all(|&pid| serving(&site, pid).is_empty()));
    site.server.stop();
}

#[test]
fn the_line_of_a_death_names_the_request() {
    let mut site = Site::faulty(&["--workers", "1", "--retries", "0"]);
    for signal in [Signal::SIGKILL, Signal::SIGABRT] {
        let name = signal.as_str();
        let (mut client, pid) = site.hold(name, "/hold");
        kill(Pid::from_raw(pid), signal).unwrap();
        assert_eq!(client.response(false).unwrap().status, 502);
        let line = site.server.logged(&format!("] app process died slot=0 pid={pid} "));
        assert!(line.contains(&format!("at_work=\"GET /hold?{name}\"")), "{line}");
        wait_until("the process is replaced", || (site.get("/pid").status == 200).then_some(()));
    }
    // An idle process.
    let pid = *site.apps().first().unwrap();
    kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
    let line = site.server.logged(&format!("] app process died slot=0 pid={pid} "));
    assert!(!line.contains("at_work"), "{line}");
    site.server.stop();
}

#[test]
fn a_process_with_several_requests_shows_and_names_all_of_them() {
    let mut site = Site::php(&["--workers", "1", "--app-concurrency", "3", "--retries", "0"], &[]);
    let held: Vec<_> = ["a", "b", "c"].into_iter().map(|name| site.hold(name, "/hold").0).collect();
    let pid = *site.apps().first().unwrap();
    let mut requests: Vec<String> = serving(&site, pid).into_iter().map(|(what, _)| what).collect();
    requests.sort();
    assert_eq!(requests, ["GET /hold?a", "GET /hold?b", "GET /hold?c"]);
    kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
    let line = site.server.logged(&format!("] app process died slot=0 pid={pid} "));
    assert!(requests.iter().any(|request| line.contains(request)), "{line}");
    drop(held);
    site.server.stop();
}
