//! Many subscribers across all workers, each of which receives every event once and in order. The test reports the latency from publishing
//! an event to reading it from the socket, the CPU time per delivery, and the memory per subscriber.
//!
//! The default is 400 subscribers for 5 s; `scripts/soak events` uses 10,000 for a minute (FORKYARD_SUBSCRIBERS, FORKYARD_SECONDS).

#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a failing test reports its location")]

mod common;

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use common::{Server, wait_until};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

/// Events per second.
const RATE: u64 = 100;
const WORKERS: usize = 4;
/// Maximum memory of the workers per subscriber, in bytes, with at least [`MANY`] subscribers.
const MOST_EACH: u64 = 20 << 10;
/// Maximum memory per subscriber, in bytes, with fewer subscribers. It is higher because each worker's first subscriber has a fixed cost.
const MOST_EACH_OF_FEW: u64 = 32 << 10;
const MANY: usize = 5000;

fn number(name: &str, otherwise: u64) -> u64 {
    std::env::var(name).map_or(otherwise, |text| text.parse().expect("the variable contains a number"))
}

fn now_us() -> u64 {
    u64::try_from(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_micros()).unwrap()
}

/// Counts of latencies in buckets of an eighth of a power of two.
struct Histogram(Vec<u64>);

impl Histogram {
    fn add(&mut self, us: u64) {
        let us = us.max(8);
        let power = us.ilog2();
        let eighth = (us >> (power - 3)) & 7;
        self.0[power as usize * 8 + usize::try_from(eighth).unwrap()] += 1;
    }

    /// Returns the latency, in microseconds, that this percentage of events does not exceed.
    fn percentile_us(&self, percent: u64) -> u64 {
        let total: u64 = self.0.iter().sum();
        let mut left = total * percent / 100;
        for (step, count) in self.0.iter().enumerate() {
            if *count > left {
                return (9 + step as u64 % 8) << (step / 8 - 3);
            }
            left -= count;
        }
        0
    }
}

/// The results of all clients.
struct Seen {
    subscribed: AtomicUsize,
    delivered: AtomicU64,
    done: AtomicUsize,
}

/// Runs one client, which parses only the lines that begin with `id:` or `data:`.
async fn subscriber(address: String, last: u64, seen: &'static Seen, latencies: Rc<RefCell<Histogram>>) {
    let mut stream = TcpStream::connect(&address).await.unwrap();
    let head = "GET /events?topics=load HTTP/1.1\r\nHost: a\r\nAccept: text/event-stream\r\n\r\n";
    stream.write_all(head.as_bytes()).await.unwrap();
    let (mut rest, mut buffer) = (Vec::new(), [0; 4096]);
    let (mut id, mut expected) = (None, None);
    loop {
        let count = stream.read(&mut buffer).await.unwrap();
        assert!(count > 0, "the stream ended after {id:?}");
        let now = now_us();
        rest.extend_from_slice(&buffer[..count]);
        let mut from = 0;
        while let Some(length) = rest[from..].iter().position(|byte| *byte == b'\n') {
            let line = std::str::from_utf8(&rest[from..from + length]).unwrap().trim_end();
            from += length + 1;
            if let Some(text) = line.strip_prefix("id: ") {
                let number: u64 = text.split_once('-').unwrap().1.parse().unwrap();
                id = Some(number);
                if expected.is_none() {
                    expected = Some(number + 1);
                    seen.subscribed.fetch_add(1, Ordering::SeqCst);
                }
            } else if let Some(published) = line.strip_prefix("data: ") {
                assert_eq!(id, expected, "each event once, and in order");
                expected = id.map(|id| id + 1);
                seen.delivered.fetch_add(1, Ordering::Relaxed);
                let published: u64 = published.parse().unwrap();
                latencies.borrow_mut().add(now.saturating_sub(published));
                if id == Some(last) {
                    seen.done.fetch_add(1, Ordering::SeqCst);
                    return;
                }
            }
            assert!(!line.starts_with("event: gap"));
        }
        rest.drain(..from);
    }
}

/// Returns the proportional set size of the workers, in bytes.
fn memory(server: &Server) -> u64 {
    let of = |pid: i32| {
        let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix("Pss:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
    };
    server.workers().into_iter().map(of).sum()
}

/// Returns the CPU time that the workers have used.
fn cpu(server: &Server) -> Duration {
    server.workers().into_iter().map(|pid| common::cpu_time(&common::proc_of(pid))).sum()
}

#[test]
fn every_subscriber_gets_every_event_once_and_in_order() {
    let subscribers = usize::try_from(number("FORKYARD_SUBSCRIBERS", 400)).unwrap();
    let events = number("FORKYARD_SECONDS", 5) * RATE;
    let workers = WORKERS.to_string();
    let mut server =
        Server::start("stream", &["--bind", "http:127.0.0.1:0", "--workers", &workers, "--backlog", "4096"]);
    let address = server.http();
    let before = memory(&server);
    let seen: &'static Seen = Box::leak(Box::new(Seen {
        subscribed: AtomicUsize::new(0),
        delivered: AtomicU64::new(0),
        done: AtomicUsize::new(0),
    }));
    let clients = std::thread::spawn({
        let address = address.clone();
        move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let latencies = Rc::new(RefCell::new(Histogram(vec![0; 64 * 8])));
            let local = tokio::task::LocalSet::new();
            for _ in 0..subscribers {
                local.spawn_local(subscriber(address.clone(), events, seen, Rc::clone(&latencies)));
            }
            runtime.block_on(local);
            latencies.replace(Histogram(Vec::new()))
        }
    });
    wait_until("all clients have subscribed", || {
        (seen.subscribed.load(Ordering::SeqCst) == subscribers || clients.is_finished()).then_some(())
    });
    let each = memory(&server).saturating_sub(before) / subscribers as u64;
    let (used, begun) = (cpu(&server), Instant::now());
    // Publish to the log directly, because a request would wait for a worker that is busy with the subscribers.
    let log = server.segment().events();
    for id in 1..=events {
        let due = Duration::from_secs(1) * u32::try_from(id).unwrap() / u32::try_from(RATE).unwrap();
        std::thread::sleep(due.saturating_sub(begun.elapsed()));
        assert_eq!(log.publish("load", "", now_us().to_string().as_bytes()), Ok(id));
    }
    wait_until("all subscribers have received the last event", || {
        (seen.done.load(Ordering::SeqCst) == subscribers || clients.is_finished()).then_some(())
    });
    let used = cpu(&server) - used;
    let latencies = clients.join().expect("every subscriber received every event");
    let delivered = seen.delivered.load(Ordering::SeqCst);
    assert_eq!(delivered, subscribers as u64 * events);
    eprintln!(
        "{subscribers} subscribers of {WORKERS} workers, {events} events in {:.1} s: {delivered} deliveries, {:.2} us of CPU each; \
         latency {} us (median), {} us (p99); {each} bytes each",
        begun.elapsed().as_secs_f64(),
        used.as_secs_f64() * 1e6 / delivered as f64,
        latencies.percentile_us(50),
        latencies.percentile_us(99),
    );
    let most = if subscribers < MANY { MOST_EACH_OF_FEW } else { MOST_EACH };
    assert!(each < most, "{each} bytes per subscriber");
    server.stop();
}
