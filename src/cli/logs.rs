//! The flags of the log and the access log.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use crate::config::logs::{AccessConfig, AccessFormat, DEFAULT_RATE, Filters, LogConfig, LogFormat};
use crate::config::parse_size;

/// Flags of both commands that serve.
#[derive(Args, Debug)]
pub(super) struct LogOptions {
    /// Write the log to this file, which is reopened on USR1 [default: standard error]
    #[arg(long, value_name = "FILE", env = "FORKYARD_LOG_FILE", help_heading = "Logging")]
    log_file: Option<PathBuf>,

    /// Format of log lines: text, or json with one object per line
    #[arg(
        long,
        value_name = "FORMAT",
        env = "FORKYARD_LOG_FORMAT",
        default_value = "text",
        hide_possible_values = true,
        help_heading = "Logging"
    )]
    log_format: Form,

    /// Log lines, in bytes, that each process queues while the log's reader is slow; 0 queues none
    ///
    /// When the queue is full, further lines are dropped and counted.
    #[arg(long, value_name = "SIZE", env = "FORKYARD_LOG_QUEUE", default_value = "1M", value_parser = parse_size, help_heading = "Logging")]
    log_queue: u64,

    /// Output of each process that is logged, in bytes per second on average; 0 for no limit
    ///
    /// Bursts of up to eight times that size are logged. Further lines are dropped and counted.
    #[arg(long, value_name = "SIZE", env = "FORKYARD_OUTPUT_RATE", default_value = "1M", value_parser = parse_size, help_heading = "Logging")]
    output_rate: u64,
}

/// Flags of linked applications.
#[derive(Args, Debug, Default)]
pub(super) struct AccessLogOptions {
    /// Write a line per request to this file, which is reopened on USR1 [default: none]
    ///
    /// With -, the lines go to standard output.
    #[arg(long, value_name = "FILE", env = "FORKYARD_ACCESS_LOG", help_heading = "Logging")]
    access_log: Option<PathBuf>,

    /// Format of access log lines: combined (with further fields at the end), or json
    #[arg(
        long,
        value_name = "FORMAT",
        env = "FORKYARD_ACCESS_LOG_FORMAT",
        default_value = "combined",
        hide_possible_values = true,
        help_heading = "Logging"
    )]
    access_log_format: AccessForm,

    /// Lines of each kind (malformed requests, for example) that a worker logs per second; 0 for no limit
    ///
    /// Of the lines above the limit, only the last is logged, with their number.
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
