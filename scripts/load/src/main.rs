//! `forkyard-load` sends requests to a FastCGI or HTTP/1.1 server in a closed loop and checks every response. A response must
//! end as its protocol requires, have status 200, and have the same body as the first response.
//!
//! ```text
//! options -> probe (one request, which gets the expected body) -> run (the loop) -> report
//! ```
//! `forkyard-load events` measures event streams instead (see `events`).
//!
//! The program has one thread and one `epoll_wait`. `response`, `request`, `tally`, and the parsers in `options` and `target`
//! perform no I/O. `socket`, `probe`, `run` and `cpu` make the system calls.
//!
//! Each client has one request in flight and sends the next request when the response is complete. Such a closed loop slows
//! down with the server, so its latencies understate the server's stalls. `max`, `starved` and `timeout` show these stalls.

mod check;
mod cpu;
mod error;
mod events;
mod memory;
mod options;
mod probe;
mod report;
mod request;
mod response;
mod run;
mod socket;
mod tally;
mod target;

use std::io::{self, Write as _};
use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{CommandFactory as _, Parser as _};

use crate::error::Error;
use crate::events::EventsOptions;
use crate::options::{Arguments, Command, Options};
use crate::report::Report;

/// Exit status if some responses were wrong or missing. Status 1 means that no run took place, and status 2 means wrong usage.
const EXIT_FAULTS: u8 = 3;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let done = match (&arguments.command, &arguments.options) {
        (Some(Command::Events(options)), _) => measure_events(options),
        (None, Some(options)) => load(options),
        (None, None) => Arguments::command().error(ErrorKind::MissingRequiredArgument, "--connect is missing").exit(),
    };
    match done {
        Ok(code) => code,
        Err(error) => {
            let _ = writeln!(io::stderr(), "forkyard-load: {error}");
            ExitCode::FAILURE
        }
    }
}

fn measure_events(options: &EventsOptions) -> Result<ExitCode, Error> {
    socket::raise_descriptor_limit();
    let report = events::measure(&options.connect.resolve()?, options)?;
    let text = if options.json { report.json()? } else { report.to_string() };
    print(&text, report.clean())
}

fn load(options: &Options) -> Result<ExitCode, Error> {
    socket::raise_descriptor_limit();
    let peer = options.connect.resolve()?;
    let sent =
        options.body_file.as_ref().map(|file| std::fs::read(file).map_err(Error::body_file(file))).transpose()?;
    let probe = probe::probe(&peer, options, sent.as_deref())?;
    if options.show {
        io::stdout().write_all(&probe).map_err(Error::Output)?;
        return Ok(ExitCode::SUCCESS);
    }
    let outcome = run::run(&peer, options, sent.as_deref(), &probe)?;
    let report = Report::new(options, &outcome);
    let text = if options.json { report.json()? } else { report.to_string() };
    print(&text, report.clean())
}

fn print(text: &str, is_clean: bool) -> Result<ExitCode, Error> {
    writeln!(io::stdout(), "{text}").map_err(Error::Output)?;
    Ok(if is_clean { ExitCode::SUCCESS } else { ExitCode::from(EXIT_FAULTS) })
}
