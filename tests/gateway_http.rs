//! Gateways in front of HTTP applications (`--backend http`): Node, and a WSGI application in Python.

#![allow(clippy::unwrap_used, reason = "test code outside of test functions")]

mod common;

use std::collections::BTreeSet;
use std::io::{self, Read as _, Write as _};
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use common::http::{Client, Response, get, post};
use common::limit::InTime as _;
use common::{Server, StopOnDrop, connect_tcp, program, wait_until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

const APP: &str = include_str!("programs/app.js");
const WSGI: &str = include_str!("programs/wsgi.py");
const MIB: usize = 1 << 20;

/// A directory with the applications.
struct Site(TempDir);

impl Site {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        for name in ["ids", "twice", "tmp"] {
            std::fs::create_dir(directory.path().join(name)).unwrap();
        }
        std::fs::write(directory.path().join("app.js"), APP).unwrap();
        std::fs::write(directory.path().join("wsgi.py"), WSGI).unwrap();
        Self(directory)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn files_in(&self, name: &str) -> usize {
        self.path(name).read_dir().unwrap().count()
    }

    fn run(&self, options: &[&str], command: &[&str]) -> Command {
        let mut forkyard = Command::new(program("forkyard"));
        forkyard.args(["run", "--bind", "http:127.0.0.1:0", "--backend", "http", "--temp-dir", "tmp"]);
        forkyard.args(options).arg("--").args(command).current_dir(self.0.path()).env("FORKYARD_GATEWAYS", "2");
        forkyard
    }

    fn node(&self, options: &[&str]) -> Server {
        Server::start_command(&mut self.run(options, &["node", "app.js"]))
    }
}

fn pid_of(response: &Response) -> i32 {
    response.header("x-pid").unwrap_or_else(|| panic!("{response:?} names no process")).parse().unwrap()
}

fn sigkill(pid: i32) {
    let _ = kill(Pid::from_raw(pid), Signal::SIGKILL); // it may have died
}

// ---- requests and responses ----

#[test]
fn requests_and_responses_pass_unchanged_except_headers_of_the_connection() {
    let site = Site::new();
    let mut server = site.node(&["--workers", "2"]);
    let address = server.http();
    let mut client = Client::connect(&address).unwrap();
    let echo = client.request("GET", "/echo?a=%2F&b", b"").unwrap();
    let text = echo.text();
    for part in ["\"method\":\"GET\"", "\"url\":\"/echo?a=%2F&b\"", "\"listen\":\"1\"", "\"own\":true", "\"length\":0"]
    {
        assert!(text.contains(part), "{part} in {text}");
    }
    assert_eq!(echo.status, 200);
    let text = client.request("POST", "/echo", b"abc").unwrap().text();
    assert!(text.contains("\"method\":\"POST\"") && text.contains("\"content-length\":\"3\""), "{text}");
    // A body of unknown length reaches the application with its length.
    let text = client.request_in_pieces("POST", "/echo", &vec![b'x'; 10 * MIB]).unwrap().text();
    assert!(text.contains("\"length\":10485760") && !text.contains("transfer-encoding"), "{text}");
    assert_eq!(client.request("HEAD", "/large", b"").unwrap().body.len(), 0);
    assert_eq!(client.request("GET", "/chunks", b"").unwrap().text(), "ab");
    assert_eq!(client.request("GET", "/large", b"").unwrap().body.len(), 10 * MIB);
    assert_eq!(client.request("GET", "/early", b"").unwrap().text(), "late");
    assert_eq!(client.request("GET", "/none", b"").unwrap().status, 404);
    server.stop();
}

#[test]
fn trailers_reach_clients_that_accept_them() {
    let site = Site::new();
    let mut server = site.node(&["--workers", "1"]);
    let address = server.http();
    let ask = |te: &str| {
        let mut stream = connect_tcp(&*address).unwrap();
        write!(stream, "GET /trailers HTTP/1.1\r\nHost: a\r\n{te}Connection: close\r\n\r\n").unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        text.to_lowercase()
    };
    let with = ask("TE: deflate, Trailers\r\n");
    assert!(with.contains("\r\nx-te: trailers\r\n") && with.contains("\r\ntrailer: x-sum\r\n"), "{with}");
    assert!(with.ends_with("1\r\na\r\n0\r\nx-sum: 97\r\n\r\n"), "{with}");
    let without = ask("");
    assert!(without.contains("\r\nx-te: none\r\n") && without.ends_with("1\r\na\r\n0\r\n\r\n"), "{without}");
    let url = format!("http://{address}/trailers");
    let arguments = ["-s", "-i", "--http2-prior-knowledge", "-H", "TE: trailers", &url];
    let output = Command::new("curl").args(arguments).output_in_time().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).to_lowercase();
    assert!(text.starts_with("http/2 200") && text.contains("x-sum: 97"), "{text}");
    server.stop();
}

#[test]
fn the_application_gets_the_clients_address_from_the_gateway_only() {
    let site = Site::new();
    let mut server = site.node(&[]);
    let mut stream = connect_tcp(server.http()).unwrap();
    let head = "GET /echo HTTP/1.1\r\nHost: a.example\r\nX-Forwarded-For: 9.9.9.9\r\nX-Real-IP: 9.9.9.9\r\nForwarded: for=9.9.9.9\r\n\
                X-Forwarded-Proto: https\r\nProxy: 9.9.9.9\r\nConnection: close, X-Mine\r\nX-Mine: 1\r\nTE: trailers\r\n\r\n";
    stream.write_all(head.as_bytes()).unwrap();
    let mut bytes = Vec::new();
    common::read_all(&mut stream, &mut bytes).unwrap();
    let text = String::from_utf8(bytes).unwrap();
    for part in [
        "\"host\":\"a.example\"",
        "\"x-forwarded-for\":\"127.0.0.1\"",
        "\"x-real-ip\":\"127.0.0.1\"",
        "\"x-forwarded-proto\":\"http\"",
        "\"x-forwarded-host\":\"a.example\"",
        r#""forwarded":"for=127.0.0.1;proto=http;host=\"a.example\"""#,
    ] {
        assert!(text.contains(part), "{part} in {text}");
    }
    assert!(!text.contains("9.9.9.9") && !text.contains("x-mine"), "{text}");
    server.stop();
}

#[test]
fn an_event_stream_arrives_event_by_event_and_its_end_reaches_the_application() {
    let site = Site::new();
    let mut server = site.node(&["--workers", "1"]);
    let mut stream = connect_tcp(server.http()).unwrap();
    stream.write_all(b"GET /events HTTP/1.1\r\nHost: h\r\n\r\n").unwrap();
    read_until(&mut stream, "data: first");
    assert_eq!(get(&server.http(), "/next").unwrap().text(), "ok");
    read_until(&mut stream, "data: second");
    server.stop();
}

fn read_until(stream: &mut TcpStream, end: &str) -> String {
    let mut text = String::new();
    while !text.contains(end) {
        let mut bytes = [0; 1024];
        let count = stream.read(&mut bytes).unwrap();
        assert!(count > 0, "the connection ended before {end:?}: {text:?}");
        text += &String::from_utf8_lossy(&bytes[..count]);
    }
    text
}

#[test]
fn an_upgraded_connection_is_a_tunnel() {
    let site = Site::new();
    let mut server = site.node(&["--workers", "1"]);
    let mut stream = connect_tcp(server.http()).unwrap();
    stream.write_all(b"GET /echo HTTP/1.1\r\nHost: h\r\nConnection: upgrade\r\nUpgrade: echo\r\n\r\n").unwrap();
    let head = read_until(&mut stream, "\r\n\r\n").to_ascii_lowercase();
    assert!(head.starts_with("http/1.1 101 ") && head.contains("\r\nupgrade: echo\r\n"), "{head}");
    for text in ["one", "two"] {
        stream.write_all(text.as_bytes()).unwrap();
        read_until(&mut stream, text);
    }
    stream.write_all(b"bye").unwrap();
    let mut rest = Vec::new();
    common::read_all(&mut stream, &mut rest).unwrap();
    assert_eq!(rest, b"bye");
    assert_eq!(get(&server.http(), "/left").unwrap().text(), "0");
    server.stop();
}

// ---- faults of the application ----

#[test]
fn a_response_that_breaks_off_is_never_complete() {
    let site = Site::new();
    let mut server = site.node(&[]);
    for target in ["/half", "/half-chunks"] {
        let error =
            get(&server.http(), target).map(|response| response.status).expect_err("the response is not complete");
        assert_ne!(error.kind(), io::ErrorKind::TimedOut, "{error}");
    }
    for target in ["/garbage", "/close"] {
        assert_eq!(get(&server.http(), target).unwrap().status, 502, "{target}");
    }
    server.logged("the app process sent an invalid response");
    server.logged("the app process closed the connection without a response");
    assert_eq!(get(&server.http(), "/left").unwrap().status, 200);
    server.stop();
}

#[test]
fn a_slow_request_ends_with_504_and_the_process_serves_the_others() {
    let site = Site::new();
    let mut server = site.node(&["--workers", "1", "--gateways", "1", "--request-timeout", "1s"]);
    let address = server.http();
    let pid = pid_of(&get(&address, "/left").unwrap());
    std::thread::scope(|scope| {
        let slow = scope.spawn(|| get(&address, "/wait").unwrap().status);
        while !slow.is_finished() {
            assert_eq!(pid_of(&get(&address, "/left").unwrap()), pid);
        }
        assert_eq!(slow.join().unwrap(), 504);
    });
    // The request is cancelled in the application.
    wait_until("the application notices that the client has left", || {
        let response = get(&address, "/left").unwrap();
        assert_eq!(pid_of(&response), pid);
        (response.text() == "1").then_some(())
    });
    server.stop();
}

#[test]
fn a_process_that_hangs_is_replaced() {
    let site = Site::new();
    let mut server = site.node(&["--workers", "1", "--request-timeout", "1s"]);
    let pid = pid_of(&get(&server.http(), "/left").unwrap());
    assert_eq!(get(&server.http(), "/block").unwrap().status, 504);
    let next = wait_until("another process serves", || {
        get(&server.http(), "/left").ok().filter(|response| response.status == 200).map(|response| pid_of(&response))
    });
    assert_ne!(next, pid);
    server.stop();
}

#[test]
fn a_request_whose_client_leaves_is_cancelled() {
    let site = Site::new();
    let mut server = site.node(&["--workers", "1"]);
    let mut stream = connect_tcp(server.http()).unwrap();
    stream.write_all(b"GET /events HTTP/1.1\r\nHost: h\r\n\r\n").unwrap();
    read_until(&mut stream, "data: first");
    let mut waits = connect_tcp(server.http()).unwrap();
    waits.write_all(b"GET /wait HTTP/1.1\r\nHost: h\r\n\r\n").unwrap();
    wait_until("the application has the request", || {
        (get(&server.http(), "/waiting").unwrap().text() == "1").then_some(())
    });
    drop((stream, waits));
    for (target, count) in [("/left", "1"), ("/streams-left", "1")] {
        wait_until("the application notices", || (get(&server.http(), target).unwrap().text() == count).then_some(()));
    }
    server.stop();
}

// ---- deaths and reloads under load ----

/// Runs clients until `operator` returns. Returns the number of responses.
fn with_clients(
    server: &mut Server,
    ask: impl Fn(&str, u64) -> Result<(), String> + Sync,
    operator: impl FnOnce(&mut Server, &AtomicU64),
) {
    let (stop, count, failures) = (AtomicBool::new(false), AtomicU64::new(0), std::sync::Mutex::new(Vec::new()));
    let address = server.http();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                while !stop.load(Ordering::SeqCst) {
                    let number = count.fetch_add(1, Ordering::SeqCst);
                    if let Err(failure) = ask(&address, number) {
                        failures.lock().unwrap().push(failure);
                    }
                }
            });
        }
        let _clients_end = StopOnDrop(&stop);
        operator(server, &count);
    });
    let failures = failures.into_inner().unwrap();
    assert!(failures.is_empty(), "{} failures, such as {:?}", failures.len(), &failures[..failures.len().min(5)]);
}

/// Waits for this number of further requests.
fn wait_for_requests(count: &AtomicU64, more: u64) {
    let before = count.load(Ordering::SeqCst);
    wait_until("clients send requests", || (count.load(Ordering::SeqCst) >= before + more).then_some(()));
}

#[test]
fn no_get_fails_when_processes_are_killed() {
    let site = Site::new();
    let mut server = site.node(&["--workers", "3", "--respawn-rate", "1000"]);
    let pids = std::sync::Mutex::new(BTreeSet::new());
    let ask = |address: &str, _| match get(address, "/left") {
        Ok(response) if response.status == 200 => {
            pids.lock().unwrap().insert(pid_of(&response));
            Ok(())
        }
        other => Err(format!("{other:?}")),
    };
    with_clients(&mut server, ask, |_, count| {
        for _ in 0..20 {
            wait_for_requests(count, 50);
            let victim = wait_until("a process has answered", || pids.lock().unwrap().pop_last());
            sigkill(victim);
        }
    });
    server.stop();
}

#[test]
fn a_post_is_executed_once_whatever_happens() {
    let site = Site::new();
    let mut server = site.node(&["--workers", "2", "--respawn-rate", "1000"]);
    let killing = AtomicBool::new(false);
    let pids = std::sync::Mutex::new(BTreeSet::new());
    let ask = |address: &str, number| match post(address, &format!("/once?{number}"), b"x") {
        Ok(response) if response.status == 200 && response.text() == "once" => {
            pids.lock().unwrap().insert(pid_of(&response));
            Ok(())
        }
        Ok(response) if response.status == 502 && killing.load(Ordering::SeqCst) => Ok(()),
        other => Err(format!("{other:?}")),
    };
    with_clients(&mut server, ask, |server, count| {
        for generation in 2..5 {
            wait_for_requests(count, 50);
            server.signal(Signal::SIGHUP);
            server.wait_for(&format!("reload done gen={generation}"));
        }
        killing.store(true, Ordering::SeqCst);
        pids.lock().unwrap().clear();
        for _ in 0..10 {
            wait_for_requests(count, 50);
            sigkill(wait_until("a process has answered", || pids.lock().unwrap().pop_last()));
        }
    });
    assert!(site.files_in("ids") > 100);
    assert_eq!(site.files_in("twice"), 0);
    server.stop();
}

#[test]
fn a_request_that_kills_its_process_over_a_kept_connection_is_not_repeated_more_often() {
    let site = Site::new();
    let mut server = site.node(&["--workers", "1", "--gateways", "1", "--retries", "0"]);
    assert_eq!(get(&server.http(), "/left").unwrap().status, 200);
    assert_eq!(get(&server.http(), "/kill").unwrap().status, 502);
    assert_eq!(get(&server.http(), "/left").unwrap().status, 200);
    assert_eq!(server.log().matches("app process died").count(), 2, "the death and the 502: {}", server.log());
    server.stop();
}

#[test]
fn a_response_with_too_many_headers_becomes_a_502() {
    let app = "require('http').createServer((request, response) => {
        for (let i = 0; i < 150; i++) response.setHeader('x-' + i, i);
        response.end('ok');
    }).listen({ fd: 3 });";
    for (options, status) in [(&[][..], 502), (&["--max-headers", "200"], 200)] {
        let site = Site::new();
        let options = [&["--workers", "1"], options].concat();
        let mut server = Server::start_command(&mut site.run(&options, &["node", "-e", app]));
        let response = get(&server.http(), "/").unwrap();
        assert_eq!((response.status, response.header("x-149")), (status, (status == 200).then_some("149")));
        server.stop();
        assert_eq!(
            server.log().contains("the app process sent an invalid response"),
            status == 502,
            "{}",
            server.log()
        );
    }
}

// ---- other ways to listen ----

#[test]
fn a_wsgi_application_that_closes_each_connection_is_served() {
    let site = Site::new();
    let options = ["--workers", "2", "--app-concurrency", "1"];
    let mut server = Server::start_command(&mut site.run(&options, &["python3", "wsgi.py"]));
    let address = server.http();
    let mut client = Client::connect(&address).unwrap();
    for number in 0..50 {
        let response = client.request("POST", "/a", &vec![b'x'; number]).unwrap();
        assert_eq!(response.text(), format!("POST /a {number} 127.0.0.1\nend\n"));
    }
    // The death of the process also ends the connection.
    get(&address, "/die").map(|response| response.status).expect_err("the response is not complete");
    assert_eq!(get(&address, "/b").unwrap().text(), "GET /b 0 127.0.0.1\nend\n");
    server.stop();
}

#[test]
fn a_process_can_listen_on_a_port_or_a_path() {
    for place in ["{port}", "{socket}"] {
        let site = Site::new();
        let mut server = Server::start_command(&mut site.run(&["--workers", "1"], &["node", "app.js", place]));
        for _ in 0..3 {
            // A dead process leaves its socket file behind.
            let response = wait_until("a process serves", || {
                get(&server.http(), "/left").ok().filter(|response| response.status == 200)
            });
            sigkill(pid_of(&response));
            common::wait_until("it is gone", || common::is_gone(pid_of(&response)).then_some(()));
        }
        server.signal(Signal::SIGHUP);
        server.wait_for("reload done gen=2");
        assert_eq!(get(&server.http(), "/left").unwrap().status, 200, "{place}");
        server.stop();
        assert_eq!(site.files_in("tmp"), 0, "{place}");
    }
}

#[test]
fn a_process_that_is_not_ready_is_explained() {
    let site = Site::new();
    let own = site.path("own.sock");
    let own = own.to_string_lossy();
    let mut command = site.run(&["--start-timeout", "2s", "--workers", "1"], &["node", "app.js", &own]);
    let mut server = Server::launch(&mut command);
    let line = server.wait_for("it was not ready in time");
    assert!(line.contains("descriptor 3") && line.contains("without exec"), "{line}");
    server.stop();
}
