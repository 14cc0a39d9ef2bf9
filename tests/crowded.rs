//! A worker that has reached its limit for connections, or for memory that unfinished requests use.

#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    reason = "a failing test reports its location, and measurements are printed"
)]

mod common;

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::time::{Duration, Instant};

use common::limit::InTime as _;
use common::raw::{self, Protocol};
use common::{PATIENCE, Server, fastcgi, http2, program, sse, status_number, wait_until};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const WINDOW_UPDATE: u8 = 8;
const MOST: usize = 8;
const FULL: [&str; 4] = ["--workers", "1", "--max-connections", "8"];

/// Opens a connection, completes one request on it, and leaves it idle.
fn kept(protocol: Protocol, bind: &str) -> UnixStream {
    let mut stream = raw::connect(bind);
    ask(protocol, &mut stream);
    stream
}

fn ask(protocol: Protocol, stream: &mut UnixStream) {
    stream.write_all(&protocol.head("GET", "/ok", 0)).unwrap();
    read_answer(protocol, stream);
}

fn read_answer(protocol: Protocol, stream: &mut UnixStream) {
    let (status, mut response) = raw::ask(stream, b"");
    assert_eq!(status, 200, "{protocol:?}");
    // Read to the end of the response, so that its last part is not mistaken for part of the next response.
    let end: &[u8] = if protocol == Protocol::FastCgi { &[1, 3, 0, 1, 0, 8] } else { b"ok" };
    while !response.windows(end.len()).any(|part| part == end) {
        let mut piece = [0; 4096];
        let count = stream.read(&mut piece).unwrap();
        assert!(count > 0, "{protocol:?}: the connection ended within the response");
        response.extend_from_slice(&piece[..count]);
    }
}

/// Returns whether data or the end of the stream has arrived.
fn has_news(stream: &mut UnixStream) -> bool {
    stream.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
    let mut peeked = [0];
    let read = nix::sys::socket::recv(
        std::os::fd::AsRawFd::as_raw_fd(stream),
        &mut peeked,
        nix::sys::socket::MsgFlags::MSG_PEEK,
    );
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    read.is_ok()
}

/// Waits until data or the end of the stream has arrived. Returns false at the end of the stream.
fn is_answered(stream: &UnixStream) -> bool {
    let (fd, mut peeked) = (std::os::fd::AsRawFd::as_raw_fd(stream), [0]);
    matches!(nix::sys::socket::recv(fd, &mut peeked, nix::sys::socket::MsgFlags::MSG_PEEK), Ok(count) if count > 0)
}

fn is_at_its_end(stream: &mut UnixStream) -> bool {
    has_news(stream) && matches!(stream.read(&mut [0]), Ok(0))
}

#[test]
fn a_full_worker_closes_the_connection_that_was_idle_longest() {
    for protocol in [Protocol::Http, Protocol::FastCgi] {
        let mut server = protocol.start("crashy", &FULL);
        let bind = server.binds[0].clone();
        let mut used: Vec<UnixStream> = (0..MOST - 1).map(|_| kept(protocol, &bind)).collect();
        // This is the newest connection, and no further request is sent on it.
        let mut idle = kept(protocol, &bind);
        let mut use_them = || used.iter_mut().for_each(|stream| ask(protocol, stream));
        // Idle times are counted in seconds. Wait until the connection has been idle for longer than all other connections, however slow
        // the machine is.
        let opened = Instant::now();
        while opened.elapsed() < Duration::from_secs(3) {
            use_them();
        }
        let mut further = raw::connect(&bind);
        further.write_all(&protocol.head("GET", "/ok", 0)).unwrap();
        wait_until("the worker accepts another connection", || {
            use_them();
            has_news(&mut further).then_some(())
        });
        assert_eq!(raw::ask(&mut further, b"").0, 200, "{protocol:?}");
        server.wait_for("closed idle connections to make room for others (--max-connections) count=1");
        for stream in &mut used {
            ask(protocol, stream);
        }
        assert!(is_at_its_end(&mut idle), "{protocol:?}");
        drop((used, further));
        server.stop();
    }
}

#[test]
fn a_full_worker_closes_connections_that_never_sent_data() {
    for protocol in raw::ALL {
        let mut server = protocol.start("crashy", &FULL);
        let bind = server.binds[0].clone();
        let mut silent: Vec<UnixStream> = (0..MOST).map(|_| raw::connect(&bind)).collect();
        assert_eq!(raw::ask(&mut raw::connect(&bind), &protocol.head("GET", "/ok", 0)).0, 200, "{protocol:?}");
        assert_eq!(silent.iter_mut().filter_map(|stream| is_at_its_end(stream).then_some(())).count(), 1);
        drop(silent);
        server.stop();
    }
}

#[test]
fn an_http2_connection_closed_to_make_room_is_sent_a_goaway() {
    let mut server = Protocol::Http.start("crashy", &["--workers", "1", "--max-connections", "1"]);
    let mut idle = http2::Client::connect(&server.http()).unwrap();
    idle.send(&http2::head(1, http2::END_STREAM, "GET", "/ok", &[])).unwrap();
    assert!(idle.next(http2::HEADERS).unwrap().payload.starts_with(http2::status(200)));
    let bind = server.binds[0].clone();
    std::thread::scope(|scope| {
        let asking = scope.spawn(|| raw::ask(&mut raw::connect(&bind), &Protocol::Http.head("GET", "/ok", 0)).0);
        let goaway = idle.next(http2::GOAWAY).unwrap();
        assert_eq!(goaway.payload[4..8], [0; 4], "NO_ERROR");
        // PINGs are answered until the connection closes.
        assert_eq!(idle.next(http2::DATA + 100).unwrap_err().kind(), ErrorKind::UnexpectedEof);
        assert_eq!(asking.join().unwrap(), 200);
    });
    // A client that does not process the GOAWAY is disconnected.
    let mut deaf = http2::Client::connect(&server.http()).unwrap();
    deaf.send(&http2::head(1, http2::END_STREAM, "GET", "/ok", &[])).unwrap();
    assert!(deaf.next(http2::HEADERS).unwrap().payload.starts_with(http2::status(200)));
    assert_eq!(raw::ask(&mut raw::connect(&bind), &Protocol::Http.head("GET", "/ok", 0)).0, 200);
    server.stop();
}

#[test]
fn busy_connections_are_not_closed_to_make_room() {
    for protocol in raw::ALL {
        let mut server = protocol.start("holds", &["--workers", "1", "--threads", "8", "--max-connections", "8"]);
        let bind = server.binds[0].clone();
        let gate = TcpListener::bind("127.0.0.1:0").unwrap();
        let target = format!("/hold/{}", gate.local_addr().unwrap().port());
        let mut held: Vec<(UnixStream, _)> = (0..MOST)
            .map(|_| {
                let mut stream = raw::connect(&bind);
                stream.write_all(&protocol.head("GET", &target, 0)).unwrap();
                (stream, gate.accept().unwrap().0)
            })
            .collect();
        let mut further = raw::connect(&bind);
        further.write_all(&protocol.head("GET", "/", 0)).unwrap();
        server.wait_for("cannot accept waiting clients: no connection is idle");
        assert!(!has_news(&mut further), "{protocol:?}");
        for (mut stream, gate) in held.drain(..) {
            drop(gate);
            assert_eq!(raw::ask(&mut stream, b"").0, 200, "{protocol:?}");
        }
        assert_eq!(raw::ask(&mut further, b"").0, 200, "{protocol:?}");
        drop(further);
        server.stop();
    }
}

#[test]
fn event_streams_leave_room_for_requests() {
    let mut server = Protocol::Http.start("stream", &FULL);
    let bind = server.binds[0].clone();
    let open = || sse::Source::open(sse::Way::Http, &bind, "/events?topics=news", "");
    let streams: Vec<_> = (0..6).map(|_| open().unwrap()).collect();
    let refused = open().err().unwrap().to_string();
    assert!(refused.starts_with("503\n"), "streams can use three quarters of the connections: {refused}");
    let (status, _) = raw::ask(&mut raw::connect(&bind), &Protocol::Http.head("GET", "/who", 0));
    assert_eq!(status, 200);
    drop(streams);
    server.stop();
}

#[test]
fn connections_per_client_are_limited_except_from_proxies_and_on_unix_sockets() {
    let directory = tempfile::tempdir().unwrap();
    let unix = format!("http:unix:{}", directory.path().join("a.sock").display());
    for protocol in raw::ALL {
        let more = ["--workers", "1", "--max-connections-per-address", "3", "--bind", &unix];
        let mut server = protocol.start("crashy", &more);
        let binds = server.binds.clone();
        let mut open: Vec<UnixStream> = (0..3).map(|_| raw::connect(&binds[0])).collect();
        let mut fourth = raw::connect(&binds[0]);
        assert!(matches!(fourth.read(&mut [0]), Ok(0) | Err(_)), "{protocol:?}");
        let line = server.wait_for("closed a connection: its client is at the limit of this worker");
        assert!(line.contains("(--max-connections-per-address) limit=3 from=127.0.0.1 count=1"), "{line}");
        let over_unix: Vec<UnixStream> = (0..9).map(|_| kept(Protocol::Http, &binds[1])).collect();
        open.pop();
        // The server may take a moment to detect the end of the connection.
        wait_until("a connection is accepted again", || {
            let mut stream = raw::connect(&binds[0]);
            let _ = stream.write_all(&protocol.head("GET", "/ok", 0));
            let mut bytes = [0; 64];
            matches!(stream.read(&mut bytes), Ok(count) if count > 0).then_some(())
        });
        drop((open, over_unix));
        server.stop();

        let mut server = protocol.start("crashy", &[&more[..4], &["--trust", "127.0.0.1"]].concat());
        let many: Vec<UnixStream> = (0..9)
            .map(|_| {
                let mut stream = raw::connect(&server.binds[0]);
                assert_eq!(raw::ask(&mut stream, &protocol.head("GET", "/ok", 0)).0, 200, "{protocol:?}");
                stream
            })
            .collect();
        drop(many);
        server.stop();
    }
}

#[test]
fn an_admitted_connection_is_not_refused_by_the_worker_that_takes_it_over() {
    for protocol in [Protocol::Http, Protocol::FastCgi] {
        let arguments = ["--workers", "2", "--max-connections-per-address", "8", "--respawn-rate", "1000"];
        let mut server = protocol.start("crashy", &arguments);
        let bind = server.binds[0].clone();
        // More connections than one worker admits. One worker may reach its limit before the other worker does.
        let mut open: Vec<UnixStream> = Vec::new();
        wait_until("the client has twelve connections", || {
            let mut stream = raw::connect(&bind);
            let _ = stream.write_all(&protocol.head("GET", "/ok", 0));
            if is_answered(&stream) {
                read_answer(protocol, &mut stream);
                open.push(stream);
            }
            (open.len() == 12).then_some(())
        });
        let mut all_answer = |after: &str| {
            for (index, stream) in open.iter_mut().enumerate() {
                stream.write_all(&protocol.head("GET", "/ok", 0)).unwrap_or_else(|error| panic!("{after}: {error}"));
                assert!(is_answered(stream), "{protocol:?}: connection {index} was closed after {after}");
                read_answer(protocol, stream);
            }
        };
        server.signal(Signal::SIGTTOU);
        server.wait_for("worker exited");
        all_answer("scaling down");
        server.signal(Signal::SIGHUP);
        server.wait_for("reload done");
        all_answer("a reload");
        server.signal(Signal::SIGUSR2);
        server.wait_for("upgraded version=");
        server.wait_for("reload done");
        all_answer("an upgrade");
        // The worker from before the upgrade may still be exiting.
        let old = wait_until("only one worker remains", || Some(server.workers()).filter(|workers| workers.len() == 1));
        kill(Pid::from_raw(*old.first().unwrap()), Signal::SIGKILL).unwrap();
        server.renewed(1, &old);
        all_answer("the death of the worker");
        // The inherited connections do not count toward this client's limit, and the limit applies to its new connections.
        let new: Vec<UnixStream> = (0..8).map(|_| kept(protocol, &bind)).collect();
        let mut ninth = raw::connect(&bind);
        assert!(matches!(ninth.read(&mut [0]), Ok(0) | Err(_)), "{protocol:?}");
        drop((new, open));
        server.stop();
    }
}

#[test]
fn contradictory_settings_are_reported_at_startup_and_by_check() {
    let settings = [
        "--bind",
        "http:127.0.0.1:0",
        "--workers",
        "1",
        "--max-connections",
        "50",
        "--max-subscribers",
        "50",
        "--max-connections-per-address",
        "60",
        "--max-params",
        "8K",
        "--max-uri",
        "10K",
        "--max-buffered",
        "16K",
        "--rlimit",
        "nofile=100",
    ];
    let expected = [
        "--max-subscribers 50 is not below --max-connections 50",
        "--max-connections 50 needs 114 descriptors per worker, and the limit is 100",
        "--max-connections-per-address 60 has no effect",
        "--max-uri 10240 has no effect",
        "--max-buffered 16384 is less than four heads",
    ];
    let mut server = Server::start("crashy", &settings);
    server.stop();
    let output = Command::new(program("crashy")).arg("check").args(settings).output_in_time().unwrap();
    assert_eq!(output.status.code(), Some(0));
    let checked = String::from_utf8_lossy(&output.stderr).into_owned();
    for what in expected {
        assert!(server.log().contains(what), "{what}: {}", server.log());
        assert!(checked.contains(what), "{what}: {checked}");
    }
    let mut server = Protocol::Http.start("crashy", &["--workers", "1"]);
    server.stop();
    assert!(!server.log().contains("--max-"), "the defaults go together: {}", server.log());
}

// ---- memory ----

/// Limit for the memory that unfinished requests may use. The test sends about [`SENT_KIB`] of data.
const LIMIT_KIB: u64 = 8 << 10;
const SENT_KIB: u64 = 80 << 10;

/// Sends a large amount of data that completes no request. Returns the growth of the worker in KiB.
fn growth(protocol: &str, start: Protocol, example: &str, send: impl Fn(&str) -> Vec<UnixStream>, most: &str) -> u64 {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard.min(1 << 16), hard).unwrap();
    let mut server = start.start(example, &["--workers", "1", "--max-buffered", most]);
    let bind = server.binds[0].clone();
    let get = start.head("GET", "/loop/", 0);
    raw::ask(&mut raw::connect(&bind), &get);
    let worker = *server.workers().first().unwrap();
    let memory = || status_number(worker, "VmRSS").unwrap();
    let before = memory();
    let open = send(&bind);
    // When a later request is answered, possibly with 503, the worker has read all earlier data.
    wait_until("the worker has read all data", || {
        let mut stream = raw::connect(&bind);
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let _ = stream.write_all(&get);
        let mut bytes = [0; 256];
        matches!(stream.read(&mut bytes), Ok(count) if count > 0).then_some(())
    });
    let grown = memory().saturating_sub(before);
    eprintln!("{protocol}: {grown} KiB for {SENT_KIB} KiB sent, with --max-buffered {most}");
    drop(open);
    // Regular clients are served again.
    wait_until("the worker answers", || {
        let mut stream = raw::connect(&bind);
        let (status, _) = raw::ask(&mut stream, &get);
        assert!(status != 500, "{protocol}");
        (status != 503).then_some(())
    });
    if most != "0" {
        assert!(server.log().contains("(--max-buffered)"), "{protocol}: {}", server.log());
    }
    server.signal(nix::sys::signal::Signal::SIGINT);
    server.wait_end();
    grown
}

/// Opens many connections and sends these bytes on each. Write errors are ignored, because the server may close connections.
fn many(count: usize, bytes: &[u8]) -> impl Fn(&str) -> Vec<UnixStream> {
    move |bind| {
        let send = |_| {
            let mut stream = raw::connect(bind);
            stream.set_write_timeout(Some(Duration::from_secs(20))).unwrap();
            let _ = stream.write_all(bytes);
            stream
        };
        (0..count).map(send).collect()
    }
}

fn holds_no_more(protocol: &str, start: Protocol, example: &str, send: impl Fn(&str) -> Vec<UnixStream>) {
    let grown = growth(protocol, start, example, &send, "8M");
    assert!(
        grown < SENT_KIB / 2,
        "{protocol}: grew by {grown} KiB for {SENT_KIB} KiB sent; the limit is {LIMIT_KIB} KiB"
    );
}

#[test]
fn request_heads_stay_within_the_memory_limit_over_http() {
    let head = format!("GET /ok HTTP/1.1\r\nHost: localhost\r\nA: {}", "a".repeat(100 << 10));
    holds_no_more("HTTP/1", Protocol::Http, "crashy", many(800, head.as_bytes()));
}

#[test]
fn request_heads_stay_within_the_memory_limit_over_scgi() {
    let pairs = format!("CONTENT_LENGTH\x000\x00SCGI\x001\x00HTTP_A\x00{}", "a".repeat(100 << 10));
    let head = format!("{}:{pairs}", pairs.len() + 1000);
    holds_no_more("SCGI", Protocol::Scgi, "crashy", many(800, head.as_bytes()));
}

#[test]
fn request_heads_stay_within_the_memory_limit_over_fastcgi() {
    // 64 incomplete requests at a time on one connection.
    let value = fastcgi::pair("HTTP_A", &"a".repeat(50 << 10));
    let request = |id: u16| [fastcgi::begin(id, 1, true), fastcgi::record(fastcgi::PARAMS, id, &value, 0)].concat();
    let requests: Vec<u8> = (1..=64).flat_map(request).collect();
    holds_no_more("FastCGI", Protocol::FastCgi, "crashy", many(26, &requests));
}

#[test]
fn unread_bodies_stay_within_the_memory_limit_over_http2() {
    // The application is blocked, and the window of each stream is 64 KiB.
    let gate = TcpListener::bind("127.0.0.1:0").unwrap();
    let target = format!("/hold/{}", gate.local_addr().unwrap().port());
    let mut bytes = Vec::new();
    for stream in (0..15).map(|number| 2 * number + 1) {
        bytes.extend(http2::head(stream, 0, "POST", &target, &[]));
        for _ in 0..4 {
            bytes.extend(http2::frame(http2::DATA, 0, stream, &[b'x'; 16 << 10][..(16 << 10) - 1]));
        }
    }
    let send = |bind: &str| {
        let send = |_| {
            let mut client = http2::Client::connect(bind.trim_start_matches("http://")).unwrap();
            // After this frame, the connection's window is 1 MiB.
            client.next(WINDOW_UPDATE).unwrap();
            client.stream.set_write_timeout(Some(Duration::from_secs(20))).unwrap();
            let _ = client.send(&bytes);
            UnixStream::from(OwnedFd::from(client.stream))
        };
        (0..85).map(send).collect()
    };
    holds_no_more("HTTP/2", Protocol::Http, "holds", send);
    drop(gate);
}

#[test]
fn requests_that_fit_are_served_while_others_reach_the_memory_limit() {
    for protocol in raw::ALL {
        let mut server = protocol.start("crashy", &["--workers", "1", "--max-buffered", "1M"]);
        let bind = server.binds[0].clone();
        let begun = match protocol {
            Protocol::Http => format!("GET /ok HTTP/1.1\r\nHost: x\r\nA: {}", "a".repeat(60 << 10)).into_bytes(),
            Protocol::FastCgi => {
                let value = fastcgi::pair("HTTP_A", &"a".repeat(60 << 10));
                [fastcgi::begin(1, 1, true), fastcgi::record(fastcgi::PARAMS, 1, &value, 0)].concat()
            }
            Protocol::Scgi => {
                let pairs = format!("CONTENT_LENGTH\x000\x00SCGI\x001\x00HTTP_A\x00{}", "a".repeat(60 << 10));
                format!("{}:{pairs}", pairs.len() + 1000).into_bytes()
            }
        };
        let slow = many(100, &begun)(&bind);
        for _ in 0..20 {
            assert_eq!(raw::ask(&mut raw::connect(&bind), &protocol.head("GET", "/ok", 0)).0, 200, "{protocol:?}");
        }
        server.wait_for("cut off connections whose unfinished requests held too much memory (--max-buffered)");
        drop(slow);
        server.stop();
    }
}

/// The rest of a body that the application does not read is discarded as it arrives, so it does not count towards the memory limit.
#[test]
fn a_discarded_body_takes_up_no_memory() {
    const LENGTH: usize = 8 << 20;
    for protocol in [Protocol::Http, Protocol::Scgi] {
        let mut server = protocol.start("scenarios", &["--workers", "1", "--max-buffered", "1M"]);
        // On a busy machine, the client may be too slow for the server, which then closes the connection.
        let is_discarded = (0..5).any(|_| {
            let mut stream = raw::connect(&server.binds[0]);
            stream.write_all(&protocol.head("POST", "/early", LENGTH)).unwrap();
            let sent = stream.write_all(&vec![b'x'; LENGTH - 1]);
            let other = raw::ask(&mut raw::connect(&server.binds[0]), &protocol.head("GET", "/empty", 0)).0;
            sent.is_ok() && other == 200
        });
        server.stop();
        assert!(is_discarded, "{protocol:?}: {}", server.log());
        assert!(!server.log().contains("(--max-buffered)"), "{protocol:?}: {}", server.log());
    }
}
