//! The flags of daemons and cron jobs, which run alongside the workers.

use std::time::Duration;

use clap::Args;

use crate::config::parse_duration;
use crate::config::sidecars::{SidecarConfig, SidecarsConfig};

#[derive(Args, Debug)]
pub(super) struct SidecarOptions {
    /// Keep this program running alongside the workers; repeatable
    ///
    /// COMMAND is split into words as in a shell, and runs without a shell. The variable takes one daemon per line.
    #[arg(long, value_name = "NAME=COMMAND", env = "FORKYARD_DAEMON", value_parser = parse_daemons, help_heading = "Daemons and jobs")]
    daemon: Vec<Lines>,

    /// Run this program at these times, in local time; repeatable
    ///
    /// Example: clean=*/5 * * * *=./clean --all. SCHEDULE is minute, hour, day, month, day of the week, or @hourly and
    /// the like. COMMAND and the variable are as for --daemon.
    #[arg(long, value_name = "NAME=SCHEDULE=COMMAND", env = "FORKYARD_CRON", value_parser = parse_jobs, help_heading = "Daemons and jobs")]
    cron: Vec<Lines>,

    /// Time limit for one run of a job; 0 for no limit
    ///
    /// After this time the job is asked to stop, and after --drain-timeout it is killed.
    #[arg(long, value_name = "TIME", env = "FORKYARD_CRON_TIMEOUT", default_value = "0", value_parser = parse_duration, help_heading = "Daemons and jobs")]
    cron_timeout: Duration,

    /// Stop restarting a daemon after this many immediate exits with status 0; 0 for no limit
    ///
    /// An immediate exit is one within a second of the start. Consecutive ones mean that the program is not a daemon,
    /// or puts itself in the background. A reload starts it again.
    #[arg(
        long,
        value_name = "N",
        env = "FORKYARD_DAEMON_TRIES",
        default_value = "10",
        help_heading = "Daemons and jobs"
    )]
    daemon_tries: u32,
}

/// The value of one flag, or the lines of a variable.
#[derive(Clone, Debug)]
struct Lines(Vec<SidecarConfig>);

fn parse_daemons(text: &str) -> Result<Lines, String> {
    lines(text).map(SidecarConfig::daemon).collect::<Result<_, _>>().map(Lines)
}

fn parse_jobs(text: &str) -> Result<Lines, String> {
    lines(text).map(SidecarConfig::job).collect::<Result<_, _>>().map(Lines)
}

fn lines(text: &str) -> impl Iterator<Item = &str> {
    text.lines().filter(|line| !line.trim().is_empty())
}

impl SidecarOptions {
    /// # Errors
    /// Returns a message for the operator if two sidecars have the same name.
    pub(super) fn config(self) -> Result<SidecarsConfig, String> {
        let all = self.daemon.into_iter().chain(self.cron).flat_map(|Lines(sidecars)| sidecars);
        SidecarsConfig::new(all.collect(), self.cron_timeout, self.daemon_tries)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_variable_has_a_line_for_each() {
        let Lines(daemons) = parse_daemons("a=x, y; z\n\n  b=y\n").unwrap();
        assert_eq!(daemons.iter().map(|daemon| daemon.name.as_str()).collect::<Vec<_>>(), ["a", "b"]);
        assert!(parse_jobs("a=@daily=x\nb=c\n").unwrap_err().contains("'b=c' is not a job"));
    }
}
