//! The flags of the event log and of its subscribers.

use clap::Args;

use super::parse::{Mismatch, or_note};
use crate::config::events::EventsConfig;
use crate::config::parse_size;
use crate::config::sse::{SseRoute, SseRoutes};

/// Default size of the event log if subscribers are served.
const DEFAULT_LOG: u64 = 1 << 20;

/// Flags of linked applications.
#[derive(Args, Debug)]
pub(super) struct EventsOptions {
    /// Size of the event log, which all workers share, as in 4M; 0 disables it
    ///
    /// When the log is full, the oldest events are evicted.
    #[arg(long, value_name = "SIZE", env = "FORKYARD_EVENTS_SIZE", default_value = "1M", value_parser = parse_size, help_heading = "Cache and events")]
    events: u64,

    #[command(flatten)]
    subscribers: SubscriberOptions,
}

impl EventsOptions {
    pub(super) fn config(&self, max_connections: u32) -> EventsConfig {
        self.subscribers.config(self.events, max_connections)
    }
}

/// Flags of the processes that serve subscribers: workers of linked applications, and gateways.
#[derive(Args, Debug)]
pub(super) struct SubscriberOptions {
    /// Encoded events that each worker or gateway keeps in memory for its subscribers
    ///
    /// A subscriber that is further behind reads from the log.
    #[arg(long, value_name = "N", env = "FORKYARD_EVENTS_BACKLOG", default_value = "256", value_parser = clap::value_parser!(u32).range(1..), help_heading = "Cache and events")]
    events_backlog: u32,

    /// Event subscribers per worker or gateway; further ones get 503 [default: three quarters of --max-connections]
    #[arg(long, value_name = "N", env = "FORKYARD_MAX_SUBSCRIBERS", value_parser = clap::value_parser!(u32).range(1..), help_heading = "Cache and events")]
    max_subscribers: Option<u32>,
}

impl SubscriberOptions {
    /// Returns the settings of an event log of this size. Most subscribers hold a connection each, so the default limit on
    /// subscribers leaves a quarter of the connections for other requests.
    fn config(&self, bytes: u64, max_connections: u32) -> EventsConfig {
        let default = (max_connections - max_connections / 4).max(1);
        let max_subscribers = self.max_subscribers.unwrap_or(default);
        EventsConfig { bytes, backlog: self.events_backlog, max_subscribers }
    }
}

/// Flags of `forkyard run`.
#[derive(Args, Debug)]
pub(super) struct LogOfProgram {
    /// Size of the event log in shared memory, as in 1M; 0 disables it [default: 0; 1M with --sse]
    ///
    /// The log serves the publish socket (FORKYARD_EVENTS), the event streams of gateways, the events sub-commands, and
    /// programs with the forkyard-shm library.
    #[arg(long, value_name = "SIZE", env = "FORKYARD_EVENTS_SIZE", value_parser = parse_size, help_heading = "Cache and events")]
    events: Option<u64>,
}

impl LogOfProgram {
    pub(super) fn config(&self) -> EventsConfig {
        EventsConfig { bytes: self.events.unwrap_or(0), ..EventsConfig::default() }
    }
}

/// Flags of `forkyard run` that `--direct` excludes.
#[derive(Args, Debug)]
pub(super) struct StreamOptions {
    /// Let the gateways serve the events of these topics on this path; repeatable
    ///
    /// Subscribers connect to the gateways only, not to the program. A segment {name} of PATH stands for any text, and can
    /// be used in TOPIC, as in /rooms/{room}=room-{room}. The variable takes one path per line.
    #[arg(long, value_name = "PATH=TOPIC[,TOPIC]", env = "FORKYARD_SSE", value_parser = parse_routes, help_heading = "Cache and events")]
    sse: Vec<Lines>,

    #[command(flatten)]
    subscribers: SubscriberOptions,
}

/// The value of one flag, or the lines of a variable.
#[derive(Clone, Debug)]
struct Lines(Vec<SseRoute>);

fn parse_routes(text: &str) -> Result<Lines, String> {
    let lines = text.lines().filter(|line| !line.trim().is_empty());
    lines.map(str::parse).collect::<Result<_, _>>().map(Lines)
}

impl StreamOptions {
    /// Returns the settings of the event log and the paths of the event streams.
    pub(super) fn config(
        self,
        log: &LogOfProgram,
        max_connections: u32,
        wrong: &mut Vec<Mismatch>,
    ) -> (EventsConfig, SseRoutes) {
        let routes = self.sse.into_iter().flat_map(|Lines(routes)| routes).collect();
        let routes = or_note(SseRoutes::new(routes), &["sse"], wrong);
        if log.events == Some(0) && !routes.is_empty() {
            let text =
                "--sse requires the event log, which --events 0 disables (remove --events 0, or --sse)".to_owned();
            wrong.push(Mismatch { settings: &["events", "sse"], text });
        }
        let bytes = log.events.unwrap_or(if routes.is_empty() { 0 } else { DEFAULT_LOG });
        (self.subscribers.config(bytes, max_connections), routes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_variable_has_a_line_for_each_path() {
        let Lines(routes) = parse_routes("/a=x,y\n\n/b/{c}=z-{c}\n").unwrap();
        assert_eq!(routes.len(), 2);
        assert!(parse_routes("/a=x\n/b\n").unwrap_err().contains("'/b' is not an event stream"));
    }
}
