//! Measurements of gateways: clients that are slow, requests that time out, and many idle clients. `scripts/soak gateway`
//! runs the ignored ones, with a release build.

#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a failing test reports its location")]

mod common;

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use common::gateway::Site;
use common::{connect_tcp, http, wait_until};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

const MIB: u64 = 1 << 20;

// ---- requests that time out ----

/// With the default quarantine, most requests of the burst are refused; without one, they wait until --queue-timeout.
#[test]
fn after_a_burst_of_requests_that_time_out_normal_load_is_served() {
    for more in [&[][..], &["--quarantine", "0", "--queue-timeout", "4s"]] {
        let mut site = Site::faulty(&[&["--request-timeout", "2s"], more].concat());
        let mut burst: Vec<_> = (0..200).map(|number| site.send("GET", &format!("/hold?burst{number}"))).collect();
        let statuses: Vec<u16> = burst.iter_mut().map(|client| client.response(false).unwrap().status).collect();
        drop(burst);
        assert!(statuses.iter().all(|status| [503, 504].contains(status)), "{statuses:?}");
        let timed_out = statuses.iter().filter(|&&status| status == 504).count();
        let ended = Instant::now();
        for number in 0..20 {
            assert_eq!(site.post(&format!("/once?after{number}"), b"").text(), "1\n");
        }
        eprintln!("{timed_out} of 200 received a 504; 20 requests were served {:?} later", ended.elapsed());
        site.at_rest();
        assert_eq!(site.apps().len(), 2);
        site.server.stop();
    }
}

// ---- slow clients ----

/// Clients of each kind that send or receive one byte a second.
const SLOW: usize = 50;
const NORMAL: usize = 20;
const ROUNDS: usize = 5;
const ROUND: Duration = Duration::from_secs(3);

/// Requests that `NORMAL` clients complete in a round.
fn rate(address: &str) -> u64 {
    let count = AtomicU64::new(0);
    let end = Instant::now() + ROUND;
    std::thread::scope(|scope| {
        for _ in 0..NORMAL {
            scope.spawn(|| {
                let mut client = http::Client::connect(address).unwrap();
                while Instant::now() < end {
                    let response = client.request("GET", "/pid", b"").unwrap();
                    assert_eq!(response.status, 200, "{response:?}");
                    count.fetch_add(1, Ordering::SeqCst);
                }
            });
        }
    });
    count.into_inner()
}

/// Sends and receives one byte a second on each connection until the sender of `stop` is dropped.
fn trickle(address: &str, stop: &Receiver<()>) {
    let connect = || connect_tcp(address).unwrap();
    let mut senders: Vec<TcpStream> = (0..SLOW).map(|_| connect()).collect();
    let head = b"POST /length HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n";
    senders.iter_mut().for_each(|client| client.write_all(head).unwrap());
    let mut readers: Vec<TcpStream> = (0..SLOW).map(|_| connect()).collect();
    let head = format!("GET /large?{MIB} HTTP/1.1\r\nHost: localhost\r\n\r\n");
    readers.iter_mut().for_each(|client| client.write_all(head.as_bytes()).unwrap());
    while stop.recv_timeout(Duration::from_secs(1)) == Err(RecvTimeoutError::Timeout) {
        senders.iter_mut().for_each(|client| client.write_all(b"x").unwrap());
        readers.iter_mut().for_each(|client| client.read_exact(&mut [0]).unwrap());
    }
}

/// Returns the rate while slow clients are in flight, and no app process serves them.
fn rate_with_slow_clients(site: &Site) -> u64 {
    let (end, stop) = channel();
    let address = site.server.http();
    let address = &address;
    std::thread::scope(|scope| {
        let slow = scope.spawn(move || trickle(address, &stop));
        wait_until("the gateways alone serve the slow clients", || {
            let status = site.status();
            let in_flight = |pool: &str| -> u64 {
                status[pool].as_array().unwrap().iter().map(|process| process["in_flight"].as_u64().unwrap()).sum()
            };
            // The buffers of the sockets may hold a whole response.
            (in_flight("gateways") >= SLOW as u64 && in_flight("workers") == 0).then_some(())
        });
        let with = rate(address);
        drop(end);
        slow.join().unwrap();
        with
    })
}

#[test]
#[ignore = "a measurement of a rate, for scripts/soak gateway"]
fn slow_clients_do_not_slow_down_others() {
    let mut site = Site::php(&["--write-timeout", "1h", "--body-timeout", "1h"], &[]);
    let address = site.server.http();
    let mut ratios = Vec::new();
    rate(&address);
    for round in 0..ROUNDS {
        // The order alternates, so that a trend has no effect on the median.
        let before = (round % 2 == 0).then(|| rate(&address));
        let with = rate_with_slow_clients(&site);
        site.at_rest();
        let without = before.unwrap_or_else(|| rate(&address));
        eprintln!("{without} requests without slow clients, {with} with them, in {ROUND:?}");
        ratios.push(with as f64 / without as f64);
    }
    ratios.sort_by(f64::total_cmp);
    eprintln!("ratios {ratios:.2?}, median {:.2}", ratios[ROUNDS / 2]);
    site.server.stop();
}

// ---- memory ----

const IDLE: usize = 10_000;
const QUEUED: usize = 1000;

/// Returns the sum of the PSS of the master and all its processes, heirs and gateways included.
fn memory(site: &Site) -> u64 {
    let mut all = common::recipes::descendants(&site.server);
    assert!(site.processes().is_subset(&all), "gateways and app processes are measured: {all:?}");
    all.insert(site.server.pid().as_raw());
    let pss = |pid: &i32| -> u64 {
        let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix("Pss:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
    };
    all.iter().map(pss).sum()
}

/// Idle clients have had a response, and keep their connections. Queued clients wait for the only app process.
#[test]
#[ignore = "needs more than 11,000 descriptors, for scripts/soak gateway"]
fn idle_clients_and_queued_requests_cost_less_than_100_mib() {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).unwrap();
    assert!(hard > 12_000, "the hard limit of descriptors is {hard}: raise it with ulimit -Hn");
    let limits = ["--queue", "1024", "--max-connections", "11000", "--idle-timeout", "1h", "--queue-timeout", "1h"];
    let mut site = Site::faulty(&[&["--workers", "1"], &limits[..]].concat());
    let address = site.server.http();
    let start = memory(&site);
    let mut idle = Vec::with_capacity(IDLE);
    for _ in 0..IDLE {
        let mut client = http::Client::connect(&address).unwrap();
        assert_eq!(client.request("GET", "/pid", b"").unwrap().status, 200);
        idle.push(client);
    }
    let just_served = memory(&site);
    // Each gateway frees the buffers of connections that have been idle for some seconds.
    let with_idle = wait_until("the buffers of idle connections are freed", || {
        let now = memory(&site);
        (now < start + 95 * MIB).then_some(now)
    });
    let (mut first, _) = site.hold("a", "/hold");
    let mut waiting: Vec<_> = (0..QUEUED).map(|_| site.send("GET", "/pid")).collect();
    site.queued(QUEUED as u64);
    let with_all = memory(&site);
    let mib = |bytes: u64| bytes as f64 / MIB as f64;
    eprintln!(
        "{:.1} MiB at the start, {:.1} with {IDLE} clients that were just served, {:.1} some seconds later, {:.1} with {QUEUED} \
        queued requests",
        mib(start),
        mib(just_served),
        mib(with_idle),
        mib(with_all)
    );
    site.release("a");
    assert_eq!(first.response(false).unwrap().status, 200);
    waiting.iter_mut().for_each(|client| assert_eq!(client.response(false).unwrap().status, 200));
    idle.iter_mut().for_each(|client| assert_eq!(client.request("GET", "/pid", b"").unwrap().status, 200));
    site.at_rest();
    assert!(with_all < start + 100 * MIB, "{:.1} MiB", mib(with_all - start));
    site.server.stop();
}
