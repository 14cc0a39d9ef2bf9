//! Measures the event log: publishing, with and without a sleeping reader that must be woken, and reading.
//!
//! Publishers and readers are threads of one process. The log does not distinguish threads from processes, because all communication uses
//! the shared memory. The table shows the median of the rounds. The result of a round is the mean time of an operation, or the median time
//! if each operation is timed individually.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use clap::Args;
use forkyard_shm::{Events, Plan, PublishError, Segment, Tailed};

use crate::error::Error;
use crate::say;

/// Measure the cost of publishing and reading events
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Number of rounds, of which the median is shown
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,

    /// Size of the log, in KiB; it has room for one topic per 4 KiB
    #[arg(long, value_name = "KIB", default_value_t = 1024, value_parser = clap::value_parser!(u64).range(128..=1 << 20))]
    log: u64,
}

/// Sizes of the events' data in bytes, by column.
const SIZES: [usize; 3] = [100, 1000, 8000];
/// Number of operations in a round.
const COUNT: u32 = 20_000;
/// Number of operations in a round with pauses between them.
const PACED: u32 = 500;
/// Pause in which a woken reader can go back to sleep.
const PACE: Duration = Duration::from_micros(200);

type Bench = fn(&Events, &[u8]) -> Result<f64, PublishError>;

const BENCHES: [(&str, Bench); 7] = [
    ("publish while no reader is sleeping", publish),
    ("publish while a second publisher is active", publish_beside_another),
    ("publish to changing topics, of which there are as many as possible", publish_to_any),
    ("publish while a reader is sleeping", |events, data| Ok(wake(events, data)?.0)),
    ("time from publication until the sleeping reader has the event", |events, data| Ok(wake(events, data)?.1)),
    ("read the next event of the log", next),
    ("read the last event of a topic", since),
];

/// Runs all measurements, and returns the table.
pub(crate) fn run(options: &Options) -> Result<String, Error> {
    let mut table = String::from("| ns |");
    SIZES.iter().for_each(|size| table += &format!(" {size} bytes |"));
    table += &format!("\n|---|{}\n", "--:|".repeat(SIZES.len()));
    for (name, bench) in BENCHES {
        say(name);
        let mut row = format!("| {name} |");
        for size in SIZES {
            let mut rounds = Vec::new();
            for _ in 0..options.rounds {
                let plan = Plan { rows: 1, events_bytes: options.log << 10, ..Plan::default() };
                let events = Segment::create(&plan).map_err(Error::Segment)?.events();
                rounds.push(bench(&events, &vec![b'x'; size]).map_err(Error::NotPublished)?);
            }
            row += &format!(" {:.0} |", median(&mut rounds));
        }
        table += &row;
        table.push('\n');
    }
    Ok(table)
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or_default()
}

/// Returns the mean time of a call in nanoseconds, over `count` calls.
fn mean(count: u32, mut call: impl FnMut(u32) -> Result<(), PublishError>) -> Result<f64, PublishError> {
    let begun = Instant::now();
    (0..count).try_for_each(&mut call)?;
    Ok(begun.elapsed().as_secs_f64() * 1e9 / f64::from(count))
}

fn publish(events: &Events, data: &[u8]) -> Result<f64, PublishError> {
    mean(COUNT, |_| events.publish("topic", "", data).map(drop))
}

fn publish_beside_another(events: &Events, data: &[u8]) -> Result<f64, PublishError> {
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !is_over.load(Ordering::Relaxed) {
                let _ = events.publish("other", "", data); // only the other publisher is measured
            }
        });
        let outcome = publish(events, data);
        is_over.store(true, Ordering::Relaxed);
        outcome
    })
}

fn publish_to_any(events: &Events, data: &[u8]) -> Result<f64, PublishError> {
    let topics: Vec<String> = (0..events.stats().most_topics).map(|number| format!("topic {number}")).collect();
    topics.iter().try_for_each(|topic| events.publish(topic, "", b"").map(drop))?;
    mean(COUNT, |number| events.publish(&topics[number as usize * 7919 % topics.len()], "", data).map(drop))
}

/// Returns the time of a publication that wakes a sleeping reader, and the time until the reader has the event.
fn wake(events: &Events, data: &[u8]) -> Result<(f64, f64), PublishError> {
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let (mut tail, mut delays) = (events.tail(), Vec::new());
            while !is_over.load(Ordering::Relaxed) {
                let seen = events.sequence();
                while let Tailed::Event(event) = tail.next() {
                    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
                    let published = Duration::from_micros(event.published_us);
                    delays.push(now.saturating_sub(published).as_secs_f64() * 1e9);
                }
                events.wait(seen, Duration::from_secs(1));
            }
            median(&mut delays)
        });
        let mut times = Vec::new();
        let outcome = (0..PACED).try_for_each(|_| {
            thread::sleep(PACE);
            let begun = Instant::now();
            events.publish("topic", "", data)?;
            times.push(begun.elapsed().as_secs_f64() * 1e9);
            Ok(())
        });
        is_over.store(true, Ordering::Relaxed);
        events.wake();
        let delay = reader.join().unwrap_or_default();
        outcome.map(|()| (median(&mut times), delay))
    })
}

fn next(events: &Events, data: &[u8]) -> Result<f64, PublishError> {
    let (mut spent, mut read) = (Duration::ZERO, 0_u32);
    while read < COUNT {
        let mut tail = events.tail();
        (0..64).try_for_each(|_| events.publish("topic", "", data).map(drop))?;
        let begun = Instant::now();
        while let Tailed::Event(event) = tail.next() {
            read += u32::from(event.id > 0);
        }
        spent += begun.elapsed();
    }
    Ok(spent.as_secs_f64() * 1e9 / f64::from(read))
}

fn since(events: &Events, data: &[u8]) -> Result<f64, PublishError> {
    let mut last = 0;
    for _ in 0..64 {
        last = events.publish("topic", "", data)?;
    }
    mean(COUNT, |_| {
        assert_eq!(events.since("topic", last - 1, 10).events.len(), 1);
        Ok(())
    })
}
