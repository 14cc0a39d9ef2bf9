//! Runs the sub-commands that contact a running master. Each sub-command returns when its outcome is known.
//!
//! The exit status is 0 on success, 1 on failure (with an error on standard error), and 2 on wrong usage, which is
//! detected before a sub-command runs. It is not a failure if the reader closes the output early (`top | head`).

use std::io::{self, IsTerminal as _, Write as _};
use std::time::Duration;

use super::cache;
use super::client::{self, Connection, ControlEndpoint};
use super::events;
use super::show;
use super::wire::{ControlReply, ControlRequest};

/// A sub-command, and the master that it contacts.
#[derive(Clone, Debug)]
pub(crate) struct ControlTask {
    pub(crate) endpoint: ControlEndpoint,
    pub(crate) json: bool,
    pub(crate) command: ControlCommand,
}

#[derive(Clone, Debug)]
pub(crate) enum ControlCommand {
    Ask(ControlRequest),
    /// Show the status repeatedly: `rounds` times, or forever if `None`.
    Top {
        interval: Duration,
        rounds: Option<u32>,
    },
    Cache(cache::CacheOperation),
    Events(events::EventsOperation),
    /// List the quarantined requests.
    Quarantine,
}

/// Returns the number of consecutive timeouts after which the client fails. After each timeout, the client sends a
/// status request; if that times out too, one timeout is counted. A new build that is taking over does not reply until
/// it has loaded, so an upgrade may take several timeouts.
fn max_timeouts(request: &ControlRequest) -> u32 {
    if *request == ControlRequest::Upgrade { 6 } else { 1 }
}

/// Runs the sub-command.
///
/// # Errors
/// Returns a message for the operator if the sub-command fails, or its outcome is unknown.
pub(crate) fn run(task: &ControlTask) -> Result<(), String> {
    let ControlTask { endpoint, json, command } = task;
    match command {
        ControlCommand::Ask(ControlRequest::Status) => write(&shown(endpoint, *json)?).map(drop),
        ControlCommand::Quarantine => write(&quarantined(endpoint, *json)?).map(drop),
        ControlCommand::Ask(request) => ask(endpoint, request, *json),
        ControlCommand::Top { interval, rounds } => top(endpoint, *json, *interval, *rounds),
        ControlCommand::Cache(operation) => cache::run(endpoint, operation, *json, &mut io::stdout().lock()),
        ControlCommand::Events(operation) => events::run(endpoint, operation, *json),
    }
}

fn shown(endpoint: &ControlEndpoint, json: bool) -> Result<String, String> {
    let status = client::status(endpoint)?;
    if !json {
        return Ok(show::table(&status));
    }
    let line = serde_json::to_string(&status).map_err(|error| error.to_string())?;
    Ok(line + "\n")
}

fn quarantined(endpoint: &ControlEndpoint, json: bool) -> Result<String, String> {
    let listed = client::status(endpoint)?.quarantined;
    if !json {
        return Ok(show::quarantine(&listed));
    }
    let lines = listed.iter().flat_map(super::wire::line).collect();
    String::from_utf8(lines).map_err(|error| error.to_string())
}

/// Sends the request, and prints progress until the outcome is known. If the master is silent for the timeout, sends a
/// status request; a reply shows that the master is still working on the first request.
fn ask(endpoint: &ControlEndpoint, request: &ControlRequest, json: bool) -> Result<(), String> {
    let mut connection = Connection::ask(endpoint, request)?;
    let (mut is_read, mut silent) = (true, 0);
    loop {
        let Some(answer) = connection.next_in_time()? else {
            silent = if client::status(endpoint).is_ok() { 0 } else { silent + 1 };
            if silent >= max_timeouts(request) || silent > 0 && connection.is_stopped() {
                let name = request.name();
                return Err(format!("{}; the outcome of {name} is unknown (see its status)", connection.silence()));
            }
            continue;
        };
        silent = 0;
        // The outcome is awaited even if the output is closed.
        if json && is_read {
            is_read = write(&String::from_utf8_lossy(&super::wire::line(&answer)))?;
        }
        match answer {
            ControlReply::Failed { text } => return Err(text),
            ControlReply::Progress { text } if !json && is_read => is_read = write(&format!("{text}\n"))?,
            ControlReply::Done { text } => {
                if matches!(request, ControlRequest::Stop { .. }) {
                    connection.wait_for_close()?;
                }
                return if json || !is_read { Ok(()) } else { write(&format!("{text}\n")).map(drop) };
            }
            ControlReply::Status { .. } => return Ok(()),
            ControlReply::Progress { .. } => {}
        }
    }
}

fn top(endpoint: &ControlEndpoint, json: bool, interval: Duration, rounds: Option<u32>) -> Result<(), String> {
    let redraw = !json && io::stdout().is_terminal();
    let mut round = 0;
    loop {
        let text = shown(endpoint, json)?;
        // Moves the cursor to the top left and clears the screen.
        let is_read = write(&if redraw { format!("\x1b[H\x1b[J{text}") } else { text })?;
        round += 1;
        if !is_read || rounds.is_some_and(|rounds| round >= rounds) {
            return Ok(());
        }
        std::thread::sleep(interval);
    }
}

/// Writes to standard output. Returns false if the reader has closed it.
fn write(text: &str) -> Result<bool, String> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        written => printed(written).map(|()| true),
    }
}

/// Turns an error from printing into a message. A closed output is not an error.
///
/// # Errors
/// Returns the message for the operator.
pub(crate) fn printed(written: io::Result<()>) -> Result<(), String> {
    match written {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(format!("cannot write to standard output: {error}"))
        }
        Ok(()) | Err(_) => Ok(()),
    }
}
