//! Rejects the flags that only the other serving command has, and gives the reason, on the command line and in the
//! configuration file.
//!
//! There is no list of these flags: they are the difference between the flags of the two commands.

use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Command};

/// Prefix of the ids of rejected arguments.
const PREFIX: &str = "refused-";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ServingCommand {
    /// `forkyard run`.
    Run,
    /// A binary with a linked application.
    Linked,
}

impl ServingCommand {
    /// Returns why this command lacks the flag.
    fn reason(self, flag: &str) -> &'static str {
        match (self, flag) {
            (Self::Run, "health-path") => {
                "processes of a program have --ready-path (with --direct, all processes share one socket, so a request \
                 cannot be sent to a particular one: see --ready-by)"
            }
            (Self::Run, "ready-path") => {
                "with --direct, all processes share one socket, so a request cannot be sent to a particular one (remove \
                 --direct, or see --ready-by)"
            }
            (Self::Run, "max-queue-time") => {
                "--queue-timeout limits how long a request waits (with --direct, a shorter --backlog limits how many wait)"
            }
            (Self::Run, "log-rate") => "a program logs to its standard error, which --output-rate limits",
            (Self::Run, "threads") => {
                "a program decides itself how many requests it serves at a time (run more processes with --workers)"
            }
            (Self::Run, "sandbox" | "sandbox-read" | "sandbox-write") => {
                "the sandbox is for linked applications, since it takes effect before anything is executed (use --user, \
                 --chroot and --rlimit, or the sandboxing of systemd)"
            }
            (Self::Run, "sse" | "events-backlog" | "max-subscribers") => {
                "with --direct, no process of this server serves event subscribers (remove --direct)"
            }
            (Self::Run, "max-requests") => {
                "with --direct, only the program itself can count its requests (set a limit in the program, as with \
                 PHP_FCGI_MAX_REQUESTS: a program that exits with status 0 is replaced; or use --max-age or --max-memory)"
            }
            (Self::Run, "access-log" | "access-log-format") => {
                "with --direct, a program answers its clients itself (remove --direct, or use the access log of the web \
                 server in front of it)"
            }
            (Self::Run, "allow" | "trust" | "trust-header" | "proxy-protocol") => {
                "with --direct, a program accepts connections itself (remove --direct, or see --socket-mode and \
                 --socket-owner, and the settings of the web server in front of it)"
            }
            (Self::Run, _) => {
                "with --direct, a program accepts and serves connections itself (remove --direct, or set this in the \
                 program, or in the web server in front of it)"
            }
            (Self::Linked, "settle" | "ready-by" | "ready-path") => {
                "a worker reports when it is ready (see --start-timeout and --health-path)"
            }
            (Self::Linked, "stop-signal") => "a worker finishes its requests on SIGTERM",
            (Self::Linked, "sse") => "a linked application serves event streams with forkyard::sse",
            (Self::Linked, _) => "it is a flag of forkyard run",
        }
    }
}

/// Adds the flags of `other` that `command` lacks, as hidden arguments that will be rejected.
pub(super) fn add(command: Command, other: &Command, serving: ServingCommand) -> Command {
    let has = |command: &Command, name: &str| command.get_arguments().any(|argument| argument.get_long() == Some(name));
    let names = other.get_arguments().filter_map(|argument| argument.get_long().filter(|_| !argument.is_hide_set()));
    let missing: Vec<String> = names.filter(|name| !has(&command, name)).map(ToOwned::to_owned).collect();
    missing.into_iter().fold(command, |command, name| {
        let reason = serving.reason(&name);
        let argument = Arg::new(format!("{PREFIX}{name}")).long(name).hide(true);
        command.arg(argument.num_args(0..=1).action(ArgAction::Append).help(reason))
    })
}

/// Returns the reason why a flag is rejected, or `None` if it is not.
pub(super) fn reason(argument: &Arg) -> Option<String> {
    argument.get_id().as_str().starts_with(PREFIX).then(|| argument.get_help().map(ToString::to_string)).flatten()
}

/// Returns one error for each rejected flag that was given.
pub(super) fn given(command: &Command, matches: &ArgMatches) -> Vec<String> {
    let refused = command.get_arguments().filter_map(|argument| Some((argument, reason(argument)?)));
    let given = refused
        .filter(|(argument, _)| matches.value_source(argument.get_id().as_str()) == Some(ValueSource::CommandLine));
    given.map(|(argument, reason)| refusal(argument.get_long().unwrap_or_default(), &reason)).collect()
}

/// Returns the error for a flag that the command does not have in this mode.
pub(super) fn sentence(flag: &str, serving: ServingCommand) -> String {
    refusal(flag, serving.reason(flag))
}

fn refusal(flag: &str, reason: &str) -> String {
    format!("--{flag} is not available here: {reason}")
}
