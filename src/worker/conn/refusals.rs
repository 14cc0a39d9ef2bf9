//! Logs requests that could not be read, or were refused before they reached the application. Clients cause these
//! lines, so the number of lines is limited, however many requests there are.
//!
//! The first refusal for a reason is logged immediately. Further refusals are counted, and their number
//! is logged [`PERIOD`] later, with the client of the last one. [`Counts`] decides when to count
//! and when to log. It has no clock.

use std::cell::{Cell, RefCell};
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::{Duration, Instant};

use http::StatusCode;

use crate::config::address::Protocol;

/// Minimum time between two lines for one reason.
const PERIOD: Duration = Duration::from_secs(10);
/// Number of reasons that are counted separately; any further reason is counted as [`OTHERS`].
const MOST_REASONS: usize = 32;
const OTHERS: &str = "other reasons";

#[derive(Debug, Default)]
pub(crate) struct Refusals {
    counts: RefCell<Counts>,
    /// Whether a task that will log the counts is running.
    is_timed: Cell<bool>,
}

impl Refusals {
    /// Counts a refused request with its status and its reason `why`; `from` is the peer that sent
    /// it, if known.
    pub(crate) fn note(
        self: &Rc<Self>,
        protocol: Protocol,
        status: StatusCode,
        from: Option<SocketAddr>,
        why: impl Into<String>,
    ) {
        let reason = Reason { why: why.into(), status, protocol };
        let line = self.counts.borrow_mut().note(reason, from, Instant::now());
        match line {
            Some(line) => line.log_first(),
            None if self.is_timed.replace(true) => {}
            None => {
                let this = Rc::clone(self);
                tokio::task::spawn_local(async move {
                    tokio::time::sleep(PERIOD).await;
                    this.is_timed.set(false);
                    this.report();
                });
            }
        }
    }

    /// Logs the counts.
    pub(crate) fn report(&self) {
        let lines = self.counts.borrow_mut().report(Instant::now());
        lines.iter().for_each(Line::log_count);
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Reason {
    why: String,
    status: StatusCode,
    protocol: Protocol,
}

/// A log line: `count` refusals for one reason, the last of which came from `last_from`, if known.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Line {
    reason: Reason,
    count: u64,
    last_from: Option<SocketAddr>,
}

impl Line {
    /// Logs the first refusal for a reason. Not the same place in the source as [`Line::log_count`], because the number of lines from each
    /// place is limited.
    fn log_first(&self) {
        let Self { reason: Reason { why, status, protocol }, count, last_from: from } = self;
        log::info!(status = status.as_u16(), protocol:%, from = *from, count; "refused requests: {why}");
    }

    /// Logs the further refusals for a reason.
    fn log_count(&self) {
        let Self { reason: Reason { why, status, protocol }, count, last_from } = self;
        let (from, last_from) = if *count == 1 { (*last_from, None) } else { (None, *last_from) };
        log::info!(status = status.as_u16(), protocol:%, from, last_from, count; "refused requests: {why}");
    }
}

#[derive(Debug, Default)]
struct Counts(Vec<Count>);

#[derive(Debug)]
struct Count {
    reason: Reason,
    /// Refusals since the last line.
    count: u64,
    last_from: Option<SocketAddr>,
    logged: Instant,
}

impl Counts {
    /// Counts a refusal. Returns the line to log immediately, if any.
    fn note(&mut self, mut reason: Reason, from: Option<SocketAddr>, now: Instant) -> Option<Line> {
        if self.0.len() >= MOST_REASONS && !self.0.iter().any(|known| known.reason == reason) {
            reason = Reason { why: OTHERS.to_owned(), status: StatusCode::BAD_REQUEST, ..reason };
        }
        let index = self.0.iter().position(|known| known.reason == reason);
        let known = match index.and_then(|index| self.0.get_mut(index)) {
            Some(known) if known.count > 0 || now.saturating_duration_since(known.logged) < PERIOD => {
                (known.count, known.last_from) = (known.count + 1, from);
                return None;
            }
            Some(known) => known,
            None => {
                self.0.push(Count { reason, count: 0, last_from: None, logged: now });
                self.0.last_mut()?
            }
        };
        (known.count, known.last_from, known.logged) = (1, from, now);
        Some(known.take_line())
    }

    /// Returns the lines that are due now.
    fn report(&mut self, now: Instant) -> Vec<Line> {
        let waiting = self.0.iter_mut().filter(|known| known.count > 0);
        waiting
            .map(|known| {
                known.logged = now;
                known.take_line()
            })
            .collect()
    }
}

impl Count {
    fn take_line(&mut self) -> Line {
        let count = std::mem::take(&mut self.count);
        Line { reason: self.reason.clone(), count, last_from: self.last_from }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reason(why: &str) -> Reason {
        Reason { why: why.to_owned(), status: StatusCode::BAD_REQUEST, protocol: Protocol::Http }
    }

    #[test]
    fn the_first_is_logged_and_the_others_are_counted() {
        let (mut counts, begun) = (Counts::default(), Instant::now());
        let from = "192.0.2.7:1".parse().ok();
        let line = |count, last_from| Line { reason: reason("a"), count, last_from };
        assert_eq!(counts.note(reason("a"), None, begun), Some(line(1, None)));
        assert_eq!(counts.note(reason("a"), None, begun), None);
        assert!(counts.note(reason("b"), None, begun).is_some(), "a different reason");
        assert_eq!(counts.note(reason("a"), from, begun), None);
        assert_eq!(counts.report(begun + PERIOD), [line(2, from)]);
        assert!(counts.report(begun + PERIOD).is_empty());
        assert_eq!(counts.note(reason("a"), None, begun + PERIOD), None, "there was a line recently");
        counts.report(begun + PERIOD);
        assert!(counts.note(reason("a"), None, begun + PERIOD * 2).is_some());
    }

    #[test]
    fn clients_that_invent_reasons_are_counted_together() {
        let (mut counts, now) = (Counts::default(), Instant::now());
        let lines: Vec<_> =
            (0..1000).filter_map(|number| counts.note(reason(&number.to_string()), None, now)).collect();
        assert_eq!(lines.len(), MOST_REASONS + 1);
        let reported = counts.report(now + PERIOD);
        assert_eq!((reported[0].count, reported[0].reason.why.as_str()), (967, OTHERS));
    }
}
