//! Holds the configuration: every limit and choice, parsed and checked once, and never changed afterwards.
//!
//! No other part of the runtime reads flags, variables or defaults.

pub(crate) mod address;
mod contradictions;
pub(crate) mod control;
pub(crate) mod events;
pub(crate) mod failures;
pub(crate) mod files;
pub(crate) mod gateway;
pub(crate) mod logs;
pub(crate) mod peers;
pub(crate) mod privileges;
pub(crate) mod programs;
pub(crate) mod publish;
pub(crate) mod scaling;
pub(crate) mod sidecars;
pub(crate) mod sse;
pub(crate) mod upgrade;

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use self::address::Bind;
use self::control::ControlConfig;
use self::peers::Peers;
use self::privileges::PrivilegesConfig;
pub(crate) use self::scaling::{
    Jittered, Range, Scaling, Share, parse_health_path, parse_max_age, parse_max_memory, parse_max_requests,
};
use crate::protocol::forwarded::ForwardingHeaders;

/// All settings of the master and the workers.
#[derive(Clone, Debug)]
pub(crate) struct Config {
    pub(crate) binds: Vec<Bind>,
    pub(crate) workers: Range,
    pub(crate) scaling: Scaling,
    /// Threads per worker that run blocking functions.
    pub(crate) threads: u32,
    /// Requests per worker that may wait for one of these threads.
    pub(crate) queue: u32,
    pub(crate) cache: CacheConfig,
    pub(crate) events: events::EventsConfig,
    pub(crate) publish: publish::PublishConfig,
    pub(crate) backlog: u32,
    pub(crate) socket_mode: Option<u32>,
    pub(crate) start_timeout: Duration,
    pub(crate) drain_timeout: Duration,
    /// `None` for processes that run no external program: workers of a linked application, and gateways.
    pub(crate) program: Option<programs::ProgramConfig>,
    /// Dead workers per second that are replaced immediately; further replacements are delayed.
    pub(crate) respawn_rate: u32,
    pub(crate) limits: Limits,
    /// Peers that may connect; all if `None`.
    pub(crate) allow: Option<Peers>,
    /// The web servers that may connect over FastCGI, if `allow` is `None`.
    pub(crate) web_servers: Option<Peers>,
    pub(crate) trust: Option<Trust>,
    /// Peers whose connections begin with a PROXY header.
    pub(crate) proxy_protocol: Option<Peers>,
    pub(crate) privileges: PrivilegesConfig,
    /// All zero for external programs.
    pub(crate) failures: failures::Failures,
    pub(crate) control: ControlConfig,
    pub(crate) logs: logs::LogConfig,
    pub(crate) sidecars: sidecars::SidecarsConfig,
    pub(crate) upgrade: upgrade::UpgradeConfig,
    /// `None` for a linked application, and for a program that accepts connections itself.
    pub(crate) gateway: Option<gateway::GatewayConfig>,
}

/// The proxies whose headers identify the client.
#[derive(Clone, Debug)]
pub(crate) struct Trust {
    pub(crate) peers: Peers,
    /// The headers that these proxies write.
    pub(crate) family: ForwardingHeaders,
}

/// The shared page cache.
#[derive(Clone, Debug, Default)]
pub(crate) struct CacheConfig {
    /// Size; 0 disables the cache.
    pub(crate) bytes: u64,
    /// Maximum size of a page; 0 means the cache's default.
    pub(crate) max_entry: u64,
    /// The file that keeps the cache across restarts.
    pub(crate) file: Option<PathBuf>,
    /// The memory limit because of which the default size was reduced, or `None` if it was not reduced.
    pub(crate) shrunk_for: Option<u64>,
}

/// Default size of the page cache, unless a quarter of the memory is less.
pub(crate) const DEFAULT_CACHE: u64 = 64 << 20;

impl CacheConfig {
    /// Chooses the default size, which is at most a quarter of `limit`, the memory limit of this process and its
    /// children. The limit is the same at the next startup, so a stored cache still fits.
    pub(crate) fn sized_for(limit: Option<u64>) -> Self {
        const MEBIBYTE: u64 = 1 << 20;
        let quarter = limit.map_or(u64::MAX, |limit| (limit / 4 / MEBIBYTE * MEBIBYTE).max(MEBIBYTE));
        let shrunk_for = limit.filter(|_| quarter < DEFAULT_CACHE);
        Self { bytes: DEFAULT_CACHE.min(quarter), shrunk_for, ..Self::default() }
    }
}

/// Limits that apply to the clients of a worker.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Limits {
    /// Maximum number of bytes in a request's body.
    pub(crate) max_body: u64,
    /// Maximum number of bytes in a request's head: the FastCGI parameters, or the HTTP request line and headers.
    pub(crate) max_params: usize,
    /// Maximum number of connections per worker. A worker at the limit leaves new connections to its siblings.
    pub(crate) max_connections: u32,
    /// Maximum number of connections per worker from one address; 0 means no limit.
    pub(crate) max_connections_per_address: u32,
    /// Maximum number of bytes of request heads and bodies that a worker buffers; 0 means no limit.
    pub(crate) max_buffered: u64,
    /// Maximum number of headers in a request, and in the response of an HTTP application.
    pub(crate) max_headers: usize,
    /// Maximum number of bytes in a request's path and query.
    pub(crate) max_uri: usize,
    /// Maximum number of concurrent requests on one FastCGI or HTTP/2 connection.
    pub(crate) max_multiplexed: usize,
    /// Number of requests after which an HTTP connection is closed; 0 means no limit.
    pub(crate) max_requests_per_connection: u32,
    pub(crate) timeouts: Timeouts,
}

impl Limits {
    /// Returns the limit of headers to set in hyper, or `None` if it is hyper's own. hyper's parser has room for so many headers,
    /// and allocates two tables for each head if another limit is set.
    pub(crate) fn max_headers_to_set(&self) -> Option<usize> {
        const ROOM_OF_HYPER: usize = 100;
        Some(self.max_headers).filter(|&most| most != ROOM_OF_HYPER)
    }
}

/// Time limits for clients, with a resolution of one second. Zero means no limit.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Timeouts {
    /// Time until the next request on a keep-alive connection.
    pub(crate) idle: Duration,
    /// Time for the whole head of a request.
    pub(crate) header: Duration,
    /// Time for the next 4 KiB of a request's body, counted while the application waits for them.
    pub(crate) body: Duration,
    /// Time for the client to read the next 4 KiB of a response.
    pub(crate) write: Duration,
    /// Time until the next byte on an upgraded connection, in either direction.
    pub(crate) upgraded: Duration,
}

/// Number of slots for each worker: while all workers are being replaced, the old workers may still be finishing long
/// requests.
pub(crate) const SLOTS_PER_WORKER: u32 = 2;
/// Additional slots for workers that SIGTTIN adds.
pub(crate) const SPARE_SLOTS: u32 = 16;

impl Config {
    /// Returns the maximum number of processes that may exist at one time.
    pub(crate) fn slots(&self) -> u32 {
        self.workers.max.saturating_mul(SLOTS_PER_WORKER).saturating_add(SPARE_SLOTS)
    }
}

/// An external program and its arguments.
#[derive(Clone, Debug)]
pub(crate) struct Program {
    pub(crate) path: std::path::PathBuf,
    /// The name as the operator gave it.
    pub(crate) name: OsString,
    pub(crate) arguments: Vec<OsString>,
}

impl Program {
    /// Finds `name` as a shell would: as a path if it contains a slash, otherwise in the directories of PATH. With `root`,
    /// searches below that directory, because the program will be executed there.
    ///
    /// # Errors
    /// Returns a message for the operator if there is no such program, or it cannot be executed.
    fn find(command: &[OsString], root: Option<&std::path::Path>) -> Result<Self, String> {
        use std::os::unix::ffi::OsStrExt as _;
        let [name, arguments @ ..] = command else { return Err("no COMMAND after '--'".to_owned()) };
        let found = if name.as_bytes().contains(&b'/') {
            Some(std::path::PathBuf::from(name))
        } else {
            let directories = std::env::var_os("PATH").unwrap_or_default();
            std::env::split_paths(&directories)
                .map(|directory| directory.join(name))
                .find(|path| is_executable(&below(root, path)))
        };
        let shown = name.to_string_lossy();
        let path = found.ok_or(format!(
            "cannot run {shown}: no program of that name in PATH (install it, or give its full path)"
        ))?;
        let seen = below(root, &path);
        if !seen.exists() {
            return Err(format!("cannot run {shown}: no such file (check the path)"));
        }
        if !is_executable(&seen) {
            return Err(format!("cannot run {shown}: it is not an executable file (for a script, use chmod +x)"));
        }
        Ok(Self { path, name: name.clone(), arguments: arguments.to_vec() })
    }
}

impl Program {
    /// Finds the program as processes with these privileges will see it.
    ///
    /// # Errors
    /// Returns a message for the operator if there is no such program, or it cannot be executed.
    pub(crate) fn for_privileges(command: &[OsString], privileges: &PrivilegesConfig) -> Result<Self, String> {
        let PrivilegesConfig { chroot, chdir, .. } = privileges;
        Self::find(command, chroot.as_deref())?.with_path_for(chdir.as_deref().filter(|_| chroot.is_none()))
    }

    /// Makes the program's path valid even if the program is started in `directory`.
    ///
    /// # Errors
    /// Fails if the working directory of this process no longer exists.
    fn with_path_for(self, directory: Option<&std::path::Path>) -> Result<Self, String> {
        if directory.is_none() {
            return Ok(self);
        }
        let path = std::path::absolute(&self.path)
            .map_err(|error| format!("cannot find the working directory of the master: {error}"))?;
        Ok(Self { path, ..self })
    }
}

/// Returns the file that a process with the root directory `root` sees as `path`.
fn below(root: Option<&std::path::Path>, path: &std::path::Path) -> std::path::PathBuf {
    root.map_or_else(|| path.to_owned(), |root| root.join(path.strip_prefix("/").unwrap_or(path)))
}

fn is_executable(path: &std::path::Path) -> bool {
    path.is_file() && nix::unistd::access(path, nix::unistd::AccessFlags::X_OK).is_ok()
}

/// Reads a size: a number of bytes, or a number followed by K, M, G or T (powers of 1024).
///
/// # Errors
/// Returns a message with the expected form.
pub(crate) fn parse_size(text: &str) -> Result<u64, String> {
    let expected = || format!("'{text}' is not a size (expected bytes, or a number with K, M, G or T, as in 64M)");
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().map_err(|_| expected())?;
    let shift = match unit.trim_end_matches("iB").trim_end_matches('B') {
        "" => 0,
        "K" | "k" => 10,
        "M" | "m" => 20,
        "G" | "g" => 30,
        "T" | "t" => 40,
        _ => return Err(expected()),
    };
    number.checked_mul(1 << shift).ok_or_else(expected)
}

/// Formats a size in the form that [`parse_size`] reads, in the largest unit that leaves no remainder.
pub(crate) fn format_size(bytes: u64) -> String {
    let units = ["", " KiB", " MiB", " GiB", " TiB"];
    let (mut rest, mut unit) = (bytes, 0);
    while rest >= 1024 && rest % 1024 == 0 && unit + 1 < units.len() {
        rest /= 1024;
        unit += 1;
    }
    format!("{rest}{}", units[unit])
}

/// Formats a duration in whole milliseconds for the log, as in `12ms`.
pub(crate) fn in_ms(time: Duration) -> String {
    format!("{}ms", time.as_millis())
}

/// Converts a duration to whole milliseconds.
pub(crate) fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// Reads a duration: a number of seconds, or a number followed by ms, s, m or h.
///
/// # Errors
/// Returns a message with the expected form.
pub(crate) fn parse_duration(text: &str) -> Result<Duration, String> {
    let expected = || format!("'{text}' is not a time (expected seconds, or a number with ms, s, m or h, as in 500ms)");
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().map_err(|_| expected())?;
    let ms_per_unit = match unit {
        "ms" => 1,
        "" | "s" => 1_000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => return Err(expected()),
    };
    number.checked_mul(ms_per_unit).map(Duration::from_millis).ok_or_else(expected)
}

/// Like [`parse_duration`], for a duration that must not be zero.
///
/// # Errors
/// Fails as [`parse_duration`] does, or returns a message that states the minimum if the value is too small.
pub(crate) fn parse_positive_duration(text: &str) -> Result<Duration, String> {
    let time = parse_duration(text)?;
    if time.is_zero() {
        return Err(format!("'{text}' is too short (expected a time above 0, as in 500ms)"));
    }
    Ok(time)
}

/// Minimum interval between checks. With a shorter interval, the checks could take up all of a process's time.
const MIN_INTERVAL: Duration = Duration::from_millis(100);

/// Like [`parse_duration`], for an interval between checks.
///
/// # Errors
/// Fails as [`parse_duration`] does, or returns a message that states the minimum if the value is too small.
pub(crate) fn parse_interval(text: &str) -> Result<Duration, String> {
    let time = parse_duration(text)?;
    if time < MIN_INTERVAL {
        return Err(format!("'{text}' is too short (expected at least {}ms)", MIN_INTERVAL.as_millis()));
    }
    Ok(time)
}

/// Like [`parse_interval`], but also accepts 0, which disables the checks.
///
/// # Errors
/// Fails as [`parse_interval`] does.
pub(crate) fn parse_interval_or_zero(text: &str) -> Result<Duration, String> {
    match parse_duration(text)? {
        Duration::ZERO => Ok(Duration::ZERO),
        _ => parse_interval(text).map_err(|error| error.replace("expected", "expected 0 for never, or")),
    }
}

/// Reads permissions in octal, in the form that `chmod` accepts.
///
/// # Errors
/// Returns a message with the expected form.
pub(crate) fn parse_mode(text: &str) -> Result<u32, String> {
    let mode = u32::from_str_radix(text, 8).ok().filter(|&mode| mode <= 0o777);
    mode.ok_or(format!("'{text}' is not a file mode (expected three octal digits, as in 660)"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_and_written() {
        for (text, bytes) in [("0", 0), ("512", 512), ("64M", 64 << 20), ("1GiB", 1 << 30), ("3kB", 3 << 10)] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for text in ["", "M", "-1", "1.5G", "64MM", "99999999999T"] {
            assert!(parse_size(text).unwrap_err().contains("is not a size"), "{text}");
        }
        assert_eq!(format_size(64 << 20), "64 MiB");
        assert_eq!(format_size((1 << 20) + 1), "1048577");
    }

    #[test]
    fn the_default_cache_is_a_quarter_of_little_memory() {
        let sized = |limit: Option<u64>| {
            let CacheConfig { bytes, shrunk_for, .. } = CacheConfig::sized_for(limit);
            (bytes >> 20, shrunk_for.is_some())
        };
        assert_eq!(sized(None), (64, false));
        assert_eq!(sized(Some(256 << 20)), (64, false));
        assert_eq!(sized(Some(64 << 20)), (16, true));
        assert_eq!(sized(Some(63_000_000)), (15, true));
        assert_eq!(sized(Some(1 << 20)), (1, true));
    }

    #[test]
    fn times_are_read() {
        for (text, ms) in [("30", 30_000), ("500ms", 500), ("2m", 120_000), ("1h", 3_600_000)] {
            assert_eq!(parse_duration(text), Ok(Duration::from_millis(ms)), "{text}");
        }
        for text in ["", "s", "1d", "-5s", "999999999999999999h"] {
            assert!(parse_duration(text).unwrap_err().contains("is not a time"), "{text}");
        }
    }

    #[test]
    fn intervals_have_a_minimum() {
        assert_eq!(parse_interval("100ms"), Ok(MIN_INTERVAL));
        for text in ["0", "0s", "1ms", "99ms"] {
            assert!(parse_interval(text).unwrap_err().contains("expected at least 100ms"), "{text}");
        }
        assert_eq!(parse_interval_or_zero("0"), Ok(Duration::ZERO));
        assert!(parse_interval_or_zero("1ms").unwrap_err().contains("expected 0 for never, or at least 100ms"));
    }

    #[test]
    fn a_missing_program_is_named() {
        let error = Program::find(&["no-such-program-here".into()], None).unwrap_err();
        assert!(error.contains("no program of that name in PATH"), "{error}");
        assert!(Program::find(&["/etc/passwd".into()], None).unwrap_err().contains("not an executable file"));
        assert_eq!(Program::find(&["sh".into(), "-c".into()], None).unwrap().arguments, ["-c"]);
        let root = tempfile::tempdir().unwrap();
        let error = Program::find(&["/bin/sh".into()], Some(root.path())).unwrap_err();
        assert!(error.contains("no such file"), "{error}");
    }
}
