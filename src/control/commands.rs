//! The sub-commands that ask a running master. Each returns when the outcome is known.
//!
//! Exit status: 0 done, 1 not done (what went wrong is on standard error), 2 wrong usage, which is seen before this.

use std::io::{self, IsTerminal as _, Write as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::cache;
use super::client::{self, Connection};
use super::events;
use super::show;
use super::wire::{Answer, Request};

/// What a sub-command asks for, of which master.
#[derive(Clone, Debug)]
pub(crate) struct Errand {
    pub(crate) control: PathBuf,
    pub(crate) json: bool,
    pub(crate) what: What,
}

#[derive(Clone, Debug)]
pub(crate) enum What {
    Ask(Request),
    /// The status again and again; `rounds` times, if given.
    Top {
        interval: Duration,
        rounds: Option<u32>,
    },
    Cache(cache::Operation),
    Events(events::Operation),
    /// The requests that are refused.
    Quarantine,
}

/// Does it.
///
/// # Errors
/// A sentence for the operator.
pub(crate) fn run(errand: &Errand) -> Result<(), String> {
    let Errand { control, json, what } = errand;
    match what {
        What::Ask(Request::Status) => write(&shown(control, *json)?),
        What::Quarantine => write(&quarantined(control, *json)?),
        What::Ask(request) => ask(control, request, *json),
        What::Top { interval, rounds } => top(control, *json, *interval, *rounds),
        What::Cache(operation) => cache::run(control, operation, *json, &mut io::stdout().lock()),
        What::Events(operation) => events::run(control, operation, *json),
    }
}

fn shown(control: &Path, json: bool) -> Result<String, String> {
    let status = client::status(control)?;
    if !json {
        return Ok(show::table(&status));
    }
    let line = serde_json::to_string(&status).map_err(|error| error.to_string())?;
    Ok(line + "\n")
}

fn quarantined(control: &Path, json: bool) -> Result<String, String> {
    let listed = client::status(control)?.quarantined;
    if !json {
        return Ok(show::quarantine(&listed));
    }
    let lines = listed.iter().flat_map(super::wire::line).collect();
    String::from_utf8(lines).map_err(|error| error.to_string())
}

/// Tells what is under way, until the outcome is known.
fn ask(control: &Path, request: &Request, json: bool) -> Result<(), String> {
    let mut connection = Connection::ask(control, request)?;
    loop {
        let answer = connection.next()?;
        if json {
            write(&String::from_utf8_lossy(&super::wire::line(&answer)))?;
        }
        match answer {
            Answer::Failed { text } => return Err(text),
            Answer::Progress { text } if !json => write(&format!("{text}\n"))?,
            Answer::Done { text } => {
                if matches!(request, Request::Stop { .. }) {
                    connection.wait_for_close();
                }
                return if json { Ok(()) } else { write(&format!("{text}\n")) };
            }
            Answer::Status { .. } => return Ok(()),
            Answer::Progress { .. } => {}
        }
    }
}

fn top(control: &Path, json: bool, interval: Duration, rounds: Option<u32>) -> Result<(), String> {
    let redraw = !json && io::stdout().is_terminal();
    let mut round = 0;
    loop {
        let text = shown(control, json)?;
        // To the corner, and what was there before is erased.
        write(&if redraw { format!("\x1b[H\x1b[J{text}") } else { text })?;
        round += 1;
        if rounds.is_some_and(|rounds| round >= rounds) {
            return Ok(());
        }
        std::thread::sleep(interval);
    }
}

/// To standard output. Who reads it no more, a pager say, has seen enough.
fn write(text: &str) -> Result<(), String> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(|error| format!("cannot write: {error}"))
}
