//! Sends log lines to their destination, and determines which process writes each line.
//!
//! ```text
//! log::info!  in any process ──▶ the log's descriptor ──▶ standard error, or --log-file
//! println!    in a worker or program ──▶ a pipe ──▶ the master ──▶ log::info!(slot, pid; "…")
//! ```
//!
//! Every process writes its own lines, each with one write(2), so no line depends on another running process. The
//! descriptor is a copy of the master's standard error, or the file that the master has opened, because a worker's own
//! standard error is a pipe. Workers need no permission to open any file: after USR1 the master reopens the files, and
//! passes them to the workers ([`files`]). A reload may change the destination, the format and the levels
//! ([`prepare`]); existing workers keep their levels and their line format.
//!
//! No process ever waits for the log's reader ([`destination`]), and no client can flood the log: a worker logs a limited number of lines
//! per second from each place in the source, and a limited number of bytes per second of the application's lines ([`rate`]).
//!
//! - [`line`] and [`json`] format lines, and [`access`] those of the access log (pure).
//! - [`line_buffer`] keeps access log lines until they are written, possibly by a worker's heir.
//!
//! Imports the configuration, but nothing from master or worker.

pub(crate) mod access;
mod destination;
pub(crate) mod files;
pub(crate) mod json;
pub(crate) mod line;
pub(crate) mod line_buffer;
pub(crate) mod rate;

use std::io::{self, Write};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd, RawFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError, RwLock};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use log::kv::Source;
use log::{Level, Log, Metadata, Record};

pub(crate) use self::destination::examine;
use self::destination::{Kind, Outcome, Queue};
use self::line::{Fields, Line};
use self::rate::{ByteLimit, Elapsed, LeftOut, Sample, SiteLimits};
use crate::config::logs::{LogConfig, LogFormat};
use crate::sys;

/// The target of lines that are output from application processes.
pub(crate) const OUTPUT: &str = "app";
/// The module that logs the lines of [`OUTPUT`].
const OUTPUT_FROM: &str = concat!(env!("CARGO_CRATE_NAME"), "::master::output");
/// How long a process that is about to exit waits for the readers of its logs, in total.
const LAST_FLUSH_TIMEOUT: Duration = Duration::from_secs(1);
/// When the wait of [`LAST_FLUSH_TIMEOUT`] began.
static LAST_FLUSH: OnceLock<Instant> = OnceLock::new();

/// The log's descriptor. It is never closed; the file behind it may change.
static DESCRIPTOR: OnceLock<OwnedFd> = OnceLock::new();
static SINK: Mutex<Sink> = Mutex::new(Sink::new());
static IS_JSON: AtomicBool = AtomicBool::new(false);
/// The logger of this process, unless the application has set its own.
static LOGGER: Replaceable = Replaceable(RwLock::new(None));
/// Maximum number of bytes per second of each process's output that are logged; 0 means no limit.
static OUTPUT_RATE: AtomicU64 = AtomicU64::new(0);

/// The log of this process.
struct Sink {
    kind: Kind,
    /// Maximum number of queued bytes.
    limit: usize,
    /// Whether the log is a file; standard error is then available as well.
    is_file: bool,
    /// Whether the file cannot be written, in which case lines go to standard error.
    is_failing: bool,
    queue: Option<Queue>,
    /// The limits for a worker's lines; the master has none.
    limits: Option<Limits>,
    /// Called when there is deferred work: lines are queued, or dropped lines are to be counted.
    on_pending: Option<Box<dyn Fn() + Send>>,
    begun: Option<Instant>,
}

struct Limits {
    sites: SiteLimits,
    application: ByteLimit,
}

impl Sink {
    const fn new() -> Self {
        Self {
            kind: Kind::SharedPipe,
            limit: 0,
            is_file: false,
            is_failing: false,
            queue: None,
            limits: None,
            on_pending: None,
            begun: None,
        }
    }

    /// Returns the time since the log was first used.
    fn now(&mut self) -> Elapsed {
        self.begun.get_or_insert_with(Instant::now).elapsed()
    }

    fn put(&mut self, line: &[u8]) {
        let (fd, kind, limit) = (fd(), self.kind, self.limit);
        let queue = self.queue.get_or_insert_default();
        match queue.put(fd, kind, line, limit) {
            Outcome::Written => self.report_recovery(),
            Outcome::Queued => self.notify_pending(),
            Outcome::Lost => {}
            Outcome::Failed(why) if self.is_file => {
                // For example, the disk is full. A worker's standard error is a pipe to the master, which may still be
                // able to write the log.
                if !std::mem::replace(&mut self.is_failing, true) {
                    let message =
                        format!("cannot write to the log file, its lines go to standard error: {why} (--log-file)");
                    write_to_standard_error(&own_line(Level::Error, &message, &NO_FIELDS));
                }
                write_to_standard_error(line);
            }
            Outcome::Failed(_) => {}
        }
    }

    /// Reports lost lines, and the end of a failure. Called after a successful write.
    fn report_recovery(&mut self) {
        let lost = self.queue.as_mut().and_then(Queue::take_lost);
        if let Some(lost) = lost {
            let message = "log lines were lost because the log's reader did not keep up (--log-queue)";
            self.put(&own_line(Level::Warn, message, &[("lost", lost)]));
        }
        if std::mem::take(&mut self.is_failing) {
            self.put(&own_line(Level::Warn, "the log file can be written again", &NO_FIELDS));
        }
    }

    fn notify_pending(&self) {
        if let Some(on_pending) = &self.on_pending {
            on_pending();
        }
    }

    /// Whether a line from this place in the source is logged. If not, it is counted, and its message and fields may have been taken.
    fn admits(&mut self, record: &Record<'_>, message: &mut String, fields: &mut Fields) -> bool {
        let now = self.now();
        let Some(limits) = &mut self.limits else { return true };
        let is_ours = record.module_path().is_some_and(line::is_ours);
        if is_ours && let (Some(file), Some(line)) = (record.file_static(), record.line()) {
            let sample = || Sample {
                level: record.level(),
                target: record.target().to_owned(),
                message: std::mem::take(message),
                fields: std::mem::take(fields),
                more: 0,
            };
            let admits = limits.sites.admits((file, line), now, sample);
            if !admits {
                self.notify_pending();
            }
            return admits;
        }
        let admission = limits.application.take(message.len() + fields.size(), now);
        if let Some(left_out) = admission.left_out {
            self.report(left_out);
        }
        if !admission.is_admitted {
            self.notify_pending();
        }
        admission.is_admitted
    }

    /// Logs how many lines were left out, if the report is due by `now`: one report for each place in the source, and
    /// one for the application's lines.
    fn report_left_out(&mut self, now: Elapsed) {
        let Some(limits) = &mut self.limits else { return };
        let (samples, left_out) = (limits.sites.tick(now), limits.application.tick(now));
        for Sample { level, target, message, mut fields, more } in samples {
            fields.push("left_out", more);
            self.put(&line(level, &target, &message, &fields, false));
        }
        if let Some(left_out) = left_out {
            self.report(left_out);
        }
    }

    fn report(&mut self, LeftOut { lines, bytes }: LeftOut) {
        let message = "lines logged by the application were left out (--output-rate)";
        self.put(&own_line(Level::Warn, message, &[("lines", lines), ("bytes", bytes)]));
    }

    /// Does the work that is due. Returns the time after which to call this function again, if work is left.
    fn tick(&mut self) -> Option<Duration> {
        let now = self.now();
        self.report_left_out(now);
        if let Some(queue) = self.queue.as_mut().filter(|queue| !queue.is_empty()) {
            let _ = queue.flush(fd(), self.kind); // the next line shows the error
            if queue.is_empty() {
                self.report_recovery();
            }
        }
        let waits = self.queue.as_ref().is_some_and(|queue| !queue.is_empty()).then_some(FLUSH_INTERVAL);
        let due = self.limits.as_ref().and_then(|limits| {
            let due = [limits.sites.due(), limits.application.due()].into_iter().flatten().min()?;
            Some(due.saturating_sub(now))
        });
        [waits, due].into_iter().flatten().min()
    }
}

/// For a line without fields.
const NO_FIELDS: Option<(&str, &str)> = None;
/// Interval between a worker's attempts to write queued lines.
const FLUSH_INTERVAL: Duration = Duration::from_millis(100);

fn sink() -> MutexGuard<'static, Sink> {
    SINK.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A logger that can be replaced by one with other filters. The process has only one thread when it forks, so no child
/// inherits a held lock.
struct Replaceable(RwLock<Option<env_logger::Logger>>);

impl Replaceable {
    fn with<T>(&self, call: impl FnOnce(&env_logger::Logger) -> T) -> Option<T> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).as_ref().map(call)
    }

    fn set(&self, logger: env_logger::Logger) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = Some(logger);
    }
}

impl Log for Replaceable {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        self.with(|logger| logger.enabled(metadata)).unwrap_or(false)
    }

    fn log(&self, record: &Record<'_>) {
        self.with(|logger| logger.log(record));
    }

    fn flush(&self) {}
}

/// Starts the log.
///
/// # Errors
/// Returns a message for the operator if the file cannot be opened.
pub(crate) fn start(config: &LogConfig) -> Result<(), String> {
    let opened = match &config.file {
        Some(path) => Some(destination::open(path, "--log-file")?),
        None => sys::descriptor(2),
    };
    if let Some(opened) = opened {
        open_as_log(opened);
    }
    describe(config);
    // If the application has set its own logger, that logger stays in place.
    if log::set_logger(&LOGGER).is_ok() {
        filter(config);
    }
    Ok(())
}

/// A new configuration of the log. All steps that can fail have been completed for it.
#[derive(Debug)]
pub(crate) struct Change {
    config: LogConfig,
    /// The new file for the log's descriptor, if the file changes.
    opened: Option<OwnedFd>,
}

/// Opens the file that a new configuration needs. `running` is the current configuration.
///
/// # Errors
/// Returns a message for the operator if the file cannot be opened, or standard error is closed.
pub(crate) fn prepare(running: &LogConfig, config: &LogConfig) -> Result<Change, String> {
    let opened = match &config.file {
        same if *same == running.file => None,
        Some(path) => Some(destination::open(path, "--log-file")?),
        None => Some(sys::descriptor(2).ok_or("--log-file: standard error is closed (name a file)")?),
    };
    Ok(Change { config: config.clone(), opened })
}

/// Applies a new configuration to this process's log. Returns true if the log's destination changes.
pub(crate) fn change(Change { config, opened }: Change) -> bool {
    let moved = opened.is_some();
    if let Some(opened) = opened {
        if DESCRIPTOR.get().is_none() {
            // Standard error was closed at startup, so descriptor 2 must not become the log now.
            open_as_log(opened);
        } else if let Err(error) = replace(opened) {
            log::error!("cannot redirect the log, its destination is unchanged: {error} (--log-file)");
        }
    }
    describe(&config);
    if LOGGER.with(|_| ()).is_some() {
        filter(&config);
    }
    moved
}

fn open_as_log(opened: OwnedFd) {
    let (kind, own) = Kind::of(opened.as_fd());
    DESCRIPTOR.get_or_init(|| own.unwrap_or(opened));
    sink().kind = kind;
}

fn describe(config: &LogConfig) {
    let mut sink = sink();
    sink.is_file = config.file.is_some();
    sink.limit = usize::try_from(config.queue).unwrap_or(usize::MAX);
    IS_JSON.store(config.format == LogFormat::Json, Ordering::Relaxed);
    OUTPUT_RATE.store(config.output_rate, Ordering::Relaxed);
}

fn filter(config: &LogConfig) {
    let logger = logger(config);
    log::set_max_level(logger.filter());
    LOGGER.set(logger);
}

fn logger(config: &LogConfig) -> env_logger::Logger {
    env_logger::Builder::new()
        .parse_filters(config.filters.as_str())
        .target(env_logger::Target::Pipe(Box::new(Destination)))
        .format(|out, record| {
            let (mut message, mut fields) = (record.args().to_string(), Fields::of(record.key_values()));
            if !sink().admits(record, &mut message, &mut fields) {
                return Ok(());
            }
            let is_output = record.target() == OUTPUT && record.module_path() == Some(OUTPUT_FROM);
            out.write_all(&line(record.level(), record.target(), &message, &fields, is_output))
        })
        .build()
}

fn line(level: Level, target: &str, message: &str, fields: &Fields, is_output: bool) -> Vec<u8> {
    let time = &format!("{:.3}", Timestamp::now());
    written(Line { time, level, pid: std::process::id(), target, message, fields, is_output })
}

fn written(line: Line<'_>) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(line.message.len() + 128);
    if is_json() {
        line.write_json(&mut bytes);
    } else {
        line.write_text(&mut bytes);
    }
    bytes
}

/// Returns a line without fields in the format of the log, with this time.
pub(crate) fn line_with(time: &str, level: Level, message: &str) -> Vec<u8> {
    let (target, fields) = (env!("CARGO_CRATE_NAME"), &Fields::default());
    written(Line { time, level, pid: std::process::id(), target, message, fields, is_output: false })
}

/// Whether the log is a file and therefore not visible on standard error.
pub(crate) fn is_file() -> bool {
    sink().is_file
}

/// Returns a line that describes the log itself.
fn own_line(level: Level, message: &str, fields: &dyn Source) -> Vec<u8> {
    line(level, module_path!(), message, &Fields::of(fields), false)
}

/// Prepares the log of a child that has just been forked and becomes a worker: leaves queued lines to the master, and
/// limits the worker's own lines from now on.
pub(crate) fn begin_worker(config: &LogConfig) {
    let mut sink = sink();
    sink.queue = None;
    sink.on_pending = None;
    let (sites, application) = (SiteLimits::new(config.rate), ByteLimit::new(config.output_rate));
    sink.limits = Some(Limits { sites, application });
}

/// Sets the function to call whenever [`tick`] must be called soon.
pub(crate) fn on_pending(call: impl Fn() + Send + 'static) {
    sink().on_pending = Some(Box::new(call));
}

/// Writes queued lines, and logs how many lines were left out, if that report is due. Returns the time after which to
/// call this function again, if work is left.
pub(crate) fn tick() -> Option<Duration> {
    sink().tick()
}

/// Returns the descriptor to wait on for writing, if lines are queued.
pub(crate) fn waits_for() -> Option<BorrowedFd<'static>> {
    sink().queue.as_ref().filter(|queue| !queue.is_empty()).map(|_| fd())
}

/// Returns how long processes that fill the log should be slowed down, if the log's reader is slow. Returns `None` if
/// the reader has stopped: lines are then dropped, so that the service continues.
pub(crate) fn is_slow_for() -> Option<Duration> {
    sink().queue.as_ref().and_then(Queue::is_slow_for)
}

/// Returns how long this process, which is about to exit, may still wait for the readers of its logs. All waits for
/// readers share one deadline. Without it, shutdown would wait up to a second for each log of each process.
pub(crate) fn last_flush_timeout() -> Duration {
    LAST_FLUSH_TIMEOUT.saturating_sub(LAST_FLUSH.get_or_init(Instant::now).elapsed())
}

/// Writes queued lines before this process exits, if the reader has not stopped and reads them within a second.
pub(crate) fn finish() {
    let mut sink = sink();
    sink.report_left_out(Elapsed::MAX);
    let kind = sink.kind;
    if let Some(queue) = sink.queue.as_mut().filter(|queue| !queue.is_empty()) {
        let limit = queue.is_slow_for().unwrap_or_default().min(last_flush_timeout());
        let _ = destination::write_lines_within(fd(), kind, &queue.take(), limit); // an error can no longer be reported
        sink.report_recovery();
    }
}

/// Returns the maximum number of bytes per second of each process's output that are logged; 0 means no limit.
pub(crate) fn output_rate() -> u64 {
    OUTPUT_RATE.load(Ordering::Relaxed)
}

/// Returns the size of the queue for a slow reader (`--log-queue`).
pub(crate) fn queue_limit() -> usize {
    sink().limit
}

/// Returns the log's descriptor, which children keep open.
pub(crate) fn descriptor() -> RawFd {
    fd().as_raw_fd()
}

fn fd() -> BorrowedFd<'static> {
    static STANDARD_ERROR: OnceLock<io::Stderr> = OnceLock::new();
    match DESCRIPTOR.get() {
        Some(fd) => fd.as_fd(),
        None => STANDARD_ERROR.get_or_init(io::stderr).as_fd(),
    }
}

/// Returns a copy of the log's descriptor that other code can use as standard output and standard error. Writes to the
/// copy block.
///
/// # Errors
/// Fails if no descriptor is available.
pub(crate) fn blocking_copy() -> io::Result<OwnedFd> {
    destination::blocking_copy(fd())
}

/// Whether lines are JSON objects, in which case no other output goes to standard error.
pub(crate) fn is_json() -> bool {
    IS_JSON.load(Ordering::Relaxed)
}

/// Reopens the file, if the log is a file.
///
/// # Errors
/// Returns a message for the operator if the file cannot be opened. The log then continues as before.
pub(crate) fn reopen(path: &Path) -> Result<(), String> {
    let opened = destination::open(path, "--log-file")?;
    replace(opened).map_err(|error| format!("--log-file: {}: {error}", path.display()))
}

/// Redirects the log to `opened`, under the same descriptor number.
fn replace(opened: OwnedFd) -> io::Result<()> {
    let mut sink = sink();
    let (kind, own) = Kind::of(opened.as_fd());
    sys::replace(fd().as_raw_fd(), &own.unwrap_or(opened))?;
    sink.kind = kind;
    Ok(())
}

/// Writes text to standard error, regardless of the log's destination. Never waits for a reader.
pub(crate) fn to_standard_error(text: &[u8]) {
    if DESCRIPTOR.get().is_some() && !is_file() {
        return sink().put(text); // the log is standard error
    }
    write_to_standard_error(text);
}

/// Writes text to standard error. Text that cannot be written immediately is lost. Must not lock the sink.
fn write_to_standard_error(text: &[u8]) {
    let stderr = io::stderr();
    let (kind, own) = Kind::of(stderr.as_fd());
    let fd = own.as_ref().map_or(stderr.as_fd(), OwnedFd::as_fd);
    let _ = destination::write_lines(fd, kind, text); // the caller could do nothing about an error
}

/// Writes to the current destination of the log.
struct Destination;

impl Write for Destination {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if !line.is_empty() {
            sink().put(line);
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_waits_of_a_process_that_ends_have_one_deadline() {
        let (_read, write) = nix::unistd::pipe().unwrap();
        let (kind, own) = Kind::of(write.as_fd());
        let fd = own.as_ref().unwrap_or(&write).as_fd();
        let lines = [b'\n'; 1 << 20];
        let outcome = destination::write_lines_within(fd, kind, &lines, last_flush_timeout()).1;
        assert_eq!(outcome.unwrap_err().kind(), io::ErrorKind::WouldBlock, "no process reads");
        assert_eq!(last_flush_timeout(), Duration::ZERO, "no time is left for the next log");
    }
}
