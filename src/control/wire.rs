//! What passes over the control socket: one request, a line of JSON; then answers, a line of JSON each, of which the last
//! is the outcome. After that the master closes the connection.
//!
//! This file has no I/O. A master must be able to answer the sub-commands of an older version and the other way round:
//! fields are added, never renamed, and a request that is not known is answered with a failure.

use serde::{Deserialize, Serialize};

/// The longest request, with the end of its line.
pub(crate) const MAX_REQUEST: usize = 4096;
/// The longest answer that a client reads: the status of a thousand workers has half of that.
pub(crate) const MAX_REPLY: u64 = 4 << 20;
/// Requests in flight that a status names, over all workers.
pub(crate) const MAX_SERVING: usize = 2048;

/// What an operator asks of the master.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) enum Request {
    /// How things are.
    Status,
    /// Replace all workers, one by one.
    Reload,
    /// Replace the master's own program.
    Upgrade,
    /// End, at once or after what is being served.
    Stop { now: bool },
    /// Have so many workers.
    Scale { workers: u32 },
    /// Open the log files anew.
    ReopenLogs,
    /// Refuse this request no longer, as the status names it; with `null`, none.
    Release {
        // With this the field has to be there.
        #[serde(deserialize_with = "Option::deserialize")]
        request: Option<String>,
    },
    /// Hand out the descriptor of the shared memory, with the outcome.
    Segment,
    /// The same, for the event log in it.
    Events,
}

/// What the master says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "kebab-case")]
pub(crate) enum Reply {
    /// It is under way; more is to come.
    Progress { text: String },
    /// The outcome of [`Request::Status`].
    Status { status: Status },
    /// The outcome: it is done.
    Done { text: String },
    /// The outcome: it is not done, or went wrong.
    Failed { text: String },
}

/// How things are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Status {
    pub(crate) version: String,
    /// The master's process id, as the master knows it.
    pub(crate) pid: i32,
    pub(crate) uptime_ms: u64,
    /// 1, and one more for each reload.
    pub(crate) generation: u64,
    /// How many workers there should be.
    pub(crate) target: u32,
    /// Between which numbers that moves.
    #[serde(default)]
    pub(crate) min: u32,
    #[serde(default)]
    pub(crate) max: u32,
    /// `running`, `reloading` or `stopping`.
    pub(crate) state: String,
    pub(crate) binds: Vec<BindStatus>,
    pub(crate) workers: Vec<WorkerStatus>,
    /// The requests that are refused, because workers died of them.
    #[serde(default)]
    pub(crate) quarantined: Vec<QuarantinedStatus>,
}

/// A listening socket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct BindStatus {
    pub(crate) protocol: String,
    pub(crate) address: String,
    /// Connections that nobody has accepted yet; where the kernel does not count them, 1 if there are any.
    #[serde(default)]
    pub(crate) waiting: u32,
}

/// A request that is refused for a while.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct QuarantinedStatus {
    /// Method and path, or pattern, as in `GET /items/*`.
    pub(crate) request: String,
    pub(crate) left_ms: u64,
    /// How often it has been refused in a row of relapses, this time included.
    pub(crate) times: u32,
}

/// A worker, or a slot that waits for one. What is `None` is not known: an external program tells nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct WorkerStatus {
    pub(crate) slot: u32,
    pub(crate) pid: Option<i32>,
    pub(crate) generation: u64,
    /// `starting`, `ready`, `hung` (ready, but all threads hang), `draining`, `killed` or `waiting`.
    pub(crate) state: String,
    pub(crate) age_ms: Option<u64>,
    pub(crate) requests: Option<u64>,
    pub(crate) connections: Option<u32>,
    pub(crate) in_flight: Option<u32>,
    /// Threads whose function hangs.
    #[serde(default)]
    pub(crate) hung_threads: Option<u32>,
    /// Resident memory, what it shares with others included.
    pub(crate) rss_bytes: Option<u64>,
    /// What it is serving, the oldest first; 16 of them at the most.
    pub(crate) serving: Vec<ServingStatus>,
}

/// A request in flight.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ServingStatus {
    /// Method and target, as in `GET /path`, cut.
    pub(crate) what: String,
    pub(crate) for_ms: u64,
}

impl Request {
    /// # Errors
    /// A sentence for who sent that.
    pub(crate) fn parse(line: &[u8]) -> Result<Self, String> {
        serde_json::from_slice(line).map_err(|error| {
            format!("not a request of the control socket: {error} (use the sub-commands of version {VERSION})")
        })
    }

    /// For the log.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Status => "status",
            Self::Reload => "reload",
            Self::Upgrade => "upgrade",
            Self::Stop { now: false } => "stop",
            Self::Stop { now: true } => "stop --now",
            Self::Scale { .. } => "scale",
            Self::ReopenLogs => "reopen-logs",
            Self::Release { .. } => "quarantine release",
            Self::Segment => "cache",
            Self::Events => "events",
        }
    }
}

const VERSION: &str = env!("CARGO_PKG_VERSION");

impl Reply {
    pub(crate) fn done(text: impl Into<String>) -> Self {
        Self::Done { text: text.into() }
    }

    pub(crate) fn failed(text: impl Into<String>) -> Self {
        Self::Failed { text: text.into() }
    }

    /// Whether nothing follows it.
    pub(crate) fn is_outcome(&self) -> bool {
        match self {
            Self::Progress { .. } => false,
            Self::Status { .. } | Self::Done { .. } | Self::Failed { .. } => true,
        }
    }
}

/// As it is written, with the end of the line.
pub(crate) fn line(message: &impl Serialize) -> Vec<u8> {
    // Neither type has anything that JSON cannot say; and if it had, an empty line is no answer.
    let mut line = serde_json::to_vec(message).unwrap_or_default();
    line.push(b'\n');
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_read_as_they_are_written() {
        for request in [
            Request::Status,
            Request::Reload,
            Request::Upgrade,
            Request::Stop { now: true },
            Request::Scale { workers: 4 },
            Request::ReopenLogs,
            Request::Release { request: None },
            Request::Release { request: Some("GET /a\"b".to_owned()) },
            Request::Segment,
            Request::Events,
        ] {
            let line = line(&request);
            assert_eq!(Request::parse(&line), Ok(request));
            assert!(line.len() < MAX_REQUEST && line.ends_with(b"}\n"));
        }
        let incomplete = br#"{"command":"release"}"#;
        for garbage in
            [&b""[..], b"GET / HTTP/1.1\r\n", b"{}", br#"{"command":"explode"}"#, incomplete, b"\xff", b"[[[[[["]
        {
            assert!(Request::parse(garbage).unwrap_err().contains("not a request of the control socket"));
        }
    }
}
