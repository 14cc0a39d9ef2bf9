//! Defines the messages of the control socket. The client sends one request, which is a line of JSON. The master sends
//! one or more replies, each of which is a line of JSON, and then closes the connection. The last reply is the outcome.
//!
//! No I/O. Masters and sub-commands of different versions must understand each other: fields are added, never renamed, and
//! the reply to an unknown request is a failure.

use serde::{Deserialize, Serialize};

/// Longest request in bytes, including the newline.
pub(crate) const MAX_REQUEST: usize = 4096;
/// Longest reply that a client reads, in bytes: twice the size of a status with a thousand workers.
pub(crate) const MAX_REPLY: u64 = 4 << 20;
/// Maximum number of requests in flight that a status lists, over all workers.
pub(crate) const MAX_SERVING: usize = 2048;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) enum ControlRequest {
    Status,
    /// Replace all workers, one by one.
    Reload,
    /// Replace the master's program.
    Upgrade,
    /// Stop, immediately (`now`) or after the requests in flight.
    Stop {
        now: bool,
    },
    /// Set the number of workers.
    Scale {
        workers: u32,
    },
    /// Reopen the log files.
    ReopenLogs,
    /// Release the quarantined request that the status lists under this name, or all requests if `null`.
    Release {
        // Makes the field mandatory.
        #[serde(deserialize_with = "Option::deserialize")]
        request: Option<String>,
    },
    /// Pass the descriptor of the shared memory with the outcome, for access to the page cache.
    Segment,
    /// Like `Segment`, for the event log.
    Events,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "kebab-case")]
pub(crate) enum ControlReply {
    /// The command has made progress; more replies follow.
    Progress { text: String },
    /// The outcome of [`ControlRequest::Status`].
    Status { status: MasterStatus },
    /// The outcome: success.
    Done { text: String },
    /// The outcome: failure or refusal.
    Failed { text: String },
}

/// The status of a master.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct MasterStatus {
    pub(crate) version: String,
    /// The master's pid, in its own pid namespace.
    pub(crate) pid: i32,
    pub(crate) uptime_ms: u64,
    /// 1 at startup; each reload adds 1.
    pub(crate) generation: u64,
    /// Target number of workers.
    pub(crate) target: u32,
    /// Range of the target.
    #[serde(default)]
    pub(crate) min: u32,
    #[serde(default)]
    pub(crate) max: u32,
    /// `running`, `reloading` or `stopping`.
    pub(crate) state: String,
    pub(crate) binds: Vec<BindStatus>,
    /// The processes that run the application: workers, programs or app processes.
    pub(crate) workers: Vec<WorkerStatus>,
    /// The gateways in front of app processes.
    #[serde(default)]
    pub(crate) gateways: Vec<WorkerStatus>,
    /// The requests that wait for an app process. `None` without gateways.
    #[serde(default)]
    pub(crate) queued: Option<QueueStatus>,
    #[serde(default)]
    pub(crate) quarantined: Vec<QuarantinedStatus>,
}

/// A listening socket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct BindStatus {
    pub(crate) protocol: String,
    pub(crate) address: String,
    /// Number of connections in the kernel's queue. If the kernel does not count them, 1 means that there are some.
    #[serde(default)]
    pub(crate) waiting: u32,
}

/// The requests that wait in all gateways.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct QueueStatus {
    pub(crate) requests: u32,
    /// How long the oldest of them has waited.
    pub(crate) oldest_ms: u64,
}

/// A quarantined request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct QuarantinedStatus {
    /// Method and path, or pattern, as in `GET /items/*`.
    pub(crate) request: String,
    pub(crate) left_ms: u64,
    /// Number of times that the request has been quarantined in this series, including the current quarantine.
    pub(crate) times: u32,
}

/// A worker, or a slot that waits for a worker. In the fields below, `None` means unknown, because external programs
/// report nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct WorkerStatus {
    pub(crate) slot: u32,
    pub(crate) pid: Option<i32>,
    pub(crate) generation: u64,
    /// `starting`, `ready`, `hung` (ready, but all threads have hung), `draining`, `killed` or `waiting`.
    pub(crate) state: String,
    pub(crate) age_ms: Option<u64>,
    pub(crate) requests: Option<u64>,
    pub(crate) connections: Option<u32>,
    pub(crate) in_flight: Option<u32>,
    /// Number of threads whose function has hung.
    #[serde(default)]
    pub(crate) hung_threads: Option<u32>,
    /// Resident memory, including shared memory.
    pub(crate) rss_bytes: Option<u64>,
    /// Requests in flight, the oldest first, at most 16.
    pub(crate) serving: Vec<ServingStatus>,
}

/// A request in flight.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ServingStatus {
    /// Method and target, as in `GET /path`, truncated.
    pub(crate) what: String,
    pub(crate) for_ms: u64,
    /// The slot of the gateway that has sent the request to this app process.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) gateway: Option<u32>,
}

impl ControlRequest {
    /// Decodes a request.
    ///
    /// # Errors
    /// Returns a message for the client if the line is not a request.
    pub(crate) fn parse(line: &[u8]) -> Result<Self, String> {
        serde_json::from_slice(line).map_err(|error| {
            format!("not a request of the control socket: {error} (use the sub-commands of version {VERSION})")
        })
    }

    /// Returns the request's name in the log.
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

impl ControlReply {
    pub(crate) fn done(text: impl Into<String>) -> Self {
        Self::Done { text: text.into() }
    }

    pub(crate) fn failed(text: impl Into<String>) -> Self {
        Self::Failed { text: text.into() }
    }

    /// Whether this is the last reply.
    pub(crate) fn is_outcome(&self) -> bool {
        match self {
            Self::Progress { .. } => false,
            Self::Status { .. } | Self::Done { .. } | Self::Failed { .. } => true,
        }
    }
}

/// Returns the message as it is sent, including the newline.
pub(crate) fn line(message: &impl Serialize) -> Vec<u8> {
    // Requests and replies can always be serialized. If serialization failed, the message would be an empty line, which
    // is invalid.
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
            ControlRequest::Status,
            ControlRequest::Reload,
            ControlRequest::Upgrade,
            ControlRequest::Stop { now: true },
            ControlRequest::Scale { workers: 4 },
            ControlRequest::ReopenLogs,
            ControlRequest::Release { request: None },
            ControlRequest::Release { request: Some("GET /a\"b".to_owned()) },
            ControlRequest::Segment,
            ControlRequest::Events,
        ] {
            let line = line(&request);
            assert_eq!(ControlRequest::parse(&line), Ok(request));
            assert!(line.len() < MAX_REQUEST && line.ends_with(b"}\n"));
        }
        let incomplete = br#"{"command":"release"}"#;
        for garbage in
            [&b""[..], b"GET / HTTP/1.1\r\n", b"{}", br#"{"command":"explode"}"#, incomplete, b"\xff", b"[[[[[["]
        {
            assert!(ControlRequest::parse(garbage).unwrap_err().contains("not a request of the control socket"));
        }
    }
}
