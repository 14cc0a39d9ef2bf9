//! Crash tests of the event log. Publishers are killed at each marked step and at every instruction, and publishers and readers are killed
//! at random. No event is torn or delivered twice, no confirmed event is lost, the ids of each topic have no gap, and every sleeping reader
//! is woken.
//!
//! FORKYARD_KILLS sets the number of random deaths (default 300).
#![expect(clippy::print_stdout, reason = "the test prints its own report")]

mod common;

use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::path::Path;
use std::time::Duration;

use common::image::{Slate, Watch};
use common::{Child, await_stop, not_longer_than, spawn, stepped};
use forkyard_shm::{Event, Events, Plan, PublishError, Segment, Tail, Tailed, crash};
use nix::sys::ptrace;
use nix::sys::signal::{Signal, kill, raise};
use xxhash_rust::xxh3::xxh3_64;

const HANGS: Duration = Duration::from_secs(120);
const TOPIC: &str = "prices";

fn main() {
    common::run(&[
        ("killed_at_each_mark", killed_at_each_mark),
        ("killed_at_every_instruction", killed_at_every_instruction),
        ("sleeping_readers_are_woken_by_the_next_publisher", sleeping_readers_are_woken_by_the_next_publisher),
        ("killed_at_random", killed_at_random),
        ("a_stopped_publisher_blocks_no_reader", a_stopped_publisher_blocks_no_reader),
    ]);
}

fn segment(events_bytes: u64) -> Segment {
    Segment::create(&Plan { rows: 8, events_bytes, ..Plan::default() }).expect("segment")
}

/// Returns the expected data of an event.
fn data_of(topic: &str, seed: u64) -> Vec<u8> {
    let mut data = seed.to_le_bytes().to_vec();
    let length = usize::try_from(seed % 1500).expect("small");
    data.extend((0..length).map(|at| (xxh3_64(topic.as_bytes()) ^ seed).to_le_bytes()[at % 8]));
    data
}

fn assert_whole(event: &Event) {
    let seed = event.data.first_chunk().copied().map(u64::from_le_bytes).expect("the data begins with a seed");
    assert!(event.data == data_of(&event.topic, seed), "{} {} is torn", event.topic, event.id);
}

fn publish(events: &Events, topic: &str, seed: u64) -> u64 {
    let data = data_of(topic, seed);
    loop {
        match events.publish(topic, "kind", &data) {
            Ok(id) => return id,
            // The owner of the lock got no CPU time, because other tests are running at the same time.
            Err(PublishError::Busy) => std::thread::yield_now(),
            Err(why) => panic!("{why}"),
        }
    }
}

fn publish_all(events: &Events, topic: &str, seeds: std::ops::Range<u64>) {
    for seed in seeds {
        publish(events, topic, seed);
    }
}

// ---- deaths at each mark ----

/// A scene: its name, and a function that publishes the events before the death.
type Scene = (&'static str, fn(&Events));

const SCENES: [Scene; 5] = [
    ("a new topic", |_| ()),
    ("a known topic", |events| publish_all(events, TOPIC, 7..8)),
    ("a reader may be sleeping", |events| {
        events.wait(events.sequence(), Duration::from_millis(1));
    }),
    ("a log that is full", |events| publish_all(events, TOPIC, 200..500)),
    ("a table that is full", |events| {
        let most = events.stats().most_topics;
        (0..most).for_each(|topic| publish_all(events, &topic.to_string(), 2..3));
        publish_all(events, "1", 1200..1400);
    }),
];

/// Makes a child publish and die at a mark. Returns false if the child finished before it reached this mark.
fn dies(events: &Events, at: u64, topic: &str) -> bool {
    not_longer_than(HANGS);
    let child = spawn(|_| {
        crash::die_at(at);
        publish(events, topic, 1499);
    });
    !child.ended()
}

fn killed_at_each_mark(_seed: u64) {
    let mut passed = BTreeSet::new();
    for (name, prepare) in SCENES {
        let (mut deaths, mut deaths_after) = (0, 0);
        for at in 0.. {
            let mut again = 0;
            // The next publisher also dies, at each mark in turn, until a publisher finishes before it reaches its mark.
            loop {
                let segment = segment(64 * 1024);
                let events = segment.events();
                prepare(&events);
                let (mut tail, before) = (events.tail(), events.last_id(TOPIC));
                if !dies(&events, at, TOPIC) {
                    break;
                }
                let died_again = dies(&events, again, "other");
                seen(&mut tail)
                    .and_then(|seen| verify(&events, Some(&seen), before))
                    .unwrap_or_else(|why| panic!("{name}, {at} and {again}: {why}"));
                (deaths, deaths_after) = (deaths + u64::from(again == 0), deaths_after + u64::from(died_again));
                if !died_again {
                    break;
                }
                again += 1;
            }
            if again == 0 {
                break;
            }
        }
        let events = segment(64 * 1024).events();
        prepare(&events);
        crash::die_at(u64::MAX - 1);
        publish(&events, TOPIC, 1499);
        passed.extend(crash::points_passed());
        crash::die_at(u64::MAX);
        println!("  {name}: {deaths} deaths, {deaths_after} of the next publisher");
        assert!(deaths > 5);
    }
    for mark in marks_of_the_sources() {
        assert!(passed.contains(mark.as_str()), "no scene passes {mark:?}");
    }
}

/// Returns the events of the topic that a tail returns.
fn seen(tail: &mut Tail) -> Result<Vec<Event>, String> {
    let mut seen = Vec::new();
    loop {
        match tail.next() {
            Tailed::Event(event) if *event.topic == *TOPIC => seen.push(event),
            Tailed::Event(_) => {}
            Tailed::Gap => return Err("a gap".to_owned()),
            Tailed::CaughtUp => return Ok(seen),
        }
    }
}

/// Checks a log after one or two deaths. The event is either present or absent, and with `by_tail`, a tail has returned the same events.
fn verify(events: &Events, by_tail: Option<&[Event]>, before: u64) -> Result<(), String> {
    events.audit()?;
    let since = events.since(TOPIC, before, 10);
    since.events.iter().for_each(assert_whole);
    let ids: Vec<u64> = since.events.iter().map(|event| event.id).collect();
    if by_tail.is_some_and(|seen| *seen != since.events) {
        return Err(format!("a tail says {by_tail:?}, and since {ids:?}"));
    }
    let last = ids.last().copied().unwrap_or(before);
    if ids.len() > 1 || last != events.last_id(TOPIC).max(before) && !ids.is_empty() {
        return Err(format!("{ids:?} after {before}, and {} was the last", events.last_id(TOPIC)));
    }
    let next = publish(events, TOPIC, 3);
    if !ids.is_empty() && next != last + 1 || next <= before {
        return Err(format!("{next} follows {last}"));
    }
    if events.since(TOPIC, next - 1, 10).events.len() != 1 {
        return Err(format!("{next} is not to be had"));
    }
    events.audit()
}

// ---- deaths at every instruction ----

/// Checks each state of the memory in which a publisher could die, like `single_step.rs` for the cache.
fn killed_at_every_instruction(_seed: u64) {
    for (name, prepare) in SCENES {
        let segment = segment(64 * 1024);
        let events = segment.events();
        prepare(&events);
        let before = events.last_id(TOPIC);
        let mut watch = Watch::of(&segment);
        let slate = Slate::for_images_like(&watch.image);
        let child = spawn(|_| {
            ptrace::traceme().expect("traceme");
            publish(&events, "1", 2); // becomes a member
            raise(Signal::SIGSTOP).expect("raise");
            publish(&events, TOPIC, 40);
        });
        await_stop(child.pid);
        watch.renew();
        let (mut instructions, mut states, mut published) = (0_u64, 0_u64, 0_u64);
        while stepped(child.pid) {
            not_longer_than(HANGS);
            instructions += 1;
            if watch.renew() {
                states += 1;
                let copy = slate.pour(&watch.image).events();
                published += copy.since(TOPIC, before, 1).events.len() as u64;
                verify(&copy, None, before).unwrap_or_else(|why| panic!("{name}, instruction {instructions}: {why}"));
            }
        }
        println!("  {name}: {instructions} instructions, {states} states, {published} of them with the event");
        assert!(published > 3 && states > published + 10);
    }
}

// ---- sleeping readers ----

/// Checks that the next publisher wakes all sleeping readers after a publisher has died at any step.
fn sleeping_readers_are_woken_by_the_next_publisher(_seed: u64) {
    let mut deaths = 0;
    loop {
        not_longer_than(HANGS);
        let events = segment(64 * 1024).events();
        let seen = events.sequence();
        let sleepers: Vec<Child> = (0..2).map(|_| sleeper(&events, seen)).collect();
        let died = dies(&events, deaths, TOPIC);
        if died {
            publish(&events, TOPIC, 1);
        }
        sleepers.into_iter().for_each(Child::join);
        if !died {
            break;
        }
        deaths += 1;
    }
    println!("  {deaths} deaths");
    assert!(deaths > 10);
}

/// Starts a child that sleeps until an event is published, with a timeout longer than the limit of this test.
fn sleeper(events: &Events, seen: u32) -> Child {
    let mut child = spawn(|mut pipe| {
        common::say_ready(&mut pipe);
        while events.wait(seen, HANGS * 10) == seen {}
    });
    child.await_ready();
    let stat = format!("/proc/{}/stat", child.pid);
    while !std::fs::read_to_string(&stat).expect("the process is running").contains(") S ") {
        std::thread::yield_now();
    }
    child
}

fn marks_of_the_sources() -> BTreeSet<String> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/events");
    let sources = std::fs::read_dir(folder).expect("the sources exist").map(|entry| entry.expect("entry").path());
    let text: String = sources.map(|path| std::fs::read_to_string(path).expect("a source is text")).collect();
    let names: BTreeSet<String> = text
        .lines()
        .filter(|line| line.contains("crash::point("))
        .flat_map(|line| line.split('"').skip(1).step_by(2))
        .map(str::to_owned)
        .collect();
    assert!(names.len() > 10, "{names:?}");
    names
}

// ---- deaths at random ----

const TOPICS: [&str; 3] = ["0", "1", "2"];

/// Publishes endlessly, and reports each confirmed id.
fn publisher(events: &Events, mut said: File, seed: u64) {
    let mut random = fastrand::Rng::with_seed(seed);
    loop {
        let topic = random.usize(..TOPICS.len());
        let id = publish(events, TOPICS[topic], random.u64(..));
        let word = id << 8 | topic as u64;
        if said.write_all(&word.to_le_bytes()).is_err() {
            return;
        }
        if random.u8(..) < 64 {
            std::thread::sleep(Duration::from_micros(random.u64(..100))); // without this pause, the witness could not keep up
        }
    }
}

/// Reads endlessly, alternating between `since` and a tail.
fn reader(events: &Events, mut said: File) {
    let (mut tail, mut last) = (events.tail(), HashMap::new());
    common::say_ready(&mut said);
    let mut after = events.last_id("1");
    loop {
        let seen = events.sequence();
        loop {
            match tail.next() {
                Tailed::Event(event) => {
                    assert_whole(&event);
                    let before = last.insert(event.topic.clone(), event.id);
                    assert!(before.is_none_or(|before| before + 1 == event.id), "{before:?}, {}", event.id);
                }
                Tailed::Gap => last.clear(),
                Tailed::CaughtUp => break,
            }
        }
        let since = events.since("1", after, 100);
        if let (Some(first), Some(newest)) = (since.events.first(), since.events.last()) {
            assert_eq!(first.id, after + 1 + since.missed);
            after = newest.id;
        }
        events.wait(seen, Duration::from_secs(1));
    }
}

/// The observations of a process that is not killed.
struct Witness {
    tail: Tail,
    last: HashMap<Box<str>, u64>,
    /// Topics that may have a gap before their next event.
    unsure: BTreeSet<Box<str>>,
    gaps: u64,
}

impl Witness {
    fn look(&mut self) {
        loop {
            match self.tail.next() {
                Tailed::Event(event) => {
                    assert_whole(&event);
                    let last = self.last.entry(event.topic.clone()).or_default();
                    let is_next = event.id == *last + 1 || self.unsure.remove(&event.topic) && event.id > *last;
                    assert!(is_next, "{} of topic {} arrived after {last}", event.id, event.topic);
                    *last = event.id;
                }
                Tailed::Gap => {
                    self.unsure.extend(TOPICS.map(Box::from));
                    self.gaps += 1;
                }
                Tailed::CaughtUp => return,
            }
        }
    }
}

/// Runs with a log that is large enough for all events, and with a smaller log.
fn killed_at_random(seed: u64) {
    let kills = common::number("FORKYARD_KILLS").unwrap_or(300);
    for (bytes, kills) in [(64 << 20, kills), (64 << 10, kills)] {
        let segment = segment(bytes);
        let events = segment.events();
        let (gaps, confirmed) = kill_at_random(&events, kills, seed);
        events.audit().expect("the log is consistent");
        let stats = events.stats();
        println!("  {kills} kills: {} events, {confirmed} confirmed, {gaps} gaps, {stats:?}", stats.published);
        assert!(stats.restarts == 0 && confirmed > kills && (gaps == 0 || stats.evicted > 0));
    }
}

/// Returns the number of observed gaps and the number of confirmed events.
fn kill_at_random(events: &Events, kills: u64, seed: u64) -> (u64, u64) {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut witness = Witness { tail: events.tail(), last: HashMap::new(), unsure: BTreeSet::new(), gaps: 0 };
    let mut children: Vec<(bool, Child)> = Vec::new();
    let mut confirmed = 0;
    for _ in 0..kills {
        not_longer_than(HANGS);
        while children.len() < 6 {
            let publishes = children.iter().filter(|(publishes, _)| *publishes).count() < 3;
            let seed = random.u64(..);
            children.push((
                publishes,
                spawn(|pipe| if publishes { publisher(events, pipe, seed) } else { reader(events, pipe) }),
            ));
        }
        for _ in 0..random.u64(1..6) {
            std::thread::sleep(Duration::from_micros(random.u64(..500)));
            witness.look();
        }
        let (publishes, child) = children.swap_remove(random.usize(..children.len()));
        let mut said = child.ready.try_clone().expect("dup");
        child.kill();
        let mut words = Vec::new();
        said.read_to_end(&mut words).expect("the report of the child");
        if publishes {
            witness.look();
            for word in words.as_chunks().0.iter().map(|word| u64::from_le_bytes(*word)) {
                let (topic, id) = (TOPICS[usize::from(word.to_le_bytes()[0])], word >> 8);
                confirmed += 1;
                assert!(events.last_id(topic) >= id, "{id} of topic {topic} was confirmed");
                assert!(witness.gaps > 0 || witness.last[topic] >= id, "{id} of topic {topic} was confirmed");
            }
        }
    }
    children.into_iter().for_each(|(_, child)| child.kill());
    witness.look();
    (witness.gaps, confirmed)
}

fn a_stopped_publisher_blocks_no_reader(_seed: u64) {
    let segment = segment(64 * 1024);
    let (events, mut tail) = (segment.events(), segment.events().tail());
    publish(&events, TOPIC, 1);
    let mut child = spawn(|mut pipe| {
        common::say_ready(&mut pipe);
        publisher(&events, pipe, 5);
    });
    child.await_ready();
    kill(child.pid, Signal::SIGSTOP).expect("the process is running");
    let mut seen = 0;
    while let Tailed::Event(event) = tail.next() {
        assert_whole(&event);
        seen += 1;
    }
    println!("  {seen} events seen");
    assert!(events.last_id(TOPIC) == 1);
    child.kill();
    publish(&events, TOPIC, 2);
    events.audit().expect("the log is consistent");
}
