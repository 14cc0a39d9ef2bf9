//! `forkyard-shm-bench` measures Forkyard's page cache, event log and table of claims. It compares the page cache with other
//! caches, in one run on one machine.
//!
//! ```text
//! get    the cost of a lookup: in process, in shared memory, and over a socket    -> ns per operation
//! hits   the hit ratio of the eviction policy, for replayed request traces        -> hit %
//! events the cost of publishing and reading events                                -> ns per operation
//! claims the cost of claiming and releasing app processes                         -> ns per operation
//! ```
//! The benchmarks share the modules `sample` (the requested objects and their sizes), `forkyard` (Forkyard's cache as the benchmarks use
//! it) and `only` (the selection of rows and columns). The tables are written to standard output, and all other output to standard error.

mod claims;
mod error;
mod events;
mod forkyard;
mod get;
mod hits;
mod only;
mod sample;

use std::io::{self, Write as _};
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::error::Error;

/// Benchmarks of Forkyard's page cache, event log and table of claims.
#[derive(Debug, Parser)]
#[command(name = "forkyard-shm-bench", version, max_term_width = 100)]
struct Options {
    #[command(subcommand)]
    bench: Bench,
}

#[derive(Debug, Subcommand)]
enum Bench {
    Get(get::Options),
    Hits(hits::Options),
    Events(events::Options),
    Claims(claims::Options),
}

fn main() -> ExitCode {
    let Options { bench } = Options::parse();
    let table = match &bench {
        Bench::Get(options) => get::run(options),
        Bench::Hits(options) => hits::run(options),
        Bench::Events(options) => events::run(options),
        Bench::Claims(options) => claims::run(options),
    };
    match table.and_then(|table| io::stdout().write_all(table.as_bytes()).map_err(Error::Output)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say(&error.to_string());
            ExitCode::FAILURE
        }
    }
}

/// Reports progress to standard error. A write error is ignored, because unread output is no reason to stop the benchmark.
fn say(line: &str) {
    let _ = writeln!(io::stderr(), "forkyard-shm-bench: {line}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_definition_is_consistent() {
        <Options as clap::CommandFactory>::command().debug_assert();
    }
}
