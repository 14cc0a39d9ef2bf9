//! Publishing by datagram and by command: with real programs in other languages and with real relays, some of which die.

#![allow(clippy::unwrap_used, reason = "a failing test reports its location")]

mod common;

use std::collections::BTreeSet;
use std::io::Write as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use common::fastcgi::{self, PARAMS, STDIN, begin, pair, record};
use common::limit::{self, InTime as _, Pipe};
use common::{Server, StopOnDrop, http, is_gone, process, program, sse, wait_until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use tempfile::TempDir;

const DOCUMENT: &str = include_str!("../docs/events-from-other-languages.md");

/// A server with an event log.
struct Place {
    server: Server,
    directory: TempDir,
}

impl Place {
    fn start(arguments: &[&str]) -> Self {
        Self::start_program(&program("stream"), arguments)
    }

    fn start_program(path: &Path, arguments: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        // Other users must be able to reach the socket.
        std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        let mut command = Command::new(path);
        command.args(["--bind", "http:127.0.0.1:0", "--workers", "1", "--cache", "0"]);
        command.arg("--control").arg(directory.path().join("control"));
        command.arg("--events-socket").arg(directory.path().join("events")).args(arguments);
        Self { server: Server::start_command(&mut command), directory }
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("events")
    }

    fn sender(&self) -> UnixDatagram {
        let sender = UnixDatagram::unbound().unwrap();
        sender.set_write_timeout(Some(common::PATIENCE)).unwrap();
        sender.connect(self.socket()).unwrap();
        sender
    }

    fn command(&self, arguments: &[&str]) -> Command {
        events_command(&self.directory.path().join("control"), arguments)
    }

    #[track_caller]
    fn said(&self, arguments: &[&str]) -> String {
        said(self.command(arguments).output_in_time().unwrap())
    }

    #[track_caller]
    fn complaint(&self, arguments: &[&str]) -> String {
        let output = self.command(arguments).output_in_time().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{said}");
        said
    }

    /// Returns the data of all events in a topic. Checks that no event has been evicted from the log, and that the ids run from 1 without a
    /// gap.
    fn data(&self, topic: &str) -> Vec<String> {
        let since = self.server.segment().events().since(topic, 0, usize::MAX);
        assert_eq!(since.missed, 0);
        assert!(since.events.iter().zip(1..).all(|(event, id)| event.id == id));
        since.events.into_iter().map(|event| String::from_utf8(event.data).unwrap()).collect()
    }

    fn last_id(&self, topic: &str) -> u64 {
        self.server.segment().events().last_id(topic)
    }

    fn wait_for_last_id(&self, topic: &str, id: u64) {
        wait_until("the event is in the log", || (self.last_id(topic) >= id).then_some(()));
    }

    fn relay(&self) -> Option<Pid> {
        let children = self.server.children().into_iter();
        let mut relays =
            children.filter(|pid| process(*pid).is_some_and(|one| one.name == "relay" && one.state != 'Z'));
        relays.next().map(Pid::from_raw)
    }
}

fn events_command(control: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(program("forkyard"));
    command.arg("events").args(arguments).env("FORKYARD_CONTROL", control);
    command
}

#[track_caller]
fn said(output: Output) -> String {
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(output.status.code(), Some(0), "{said}{}", String::from_utf8_lossy(&output.stderr));
    said
}

/// Returns the examples for a language in the document.
fn example(language: &str) -> &'static str {
    let begin = format!("\n```{language}\n");
    let (_, rest) = DOCUMENT.split_once(&begin).expect("the document has an example for this language");
    rest.split_once("\n```").unwrap().0
}

// ---- other languages ----

#[test]
fn the_documented_examples_publish_from_php_python_and_a_shell() {
    let directory = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| {
        let path = directory.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.display().to_string()
    };
    let php = write("publish.php", &format!("<?php\n{}\necho 'done';\n", example("php")));
    let python = write("publish.py", example("python"));
    let shell = write("publish.sh", example("sh"));
    let (control, socket) = (directory.path().join("control"), directory.path().join("app.sock"));
    let bind = format!("fastcgi:unix:{}", socket.display());
    // The programs run as daemons. They must not exit, because a restarted daemon would publish its events again.
    let daemons = [("python", "python3", &python), ("shell", "sh", &shell)]
        .map(|(name, program, script)| format!("{name}=sh -c '{program} {script} && exec sleep 1000'"));
    let mut command = Command::new(program("forkyard"));
    command.args(["run", "--direct", "--events", "1M", "--bind", &bind, "--workers", "1", "--control"]).arg(&control);
    command.args(["--daemon", &daemons[0], "--daemon", &daemons[1]]).env("TMPDIR", directory.path());
    let mut server = Server::start_command(command.args(["--", "php-cgi", "-n"]));

    let params = [("REQUEST_METHOD", "GET"), ("SCRIPT_FILENAME", &php), ("QUERY_STRING", ""), ("REQUEST_URI", "/")];
    let params: Vec<u8> = params.iter().flat_map(|(name, value)| pair(name, value)).collect();
    let mut client = fastcgi::Client::connect(&bind).unwrap();
    let records =
        [begin(1, 1, false), record(PARAMS, 1, &params, 0), record(PARAMS, 1, b"", 0), record(STDIN, 1, b"", 0)];
    client.send(&records).unwrap();
    assert_eq!(String::from_utf8_lossy(client.response(1).unwrap().body()), "done");

    let tail =
        said(events_command(&control, &["tail", "news", "--from", "1", "--count", "3"]).output_in_time().unwrap());
    let mut lines: Vec<&str> = tail.lines().map(|line| line.split_once('\t').unwrap().1).collect();
    lines.sort_unstable();
    let expected = ["PHP", "Python", "a shell"].map(|what| format!("news\tweather\tit rains in {what}"));
    assert_eq!(lines, expected);
    let is_ours = |name: &str| name.starts_with("forkyard-events-");
    let directories = || {
        let names = std::fs::read_dir(directory.path()).unwrap().map(|entry| entry.unwrap().file_name());
        names.filter(|name| is_ours(&name.to_string_lossy())).count()
    };
    assert_eq!(directories(), 1);
    server.stop();
    assert_eq!(directories(), 0, "the socket's directory is removed with the server");
}

#[test]
fn a_datagram_can_be_as_long_as_an_event_and_contain_any_bytes() {
    let place = Place::start(&[]);
    let sender = place.sender();
    let log = place.server.segment().events();
    let most = usize::try_from(log.max_event()).unwrap();
    let longest: Vec<u8> = (0..most - 1).map(|at| u8::try_from(at % 251).unwrap()).collect();
    let topic = "t".repeat(128);
    sender.send(&[topic.as_bytes(), b"\nn\n", &longest].concat()).unwrap();
    sender.send(b"empty\n\n").unwrap();
    place.wait_for_last_id("empty", 1);
    let event = log.since(&topic, 0, 1).events.remove(0);
    assert!((&*event.name, event.data == longest) == ("n", true));
    assert_eq!(place.data("empty"), [""]);
}

#[test]
fn malformed_datagrams_are_counted_and_affect_no_other_event() {
    let mut place = Place::start(&[]);
    let sender = place.sender();
    sender.send(b"news\n\nfirst").unwrap();
    place.wait_for_last_id("news", 1);
    let relay = place.relay().unwrap();
    let most = usize::try_from(place.server.segment().events().max_event()).unwrap();
    let too_long = [b"news\n\n".as_slice(), &vec![b'x'; most + 1]].concat();
    let longer_than_any = [b"news\n\n".as_slice(), &vec![b'x'; most + 1000]].concat();
    let long_topic = format!("{}\n\nx", "t".repeat(129));
    let wrong: [&[u8]; 10] = [
        b"",
        b"news",
        b"news\nsecond",
        b"\n\nno topic",
        b"\xff\n\nx",
        b"news\n\x1b[2J\nx",
        b"news\ngap\nx",
        &too_long,
        &longer_than_any,
        long_topic.as_bytes(),
    ];
    for datagram in wrong {
        sender.send(datagram).unwrap();
    }
    let line = place.server.wait_for("datagrams not published count=");
    assert!(line.contains(&format!("WARN  [{}] relay: ", place.server.pid())), "{line}");
    assert!(line.ends_with(&format!(" pid={relay}")), "{line}");
    let last = if line.contains("total=10 ") { line } else { place.server.wait_for("total=10 ") };
    assert!(last.contains("a topic has 1 to 128 bytes"), "{last}");
    sender.send(b"news\n\nlast").unwrap();
    place.wait_for_last_id("news", 2);
    assert_eq!(place.data("news"), ["first", "last"]);
    assert_eq!(place.relay(), Some(relay));
    // The relay logs the first of these datagrams immediately, and later ones together after an interval. If the datagrams arrive during
    // more than one interval, the relay logs more lines.
    let lines = place.server.log().lines().filter(|line| line.contains("not published")).count();
    assert!(lines < 5, "{}", place.server.log());
}

#[test]
fn an_event_published_by_datagram_reaches_a_subscriber() {
    let place = Place::start(&[]);
    let address = place.server.http();
    let mut curl = Command::new("curl");
    curl.args(["-sN", "-H", "Accept: text/event-stream"]);
    let mut stream = curl.arg(format!("http://{address}/events?topics=news")).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = Pipe::of(stream.stdout.take().unwrap());
    let mut line_with = |what: &str| loop {
        let line = lines.line(what);
        assert!(!line.is_empty(), "curl exited before {what:?}");
        if line.starts_with(what) {
            break line;
        }
    };
    line_with("id: ");
    place.sender().send(b"news\nweather\nit rains").unwrap();
    assert_eq!(line_with("event: "), "event: weather\n");
    assert_eq!(lines.line("the data"), "data: it rains\n");
    stream.kill().unwrap();
    limit::end_of(&mut stream, "curl");
}

#[test]
fn workers_find_the_socket_in_their_environment() {
    let place = Place::start_program(&program("confined"), &["--clear-env"]);
    let environment = http::get(&place.server.http(), "/env").unwrap().text();
    let line = format!("FORKYARD_EVENTS={}\n", place.socket().display());
    assert!(environment.contains(&line), "{environment}");
}

// ---- the relay ----

/// Sends numbers to a topic until `stop` is set. Counts the sent numbers in `sent`.
fn send_numbers(sender: &UnixDatagram, topic: &str, stop: &AtomicBool, sent: &AtomicU64) {
    while !stop.load(Ordering::SeqCst) {
        let number = sent.fetch_add(1, Ordering::SeqCst);
        sender.send(format!("{topic}\n\n{number}").as_bytes()).unwrap();
    }
}

#[test]
fn a_killed_relay_loses_at_most_one_event_and_duplicates_none() {
    const KILLS: u64 = 50;
    let mut place = Place::start(&["--events", "256M"]);
    let (stop, sent) = (AtomicBool::new(false), AtomicU64::new(0));
    let sender = place.sender();
    std::thread::scope(|scope| {
        scope.spawn(|| send_numbers(&sender, "n", &stop, &sent));
        let _sender_ends = StopOnDrop(&stop);
        for _ in 0..KILLS {
            let before = place.last_id("n");
            let relay = wait_until("a relay publishes", || place.relay().filter(|_| place.last_id("n") > before));
            kill(relay, Signal::SIGKILL).unwrap();
            wait_until("the relay is dead", || process(relay.as_raw()).is_none().then_some(()));
        }
    });
    sender.send(b"end\n\n").unwrap();
    place.wait_for_last_id("end", 1);
    let numbers: Vec<u64> = place.data("n").iter().map(|data| data.parse().unwrap()).collect();
    assert!(numbers.is_sorted_by(|one, other| one < other), "in order, and none twice");
    let lost = sent.load(Ordering::SeqCst) - numbers.len() as u64;
    assert!(lost <= KILLS, "{lost} of {} are lost", numbers.len());
    assert_eq!(place.server.segment().events().audit(), Ok(()));
    let ended = || place.server.log().matches("relay exited").count() as u64;
    wait_until("the end of each relay is logged", || (ended() >= KILLS).then_some(()));
    assert_eq!(ended(), KILLS, "only the killed relays ended");
    let relay = place.relay().unwrap();
    place.server.stop();
    assert!(process(relay.as_raw()).is_none(), "the relay exits with the master");
    assert!(!place.socket().exists());
}

#[test]
fn a_stopped_relay_is_replaced_and_its_publishers_continue() {
    let mut place = Place::start(&["--events", "64M"]);
    let sender = place.sender();
    sender.send(b"begin\n\n").unwrap();
    place.wait_for_last_id("begin", 1);
    let relay = place.relay().unwrap();
    common::stop(relay);
    // There is more data than the kernel buffers for the socket, so the sender has to wait.
    std::thread::scope(|scope| {
        let sending = scope.spawn(|| {
            sender.set_write_timeout(Some(common::PATIENCE)).unwrap();
            (0..2000).try_for_each(|number| sender.send(format!("n\n\n{number}").as_bytes()).map(drop))
        });
        place.server.wait_for("killed the relay, because it made no progress");
        sending.join().unwrap().expect("the publisher continues");
    });
    sender.send(b"end\n\n").unwrap();
    place.wait_for_last_id("end", 1);
    let numbers = place.data("n");
    assert!(numbers.len() >= 1999, "one event may be lost with the relay, and {} arrived", numbers.len());
    assert_ne!(place.relay().unwrap(), relay);
    assert_eq!(place.server.segment().events().audit(), Ok(()));
    place.server.stop();
}

#[test]
fn many_topics_from_one_publisher_do_not_exclude_other_topics() {
    let mut place = Place::start(&[]);
    let sender = place.sender();
    let bind = place.server.binds[0].clone();
    sender.send(b"prices\n\nfirst").unwrap();
    place.wait_for_last_id("prices", 1);
    let mut listens = sse::Source::open(sse::Way::Http, &bind, "/events?topics=prices,user%20999", "").unwrap();
    let most = place.server.segment().events().stats().most_topics;
    assert!(most < 500, "the log has room for {most} topics");
    for number in 0..1000 {
        sender.send(format!("user {number}\n\nhello {number}").as_bytes()).unwrap();
    }
    sender.send(b"prices\n\nsecond").unwrap();
    sender.send(b"news\n\nnobody has kept this topic from coming").unwrap();
    wait_until("all events are in the log", || {
        (place.server.segment().events().stats().published >= 1003).then_some(())
    });
    assert_eq!(place.server.segment().events().stats().published, 1003, "no event was rejected");
    // The topics are new, or were evicted and then published again. A subscriber misses none of their events.
    let events: Vec<sse::Event> = (0..2).map(|_| listens.event().unwrap().unwrap()).collect();
    let got: BTreeSet<(&str, &str)> = events.iter().map(|event| (event.name.as_str(), event.data.as_str())).collect();
    assert_eq!(got, BTreeSet::from([("", "hello 999"), ("", "second")]), "no gap");
    assert!(!place.server.log().contains("not published"), "{}", place.server.log());
    drop(listens);
    place.server.stop();
}

#[test]
fn a_relay_exits_with_its_killed_master_and_the_next_master_takes_over_the_path() {
    let mut place = Place::start(&[]);
    place.sender().send(b"news\n\nx").unwrap();
    place.wait_for_last_id("news", 1);
    let relay = place.relay().unwrap();
    place.server.signal(Signal::SIGKILL);
    place.server.wait_end();
    wait_until("the relay is gone", || is_gone(relay.as_raw()).then_some(()));
    assert!(place.socket().exists());
    let start = || {
        let mut command = Command::new(program("stream"));
        command.args(["--bind", "http:127.0.0.1:0", "--workers", "1", "--events-socket"]).arg(place.socket());
        command
    };
    let mut second = Server::start_command(&mut start());
    let refused = start().output_in_time().unwrap();
    let why = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(refused.status.code() == Some(1) && why.contains("another program is listening there"), "{why}");
    assert!(why.contains("--events-socket"), "{why}");
    let sender = UnixDatagram::unbound().unwrap();
    sender.send_to(b"news\n\nx", place.socket()).unwrap();
    wait_until("the event is published", || (second.segment().events().last_id("news") == 1).then_some(()));
    second.stop();
}

#[test]
fn an_upgrade_loses_no_datagram() {
    let mut place = Place::start(&["--events", "64M"]);
    let (stop, sent) = (AtomicBool::new(false), AtomicU64::new(0));
    let sender = place.sender();
    sender.send(b"begin\n\n").unwrap();
    place.wait_for_last_id("begin", 1);
    let inode = std::fs::metadata(place.socket()).unwrap().ino();
    let mut relays = BTreeSet::from([place.relay().unwrap()]);
    std::thread::scope(|scope| {
        let server = &mut place.server;
        let (stop, sent, sender) = (&stop, &sent, &sender);
        scope.spawn(move || {
            while !stop.load(Ordering::SeqCst) {
                let number = sent.fetch_add(1, Ordering::SeqCst);
                sender.send(format!("n\n\n{number}").as_bytes()).unwrap();
                std::thread::park_timeout(std::time::Duration::from_micros(200));
            }
        });
        let _sender_ends = StopOnDrop(stop);
        for _ in 0..3 {
            server.signal(Signal::SIGUSR2);
            server.wait_for("upgraded version=");
            server.wait_for("reload done");
        }
    });
    sender.send(b"end\n\n").unwrap();
    place.wait_for_last_id("end", 1);
    let expected: Vec<String> = (0..sent.load(Ordering::SeqCst)).map(|number| number.to_string()).collect();
    assert!(place.data("n") == expected, "{} of {} arrived", place.data("n").len(), expected.len());
    assert_eq!(std::fs::metadata(place.socket()).unwrap().ino(), inode);
    assert!(relays.insert(place.relay().unwrap()), "the new build has its own relay");
    assert!(!place.server.log().contains("relay exited"), "none has died:\n{}", place.server.log());
    place.server.stop();
    assert!(!place.socket().exists());
}

#[test]
fn the_user_of_the_workers_can_publish_and_other_users_cannot() {
    assert!(nix::unistd::geteuid().is_root(), "this test changes users: run it as root");
    let place = Place::start(&["--user", "4711", "--group", "4712"]);
    let send = |user: u32, group: u32| {
        let socket = format!("UNIX-SENDTO:{}", place.socket().display());
        let mut socat = Command::new("socat");
        socat.args(["-u", "-", &socket]).uid(user).gid(group).current_dir("/").stdin(Stdio::piped());
        let mut child = socat.stderr(Stdio::piped()).spawn().unwrap_or_else(|error| panic!("{error} (scripts/test)"));
        // A sender that lacks permission may exit before it has read its input.
        let _ = child.stdin.take().unwrap().write_all(b"news\n\nx");
        let output = limit::output_of(child, "socat");
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    for (user, group) in [(4713, 4713), (4713, 4711)] {
        assert!(send(user, group).contains("Permission denied"), "EACCES");
    }
    assert_eq!((place.relay(), place.last_id("news")), (None, 0), "no event arrived, and no relay was started");
    for (user, group) in [(4711, 4712), (4713, 4712)] {
        assert_eq!(send(user, group), "");
    }
    place.wait_for_last_id("news", 2);
    let relay = place.relay().unwrap();
    let status = std::fs::read_to_string(format!("/proc/{relay}/status")).unwrap();
    assert!(status.contains("Uid:\t4711\t4711\t4711\t4711\n") && status.contains("Gid:\t4712\t4712"), "{status}");
    let metadata = std::fs::metadata(place.socket()).unwrap();
    assert_eq!((metadata.uid(), metadata.gid(), metadata.mode() & 0o777), (4711, 4712, 0o660));
}

// ---- the command line ----

#[test]
fn commands_publish_and_list() {
    let place = Place::start(&[]);
    assert_eq!(place.said(&["publish", "news", "it rains", "--name", "weather"]), "1\n");
    assert_eq!(place.said(&["publish", "news", "it snows", "--json"]), "{\"id\":2,\"topic\":\"news\"}\n");
    let mut child =
        place.command(&["publish", "chat", "-"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"two\nlines\xff").unwrap();
    assert_eq!(said(limit::output_of(child, "events publish")), "1\n");
    assert_eq!(place.said(&["tail", "--from", "1", "--count", "1", "chat"]), "1\tchat\t-\ttwo\\nlines\\xff\n");
    assert_eq!(place.said(&["tail", "--from", "2", "--count", "1", "news"]), "2\tnews\t-\tit snows\n");

    let list: Value = serde_json::from_str(&place.said(&["ls", "--json"])).unwrap();
    assert_eq!(list["topics"], serde_json::json!([{"topic":"chat","last_id":1},{"topic":"news","last_id":2}]));
    assert_eq!((&list["published"], &list["evicted"]), (&3.into(), &0.into()));
    assert_eq!(list["epoch"], format!("{:x}", place.server.segment().events().epoch()));
    let list = place.said(&["ls"]);
    assert!(
        list.contains("published   3, of which 0") && list.ends_with("         1  chat\n         2  news\n"),
        "{list}"
    );

    for (arguments, why) in [
        (&["publish", "", "x"][..], "a topic has 1 to 128 bytes"),
        (&["publish", "news", "x", "--name", "a\nb"], "control characters (give another --name)"),
        (&["publish", "news", "x", "--name", "gap"], "is reserved for notices of missed events (give another --name)"),
        (&["publish", "news", &"x".repeat(126_000)], "longer than the"),
    ] {
        let complaint = place.complaint(arguments);
        assert!(complaint.contains(why), "{complaint}");
    }
    assert_eq!(place.relay(), None, "the commands publish without a relay");
}

#[test]
fn without_an_event_log_there_is_no_socket_and_commands_report_this() {
    let place = Place::start(&["--events", "0"]);
    assert!(!place.socket().exists());
    for arguments in [&["ls"][..], &["tail"], &["publish", "a", "b"]] {
        let complaint = place.complaint(arguments);
        assert!(complaint.contains("there is no event log (start with --events SIZE to have one)"), "{complaint}");
    }
    drop(place);
    let nobody = events_command(Path::new("/nowhere/control"), &["ls"]).output_in_time().unwrap();
    assert!(String::from_utf8_lossy(&nobody.stderr).contains("no master at /nowhere/control"));
}

/// A running `tail` command.
struct Tail {
    child: Child,
    lines: Option<Pipe>,
}

impl Tail {
    fn start(place: &Place, arguments: &[&str]) -> Self {
        let mut command = place.command(&[&["tail"], arguments].concat());
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let lines = child.stdout.take().map(Pipe::of);
        Self { child, lines }
    }

    fn line(&mut self) -> String {
        self.lines.as_mut().unwrap().line("a line of the tail")
    }
}

impl Drop for Tail {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn tail_prints_new_events_and_exits_successfully() {
    let mut place = Place::start(&[]);
    place.said(&["publish", "news", "one"]);
    place.said(&["publish", "chat", "a"]);
    let mut all = Tail::start(&place, &["--from", "1", "--json"]);
    let mut news = Tail::start(&place, &["--from", "1", "news"]);
    assert_eq!(news.line(), "1\tnews\t-\tone\n");
    let first: BTreeSet<String> = [all.line(), all.line()].into_iter().collect();
    let topics: BTreeSet<_> =
        first.iter().map(|line| serde_json::from_str::<Value>(line).unwrap()["topic"].to_string()).collect();
    assert_eq!(topics, BTreeSet::from(["\"chat\"".to_owned(), "\"news\"".to_owned()]));

    place.said(&["publish", "chat", "b"]);
    place.said(&["publish", "news", "two", "--name", "n"]);
    assert_eq!(news.line(), "2\tnews\tn\ttwo\n");
    let line: Value = serde_json::from_str(&all.line()).unwrap();
    assert_eq!((&line["topic"], &line["id"], &line["data"]), (&"chat".into(), &2.into(), &"b".into()));
    assert!(line["published_us"].as_u64().unwrap() > 1_600_000_000_000_000, "{line}");

    kill(Pid::from_raw(news.child.id().cast_signed()), Signal::SIGINT).unwrap();
    assert_eq!((news.line(), limit::end_of(&mut news.child, "the tail").code()), (String::new(), Some(0)));
    // The reading end is closed. The command exits on its own, even if no event arrives.
    all.lines = None;
    assert_eq!(wait_until("the tail has exited", || all.child.try_wait().unwrap()).code(), Some(0));

    let mut orphan = Tail::start(&place, &["--from", "1", "news"]);
    assert_eq!(orphan.line(), "1\tnews\t-\tone\n");
    place.server.stop();
    assert_eq!(wait_until("the tail has exited", || orphan.child.try_wait().unwrap()).code(), Some(1));
}

#[test]
fn tail_reports_evicted_events() {
    let place = Place::start(&["--events", "64K"]);
    assert_eq!(http::post(&place.server.http(), "/flood/news/200/1000", b"").unwrap().status, 200);
    let output = place.said(&["tail", "news", "--from", "3", "--count", "2"]);
    let lines: Vec<&str> = output.lines().collect();
    let first: u64 = lines[1].split('\t').next().unwrap().parse().unwrap();
    assert_eq!(lines[0], format!("# {} events of news are gone", first - 3));
    assert_eq!(lines.len(), 3);
    let output = place.said(&["tail", "news", "--from", "3", "--count", "1", "--json"]);
    let gap: Value = serde_json::from_str(output.lines().next().unwrap()).unwrap();
    assert_eq!(gap, serde_json::json!({ "topic": "news", "missed": first - 3 }));
}

#[test]
fn tail_accepts_an_id_from_an_event_stream_and_rejects_one_from_another_log() {
    let place = Place::start(&[]);
    for text in ["one", "two", "three"] {
        place.said(&["publish", "news", text]);
    }
    let epoch = place.server.segment().events().epoch();
    let from = format!("{epoch:08x}-2");
    assert_eq!(place.said(&["tail", "news", "--from", &from, "--count", "1"]), "2\tnews\t-\ttwo\n");
    let other = format!("{:08x}-2", epoch ^ 1);
    for (from, why) in
        [(other.as_str(), "a different event log"), ("x-2", "an id is"), ("0", "an id is"), ("1-2.3", "an id is")]
    {
        let refused = place.command(&["tail", "news", "--from", from, "--count", "1"]).output_in_time().unwrap();
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(!refused.status.success() && said.contains(why), "{from}: {said}");
    }
}
