//! Runs `forkyard-load events` against event servers with one fault each, and checks that each fault is counted as the right
//! kind.

#[path = "../../../tests/common/limit.rs"]
mod limit;

use limit::InTime as _;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::Shutdown;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::thread;

const SUBSCRIBERS: u64 = 3;
const EVENTS: u64 = 20;

/// The server's fault, with event 3 or in general.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Does {
    Well,
    /// Closes the publisher's connection after each response, and announces the close.
    ClosesPublisher,
    Loses,
    Doubles,
    /// Sends event 3 after event 4.
    Delays,
    CutsStreams,
    /// Sends data that is not an event of this program.
    SendsOther,
    RefusesSubscribers,
    RefusesEvents,
}

struct Server {
    does: Does,
    streams: Mutex<Vec<UnixStream>>,
    delayed: Mutex<String>,
}

impl Server {
    fn start(name: &str, does: Does) -> String {
        let name = format!("forkyard-load-test-{}-events-{name}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name).expect("the name is short");
        let listener = UnixListener::bind_addr(&address).expect("the name is unique");
        let server = Arc::new(Self { does, streams: Mutex::default(), delayed: Mutex::default() });
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let server = Arc::clone(&server);
                thread::spawn(move || server.serve(stream));
            }
        });
        format!("http:unix:@{name}")
    }

    /// Serves requests until the client closes the connection or subscribes.
    fn serve(&self, mut stream: UnixStream) {
        let mut reader = BufReader::new(stream.try_clone().expect("a descriptor is free"));
        loop {
            let (mut first, mut length) = (String::new(), 0);
            if reader.read_line(&mut first).is_ok_and(|count| count == 0) {
                return;
            }
            loop {
                let mut line = String::new();
                reader.read_line(&mut line).expect("the head arrives");
                match line.trim_end().split_once(": ") {
                    Some(("Content-Length", text)) => length = text.parse().expect("the length is a number"),
                    Some(_) => {}
                    None => break,
                }
            }
            let mut data = vec![0; length];
            reader.read_exact(&mut data).expect("the body arrives");
            if first.starts_with("GET /events ") {
                return self.subscribe(stream);
            }
            if first.starts_with("GET /page ") {
                stream
                    .write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\npage\n")
                    .expect("the future subscriber is connected");
                continue;
            }
            assert!(first.starts_with("POST /publish "), "{first}");
            self.publish(&String::from_utf8(data).expect("text"));
            let (status, fields) = match self.does {
                Does::RefusesEvents => ("404 Not Found", ""),
                Does::ClosesPublisher => ("201 Created", "Connection: close\r\n"),
                _ => ("201 Created", ""),
            };
            let answer = format!("HTTP/1.1 {status}\r\n{fields}Content-Length: 3\r\n\r\nok\n");
            if stream.write_all(answer.as_bytes()).is_err() || !fields.is_empty() {
                return;
            }
        }
    }

    fn subscribe(&self, mut stream: UnixStream) {
        let head = match self.does {
            Does::RefusesSubscribers => "HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n",
            _ => "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\n: a\n\r\n",
        };
        stream.write_all(head.as_bytes()).expect("the subscriber is connected");
        self.streams.lock().expect("no thread has panicked").push(stream);
    }

    fn publish(&self, data: &str) {
        let event = format!("id: x\ndata: {data}\n\n");
        let number: u64 =
            data.split_once(' ').expect("the data has two numbers").0.parse().expect("the event has a number");
        let text = match (number, self.does) {
            (3, Does::Loses) => return,
            (3, Does::Doubles) => event.clone() + &event,
            (3, Does::SendsOther) => "data: hello\n\n".into(),
            (3, Does::Delays) => return self.delayed.lock().expect("no thread has panicked").push_str(&event),
            (3, Does::CutsStreams) => {
                let streams = std::mem::take(&mut *self.streams.lock().expect("no thread has panicked"));
                return streams
                    .iter()
                    .for_each(|stream| stream.shutdown(Shutdown::Both).expect("the stream is connected"));
            }
            _ => event + &std::mem::take(&mut *self.delayed.lock().expect("no thread has panicked")),
        };
        for mut stream in &*self.streams.lock().expect("no thread has panicked") {
            let _ = stream.write_all(format!("{:x}\r\n{text}\r\n", text.len()).as_bytes());
        }
    }
}

/// Returns the report or the error message, and the exit status.
fn against(name: &str, does: Does, more: &str) -> (serde_json::Value, Option<i32>) {
    let output = Command::new(env!("CARGO_BIN_EXE_forkyard-load"))
        .args(["events", "--connect", &Server::start(name, does), "--subscribe", "/events", "--publish", "/publish"])
        .args(["--subscribers", &SUBSCRIBERS.to_string(), "--rate", "100", "-d", "200ms", "--timeout", "20s", "--json"])
        .args(more.split_whitespace())
        .args(["--pids", &std::process::id().to_string()])
        .output_in_time()
        .expect("the program was built");
    let text = String::from_utf8_lossy(&output.stdout);
    let otherwise = || serde_json::Value::String(String::from_utf8_lossy(&output.stderr).into());
    (serde_json::from_str(&text).unwrap_or_else(|_| otherwise()), output.status.code())
}

/// Returns the numbers of deliveries, missing events, duplicates and errors.
fn counts(json: &serde_json::Value) -> [Option<u64>; 4] {
    ["deliveries", "missing", "doubled", "errors"].map(|field| json[field].as_u64())
}

#[test]
fn each_event_arrives_once_and_in_order() {
    for (name, does, more) in
        [("well", Does::Well, ""), ("kept", Does::Well, "--first /page"), ("closes", Does::ClosesPublisher, "")]
    {
        let (json, exit) = against(name, does, more);
        assert_eq!((counts(&json), exit), ([SUBSCRIBERS * EVENTS, 0, 0, 0].map(Some), Some(0)), "{json}");
        assert!(json["latency_p50_us"].as_f64().is_some_and(|us| us > 0.0), "{json}");
        assert!(json["latency_p99_us"].as_f64() >= json["latency_p50_us"].as_f64(), "{json}");
        assert!(json["memory_bytes"].as_u64().is_some_and(|bytes| bytes > 0), "{json}");
    }
}

#[test]
fn missing_and_duplicate_events_are_counted_for_each_subscriber() {
    let all = SUBSCRIBERS * EVENTS;
    for (name, does, counted) in [
        ("loses", Does::Loses, [all - SUBSCRIBERS, SUBSCRIBERS, 0, 0]),
        ("doubles", Does::Doubles, [all, 0, SUBSCRIBERS, 0]),
        ("delays", Does::Delays, [all - SUBSCRIBERS, SUBSCRIBERS, SUBSCRIBERS, 0]),
        ("cuts", Does::CutsStreams, [2 * SUBSCRIBERS, all - 2 * SUBSCRIBERS, 0, SUBSCRIBERS]),
        ("other", Does::SendsOther, [2 * SUBSCRIBERS, all - 2 * SUBSCRIBERS, 0, SUBSCRIBERS]),
    ] {
        let (json, exit) = against(name, does, "");
        assert_eq!((counts(&json), exit), (counted.map(Some), Some(3)), "{name}: {json}");
    }
}

#[test]
fn a_run_needs_subscribers_and_events() {
    for (name, does, told) in [
        (
            "no-subscribers",
            Does::RefusesSubscribers,
            "only 0 of 3 have subscribed and got an event, so there was no run: status",
        ),
        ("no-events", Does::RefusesEvents, "cannot publish, so there was no run: status: 404 instead of"),
    ] {
        let (said, exit) = against(name, does, "");
        assert_eq!(exit, Some(1), "{said}");
        assert!(said.as_str().is_some_and(|said| said.contains(told)), "{said}");
    }
}
