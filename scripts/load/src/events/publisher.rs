//! Publishes the events: one request after another on a keep-alive connection, each at its scheduled time.

use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use super::stream::data;
use super::{EventsOptions, Signals, Usage, usage};
use crate::error::Error;
use crate::probe::{connect, exchange};
use crate::socket::Socket;
use crate::tally::{Fault, Kind, Tally};
use crate::target::{Peer, Protocol};

/// Time between two of the events published before the measurement.
const EARLY: Duration = Duration::from_millis(100);

/// Time to wait after the last event before the measurement, so that all events before the measurement can arrive.
const SETTLE: Duration = Duration::from_millis(500);

pub(super) struct Publisher<'a> {
    peer: &'a Peer,
    options: &'a EventsOptions,
    clock: Instant,
    connection: Option<Socket>,
}

/// The result of publishing.
#[derive(Debug)]
pub(super) struct Published {
    /// Times from request to response.
    pub(super) tally: Tally,
    /// The server's CPU time and memory when the first measured event was due.
    pub(super) before: Usage,
    /// Time from the first event's due time to the last response.
    pub(super) elapsed: Duration,
    /// Largest delay of an event after its due time.
    pub(super) late: Duration,
}

impl<'a> Publisher<'a> {
    pub(super) fn new(peer: &'a Peer, options: &'a EventsOptions, clock: Instant) -> Self {
        Self { peer, options, clock, connection: None }
    }

    pub(super) fn run(mut self, signals: &Signals) -> Result<Published, Error> {
        while !signals.all_subscribed.load(Ordering::Acquire) {
            self.publish(0).map_err(Error::Publish)?;
            thread::sleep(EARLY);
        }
        thread::sleep(SETTLE);
        let (mut tally, mut late) = (Tally::new(), Duration::ZERO);
        let before = usage(self.options)?;
        let begun = Instant::now();
        for number in 1..=self.options.events() {
            let due = Duration::from_secs_f64((number - 1) as f64 / f64::from(self.options.rate));
            thread::sleep(due.saturating_sub(begun.elapsed()));
            let sent = Instant::now();
            late = late.max((sent - begun).saturating_sub(due));
            match self.publish(number) {
                Ok(()) => tally.right(sent.elapsed()),
                Err(fault) => tally.wrong(fault),
            }
        }
        Ok(Published { tally, before, elapsed: begun.elapsed(), late })
    }

    fn publish(&mut self, number: u64) -> Result<(), Fault> {
        let socket = match self.connection.take() {
            Some(socket) => socket,
            None => connect(self.peer, self.options.timeout)?,
        };
        let published_ns = u64::try_from(self.clock.elapsed().as_nanos()).unwrap_or(u64::MAX);
        let request = self.request(&data(number, published_ns));
        let end = exchange(&socket, Protocol::Http, &request, |_| ())?;
        if end.keep {
            self.connection = Some(socket);
        }
        if (200..300).contains(&end.status) {
            return Ok(());
        }
        Err(Fault::new(
            Kind::Status,
            format!("{} instead of one of success, from {}", end.status, self.options.publish),
        ))
    }

    fn request(&self, data: &str) -> Vec<u8> {
        let (uri, host, length) = (&self.options.publish, self.options.connect.host(), data.len());
        let head = format!("POST {uri} HTTP/1.1\r\nHost: {host}\r\nContent-Type: text/plain");
        format!("{head}\r\nContent-Length: {length}\r\n\r\n{data}").into_bytes()
    }
}
