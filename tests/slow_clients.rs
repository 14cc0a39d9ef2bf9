//! Slow clients: thousands of slow clients use few resources and do not delay other clients, and each is disconnected after its timeout.

#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    reason = "a failing test reports its location, and measurements are printed"
)]

mod common;

use std::io::{self, ErrorKind, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use common::raw::{self, ALL, Protocol};
use common::{Server, status_number, wait_until};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Interval between two bytes of a slow client.
const PACE: Duration = Duration::from_secs(1);
/// Duration of the measurement, in seconds.
const ROUNDS: usize = 5;

/// Returns the number of clients that the limits of this machine allow, up to 10,000.
fn clients() -> usize {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard.min(1 << 16), hard).unwrap();
    // One worker may accept all clients, and also needs descriptors of its own.
    let clients = usize::try_from(hard).unwrap_or(usize::MAX).saturating_sub(100).min(10_000);
    assert!(clients >= 4000, "the hard limit of descriptors is {hard}, and this test needs 4100 (ulimit -Hn)");
    clients
}

fn memory(server: &Server) -> u64 {
    server.workers().into_iter().map(|worker| status_number(worker, "VmRSS").unwrap()).sum()
}

/// Runs thousands of slow clients, each of which sends `begun`, and then a byte per second. Checks the memory per client, in KiB.
fn slow_clients(protocol: Protocol, bind: &str, what: &str, begun: &[u8]) {
    let most = clients();
    // Opening this many connections can take longer than the timeout for a head.
    let never = ["--idle-timeout", "1h", "--header-timeout", "1h", "--body-timeout", "1h"];
    let most_of_each = most.to_string();
    let arguments = ["--bind", bind, "--workers", "2", "--max-connections", &most_of_each];
    let mut server = Server::start("crashy", &[&arguments[..], &never].concat());
    let address = server.binds[0].clone();
    let get = protocol.head("GET", "/ok", 0);
    for _ in 0..100 {
        assert_eq!(raw::ask(&mut raw::connect(&address), &get).0, 200);
    }
    let before = memory(&server);
    let mut slow: Vec<UnixStream> = (0..most)
        .map(|_| {
            let mut stream = raw::connect(&address);
            stream.set_nonblocking(true).unwrap();
            stream.write_all(begun).unwrap();
            stream
        })
        .collect();

    let served = std::thread::scope(|scope| {
        let sending = scope.spawn(|| {
            let begun = Instant::now();
            for round in 1..=ROUNDS {
                for stream in &mut slow {
                    stream.write_all(b"x").unwrap();
                }
                let due = PACE * u32::try_from(round).unwrap();
                std::thread::sleep(due.saturating_sub(begun.elapsed()));
            }
        });
        let mut served = 0;
        while served < 200 || !sending.is_finished() {
            assert_eq!(raw::ask(&mut raw::connect(&address), &get).0, 200);
            served += 1;
        }
        served
    });
    let grown = memory(&server) - before;
    eprintln!(
        "{protocol:?}, {what}: {most} connections, {grown} KiB, {served} requests from other clients at the same time"
    );
    // Measured for heads and bodies: 21 and 16 KiB over HTTP, mostly hyper's buffers; 5 and 6 KiB over FastCGI.
    let most_each = if protocol == Protocol::Http { 24 } else { 8 };
    assert!(grown < most_each * most as u64, "{protocol:?}, {what}: {grown} KiB for {most} connections");
    for stream in &mut slow {
        let error = stream.read(&mut [0]).expect_err("no response was sent, and the client was not disconnected");
        assert_eq!(error.kind(), ErrorKind::WouldBlock, "{protocol:?}, {what}");
    }
    drop(slow);
    server.stop();
}

#[test]
fn ten_thousand_slow_clients_use_little_memory_and_delay_no_other_client() {
    let directory = tempfile::tempdir().unwrap();
    let unix = format!("fastcgi:unix:{}", directory.path().join("a.sock").display());
    for (protocol, bind) in [(Protocol::Http, "http:127.0.0.1:0"), (Protocol::FastCgi, &unix)] {
        let head = protocol.head("GET", "/ok", 0);
        slow_clients(protocol, bind, "heads", &head[..20]);
        slow_clients(protocol, bind, "bodies", &protocol.head("POST", "/count", 1 << 20));
    }
}

const SHORT: [&str; 10] = [
    "--idle-timeout",
    "1s",
    "--header-timeout",
    "1s",
    "--body-timeout",
    "1s",
    "--write-timeout",
    "1s",
    "--log-level",
    "debug,hyper=info,h2=info",
];

/// Sends a byte from time to time until a response arrives. Returns all received bytes.
fn trickle(mut stream: UnixStream) -> Vec<u8> {
    let began = Instant::now();
    let mut all = Vec::new();
    stream.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    loop {
        assert!(began.elapsed() < common::PATIENCE, "the client was never disconnected");
        let gone = stream.write_all(b"x").is_err();
        let mut piece = [0; 4096];
        match stream.read(&mut piece) {
            Ok(0) => return all,
            Ok(count) => all.extend_from_slice(&piece[..count]),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) && !gone => {}
            Err(_) => return all,
        }
        if raw::status(&all).is_some() {
            return all;
        }
    }
}

fn wait_for_cut(server: &Server, why: &str) {
    let line = format!("cut off a {why}");
    wait_until(&line, || server.log().contains(&line).then_some(()));
}

#[test]
fn a_client_that_sends_its_head_too_slowly_is_disconnected() {
    for protocol in ALL {
        let mut server = protocol.start("crashy", &[&["--workers", "1"], &SHORT[..]].concat());
        let mut stream = raw::connect(&server.binds[0]);
        stream.write_all(&protocol.head("GET", "/ok", 0)[..20]).unwrap();
        let came = trickle(stream);
        let text = String::from_utf8_lossy(&came);
        match protocol {
            Protocol::Http => assert_eq!(raw::status(&came), Some(408), "{text}"),
            // The server cannot respond, because it has no request yet.
            _ => assert!(came.is_empty(), "{protocol:?}: {text}"),
        }
        wait_for_cut(&server, "connection: the client sent a request head too slowly");
        server.stop();
    }
}

#[test]
fn a_body_that_arrives_too_slowly_gets_408() {
    for protocol in ALL {
        let mut server = protocol.start("crashy", &[&["--workers", "1"], &SHORT[..]].concat());
        let mut stream = raw::connect(&server.binds[0]);
        stream.write_all(&protocol.head("POST", "/count", 1 << 20)).unwrap();
        assert_eq!(raw::status(&trickle(stream)), Some(408), "{protocol:?}");
        wait_for_cut(&server, "request: the client sent its body too slowly");
        server.stop();
    }
}

#[test]
fn a_body_that_arrives_too_slowly_releases_the_thread_of_its_function() {
    for protocol in ALL {
        let mut server = protocol.start("holds", &[&["--workers", "1", "--threads", "1"], &SHORT[..]].concat());
        let mut stream = raw::connect(&server.binds[0]);
        stream.write_all(&protocol.head("POST", "/count", 1 << 20)).unwrap();
        let trickling = std::thread::spawn(move || trickle(stream));
        // This request waits for the only thread, and therefore for the end of the first request.
        let next = protocol.head("GET", "/", 0);
        assert_eq!(raw::ask(&mut raw::connect(&server.binds[0]), &next).0, 200, "{protocol:?}");
        assert_eq!(raw::status(&trickling.join().unwrap()), Some(408), "{protocol:?}");
        server.stop();
    }
}

#[test]
fn a_client_that_does_not_read_is_disconnected() {
    for protocol in ALL {
        let mut server = protocol.start("crashy", &[&["--workers", "1"], &SHORT[..]].concat());
        let mut stream = raw::connect(&server.binds[0]);
        stream.write_all(&protocol.head("GET", "/bytes/64", 0)).unwrap();
        wait_for_cut(&server, "connection: the client read a response too slowly");
        let count = io::copy(&mut stream, &mut io::sink()).unwrap_or(0);
        assert!(count < 64 << 20, "{protocol:?}");
        server.stop();
    }
}

/// The application has finished, but part of the response has not been sent yet. The connection is therefore not idle.
#[test]
fn a_client_that_reads_slowly_but_steadily_gets_the_whole_response() {
    const LENGTH: usize = 16 << 20;
    for protocol in ALL {
        let mut server = protocol.start("crashy", &[&["--workers", "1"], &SHORT[..]].concat());
        let mut stream = raw::connect(&server.binds[0]);
        stream.write_all(&protocol.head("GET", "/piece/16", 0)).unwrap();
        let (mut count, mut piece) = (0, vec![0; 64 << 10]);
        while count < LENGTH {
            let read = stream.read(&mut piece).unwrap();
            assert!(read > 0, "{protocol:?}: {count} of {LENGTH} bytes arrived");
            count += read;
            // With this pause, reading the whole body takes about four seconds. The kernel's buffers hold only a small part of the body.
            std::thread::sleep(Duration::from_micros(15 * read as u64 / 64));
        }
        server.stop();
    }
}

#[test]
fn an_idle_client_is_disconnected() {
    for protocol in ALL {
        let mut server = protocol.start("crashy", &[&["--workers", "1"], &SHORT[..]].concat());
        let mut clients = vec![raw::connect(&server.binds[0])];
        if protocol != Protocol::Scgi {
            let mut kept = raw::connect(&server.binds[0]);
            assert_eq!(raw::ask(&mut kept, &protocol.head("GET", "/ok", 0)).0, 200);
            clients.push(kept);
        }
        if protocol == Protocol::FastCgi {
            // The connection stays open after a request that cannot be parsed.
            let mut refused = raw::connect(&server.binds[0]);
            assert_eq!(raw::ask(&mut refused, &protocol.head("G(T", "/ok", 0)).0, 400);
            clients.push(refused);
        }
        let count = clients.len();
        for mut client in clients {
            let mut rest = Vec::new();
            client.read_to_end(&mut rest).unwrap();
            assert_eq!(raw::status(&rest), None, "{protocol:?}");
        }
        let cut = || server.log().matches("cut off a connection: it was idle (--idle-timeout)").count();
        wait_until("all clients were disconnected for this reason", || (cut() == count).then_some(()));
        server.stop();
    }
}
