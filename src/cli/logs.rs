//! The flags of the log and the access log.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use crate::config::logs::{AccessConfig, AccessFormat, DEFAULT_RATE, Filters, LogConfig, LogFormat};
use crate::config::parse_size;

/// Those of everything that serves.
#[derive(Args, Debug)]
pub(super) struct LogOptions {
    /// The log goes to this file, which is opened again on USR1 [default: standard error]
    #[arg(long, value_name = "FILE", env = "FORKYARD_LOG_FILE", help_heading = "Logging")]
    log_file: Option<PathBuf>,

    /// The form of the log's lines: text, or json for one object a line
    #[arg(
        long,
        value_name = "FORM",
        env = "FORKYARD_LOG_FORMAT",
        default_value = "text",
        hide_possible_values = true,
        help_heading = "Logging"
    )]
    log_format: Form,

    /// Bytes of the log that wait in each process while its reader is slow; when as many wait, further lines are lost and
    /// counted. With 0 none waits
    #[arg(long, value_name = "SIZE", env = "FORKYARD_LOG_QUEUE", default_value = "1M", value_parser = parse_size, help_heading = "Logging")]
    log_queue: u64,

    /// Bytes a second, on average, that are logged of the output of each process (bursts of eight times that pass); further lines are left
    /// out and counted; 0 for no limit
    #[arg(long, value_name = "SIZE", env = "FORKYARD_OUTPUT_RATE", default_value = "1M", value_parser = parse_size, help_heading = "Logging")]
    output_rate: u64,
}

/// Those of an application linked in.
#[derive(Args, Debug, Default)]
pub(super) struct AccessLogOptions {
    /// A line for each request goes to this file, which is opened again on USR1; - is standard output [default: none]
    #[arg(long, value_name = "FILE", env = "FORKYARD_ACCESS_LOG", help_heading = "Logging")]
    access_log: Option<PathBuf>,

    /// The form of the access log's lines: combined (as other servers write it, and more behind it), or json for one
    /// object a line
    #[arg(
        long,
        value_name = "FORM",
        env = "FORKYARD_ACCESS_LOG_FORMAT",
        default_value = "combined",
        hide_possible_values = true,
        help_heading = "Logging"
    )]
    access_log_format: AccessForm,

    /// Lines a second of each kind that a worker logs of itself (malformed requests, say); of further ones the last is logged, with their
    /// number; 0 for no limit
    #[arg(long, value_name = "N", env = "FORKYARD_LOG_RATE", default_value_t = DEFAULT_RATE, help_heading = "Logging")]
    log_rate: u32,
}

/// The names of [`LogFormat`].
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Form {
    Text,
    Json,
}

/// The names of [`AccessFormat`].
#[derive(Clone, Copy, Debug, Default, ValueEnum)]
enum AccessForm {
    #[default]
    Combined,
    Json,
}

impl LogOptions {
    pub(super) fn config(&self, filters: Filters, access: AccessLogOptions) -> LogConfig {
        let format = match self.log_format {
            Form::Text => LogFormat::Text,
            Form::Json => LogFormat::Json,
        };
        LogConfig {
            filters,
            file: self.log_file.clone(),
            format,
            queue: self.log_queue,
            output_rate: self.output_rate,
            rate: access.log_rate,
            access: access.config(),
        }
    }
}

impl AccessLogOptions {
    fn config(self) -> Option<AccessConfig> {
        let format = match self.access_log_format {
            AccessForm::Combined => AccessFormat::Combined,
            AccessForm::Json => AccessFormat::Json,
        };
        let path = self.access_log?;
        Some(AccessConfig { file: Some(path).filter(|path| path.as_os_str() != "-"), format })
    }
}
