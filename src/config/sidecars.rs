//! Parses the settings of the programs that run alongside the workers: daemons, and jobs that run at certain times.

use std::ffi::OsString;
use std::path::Path;
use std::time::Duration;

use croner::Cron;
use croner::parser::{CronParser, Seconds, Year};
use jiff::Timestamp;
use jiff::tz::TimeZone;

use super::Program;

/// Longest name of a daemon or job, in bytes.
const MAX_NAME: usize = 64;

#[derive(Clone, Debug, Default)]
pub(crate) struct SidecarsConfig {
    /// The names are unique.
    pub(crate) sidecars: Vec<SidecarConfig>,
    /// Time limit for one run of a job; zero for no limit.
    pub(crate) cron_timeout: Duration,
    /// Consecutive immediate exits with status 0 after which a daemon is not restarted; 0 for no limit.
    pub(crate) daemon_tries: u32,
}

/// A daemon or a job.
#[derive(Clone, Debug)]
pub(crate) struct SidecarConfig {
    pub(crate) name: String,
    /// `None` for a daemon.
    pub(crate) schedule: Option<Schedule>,
    /// The name or path of the program, and its arguments.
    command: Vec<String>,
}

/// The times at which a job runs.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Schedule {
    cron: Cron,
    zone: TimeZone,
}

impl SidecarsConfig {
    /// # Errors
    /// Returns a message for the operator if a name is used twice.
    pub(crate) fn new(sidecars: Vec<SidecarConfig>, cron_timeout: Duration, daemon_tries: u32) -> Result<Self, String> {
        for (index, sidecar) in sidecars.iter().enumerate() {
            if sidecars[..index].iter().any(|other| other.name == sidecar.name) {
                let name = &sidecar.name;
                return Err(format!("--daemon and --cron: the name '{name}' is used twice (give each its own name)"));
            }
        }
        Ok(Self { sidecars, cron_timeout, daemon_tries })
    }
}

impl SidecarConfig {
    /// Reads `NAME=COMMAND`.
    ///
    /// # Errors
    /// Returns a message with the expected form.
    pub(crate) fn daemon(text: &str) -> Result<Self, String> {
        let expected = || format!("'{text}' is not a daemon (expected NAME=COMMAND, as in mail=./mailer --queue out)");
        let (name, command) = text.split_once('=').ok_or_else(expected)?;
        Ok(Self { name: parse_name(name)?, schedule: None, command: parse_command(command)? })
    }

    /// Reads `NAME=SCHEDULE=COMMAND`.
    ///
    /// # Errors
    /// Returns a message with the expected form.
    pub(crate) fn job(text: &str) -> Result<Self, String> {
        let expected =
            || format!("'{text}' is not a job (expected NAME=SCHEDULE=COMMAND, as in clean=*/5 * * * *=./clean --all)");
        let (name, rest) = text.split_once('=').ok_or_else(expected)?;
        let (schedule, command) = rest.split_once('=').ok_or_else(expected)?;
        let schedule = Schedule::parse(schedule, TimeZone::system())?;
        Ok(Self { name: parse_name(name)?, schedule: Some(schedule), command: parse_command(command)? })
    }

    /// Finds the program as a process with this root directory and working directory will see it.
    ///
    /// # Errors
    /// Returns a message for the operator, with the flag, if the program cannot be executed.
    pub(crate) fn program(&self, root: Option<&Path>, directory: Option<&Path>) -> Result<Program, String> {
        let command: Vec<OsString> = self.command.iter().map(OsString::from).collect();
        let found =
            Program::find(&command, root).and_then(|found| found.with_path_for(directory.filter(|_| root.is_none())));
        found.map_err(|error| format!("--{} {}: {error}", self.kind(), self.name))
    }

    /// Returns the name of the sidecar's flag, which is also used in the log.
    pub(crate) fn kind(&self) -> &'static str {
        if self.schedule.is_some() { "cron" } else { "daemon" }
    }
}

impl Schedule {
    /// Reads minute, hour, day, month and day of the week, with seconds first if there are six fields; or a shorthand such
    /// as `@hourly`.
    ///
    /// # Errors
    /// Returns a message with the expected form.
    pub(crate) fn parse(text: &str, zone: TimeZone) -> Result<Self, String> {
        let parser = CronParser::builder().seconds(Seconds::Optional).year(Year::Disallowed).build();
        let cron = parser.parse(text.trim()).map_err(|error| {
            format!("'{text}' is not a schedule: {error} (expected minute, hour, day, month, day of the week, as in */5 * * * *)")
        })?;
        let schedule = Self { cron, zone };
        // An example is February 30.
        let never = || format!("the schedule '{text}' never occurs (check day and month)");
        schedule.after(Timestamp::now()).ok_or_else(never)?;
        Ok(schedule)
    }

    /// Returns the first time after `time`, or `None` if there is none.
    pub(crate) fn after(&self, time: Timestamp) -> Option<Timestamp> {
        let next = self.cron.find_next_occurrence(&time.to_zoned(self.zone.clone()), false).ok()?.timestamp();
        // If the next time were not later than `time`, the job would be due forever.
        (next > time).then_some(next)
    }
}

impl std::fmt::Display for Schedule {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.cron.as_str())
    }
}

fn parse_name(text: &str) -> Result<String, String> {
    let name = text.trim();
    let is_fit = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    if name.is_empty() || name.len() > MAX_NAME || !name.chars().all(is_fit) {
        return Err(format!(
            "'{name}' is not a name (expected letters, digits, '-', '_' and '.', at most {MAX_NAME} of them)"
        ));
    }
    Ok(name.to_owned())
}

fn parse_command(text: &str) -> Result<Vec<String>, String> {
    let words =
        shell_words::split(text).map_err(|error| format!("'{text}' is not a command: {error} (check the quotes)"))?;
    match words.first() {
        Some(program) if !program.is_empty() => Ok(words),
        Some(_) | None => Err("no command after the last '=' (expected a program and its arguments)".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn time(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    #[test]
    fn daemons_and_jobs_are_read() {
        let daemon = SidecarConfig::daemon("mail=./mailer --from 'a = b' \"c d\"").unwrap();
        assert_eq!((daemon.name.as_str(), daemon.kind()), ("mail", "daemon"));
        assert_eq!(daemon.command, ["./mailer", "--from", "a = b", "c d"]);
        let job = SidecarConfig::job("clean = */5 * * * * = find . -name x=y").unwrap();
        assert_eq!((job.name.as_str(), job.kind()), ("clean", "cron"));
        assert_eq!(job.command, ["find", ".", "-name", "x=y"]);
    }

    #[test]
    fn invalid_daemons_and_jobs_are_refused_with_a_reason() {
        for (text, words) in [
            ("mail", "expected NAME=COMMAND"),
            ("=x", "is not a name"),
            ("a b=x", "is not a name"),
            ("mail=", "no command after"),
            ("mail=x 'y", "check the quotes"),
        ] {
            let error = SidecarConfig::daemon(text).unwrap_err();
            assert!(error.contains(words), "{text}: {error}");
        }
        for (text, words) in [
            ("clean=x", "expected NAME=SCHEDULE=COMMAND"),
            ("clean=61 * * * *=x", "is not a schedule"),
            ("clean=* * *=x", "is not a schedule"),
            ("clean=0 0 30 2 *=x", "never occurs"),
        ] {
            let error = SidecarConfig::job(text).unwrap_err();
            assert!(error.contains(words), "{text}: {error}");
        }
        let twice = [SidecarConfig::daemon("a=x").unwrap(), SidecarConfig::job("a=@daily=x").unwrap()];
        assert!(
            SidecarsConfig::new(twice.to_vec(), Duration::ZERO, 0).unwrap_err().contains("the name 'a' is used twice")
        );
    }

    #[test]
    fn a_missing_program_is_named_with_its_flag() {
        let error = SidecarConfig::daemon("mail=no-such-program-here").unwrap().program(None, None).unwrap_err();
        assert!(error.contains("--daemon mail") && error.contains("no program of that name"), "{error}");
    }

    #[test]
    fn times_are_local_and_a_change_of_the_clock_neither_skips_nor_repeats_a_run() {
        let zone = TimeZone::get("Europe/Berlin").unwrap();
        let daily = Schedule::parse("30 2 * * *", zone.clone()).unwrap();
        assert_eq!(daily.after(time("2026-01-10T00:00:00Z")), Some(time("2026-01-10T01:30:00Z")));
        // On March 29, the time 2:30 does not exist: the job runs after the clock has jumped.
        let jumped = daily.after(time("2026-03-28T12:00:00Z")).unwrap();
        assert!((time("2026-03-29T00:59:00Z")..time("2026-03-29T02:00:00Z")).contains(&jumped), "{jumped}");
        // On October 25, the time 2:30 occurs twice.
        let first = daily.after(time("2026-10-24T12:00:00Z")).unwrap();
        assert_eq!(first, time("2026-10-25T00:30:00Z"));
        assert_eq!(daily.after(first), Some(time("2026-10-26T01:30:00Z")));
        let hourly = Schedule::parse("@hourly", zone).unwrap();
        assert_eq!(hourly.after(time("2026-10-25T00:30:00Z")), Some(time("2026-10-25T01:00:00Z")));
    }
}
