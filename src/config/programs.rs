//! The settings of programs that `forkyard run` starts: when a process counts as ready, and how it is asked to exit.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use nix::sys::signal::Signal;

/// How long the first new process of a reload must stay ready, unless `--settle` is given.
const DEFAULT_SETTLE: Duration = Duration::from_secs(1);

/// The settings of programs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ProgramConfig {
    /// `--settle`, if it is given.
    pub(crate) settle: Option<Duration>,
    pub(crate) stop_signal: StopSignal,
    pub(crate) ready_by: ReadyBy,
    /// The path that a new app process must answer before it is ready.
    pub(crate) ready_path: Option<String>,
}

impl ProgramConfig {
    pub(crate) const DEFAULT_STOP_SIGNAL: StopSignal = StopSignal(Signal::SIGTERM);

    /// Returns how long the first new process of a reload must stay ready before an old process is replaced.
    pub(crate) fn settle(&self) -> Duration {
        self.settle.unwrap_or(DEFAULT_SETTLE)
    }
}

/// How it is determined that a program is ready which accepts clients' connections itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum ReadyBy {
    /// The master observes that the program accepts connections.
    #[default]
    Observation,
    /// The program writes to the descriptor whose number is in `FORKYARD_READY`.
    Descriptor,
}

impl FromStr for ReadyBy {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "observation" => Ok(Self::Observation),
            "descriptor" => Ok(Self::Descriptor),
            _ => Err(format!("'{text}' is not a proof of readiness (expected observation or descriptor)")),
        }
    }
}

/// The signal that asks a program to exit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct StopSignal(pub(crate) Signal);

/// The signals that programs use as a request to exit.
const STOP_SIGNALS: [Signal; 8] = [
    Signal::SIGTERM,
    Signal::SIGINT,
    Signal::SIGQUIT,
    Signal::SIGHUP,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
    Signal::SIGWINCH,
    Signal::SIGPWR,
];

impl FromStr for StopSignal {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let short = text.strip_prefix("SIG").unwrap_or(text);
        let signal = Signal::from_str(&format!("SIG{short}")).map_err(|_| {
            format!("'{text}' is not the name of a signal (expected TERM, INT, QUIT, HUP, USR1, USR2, WINCH or PWR)")
        })?;
        if STOP_SIGNALS.contains(&signal) {
            return Ok(Self(signal));
        }
        let reason = match signal {
            Signal::SIGKILL => "a program cannot handle it (--drain-timeout 0 kills processes at once)",
            Signal::SIGSTOP | Signal::SIGTSTP | Signal::SIGTTIN | Signal::SIGTTOU => "it suspends a process",
            Signal::SIGCONT => "it continues a process",
            _ => "it reports an event to a process",
        };
        Err(format!(
            "SIG{short} cannot ask a program to exit: {reason} (expected TERM, INT, QUIT, HUP, USR1, USR2, WINCH or PWR)"
        ))
    }
}

impl fmt::Display for StopSignal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stop_signal_has_a_name_with_or_without_its_prefix() {
        for (text, signal) in [
            ("TERM", Signal::SIGTERM),
            ("SIGUSR1", Signal::SIGUSR1),
            ("WINCH", Signal::SIGWINCH),
            ("PWR", Signal::SIGPWR),
        ] {
            assert_eq!(text.parse(), Ok(StopSignal(signal)), "{text}");
        }
    }

    #[test]
    fn a_signal_that_is_no_request_to_exit_is_refused_with_the_reason() {
        for (text, reason) in [
            ("KILL", "cannot handle it"),
            ("SIGSTOP", "suspends"),
            ("TTIN", "suspends"),
            ("CONT", "continues"),
            ("SEGV", "reports an event"),
            ("CHLD", "reports an event"),
            ("term", "not the name"),
            ("15", "not the name"),
            ("", "not the name"),
        ] {
            let error = text.parse::<StopSignal>().unwrap_err();
            assert!(error.contains(reason) && error.contains("expected TERM"), "{error}");
        }
    }
}
