//! Defines and parses the settings for the number of workers and their replacement.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use super::{millis, parse_duration, parse_size};

/// Maximum number of workers.
const MOST: u32 = 1024;

#[derive(Clone, Debug)]
pub(crate) struct Scaling {
    /// Maximum number of workers that are replaced at a time, for any reason.
    pub(crate) max_unavailable: Share,
    /// How long workers may fail to start while none has ever been ready; zero means no limit.
    pub(crate) give_up_after: Duration,
    /// Time after which a worker that is not needed is stopped.
    pub(crate) scale_down_after: Duration,
    /// Requests after which a worker is replaced.
    pub(crate) max_requests: Option<Jittered<u64>>,
    /// Size of a worker's own memory, in bytes, above which the worker is replaced.
    pub(crate) max_memory: Option<u64>,
    /// Time between checks of each worker's memory.
    pub(crate) memory_interval: Duration,
    /// The age at which a worker is replaced.
    pub(crate) max_age: Option<Jittered<Duration>>,
    /// Path that a new worker requests from its application before it is ready.
    pub(crate) health_path: Option<String>,
    /// How long a request may wait before the application begins to process it; zero means no limit.
    pub(crate) max_queue_time: Duration,
}

/// The number of workers: fixed if both limits are equal, otherwise following the load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Range {
    pub(crate) min: u32,
    pub(crate) max: u32,
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.min == self.max { write!(f, "{}", self.max) } else { write!(f, "{}..{}", self.min, self.max) }
    }
}

impl FromStr for Range {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "auto" {
            let processors = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
            let number = u32::try_from(processors).unwrap_or(MOST).min(MOST);
            return Ok(Self { min: number, max: number });
        }
        let (min, max) = text.split_once("..").unwrap_or((text, text));
        let range = min.parse().ok().zip(max.parse().ok()).map(|(min, max)| Self { min, max });
        range.filter(|range| range.min <= range.max && (1..=MOST).contains(&range.max)).ok_or(format!(
            "'{text}' is not a number of workers (expected 1 to {MOST}, a range as in 2..16 or 0..4, or auto)"
        ))
    }
}

/// A number of workers, or a percentage of all workers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Share {
    Number(u32),
    Percent(u32),
}

impl FromStr for Share {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let share = match text.strip_suffix('%') {
            Some(percent) => percent.parse().ok().filter(|percent| (1..=100).contains(percent)).map(Self::Percent),
            None => text.parse().ok().filter(|number| (1..=MOST).contains(number)).map(Self::Number),
        };
        share.ok_or(format!("'{text}' is not a number of workers (expected 1 to {MOST}, or 1% to 100%)"))
    }
}

/// A limit with jitter, so that not all workers reach it at the same time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Jittered<T> {
    pub(crate) limit: T,
    /// Upper bound of the random amount that is added.
    pub(crate) jitter: T,
}

impl Jittered<u64> {
    /// Draws the limit for one worker.
    pub(crate) fn draw(self) -> u64 {
        // If no random numbers are available, all workers have the same limit; this must not prevent startup.
        let random = getrandom::u64().unwrap_or(0);
        let room = u128::from(self.jitter) + 1;
        self.limit.saturating_add(u64::try_from(u128::from(random) % room).unwrap_or(0))
    }
}

impl Jittered<Duration> {
    /// Draws the limit for one worker, with a resolution of a millisecond.
    pub(crate) fn draw(self) -> Duration {
        Duration::from_millis(Jittered { limit: millis(self.limit), jitter: millis(self.jitter) }.draw())
    }
}

/// Reads `N` or `N~JITTER`; 0 means no limit.
///
/// # Errors
/// Returns a message with the expected form.
pub(crate) fn parse_max_requests(text: &str) -> Result<Jittered<u64>, String> {
    let parse = |part: &str| part.parse().ok();
    jittered(text, parse).ok_or(format!(
        "'{text}' is not a number of requests (expected a number as in 1000, or with jitter as in 1000~200)"
    ))
}

/// Reads `TIME` or `TIME~JITTER`; 0 means no limit.
///
/// # Errors
/// Returns a message with the expected form.
pub(crate) fn parse_max_age(text: &str) -> Result<Jittered<Duration>, String> {
    let parse = |part: &str| parse_duration(part).ok();
    jittered(text, parse)
        .ok_or(format!("'{text}' is not an age (expected a time as in 12h, or with jitter as in 12h~30m)"))
}

fn jittered<T: Default>(text: &str, parse: impl Fn(&str) -> Option<T>) -> Option<Jittered<T>> {
    match text.split_once('~') {
        Some((limit, jitter)) => Some(Jittered { limit: parse(limit)?, jitter: parse(jitter)? }),
        None => Some(Jittered { limit: parse(text)?, jitter: T::default() }),
    }
}

/// Reads a size of memory of at least 1M; 0 means no limit.
///
/// # Errors
/// Returns a message with the expected form.
pub(crate) fn parse_max_memory(text: &str) -> Result<u64, String> {
    let size = parse_size(text)?;
    if size > 0 && size < 1 << 20 {
        return Err(format!("'{text}' is less than any worker needs (expected at least 1M, or 0 for no limit)"));
    }
    Ok(size)
}

/// Reads the path and query of a request.
///
/// # Errors
/// Returns a message with the expected form.
pub(crate) fn parse_health_path(text: &str) -> Result<String, String> {
    let is_path = text.starts_with('/') && text.parse::<http::uri::PathAndQuery>().is_ok();
    is_path.then(|| text.to_owned()).ok_or(format!("'{text}' is not a path (expected a path such as /health)"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_workers_are_read_and_written() {
        for (text, min, max) in [("4", 4, 4), ("2..16", 2, 16), ("0..4", 0, 4), ("3..3", 3, 3)] {
            assert_eq!(text.parse(), Ok(Range { min, max }), "{text}");
        }
        assert_eq!("2..16".parse::<Range>().unwrap().to_string(), "2..16");
        for text in ["", "0", "0..0", "4..2", "1025", "..4", "2..", "-1", "2...4", "many"] {
            assert!(text.parse::<Range>().unwrap_err().contains("is not a number of workers"), "{text}");
        }
        assert_eq!("2".parse(), Ok(Share::Number(2)));
        assert_eq!("25%".parse(), Ok(Share::Percent(25)));
        for text in ["0", "0%", "101%", "%", "x"] {
            assert!(text.parse::<Share>().is_err(), "{text}");
        }
    }

    #[test]
    fn limits_have_a_jitter_that_differs() {
        assert_eq!(parse_max_requests("1000"), Ok(Jittered { limit: 1000, jitter: 0 }));
        let limit = parse_max_requests("1000~200").unwrap();
        let drawn: std::collections::BTreeSet<u64> = (0..100).map(|_| limit.draw()).collect();
        assert!(drawn.iter().all(|drawn| (1000..=1200).contains(drawn)), "{drawn:?}");
        assert!(drawn.len() > 10, "{drawn:?}");
        assert!(Jittered { limit: 5, jitter: u64::MAX }.draw() >= 5);
        let age = parse_max_age("12h~30m").unwrap();
        assert_eq!((age.limit, age.jitter), (Duration::from_secs(43_200), Duration::from_secs(1800)));
        for text in ["", "~", "5~", "~5", "1h~x"] {
            assert!(parse_max_requests(text).is_err() && parse_max_age(text).is_err(), "{text}");
        }
        assert!(parse_max_memory("512K").unwrap_err().contains("at least 1M"));
        assert!(parse_health_path("health").is_err() && parse_health_path("/a b").is_err());
    }
}
