//! Runs the program against servers with one fault each, and checks that each fault is counted as the right kind.

#[path = "../../../tests/common/limit.rs"]
mod limit;

use std::io::{Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;

use limit::InTime as _;
use nix::sys::socket::{Shutdown, shutdown};

const HTTP_OK: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello";
const REQUESTS: u64 = 5;

/// How the server behaves after it has answered the first connection correctly.
#[derive(Clone, Copy)]
enum Does {
    /// Sends these bytes and waits for the next request.
    Answers(&'static [u8]),
    /// Sends these bytes and closes the connection.
    Closes(&'static [u8]),
    /// Sends nothing.
    Waits,
    /// Closes the connection before the request arrives.
    Leaves,
}

/// The report of a run.
struct Told {
    json: serde_json::Value,
    exit: Option<i32>,
}

impl Told {
    fn number(&self, field: &str) -> u64 {
        self.json[field].as_u64().unwrap_or_else(|| panic!("no number {field} in {}", self.json))
    }

    /// Asserts that all requests failed in this way.
    #[track_caller]
    fn all_failed(&self, kind: &str) {
        assert_eq!(self.json["errors_by_kind"][kind], REQUESTS, "{}", self.json);
        assert_eq!((self.number("errors"), self.number("ok")), (REQUESTS, 0), "{}", self.json);
        assert!(self.json["first_errors"][kind].is_string(), "{}", self.json);
        assert_eq!(self.exit, Some(3));
    }
}

fn listener(name: &str) -> (String, UnixListener) {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let number = COUNT.fetch_add(1, Ordering::Relaxed);
    let name = format!("forkyard-load-test-{}-{number}-{name}", std::process::id());
    let address = SocketAddr::from_abstract_name(&name).expect("the name is short");
    (format!("unix:@{name}"), UnixListener::bind_addr(&address).expect("the name is unique"))
}

/// Reads one request. Returns false if the client has closed the connection.
fn request_came(stream: &mut UnixStream) -> bool {
    let fastcgi_end = [1, 5, 0, 1, 0, 0, 0, 0];
    let mut request = Vec::new();
    let mut buffer = [0; 4096];
    while !request.ends_with(b"\r\n\r\n") && !request.ends_with(&fastcgi_end) {
        match stream.read(&mut buffer) {
            Ok(count @ 1..) => request.extend_from_slice(&buffer[..count]),
            Ok(0) | Err(_) => return false,
        }
    }
    true
}

fn serve(listener: UnixListener, first: &'static [u8], then: Does) {
    let answer_of = |number: usize| {
        if number == 0 { Does::Answers(first) } else { then }
    };
    for number in 0.. {
        let Ok((mut stream, _)) = listener.accept() else {
            return;
        };
        let does = answer_of(number);
        thread::spawn(move || {
            while !matches!(does, Does::Leaves) && request_came(&mut stream) {
                match does {
                    Does::Answers(bytes) if stream.write_all(bytes).is_ok() => {}
                    Does::Closes(bytes) => return drop(stream.write_all(bytes)),
                    Does::Waits => {}
                    Does::Answers(_) | Does::Leaves => return,
                }
            }
        });
    }
}

fn load(connect: &str, args: &str) -> Told {
    let output = Command::new(env!("CARGO_BIN_EXE_forkyard-load"))
        .args(["--connect", connect, "--json"])
        .args(args.split_whitespace())
        .output_in_time()
        .expect("the program was built");
    let text = String::from_utf8_lossy(&output.stdout);
    let json = serde_json::from_str(&text)
        .unwrap_or_else(|_| serde_json::Value::String(String::from_utf8_lossy(&output.stderr).into()));
    Told { json, exit: output.status.code() }
}

fn against(name: &str, does: Does, args: &str) -> Told {
    let (address, listener) = listener(name);
    thread::spawn(move || serve(listener, HTTP_OK, does));
    load(&format!("http:{address}"), args)
}

#[test]
fn good_responses_on_keep_alive_connections() {
    let told = against("kept", Does::Answers(HTTP_OK), "-n 50 -c 4 --expect-body-len 5");
    assert_eq!((told.number("ok"), told.number("requests"), told.number("errors")), (50, 50, 0));
    assert_eq!((told.number("connections"), told.number("in_flight"), told.exit), (4, 0, Some(0)));
}

#[test]
fn good_responses_on_new_connections() {
    let told = against("fresh", Does::Answers(HTTP_OK), "-n 50 -c 4 --fresh");
    assert_eq!((told.number("ok"), told.number("connections"), told.exit), (50, 50, Some(0)));
}

#[test]
fn a_server_may_close_after_announcing_it() {
    let closing = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 5\r\n\r\nhello";
    let told = against("closing", Does::Closes(closing), "-n 50 -c 4");
    assert_eq!((told.number("ok"), told.number("connections"), told.exit), (50, 50, Some(0)));
}

#[test]
fn a_server_may_end_the_body_by_closing() {
    let told = against("until-closed", Does::Closes(b"HTTP/1.1 200 OK\r\n\r\nhello"), "-n 5");
    assert_eq!((told.number("ok"), told.exit), (5, Some(0)));
    against("until-closed-early", Does::Closes(b"HTTP/1.1 200 OK\r\n\r\nhell"), "-n 5").all_failed("length");
}

#[test]
fn each_fault_is_counted_as_its_kind() {
    for (kind, does) in [
        ("dropped", Does::Closes(b"")),
        ("dropped", Does::Leaves),
        ("cut", Does::Closes(b"H")),
        ("cut", Does::Closes(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhell")),
        ("malformed", Does::Closes(b"hello")),
        ("malformed", Does::Answers(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello, world")),
        ("status", Does::Answers(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 5\r\n\r\nhello")),
        ("length", Does::Answers(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nhell")),
        ("content", Does::Answers(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhullo")),
        ("timeout", Does::Waits),
    ] {
        // For the timeout fault, all requests run at the same time with a short timeout. For other faults, the timeout is so
        // long that it does not expire even on a busy machine.
        let (clients, timeout) = if kind == "timeout" { (REQUESTS, "3s") } else { (2, "60s") };
        let args = format!("-n {REQUESTS} -c {clients} --timeout {timeout}");
        against(kind, does, &args).all_failed(kind);
        against(kind, does, &format!("{args} --fresh")).all_failed(kind);
    }
}

#[test]
fn bodies_may_differ_if_allowed() {
    let other = b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\ngoodbye";
    let told = against("any", Does::Answers(other), "-n 5 --any-body");
    assert_eq!((told.number("ok"), told.exit), (5, Some(0)));
}

#[test]
fn requests_to_a_server_that_has_exited_fail() {
    let (address, listener) = listener("gone");
    let server = thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("the first connection arrives");
        // Closing the listener is not sufficient, because a child forked by another test may hold a copy of the descriptor
        // until it calls exec.
        shutdown(listener.as_raw_fd(), Shutdown::Both).expect("the socket is listening");
        assert!(request_came(&mut stream));
        stream.write_all(HTTP_OK).expect("the client is waiting");
    });
    load(&format!("http:{address}"), "-n 5 -c 2").all_failed("connect");
    server.join().expect("the server thread does not panic");
}

#[test]
fn requests_still_waiting_at_the_end_are_starved() {
    let told = against("starved", Does::Waits, "-d 3s -c 3");
    assert_eq!((told.number("starved"), told.number("in_flight"), told.number("errors")), (3, 3, 0));
    assert_eq!(told.number("unserved_clients"), 3);
    assert_eq!(told.exit, Some(3));
}

#[test]
fn errors_in_the_warm_up_are_reported_separately() {
    let told = against("warm-up", Does::Closes(b""), "-d 2s --warmup 2s");
    assert!(told.number("warmup_errors") > 0 && told.number("errors") > 0);
}

#[test]
fn fastcgi_faults() {
    const OK: &[u8] =
        b"\x01\x06\0\x01\0\x1a\x06\0Content-Type: a/b\r\n\r\nhello......\x01\x03\0\x01\0\x08\0\0\0\0\0\0\0\0\0\0";
    const REFUSED: &[u8] = b"\x01\x03\0\x01\0\x08\0\0\0\0\0\0\x02\0\0\0";
    const OTHER_ID: &[u8] = b"\x01\x03\0\x02\0\x08\0\0\0\0\0\0\0\0\0\0";
    const NO_END: &[u8] = b"\x01\x06\0\x01\0\x1a\0\0Content-Type: a/b\r\n\r\nhello";
    let against = |name: &str, does, args: &str| {
        let (address, listener) = listener(name);
        thread::spawn(move || serve(listener, OK, does));
        load(&format!("fastcgi:{address}"), args)
    };
    let told = against("fastcgi", Does::Answers(OK), "-n 50 -c 4 --expect-body-len 5");
    assert_eq!((told.number("ok"), told.number("connections"), told.exit), (50, 4, Some(0)), "{}", told.json);
    against("fastcgi-refused", Does::Answers(REFUSED), "-n 5").all_failed("refused");
    against("fastcgi-id", Does::Answers(OTHER_ID), "-n 5").all_failed("malformed");
    against("fastcgi-no-end", Does::Closes(NO_END), "-n 5").all_failed("cut");
    against("fastcgi-dropped", Does::Closes(b""), "-n 5").all_failed("dropped");
}

#[test]
fn a_run_needs_a_correct_first_response() {
    for (name, first) in [
        ("first-status", b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n".as_slice()),
        ("first-length", b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nhell"),
        ("first-malformed", b"hello"),
    ] {
        let (address, listener) = listener(name);
        thread::spawn(move || serve(listener, first, Does::Waits));
        let told = load(&format!("http:{address}"), "-n 5 --expect-body-len 5 --timeout 60s");
        assert_eq!(told.exit, Some(1), "{}", told.json);
        assert!(told.json.as_str().is_some_and(|text| text.contains("the first request failed")), "{}", told.json);
    }
    let told = load("http:unix:@forkyard-load-test-nobody", "-n 5");
    assert_eq!(told.exit, Some(1));
    assert!(told.json.as_str().is_some_and(|text| text.contains("connect: Connection refused")), "{}", told.json);
}

#[test]
fn large_requests_and_responses() {
    let (address, listener) = listener("large");
    let body: &'static [u8] = Box::leak(
        [b"HTTP/1.1 200 OK\r\nContent-Length: 3000000\r\n\r\n".as_slice(), &[b'x'; 3_000_000]].concat().into(),
    );
    thread::spawn(move || serve(listener, body, Does::Answers(body)));
    let uri = format!("/{}", "x".repeat(100_000));
    let told =
        load(&format!("http:{address}"), &format!("-n 20 -c 3 --expect-body-len 3000000 --timeout 60s --uri {uri}"));
    assert_eq!((told.number("ok"), told.exit), (20, Some(0)), "{}", told.json);
}

#[test]
fn the_time_limit_ends_a_run_of_requests() {
    let told = against("both", Does::Waits, "-n 5 -d 3s");
    assert_eq!(
        (told.number("requests"), told.number("in_flight")),
        (0, 1),
        "the run ended at its time limit, not by a timeout"
    );
}
