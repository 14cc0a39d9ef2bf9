//! The flag of the publish socket, and the sub-commands about events.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::Task;
use super::control::Socket;
use crate::config::publish::PublishConfig;
use crate::control::commands::ControlCommand;
use crate::control::{EventsOperation, FirstId};

/// Flags of both commands that serve.
#[derive(Args, Debug)]
pub(super) struct PublishOptions {
    /// Unix socket on which programs publish events, one per datagram
    ///
    /// The user and the group of the workers can write to it. Programs find its path in FORKYARD_EVENTS. [default: a
    /// socket in a directory of its own]
    #[arg(long, value_name = "PATH", env = "FORKYARD_EVENTS_SOCKET", help_heading = "Sockets")]
    events_socket: Option<PathBuf>,
}

impl PublishOptions {
    pub(super) fn config(self) -> PublishConfig {
        PublishConfig { socket: self.events_socket }
    }
}

#[derive(Subcommand, Debug)]
pub(super) enum EventsCommand {
    /// Publish an event, and print its id
    Publish {
        /// Topic of the event
        topic: String,
        /// Data of the event; - reads it from standard input
        data: OsString,
        /// Name (type) of the event
        #[arg(long, default_value = "", hide_default_value = true)]
        name: String,
        #[command(flatten)]
        socket: Socket,
    },
    /// Print events as they arrive: id, topic, name, data
    Tail {
        /// Topics to print [default: all]
        topics: Vec<String>,
        /// First print the events that are in the log, starting with this id (NUMBER, or EPOCH-NUMBER as in an event
        /// stream); 1 for all
        #[arg(long, value_name = "ID")]
        from: Option<FirstId>,
        /// Exit after this many events
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
        count: Option<u64>,
        #[command(flatten)]
        socket: Socket,
    },
    /// List the topics, each with its latest id, and show how full the log is
    Ls(Socket),
}

impl EventsCommand {
    pub(super) fn task(self) -> Task {
        let (socket, operation) = match self {
            Self::Publish { topic, data, name, socket } => (socket, EventsOperation::Publish { topic, name, data }),
            Self::Tail { topics, from, count, socket } => (socket, EventsOperation::Tail { topics, from, count }),
            Self::Ls(socket) => (socket, EventsOperation::List),
        };
        socket.ask(ControlCommand::Events(operation))
    }
}
