//! The cache of rendered pages as clients see it: one worker renders a page while other requests for the page wait, and a cache file
//! preserves the pages across a restart.

mod common;

use std::collections::BTreeSet;
use std::process::Command;
use std::sync::Barrier;

use common::http::{self, Client};
use common::{Server, program};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const HTTP: [&str; 2] = ["--bind", "http:127.0.0.1:0"];

/// Returns a number from the output of `/stats`.
fn stat(address: &str, name: &str) -> u64 {
    let text = http::get(address, "/stats").expect("the server answers").text();
    let line = text.lines().find_map(|line| line.trim().strip_prefix(&format!("{name}: "))).expect(name);
    line.trim_end_matches(',').parse().expect("the value is a number")
}

/// Requests the same page on many connections at the same time. Returns the bodies.
fn herd(address: &str, target: &str, clients: usize) -> Vec<String> {
    let start = Barrier::new(clients);
    std::thread::scope(|scope| {
        let ask = || {
            let client = Client::connect(address);
            start.wait();
            let response = client.and_then(|mut client| client.request("GET", target, b""));
            response.ok().filter(|response| response.status == 200).map(|response| response.text())
        };
        let threads: Vec<_> = (0..clients).map(|_| scope.spawn(ask)).collect();
        threads.into_iter().filter_map(|thread| thread.join().expect("the client does not panic")).collect()
    })
}

#[test]
fn concurrent_requests_for_a_page_render_it_once() {
    let mut server = Server::start("pages", &[&HTTP[..], &["--workers", "4"]].concat());
    let address = server.http();
    for round in 1..=3 {
        let pages = herd(&address, "/page/1", 1000);
        assert_eq!(pages.len(), 1000);
        assert_eq!(pages.iter().collect::<BTreeSet<_>>().len(), 1, "all clients received the same page");
        assert_eq!(stat(&address, "renders"), round);
        http::post(&address, "/purge/page-1", b"").unwrap();
    }
    assert!(stat(&address, "lease_waits") > 0);
    server.stop();
}

#[test]
fn when_the_rendering_worker_is_killed_another_worker_takes_over() {
    let mut server = Server::start("pages", &[&HTTP[..], &["--workers", "4"]].concat());
    let address = server.http();
    std::thread::scope(|scope| {
        let clients = scope.spawn(|| herd(&address, "/page/1?ms=2000", 200));
        let line = server.wait_for("rendering page=1");
        let renderer: i32 = line.split(['[', ']']).nth(1).expect("the line contains a pid").parse().unwrap();
        kill(Pid::from_raw(renderer), Signal::SIGKILL).unwrap();
        let pages = clients.join().unwrap();
        let by: BTreeSet<_> = pages.iter().collect();
        assert_eq!(by.len(), 1, "all clients received the page rendered by the worker that took over");
        assert!(!pages.iter().any(|page| page.contains(&format!("(pid {renderer})"))));
        assert!(
            pages.len() >= 100,
            "only the killed worker's clients are disconnected: {} of 200 received the page",
            pages.len()
        );
        assert_eq!(stat(&address, "renders"), 1, "one rendering was completed");
    });
    server.stop();
}

#[test]
fn a_cache_file_is_warm_after_a_stop_and_after_a_crash() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("pages");
    let start = || {
        let mut command = Command::new(program("pages"));
        command.args(HTTP).args(["--workers", "2", "--cache", "4M", "--cache-file"]).arg(&file);
        Server::start_command(&mut command)
    };
    let mut server = start();
    assert!(server.log().contains("cache is new"));
    let page = http::get(&server.http(), "/page/7").unwrap().text();
    server.stop();

    let mut server = start();
    assert!(server.log().contains("cache is warm"));
    assert_eq!(http::get(&server.http(), "/page/7").unwrap().text(), page, "the page rendered by the former processes");
    // Kill the master and all workers together, as the kernel may do when memory runs out.
    let children = server.workers();
    server.signal(Signal::SIGSTOP);
    children.iter().for_each(|&pid| kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap());
    server.signal(Signal::SIGKILL);
    assert_eq!(server.wait_end(), None);

    let mut server = start();
    assert!(server.log().contains("cache is warm"));
    assert_eq!(http::get(&server.http(), "/page/7").unwrap().text(), page);
    server.stop();

    for workers in ["3", "1"] {
        let mut command = Command::new(program("pages"));
        command.args(HTTP).args(["--workers", workers, "--cache", "4M", "--cache-file"]).arg(&file);
        let mut server = Server::start_command(&mut command);
        assert!(server.log().contains("cache is warm"), "{}", server.log());
        assert_eq!(http::get(&server.http(), "/page/7").unwrap().text(), page, "with {workers} workers");
        server.stop();
    }

    let half = std::fs::File::options().write(true).open(&file).unwrap();
    half.set_len(1 << 20).unwrap();
    let mut server = start();
    assert!(server.log().contains("the content of the cache file was dropped: its size is not what its header says"));
    assert_ne!(http::get(&server.http(), "/page/7").unwrap().text(), page);
    server.stop();
}
