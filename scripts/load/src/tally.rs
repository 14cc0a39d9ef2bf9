//! Counts the outcomes and latencies of a run. Performs no I/O.

use std::time::Duration;

use hdrhistogram::Histogram;

/// The ways in which a request can fail. Each failed request is counted under exactly one of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The client could not connect: the connection was refused, the accept queue was full, or there were no free descriptors
    /// or ports.
    Connect,
    /// The server closed the connection before the first byte of a response. (A web server may send such a request again.)
    Dropped,
    /// The server closed the connection in the middle of the response.
    Cut,
    /// The response violates its protocol.
    Malformed,
    /// FastCGI's END_REQUEST reports that the request was not served.
    Refused,
    /// The response is complete, but the status is not 200.
    Status,
    /// The response is complete, but the body has the wrong length.
    Length,
    /// The response is complete and has the right length, but its body differs from the body of the first response.
    Content,
    /// The response was not complete in time.
    Timeout,
}

/// A failure.
#[derive(Debug)]
pub(crate) struct Fault {
    pub(crate) kind: Kind,
    pub(crate) what: String,
}

/// Counts and latencies since the measurement began.
#[derive(Debug)]
pub(crate) struct Tally {
    pub(crate) ok: u64,
    pub(crate) connections: u64,
    faults: [Count; Kind::ALL.len()],
    latency_ns: Histogram<u64>,
}

#[derive(Debug, Default)]
struct Count {
    times: u64,
    first: Option<String>,
}

impl Kind {
    pub(crate) const ALL: [Self; 9] = [
        Self::Connect,
        Self::Dropped,
        Self::Cut,
        Self::Malformed,
        Self::Refused,
        Self::Status,
        Self::Length,
        Self::Content,
        Self::Timeout,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Connect => "connect",
            Self::Dropped => "dropped",
            Self::Cut => "cut",
            Self::Malformed => "malformed",
            Self::Refused => "refused",
            Self::Status => "status",
            Self::Length => "length",
            Self::Content => "content",
            Self::Timeout => "timeout",
        }
    }
}

impl Fault {
    pub(crate) fn new(kind: Kind, what: impl Into<String>) -> Self {
        Self { kind, what: what.into() }
    }
}

impl Tally {
    /// Maximum latency that is recorded. Longer latencies are counted as this value.
    const LONGEST: Duration = Duration::from_secs(3600);

    pub(crate) fn new() -> Self {
        let longest_ns = u64::try_from(Self::LONGEST.as_nanos()).expect("an hour is less than 2^64 ns");
        let latency_ns = Histogram::new_with_max(longest_ns, 2).expect("bounds and precision are in range");
        Self { ok: 0, connections: 0, faults: Default::default(), latency_ns }
    }

    pub(crate) fn right(&mut self, latency: Duration) {
        self.ok += 1;
        self.latency_ns.saturating_record(u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX));
    }

    pub(crate) fn wrong(&mut self, fault: Fault) {
        let count = &mut self.faults[fault.kind as usize];
        count.times += 1;
        count.first.get_or_insert(fault.what);
    }

    /// Returns the number of completed requests, successful or not.
    pub(crate) fn finished(&self) -> u64 {
        self.ok + self.errors()
    }

    pub(crate) fn errors(&self) -> u64 {
        self.faults.iter().map(|count| count.times).sum()
    }

    /// Returns the number of failures of this kind, and the first message.
    pub(crate) fn faults(&self, kind: Kind) -> (u64, Option<&str>) {
        let count = &self.faults[kind as usize];
        (count.times, count.first.as_deref())
    }

    /// Returns one of the failures, if there were any.
    pub(crate) fn first_fault(&self) -> Option<Fault> {
        let mut faults = Kind::ALL.into_iter().map(|kind| (kind, self.faults(kind).1));
        faults.find_map(|(kind, first)| Some(Fault::new(kind, first?)))
    }

    /// Returns the latency of successful requests at `quantile`, accurate to 1 %.
    pub(crate) fn latency(&self, quantile: f64) -> Duration {
        Duration::from_nanos(self.latency_ns.value_at_quantile(quantile))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_has_its_own_count() {
        let mut tally = Tally::new();
        for (index, kind) in Kind::ALL.into_iter().enumerate() {
            assert_eq!(kind as usize, index);
            (0..=index).for_each(|time| tally.wrong(Fault::new(kind, format!("time {time}"))));
        }
        for (index, kind) in Kind::ALL.into_iter().enumerate() {
            assert_eq!(tally.faults(kind), (index as u64 + 1, Some("time 0")));
        }
        assert_eq!(tally.errors(), 45);
        tally.right(Duration::from_secs(1));
        assert_eq!(tally.finished(), 46);
    }

    #[test]
    fn quantiles_are_within_one_percent() {
        let mut tally = Tally::new();
        (1..=1000).for_each(|us| tally.right(Duration::from_micros(us)));
        for (quantile, us) in [(0.5, 500.0), (0.9, 900.0), (0.99, 990.0), (1.0, 1000.0)] {
            let found = tally.latency(quantile).as_secs_f64() * 1e6;
            assert!((found / us - 1.0).abs() < 0.01, "{quantile}: {found}");
        }
    }

    #[test]
    fn absurd_latencies_are_kept_in_range() {
        let mut tally = Tally::new();
        tally.right(Duration::MAX);
        assert!(tally.latency(1.0) >= Tally::LONGEST);
        assert_eq!(Tally::new().latency(0.5), Duration::ZERO);
    }
}
