//! The log and the access log: destination, filters, format.

use std::fmt;
use std::path::PathBuf;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LogConfig {
    pub(crate) filters: Filters,
    /// The log file; standard error if `None`.
    pub(crate) file: Option<PathBuf>,
    pub(crate) format: LogFormat,
    /// The access log; `None` disables it.
    pub(crate) access: Option<AccessConfig>,
    /// Bytes of log lines that each process queues while the log's reader is slow.
    pub(crate) queue: u64,
    /// Maximum number of lines per second that a worker logs from each place in the source; 0 means no limit.
    pub(crate) rate: u32,
    /// Maximum number of bytes per second of each process's output that are logged; 0 means no limit.
    pub(crate) output_rate: u64,
}

impl Default for LogConfig {
    fn default() -> Self {
        let (queue, rate, output_rate) = (DEFAULT_QUEUE, DEFAULT_RATE, DEFAULT_OUTPUT_RATE);
        let (filters, format) = (Filters::default(), LogFormat::default());
        Self { filters, file: None, format, access: None, queue, rate, output_rate }
    }
}

pub(crate) const DEFAULT_QUEUE: u64 = 1 << 20;
pub(crate) const DEFAULT_RATE: u32 = 20;
pub(crate) const DEFAULT_OUTPUT_RATE: u64 = 1 << 20;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum LogFormat {
    #[default]
    Text,
    /// One object per line.
    Json,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct AccessConfig {
    /// The file; standard output if `None`.
    pub(crate) file: Option<PathBuf>,
    pub(crate) format: AccessFormat,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum AccessFormat {
    /// Apache's combined format, followed by `key=value` pairs.
    #[default]
    Combined,
    /// One object per line.
    Json,
}

/// A general level and levels of modules, in the syntax of `env_logger`.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Filters(String);

/// The levels, starting with the quietest.
const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];
/// The general level if only the levels of modules are given.
const DEFAULT: &str = "info";
/// Names that other programs use for levels.
const OTHER_NAMES: [(&str, &str); 19] = [
    ("warning", "warn"),
    ("notice", "info"),
    ("information", "info"),
    ("informational", "info"),
    ("normal", "info"),
    ("err", "error"),
    ("fatal", "error"),
    ("crit", "error"),
    ("critical", "error"),
    ("alert", "error"),
    ("emerg", "error"),
    ("emergency", "error"),
    ("severe", "error"),
    ("verbose", "debug"),
    ("fine", "debug"),
    ("all", "trace"),
    ("none", "off"),
    ("quiet", "off"),
    ("silent", "off"),
];

impl Filters {
    /// Parses `LEVEL`, `MODULE=LEVEL`, or a comma-separated list of them. `env_logger` itself would accept any word as
    /// the name of a module, and would then log nothing from other modules.
    ///
    /// # Errors
    /// Returns a message for the operator if the text is not a valid filter.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let mut general = None;
        let mut directives = Vec::new();
        for part in text.split(',').map(str::trim) {
            match part.split_once('=') {
                Some((module, level)) => {
                    let module = module.trim();
                    let is_path = |c: char| c.is_alphanumeric() || "_:-".contains(c);
                    if module.is_empty() || !module.chars().all(is_path) {
                        return Err(format!("'{module}' is not a module's name ({})", expected()));
                    }
                    directives.push(format!("{module}={}", level_of(level.trim())?));
                }
                None => {
                    let level = level_of(part)?;
                    if let Some(other) = general.replace(level) {
                        return Err(format!("two levels are given, {other} and {level} ({})", expected()));
                    }
                }
            }
        }
        directives.insert(0, general.unwrap_or(DEFAULT).to_owned());
        Ok(Self(directives.join(",")))
    }

    /// Returns the filters in the syntax of `env_logger`.
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

impl Default for Filters {
    fn default() -> Self {
        Self(DEFAULT.to_owned())
    }
}

impl fmt::Debug for Filters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

fn expected() -> String {
    format!("expected {}, also per module as in info,hyper=debug", LEVELS.join(", "))
}

fn level_of(text: &str) -> Result<&'static str, String> {
    if let Some(level) = LEVELS.iter().find(|level| text.eq_ignore_ascii_case(level)) {
        return Ok(level);
    }
    let other = OTHER_NAMES.iter().find(|(name, _)| text.eq_ignore_ascii_case(name));
    let hint = other.map_or_else(String::new, |(_, level)| format!("; did you mean '{level}'?"));
    Err(format!("'{text}' is not a log level ({}{hint})", expected()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_are_read_and_what_is_none_is_refused_with_the_list_and_a_hint() {
        for (text, read) in [
            ("warn", "warn"),
            ("INFO", "info"),
            ("debug,hyper=off", "debug,hyper=off"),
            ("hyper=Trace , forkyard::master=warn,error", "error,hyper=trace,forkyard::master=warn"),
            // Other modules keep the default level.
            ("hyper=debug", "info,hyper=debug"),
        ] {
            assert_eq!(Filters::parse(text).as_ref().map(Filters::as_str), Ok(read), "{text}");
        }
        for (text, said) in [
            ("loud", "'loud' is not a log level (expected off, error, warn, info, debug, trace, also per module"),
            ("warning", "; did you mean 'warn'?)"),
            ("Notice", "; did you mean 'info'?)"),
            ("info,zzz=nix", "'nix' is not a log level"),
            ("info,zzz=warning", "; did you mean 'warn'?)"),
            ("info,zzz=", "'' is not a log level"),
            ("info,hyper", "'hyper' is not a log level"),
            ("info,=debug", "'' is not a module's name"),
            ("info,a b=debug", "'a b' is not a module's name"),
            ("info,debug", "two levels are given, info and debug"),
            ("info/words", "'info/words' is not a log level"),
            ("", "'' is not a log level"),
            ("info,", "'' is not a log level"),
        ] {
            let error = Filters::parse(text).unwrap_err();
            assert!(error.contains(said), "{text}: {error}");
        }
    }

    #[test]
    fn what_is_read_is_what_the_logger_understands() {
        use log::Log as _;
        let enabled = |filters: &str, target: &str, level| {
            let filters = Filters::parse(filters).unwrap();
            let logger = env_logger::Builder::new().parse_filters(filters.as_str()).build();
            logger.enabled(&log::Metadata::builder().target(target).level(level).build())
        };
        assert!(enabled("hyper=off", "forkyard::master", log::Level::Info));
        assert!(!enabled("hyper=off", "hyper::proto", log::Level::Error));
        assert!(enabled("info,hyper=debug", "hyper::proto", log::Level::Debug));
        assert!(!enabled("off", "forkyard", log::Level::Error));
    }
}
