//! The flag of the publish socket, and the sub-commands about events.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::Task;
use super::control::Socket;
use crate::config::publish::PublishConfig;
use crate::control::EventsOperation;
use crate::control::commands::What;

/// Of everything that serves.
#[derive(Args, Debug)]
pub(super) struct PublishOptions {
    /// Where programs in any language publish events, a datagram each: a Unix socket, for the user and the group of the
    /// workers [default: one in a folder of its own]. All programs find it as FORKYARD_EVENTS
    #[arg(long, value_name = "PATH", env = "FORKYARD_EVENTS_SOCKET", help_heading = "Sockets")]
    events_socket: Option<PathBuf>,
}

impl PublishOptions {
    pub(super) fn config(self) -> PublishConfig {
        PublishConfig { socket: self.events_socket }
    }
}

#[derive(Subcommand, Debug)]
pub(super) enum Events {
    /// Publish an event, and print its id
    Publish {
        /// The topic
        topic: String,
        /// What the event says; - reads it from standard input
        data: OsString,
        /// The kind of event
        #[arg(long, default_value = "", hide_default_value = true)]
        name: String,
        #[command(flatten)]
        socket: Socket,
    },
    /// Print events as they come: id, topic, name, data
    Tail {
        /// Only these topics
        topics: Vec<String>,
        /// Print first what the log has of the topics from this id on; 1 for all
        #[arg(long, value_name = "ID", value_parser = clap::value_parser!(u64).range(1..))]
        from: Option<u64>,
        /// Print so many events, then end
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
        count: Option<u64>,
        #[command(flatten)]
        socket: Socket,
    },
    /// List the topics, each with the id of its latest event, and show how full the log is
    Ls(Socket),
}

impl Events {
    pub(super) fn task(self) -> Task {
        let (socket, operation) = match self {
            Self::Publish { topic, data, name, socket } => (socket, EventsOperation::Publish { topic, name, data }),
            Self::Tail { topics, from, count, socket } => (socket, EventsOperation::Tail { topics, from, count }),
            Self::Ls(socket) => (socket, EventsOperation::List),
        };
        socket.ask(What::Events(operation))
    }
}
