//! Where the log and the access log go, and in which form: parsed once, then never changed.

use std::path::PathBuf;

/// All about logs.
#[derive(Clone, Debug, Default)]
pub(crate) struct LogConfig {
    /// Standard error if `None`.
    pub(crate) file: Option<PathBuf>,
    pub(crate) format: LogFormat,
    /// No access log if `None`.
    pub(crate) access: Option<AccessConfig>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum LogFormat {
    #[default]
    Text,
    /// One object a line.
    Json,
}

/// A line for each request.
#[derive(Clone, Debug)]
pub(crate) struct AccessConfig {
    /// Standard output if `None`.
    pub(crate) file: Option<PathBuf>,
    pub(crate) format: AccessFormat,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum AccessFormat {
    /// Apache's, and pairs behind it.
    #[default]
    Combined,
    /// One object a line.
    Json,
}
