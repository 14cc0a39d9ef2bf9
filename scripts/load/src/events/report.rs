//! Prints the report on event streams, as text or as one line of JSON.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use serde::Serialize;

use super::publisher::Published;
use super::subscribers::Seen;
use super::{EventsOptions, Usage};
use crate::cpu::MEASURABLE;
use crate::error::Error;
use crate::report::{each, rounded};
use crate::tally::{Kind, Tally};

/// The result of a run.
pub(super) struct Outcome {
    pub(super) at_start: Usage,
    pub(super) at_end: Usage,
    pub(super) own_cpu: Duration,
    pub(super) seen: Seen,
    pub(super) published: Published,
}

/// The figures of one run. The field names are the names in the JSON.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    target: String,
    subscribers: u32,
    rate: u32,
    events: u64,
    /// Time from the first event to the response to the last event.
    publish_seconds: f64,
    /// Largest delay of an event because the previous event had not been answered.
    late_max_us: f64,
    /// Time from the request that publishes an event to the response.
    publish_p50_us: f64,
    publish_p99_us: f64,
    deliveries: u64,
    /// Number of events that a subscriber did not receive.
    missing: u64,
    /// Number of events that a subscriber received twice or out of order.
    doubled: u64,
    deliveries_per_second: f64,
    /// Time from just before the request that publishes an event until a subscriber has read the event.
    latency_p50_us: f64,
    latency_p99_us: f64,
    latency_max_us: f64,
    errors: u64,
    errors_by_kind: BTreeMap<&'static str, u64>,
    /// CPU time per delivery.
    server_cpu_us: Option<f64>,
    client_cpu_us: Option<f64>,
    /// Memory of the server before the first subscription.
    memory_bytes_before: Option<u64>,
    /// Memory of the server at the end.
    memory_bytes: Option<u64>,
    /// Growth of the server's memory, per subscriber, until all had subscribed.
    memory_each_subscribed: Option<u64>,
    /// Growth of the server's memory, per subscriber, until the end.
    memory_each: Option<u64>,
}

impl Report {
    pub(super) fn new(options: &EventsOptions, outcome: &Outcome) -> Self {
        let Outcome { at_start, at_end, seen, published, .. } = outcome;
        let is_watched = !options.pids.is_empty();
        let server_cpu = at_end.cpu.saturating_sub(published.before.cpu);
        let grown = |to: &Usage| to.memory.saturating_sub(at_start.memory) / u64::from(options.subscribers);
        let kinds = Kind::ALL.into_iter().map(|kind| {
            let times = seen.tally.faults(kind).0 + published.tally.faults(kind).0;
            (kind.name(), times)
        });
        let seconds = seen.elapsed.as_secs_f64();
        Self {
            target: options.connect.to_string(),
            subscribers: options.subscribers,
            rate: options.rate,
            events: options.events(),
            publish_seconds: rounded(published.elapsed.as_secs_f64(), 3),
            late_max_us: micros(published.late),
            publish_p50_us: at(&published.tally, 0.5),
            publish_p99_us: at(&published.tally, 0.99),
            deliveries: seen.tally.ok,
            missing: seen.missing,
            doubled: seen.doubled,
            deliveries_per_second: rounded(if seconds > 0.0 { seen.tally.ok as f64 / seconds } else { 0.0 }, 0),
            latency_p50_us: at(&seen.tally, 0.5),
            latency_p99_us: at(&seen.tally, 0.99),
            latency_max_us: at(&seen.tally, 1.0),
            errors: seen.tally.errors() + published.tally.errors(),
            errors_by_kind: kinds.filter(|(_, times)| *times > 0).collect(),
            server_cpu_us: (is_watched && server_cpu >= MEASURABLE).then(|| each(server_cpu, seen.tally.ok)).flatten(),
            client_cpu_us: each(outcome.own_cpu, seen.tally.ok),
            memory_bytes_before: is_watched.then_some(at_start.memory),
            memory_bytes: is_watched.then_some(at_end.memory),
            memory_each_subscribed: is_watched.then(|| grown(&published.before)),
            memory_each: is_watched.then(|| grown(at_end)),
        }
    }

    /// Returns whether every subscriber received every event, once and in order.
    pub(crate) fn clean(&self) -> bool {
        self.missing == 0 && self.doubled == 0 && self.errors == 0
    }

    pub(crate) fn json(&self) -> Result<String, Error> {
        serde_json::to_string(self).map_err(|error| Error::Output(error.into()))
    }
}

fn at(tally: &Tally, quantile: f64) -> f64 {
    micros(tally.latency(quantile))
}

fn micros(time: Duration) -> f64 {
    rounded(time.as_secs_f64() * 1e6, 1)
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}, {} subscribers, {} events at {}/s", self.target, self.subscribers, self.events, self.rate)?;
        let Self { publish_p50_us, publish_p99_us, publish_seconds, late_max_us, .. } = self;
        writeln!(
            f,
            "published  in {publish_seconds} s; answered p50 {publish_p50_us:.0} µs, p99 {publish_p99_us:.0} µs; \
             sent at most {late_max_us:.0} µs late"
        )?;
        let Self { deliveries, missing, doubled, deliveries_per_second, .. } = self;
        writeln!(f, "deliveries {deliveries}, {deliveries_per_second:.0}/s; missing {missing}, doubled {doubled}")?;
        let Self { latency_p50_us, latency_p99_us, latency_max_us, .. } = self;
        writeln!(f, "latency    p50 {latency_p50_us:.0} µs, p99 {latency_p99_us:.0} µs, max {latency_max_us:.0} µs")?;
        writeln!(f, "errors     {} {:?}", self.errors, self.errors_by_kind)?;
        let micros = |time: Option<f64>| time.map_or("unknown".into(), |time| format!("{time:.2} µs/delivery"));
        writeln!(f, "cpu        server {}, client {}", micros(self.server_cpu_us), micros(self.client_cpu_us))?;
        let bytes = |bytes: Option<u64>| bytes.map_or("unknown".into(), |bytes| format!("{bytes} bytes"));
        write!(
            f,
            "memory     {} at first, {} at the end; each subscriber {}, with its events {}",
            bytes(self.memory_bytes_before),
            bytes(self.memory_bytes),
            bytes(self.memory_each_subscribed),
            bytes(self.memory_each)
        )
    }
}
