//! Event streams in gateways: `--sse`, and the header with which an application hands its client over. Events are
//! published from PHP, through the publish socket.

#![allow(clippy::unwrap_used, reason = "test code outside of test functions")]

mod common;

use std::collections::BTreeSet;
use std::io::Write as _;
use std::process::Command;

use common::gateway::{Place, Site};
use common::http::{Client, Response, get};
use common::limit::InTime as _;
use common::sse::{Event, Source, WAYS, Way};
use common::{Server, is_gone, program, wait_until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const PHP: &str = include_str!("programs/events.php");
const NODE: &str = include_str!("programs/events.js");
const SSE: [&str; 2] = ["--sse", "/rooms/{room}=room-{room}"];
const PROTOCOLS: [&str; 6] =
    ["--bind", "http:127.0.0.1:0", "--bind", "fastcgi:127.0.0.1:0", "--bind", "scgi:127.0.0.1:0"];

/// Starts a server whose app processes run `tests/programs/events.php`.
fn php(options: &[&str]) -> Site {
    let place = Place::new();
    std::fs::write(place.path("index.php"), PHP).unwrap();
    let root = place.text("");
    let options = [&SSE, options, &["--events", "1M", "--root", &root, "--index", "index.php"]].concat();
    let mut command = place.run(&options, &["php-cgi", "-n"]);
    place.start(&mut command)
}

/// Starts a server whose app processes run `tests/programs/events.js`.
fn node(options: &[&str]) -> Site {
    let place = Place::new();
    std::fs::write(place.path("events.js"), NODE).unwrap();
    let script = place.text("events.js");
    let options = [options, &["--backend", "http", "--events", "1M"]].concat();
    let mut command = place.run(&options, &["node", &script]);
    place.start(&mut command)
}

fn bind(site: &Site, way: Way) -> &str {
    let binds = &site.server.binds;
    match way {
        Way::Http | Way::Http2 => &binds[0],
        Way::FastCgi => &binds[1],
        Way::Scgi => &binds[2],
    }
}

fn open(site: &Site, way: Way, target: &str, last_id: &str) -> Source {
    Source::open(way, bind(site, way), target, last_id).unwrap_or_else(|error| panic!("{way:?} {target}: {error}"))
}

/// Publishes an event from PHP.
fn publish(site: &Site, topic: &str, data: &str) {
    let said = site.post(&format!("/publish?topic={topic}"), data.as_bytes());
    assert_eq!(said.text(), "published\n", "{said:?}");
}

/// Reads this number of events.
fn read(source: &mut Source, count: usize) -> Vec<String> {
    (0..count).map(|_| source.next().data).collect()
}

/// Sends a GET with these header lines, and returns the whole response.
fn get_with(address: &str, target: &str, headers: &str) -> Response {
    let mut client = Client::connect(address).unwrap();
    write!(client.stream.get_mut(), "GET {target} HTTP/1.1\r\nHost: localhost\r\n{headers}\r\n").unwrap();
    client.response(false).unwrap()
}

fn sigkill(pids: &BTreeSet<i32>) {
    for &pid in pids {
        kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
    }
}

// ---- subscribing and publishing ----

#[test]
fn an_event_published_by_php_reaches_the_subscribers_of_a_path_over_every_protocol() {
    let mut site = php(&PROTOCOLS);
    let mut sources = WAYS.map(|way| (way, open(&site, way, "/rooms/1", "")));
    let mut other = open(&site, Way::Http, "/rooms/2", "");
    publish(&site, "room-1", "one\ntwo");
    publish(&site, "room-2", "elsewhere");
    for (way, source) in &mut sources {
        let Event { id, name, data } = source.next();
        assert_eq!((name.as_str(), data.as_str()), ("from-php", "one\ntwo"), "{way:?}");
        assert!(id.ends_with("-1"), "{way:?}: {id}");
        if *way != Way::Http2 {
            for header in ["content-type: text/event-stream\n", "cache-control: no-cache, no-transform\n"] {
                assert!(source.head.contains(header), "{way:?}: no {header:?} in {}", source.head);
            }
        }
    }
    assert_eq!(other.next().data, "elsewhere");
    drop((sources, other));
    site.at_rest();
    site.server.stop();
    assert!(!site.server.log().contains("ERROR"), "{}", site.server.log());
}

#[test]
fn an_application_hands_its_client_over_and_keeps_its_own_headers() {
    let site = php(&[]);
    let mut source = open(&site, Way::Http, "/subscribe?topic=a%2C%20b", "");
    for header in [
        "content-type: text/event-stream\n",
        "cache-control: no-store, no-transform\n",
        "set-cookie: visitor=7\n",
        "x-own: kept\n",
        "x-accel-buffering: no\n",
    ] {
        assert_eq!(source.head.matches(header).count(), 1, "{header:?} in {}", source.head);
    }
    for name in ["x-forkyard", "max-age", "text/html", "content-length"] {
        assert!(!source.head.contains(name), "{name:?} in {}", source.head);
    }
    publish(&site, "a", "of a");
    publish(&site, "b", "of b");
    let mut received = read(&mut source, 2);
    received.sort();
    assert_eq!(received, ["of a", "of b"]);
    assert!(source.last_id.ends_with("-1.1"), "{}", source.last_id);
    let mut two = open(&site, Way::Http2, "/two-lines", "");
    publish(&site, "b", "again");
    assert_eq!(two.next().data, "again");
}

#[test]
fn an_http_application_hands_its_clients_over_over_every_protocol() {
    let site = node(&PROTOCOLS);
    let target = "/subscribe?topic=gr%C3%BC%C3%9Fe,x";
    let mut sources = WAYS.map(|way| (way, open(&site, way, target, "")));
    let said = site.control(&["events", "publish", "gr\u{fc}\u{df}e,x", "hello"]);
    assert!(said.status.success(), "{said:?}");
    for (way, source) in &mut sources {
        assert_eq!(source.next().data, "hello", "{way:?}");
        let cookies = source.head.matches("set-cookie: ").count();
        assert!(*way == Way::Http2 || cookies == 2, "{way:?}: {}", source.head);
        assert!(!source.head.contains("x-forkyard"), "{way:?}: {}", source.head);
    }
}

#[test]
fn a_client_resumes_after_its_last_event() {
    let site = php(&[]);
    for target in ["/rooms/1", "/subscribe?topic=room-1"] {
        let mut source = open(&site, Way::Http, target, "");
        publish(&site, "room-1", "first");
        assert_eq!(source.next().data, "first", "{target}");
        let id = source.last_id.clone();
        drop(source);
        for data in ["second", "third"] {
            publish(&site, "room-1", data);
        }
        assert_eq!(read(&mut open(&site, Way::Http, target, &id), 2), ["second", "third"], "{target}");
        let separator = if target.contains('?') { '&' } else { '?' };
        let by_query = format!("{target}{separator}lastEventId={id}");
        assert_eq!(read(&mut open(&site, Way::Http, &by_query, ""), 2), ["second", "third"], "{target}");
        // Long polling: one response with all events.
        let response = get_with(&site.server.http(), target, &format!("Accept: */*\r\nLast-Event-ID: {id}\r\n"));
        let text = response.text();
        assert_eq!(response.header("content-length"), Some(text.len().to_string().as_str()), "{response:?}");
        assert!(text.contains("data: second\n") && text.contains("data: third\n"), "{target}: {text}");
    }
}

// ---- processes ----

#[test]
fn an_app_process_serves_requests_while_many_of_its_clients_are_subscribed() {
    let site = php(&["--workers", "1"]);
    let mut sources: Vec<Source> =
        (0..20).map(|number| open(&site, [Way::Http, Way::Http2][number % 2], "/subscribe?topic=a", "")).collect();
    site.at_rest();
    assert_eq!(site.get("/pid").status, 200);
    publish(&site, "a", "to all");
    for source in &mut sources {
        assert_eq!(source.next().data, "to all");
    }
    let connections: u64 =
        site.status()["gateways"].as_array().unwrap().iter().map(|one| one["connections"].as_u64().unwrap()).sum();
    assert!(connections >= 20, "{}", site.status());
}

#[test]
fn what_an_application_sends_after_the_handover_is_discarded() {
    let site = php(&["--workers", "1"]);
    let mut source = open(&site, Way::Http, "/works-on", "");
    assert_eq!(site.status()["workers"][0]["in_flight"], 1, "the script continues to run");
    let said = site.control(&["events", "publish", "a", "meanwhile"]);
    assert!(said.status.success(), "{said:?}");
    assert_eq!(source.next().data, "meanwhile");
    std::fs::write(site.path("go"), "").unwrap();
    site.at_rest();
    publish(&site, "a", "afterwards");
    assert_eq!(source.next().data, "afterwards");
    // A connection over HTTP is closed instead, because the process serves other requests meanwhile.
    let site = node(&["--workers", "1"]);
    let source = open(&site, Way::Http, "/endless", "");
    wait_until("the process is notified", || (site.get("/closed").text() == "1").then_some(()));
    site.at_rest();
    drop(source);
}

#[test]
fn the_clients_of_a_killed_gateway_lose_no_event() {
    let site = php(&[]);
    let targets = ["/rooms/1", "/subscribe?topic=room-1"];
    let mut ids = targets.map(|target| (target, open(&site, Way::Http, target, "").last_id));
    for round in 0..5 {
        let mut sources = ids.clone().map(|(target, id)| {
            wait_until("a gateway answers", || Source::open(Way::Http, &site.server.binds[0], target, &id).ok())
        });
        publish(&site, "room-1", &format!("{round}"));
        for source in &mut sources {
            // The first event was published while no gateway served the client.
            let expected: &[String] =
                &if round == 0 { vec!["0".into()] } else { vec![format!("late {}", round - 1), round.to_string()] };
            assert_eq!(read(source, expected.len()), expected);
        }
        let gateways = site.gateways();
        sigkill(&gateways);
        for (source, (_, id)) in sources.iter_mut().zip(&mut ids) {
            assert!(source.event().is_err(), "the stream of a dead gateway does not end like a complete one");
            id.clone_from(&source.last_id);
        }
        wait_until("the gateways are replaced", || {
            (site.gateways().len() == 2 && gateways.iter().all(|&pid| is_gone(pid))).then_some(())
        });
        publish(&site, "room-1", &format!("late {round}"));
    }
}

#[test]
fn a_reload_ends_the_streams_and_the_clients_resume() {
    let site = php(&["--drain-timeout", "60s"]);
    let targets = ["/rooms/1", "/subscribe?topic=room-1"];
    let mut sources = targets.map(|target| open(&site, Way::Http, target, ""));
    let before = site.processes();
    publish(&site, "room-1", "before");
    let said = site.control(&["reload"]);
    assert!(said.status.success(), "{said:?}");
    publish(&site, "room-1", "after");
    for (source, target) in sources.iter_mut().zip(targets) {
        // An old gateway may have delivered the second event too, before it drained.
        let mut received = Vec::new();
        while let Some(event) = source.event().unwrap_or_else(|error| panic!("{target} ends properly: {error}")) {
            received.push(event.data);
        }
        let retry = *source.retries.last().unwrap();
        assert!((100..=2000).contains(&retry), "{target}: {retry}");
        let rest = read(&mut open(&site, Way::Http, target, &source.last_id), 2 - received.len());
        assert_eq!([received, rest].concat(), ["before", "after"], "{target}");
    }
    wait_until("all processes are replaced", || before.iter().all(|&pid| is_gone(pid)).then_some(()));
}

// ---- refusals ----

#[test]
fn the_header_is_an_error_in_any_other_response_and_never_reaches_the_client() {
    let mut site = php(&[]);
    let address = site.server.http();
    let long = format!("/subscribe?topic={}", "x".repeat(129));
    let ask = |method: &str, target: &str| Client::connect(&address).unwrap().request(method, target, b"").unwrap();
    for (method, target, status, reason) in [
        ("POST", "/subscribe?topic=a", 502, "X-Forkyard-Subscribe in a 200 response to POST"),
        ("GET", "/not-found", 502, "X-Forkyard-Subscribe in a 404 response to GET"),
        ("GET", "/subscribe?topic=", 502, r#"X-Forkyard-Subscribe: "" is not a topic"#),
        ("GET", "/subscribe?topic=a,", 502, r#"X-Forkyard-Subscribe: "" is not a topic"#),
        ("GET", "/subscribe?topic=a,a", 502, r#"the topic "a" is given twice"#),
        ("GET", "/subscribe?topic=%25ff", 502, "is not a topic (expected 1 to 128 bytes"),
        ("GET", "/subscribe?topic=%25zz", 502, "is not a topic"),
        ("GET", &long, 502, "is not a topic"),
        ("HEAD", "/subscribe?topic=a", 200, ""),
        ("GET", "/pid", 200, ""),
    ] {
        let before = site.server.log().len();
        let response = ask(method, target);
        assert_eq!(response.status, status, "{method} {target}: {response:?}");
        assert_eq!(response.header("x-forkyard-subscribe"), None, "{method} {target}");
        assert!(method != "HEAD" || response.header("content-type") == Some("text/event-stream"), "{response:?}");
        if status == 502 {
            assert_eq!(response.header("set-cookie"), None, "{method} {target}: nothing of the response is sent");
            let text = wait_until("the reason is logged", || {
                let log = site.server.log()[before..].to_owned();
                log.contains("answered 502").then_some(log)
            });
            assert!(text.contains(reason), "{method} {target}: {text}");
        }
    }
    site.at_rest();
    site.server.stop();
}

#[test]
fn a_path_of_a_stream_is_served_by_the_gateway_only() {
    let site = php(&["--max-subscribers", "1", "--gateways", "1"]);
    let address = site.server.http();
    let ask = |method: &str, target: &str| Client::connect(&address).unwrap().request(method, target, b"").unwrap();
    for method in ["POST", "PUT", "DELETE", "OPTIONS"] {
        let response = ask(method, "/rooms/1");
        assert_eq!((response.status, response.header("allow")), (405, Some("GET, HEAD")), "{method}");
    }
    assert_eq!(ask("GET", "/rooms/%0a").status, 404);
    assert_eq!(ask("GET", "/rooms/%0a").text(), "404 Not Found\n", "the application does not see the request");
    assert_eq!(ask("GET", "/rooms/1/2").text(), "no such page\n", "the application sees the request");
    assert_eq!(ask("HEAD", "/rooms/1").header("content-type"), Some("text/event-stream"));
    let source = open(&site, Way::Http, "/rooms/1", "");
    for target in ["/rooms/1", "/subscribe?topic=a"] {
        let response = get(&address, target).unwrap();
        assert_eq!((response.status, response.header("retry-after")), (503, Some("5")), "{target}");
    }
    drop(source);
    wait_until("the subscription has ended", || Source::open(Way::Http, &site.server.binds[0], "/rooms/1", "").ok());
    let served: u64 =
        site.status()["workers"].as_array().unwrap().iter().map(|app| app["requests"].as_u64().unwrap()).sum();
    assert_eq!(served, 2, "/rooms/1/2 and /subscribe");
}

#[test]
fn without_an_event_log_the_header_is_an_error_that_names_the_flag() {
    let place = Place::new();
    std::fs::write(place.path("index.php"), PHP).unwrap();
    let root = place.text("");
    let mut command = place.run(&["--root", &root, "--index", "index.php"], &["php-cgi", "-n"]);
    let site = place.start(&mut command);
    assert_eq!(site.get("/subscribe?topic=a").status, 502);
    let line = site.server.logged("answered 502");
    assert!(line.contains("there is no event log (--events gives it a size)"), "{line}");
}

#[test]
fn a_configuration_file_lists_the_streams_and_a_reload_changes_them() {
    let place = Place::new();
    std::fs::write(place.path("index.php"), PHP).unwrap();
    let file = place.path("forkyard.toml");
    let write = |sse: &str| {
        let root = place.text("");
        let text = format!("root = '{root}'\nindex = 'index.php'\nsse = [{sse}]\ncommand = ['php-cgi', '-n']\n");
        std::fs::write(&file, text).unwrap();
    };
    write("'/a=a'");
    let config = file.to_string_lossy().into_owned();
    let mut command = place.run(&["--config", &config], &[]);
    let server = Server::start_command(&mut command);
    let address = server.http();
    // --sse alone creates an event log. An invalid id is answered with a gap at once.
    let poll = |target: &str| get_with(&address, target, "Accept: */*\r\nLast-Event-ID: x\r\n").text();
    assert!(poll("/a").contains("event: gap\n"));
    assert_eq!(get(&address, "/b/1").unwrap().text(), "no such page\n");
    write("'/a=a', '/b/{name}=b-{name}'");
    let mut reload = Command::new(program("forkyard"));
    let said = reload.args(["reload", "--control"]).arg(place.path("control")).output_in_time().unwrap();
    assert!(said.status.success(), "{said:?}");
    // A gateway that drains may still answer a connection that it has accepted.
    wait_until("the new path is served", || poll("/b/1").contains("event: gap\ndata: ? b-1\n").then_some(()));
}

#[test]
fn wrong_streams_are_errors_of_the_check() {
    let check = |options: &[&str]| {
        let mut command = Command::new(program("forkyard"));
        command.args(["check", "--bind", "http:127.0.0.1:0"]).args(options).args(["--", "php-cgi"]);
        let output = command.output_in_time().unwrap();
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    for (options, words) in [
        (&["--sse", "rooms=a"][..], "--sse: 'rooms=a' is not an event stream (expected PATH=TOPIC[,TOPIC]"),
        (&["--sse", "/a/{x}=b-{y}"], "'{y}', which is not in the path"),
        (&["--sse", "/a="], "cannot be a topic"),
        (&["--sse", "/a=b", "--sse", "/a=c"], "--sse: '/a' and '/a' are the same path"),
        (&["--sse", "/a=b", "--events", "0"], "--sse requires the event log, which --events 0 disables"),
    ] {
        let (status, text) = check(options);
        assert_eq!(status, Some(1), "{options:?}: {text}");
        assert!(text.contains(words), "{options:?}: {text}");
    }
    let (status, text) = check(&["--sse", "/a=b", "--max-subscribers", "7"]);
    assert_eq!(status, Some(0), "{text}");
    let (_, text) = check(&["--sse", "/a=b", "--direct"]);
    assert!(text.contains("--sse is not available here: with --direct, "), "{text}");
}
