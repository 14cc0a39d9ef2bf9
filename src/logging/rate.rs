//! Limits the amount of logging with token buckets, and counts the lines that are left out. Pure: the time is passed
//! in.

use std::collections::HashMap;
use std::time::Duration;

use log::Level;

use super::line::Fields;

/// A point in time, relative to a moment that all callers share.
pub(crate) type Elapsed = Duration;

/// Interval between reports of the lines that were left out.
const REPORT_INTERVAL: Duration = Duration::from_secs(1);
/// The capacity of a bucket is its rate times this number of seconds. A burst of that size is logged completely.
const BURST_SECONDS: u32 = 8;

/// Admits `rate` tokens per second on average, and bursts of up to [`BURST_SECONDS`] times `rate`.
#[derive(Clone, Copy, Debug)]
struct Bucket {
    /// Tokens per second; 0 means no limit.
    rate: u64,
    burst: u64,
    /// When the bucket will be full if no more tokens are taken.
    full_at: Elapsed,
}

impl Bucket {
    fn new(rate: u64, burst: u64) -> Self {
        Self { rate, burst, full_at: Elapsed::ZERO }
    }

    /// Takes `cost` tokens, if they are available. A full bucket admits a cost above its capacity.
    fn admits(&mut self, cost: u64, now: Elapsed) -> bool {
        if self.rate == 0 {
            return true;
        }
        let time = |tokens: u64| {
            let nanos = u128::from(tokens) * 1_000_000_000 / u128::from(self.rate);
            Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
        };
        let full_at = self.full_at.max(now).saturating_add(time(cost));
        let admits = full_at.saturating_sub(now) <= time(self.burst.max(cost));
        if admits {
            self.full_at = full_at;
        }
        admits
    }
}

/// The lines and bytes left out since the last report.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct LeftOut {
    pub(crate) lines: u64,
    pub(crate) bytes: u64,
}

/// The decision about a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Admission {
    /// Lines left out earlier, to be reported before this line.
    pub(crate) left_out: Option<LeftOut>,
    pub(crate) is_admitted: bool,
}

/// Limits the bytes of one source of lines, and counts the lines that are left out.
#[derive(Debug)]
pub(crate) struct ByteLimit {
    bucket: Bucket,
    left_out: LeftOut,
    due: Option<Elapsed>,
}

impl ByteLimit {
    /// Creates a limit of `rate` bytes per second; 0 means no limit.
    pub(crate) fn new(rate: u64) -> Self {
        let bucket = Bucket::new(rate, rate.saturating_mul(u64::from(BURST_SECONDS)));
        Self { bucket, left_out: LeftOut::default(), due: None }
    }

    pub(crate) fn take(&mut self, bytes: usize, now: Elapsed) -> Admission {
        let bytes = bytes as u64;
        let is_admitted = self.bucket.admits(bytes, now);
        if !is_admitted {
            self.left_out.lines += 1;
            self.left_out.bytes += bytes;
            self.due.get_or_insert(now + REPORT_INTERVAL);
        }
        Admission { left_out: if is_admitted { self.end() } else { self.tick(now) }, is_admitted }
    }

    /// Returns the lines and bytes left out, if their report is due.
    pub(crate) fn tick(&mut self, now: Elapsed) -> Option<LeftOut> {
        if self.due.is_some_and(|due| due <= now) { self.end() } else { None }
    }

    /// Returns the lines and bytes left out, even if their report is not due yet.
    pub(crate) fn end(&mut self) -> Option<LeftOut> {
        self.due = None;
        Some(std::mem::take(&mut self.left_out)).filter(|left_out| left_out.lines > 0)
    }

    pub(crate) fn due(&self) -> Option<Elapsed> {
        self.due
    }
}

/// The place in the source that logs a line.
pub(super) type Site = (&'static str, u32);

/// A line that was left out, and the number of further lines that were left out with it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Sample {
    pub(super) level: Level,
    pub(super) target: String,
    pub(super) message: String,
    pub(super) fields: Fields,
    pub(super) more: u64,
}

/// Limits the lines from each place in the source, so that no client can flood the log through any of these places. For
/// each place, the last line that was left out is kept as a sample.
#[derive(Debug)]
pub(super) struct SiteLimits {
    /// Maximum number of lines per second from each place; 0 means no limit.
    rate: u32,
    sites: HashMap<Site, SiteState>,
}

#[derive(Debug)]
struct SiteState {
    bucket: Bucket,
    sample: Option<Sample>,
    due: Elapsed,
}

impl SiteLimits {
    pub(super) fn new(rate: u32) -> Self {
        Self { rate, sites: HashMap::new() }
    }

    /// Whether a line is logged. A line that is not logged is kept as a sample; `sample` is called only for such a
    /// line.
    pub(super) fn admits(&mut self, site: Site, now: Elapsed, sample: impl FnOnce() -> Sample) -> bool {
        if self.rate == 0 {
            return true;
        }
        let rate = u64::from(self.rate);
        let new = || SiteState { bucket: Bucket::new(rate, rate), sample: None, due: Elapsed::ZERO };
        let state = self.sites.entry(site).or_insert_with(new);
        if state.sample.is_none() && state.bucket.admits(1, now) {
            return true;
        }
        match &mut state.sample {
            None => {
                state.due = now + REPORT_INTERVAL;
                state.sample = Some(sample());
            }
            Some(kept) => {
                let more = kept.more + 1;
                *kept = Sample { more, ..sample() };
            }
        }
        false
    }

    /// Returns the samples that are due to be logged.
    pub(super) fn tick(&mut self, now: Elapsed) -> Vec<Sample> {
        self.sites.values_mut().filter(|state| state.due <= now).filter_map(|state| state.sample.take()).collect()
    }

    /// Returns the time at which the next sample is due. It may become due without another line.
    pub(super) fn due(&self) -> Option<Elapsed> {
        self.sites.values().filter(|state| state.sample.is_some()).map(|state| state.due).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_gets_its_rate_and_every_line_left_out_is_counted() {
        for seed in 0..300 {
            let mut random = fastrand::Rng::with_seed(seed);
            let rate = random.u64(100..10_000);
            let (mut limit, mut now) = (ByteLimit::new(rate), Elapsed::from_secs(3));
            let begun = now;
            let (mut admitted, mut written, mut reported) =
                (LeftOut::default(), LeftOut::default(), LeftOut::default());
            let add = |to: &mut LeftOut, lines: u64, bytes: u64| {
                to.lines += lines;
                to.bytes += bytes;
            };
            for _ in 0..2000 {
                now += Elapsed::from_micros(random.u64(0..20_000));
                if random.u32(0..5) == 0
                    && let Some(count) = limit.tick(now)
                {
                    add(&mut reported, count.lines, count.bytes);
                }
                let bytes = random.usize(1..400);
                add(&mut written, 1, bytes as u64);
                let admission = limit.take(bytes, now);
                if let Some(count) = admission.left_out {
                    add(&mut reported, count.lines, count.bytes);
                }
                if admission.is_admitted {
                    add(&mut admitted, 1, bytes as u64);
                }
                assert!(limit.due().is_none_or(|due| due <= now + REPORT_INTERVAL), "seed {seed}");
            }
            let rest = limit.end().unwrap_or_default();
            add(&mut reported, rest.lines, rest.bytes);
            assert_eq!(admitted.lines + reported.lines, written.lines, "seed {seed}");
            assert_eq!(admitted.bytes + reported.bytes, written.bytes, "seed {seed}");
            let most = rate as f64 * ((now - begun).as_secs_f64() + f64::from(BURST_SECONDS)) + 1.0;
            assert!(admitted.bytes as f64 <= most, "seed {seed}: {} of {most}", admitted.bytes);
        }
    }

    #[test]
    fn a_line_longer_than_the_burst_is_logged_when_nothing_else_was() {
        let mut limit = ByteLimit::new(10);
        let now = Elapsed::from_secs(1);
        assert!(limit.take(5000, now).is_admitted);
        assert!(!limit.take(1, now).is_admitted);
        assert!(ByteLimit::new(0).take(usize::MAX, now).is_admitted, "no limit");
    }

    #[test]
    fn each_place_in_the_source_has_a_limit_of_its_own() {
        let sample = |message: &str| Sample {
            level: Level::Warn,
            target: "t".to_owned(),
            message: message.to_owned(),
            fields: Fields::default(),
            more: 0,
        };
        let mut limits = SiteLimits::new(3);
        let now = Elapsed::from_secs(9);
        let logged = |limits: &mut SiteLimits, line: u32, at| {
            (0..10).filter(|n| limits.admits(("file", line), at, || sample(&n.to_string()))).count()
        };
        assert_eq!((logged(&mut limits, 1, now), logged(&mut limits, 2, now)), (3, 3));
        assert_eq!((limits.tick(now).len(), limits.due()), (0, Some(now + REPORT_INTERVAL)));
        let later = now + REPORT_INTERVAL;
        assert_eq!(limits.tick(later), vec![Sample { more: 6, ..sample("9") }, Sample { more: 6, ..sample("9") }]);
        assert_eq!((limits.due(), logged(&mut limits, 1, later)), (None, 3));
        assert_eq!(logged(&mut SiteLimits::new(0), 1, now), 10, "no limit");
    }
}
