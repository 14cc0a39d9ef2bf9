//! App processes that violate the protocol: the client receives a 502, or a response that is recognisably broken off. The
//! log names the process and the request, and the next request is served.

#![allow(clippy::unwrap_used, reason = "a failing test reports its location")]

mod common;

use std::io::{Read as _, Write as _};

use common::gateway::{Place, Site};
use common::{fastcgi, program, wait_until};

/// Checks that the log has a line about this request that names an app process, and that other requests are served.
fn is_logged_and_survived(site: &Site, path: &str) {
    let request = format!("request=\"GET {path}\"");
    wait_until("the log names the process and the request", || {
        let log = site.server.log();
        let mut lines = log.lines().filter(|line| line.contains("ERROR") && line.contains(&request));
        lines.find(|line| line.contains(" slot=") && line.contains(" pid=")).map(|_| ())
    });
    // Each app process still serves requests, or has been replaced.
    (0..4).for_each(|_| assert_eq!(site.get("/pid").status, 200, "after {path}"));
}

#[test]
fn a_response_that_has_not_begun_becomes_a_502() {
    let mut site = Site::faulty(&[]);
    for path in [
        "/garbage",
        "/http",
        "/other-version",
        "/other-request",
        "/other-type",
        "/malformed-header",
        "/malformed-status",
        "/no-head",
        "/nothing",
        "/huge-head",
        "/overloaded",
        "/close",
        "/close-in-record",
        "/close-in-head",
    ] {
        let response = site.get(path);
        assert_eq!(response.status, 502, "{path}: {response:?}");
        is_logged_and_survived(&site, path);
        assert_eq!(site.post(path, b"x").status, 502, "{path}");
    }
    site.at_rest();
    let apps = site.apps();
    site.server.stop();
    assert_eq!(apps.len(), 2);
    // None of them dies, so none is replaced and no request is repeated.
    assert!(!site.server.log().contains("] app process died"), "{}", site.server.log());
    assert!(!site.server.log().contains("is repeated"), "{}", site.server.log());
}

/// Reads everything that the server sends for a request, until it closes the connection.
fn raw_response(site: &Site, path: &str) -> String {
    let mut stream = common::connect_tcp(site.server.http()).unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").unwrap();
    let mut bytes = Vec::new();
    if let Err(error) = stream.read_to_end(&mut bytes) {
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "{path}");
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

const BROKEN: [&str; 7] = [
    "/close-after-head",
    "/close-in-body",
    "/close-in-last-record",
    "/close-before-end",
    "/garbage-in-body",
    "/exit-in-body",
    "/too-short",
];

#[test]
fn a_truncated_response_is_never_passed_on_as_complete_over_http() {
    let site = Site::faulty(&["--quarantine", "0"]);
    for path in BROKEN {
        let text = raw_response(&site, path);
        let Some((head, body)) = text.split_once("\r\n\r\n") else {
            // The connection was closed before the head had been sent.
            assert_eq!(text, "", "{path}");
            continue;
        };
        if head.starts_with("HTTP/1.1 502") {
            // The response was broken off before the gateway had passed on its head.
        } else if head.contains("chunked") {
            assert!(!body.ends_with("\r\n0\r\n\r\n") && body != "0\r\n\r\n", "{path}: {text:?}");
        } else {
            let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")).map(str::parse::<usize>);
            assert!(length.is_some_and(|length| body.len() < length.unwrap()), "{path}: {text:?}");
        }
        if path != "/too-short" {
            is_logged_and_survived(&site, path);
        }
    }
}

#[test]
fn a_truncated_response_is_never_passed_on_as_complete_over_fastcgi() {
    let site = Site::faulty(&["--bind", "http:127.0.0.1:0", "--bind", "fastcgi:127.0.0.1:0", "--quarantine", "0"]);
    let bind = site.server.binds.iter().find(|bind| bind.starts_with("fastcgi:")).unwrap();
    for path in BROKEN {
        let mut client = fastcgi::Client::connect(bind).unwrap();
        client.send(&site.fastcgi_request("GET", path, b"")).unwrap();
        match client.response(1) {
            Ok(response) => assert_eq!(response.status(), 502, "{path}: {:?}", response.head()),
            Err(error) => {
                let text = error.to_string();
                let is_broken = error.kind() == std::io::ErrorKind::UnexpectedEof || text.starts_with("not a record");
                assert!(is_broken, "{path}: {error}");
            }
        }
    }
    assert_eq!(site.get("/pid").status, 200);
}

#[test]
fn a_response_that_is_longer_than_its_content_length_does_not_spill_into_the_next_one() {
    let site = Site::faulty(&[]);
    let text = raw_response(&site, "/too-long");
    let body = text.split_once("\r\n\r\n").map(|(_, body)| body.to_owned());
    assert!(text.starts_with("HTTP/1.1 502") || body.as_deref() == Some("too"), "{text:?}");
    assert_eq!(site.get("/pid").status, 200);
}

#[test]
fn a_megabyte_of_complaints_is_logged_and_the_response_follows() {
    let site = Site::faulty(&[]);
    assert_eq!(site.get("/stderr").text(), "complained\n");
    let line = site.server.logged("complaint");
    assert!(line.contains("request=\"GET /stderr\""), "{line}");
    assert_eq!(site.get("/pid").status, 200);
    site.at_rest();
}

#[test]
fn a_process_that_crashes_in_its_response_is_replaced_and_named() {
    let site = Site::faulty(&[]);
    let pid: i32 = site.get("/pid").text().trim().parse().unwrap();
    assert!(site.apps().contains(&pid));
    let text = raw_response(&site, "/exit-in-body");
    assert!(!text.ends_with("\r\n0\r\n\r\n"), "{text:.100}");
    let line = site.server.logged("] app process died");
    assert!(line.contains("status=3") && line.contains("slot="), "{line}");
    wait_until("there are two processes", || (site.apps().len() == 2).then_some(()));
}

/// The descendants of a dead process have its listening socket. They must not serve requests in its place.
#[test]
fn a_grandchild_that_holds_the_socket_is_killed_with_its_process() {
    let site = Site::faulty(&["--workers", "1"]);
    let (mut client, pid) = site.hold("a", "/hold-with-child");
    let child: i32 = std::fs::read_to_string(site.path("a.child")).unwrap().trim().parse().unwrap();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL).unwrap();
    wait_until("the grandchild is killed", || common::is_gone(child).then_some(()));
    // The request is repeated in the new process.
    site.release("a");
    assert_eq!(client.response(false).unwrap().text(), "held\n");
}

/// An app process that closes or shuts down its socket and goes on is not ready.
#[test]
fn a_program_that_never_accepts_is_reported() {
    let place = Place::new();
    let mut command = place.run(&["--start-timeout", "2s"], &["sleep", "600"]);
    let mut server = common::Server::launch(&mut command);
    let line = server.wait_for("--start-timeout");
    assert!(line.contains("slot="), "{line}");
    server.signal(nix::sys::signal::Signal::SIGTERM);
    server.wait_end();
}

#[test]
fn programs_that_exit_at_once_are_reported_with_their_status() {
    for status in ["0", "1"] {
        let place = Place::new();
        let mut command = place.run(&[], &["sh", "-c", &format!("echo complaint >&2; exit {status}")]);
        let mut server = common::Server::launch(&mut command);
        server.wait_for("complaint");
        let line = server.wait_for("die before they are ready");
        assert!(line.contains("failures="), "{line}");
        server.signal(nix::sys::signal::Signal::SIGTERM);
        server.wait_end();
        assert!(server.log().contains(&format!("status={status}")), "{}", server.log());
    }
}

/// A stop must not wait for a program that ignores SIGTERM.
#[test]
fn a_program_that_ignores_sigterm_is_killed() {
    let faulty = program("faulty");
    let place = Place::new();
    let ignores = format!("trap '' TERM; exec {}", faulty.display());
    let mut command = place.run(&["--drain-timeout", "2s"], &["sh", "-c", &ignores]);
    let mut site = place.start(&mut command);
    assert_eq!(site.get("/pid").status, 200);
    let apps = site.apps();
    site.server.signal(nix::sys::signal::Signal::SIGTERM);
    site.server.wait_end();
    assert!(apps.iter().all(|&pid| common::is_gone(pid)));
}
