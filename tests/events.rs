//! Events across all workers, with real processes: over every protocol, during crashes and reloads, and to clients that poll, read slowly,
//! or disconnect.

#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "test code outside of test functions")]

mod common;

use std::collections::BTreeSet;
use std::io::{Read as _, Write as _};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use common::http::{self, Client, Response};
use common::raw::{self, Protocol};
use common::sse::{Event, Source, WAYS, Way};
use common::{PATIENCE, Server, StopOnDrop, fastcgi, program, status_number, wait_until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// The example, which listens for every protocol.
struct Site(Server);

impl Site {
    fn start(arguments: &[&str]) -> Self {
        let binds = ["http", "fastcgi", "scgi"].map(|protocol| format!("{protocol}:127.0.0.1:0"));
        let binds = binds.iter().flat_map(|bind| ["--bind", bind]);
        Self(Server::start("stream", &binds.chain(arguments.iter().copied()).collect::<Vec<_>>()))
    }

    fn bind(&self, way: Way) -> &str {
        let number = match way.protocol() {
            Protocol::Http => 0,
            Protocol::FastCgi => 1,
            Protocol::Scgi => 2,
        };
        &self.0.binds[number]
    }

    fn open(&self, way: Way, target: &str, last_id: &str) -> Source {
        Source::open(way, self.bind(way), target, last_id).unwrap_or_else(|error| panic!("{way:?} {target}: {error}"))
    }

    fn publish(&self, topic: &str, data: &str) -> u64 {
        self.publish_as(topic, "", data)
    }

    fn publish_as(&self, topic: &str, name: &str, data: &str) -> u64 {
        let answer = http::post(&self.0.http(), &format!("/publish/{topic}?name={name}"), data.as_bytes()).unwrap();
        assert_eq!(answer.status, 200, "{}", answer.text());
        answer.text().trim().parse().unwrap()
    }

    /// Publishes `count` events with data of this length, in one request. Returns the last id.
    fn flood(&self, topic: &str, count: u64, length: usize) -> u64 {
        let answer = http::post(&self.0.http(), &format!("/flood/{topic}/{count}/{length}"), b"").unwrap();
        assert_eq!(answer.status, 200, "{}", answer.text());
        answer.text().trim().parse().unwrap()
    }

    /// Returns the number of subscribers of the only worker.
    fn subscribers(&self) -> usize {
        http::get(&self.0.http(), "/subscribers").unwrap().text().trim().parse().unwrap()
    }

    fn wait_for_subscribers(&self, count: usize, why: &str) {
        wait_until(why, || (self.subscribers() == count).then_some(()));
    }
}

/// Sends one long-poll request.
fn poll(address: &str, target: &str, headers: &str) -> Response {
    let mut client = Client::connect(address).unwrap();
    let request = format!("GET {target} HTTP/1.1\r\nHost: localhost\r\n{headers}\r\n");
    client.stream.get_mut().write_all(request.as_bytes()).unwrap();
    client.response(false).unwrap()
}

/// Returns the worker that serves a stream, if the response head names it.
fn worker_of(source: &Source) -> Option<i32> {
    source.head.lines().find_map(|line| line.strip_prefix("x-worker: "))?.parse().ok()
}

#[test]
fn an_event_from_any_worker_reaches_the_subscribers_of_all_workers() {
    let mut site = Site::start(&["--workers", "3"]);
    let (mut sources, mut workers) = (Vec::new(), BTreeSet::new());
    while workers.len() < 3 || sources.len() < 24 {
        let way = WAYS[sources.len() % 4];
        let source = site.open(way, "/events?topics=news,sport", "");
        workers.extend(worker_of(&source));
        sources.push((way, source));
        assert!(sources.len() < 400, "all streams are served by {workers:?}");
    }
    let mut expected = Vec::new();
    for round in 1..=20_u64 {
        assert_eq!(site.publish_as("news", "headline", &format!("round {round}\nof 20")), round);
        expected.push(("headline", format!("round {round}\nof 20"), format!("{round}.{}", round - 1)));
        assert_eq!(site.publish("sport", "goal"), round);
        expected.push(("", "goal".to_owned(), format!("{round}.{round}")));
        site.publish("weather", "nobody asked");
    }
    for (way, source) in &mut sources {
        let (mut news, mut sport) = (Vec::new(), 0);
        for _ in 0..40 {
            let event = source.next();
            // Events are ordered within a topic, but not across topics.
            if event.data == "goal" {
                sport += 1
            } else {
                news.push(event.data.clone())
            }
            let (_, ids) = event.id.split_once('-').unwrap();
            assert_eq!(ids, format!("{}.{sport}", news.len()), "{way:?}");
        }
        let of_news: Vec<_> = expected.iter().filter(|(name, ..)| !name.is_empty()).map(|(_, data, _)| data).collect();
        assert_eq!(news.iter().collect::<Vec<_>>(), of_news, "{way:?}");
    }
    for (way, source) in &sources {
        if *way != Way::Http2 {
            for header in [
                "content-type: text/event-stream\n",
                "cache-control: no-cache, no-transform\n",
                "x-accel-buffering: no\n",
            ] {
                assert!(source.head.contains(header), "{way:?}: no {header:?} in {:?}", source.head);
            }
        }
        assert!((1000..=3000).contains(&source.retries[0]), "{way:?}");
    }
    drop(sources);
    site.0.stop();
}

/// The client of a killed worker resumes with another worker, and over a different protocol each time.
#[test]
fn no_event_is_lost_or_duplicated_over_a_hundred_worker_deaths() {
    const DEATHS: usize = 100;
    let mut site = Site::start(&["--workers", "2", "--quarantine", "0", "--respawn-rate", "1000"]);
    let log = site.0.segment().events();
    let (published, over) = (AtomicU64::new(0), AtomicBool::new(false));
    std::thread::scope(|scope| {
        // Publishing continues until the last stream has been read, so each client always receives its next event.
        let _publisher_ends = StopOnDrop(&over);
        scope.spawn(|| {
            while !over.load(Ordering::SeqCst) {
                let number = published.load(Ordering::SeqCst) + 1;
                match log.publish("news", "", format!("event {number}").as_bytes()) {
                    Ok(id) => assert_eq!(id, number),
                    Err(error) => panic!("{error:?}"),
                }
                published.store(number, Ordering::SeqCst);
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        let (mut last_id, mut next) = (String::new(), None);
        let mut take = |event: Event| {
            let number = event.number();
            assert_eq!(event.data, format!("event {number}"));
            assert_eq!(*next.get_or_insert(number), number, "lost or duplicated");
            next = Some(number + 1);
            number
        };
        for death in 0..DEATHS {
            let way = WAYS[death % 4];
            let mut source = wait_until("a worker answers", || {
                Source::open(way, site.bind(way), "/events?topics=news", &last_id).ok()
            });
            for _ in 0..3 {
                take(source.next());
            }
            // Over HTTP/2 the client does not parse the header that names the worker.
            let workers = worker_of(&source).map_or_else(|| site.0.workers(), |worker| BTreeSet::from([worker]));
            for worker in workers {
                let _ = kill(Pid::from_raw(worker), Signal::SIGKILL);
            }
            // Each event that was sent is complete, and the stream of a killed worker never ends in the way that a complete stream ends.
            let killed = Instant::now();
            loop {
                assert!(killed.elapsed() < PATIENCE, "{way:?}: the stream of a dead worker continues");
                match source.event() {
                    Ok(Some(event)) => drop(take(event)),
                    Ok(None) => panic!("{way:?}: the stream of a killed worker ended like a complete stream"),
                    Err(_) => break,
                }
            }
            last_id.clone_from(&source.last_id);
        }
        let mut source = wait_until("a worker answers", || {
            Source::open(Way::Http, site.bind(Way::Http), "/events?topics=news", &last_id).ok()
        });
        let until_now = published.load(Ordering::SeqCst);
        while take(source.next()) < until_now {}
    });
    assert!(published.load(Ordering::SeqCst) >= 300);
    site.0.stop();
}

#[test]
fn a_client_that_reconnects_too_late_receives_the_number_of_missed_events() {
    let mut site = Site::start(&["--workers", "1", "--events", "64K"]);
    for way in WAYS {
        let topic = format!("t{}", site.bind(way).len() + way as usize);
        let target = format!("/events?topics={topic}");
        let mut source = site.open(way, &target, "");
        let first = site.publish(&topic, "first");
        assert_eq!(source.next().number(), first);
        let id = source.last_id.clone();
        drop(source);
        let last = site.flood(&topic, 500, 1000);
        let mut source = site.open(way, &target, &id);
        let gap = source.next();
        assert_eq!(gap.name, "gap", "{way:?} {gap:?}");
        let (missed, of) = gap.data.split_once(' ').unwrap();
        assert_eq!(of, topic);
        let missed: u64 = missed.parse().unwrap();
        assert_eq!(gap.number(), first + missed);
        let mut expected = first + missed + 1;
        assert!(last - expected > 20, "the log contains the last events: {expected} to {last}");
        loop {
            let event = source.next();
            assert_eq!(event.number(), expected, "{way:?}");
            expected += 1;
            if event.number() == last {
                break;
            }
        }
        // The id of a different epoch (a different event log), an id that the server never issued, an id after the last event, and an id
        // with the wrong number of topics.
        let epoch = id.split_once('-').unwrap().0;
        for id in ["00000000-1", "what%20is%20this", &format!("{epoch}-999999999"), &format!("{epoch}-1.1")] {
            let mut source = site.open(way, &target, id);
            let gap = source.next();
            assert_eq!((gap.name.as_str(), &gap.data), ("gap", &format!("? {topic}")), "{way:?} {id}");
            assert_eq!(gap.number(), expected - 1, "{way:?} {id}");
            site.publish(&topic, "on");
            assert_eq!(source.next().number(), expected, "{way:?} {id}");
            expected += 1;
        }
    }
    site.0.stop();
}

#[test]
fn a_poll_returns_the_available_events_or_waits_for_one() {
    let mut site = Site::start(&["--workers", "1"]);
    let last_id = |response: &Response| {
        let text = response.text();
        text.lines().filter_map(|line| line.strip_prefix("id: ")).next_back().unwrap().to_owned()
    };
    let address = site.0.http();
    let nothing = poll(&address, "/events?topics=news&poll_ms=300", "Accept: */*\r\n");
    assert_eq!((nothing.status, nothing.header("content-type")), (200, Some("text/event-stream")));
    let id = last_id(&nothing);
    assert_eq!(nothing.text(), format!("id: {id}\n\n"), "the poll timed out without an event");
    site.publish("news", "one");
    site.publish_as("news", "flash", "two");
    let epoch = id.split_once('-').unwrap().0.to_owned();
    let expected = format!("id: {epoch}-1\ndata: one\n\nid: {epoch}-2\nevent: flash\ndata: two\n\n");
    for headers in [
        format!("X-Event-Source-Simulate: Long-Polling\r\nAccept: text/event-stream\r\nLast-Event-ID: {id}\r\n"),
        format!("Accept: application/json\r\nLast-Event-ID: {id}\r\n"),
    ] {
        let at_once = poll(&address, "/events?topics=news", &headers);
        assert_eq!(at_once.text(), expected);
        assert_eq!(at_once.header("content-length"), Some(expected.len().to_string().as_str()));
        assert_eq!(last_id(&at_once), format!("{epoch}-2"));
    }
    for parameter in ["lastEventId", "last-event-id"] {
        let at_once = poll(&address, &format!("/events?topics=news&{parameter}={id}"), "Accept: */*\r\n");
        assert_eq!(at_once.text(), expected, "{parameter}");
    }
    let encoded = id.replace('-', "%2D");
    for query in [format!("lastEventId={encoded}"), format!("last%2devent%2Did={encoded}")] {
        let at_once = poll(&address, &format!("/events?topics=news&{query}"), "Accept: */*\r\n");
        assert_eq!(at_once.text(), expected, "{query}: the same, percent-encoded (RFC 3986, section 6.2.2.2)");
    }
    let at_once = poll(&address, &format!("/events?topics=news&lastEventId={id}"), "Accept: */*\r\nLast-Event-ID:\r\n");
    assert_eq!(at_once.text(), expected, "an invalid header is ignored");
    let nonsense = poll(&address, "/events?topics=news", "Accept: */*\r\nLast-Event-ID: \u{e9}\r\n");
    assert_eq!(nonsense.text(), format!("id: {epoch}-2\nevent: gap\ndata: ? news\n\n"));
    std::thread::scope(|scope| {
        let waiting = scope
            .spawn(|| poll(&address, "/events?topics=news", &format!("Accept: */*\r\nLast-Event-ID: {epoch}-2\r\n")));
        site.wait_for_subscribers(1, "the poll is waiting");
        site.publish("news", "three");
        assert_eq!(waiting.join().unwrap().text(), format!("id: {epoch}-3\ndata: three\n\n"));
    });
    site.wait_for_subscribers(0, "no poll is waiting");
    site.0.stop();
}

#[test]
fn an_application_can_filter_the_events_for_a_client() {
    let mut site = Site::start(&["--workers", "1"]);
    for way in WAYS {
        let topic = format!("t{}", way as usize);
        let mut even = site.open(way, &format!("/events?topics={topic}&only=even&keep_alive_ms=50"), "");
        let mut shouts = site.open(way, &format!("/events?topics={topic}&only=shouts"), "");
        for text in ["one", "two!", "three!", "four"] {
            site.publish(&topic, text);
        }
        assert_eq!((even.next().data.as_str(), even.next().data.as_str()), ("two!", "four"), "{way:?}");
        let shout = shouts.next();
        assert_eq!((shout.number(), shout.name.as_str(), shout.data.as_str()), (2, "shout", "TWO!"), "{way:?}");
        assert_eq!((shouts.next().data.as_str(), way), ("THREE!", way));
        // The client also receives the ids of events that its filter skips, so that the server need not scan those events again after a
        // reconnect.
        site.publish(&topic, "five");
        while !even.last_id.ends_with("-5") {
            assert!(even.block().unwrap(), "{way:?}");
        }
        let comments = even.comments;
        while even.comments == comments {
            assert!(even.block().unwrap(), "{way:?}");
        }
    }
    site.0.stop();
}

#[test]
fn a_disconnect_is_detected_immediately() {
    let mut site = Site::start(&["--workers", "1"]);
    for way in WAYS {
        for count in 1..=5 {
            // The end cannot be detected by a keep-alive comment, because the first comment would be sent long after the test has ended.
            let target = "/events?topics=quiet&keep_alive_ms=3600000";
            let sources: Vec<_> = (0..count).map(|_| site.open(way, target, "")).collect();
            site.wait_for_subscribers(count, "the subscribers are counted");
            drop(sources);
            site.wait_for_subscribers(0, &format!("{way:?}: the disconnected subscribers are no longer counted"));
        }
    }
    // Over FastCGI a single request can be aborted while the connection stays open.
    let mut client = fastcgi::Client::connect(site.bind(Way::FastCgi)).unwrap();
    client.send(&fastcgi::request(1, true, "GET", "/events?topics=quiet", b"")).unwrap();
    site.wait_for_subscribers(1, "the subscriber is counted");
    client.send(&[fastcgi::record(fastcgi::ABORT, 1, b"", 0)]).unwrap();
    site.wait_for_subscribers(0, "the aborted subscriber is no longer counted");
    site.0.stop();
}

#[test]
fn a_reload_does_not_wait_for_streams_and_loses_no_event() {
    let mut site = Site::start(&["--workers", "2", "--drain-timeout", "1h"]);
    let target = "/events?topics=news";
    let mut sources: Vec<_> =
        WAYS.iter().flat_map(|&way| [way; 3]).map(|way| (way, site.open(way, target, ""))).collect();
    for (way, source) in &mut sources {
        site.publish("news", "before");
        assert_eq!(source.next().data, "before", "{way:?}");
    }
    site.0.signal(Signal::SIGHUP);
    // Read all streams concurrently, because an HTTP/2 connection closes only after its client has answered a PING.
    let read_to_end = |(way, mut source): (Way, Source)| {
        let mut next = position(&source.last_id);
        while let Some(event) =
            source.event().unwrap_or_else(|error| panic!("{way:?}: the stream is incomplete: {error}"))
        {
            next += 1;
            assert_eq!(event.number(), next);
        }
        let retry = *source.retries.last().unwrap();
        assert!(source.retries.len() == 2 && (100..=2000).contains(&retry), "{way:?}: {:?}", source.retries);
        (way, source.last_id)
    };
    let reading: Vec<_> = sources.into_iter().map(|source| std::thread::spawn(move || read_to_end(source))).collect();
    for _ in 0..50 {
        site.publish("news", "meanwhile");
    }
    let ended: Vec<_> = reading.into_iter().map(|thread| thread.join().unwrap()).collect();
    // The reload finishes long before the drain timeout.
    site.0.wait_for("reload done gen=2");
    let last = site.publish("news", "after");
    for (way, last_id) in ended {
        let mut again = site.open(way, target, &last_id);
        for number in position(&last_id) + 1..=last {
            assert_eq!(again.next().number(), number, "{way:?}");
        }
    }
    site.0.stop();
}

/// Returns the number in the event id of a stream with one topic.
fn position(id: &str) -> u64 {
    id.split_once('-').unwrap().1.parse().unwrap()
}

#[test]
fn a_stop_ends_all_streams() {
    let mut site = Site::start(&["--workers", "1", "--drain-timeout", "1h"]);
    let sources = WAYS.map(|way| (way, site.open(way, "/events?topics=news", "")));
    let waiting = raw::connect(site.bind(Way::Http));
    (&waiting).write_all(b"GET /events?topics=news HTTP/1.1\r\nHost: a\r\nAccept: */*\r\n\r\n").unwrap();
    site.wait_for_subscribers(5, "all subscribers are counted");
    site.0.signal(Signal::SIGTERM);
    for (way, mut source) in sources {
        let end = source.event().unwrap_or_else(|error| panic!("{way:?}: {error}"));
        assert!(end.is_none(), "{way:?}");
    }
    let mut rest = String::new();
    (&waiting).read_to_string(&mut rest).unwrap();
    assert!(rest.contains("\r\n\r\n") && rest.contains("id: ") && rest.ends_with("0\r\n\r\n"), "{rest:?}");
    assert_eq!(site.0.wait_end(), Some(0), "the master does not wait for the streams");
}

/// A client that does not read uses only the buffers of the kernel and of the protocol, and is disconnected. Other clients are not
/// affected.
#[test]
fn a_client_that_does_not_read_uses_bounded_memory_and_is_disconnected() {
    const CLIENTS: usize = 20;
    for way in WAYS {
        let arguments = ["--workers", "1", "--write-timeout", "2s", "--log-level", "debug,hyper=info,h2=info"];
        let mut site = Site::start(&arguments);
        let worker = *site.0.workers().first().unwrap();
        let mut quick = site.open(Way::FastCgi, "/events?topics=flood", "");
        let slow: Vec<_> = (0..CLIENTS).map(|_| site.open(way, "/events?topics=flood", "")).collect();
        site.wait_for_subscribers(1 + CLIENTS, "all subscribers are counted");
        let before = status_number(worker, "VmRSS").unwrap();
        let (mut last, mut most) = (0, before);
        let begun = Instant::now();
        let reader = std::thread::spawn(move || {
            let mut seen = 0;
            loop {
                let event = quick.next();
                seen += 1;
                if event.data == "the end" {
                    return seen;
                }
            }
        });
        // Up to 20 MiB for each client, until all clients that do not read are disconnected. On a busy machine, less is sent.
        while site.subscribers() > 1 {
            last = last.max(site.flood("flood", 100, 10_000));
            most = most.max(status_number(worker, "VmRSS").unwrap());
            assert!(begun.elapsed() < PATIENCE, "{way:?}: the clients were never disconnected");
        }
        site.wait_for_subscribers(1, "the client that reads stays connected");
        site.publish("flood", "the end");
        let seen = reader.join().unwrap();
        eprintln!(
            "{way:?}: {last} events of 10 kB, {seen} read by the reading client, memory grew by {} KiB",
            most - before
        );
        // 400 KiB for each client, for the buffers of the protocols: hyper uses 128 KiB and one chunk, h2 64 KiB, FastCGI and SCGI 64 KiB
        // and a batch.
        assert!(most - before < 400 * CLIENTS as u64 + 4096, "{way:?}: {} KiB", most - before);
        assert!(last * 10 > 10 * 400, "{way:?}: too little was published to exceed the buffers");
        wait_until("each disconnect is logged", || {
            (site.0.log().matches("cut off a connection: the client read a response too slowly").count() == CLIENTS)
                .then_some(())
        });
        drop(slow);
        site.0.stop();
    }
}

#[test]
fn subscribers_beyond_the_limit_or_without_an_event_log_get_503() {
    let mut site = Site::start(&["--workers", "1", "--max-subscribers", "2"]);
    let first = site.open(Way::Http, "/events?topics=a", "");
    let second = site.open(Way::Scgi, "/events?topics=a", "");
    let refused = poll(&site.0.http(), "/events?topics=a", "Accept: text/event-stream\r\n");
    assert_eq!((refused.status, refused.header("retry-after")), (503, Some("5")));
    site.0.wait_for("refused a subscriber: this worker already has 2 subscribers");
    drop(first);
    site.wait_for_subscribers(1, "one subscriber has left");
    drop(site.open(Way::Http, "/events?topics=a", ""));
    drop(second);
    for topics in ["", "a,a", "%0a", &"x".repeat(129), &(0..33).map(|n| n.to_string()).collect::<Vec<_>>().join(",")] {
        let refused = poll(&site.0.http(), &format!("/events?topics={topics}"), "Accept: text/event-stream\r\n");
        assert_eq!((refused.status, refused.header("retry-after")), (503, None), "{topics}");
    }
    site.0.stop();

    let mut tiny =
        Server::launch(Command::new(program("stream")).args(["--bind", "http:127.0.0.1:0", "--events", "1"]));
    tiny.wait_for("with --events)");
    assert_eq!(tiny.wait_end(), Some(1));

    let mut site = Site::start(&["--workers", "1", "--events", "0"]);
    let refused = poll(&site.0.http(), "/events?topics=a", "Accept: text/event-stream\r\n");
    assert_eq!(refused.status, 503);
    site.0.wait_for("there is no event log (--events gives it a size)");
    let refused = http::post(&site.0.http(), "/publish/a", b"x").unwrap();
    assert_eq!(
        (refused.status, refused.text().as_str()),
        (400, "event not published: there is no event log (--events gives it a size)\n")
    );
    site.0.stop();
}

#[test]
fn invalid_events_are_rejected_with_a_reason() {
    let mut site = Site::start(&["--workers", "1", "--events", "64K"]);
    for (target, data, why) in [
        ("/publish/a?name=two%0alines", &b"x"[..], "cannot be the name of an event (it contains control characters)"),
        (
            "/publish/a?name=gap",
            b"x",
            "\"gap\" cannot be the name of an event (it is reserved for notices of missed events)",
        ),
        ("/publish/two%0alines", b"x", "a topic has 1 to 128 bytes"),
        ("/publish/a", &[b'x'; 64 << 10], "--events sets the size of the log"),
    ] {
        let refused = http::post(&site.0.http(), target, data).unwrap();
        assert!(refused.status == 400 && refused.text().contains(why), "{target}: {}", refused.text());
    }
    site.0.stop();
}
