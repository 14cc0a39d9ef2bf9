//! Publishes, lists and follows events from outside the server.
//!
//! The master only passes the descriptor of the shared memory, as for the cache. [`Follow`] selects the events to show,
//! without I/O.

use std::collections::HashMap;
use std::ffi::OsString;
use std::io::{self, Read as _, Write};
use std::os::fd::AsFd as _;
use std::os::unix::ffi::OsStrExt as _;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use forkyard_shm::{Event, EventStats, Events, Segment, Tailed};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::kill;
use nix::unistd::Pid;
use serde_json::{Value, json};
use signal_hook::consts::signal::{SIGHUP, SIGINT, SIGTERM};

use super::client::{Connection, ControlEndpoint};
use super::commands::printed;
use super::wire::ControlRequest;
use crate::app::events::name;

#[derive(Clone, Debug)]
pub(crate) enum EventsOperation {
    Publish { topic: String, name: String, data: OsString },
    Tail { topics: Vec<String>, from: Option<FirstId>, count: Option<u64> },
    List,
}

/// The id of the first event to show: `17`, or `9f3a61c2-17` with the epoch of the log, as in an event stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FirstId {
    epoch: Option<u32>,
    id: u64,
}

impl FromStr for FirstId {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const WRONG: &str = "an id is a number from 1 on, or EPOCH-NUMBER as in an event stream of one topic";
        let (epoch, id) = match text.split_once('-') {
            Some((epoch, id)) => (Some(u32::from_str_radix(epoch, 16).map_err(|_| WRONG)?), id),
            None => (None, text),
        };
        let id = id.parse().ok().filter(|&id| id > 0).ok_or(WRONG)?;
        Ok(Self { epoch, id })
    }
}

impl FirstId {
    /// Returns the id in the log with this epoch.
    ///
    /// # Errors
    /// Returns a message for the operator if the id belongs to a different log.
    fn in_log(self, epoch: u32) -> Result<u64, String> {
        match self.epoch {
            Some(other) if other != epoch => Err(format!(
                "--from: the id belongs to a different event log, with epoch {other:08x}; this log has epoch {epoch:08x} (print \
                 all its events with --from 1)"
            )),
            Some(_) | None => Ok(self.id),
        }
    }
}

/// Number of events of a topic per read.
const CHUNK: usize = 256;
/// Interval at which this process checks that the output is still open and the master is still alive.
const POLL_INTERVAL: Duration = Duration::from_secs(1);

/// Runs the operation, and writes its output to standard output.
///
/// # Errors
/// Returns a message for the operator if the operation fails, or the output cannot be written.
pub(crate) fn run(endpoint: &ControlEndpoint, operation: &EventsOperation, json: bool) -> Result<(), String> {
    let connection = Connection::ask(endpoint, &ControlRequest::Events)?;
    let master = connection.master();
    let segment =
        Segment::attach(connection.descriptor()?).map_err(|error| format!("cannot use the event log: {error}"))?;
    let events = segment.events();
    let mut out = io::stdout().lock();
    match operation {
        EventsOperation::Publish { topic, name, data } => publish(&events, topic, name, data, json, &mut out),
        EventsOperation::List => printed(list(&events, json, &mut out)),
        EventsOperation::Tail { topics, from, count } => {
            let from = from.map(|from| from.in_log(events.epoch())).transpose()?;
            let mut printer = Printer { out, json, left: count.unwrap_or(u64::MAX) };
            match tail(&events, topics, from, master, &mut printer) {
                Ok(End::Done) => Ok(()),
                Ok(End::NoMaster) => Err(format!("the master at {} is gone", endpoint.socket.display())),
                Err(error) => printed(Err(error)),
            }
        }
    }
}

fn publish(
    events: &Events,
    topic: &str,
    name: &str,
    data: &OsString,
    json: bool,
    out: &mut dyn Write,
) -> Result<(), String> {
    if let Some(why) = name::fault(name) {
        return Err(format!("event not published: its name {name:?} {why} (give another --name)"));
    }
    let mut read = Vec::new();
    let data = if data == "-" {
        // Up to one byte more than the maximum is read, so that the log rejects data that is too long.
        let most = events.max_event().saturating_add(1);
        let input = io::stdin().lock().take(most).read_to_end(&mut read);
        input.map_err(|error| format!("event not published: cannot read standard input: {error}"))?;
        read.as_slice()
    } else {
        data.as_bytes()
    };
    let id = events.publish(topic, name, data).map_err(|error| error.to_string())?;
    let line = if json { json!({ "topic": topic, "id": id }).to_string() } else { id.to_string() };
    printed(writeln!(out, "{line}"))
}

fn list(events: &Events, json: bool, out: &mut dyn Write) -> io::Result<()> {
    let stats = events.stats();
    let EventStats { published, evicted, used_bytes, capacity, recoveries, restarts, .. } = stats;
    let mut topics = events.topics();
    topics.sort();
    if json {
        let topics: Vec<Value> = topics.iter().map(|(topic, id)| json!({ "topic": topic, "last_id": id })).collect();
        let value = json!({
            "epoch": format!("{:x}", events.epoch()), "published": published, "evicted": evicted,
            "used_bytes": used_bytes, "capacity": capacity, "most_topics": stats.most_topics,
            "max_event": events.max_event(), "recoveries": recoveries, "restarts": restarts, "topics": topics,
        });
        return writeln!(out, "{value}");
    }
    writeln!(out, "epoch       {:x}", events.epoch())?;
    writeln!(out, "published   {published}, of which {evicted} were evicted")?;
    writeln!(out, "bytes       {used_bytes} of {capacity}; at most {} per event", events.max_event())?;
    writeln!(out, "topics      {} of {}", topics.len(), stats.most_topics)?;
    if recoveries + restarts > 0 {
        writeln!(out, "recoveries  {recoveries}, restarts {restarts}")?;
    }
    writeln!(out, "\n{:>10}  TOPIC", "LAST ID")?;
    topics.iter().try_for_each(|(topic, id)| writeln!(out, "{id:>10}  {topic}"))
}

enum End {
    Done,
    NoMaster,
}

/// Prints events until a signal arrives, the count is reached, the reader closes the output, or the master exits.
fn tail(
    events: &Events,
    topics: &[String],
    from: Option<u64>,
    master: Option<Pid>,
    printer: &mut Printer<impl Write>,
) -> io::Result<End> {
    let enough = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        signal_hook::flag::register(signal, Arc::clone(&enough))?;
    }
    let is_enough = || enough.load(Ordering::SeqCst);
    // The tail is opened first, and past events are read afterwards. An event that both return is recognized by its id.
    let mut tail = events.tail();
    let mut follow = Follow::new(topics);
    let before = if from.is_some() && !topics.is_empty() {
        topics.iter().map(|topic| (topic.clone(), events.last_id(topic))).collect()
    } else {
        events.topics()
    };
    for (topic, last) in before {
        let Some(from) = from else {
            follow.start(&topic, last);
            continue;
        };
        follow.start(&topic, from - 1);
        let mut place = 0;
        loop {
            let since = events.since_at(&topic, follow.last(&topic), CHUNK, &mut place);
            if since.events.is_empty() && since.missed == 0 {
                break;
            }
            for shown in follow.since(&topic, since.missed, since.events) {
                printer.print(&shown)?;
            }
            if printer.left == 0 || is_enough() {
                return Ok(End::Done);
            }
        }
    }
    printer.out.flush()?;
    loop {
        let seen = events.sequence();
        loop {
            if printer.left == 0 || is_enough() {
                return printer.out.flush().map(|()| End::Done);
            }
            match tail.next() {
                Tailed::CaughtUp => break,
                Tailed::Gap => follow.gap(),
                Tailed::Event(event) => {
                    for shown in follow.next(event) {
                        printer.print(&shown)?;
                    }
                }
            }
        }
        printer.out.flush()?;
        if events.wait(seen, POLL_INTERVAL) == seen {
            if is_output_closed() {
                return Ok(End::Done);
            }
            // A new master may have created a new log, to which this process is not attached.
            if master.is_some_and(|master| kill(master, None) == Err(Errno::ESRCH)) {
                return Ok(End::NoMaster);
            }
        }
    }
}

/// Whether standard output is a pipe whose other end is closed.
fn is_output_closed() -> bool {
    let out = io::stdout();
    let mut watched = [PollFd::new(out.as_fd(), PollFlags::empty())];
    let asked = poll(&mut watched, PollTimeout::ZERO);
    asked.is_ok() && watched[0].revents().is_some_and(|found| found.contains(PollFlags::POLLERR))
}

#[derive(Debug, PartialEq, Eq)]
enum Shown {
    Event(Event),
    /// This many events in the topic are no longer in the log.
    Gap {
        topic: String,
        missed: u64,
    },
}

/// The last shown id of each topic, so that no event is shown twice and gaps are reported.
#[derive(Debug)]
struct Follow {
    /// The topics to show; all topics if this is empty.
    wanted: Vec<String>,
    topics: HashMap<String, Known>,
    gaps: u64,
}

#[derive(Debug)]
struct Known {
    last: u64,
    /// The number of gaps at the end of the log that were known when `last` was shown.
    gaps: u64,
}

impl Follow {
    fn new(wanted: &[String]) -> Self {
        Self { wanted: wanted.to_vec(), topics: HashMap::new(), gaps: 0 }
    }

    /// Records `last` as the id of the topic's last shown event, so that later events are shown next.
    fn start(&mut self, topic: &str, last: u64) {
        self.topics.insert(topic.to_owned(), Known { last, gaps: self.gaps });
    }

    fn last(&self, topic: &str) -> u64 {
        self.topics.get(topic).map_or(0, |known| known.last)
    }

    /// Returns the events in a topic that the log still contains after the last shown id, preceded by the number of
    /// lost events.
    fn since(&mut self, topic: &str, missed: u64, events: Vec<Event>) -> Vec<Shown> {
        let last = events.last().map_or(self.last(topic) + missed, |event| event.id);
        self.start(topic, last);
        let gap = (missed > 0).then(|| Shown::Gap { topic: topic.to_owned(), missed });
        gap.into_iter().chain(events.into_iter().map(Shown::Event)).collect()
    }

    /// Records that events in unknown topics were lost at the end of the log.
    fn gap(&mut self) {
        self.gaps += 1;
    }

    /// Returns what to show for the next event at the end of the log: nothing, the event, or a gap and the event.
    fn next(&mut self, event: Event) -> Vec<Shown> {
        let topic = &*event.topic;
        if !self.wanted.is_empty() && !self.wanted.iter().any(|wanted| wanted == topic) {
            return Vec::new();
        }
        let known = self.topics.get(topic);
        let last = known.map_or(0, |known| known.last);
        if event.id <= last {
            return Vec::new();
        }
        let missed = event.id - last - 1;
        // If ids are missing although the log has no gap, the log had evicted the topic, whose ids then continue from a
        // higher number.
        let is_lost = missed > 0 && known.map_or(0, |known| known.gaps) < self.gaps;
        let gap = is_lost.then(|| Shown::Gap { topic: topic.to_owned(), missed });
        let (topic, id) = (topic.to_owned(), event.id);
        self.start(&topic, id);
        gap.into_iter().chain([Shown::Event(event)]).collect()
    }
}

/// Writes a line for each event or gap.
struct Printer<W> {
    out: W,
    json: bool,
    /// Events still to be printed.
    left: u64,
}

impl<W: Write> Printer<W> {
    fn print(&mut self, shown: &Shown) -> io::Result<()> {
        if self.left == 0 {
            return Ok(());
        }
        match shown {
            Shown::Gap { topic, missed } if self.json => {
                writeln!(self.out, "{}", json!({ "topic": topic, "missed": missed }))
            }
            Shown::Gap { topic, missed } => writeln!(self.out, "# {missed} events of {topic} are gone"),
            Shown::Event(event) => {
                self.left -= 1;
                let Event { topic, id, name, data, published_us, .. } = event;
                if self.json {
                    let data = String::from_utf8_lossy(data);
                    let value =
                        json!({ "topic": topic, "id": id, "name": name, "data": data, "published_us": published_us });
                    return writeln!(self.out, "{value}");
                }
                let name = if name.is_empty() { "-" } else { name };
                writeln!(self.out, "{id}\t{topic}\t{}\t{}", visible(name.as_bytes()), visible(data))
            }
        }
    }
}

/// Formats the bytes as one line of text, with control characters escaped.
fn visible(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        for character in chunk.valid().chars() {
            if character.is_control() || character == '\\' {
                text.extend(character.escape_default());
            } else {
                text.push(character);
            }
        }
        text.push_str(&chunk.invalid().escape_ascii().to_string());
    }
    text
}

#[cfg(test)]
mod tests {
    use forkyard_shm::Plan;

    use super::*;

    fn log() -> Events {
        Segment::create(&Plan { rows: 1, events_bytes: 64 << 10, ..Plan::default() }).unwrap().events()
    }

    fn lines(shown: Vec<Shown>) -> Vec<String> {
        let mut printer = Printer { out: Vec::new(), json: false, left: u64::MAX };
        shown.iter().for_each(|one| printer.print(one).unwrap());
        String::from_utf8(printer.out).unwrap().lines().map(ToOwned::to_owned).collect()
    }

    /// Returns everything that the tail returns now.
    fn rest(tail: &mut forkyard_shm::Tail, follow: &mut Follow) -> Vec<String> {
        let mut shown = Vec::new();
        loop {
            match tail.next() {
                Tailed::CaughtUp => return lines(shown),
                Tailed::Gap => follow.gap(),
                Tailed::Event(event) => shown.extend(follow.next(event)),
            }
        }
    }

    #[test]
    fn an_event_that_is_read_from_the_log_and_from_its_end_is_shown_once() {
        let log = log();
        log.publish("a", "", b"1").unwrap();
        let (mut tail, mut follow) = (log.tail(), Follow::new(&["a".to_owned()]));
        log.publish("a", "n", b"2").unwrap();
        log.publish("b", "", b"1").unwrap();
        follow.start("a", 0);
        let since = log.since("a", 0, CHUNK);
        assert_eq!(lines(follow.since("a", since.missed, since.events)), ["1\ta\t-\t1", "2\ta\tn\t2"]);
        log.publish("a", "", b"3").unwrap();
        assert_eq!(rest(&mut tail, &mut follow), ["3\ta\t-\t3"]);
    }

    #[test]
    fn lost_events_are_reported() {
        let log = log();
        let (mut tail, mut follow) = (log.tail(), Follow::new(&[]));
        let large = vec![b'x'; 7000];
        for _ in 0..20 {
            log.publish("a", "", &large).unwrap();
        }
        let first = log.since("a", 0, 1).events[0].id;
        let shown = rest(&mut tail, &mut follow);
        assert_eq!(shown[0], format!("# {} events of a are gone", first - 1));
        assert_eq!(shown.len() as u64, 1 + 20 - (first - 1));
        let since = log.since("a", 1, CHUNK);
        let mut follow = Follow::new(&[]);
        follow.start("a", 1);
        let shown = follow.since("a", since.missed, since.events);
        assert_eq!(shown[0], Shown::Gap { topic: "a".to_owned(), missed: first - 2 });
        assert_eq!(follow.last("a"), 20);
        assert!(follow.since("a", 3, Vec::new()).len() == 1 && follow.last("a") == 23, "all are gone");
    }

    #[test]
    fn an_event_is_one_line() {
        assert_eq!(visible("Grüße".as_bytes()), "Grüße");
        assert_eq!(visible(b"a\nb\t\x1b[2J\\\xff\x7f"), r"a\nb\t\u{1b}[2J\\\xff\u{7f}");
    }
}
