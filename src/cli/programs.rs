//! The flags of `forkyard run` for the readiness and the end of programs.

use std::time::Duration;

use clap::Args;

use super::parse::Mismatch;
use crate::config::gateway::Backend;
use crate::config::programs::{ProgramConfig, ReadyBy, StopSignal};
use crate::config::{parse_duration, parse_health_path};

#[derive(Args, Debug)]
pub(super) struct ProgramOptions {
    /// Time for which the first new process of a reload must stay ready before an old process is replaced; 0 disables
    ///
    /// A new process that dies within this time after it was ready makes the reload fail. [default: 1s] With --direct and
    /// --ready-by observation, a program also counts as ready once it has run for this long (by default, only until one
    /// program has been observed to accept connections; after that, every program must be observed).
    #[arg(long, value_name = "TIME", env = "FORKYARD_SETTLE", value_parser = parse_duration, help_heading = "Processes")]
    settle: Option<Duration>,

    /// Signal that asks a process of the program to exit: TERM, INT, QUIT, HUP, USR1, USR2, WINCH or PWR
    ///
    /// For programs that finish their requests on a different signal than TERM. A process that has not exited after
    /// --drain-timeout is killed.
    #[arg(
        long,
        value_name = "SIGNAL",
        env = "FORKYARD_STOP_SIGNAL",
        default_value = "TERM",
        help_heading = "Processes"
    )]
    stop_signal: StopSignal,

    /// With --direct, what proves that a program is ready: observation or descriptor
    ///
    /// With descriptor, the program writes a line feed to the descriptor whose number is in FORKYARD_READY when it can
    /// serve. With observation, it is ready when it is observed to accept connections.
    #[arg(
        long,
        value_name = "PROOF",
        env = "FORKYARD_READY_BY",
        default_value = "observation",
        help_heading = "Processes"
    )]
    ready_by: ReadyBy,
}

/// Flags that apply to gateways only.
#[derive(Args, Clone, Debug, Default)]
pub(super) struct ReadyPathOptions {
    /// Path that a new process must answer with a status below 400 before it is ready, as in /health
    ///
    /// The master sends a GET request to the private socket of the process, and repeats it after any other answer, until
    /// --start-timeout.
    #[arg(long, value_name = "PATH", env = "FORKYARD_READY_PATH", value_parser = parse_health_path, help_heading = "Processes")]
    ready_path: Option<String>,
}

impl ProgramOptions {
    /// Returns the settings. Adds contradictory settings to `wrong`. `backend` is the protocol between gateways and
    /// processes, if there are gateways.
    pub(super) fn config(
        self,
        backend: Option<Backend>,
        ready_path: ReadyPathOptions,
        wrong: &mut Vec<Mismatch>,
    ) -> ProgramConfig {
        let ready_path = ready_path.ready_path;
        let mut refuse = |settings: &'static [&'static str], text: &str| {
            wrong.push(Mismatch { settings, text: text.to_owned() });
        };
        if backend.is_some() && self.ready_by != ReadyBy::Observation {
            refuse(
                &["ready-by"],
                "--ready-by has no effect without --direct: the private socket of a process proves that it is ready \
                 (remove it; see --ready-path)",
            );
        }
        if backend == Some(Backend::Cgi) {
            if self.stop_signal != ProgramConfig::DEFAULT_STOP_SIGNAL {
                refuse(
                    &["stop-signal"],
                    "--stop-signal has no effect with --backend cgi: a CGI program ends with its request, and is never \
                     asked to exit (remove it)",
                );
            }
            if ready_path.is_some() {
                refuse(
                    &["ready-path"],
                    "--ready-path has no effect with --backend cgi: the program is started for each request, so a \
                     request says nothing about the next one (remove it)",
                );
            }
        }
        let Self { settle, stop_signal, ready_by } = self;
        ProgramConfig { settle, stop_signal, ready_by, ready_path }
    }
}
