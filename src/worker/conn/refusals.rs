//! Logs requests that could not be read, or were refused before they reached the application. Clients cause these
//! lines, so their number is limited, however many requests there are.
//!
//! The first refusal for a reason is logged at once. Further refusals are counted, and their number
//! is logged [`PERIOD`] later, with the client of the last one. [`Counts`] decides when to count
//! and when to log, and has no clock.

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
    /// A task that will log the counts is running.
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
            Some(line) => log::info!("{line}"),
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
        lines.iter().for_each(|line| log::info!("{line}"));
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Reason {
    why: String,
    status: StatusCode,
    protocol: Protocol,
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
    /// Counts a refusal. Returns the line to log at once, if any.
    fn note(&mut self, mut reason: Reason, from: Option<SocketAddr>, now: Instant) -> Option<String> {
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
    fn report(&mut self, now: Instant) -> Vec<String> {
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
    fn take_line(&mut self) -> String {
        let Reason { why, status, protocol } = &self.reason;
        let (count, last) = (std::mem::take(&mut self.count), self.last_from);
        let from = last.map_or_else(|| "-".to_owned(), |from| from.to_string());
        let (requests, last) = if count == 1 { ("request", "") } else { ("requests", "last_") };
        let protocol = format!("{protocol:?}").to_ascii_lowercase();
        format!("{count} {requests} refused: {why} status={} protocol={protocol} {last}from={from}", status.as_u16())
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
        let first = counts.note(reason("a"), None, begun);
        assert_eq!(first.as_deref(), Some("1 request refused: a status=400 protocol=http from=-"));
        assert_eq!(counts.note(reason("a"), None, begun), None);
        assert!(counts.note(reason("b"), None, begun).is_some(), "another reason");
        assert_eq!(counts.note(reason("a"), from, begun), None);
        let line = "2 requests refused: a status=400 protocol=http last_from=192.0.2.7:1";
        assert_eq!(counts.report(begun + PERIOD), [line]);
        assert_eq!(counts.report(begun + PERIOD), [""; 0]);
        assert_eq!(counts.note(reason("a"), None, begun + PERIOD), None, "there was a line just now");
        counts.report(begun + PERIOD);
        assert!(counts.note(reason("a"), None, begun + PERIOD * 2).is_some());
    }

    #[test]
    fn clients_that_invent_reasons_are_counted_together() {
        let (mut counts, now) = (Counts::default(), Instant::now());
        let lines: Vec<_> =
            (0..1000).filter_map(|number| counts.note(reason(&number.to_string()), None, now)).collect();
        assert_eq!(lines.len(), MOST_REASONS + 1);
        assert!(counts.report(now + PERIOD)[0].starts_with("967 requests refused: other reasons "));
    }
}
