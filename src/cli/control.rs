//! The flags of the control socket, and the sub-commands that use it.

use std::ffi::OsString;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use clap::builder::{NonEmptyStringValueParser, OsStringValueParser, TypedValueParser};
use clap::{ArgGroup, Args, Command, Subcommand};
use clap_complete::Shell;

use super::publish::EventsCommand;
use crate::config::control::ControlConfig;
use crate::config::{parse_duration, parse_interval};
use crate::control::CacheOperation;
use crate::control::client::ControlEndpoint;
use crate::control::commands::{ControlCommand, ControlTask};
use crate::control::wire::ControlRequest;

/// Flags of both commands that serve.
#[derive(Args, Debug)]
pub(super) struct ControlOptions {
    /// Unix socket for status, reload, stop and the other sub-commands [default: none]
    ///
    /// Only root and the user of the master can use it.
    #[arg(long, value_name = "PATH", env = "FORKYARD_CONTROL", help_heading = "Control and configuration")]
    control: Option<PathBuf>,

    /// Read settings from this TOML file
    ///
    /// The keys are the names of the flags. A flag overrides its FORKYARD_* variable, and the variable overrides the
    /// file.
    #[arg(long, value_name = "FILE", env = "FORKYARD_CONFIG", help_heading = "Control and configuration")]
    config: Option<PathBuf>,
}

impl ControlOptions {
    pub(super) fn config(self) -> ControlConfig {
        ControlConfig { socket: self.control, file: self.config }
    }
}

/// Flags of the sub-commands.
#[derive(Args, Debug)]
pub(super) struct Socket {
    /// Control socket of the master
    #[arg(long, value_name = "PATH", env = "FORKYARD_CONTROL")]
    control: PathBuf,

    /// Fail if the master has not answered for this long; 0 for no limit
    ///
    /// A command that takes time (reload, scale, stop, upgrade) continues to wait as long as the master answers a
    /// status request.
    #[arg(long, value_name = "TIME", env = "FORKYARD_CONTROL_TIMEOUT", default_value = "10s", value_parser = parse_duration)]
    timeout: Duration,

    /// Print JSON, one value per line
    #[arg(long)]
    json: bool,
}

/// The sub-commands other than `run` and `check`.
#[derive(Subcommand, Debug)]
pub(super) enum Operation {
    /// Show the master, its sockets, and what each worker is doing
    Status(Socket),
    /// Refresh the status continuously
    Top {
        #[command(flatten)]
        socket: Socket,
        /// Time between two refreshes, at least 100ms
        #[arg(long, value_name = "TIME", default_value = "2s", value_parser = parse_interval)]
        interval: Duration,
        /// Exit after this many refreshes
        #[arg(long, value_name = "N")]
        rounds: Option<u32>,
    },
    /// Replace all workers, and wait until this is done or has failed
    Reload(Socket),
    /// Upgrade the master to a new build in place, as USR2 does, and wait for the outcome
    Upgrade(Socket),
    /// Stop the server: finish the requests in flight, and wait until the master has exited
    Stop {
        #[command(flatten)]
        socket: Socket,
        /// Stop immediately, without finishing requests
        #[arg(long)]
        now: bool,
    },
    /// Change the number of workers, and wait until the new number is reached
    Scale {
        /// Number of workers
        workers: u32,
        #[command(flatten)]
        socket: Socket,
    },
    /// Reopen the log files, as USR1 does
    ReopenLogs(Socket),
    /// List or release requests that are refused because they killed workers
    #[command(subcommand)]
    Quarantine(QuarantineCommand),
    /// Show the page cache, and purge pages
    #[command(subcommand)]
    Cache(CacheCommand),
    /// Publish events, and read the event log
    #[command(subcommand)]
    Events(EventsCommand),
    /// Print a completion script for a shell
    Completions {
        /// Shell for which to print the script
        shell: Shell,
    },
    /// Print a manual page, in roff format
    Man {
        /// Sub-command that the page documents [default: the whole program]
        command: Option<String>,
    },
}

#[derive(Subcommand, Debug)]
pub(super) enum QuarantineCommand {
    /// List the quarantined requests, each with the time left
    Ls(Socket),
    /// Admit a quarantined request again
    #[command(group = ArgGroup::new("which").required(true).args(["request", "all"]))]
    Release {
        /// Request as ls shows it, as in 'GET /items/*'
        request: Option<String>,
        /// Release all requests
        #[arg(long)]
        all: bool,
        #[command(flatten)]
        socket: Socket,
    },
}

#[derive(Subcommand, Debug)]
pub(super) enum CacheCommand {
    /// Show the size and the counters of the cache
    Stats(Socket),
    /// List the pages
    Ls {
        /// List only pages whose keys begin with this prefix
        #[arg(default_value = "")]
        prefix: OsString,
        /// List at most this many pages
        #[arg(long, value_name = "N", default_value = "1000")]
        most: usize,
        #[command(flatten)]
        socket: Socket,
    },
    /// Print a page
    Get {
        /// Key of the page
        key: OsString,
        /// Print the status and the headers first
        #[arg(long)]
        headers: bool,
        #[command(flatten)]
        socket: Socket,
    },
    /// Purge a page, all pages with a tag, or all pages whose keys begin with a prefix
    #[command(group = ArgGroup::new("what").required(true).args(["key", "tag", "prefix"]))]
    Purge {
        /// Key of the page
        #[arg(value_parser = some_text())]
        key: Option<OsString>,
        /// Purge all pages with this tag
        #[arg(long, value_parser = NonEmptyStringValueParser::new())]
        tag: Option<String>,
        /// Purge all pages whose keys begin with this prefix
        #[arg(long, value_parser = some_text())]
        prefix: Option<OsString>,
        #[command(flatten)]
        socket: Socket,
    },
    /// Purge all pages
    Clear(Socket),
}

/// Rejects an empty value: an empty prefix would match every page, and an empty value in a script usually comes from an
/// unset variable.
fn some_text() -> impl TypedValueParser<Value = OsString> {
    OsStringValueParser::new().try_map(|text| {
        if text.is_empty() { Err("the value is empty ('cache clear' purges all pages)") } else { Ok(text) }
    })
}

/// The task of a sub-command other than those that serve.
#[derive(Debug)]
pub(crate) enum Task {
    /// Send a request to a master.
    Control(ControlTask),
    /// Print these bytes.
    Print(Vec<u8>),
}

impl Socket {
    pub(super) fn ask(self, command: ControlCommand) -> Task {
        let timeout = Some(self.timeout).filter(|timeout| !timeout.is_zero());
        Task::Control(ControlTask {
            endpoint: ControlEndpoint { socket: self.control, timeout },
            json: self.json,
            command,
        })
    }
}

impl Operation {
    /// Converts the sub-command to its task. `command` describes the whole command line, for completions and the
    /// manual.
    ///
    /// # Errors
    /// Returns an error from clap if the sub-command of a manual page does not exist.
    pub(super) fn task(self, command: &mut Command) -> Result<Task, clap::Error> {
        Ok(match self {
            Self::Status(socket) => socket.ask(ControlCommand::Ask(ControlRequest::Status)),
            Self::Top { socket, interval, rounds } => socket.ask(ControlCommand::Top { interval, rounds }),
            Self::Reload(socket) => socket.ask(ControlCommand::Ask(ControlRequest::Reload)),
            Self::Upgrade(socket) => socket.ask(ControlCommand::Ask(ControlRequest::Upgrade)),
            Self::Stop { socket, now } => socket.ask(ControlCommand::Ask(ControlRequest::Stop { now })),
            Self::Scale { workers, socket } => socket.ask(ControlCommand::Ask(ControlRequest::Scale { workers })),
            Self::ReopenLogs(socket) => socket.ask(ControlCommand::Ask(ControlRequest::ReopenLogs)),
            Self::Quarantine(QuarantineCommand::Ls(socket)) => socket.ask(ControlCommand::Quarantine),
            // clap requires either a request or `--all`.
            Self::Quarantine(QuarantineCommand::Release { request, socket, .. }) => {
                socket.ask(ControlCommand::Ask(ControlRequest::Release { request }))
            }
            Self::Cache(cache) => cache.task(),
            Self::Events(events) => events.task(),
            Self::Completions { shell } => {
                let mut script = Vec::new();
                let name = command.get_name().to_owned();
                clap_complete::generate(shell, command, name, &mut script);
                Task::Print(script)
            }
            Self::Man { command: about } => Task::Print(manual(command, about.as_deref())?),
        })
    }
}

impl CacheCommand {
    fn task(self) -> Task {
        let (socket, operation) = match self {
            Self::Stats(socket) => (socket, CacheOperation::Stats),
            Self::Ls { prefix, most, socket } => (socket, CacheOperation::List { prefix, most }),
            Self::Get { key, headers, socket } => (socket, CacheOperation::Get { key, headers }),
            Self::Purge { tag: Some(tag), socket, .. } => (socket, CacheOperation::PurgeTag { tag }),
            Self::Purge { prefix: Some(prefix), socket, .. } => (socket, CacheOperation::PurgePrefix { prefix }),
            Self::Purge { key, socket, .. } => (socket, CacheOperation::Purge { key: key.unwrap_or_default() }),
            Self::Clear(socket) => (socket, CacheOperation::Clear),
        };
        socket.ask(ControlCommand::Cache(operation))
    }
}

/// Returns the manual page of the whole command, or of one of its sub-commands.
fn manual(command: &mut Command, about: Option<&str>) -> Result<Vec<u8>, clap::Error> {
    command.build();
    let subject = match about {
        None => command.clone(),
        Some(name) => match command.find_subcommand(name) {
            Some(found) => found.clone().name(format!("{}-{name}", command.get_name())),
            None => {
                let kind = clap::error::ErrorKind::InvalidSubcommand;
                return Err(command.error(kind, format!("there is no sub-command '{name}'")));
            }
        },
    };
    let mut page = Vec::new();
    let written: io::Result<()> = clap_mangen::Man::new(subject).render(&mut page);
    written.map_err(|error| command.error(clap::error::ErrorKind::Io, error))?;
    Ok(page)
}
