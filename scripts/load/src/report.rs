//! Prints the report on a run, as text or as one line of JSON.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use serde::Serialize;

use crate::error::Error;
use crate::options::Options;
use crate::run::Outcome;
use crate::tally::{Kind, Tally};

/// The figures of one run. The field names are the names in the JSON.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    target: String,
    uri: String,
    clients: u32,
    kept: bool,
    seconds: f64,
    /// Number of completed requests, successful or not.
    requests: u64,
    ok: u64,
    /// Successful requests per second.
    rate: f64,
    latency_us: Latency,
    errors: u64,
    errors_by_kind: BTreeMap<&'static str, u64>,
    /// The first message for each kind of error that occurred.
    first_errors: BTreeMap<&'static str, String>,
    warmup_errors: u64,
    in_flight: u64,
    starved: u64,
    unserved_clients: u64,
    connections: u64,
    /// CPU time per successful request.
    server_cpu_us: Option<f64>,
    part_cpu_us: Option<f64>,
    client_cpu_us: Option<f64>,
}

#[derive(Debug, Serialize)]
struct Latency {
    p50: f64,
    p90: f64,
    p99: f64,
    max: f64,
}

impl Report {
    pub(crate) fn new(options: &Options, outcome: &Outcome) -> Self {
        let tally = &outcome.tally;
        let seconds = outcome.elapsed.as_secs_f64();
        let faults = || Kind::ALL.into_iter().map(|kind| (kind.name(), tally.faults(kind)));
        Self {
            target: options.connect.to_string(),
            uri: options.uri.clone(),
            clients: options.clients,
            kept: !options.fresh,
            seconds: rounded(seconds, 3),
            requests: tally.finished(),
            ok: tally.ok,
            rate: rounded(if seconds > 0.0 { tally.ok as f64 / seconds } else { 0.0 }, 1),
            latency_us: Latency::new(tally),
            errors: tally.errors(),
            errors_by_kind: faults().map(|(name, (times, _))| (name, times)).collect(),
            first_errors: faults().filter_map(|(name, (_, first))| Some((name, first?.to_owned()))).collect(),
            warmup_errors: outcome.warmup_errors,
            in_flight: outcome.in_flight,
            starved: outcome.starved,
            unserved_clients: outcome.unserved,
            connections: tally.connections,
            server_cpu_us: outcome.server_cpu.and_then(|time| each(time, tally.ok)),
            part_cpu_us: outcome.part_cpu.and_then(|time| each(time, tally.ok)),
            client_cpu_us: each(outcome.own_cpu, tally.ok),
        }
    }

    /// Returns whether every response was correct and every request was served.
    pub(crate) fn clean(&self) -> bool {
        self.errors == 0 && self.warmup_errors == 0 && self.starved == 0
    }

    pub(crate) fn json(&self) -> Result<String, Error> {
        serde_json::to_string(self).map_err(|error| Error::Output(error.into()))
    }
}

impl Latency {
    fn new(tally: &Tally) -> Self {
        let at = |quantile| rounded(tally.latency(quantile).as_secs_f64() * 1e6, 1);
        Self { p50: at(0.5), p90: at(0.9), p99: at(0.99), max: at(1.0) }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let connections = if self.kept { "kept" } else { "fresh" };
        writeln!(
            f,
            "{} {}, {} clients, {connections} connections, {} s",
            self.target, self.uri, self.clients, self.seconds
        )?;
        writeln!(f, "requests  {} ended, {} ok, {:.0} ok/s", self.requests, self.ok, self.rate)?;
        let Latency { p50, p90, p99, max } = self.latency_us;
        writeln!(f, "latency   p50 {p50:.0} µs, p90 {p90:.0} µs, p99 {p99:.0} µs, max {max:.0} µs")?;
        write!(f, "errors    {}", self.errors)?;
        for (kind, times) in self.errors_by_kind.iter().filter(|(_, times)| **times > 0) {
            let first = self.first_errors.get(kind).map_or("", String::as_str);
            write!(f, "\n          {kind} {times} (first: {first})")?;
        }
        if self.warmup_errors > 0 {
            write!(f, "\n          and {} in the warm-up", self.warmup_errors)?;
        }
        writeln!(f, "\nstarved   {} of {} in flight at the end", self.starved, self.in_flight)?;
        if self.unserved_clients > 0 {
            writeln!(f, "          {} clients never got an answer", self.unserved_clients)?;
        }
        let micros = |time: Option<f64>| time.map_or("unknown".into(), |time| format!("{time:.1} µs/request"));
        write!(f, "cpu       server {}, ", micros(self.server_cpu_us))?;
        if self.part_cpu_us.is_some() {
            write!(f, "its part {}, ", micros(self.part_cpu_us))?;
        }
        write!(f, "client {}", micros(self.client_cpu_us))
    }
}

pub(crate) fn each(time: Duration, requests: u64) -> Option<f64> {
    (requests > 0).then(|| rounded(time.as_secs_f64() * 1e6 / requests as f64, 2))
}

pub(crate) fn rounded(value: f64, digits: i32) -> f64 {
    let scale = 10_f64.powi(digits);
    (value * scale).round() / scale
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::Arguments;
    use crate::tally::Fault;
    use clap::Parser as _;

    fn options() -> Options {
        let arguments = Arguments::parse_from(["forkyard-load", "--connect", "http:localhost:80"]);
        arguments.options.expect("the command line describes a run of requests")
    }

    fn outcome() -> Outcome {
        let mut tally = Tally::new();
        (0..4).for_each(|_| tally.right(Duration::from_micros(100)));
        tally.wrong(Fault::new(Kind::Cut, "reset"));
        Outcome {
            tally,
            elapsed: Duration::from_secs(2),
            in_flight: 3,
            starved: 1,
            unserved: 2,
            warmup_errors: 0,
            server_cpu: Some(Duration::from_micros(40)),
            part_cpu: Some(Duration::from_micros(20)),
            own_cpu: Duration::from_micros(8),
        }
    }

    #[test]
    fn rates_count_only_good_requests() {
        let options = options();
        let report = Report::new(&options, &outcome());
        assert_eq!((report.requests, report.ok, report.errors, report.rate), (5, 4, 1, 2.0));
        assert_eq!((report.server_cpu_us, report.client_cpu_us), (Some(10.0), Some(2.0)));
        assert_eq!(report.part_cpu_us, Some(5.0));
        assert!(!report.clean());
        let text = report.to_string();
        assert!(text.contains("cut 1 (first: reset)") && text.contains("starved   1 of 3"), "{text}");
        let json: serde_json::Value = serde_json::from_str(&report.json().unwrap()).unwrap();
        assert_eq!(json["errors_by_kind"]["cut"], 1);
        assert_eq!(json["starved"], 1);
    }

    #[test]
    fn without_a_good_request_there_is_no_time_per_request() {
        assert_eq!(each(Duration::from_secs(1), 0), None);
    }

    #[test]
    fn errors_in_the_warm_up_and_starving_are_not_clean() {
        let options = options();
        let with = |warmup_errors, starved| {
            let mut outcome = Outcome { warmup_errors, starved, ..outcome() };
            outcome.tally = Tally::new();
            Report::new(&options, &outcome).clean()
        };
        assert!(with(0, 0));
        assert!(!with(1, 0));
        assert!(!with(0, 1));
    }
}
