//! Measures event streams: many subscribers to one topic, and one publisher of numbered events with timestamps.
//!
//! ```text
//! all subscribe -> events of number 0 until each has got one -> events 1, 2, 3 … at a rate -> until each has got the last
//! ```
//! There are two threads, so that the publisher keeps its schedule while the subscribers read. The main thread has one
//! `epoll_wait` for all subscribers. The publisher's thread waits for each response on a keep-alive connection. `stream`, which
//! classifies the events, does no I/O.
//!
//! An event contains the time just before its request was sent. If a response arrives only after the next event is due, the
//! next event is sent immediately, and `late_max_us` reports the delay.

mod options;
mod publisher;
mod report;
mod stream;
mod subscribers;

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Instant;

pub(crate) use options::EventsOptions;
use publisher::Publisher;
use report::{Outcome, Report};
use subscribers::Subscribers;

use crate::cpu;
use crate::error::Error;
use crate::memory;
use crate::target::Peer;

/// Signals between the two threads.
#[derive(Debug, Default)]
struct Signals {
    /// Whether each subscriber has received an event.
    all_subscribed: AtomicBool,
    /// Whether the last event has been published.
    is_published: AtomicBool,
    /// Whether publishing ended before the first measured event.
    has_failed: AtomicBool,
}

/// The CPU time and memory that the server has used.
#[derive(Debug, Default, Clone, Copy)]
struct Usage {
    cpu: std::time::Duration,
    memory: u64,
}

/// Runs the measurement that `options` describe.
pub(crate) fn measure(peer: &Peer, options: &EventsOptions) -> Result<Report, Error> {
    let clock = Instant::now();
    let signals = Signals::default();
    let at_start = usage(options)?;
    let mut subscribers = Subscribers::new(peer, options, clock)?;
    subscribers.open()?;
    let (published, own_cpu) = thread::scope(|scope| {
        let publisher = scope.spawn(|| {
            let published = Publisher::new(peer, options, clock).run(&signals);
            signals.has_failed.store(published.is_err(), Ordering::Release);
            signals.is_published.store(true, Ordering::Release);
            published
        });
        let read = subscribers.read(&signals);
        signals.all_subscribed.store(true, Ordering::Release); // set even on failure, so that the publisher stops
        let published = publisher.join().expect("the publisher does not panic")?;
        Ok::<_, Error>((published, cpu::own()?.saturating_sub(read?)))
    })?;
    let outcome = Outcome { at_start, at_end: usage(options)?, own_cpu, seen: subscribers.finish(), published };
    Ok(Report::new(options, &outcome))
}

fn usage(options: &EventsOptions) -> Result<Usage, Error> {
    if options.pids.is_empty() {
        return Ok(Usage::default());
    }
    Ok(Usage { memory: memory::of_trees(&options.pids)?, cpu: cpu::of_trees(&options.pids)? })
}
