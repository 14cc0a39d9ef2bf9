//! Parses the command line, and checks everything that can be checked without the network.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};

use crate::events::EventsOptions;
use crate::target::Target;

/// Load generator and response checker for FastCGI and HTTP/1.1 servers.
///
/// Exit status: 0 all responses were correct, 1 no run took place, 2 wrong usage, 3 there were errors or starved requests.
#[derive(Debug, Parser)]
#[command(name = "forkyard-load", version, max_term_width = 100)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    pub(crate) command: Option<Command>,
    #[command(flatten)]
    pub(crate) options: Option<Options>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Open many subscriptions to a server's events, publish events, and measure when and how often they arrive
    Events(EventsOptions),
}

/// A run of requests.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// The server: fastcgi:unix:PATH, fastcgi:unix:@NAME, fastcgi:HOST:PORT, or the same with http
    #[arg(long, value_name = "PROTO:ADDR")]
    pub(crate) connect: Target,

    /// Number of clients, each with one request in flight
    #[arg(long, short = 'c', value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub(crate) clients: u32,

    /// Time to measure; 5s unless --requests is given
    #[arg(long, short = 'd', value_name = "TIME", value_parser = positive_duration)]
    pub(crate) duration: Option<Duration>,

    /// Run for this time before measuring; errors in this time are reported separately
    #[arg(long, value_name = "TIME", default_value = "0s", conflicts_with = "requests", value_parser = humantime::parse_duration)]
    pub(crate) warmup: Duration,

    /// Stop after this number of requests; one more request is sent alone before them, to get the body
    #[arg(long, short = 'n', value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) requests: Option<u64>,

    /// Open a new connection for each request, instead of keep-alive connections
    #[arg(long)]
    pub(crate) fresh: bool,

    /// The path to request
    #[arg(long, value_name = "URI", default_value = "/", value_parser = uri)]
    pub(crate) uri: String,

    /// Send the contents of this file as the body of a POST, instead of a GET
    #[arg(long, value_name = "FILE")]
    pub(crate) body_file: Option<PathBuf>,

    /// Set a FastCGI parameter, or replace a default parameter; can be repeated
    #[arg(long = "param", value_name = "NAME=VALUE", value_parser = param)]
    pub(crate) params: Vec<(String, String)>,

    /// Number of bytes that the body must have
    #[arg(long, value_name = "N")]
    pub(crate) expect_body_len: Option<u64>,

    /// Do not compare the bodies with each other, for a page that changes
    #[arg(long)]
    pub(crate) any_body: bool,

    /// Abort a request after this time
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = positive_duration)]
    pub(crate) timeout: Duration,

    /// Report the CPU time of these processes and their descendants
    #[arg(long, value_name = "PID,...", value_delimiter = ',', value_parser = clap::value_parser!(i32).range(1..))]
    pub(crate) pids: Vec<i32>,

    /// Also report the CPU time of these processes and their descendants separately, for a part of the server
    #[arg(long, value_name = "PID,...", value_delimiter = ',', value_parser = clap::value_parser!(i32).range(1..))]
    pub(crate) part_pids: Vec<i32>,

    /// Print the report as one line of JSON
    #[arg(long)]
    pub(crate) json: bool,

    /// Send one request, print the body of its response, and stop
    #[arg(long, conflicts_with_all = ["json", "requests", "duration"])]
    pub(crate) show: bool,
}

impl Options {
    /// Returns the time to measure, if a time limit ends the run.
    pub(crate) fn measured_time(&self) -> Option<Duration> {
        const DEFAULT: Duration = Duration::from_secs(5);
        match (self.duration, self.requests) {
            (Some(duration), _) => Some(duration),
            (None, Some(_)) => None,
            (None, None) => Some(DEFAULT),
        }
    }
}

pub(crate) fn positive_duration(text: &str) -> Result<Duration, String> {
    match humantime::parse_duration(text) {
        Ok(duration) if duration.is_zero() => Err("must be more than zero".into()),
        Ok(duration) => Ok(duration),
        Err(error) => Err(error.to_string()),
    }
}

pub(crate) fn uri(text: &str) -> Result<String, String> {
    if !text.starts_with('/') {
        return Err("must start with /".into());
    }
    if text.bytes().any(|byte| byte <= b' ' || byte == 0x7f) {
        return Err("must not contain spaces or control characters (write %20 for a space)".into());
    }
    Ok(text.into())
}

fn param(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.into(), value.into())),
        _ => Err("must be NAME=VALUE".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(args: &str) -> Result<Options, clap::Error> {
        let arguments = Arguments::try_parse_from(std::iter::once("forkyard-load").chain(args.split_whitespace()))?;
        Ok(arguments.options.expect("the command line describes a run of requests"))
    }

    #[test]
    fn the_definition_is_consistent() {
        <Arguments as clap::CommandFactory>::command().debug_assert();
    }

    #[test]
    fn defaults() {
        let options = parse("--connect fastcgi:unix:/run/a.sock").unwrap();
        assert_eq!(options.clients, 1);
        assert_eq!(options.measured_time(), Some(Duration::from_secs(5)));
        assert_eq!(options.warmup, Duration::ZERO);
        assert_eq!(options.uri, "/");
        assert!(!options.fresh && !options.json && !options.any_body && options.pids.is_empty());
    }

    #[test]
    fn everything_set() {
        let options = parse(
            "--connect http:127.0.0.1:80 -c 32 --duration 2500ms --warmup 1s --fresh --uri /a?b=c --timeout 3s \
             --expect-body-len 13 --body-file /a --pids 7,8 --part-pids 8 --json",
        )
        .unwrap();
        assert_eq!(options.clients, 32);
        assert_eq!(options.duration, Some(Duration::from_millis(2500)));
        assert_eq!(options.warmup, Duration::from_secs(1));
        assert_eq!(options.body_file.as_deref(), Some("/a".as_ref()));
        assert_eq!(options.pids, [7, 8]);
        assert_eq!(options.part_pids, [8]);
        assert_eq!(options.expect_body_len, Some(13));
    }

    #[test]
    fn requests_alone_end_a_run_without_a_clock() {
        assert_eq!(parse("--connect http:localhost:80 -n 9").unwrap().measured_time(), None);
        let both = parse("--connect http:localhost:80 -n 9 -d 1s").unwrap();
        assert_eq!(both.measured_time(), Some(Duration::from_secs(1)));
    }

    #[test]
    fn params_keep_everything_after_the_first_equals_sign() {
        let options = parse("--connect fastcgi:unix:/a --param QUERY_STRING=a=b --param X=").unwrap();
        assert_eq!(options.params, [("QUERY_STRING".into(), "a=b".into()), ("X".into(), String::new())]);
    }

    #[test]
    fn refused() {
        for args in [
            "",
            "--connect gopher:unix:/a",
            "--connect http:localhost:80 --clients 0",
            "--connect http:localhost:80 --duration 0s",
            "--connect http:localhost:80 --duration 5",
            "--connect http:localhost:80 --requests 0",
            "--connect http:localhost:80 --requests 5 --warmup 1s",
            "--connect http:localhost:80 --uri index.html",
            "--connect http:localhost:80 --uri /a\u{7f}",
            "--connect http:localhost:80 --pids 0",
            "--connect http:localhost:80 --pids 1,x",
            "--connect http:localhost:80 --param NAME",
            "--connect http:localhost:80 --show --json",
        ] {
            assert!(parse(args).is_err(), "accepted: {args}");
        }
    }
}
