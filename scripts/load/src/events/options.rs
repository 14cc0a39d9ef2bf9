//! Parses the command line of `forkyard-load events`.

use std::time::Duration;

use clap::Args;

use crate::options::{positive_duration, uri};
use crate::target::{Protocol, Target};

/// Open many subscriptions to a server's events, publish events, and measure when and how often they arrive.
///
/// The server sends each event posted to one path to all subscribers of another path, as Server-Sent Events.
///
/// Exit status: 0 each event arrived once and in order, 1 no run took place, 2 wrong usage, 3 some events did not arrive once
/// and in order.
#[derive(Debug, Args)]
pub(crate) struct EventsOptions {
    /// The server: http:HOST:PORT, http:unix:PATH or http:unix:@NAME
    #[arg(long, value_name = "http:ADDR", value_parser = http)]
    pub(crate) connect: Target,

    /// The path that subscribers request
    #[arg(long, value_name = "URI", value_parser = uri)]
    pub(crate) subscribe: String,

    /// The path that subscribers request first, on the same connection, like a browser that has loaded a page
    #[arg(long, value_name = "URI", value_parser = uri)]
    pub(crate) first: Option<String>,

    /// The path to which events are posted
    #[arg(long, value_name = "URI", value_parser = uri)]
    pub(crate) publish: String,

    /// Number of subscribers, each with its own connection
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub(crate) subscribers: u32,

    /// Events per second
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub(crate) rate: u32,

    /// Time for which events are published
    #[arg(long, short = 'd', value_name = "TIME", default_value = "5s", value_parser = positive_duration)]
    pub(crate) duration: Duration,

    /// Stop when no data has arrived for this time
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = positive_duration)]
    pub(crate) timeout: Duration,

    /// Report the CPU time and memory of these processes and their descendants
    #[arg(long, value_name = "PID,...", value_delimiter = ',', value_parser = clap::value_parser!(i32).range(1..))]
    pub(crate) pids: Vec<i32>,

    /// Print the report as one line of JSON
    #[arg(long)]
    pub(crate) json: bool,
}

impl EventsOptions {
    /// Returns the number of events to publish, which is at least one.
    pub(crate) fn events(&self) -> u64 {
        let events = self.duration.as_millis() * u128::from(self.rate) / 1000;
        u64::try_from(events).unwrap_or(u64::MAX).max(1)
    }
}

fn http(text: &str) -> Result<Target, String> {
    match text.parse::<Target>()? {
        target if target.protocol == Protocol::Http => Ok(target),
        _ => Err("must start with http:".into()),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::options::{Arguments, Command};

    fn parse(args: &str) -> Result<EventsOptions, clap::Error> {
        match Arguments::try_parse_from(["forkyard-load", "events"].into_iter().chain(args.split_whitespace()))?.command
        {
            Some(Command::Events(options)) => Ok(options),
            None => panic!("no command in {args}"),
        }
    }

    #[test]
    fn the_number_of_events_follows_from_rate_and_duration() {
        let wanted = "--connect http:localhost:80 --subscribe /s --publish /p";
        assert_eq!(parse(wanted).unwrap().events(), 50);
        assert_eq!(parse(&format!("{wanted} --rate 100 -d 1500ms")).unwrap().events(), 150);
        assert_eq!(parse(&format!("{wanted} --rate 1 -d 1ms")).unwrap().events(), 1);
    }

    #[test]
    fn refused() {
        for args in [
            "",
            "--connect fastcgi:localhost:80 --subscribe /s --publish /p",
            "--connect http:localhost:80 --publish /p",
            "--connect http:localhost:80 --subscribe /s",
            "--connect http:localhost:80 --subscribe /s --publish /p --first page",
            "--connect http:localhost:80 --subscribe /s --publish /p --rate 0",
            "--connect http:localhost:80 --subscribe /s --publish /p --subscribers 0",
            "--connect http:localhost:80 --subscribe /s --publish /p --clients 1",
        ] {
            assert!(parse(args).is_err(), "accepted: {args}");
        }
    }
}
